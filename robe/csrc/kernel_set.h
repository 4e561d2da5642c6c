// The kernels of the array, as each instruction set has them.

#pragma once

#include "job.h"

namespace robe {

// The kernels of one instruction set.
struct Kernels {
  const char* name;
  // Embeddings of bags begin .. end; false where an id was outside its table.
  bool (*read)(const Job&, int64_t begin, int64_t end);
  // Gradient of the per_sample_weights of bags begin .. end; false where an id was outside its table.
  bool (*weights_gradient)(const Job&, int64_t begin, int64_t end, void* out);
  // Pieces of the gradient of bags begin .. end, and how many records they make in each segment. False where an id was
  // outside its table.
  bool (*collect)(const Job&, int64_t begin, int64_t end, int shift, Pieces&, int64_t* counts);
  // The records of pieces, each segment's from its cursor on.
  void (*sort)(Dtype, const Pieces&, int shift, void* records, int64_t* cursors);
  // Bring what the records of a segment read and write towards the cache; weight and state may be null.
  void (*prefetch)(Dtype, const Segments&, int64_t segment, const void* weight, void* const* state);
  // Sum the records of a segment into the dense gradient, or sum them and apply the update.
  void (*gradient)(Dtype, const Segments&, int64_t segment, void* scratch, void* out);
  void (*update)(Dtype, const Segments&, int64_t segment, void* scratch, void* weight, const Update&);
  // Write the slots that the records of a segment touch, and their sums (in double or float), and return how many.
  int64_t (*sums)(Dtype, const Segments&, int64_t segment, void* scratch, int64_t* slots, void* values);
};

}  // namespace robe
