// Where the blocks of a row lie: the hash of robe/hashing.py, bit for bit. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

struct Block {
  int64_t offset;  // of its first slot; -1: zeros
  int32_t length;
  int32_t negative;
};

// Calls emit(component, offset, length, negative) for each block of a row, in order. The commonest hash is compiled for
// itself, the others are told apart as they run.
template <bool is_mix, class Emit>
ROBE_INLINE void each_block(const Job& job, int64_t feature, int64_t id, Emit emit) {
  constexpr uint64_t p = 2038074743, a = 871205356, b = 1825252241, c = 634329019;
  const int64_t dim = job.dim, block = job.block;
  const uint64_t key = static_cast<uint64_t>(job.keys[feature]);
  if constexpr (is_mix) {
    uint64_t row = row_hash(key, id);
    for (int64_t i = 0; i < dim; i += block, row += kGolden) {
      const uint64_t hashed = mix64(row);
      emit(i, static_cast<int64_t>(multiply_high(hashed, job.choices)), block < dim - i ? block : dim - i,
           job.sign & static_cast<bool>(hashed & 1));
    }
  } else if (job.hash == Hash::span) {
    // The row lies in one block or in two neighbours; the position is found without overflow, as in robe/hashing.py.
    const int64_t position = floor_mod(id, block) * dim, whole = id / block - (id % block < 0);
    uint64_t number = static_cast<uint64_t>(whole) * static_cast<uint64_t>(dim) + static_cast<uint64_t>(position / block);
    int64_t start = position % block;
    for (int64_t i = 0; i < dim; ++number, start = 0) {
      const uint64_t hashed = mix64(mix64(key + number * kGolden));
      const int64_t length = block - start < dim - i ? block - start : dim - i;
      emit(i, static_cast<int64_t>(multiply_high(hashed, job.choices)) + start, length,
           job.sign & static_cast<bool>(hashed & 1));
      i += length;
    }
  } else if (job.hash == Hash::linear) {
    const uint64_t row = (static_cast<uint64_t>(floor_mod(id, p)) + static_cast<uint64_t>(floor_mod(job.keys[feature], p))) % p;
    uint64_t number = 0;
    for (int64_t i = 0; i < dim; i += block, ++number) {
      const uint64_t value = (a * row + b * (number % p) % p + c) % p;
      emit(i, static_cast<int64_t>(value % job.choices), block < dim - i ? block : dim - i,
           job.sign & static_cast<bool>(mix64(value) & 1));
    }
  } else {
    emit(0, static_cast<int64_t>(key) + id * dim, dim, false);
  }
}

ROBE_INLINE int64_t id_at(const Job& job, int64_t position) {
  return job.wide ? static_cast<const int64_t*>(job.ids)[position] : static_cast<const int32_t*>(job.ids)[position];
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

template <class Use>
ROBE_INLINE auto with_hash(Hash hash, Use use) {
  return hash == Hash::mix ? use(std::true_type()) : use(std::false_type());
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
