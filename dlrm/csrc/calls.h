// What the model's kernels are given.

#pragma once

#include <cstdint>

#include "hash.h"

namespace robe {

// The pairwise dot products of dense (B, D) and embeddings (B, F, D), behind dense itself: out (B, D + (F + 1) * F / 2). In the
// backward, out is the gradient. Gradients of dense and embeddings are contiguous.
struct Interaction {
  bool wide;  // float64, else float32
  int64_t batch, features, dim;
  const void *dense, *embeddings;
  int64_t dense_stride, example_stride, feature_stride;
  void* out;
  int64_t out_stride;
  void *dense_grad, *embeddings_grad;
};

constexpr int64_t kPanel = 32;  // outputs of a dense layer whose weights lie together

// A linear layer. Its outputs come in blocks; those past its end have weights and biases of zero. Dense: weights
// (blocks, in, kPanel). Sparse: weights (n, block), an input each, and where those of each block start.
struct Layer {
  const float *weights, *bias;
  const void* inputs;     // (n,) uint16, or uint32 if wide; null: dense
  const int64_t* starts;  // (blocks + 1,)
  int64_t in, blocks, block;
  bool wide, relu;
};

struct Mlp {
  const Layer* layer;
  int64_t layers;
  const float* in;
  int64_t in_stride;
  float* out;     // (rows, width)
  int64_t width;  // of the last layer
  float* scratch;            // two halves, each with rows_at_once times the widest layer's inputs or outputs
  int64_t scratch_half, rows_at_once;  // a multiple of kRowsTogether
};

constexpr int64_t kRowsTogether = 48;  // rows that fill registers, with any instruction set

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // Examples begin .. end of an interaction, and of its gradient.
  void (*interact)(const Interaction&, int64_t begin, int64_t end);
  void (*interact_grad)(const Interaction&, int64_t begin, int64_t end);
  // Rows begin .. end of an MLP.
  void (*mlp)(const Mlp&, int64_t begin, int64_t end);
};

}  // namespace robe
