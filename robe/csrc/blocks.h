// Ids that count, and blocks of the array. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

struct Block {
  int64_t offset;  // of its first slot; -1: zeros
  int32_t length;
  int32_t negative;
};

// Read once: other threads may change ids meanwhile, and what is checked must be what is used.
ROBE_INLINE int64_t id_at(const Job& job, int64_t position) {
  return job.wide ? __atomic_load_n(static_cast<const int64_t*>(job.ids) + position, __ATOMIC_RELAXED)
                  : __atomic_load_n(static_cast<const int32_t*>(job.ids) + position, __ATOMIC_RELAXED);
}

// The most runs of slots that an id's embedding lies in.
ROBE_INLINE int64_t pieces_per_id(const Job& job) {
  return job.hash == Hash::identity ? 1 : job.hash == Hash::span ? 2 : (job.dim + job.block - 1) / job.block;
}

// Whether a row counts: it is no padding, and within its table. Notes an id that is outside; an id that was not let in
// becomes the one it reads instead.
ROBE_INLINE bool counts(const Job& job, int64_t feature, int64_t& id, bool& outside) {
  if (job.padded && id == job.padding) return false;
  const uint64_t bound = static_cast<uint64_t>(job.num_embeddings[feature]);
  if (bound && static_cast<uint64_t>(id) >= bound) {
    outside = true;
    return false;
  }
  if (job.filter && !admitted(job, row_hash(job.keys[feature], id))) id = kSharedId;
  return true;
}

// value(i) for i in a block of an int8 array, scale by scale.
template <class Use>
ROBE_INLINE void dequantize(const Job& job, const Block& from, Use use) {
  const int8_t* source = static_cast<const int8_t*>(job.weight);
  for (int64_t slot = from.offset, end = from.offset + from.length; slot < end;) {
    const int64_t group = slot >> job.group_shift, next = (group + 1) << job.group_shift;
    const float scale = from.negative ? -job.scale[group] : job.scale[group];
    for (const int64_t stop = next < end ? next : end; slot < stop; ++slot)
      use(slot - from.offset, scale * static_cast<float>(source[slot]));
  }
}

}  // namespace ROBE_ISA
}  // namespace robe
