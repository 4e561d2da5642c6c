// The kernels of the array. Included once per instruction set, each time with another ROBE_ISA, the namespace of that
// set; what is here is plain C++ that the compiler vectorises for it. Products are never fused with sums
// (-ffp-contract=off), so every set gives the same bits.

#include "interaction.h"
#include "mlp.h"

namespace robe {
namespace ROBE_ISA {

template <class T>
struct SumOf {
  using type = float;  // half precision is summed in float
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

ROBE_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

ROBE_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// Half precision, by bits: numbers are rounded to nearest even.
struct BFloat16 {
  uint16_t bits;
  ROBE_INLINE operator float() const { return float_of(static_cast<uint32_t>(bits) << 16); }
  BFloat16() = default;
  ROBE_INLINE explicit BFloat16(float x) {
    const uint32_t wide = bits_of(x);
    bits = x != x ? 0x7FC0 : static_cast<uint16_t>((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
  }
};

struct Float16 {
  uint16_t bits;
  ROBE_INLINE operator float() const {
    // The exponent moves by a multiplication, which also gets subnormals right.
    uint32_t wide = bits_of(float_of(static_cast<uint32_t>(bits & 0x7FFF) << 13) * 0x1p112f);
    wide |= (bits & 0x7C00) == 0x7C00 ? 0x7F800000 : 0;  // infinity and NaN keep their exponent
    wide |= static_cast<uint32_t>(bits & 0x8000) << 16;
    return float_of(wide);
  }
  Float16() = default;
  ROBE_INLINE explicit Float16(float x) {
    uint32_t wide = bits_of(x);
    const uint16_t sign = static_cast<uint16_t>((wide >> 16) & 0x8000);
    wide &= 0x7FFFFFFF;
    uint32_t half;
    if (wide > 0x7F800000) {
      half = 0x7E00;  // NaN
    } else if (wide >= 0x477FF000) {
      half = 0x7C00;  // 65520 and above round to infinity
    } else if (wide < 0x38800000) {
      // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the end of the mantissa.
      half = bits_of(float_of(wide) + 0.5f) - 0x3F000000;
    } else {
      half = (wide + 0xFFF + ((wide >> 13) & 1) - 0x38000000) >> 13;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Where rows lie

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
  const uint64_t rows = static_cast<uint64_t>(job.rows[feature]);
  if (rows && static_cast<uint64_t>(id) >= rows) {
    outside = true;
    return false;
  }
  if (job.filter && !admitted(job, row_hash(job.keys[feature], id)))
    id = kRare;
  return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward

// Read ahead: far enough to hide memory, near enough to stay in the cache. Into the second cache, which keeps more misses
// in flight than the first: on large arrays that is twice as fast.
constexpr int64_t kTileBytes = 4096;
constexpr uint64_t kNearWords = 1 << 16;  // of a filter that stays in the second cache

// The next rows to read, and of uniform tables the hash of each.
struct Tile {
  int64_t rows;
  int64_t feature[kTileBlocks], id[kTileBlocks];
  uint64_t hash[kTileBlocks], word[kTileBlocks];  // word: of the filter
  bool inside;  // every id within its table
};

// Replaces the hashes of rows that were not let in by that of the row they read instead. Loops that vectorise.
template <bool in_turn>
ROBE_INLINE void let_in(const Job& job, Tile& tile) {
  // Shifts by numbers in vectors, which the compiler makes of no loop.
  typedef uint64_t Words __attribute__((vector_size(ROBE_LANES * 4), aligned(8), may_alias));
  constexpr int64_t lanes = ROBE_LANES / 2;
  const uint64_t* const filter = job.filter;
  uint64_t missing[kTileBlocks], rare_of_row[kTileBlocks];
  const int64_t n = tile.rows;
  for (int64_t r = 0; r < n; ++r) missing[r] = ~filter[tile.word[r]];
  if constexpr (!in_turn)
    for (int64_t r = 0; r < n; ++r) rare_of_row[r] = job.rare[tile.feature[r]];
  const uint64_t* const rares = in_turn ? job.rare + tile.feature[0] : rare_of_row;
  for (int64_t r = 0; r < n; r += lanes) {
    Words& h = *reinterpret_cast<Words*>(tile.hash + r);
    const Words m = *reinterpret_cast<const Words*>(missing + r), rare = *reinterpret_cast<const Words*>(rares + r);
    const Words one = Words{} + 1, bits = one << (h & 63) | one << (h >> 6 & 63) | one << (h >> 12 & 63);
    h ^= (h ^ rare) & reinterpret_cast<Words>((m & bits) != 0);
  }
}

// The offsets of the blocks of n rows, row by row, for the commonest tables: "mix", whole blocks, no signs. Loops that
// vectorise.
ROBE_INLINE void hash_blocks(const Job& job, int64_t n, int64_t per_row, const uint64_t* __restrict__ first,
                             uint64_t* __restrict__ hashed, int64_t* __restrict__ offsets) {
  if (per_row == 1) {
    for (int64_t r = 0; r < n; ++r) hashed[r] = mix64(first[r]);
  } else {
    if (per_row <= 4) {  // the longer loop goes inside
      for (int64_t k = 0; k < per_row; ++k)
        for (int64_t r = 0; r < n; ++r) hashed[r * per_row + k] = first[r] + static_cast<uint64_t>(k) * kGolden;
    } else {
      for (int64_t r = 0; r < n; ++r)
        for (int64_t k = 0; k < per_row; ++k) hashed[r * per_row + k] = first[r] + static_cast<uint64_t>(k) * kGolden;
    }
    for (int64_t i = 0; i < n * per_row; ++i) hashed[i] = mix64(hashed[i]);
  }
  const uint64_t choices = job.choices;
  if (choices >> 32) {
    for (int64_t i = 0; i < n * per_row; ++i) offsets[i] = static_cast<int64_t>(multiply_high(hashed[i], choices));
  } else {
    for (int64_t i = 0; i < n * per_row; ++i) offsets[i] = static_cast<int64_t>(multiply_high_32(hashed[i], choices));
  }
}

ROBE_INLINE bool uniform(const Job& job) { return job.hash == Hash::mix && !job.sign && job.dim % job.block == 0; }

// Where a tile's blocks are kept: any blocks as they are, or for uniform tables their offsets alone. full: every row
// counts, so there is no block of zeros among them.
struct AnyBlocks {
  const Block* at;
  ROBE_INLINE Block next() { return *at++; }
};

struct UniformBlocks {
  const int64_t* at;
  bool full;
  int32_t length;
  ROBE_INLINE Block next() { return {*at++, length, 0}; }
};

ROBE_INLINE void prefetch_bytes(const char* line, int64_t bytes) {
  const char* const last = line + bytes - 1;
  for (; line < last; line += 64) __builtin_prefetch(line, 0, 2);
  __builtin_prefetch(last, 0, 2);
}

// Works on rows tile by tile: while one tile is consumed, the next one's blocks are on their way to the cache. A row that
// does not count has one block of zeros, or in uniform tables as many as any row.
//   ids(n, feature of each, id of each): steps over the next n rows      consume(blocks, rows)
// in_turn: the features of rows follow each other, the first after the last.
template <bool is_mix, bool is_uniform, bool in_turn, class Ids, class Consume>
ROBE_INLINE bool read_ahead(const Job& job, int64_t rows, int64_t item, Ids ids, Consume consume) {
  const int64_t per_row = job.hash == Hash::identity ? 1 : job.hash == Hash::span ? 2 : (job.dim + job.block - 1) / job.block;
  const int64_t by_bytes = kTileBytes / (job.dim * item), by_blocks = kTileBlocks / per_row;
  const int64_t tile = by_bytes < 1 || by_blocks < 1 ? 1 : by_bytes < by_blocks ? by_bytes : by_blocks;
  const int64_t capacity = tile * per_row;
  using Entry = std::conditional_t<is_uniform, int64_t, Block>;
  Entry small_blocks[2 * kTileBlocks];
  uint64_t small_hashed[kTileBlocks];
  const bool small = capacity <= kTileBlocks;
  Entry* const blocks = small ? small_blocks : new Entry[2 * capacity];
  uint64_t* const hashed = small || !is_uniform ? small_hashed : new uint64_t[capacity];
  Entry* const half[2] = {blocks, blocks + capacity};
  Tile tiles[2];
  const char* const weight = static_cast<const char*>(job.weight);
  bool outside = false, full[2] = {false, false};
  const bool far_filter = job.filter && job.filter_words >= kNearWords;
  const auto prefetch = [&](int64_t offset, int64_t length) { prefetch_bytes(weight + offset * item, length * item); };
  // First the ids of a tile, with what they need of the filter on its way to the cache; a tile later its blocks.
  int64_t untaken = rows;
  const auto take = [&](Tile& t) {
    const int64_t n = t.rows = untaken < tile ? untaken : tile;
    untaken -= n;
    if (!n) return;
    ids(n, t.feature, t.id);
    if constexpr (is_uniform) {
      const int64_t *const keys = job.keys + (in_turn ? t.feature[0] : 0), *const counts = job.rows + (in_turn ? t.feature[0] : 0);
      uint64_t beyond = job.padded;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t k = in_turn ? r : t.feature[r];
        t.hash[r] = row_hash(keys[k], t.id[r]);
      }
      for (int64_t r = 0; r < n; ++r) {
        const uint64_t last = static_cast<uint64_t>(counts[in_turn ? r : t.feature[r]]) - 1;  // unbounded: 2**64 - 1
        beyond |= static_cast<uint64_t>(t.id[r]) > last;
      }
      t.inside = !beyond;
      if (job.filter) {
        for (int64_t r = 0; r < n; ++r) t.word[r] = multiply_high_32(t.hash[r], job.filter_words);
        if (far_filter)
          for (int64_t r = 0; r < n; ++r) __builtin_prefetch(job.filter + t.word[r]);
      }
    }
  };
  const auto place = [&](Tile& t, int64_t turn) {
    Entry* out = half[turn];
    const int64_t n = t.rows;
    if constexpr (is_uniform) {
      if (job.filter && n) let_in<in_turn>(job, t);
      hash_blocks(job, n, per_row, t.hash, hashed, out);
      for (int64_t i = 0; i < n * per_row; ++i) prefetch(out[i], job.block);
      full[turn] = t.inside;
      if (!t.inside)
        for (int64_t r = 0; r < n; ++r)
          if (!counts(job, t.feature[r], t.id[r], outside))
            for (int64_t k = 0; k < per_row; ++k) out[r * per_row + k] = -1;
    } else {
      for (int64_t r = 0; r < n; ++r) {
        if (!counts(job, t.feature[r], t.id[r], outside)) {
          *out++ = {-1, static_cast<int32_t>(job.dim), 0};
          continue;
        }
        each_block<is_mix>(job, t.feature[r], t.id[r], [&](int64_t, int64_t offset, int64_t length, bool negative) {
          *out++ = {offset, static_cast<int32_t>(length), negative};
          prefetch(offset, length);
        });
      }
    }
  };
  take(tiles[0]);
  take(tiles[1]);
  place(tiles[0], 0);
  for (int64_t turn = 0, now = tiles[0].rows; now; turn ^= 1) {
    take(tiles[turn]);
    Tile& next = tiles[turn ^ 1];
    if (next.rows) place(next, turn ^ 1);
    if constexpr (is_uniform)
      consume(UniformBlocks{half[turn], full[turn], static_cast<int32_t>(job.block)}, now);
    else
      consume(AnyBlocks{half[turn]}, now);
    now = next.rows;
  }
  if (!small) {
    delete[] blocks;
    if (is_uniform) delete[] hashed;
  }
  return !outside;
}

// How the blocks of a row become its components, for each kind of array. Copies of a size known beforehand come first.
// Embeddings that outgrow the caches are streamed past them: fetching their lines before writing would cost as much.
template <int64_t bytes, bool stream>
struct CopyBytes {
  static ROBE_INLINE void block(const Job&, const char* source, const Block&, char* to) {
#if defined(__x86_64__)
    if constexpr (stream) {
      for (int64_t i = 0; i < bytes; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
      return;
    }
#endif
    typedef char Piece __attribute__((vector_size(bytes < 64 ? bytes : 64), aligned(1), may_alias));
    for (int64_t i = 0; i < bytes; i += sizeof(Piece))
      *reinterpret_cast<Piece*>(to + i) = *reinterpret_cast<const Piece*>(source + i);
  }
};

template <class Bits>
struct CopyAny {
  static ROBE_INLINE void block(const Job&, const char* start, const Block& from, char* to) {
    const Bits* source = reinterpret_cast<const Bits*>(start);
    const Bits flip = from.negative ? static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1)) : Bits{0};
    Bits* out = reinterpret_cast<Bits*>(to);
    for (int64_t i = 0; i < from.length; ++i) out[i] = source[i] ^ flip;
  }
};

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

struct CopyInt8 {
  static ROBE_INLINE void block(const Job& job, const char*, const Block& from, char* to) {
    float* const out = reinterpret_cast<float*>(to);
    dequantize(job, from, [&](int64_t i, float value) { out[i] = value; });
  }
};

template <bool is_mix, bool is_uniform, class Copy>
bool read_one(const Job& job, int64_t begin, int64_t end, int64_t item, int64_t out_item) {
  const int64_t features = job.features;
  int64_t example = begin / features, feature = begin % features;
  const auto ids = [&](int64_t n, int64_t* __restrict__ f, int64_t* __restrict__ id) {
    for (int64_t r = 0; r < n;) {
      const int64_t run = features - feature < n - r ? features - feature : n - r;
      const int64_t start = example * job.ids_stride + feature * job.ids_feature_stride;
      if (job.wide && job.ids_feature_stride == 1)
        for (int64_t k = 0; k < run; ++k) id[r + k] = static_cast<const int64_t*>(job.ids)[start + k];
      else
        for (int64_t k = 0; k < run; ++k) id[r + k] = id_at(job, start + k * job.ids_feature_stride);
      for (int64_t k = 0; k < run; ++k) f[r + k] = feature + k;
      r += run;
      feature += run;
      if (feature == features) feature = 0, ++example;
    }
  };
  int64_t f = feature, row_example = example;
  const char* const weight = static_cast<const char*>(job.weight);
  char* const data = static_cast<char*>(job.rows_data);
  const int64_t example_bytes = job.example_stride * out_item, feature_bytes = job.feature_stride * out_item;
  const int64_t row_bytes = job.dim * out_item;
  char* row = data + example * example_bytes + feature * feature_bytes;
  const auto consume = [&](auto blocks, int64_t rows) {
    if constexpr (is_uniform) {
      if (blocks.full) {
        const int64_t* offset = blocks.at;
        const int64_t block_bytes = job.block * out_item, row_blocks = job.dim / job.block;
        char* to = row;
        int64_t column = f;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t k = 0; k < row_blocks; ++k, ++offset)
            Copy::block(job, weight + *offset * item, {*offset, blocks.length, 0}, to + k * block_bytes);
          to += feature_bytes;
          if (++column == features) column = 0, to = data + ++row_example * example_bytes;
        }
        row = to;
        f = column;
        return;
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < row_bytes;) {
        const Block block = blocks.next();
        if (block.offset < 0)
          __builtin_memset(row + i, 0, block.length * out_item);
        else
          Copy::block(job, weight + block.offset * item, block, row + i);
        i += block.length * out_item;
      }
      row += feature_bytes;
      if (++f == features) f = 0, row = data + ++row_example * example_bytes;
    }
  };
  return read_ahead<is_mix, is_uniform, true>(job, end - begin, item, ids, consume);
}

// acc += factor * block.  The factor is +-1, or a per-sample weight.
template <class T>
ROBE_INLINE void add_block(const Job& job, const Block& from, Sum<T> factor, Sum<T>* acc) {
  if constexpr (sizeof(T) == 1) {
    dequantize(job, from, [&](int64_t i, float value) { acc[i] += value * factor; });
  } else {
    const T* const source = static_cast<const T*>(job.weight) + from.offset;
    if (from.negative) factor = -factor;
    for (int64_t i = 0; i < from.length; ++i) acc[i] += static_cast<Sum<T>>(source[i]) * factor;
  }
}

template <class T>
ROBE_INLINE void max_block(const Job& job, const Block& from, bool first, Sum<T>* best) {
  const auto keep = [&](int64_t i, Sum<T> x) { best[i] = first || x > best[i] || x != x ? x : best[i]; };
  if constexpr (sizeof(T) == 1) {
    dequantize(job, from, keep);
  } else {
    const T* const source = static_cast<const T*>(job.weight) + from.offset;
    for (int64_t i = 0; i < from.length; ++i) {
      const Sum<T> x = static_cast<Sum<T>>(source[i]);
      keep(i, from.negative ? -x : x);
    }
  }
}

template <bool is_mix, bool is_uniform, class T>
bool read_bags(const Job& job, int64_t begin, int64_t end) {
  using S = Sum<T>;
  using Out = std::conditional_t<sizeof(T) == 1, float, T>;
  const int64_t batch = job.batch, dim = job.dim;
  int64_t bag = begin, value = job.offsets[begin], ahead = value, feature = begin / batch, kept = 0;
  const auto ids = [&](int64_t n, int64_t* f, int64_t* id) {
    for (int64_t r = 0; r < n; ++r) {
      while (ahead >= job.offsets[(feature + 1) * batch]) ++feature;
      f[r] = feature;
      id[r] = id_at(job, ahead++ * job.ids_stride);
    }
  };
  S* const acc = new S[dim]();
  const auto close = [&] {
    Out* const out = static_cast<Out*>(job.rows_data) + bag % batch * job.example_stride + bag / batch * job.feature_stride;
    const S count = job.mode == Mode::mean && kept ? static_cast<S>(kept) : S{1};
    if (count == S{1}) {
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<Out>(acc[i]);
    } else {
      for (int64_t i = 0; i < dim; ++i) out[i] = static_cast<Out>(acc[i] / count);
    }
    for (int64_t i = 0; i < dim; ++i) acc[i] = 0;
    kept = 0;
    ++bag;
  };
  const auto consume = [&](auto blocks, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r, ++value) {
      while (value == job.offsets[bag + 1]) close();
      const S factor = job.factors ? static_cast<S>(static_cast<const Out*>(job.factors)[value * job.factors_stride]) : S{1};
      bool counted = true;
      for (int64_t i = 0; i < dim;) {
        const Block block = blocks.next();
        if (block.offset < 0)
          counted = false;
        else if (job.mode == Mode::max)
          max_block<T>(job, block, kept == 0, acc + i);
        else
          add_block<T>(job, block, factor, acc + i);
        i += block.length;
      }
      kept += counted;
    }
  };
  const bool inside = read_ahead<is_mix, is_uniform, false>(job, job.offsets[end] - value, sizeof(T), ids, consume);
  while (bag < end) close();
  delete[] acc;
  return inside;
}

template <bool is_mix, bool is_uniform, class T>
bool read_of(const Job& job, int64_t begin, int64_t end) {
  if (job.mode != Mode::one) return read_bags<is_mix, is_uniform, T>(job, begin, end);
  constexpr int64_t item = sizeof(T);
  if constexpr (item == 1) {
    return read_one<is_mix, is_uniform, CopyInt8>(job, begin, end, item, 4);
  } else {
#define ROBE_COPY(bytes)                                                                            \
  case bytes:                                                                                       \
    return job.stream ? read_one<is_mix, true, CopyBytes<bytes, true>>(job, begin, end, item, item)   \
                      : read_one<is_mix, true, CopyBytes<bytes, false>>(job, begin, end, item, item);
    if constexpr (is_uniform) switch (job.block * item) {
        ROBE_COPY(16)
        ROBE_COPY(32)
        ROBE_COPY(64)
        ROBE_COPY(128)
        ROBE_COPY(256)
        ROBE_COPY(512)
      }
#undef ROBE_COPY
    using Bits = std::conditional_t<item == 2, uint16_t, std::conditional_t<item == 4, uint32_t, uint64_t>>;
    return read_one<is_mix, is_uniform, CopyAny<Bits>>(job, begin, end, item, item);
  }
}

template <class Use>
ROBE_INLINE auto with_hash(Hash hash, Use use) {
  return hash == Hash::mix ? use(std::true_type()) : use(std::false_type());
}

template <class T>
struct Type {
  using type = T;
};

template <class Use>
ROBE_INLINE auto with_dtype(Dtype dtype, Use use) {
  switch (dtype) {
    case Dtype::float64: return use(Type<double>());
    case Dtype::bfloat16: return use(Type<BFloat16>());
    case Dtype::float16: return use(Type<Float16>());
    default: return use(Type<float>());
  }
}

bool read(const Job& job, int64_t begin, int64_t end) {
  const auto read_type = [&](auto is_mix, auto is_uniform) {
    if (job.dtype == Dtype::int8) return read_of<is_mix.value, is_uniform.value, int8_t>(job, begin, end);
    return with_dtype(job.dtype, [&](auto t) {
      return read_of<is_mix.value, is_uniform.value, typename decltype(t)::type>(job, begin, end);
    });
  };
  if (uniform(job)) return read_type(std::true_type(), std::true_type());
  return with_hash(job.hash, [&](auto is_mix) { return read_type(is_mix, std::false_type()); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward

// Calls use(feature, first value, end of values, row of the embeddings or of their gradient) for each bag.
template <class T, class Use>
ROBE_INLINE void each_bag(const Job& job, int64_t begin, int64_t end, Use use) {
  const bool one = job.mode == Mode::one;
  const int64_t inner = one ? job.features : job.batch;
  int64_t outer_index = begin / inner, inner_index = begin % inner;
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t feature = one ? inner_index : outer_index, example = one ? outer_index : inner_index;
    T* const row = static_cast<T*>(job.rows_data) + example * job.example_stride + feature * job.feature_stride;
    if (one) {
      const int64_t position = example * job.ids_stride + feature * job.ids_feature_stride;
      use(feature, position, position + 1, int64_t{1}, row);
    } else {
      use(feature, job.offsets[bag], job.offsets[bag + 1], job.ids_stride, row);
    }
    if (++inner_index == inner) inner_index = 0, ++outer_index;
  }
}

// Calls emit(offset, length, gradient, scale) for each block that a gradient goes to, in the order of the ids.
template <bool is_mix, class T, class Emit>
bool each_gradient(const Job& job, int64_t begin, int64_t end, Emit emit) {
  using S = Sum<T>;
  bool outside = false;
  const int64_t dim = job.dim;
  S* best = nullptr;
  int64_t* winner = nullptr;
  if (job.mode == Mode::max) best = new S[dim], winner = new int64_t[dim];
  each_bag<T>(job, begin, end, [&](int64_t feature, int64_t first, int64_t last, int64_t stride, T* grad) {
    S share{1};
    if (job.mode == Mode::mean) {
      int64_t kept = 0;
      for (int64_t v = first; v < last; ++v) kept += !(job.padded && id_at(job, v * stride) == job.padding);
      share = S{1} / static_cast<S>(kept ? kept : 1);
    }
    if (job.mode == Mode::max) {
      bool empty = true;
      for (int64_t v = first; v < last; ++v) {
        int64_t id = id_at(job, v * stride);
        if (!counts(job, feature, id, outside)) continue;
        each_block<is_mix>(job, feature, id, [&](int64_t i, int64_t offset, int64_t length, bool negative) {
          const T* const source = static_cast<const T*>(job.weight) + offset;
          for (int64_t k = 0; k < length; ++k) {
            const S x = negative ? -static_cast<S>(source[k]) : static_cast<S>(source[k]);
            const bool wins = empty || x > best[i + k] || (x != x && best[i + k] == best[i + k]);
            if (wins) best[i + k] = x, winner[i + k] = x == x ? v : -1;  // a NaN takes no gradient
          }
        });
        empty = false;
      }
    }
    for (int64_t v = first; v < last; ++v) {
      int64_t id = id_at(job, v * stride);
      if (!counts(job, feature, id, outside)) continue;
      S scale = share;
      if (job.factors) scale = static_cast<S>(static_cast<const T*>(job.factors)[v * job.factors_stride]);
      each_block<is_mix>(job, feature, id, [&](int64_t i, int64_t offset, int64_t length, bool negative) {
        const S signed_scale = negative ? -scale : scale;
        if (job.mode != Mode::max) {
          emit(offset, length, grad + i, signed_scale);
          return;
        }
        for (int64_t k = 0; k < length;) {  // runs of components that this id won
          const bool won = winner[i + k] == v;
          int64_t next = k + 1;
          while (next < length && (winner[i + next] == v) == won) ++next;
          if (won) emit(offset + k, next - k, grad + i + k, signed_scale);
          k = next;
        }
      });
    }
  });
  delete[] best;
  delete[] winner;
  return !outside;
}

bool count(const Job& job, int64_t begin, int64_t end, int shift, int64_t* counts) {
  return with_hash(job.hash, [&](auto is_mix) {
    return with_dtype(job.dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      return each_gradient<is_mix.value, T>(job, begin, end, [&](int64_t offset, int64_t length, T*, Sum<T>) {
        for (int64_t s = offset >> shift, last = (offset + length - 1) >> shift; s <= last; ++s) ++counts[s];
      });
    });
  });
}

void fill(const Job& job, int64_t begin, int64_t end, int shift, void* records, int64_t* cursors) {
  with_hash(job.hash, [&](auto is_mix) {
    with_dtype(job.dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      auto* const out = static_cast<Record<T, Sum<T>>*>(records);
      each_gradient<is_mix.value, T>(job, begin, end, [&](int64_t offset, int64_t length, T* grad, Sum<T> scale) {
        for (const int64_t stop = offset + length; offset < stop;) {
          const int64_t segment = offset >> shift, edge = (segment + 1) << shift;
          const int64_t n = (edge < stop ? edge : stop) - offset;
          out[cursors[segment]++] = {grad, scale, static_cast<uint16_t>(offset - (segment << shift)),
                                     static_cast<uint16_t>(n)};
          grad += n;
          offset += n;
        }
      });
    });
  });
}

template <class T>
ROBE_INLINE const Record<T, Sum<T>>* records_of(const Segments& segments, int64_t segment, int64_t& n) {
  const int64_t begin = segment ? segments.ends[segment - 1] : 0;
  n = segments.ends[segment] - begin;
  return static_cast<const Record<T, Sum<T>>*>(segments.records) + begin;
}

void prefetch(Dtype dtype, const Segments& segments, int64_t segment, const void* weight, void* const* state) {
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    constexpr int64_t most = 1024;  // records; more would push each other out
    int64_t n;
    const auto* const records = records_of<T>(segments, segment, n);
    for (int64_t r = 0; r < n && r < most; ++r) {
      const int64_t bytes = records[r].length * static_cast<int64_t>(sizeof(T));
      const int64_t slot = (segment << segments.shift) + records[r].start;
      const void* const places[4] = {records[r].grad, weight ? static_cast<const T*>(weight) + slot : nullptr,
                                     weight && state[0] ? static_cast<const T*>(state[0]) + slot : nullptr,
                                     weight && state[1] ? static_cast<const T*>(state[1]) + slot : nullptr};
      for (const void* const place : places)
        if (place) prefetch_bytes(static_cast<const char*>(place), bytes);
    }
  });
}

template <class T>
ROBE_INLINE void sum_records(const Record<T, Sum<T>>* records, int64_t n, Sum<T>* sums) {
  constexpr int64_t ahead = 8;
  for (int64_t r = 0; r < n; ++r) {
    if (r + ahead < n) {
      const char* const line = reinterpret_cast<const char*>(records[r + ahead].grad);
      const int64_t bytes = records[r + ahead].length * static_cast<int64_t>(sizeof(T));
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(line + i);
    }
    const T* __restrict__ const grad = records[r].grad;
    Sum<T>* __restrict__ const to = sums + records[r].start;
    const Sum<T> scale = records[r].scale;
    const int64_t length = records[r].length;
    for (int64_t i = 0; i < length; ++i) to[i] += scale * static_cast<Sum<T>>(grad[i]);
  }
}

void gradient(Dtype dtype, const Segments& segments, int64_t segment, void* scratch, void* out) {
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const int64_t start = segment << segments.shift, size = int64_t{1} << segments.shift;
    const int64_t slots = segments.slots - start < size ? segments.slots - start : size;
    T* const to = static_cast<T*>(out) + start;
    Sum<T>* sums = static_cast<Sum<T>*>(scratch);
    if constexpr (std::is_same_v<T, Sum<T>>) sums = to;
    for (int64_t i = 0; i < slots; ++i) sums[i] = 0;
    int64_t n;
    const auto* const records = records_of<T>(segments, segment, n);
    sum_records<T>(records, n, sums);
    if constexpr (!std::is_same_v<T, Sum<T>>)
      for (int64_t i = 0; i < slots; ++i) to[i] = static_cast<T>(sums[i]);
  });
}

