// Records of gradients by segment of the array, and their sums. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

bool collect(const Job& job, int64_t begin, int64_t end, int shift, Pieces& pieces, int64_t* counts) {
  return with_hash(job.hash, [&](auto is_mix) {
    return with_dtype(job.dtype, [&](auto t) {
      using T = typename decltype(t)::type;
      using P = Piece<T, Sum<T>>;
      constexpr int64_t most = 1 << 20;  // to begin with
      const int64_t ids = job.pooling == Pooling::none ? end - begin : job.offsets[end] - job.offsets[begin];
      const int64_t per_id = pieces_per_id(job);
      pieces.grow(ids < most / per_id ? ids * per_id + 1 : most, sizeof(P));
      P* out = reinterpret_cast<P*>(pieces.data.get());
      int64_t n = 0;
      const bool inside = each_gradient<is_mix.value, T>(job, begin, end, [&](int64_t offset, int64_t length, const T* grad, Sum<T> scale) {
        if (n == pieces.capacity) {
          pieces.size = n;
          pieces.grow(0, sizeof(P));
          out = reinterpret_cast<P*>(pieces.data.get());
        }
        out[n++] = {offset, grad, scale, static_cast<int32_t>(length)};
        for (int64_t s = offset >> shift, last = (offset + length - 1) >> shift; s <= last; ++s) ++counts[s];
      });
      pieces.size = n;
      return inside;
    });
  });
}

void sort(Dtype dtype, const Pieces& pieces, int shift, void* records, int64_t* cursors) {
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const auto* piece = reinterpret_cast<const Piece<T, Sum<T>>*>(pieces.data.get());
    auto* const out = static_cast<Record<T, Sum<T>>*>(records);
    for (const auto* const last = piece + pieces.size; piece < last; ++piece) {
      const T* grad = piece->grad;
      for (int64_t offset = piece->offset, stop = offset + piece->length; offset < stop;) {
        const int64_t segment = offset >> shift, edge = (segment + 1) << shift;
        const int64_t n = (edge < stop ? edge : stop) - offset;
        out[cursors[segment]++] = {grad, piece->scale, static_cast<uint16_t>(offset - (segment << shift)),
                                   static_cast<uint16_t>(n)};
        grad += n;
        offset += n;
      }
    }
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

}  // namespace ROBE_ISA
}  // namespace robe
