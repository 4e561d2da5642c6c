// A chain of linear layers with ReLU between them, for inference: a few examples go through all layers before the next
// ones, so that their activations stay in the second cache and threads meet once. Included once per instruction set, as
// model_kernels.h.

namespace robe {
namespace ROBE_ISA {

// kLanes floats in a register; kTile of them, and kGroup rows, are what the sums of a tile take up: all but a few of the
// registers there are.
typedef float Lanes __attribute__((vector_size(4 * ROBE_LANES)));
#if ROBE_LANES == 16
constexpr int64_t kTile = 2, kGroup = 12;
ROBE_INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
#elif ROBE_LANES == 8
constexpr int64_t kTile = 2, kGroup = 6;
ROBE_INLINE Lanes all(float x) { return _mm256_set1_ps(x); }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
#else
constexpr int64_t kTile = 2, kGroup = 4;
ROBE_INLINE Lanes all(float x) { return Lanes{x, x, x, x}; }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
#endif

ROBE_INLINE Lanes load(const float* from) {
  Lanes x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

ROBE_INLINE void store(float* to, Lanes x) { __builtin_memcpy(to, &x, sizeof x); }

// The comparison is false for NaN, which stays, as in torch.
ROBE_INLINE Lanes above_zero(Lanes x) { return x < Lanes{} ? Lanes{} : x; }

constexpr int64_t kLanes = ROBE_LANES;

// Rows 0 .. rows of the outputs of one tile.
template <int64_t rows>
ROBE_INLINE void tile(const Layer& layer, const float* weights, const float* bias, const float* in, int64_t in_stride,
                      float* out, int64_t out_stride) {
  Lanes sums[rows][kTile];
#pragma GCC unroll 16
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int64_t t = 0; t < kTile; ++t) sums[r][t] = load(bias + t * kLanes);
  for (int64_t k = 0; k < layer.in; ++k, weights += kPanel) {
    Lanes column[kTile];
#pragma GCC unroll 16
    for (int64_t t = 0; t < kTile; ++t) column[t] = load(weights + t * kLanes);
#pragma GCC unroll 16
    for (int64_t r = 0; r < rows; ++r) {
      const Lanes x = all(in[r * in_stride + k]);
#pragma GCC unroll 16
      for (int64_t t = 0; t < kTile; ++t) sums[r][t] = multiply_add(x, column[t], sums[r][t]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
    for (int64_t t = 0; t < kTile; ++t)
      store(out + r * out_stride + t * kLanes, layer.relu ? above_zero(sums[r][t]) : sums[r][t]);
}

// The outputs of one panel, tile by tile, for as many rows as there are.
ROBE_INLINE void panel(const Layer& layer, int64_t p, const float* in, int64_t in_stride, int64_t rows, float* out,
                       int64_t out_stride) {
  for (int64_t c = 0; c < kPanel; c += kTile * kLanes) {
    const float *const weights = layer.weights + p * layer.in * kPanel + c, *const bias = layer.bias + p * kPanel + c;
    float* const to = out + p * kPanel + c;
    const auto run = [&](auto some, int64_t first) {
      tile<decltype(some)::value>(layer, weights, bias, in + first * in_stride, in_stride, to + first * out_stride, out_stride);
    };
    int64_t done = 0;
    for (; done + kGroup <= rows; done += kGroup) run(std::integral_constant<int64_t, kGroup>(), done);
    for (; done + 4 <= rows; done += 4) run(std::integral_constant<int64_t, 4>(), done);
    if (done + 2 <= rows) run(std::integral_constant<int64_t, 2>(), done), done += 2;
    if (done < rows) run(std::integral_constant<int64_t, 1>(), done);
  }
}

void mlp(const Mlp& x, int64_t begin, int64_t end) {
  int64_t widest = 0;
  // Rows a power of two apart would share a set of the first cache.
  for (int64_t l = 0; l < x.layers; ++l) widest = std::max(widest, x.layer[l].panels * kPanel + 16);
  // The activations of two layers, half of what a second cache holds; the passes alike, for each reads all weights.
  constexpr int64_t cache = 1 << 16;
  const int64_t most = std::max(cache / widest, kGroup), passes = std::max((end - begin + most - 1) / most, int64_t{1});
  const int64_t at_once = (end - begin + passes - 1) / passes;
  float* const buffers = new float[2 * at_once * widest];
  for (int64_t first = begin; first < end; first += at_once) {
    const int64_t rows = std::min(at_once, end - first);
    const float* in = x.in + first * x.in_stride;
    int64_t in_stride = x.in_stride;
    for (int64_t l = 0; l < x.layers; ++l) {
      const Layer& layer = x.layer[l];
      float* const out = buffers + (l & 1) * at_once * widest;
      const int64_t out_stride = layer.panels * kPanel + 16;
      for (int64_t p = 0; p < layer.panels; ++p) panel(layer, p, in, in_stride, rows, out, out_stride);
      in = out;
      in_stride = out_stride;
    }
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < x.width; ++i) x.out[(first + r) * x.width + i] = in[r * in_stride + i];
  }
  delete[] buffers;
}

}  // namespace ROBE_ISA
}  // namespace robe