// The rules, on n neighbouring slots. Arithmetic in S, state and weights stored as T.
template <class T>
ROBE_INLINE void apply(const Update& update, int64_t n, const Sum<T>* __restrict__ sums, T* __restrict__ weight,
                       T* __restrict__ first, T* __restrict__ second) {
  using S = Sum<T>;
  const S rate = static_cast<S>(update.options[0]), decay = static_cast<S>(update.options[1]);
  const S x = static_cast<S>(update.options[2]), y = static_cast<S>(update.options[3]);
  const S z = static_cast<S>(update.options[4]);
  switch (update.rule) {
    case Rule::sgd:  // x: momentum
      if (x == S{0}) {
        for (int64_t i = 0; i < n; ++i) {
          const S w = static_cast<S>(weight[i]);
          weight[i] = static_cast<T>(w - rate * (sums[i] + decay * w));
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const S w = static_cast<S>(weight[i]);
          const S velocity = x * static_cast<S>(first[i]) + (sums[i] + decay * w);
          first[i] = static_cast<T>(velocity);
          weight[i] = static_cast<T>(w - rate * velocity);
        }
      }
      break;
    case Rule::adagrad:  // x: eps
      for (int64_t i = 0; i < n; ++i) {
        const S w = static_cast<S>(weight[i]), g = sums[i] + decay * w;
        const S total = static_cast<S>(first[i]) + g * g;
        first[i] = static_cast<T>(total);
        weight[i] = static_cast<T>(w - rate * g / (std::sqrt(total) + x));
      }
      break;
    case Rule::adam:  // x, y: betas; z: eps. rate and eps hold the bias corrections.
      for (int64_t i = 0; i < n; ++i) {
        const S w = static_cast<S>(weight[i]), g = sums[i] + decay * w;
        const S mean = x * static_cast<S>(first[i]) + (S{1} - x) * g;
        const S square = y * static_cast<S>(second[i]) + (S{1} - y) * g * g;
        first[i] = static_cast<T>(mean);
        second[i] = static_cast<T>(square);
        weight[i] = static_cast<T>(w - rate * mean / (std::sqrt(square) + z));
      }
  }
}

