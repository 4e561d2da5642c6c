// What the kernels are given: one call of lookup or bag, its gradients by segment, an optimizer's rule.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "bag.h"
#include "hash.h"
#include "update.h"

namespace robe {

enum class Dtype { float64, float32, bfloat16, float16, int8 };

constexpr int64_t kTileBlocks = 128;  // the most that are read ahead
constexpr int64_t kSpare = 8;         // the most that a vector holds

// One call of lookup or bag. Strides count elements; pointers are borrowed from the caller's tensors.
struct Job {
  // The array
  const void* weight;
  Dtype dtype;
  const float* scale;   // int8: of each group of weights
  int group_shift;      // int8: log2 of the weights of a group
  // The tables
  const int64_t* keys;  // (features,); of a lookup these three repeat from the first feature on, as far as a tile reaches
  const int64_t* num_embeddings;  // (features,), 0: unbounded
  int64_t features, dim, block;
  uint64_t choices;     // offsets that a block can have, m - Z + 1
  Hash hash;
  bool sign;
  bool padded;
  int64_t padding;
  const uint64_t* filter;  // of the ids that have an embedding of their own, or null: all have
  uint64_t filter_words;
  const uint64_t* shared;  // (features,), with a filter: the row hash of the shared id; then kSpare more
  // The ids. Bag k is example k / features of feature k % features where there is one id each (Pooling::none), else it is
  // example k % batch of feature k / batch and its ids are at offsets[k] .. offsets[k + 1].
  Pooling pooling;
  const void* ids;
  bool wide;            // int64, else int32
  int64_t batch, ids_stride, ids_feature_stride;
  const int64_t* offsets;
  const void* per_sample_weights;  // of the embeddings' dtype, or null
  int64_t per_sample_weights_stride;
  // The embeddings (B, F, D), or their gradient
  void* embeddings;
  int64_t example_stride, feature_stride;
  bool stream;          // write the embeddings past the caches

  int64_t bags() const { return batch * features; }
};

// A run of slots that a gradient goes to.
template <class T, class Sum>
struct Piece {
  int64_t offset;
  const T* grad;
  Sum scale;
  int32_t length;
};

// Pieces one after another, in the order of the ids. Ids and weights may change while they are read: what has been
// read is kept here, and decides alone where anything is written.
struct Pieces {
  std::unique_ptr<char[]> data;
  int64_t size = 0, capacity = 0;

  // Room for twice as many, or for ``least``. No template and not in a kernel: compiled for any CPU.
  void grow(int64_t least, size_t item) {
    const int64_t more = std::max(least, 2 * capacity);
    std::unique_ptr<char[]> wider(new char[static_cast<size_t>(more) * item]);
    if (size) std::memcpy(wider.get(), data.get(), static_cast<size_t>(size) * item);
    data = std::move(wider);
    capacity = more;
  }
};

// A piece, or the part of one, that falls into one segment of the array.
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

ROBE_INLINE bool admitted(const Job& job, uint64_t row) { return admitted(job.filter, job.filter_words, row); }

}  // namespace robe
