// Lookups: one id per feature, the blocks of its row copied. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

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
  char* const data = static_cast<char*>(job.embeddings);
  const int64_t example_bytes = job.example_stride * out_item, feature_bytes = job.feature_stride * out_item;
  const int64_t row_bytes = job.dim * out_item;
  char* row = data + example * example_bytes + feature * feature_bytes;
  const auto consume = [&](auto blocks, int64_t n) {
    if constexpr (is_uniform) {
      if (blocks.full) {
        const int64_t* offset = blocks.at;
        const int64_t block_bytes = job.block * out_item, row_blocks = job.dim / job.block;
        char* to = row;
        int64_t column = f;
        for (int64_t r = 0; r < n; ++r) {
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
    for (int64_t r = 0; r < n; ++r) {
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

}  // namespace ROBE_ISA
}  // namespace robe