void update(Dtype dtype, const Segments& segments, int64_t segment, void* scratch, void* weight, const Update& rule) {
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    int64_t n;
    const auto* const records = records_of<T>(segments, segment, n);
    if (!n) return;
    // The scratch holds sums, all zero between calls, and a bit for each slot that a record touches.
    const int64_t size = int64_t{1} << segments.shift, words = size / 64;
    Sum<T>* const sums = static_cast<Sum<T>*>(scratch);
    uint64_t* const touched = reinterpret_cast<uint64_t*>(sums + size);
    sum_records<T>(records, n, sums);
    int64_t first = words, last = 0;  // words of touched that hold bits
    for (int64_t r = 0; r < n; ++r) {
      int64_t bit = records[r].start;
      first = bit >> 6 < first ? bit >> 6 : first;
      last = (bit + records[r].length - 1) >> 6 > last ? (bit + records[r].length - 1) >> 6 : last;
      for (const int64_t stop = bit + records[r].length; bit < stop;) {
        const int64_t in_word = bit & 63, span = 64 - in_word < stop - bit ? 64 - in_word : stop - bit;
        touched[bit >> 6] |= (~uint64_t{0} >> (64 - span)) << in_word;
        bit += span;
      }
    }
    const int64_t start = segment << segments.shift;
    T* state[2] = {static_cast<T*>(rule.state[0]), static_cast<T*>(rule.state[1])};
    const auto apply_run = [&](int64_t from, int64_t to) {
      apply<T>(rule, to - from, sums + from, static_cast<T*>(weight) + start + from,
               state[0] ? state[0] + start + from : nullptr, state[1] ? state[1] + start + from : nullptr);
      for (int64_t i = from; i < to; ++i) sums[i] = 0;
    };
    int64_t run = -1;  // where the current run of touched slots began
    for (int64_t w = first; w <= last; ++w) {
      uint64_t bits = touched[w];
      touched[w] = 0;
      if (run >= 0 ? bits == ~uint64_t{0} : bits == 0) continue;
      for (int64_t bit = w * 64, stop = bit + 64; bit < stop;) {
        const uint64_t rest = (run >= 0 ? ~bits : bits) >> (bit & 63);
        if (!rest) break;
        bit += __builtin_ctzll(rest);
        if (run < 0) {
          run = bit;
        } else {
          apply_run(run, bit);
          run = -1;
        }
      }
    }
    if (run >= 0) apply_run(run, (last + 1) * 64);
  });
}

