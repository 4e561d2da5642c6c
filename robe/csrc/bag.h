// Bags of ids: pooled, and their gradients. A lookup's gradient is that of bags of one id.
// The first part is included once; the second once per instruction set, by kernels.h.

#ifndef ROBE_BAG_H
#define ROBE_BAG_H

namespace robe {

// none: a lookup, one id per feature; then in the order of POOLINGS in robe/ops/layout.py.
enum class Pooling { none, sum, mean, max };
constexpr const char* kPoolings[] = {"sum", "mean", "max"};

}  // namespace robe

#endif

#ifdef ROBE_ISA
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
  const auto consume = [&](auto blocks, int64_t n) {
    for (int64_t r = 0; r < n; ++r, ++value) {
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

// Calls use(feature, first value, end of values, row of the embeddings or of their gradient) for each bag.
template <class T, class Use>
ROBE_INLINE void each_bag(const Job& job, int64_t begin, int64_t end, Use use) {
  const bool one = job.pooling == Pooling::none;
  const int64_t inner = one ? job.features : job.batch;
  int64_t outer_index = begin / inner, inner_index = begin % inner;
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t feature = one ? inner_index : outer_index, example = one ? outer_index : inner_index;
    T* const row = static_cast<T*>(job.embeddings) + example * job.example_stride + feature * job.feature_stride;
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
  if (job.pooling == Pooling::max) best = new S[dim], winner = new int64_t[dim];
  each_bag<T>(job, begin, end, [&](int64_t feature, int64_t first, int64_t last, int64_t stride, T* grad) {
    S share{1};
    if (job.pooling == Pooling::mean) {
      int64_t kept = 0;
      for (int64_t v = first; v < last; ++v) kept += !(job.padded && id_at(job, v * stride) == job.padding);
      share = S{1} / static_cast<S>(kept ? kept : 1);
    }
    if (job.pooling == Pooling::max) {
      bool empty = true;
      for (int64_t i = 0; i < dim; ++i) winner[i] = -1;
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
      if (job.per_sample_weights) scale = static_cast<S>(static_cast<const T*>(job.per_sample_weights)[v * job.per_sample_weights_stride]);
      each_block<is_mix>(job, feature, id, [&](int64_t i, int64_t offset, int64_t length, bool negative) {
        const S signed_scale = negative ? -scale : scale;
        if (job.pooling != Pooling::max) {
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

bool weights_gradient(const Job& job, int64_t begin, int64_t end, void* out) {
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

}  // namespace ROBE_ISA
}  // namespace robe
#endif
