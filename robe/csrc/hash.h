// The hash and the filter's bits: the same for every instruction set. Must agree with robe/hashing.py and robe/sketches.py
// bit for bit.

#pragma once

#include <cstdint>

#define ROBE_INLINE inline __attribute__((always_inline))

namespace robe {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

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
