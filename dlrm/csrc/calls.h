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

constexpr int64_t kPanel = 32;  // outputs of a layer whose weights lie together

// Weights (panels, in, kPanel) and bias (panels * kPanel,); outputs past the layer's end have zeros.
struct Layer {
  const float *weights, *bias;
  int64_t in, panels;
  bool relu;
};

struct Mlp {
  const Layer* layer;
  int64_t layers, batch;
  const float* in;
  int64_t in_stride;
  float* out;     // (batch, width)
  int64_t width;  // of the last layer
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // Examples begin .. end of an interaction, and of its gradient.
  void (*interact)(const Interaction&, int64_t begin, int64_t end);
  void (*interact_grad)(const Interaction&, int64_t begin, int64_t end);
  // Examples begin .. end of an MLP.
  void (*mlp)(const Mlp&, int64_t begin, int64_t end);
};

}  // namespace robe
