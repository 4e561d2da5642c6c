// The hash and the filter's bits. Must agree with robe/hashing.py and robe/sketches.py bit for bit.
// The first part is included once; the second once per instruction set, by kernels.h.

#ifndef ROBE_HASH_H
#define ROBE_HASH_H

#include <cstdint>
#include <type_traits>

#define ROBE_INLINE inline __attribute__((always_inline))

namespace robe {

// The versions, in the order of HASHES in robe/hashing.py; last "mix" with blocks longer than a row.
enum class Hash { mix, linear, identity, span };
constexpr const char* kHashes[] = {"mix", "linear", "identity"};

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The finaliser of SplitMix64.
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

// The id whose embedding ids read that were not let in; and whether an id was, by its row hash.
constexpr int64_t kSharedId = INT64_MIN;

ROBE_INLINE bool admitted(const uint64_t* filter, uint64_t words, uint64_t row) {
  const uint64_t one = 1, bits = one << (row & 63) | one << (row >> 6 & 63) | one << (row >> 12 & 63);
  return (filter[multiply_high(row, words)] & bits) == bits;
}

ROBE_INLINE int64_t floor_mod(int64_t x, int64_t n) {
  const int64_t rest = x % n;
  return rest < 0 ? rest + n : rest;
}

}  // namespace robe

#endif

#ifdef ROBE_ISA
namespace robe {
namespace ROBE_ISA {

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

template <class Use>
ROBE_INLINE auto with_hash(Hash hash, Use use) {
  return hash == Hash::mix ? use(std::true_type()) : use(std::false_type());
}

}  // namespace ROBE_ISA
}  // namespace robe
#endif
