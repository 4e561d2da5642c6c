// Bags of ids, pooled. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

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
    Out* const out = static_cast<Out*>(job.embeddings) + bag % batch * job.example_stride + bag / batch * job.feature_stride;
    const S count = job.pooling == Pooling::mean && kept ? static_cast<S>(kept) : S{1};
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
      const S factor = job.per_sample_weights ? static_cast<S>(static_cast<const Out*>(job.per_sample_weights)[value * job.per_sample_weights_stride]) : S{1};
      bool counted = true;
      for (int64_t i = 0; i < dim;) {
        const Block block = blocks.next();
        if (block.offset < 0)
          counted = false;
        else if (job.pooling == Pooling::max)
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

}  // namespace ROBE_ISA
}  // namespace robe
