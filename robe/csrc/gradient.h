// The backward of lookups and bags: records of gradients by segment of the array, and their sums. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

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
