// What the kernels are given, and the hash: the same for every instruction set.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define ROBE_INLINE inline __attribute__((always_inline))

namespace robe {

enum class Dtype { float64, float32, bfloat16, float16, int8 };
enum class Hash { mix, span, linear, identity };  // span: "mix" with blocks longer than a row
enum class Mode { one, sum, mean, max };          // one: an id per feature, no pooling
enum class Rule { sgd, adagrad, adam };

constexpr int64_t kTileBlocks = 128;  // the most that are read ahead
constexpr int64_t kSpare = 8;         // the most that a vector holds
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// One call of lookup or bag. Strides count elements; pointers are borrowed from the caller's tensors.
struct Job {
  // The array
  const void* weight;
  Dtype dtype;
  const float* scale;   // int8: of each group of weights
  int group_shift;      // int8: log2 of the weights of a group
  // The tables
  const int64_t* keys;  // (features,); these three, where Mode::one, go on from the first as far as a tile does
  const int64_t* rows;  // (features,), 0: unbounded
  int64_t features, dim, block;
  uint64_t choices;     // offsets that a block can have, m - Z + 1
  Hash hash;
  bool sign;
  bool padded;
  int64_t padding;
  const uint64_t* filter;  // of the ids that have a row of their own (robe/admission.py), or null: all have
  uint64_t filter_words;
  const uint64_t* rare;    // (features,), with a filter: the hash of the row that the other ids read; then kSpare more
  // The ids. Bag k is example k / features of feature k % features where there is one id each (Mode::one), else it is
  // example k % batch of feature k / batch and its ids are at offsets[k] .. offsets[k + 1].
  Mode mode;
  const void* ids;
  bool wide;            // int64, else int32
  int64_t batch, ids_stride, ids_feature_stride;
  const int64_t* offsets;
  const void* factors;  // per_sample_weights, of the array's dtype, or null
  int64_t factors_stride;
  // The embeddings (B, F, D), or their gradient
  void* rows_data;
  int64_t example_stride, feature_stride;
  bool stream;          // write the embeddings past the caches

  int64_t bags() const { return batch * features; }
};

// A piece of a gradient that falls into one segment of the array.
template <class T, class Sum>
struct Record {
  const T* grad;
  Sum scale;
  uint16_t start;  // within the segment
  uint16_t length;
};

// Records in order of their segment; within it, in the order of the ids.
struct Segments {
  void* records;
  const int64_t* ends;  // of each segment's records; they begin where the last segment's end
  int shift;            // log2 of the slots of a segment
  int64_t slots;        // of the array
};

struct Update {
  Rule rule;
  void* state[2];
  double options[5];
};

// The pairwise dot products of dense (B, D) and rows (B, F, D), behind dense itself: out (B, D + (F + 1) * F / 2). In the
// backward, out is the gradient. Gradients of dense and rows are contiguous.
struct Interaction {
  bool wide;  // float64, else float32
  int64_t batch, features, dim;
  const void *dense, *rows;
  int64_t dense_stride, example_stride, feature_stride;
  void* out;
  int64_t out_stride;
  void *dense_grad, *rows_grad;
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
  int64_t layers, rows;
  const float* in;
  int64_t in_stride;
  float* out;     // (rows, width)
  int64_t width;  // of the last layer
};

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // Embeddings of bags begin .. end; false where an id was outside its table.
  bool (*read)(const Job&, int64_t begin, int64_t end);
  // Gradient of the factors of bags begin .. end; false where an id was outside its table.
  bool (*factor_grad)(const Job&, int64_t begin, int64_t end, void* out);
  // Records of bags begin .. end: how many fall into each segment; then the records themselves, each segment's from
  // its cursor on. False where an id was outside its table.
  bool (*count)(const Job&, int64_t begin, int64_t end, int shift, int64_t* counts);
  void (*fill)(const Job&, int64_t begin, int64_t end, int shift, void* records, int64_t* cursors);
  // Bring what the records of a segment read and write towards the cache; weight and state may be null.
  void (*prefetch)(Dtype, const Segments&, int64_t segment, const void* weight, void* const* state);
  // Sum the records of a segment into the dense gradient, or sum them and apply the update.
  void (*gradient)(Dtype, const Segments&, int64_t segment, void* scratch, void* out);
  void (*update)(Dtype, const Segments&, int64_t segment, void* scratch, void* weight, const Update&);
  // Examples begin .. end of an interaction, and of its gradient.
  void (*interact)(const Interaction&, int64_t begin, int64_t end);
  void (*interact_grad)(const Interaction&, int64_t begin, int64_t end);
  // Rows begin .. end of an MLP.
  void (*mlp)(const Mlp&, int64_t begin, int64_t end);
};

// The finaliser of SplitMix64; see robe/hashing.py, which this file must agree with bit for bit.
ROBE_INLINE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// What stands for an id of a table: ``row`` in robe/hashing.py.
ROBE_INLINE uint64_t row_hash(uint64_t key, int64_t id) { return mix64(key + static_cast<uint64_t>(id) * kGolden); }
ROBE_INLINE uint64_t row_hash(int64_t key, int64_t id) { return row_hash(static_cast<uint64_t>(key), id); }

// The high half of x * n, for n below 2**32, from products of 32 bits, which vectorise.
ROBE_INLINE uint64_t multiply_high_32(uint64_t x, uint64_t n) {
  return ((x >> 32) * n + ((x & 0xFFFFFFFF) * n >> 32)) >> 32;
}

ROBE_INLINE uint64_t multiply_high(uint64_t x, uint64_t n) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(x) * n) >> 64);
}

// robe/admission.py: the id whose row the ids read that were not let in, and whether one was, of its row's hash.
constexpr int64_t kRare = INT64_MIN;

ROBE_INLINE bool admitted(const uint64_t* filter, uint64_t words, uint64_t row) {
  const uint64_t one = 1, bits = one << (row & 63) | one << (row >> 6 & 63) | one << (row >> 12 & 63);
  return (filter[multiply_high(row, words)] & bits) == bits;
}

ROBE_INLINE bool admitted(const Job& job, uint64_t row) { return admitted(job.filter, job.filter_words, row); }

ROBE_INLINE int64_t floor_mod(int64_t x, int64_t n) {
  const int64_t rest = x % n;
  return rest < 0 ? rest + n : rest;
}

}  // namespace robe
