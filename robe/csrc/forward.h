// The forward of lookups and bags, for every type and hash. Included once per instruction set, by kernels.h.

namespace robe {
namespace ROBE_ISA {

template <bool is_mix, bool is_uniform, class T>
bool read_of(const Job& job, int64_t begin, int64_t end) {
  if (job.pooling != Pooling::none) return read_bags<is_mix, is_uniform, T>(job, begin, end);
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

}  // namespace ROBE_ISA
}  // namespace robe
