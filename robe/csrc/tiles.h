// Rows read ahead, tile by tile: hashes in vectors, blocks on their way to the cache. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

// Read ahead: far enough to hide memory, near enough to stay in the cache. Into the second cache, which keeps more misses
// in flight than the first: on large arrays that is twice as fast.
constexpr int64_t kTileBytes = 4096;
constexpr uint64_t kNearWords = 1 << 16;  // of a filter that stays in the second cache

// The next n ids to look up, and of uniform tables the hash of each.
struct Tile {
  int64_t n;
  int64_t feature[kTileBlocks], id[kTileBlocks];
  uint64_t hash[kTileBlocks], word[kTileBlocks];  // word: of the filter
  bool inside;  // every id within its table
};

// Replaces the hashes of ids that were not let in by that of the shared id. Loops that vectorise.
template <bool in_turn>
ROBE_INLINE void let_in(const Job& job, Tile& tile) {
  // Shifts by numbers in vectors, which the compiler makes of no loop.
  typedef uint64_t Words __attribute__((vector_size(ROBE_LANES * 4), aligned(8), may_alias));
  constexpr int64_t lanes = ROBE_LANES / 2;
  const uint64_t* const filter = job.filter;
  uint64_t missing[kTileBlocks], shared_of_row[kTileBlocks];
  const int64_t n = tile.n;
  for (int64_t r = 0; r < n; ++r) missing[r] = ~filter[tile.word[r]];
  if constexpr (!in_turn)
    for (int64_t r = 0; r < n; ++r) shared_of_row[r] = job.shared[tile.feature[r]];
  const uint64_t* const all_shared = in_turn ? job.shared + tile.feature[0] : shared_of_row;
  for (int64_t r = 0; r < n; r += lanes) {
    Words& h = *reinterpret_cast<Words*>(tile.hash + r);
    const Words m = *reinterpret_cast<const Words*>(missing + r), shared = *reinterpret_cast<const Words*>(all_shared + r);
    const Words one = Words{} + 1, bits = one << (h & 63) | one << (h >> 6 & 63) | one << (h >> 12 & 63);
    h ^= (h ^ shared) & reinterpret_cast<Words>((m & bits) != 0);
  }
}

// The offsets of the blocks of n ids, one after another, for the commonest tables: "mix", whole blocks, no signs. Loops that
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

// Hashes the ids of a tile of uniform tables, and says whether all lie inside their tables and none is padding.
template <bool in_turn>
ROBE_INLINE void hash_tile(const Job& job, Tile& t) {
  const int64_t first = in_turn ? t.feature[0] : 0;
  const int64_t *const keys = job.keys + first, *const counts = job.num_embeddings + first;
  uint64_t beyond = job.padded;
  for (int64_t r = 0; r < t.n; ++r) {
    const int64_t k = in_turn ? r : t.feature[r];
    t.hash[r] = row_hash(keys[k], t.id[r]);
  }
  for (int64_t r = 0; r < t.n; ++r) {
    const uint64_t last = static_cast<uint64_t>(counts[in_turn ? r : t.feature[r]]) - 1;  // unbounded: 2**64 - 1
    beyond |= static_cast<uint64_t>(t.id[r]) > last;
  }
  t.inside = !beyond;
  if (job.filter) {
    for (int64_t r = 0; r < t.n; ++r) t.word[r] = multiply_high_32(t.hash[r], job.filter_words);
    if (job.filter_words >= kNearWords)
      for (int64_t r = 0; r < t.n; ++r) __builtin_prefetch(job.filter + t.word[r]);
  }
}

// Lists the blocks of a tile of any tables.
template <bool is_mix, class Prefetch>
ROBE_INLINE void list_blocks(const Job& job, Tile& t, Block* out, bool& outside, Prefetch prefetch) {
  for (int64_t r = 0; r < t.n; ++r) {
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

// Looks ids up tile by tile: while one tile is consumed, the next one's blocks are on their way to the cache. An id that
// does not count has one block of zeros, or in uniform tables as many as any id.
//   ids(n, feature of each, id of each): steps over the next n ids      consume(blocks, n)
// in_turn: the features of ids follow each other, the first after the last.
template <bool is_mix, bool is_uniform, bool in_turn, class Ids, class Consume>
ROBE_INLINE bool read_ahead(const Job& job, int64_t count, int64_t item, Ids ids, Consume consume) {
  const int64_t per_row = pieces_per_id(job);
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
  const auto prefetch = [&](int64_t offset, int64_t length) { prefetch_bytes(weight + offset * item, length * item); };
  // First the ids of a tile, with what they need of the filter on its way to the cache; a tile later its blocks.
  int64_t untaken = count;
  const auto take = [&](Tile& t) {
    const int64_t n = t.n = untaken < tile ? untaken : tile;
    untaken -= n;
    if (!n) return;
    ids(n, t.feature, t.id);
    if constexpr (is_uniform) hash_tile<in_turn>(job, t);
  };
  const auto place = [&](Tile& t, int64_t turn) {
    Entry* out = half[turn];
    const int64_t n = t.n;
    if (!n) return;
    if constexpr (is_uniform) {
      if (job.filter) let_in<in_turn>(job, t);
      hash_blocks(job, n, per_row, t.hash, hashed, out);
      for (int64_t i = 0; i < n * per_row; ++i) prefetch(out[i], job.block);
      full[turn] = t.inside;
      if (!t.inside)
        for (int64_t r = 0; r < n; ++r)
          if (!counts(job, t.feature[r], t.id[r], outside))
            for (int64_t k = 0; k < per_row; ++k) out[r * per_row + k] = -1;
    } else {
      list_blocks<is_mix>(job, t, out, outside, prefetch);
    }
  };
  take(tiles[0]);
  take(tiles[1]);
  place(tiles[0], 0);
  for (int64_t turn = 0, now = tiles[0].n; now; turn ^= 1) {
    take(tiles[turn]);
    Tile& next = tiles[turn ^ 1];
    if (next.n) place(next, turn ^ 1);
    if constexpr (is_uniform)
      consume(UniformBlocks{half[turn], full[turn], static_cast<int32_t>(job.block)}, now);
    else
      consume(AnyBlocks{half[turn]}, now);
    now = next.n;
  }
  if (!small) {
    delete[] blocks;
    if (is_uniform) delete[] hashed;
  }
  return !outside;
}

}  // namespace ROBE_ISA
}  // namespace robe
