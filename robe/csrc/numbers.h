// Number types of an array, and the types that their sums are taken in. Included once per instruction set, by kernels.h.

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

}  // namespace ROBE_ISA
}  // namespace robe