bool factor_grad(const Job& job, int64_t begin, int64_t end, void* out) {
  bool outside = false;
  with_hash(job.hash, [&](auto is_mix) {
    with_dtype(job.dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      each_bag<T>(job, begin, end, [&](int64_t feature, int64_t first, int64_t last, int64_t stride, T* grad) {
        for (int64_t v = first; v < last; ++v) {
          Sum<T> sum{0};
          int64_t id = id_at(job, v * stride);
          if (counts(job, feature, id, outside))
            each_block<is_mix.value>(job, feature, id, [&](int64_t i, int64_t offset, int64_t length, bool negative) {
              const T* const source = static_cast<const T*>(job.weight) + offset;
              Sum<T> part{0};
              for (int64_t k = 0; k < length; ++k)
                part += static_cast<Sum<T>>(grad[i + k]) * static_cast<Sum<T>>(source[k]);
              sum += negative ? -part : part;
            });
          static_cast<T*>(out)[v] = static_cast<T>(sum);
        }
      });
    });
  });
  return !outside;
}

extern const Kernels kernels;
const Kernels kernels = {ROBE_ISA_NAME, read, factor_grad, count, fill, prefetch, gradient, update, interact, interact_grad,
                         mlp};

}  // namespace ROBE_ISA
}  // namespace robe
