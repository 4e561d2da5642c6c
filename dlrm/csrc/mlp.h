// A chain of linear layers with ReLU between them, for inference. Layers are dense, or have blocks of outputs with a list
// of the inputs that they have weights for. Included once per instruction set, as model_kernels.h.
//
// Each output of a row is one chain of sums, from the bias on in the order of the inputs, whatever the rows beside it: a
// row has the same bits in any batch. Few rows keep outputs in the lanes of registers. More rows have one row a lane:
// activations then lie input by input, kLanes or more rows beside each other, from the first layer to the last.

namespace robe {
namespace ROBE_ISA {

typedef float Lanes __attribute__((vector_size(4 * ROBE_LANES)));
#if ROBE_LANES == 16
ROBE_INLINE Lanes all(float x) { return _mm512_set1_ps(x); }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
constexpr int64_t kSums = 24;  // registers of sums in a tile: all but a few of those there are
#elif ROBE_LANES == 8
ROBE_INLINE Lanes all(float x) { return _mm256_set1_ps(x); }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
constexpr int64_t kSums = 12;
#else
ROBE_INLINE Lanes all(float x) { return Lanes{x, x, x, x}; }
ROBE_INLINE Lanes multiply_add(Lanes a, Lanes b, Lanes c) { return a * b + c; }
constexpr int64_t kSums = 12;
#endif
constexpr int64_t kLanes = ROBE_LANES;

// The largest power of two up to x.
constexpr int64_t power_of_two(int64_t x) { return x < 2 ? 1 : 2 * power_of_two(x / 2); }

ROBE_INLINE Lanes load(const float* from) {
  Lanes x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

ROBE_INLINE void store(float* to, Lanes x) { __builtin_memcpy(to, &x, sizeof x); }

// The comparison is false for NaN, which stays, as in torch.
ROBE_INLINE Lanes above_zero(Lanes x) { return x < Lanes{} ? Lanes{} : x; }

// The weights of one block of outputs: ``count`` times ``block`` of them, and which input each time.
template <class Index>
struct Weights {
  const float* values;
  const Index* inputs;
  int64_t count;

  Weights(const Layer& layer, int64_t b) {
    const int64_t start = layer.starts[b];
    values = layer.weights + start * layer.block;
    inputs = static_cast<const Index*>(layer.inputs) + start;
    count = layer.starts[b + 1] - start;
  }
  ROBE_INLINE int64_t input(int64_t k) const { return inputs[k]; }
};

template <>
struct Weights<void> {
  const float* values;
  int64_t count;

  Weights(const Layer& layer, int64_t b) : values(layer.weights + b * layer.in * layer.block), count(layer.in) {}
  ROBE_INLINE int64_t input(int64_t k) const { return k; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Few rows: ``registers`` of outputs of each of some blocks, so many that their chains hide each other's latency.

template <int64_t block, class Index, int64_t rows, int64_t registers>
ROBE_INLINE void continue_sums(const Weights<Index>& w, int64_t k, int64_t end, int64_t first, const float* in, int64_t in_stride,
                               Lanes (&sums)[rows][registers]) {
  for (; k < end; ++k) {
    Lanes column[registers];
#pragma GCC unroll 16
    for (int64_t t = 0; t < registers; ++t) column[t] = load(w.values + k * block + first + t * kLanes);
    const float* const x = in + w.input(k);
#pragma GCC unroll 16
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int64_t t = 0; t < registers; ++t) sums[r][t] = multiply_add(all(x[r * in_stride]), column[t], sums[r][t]);
  }
}

template <int64_t block, class Index, int64_t rows, int64_t registers, int64_t blocks>
ROBE_INLINE void few_rows(const Layer& layer, int64_t b, int64_t first, const float* in, int64_t in_stride, float* out,
                          int64_t out_stride) {
  Lanes sums[blocks][rows][registers];
  const Weights<Index> own[2] = {Weights<Index>(layer, b), Weights<Index>(layer, b + blocks - 1)};
  static_assert(blocks == 1 || blocks == 2, "or more weights");
#pragma GCC unroll 16
  for (int64_t n = 0; n < blocks; ++n)
#pragma GCC unroll 16
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int64_t t = 0; t < registers; ++t) sums[n][r][t] = load(layer.bias + (b + n) * block + first + t * kLanes);
  int64_t common = own[0].count < own[1].count ? own[0].count : own[1].count;
  if (blocks == 1) common = 0;
  for (int64_t k = 0; k < common; ++k)
#pragma GCC unroll 16
    for (int64_t n = 0; n < blocks; ++n) continue_sums<block>(own[n], k, k + 1, first, in, in_stride, sums[n]);
#pragma GCC unroll 16
  for (int64_t n = 0; n < blocks; ++n) continue_sums<block>(own[n], common, own[n].count, first, in, in_stride, sums[n]);
#pragma GCC unroll 16
  for (int64_t n = 0; n < blocks; ++n)
#pragma GCC unroll 16
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 16
      for (int64_t t = 0; t < registers; ++t)
        store(out + r * out_stride + (b + n) * block + first + t * kLanes,
              layer.relu ? above_zero(sums[n][r][t]) : sums[n][r][t]);
}

template <int64_t block, class Index, int64_t rows>
void few_rows_of(const Layer& layer, const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  constexpr int64_t whole = block / kLanes, some = power_of_two(kSums / rows), registers = some < whole ? some : whole;
  constexpr int64_t blocks = 2 * registers * rows <= kSums ? 2 : 1;
  int64_t b = 0;
  for (; b + blocks <= layer.blocks; b += blocks)
    for (int64_t first = 0; first < block; first += registers * kLanes)
      few_rows<block, Index, rows, registers, blocks>(layer, b, first, in, in_stride, out, out_stride);
  for (; b < layer.blocks; ++b)
    for (int64_t first = 0; first < block; first += registers * kLanes)
      few_rows<block, Index, rows, registers, 1>(layer, b, first, in, in_stride, out, out_stride);
}

// ---------------------------------------------------------------------------------------------------------------------
// A row a lane. in and out are (inputs, vectors * kLanes).

template <int64_t block, class Index, int64_t vectors, int64_t outputs>
ROBE_INLINE void many_rows(const Layer& layer, const Weights<Index>& w, int64_t first_output, int64_t first, const float* in,
                           float* out) {
  constexpr int64_t width = vectors * kLanes;
  Lanes sums[outputs][vectors];
  const float* const bias = layer.bias + first_output + first;
#pragma GCC unroll 32
  for (int64_t n = 0; n < outputs; ++n)
#pragma GCC unroll 16
    for (int64_t v = 0; v < vectors; ++v) sums[n][v] = all(bias[n]);
  const float* weights = w.values + first;
  for (int64_t k = 0; k < w.count; ++k, weights += block) {
    const float* const from = in + w.input(k) * width;
    Lanes x[vectors];
#pragma GCC unroll 16
    for (int64_t v = 0; v < vectors; ++v) x[v] = load(from + v * kLanes);
#pragma GCC unroll 32
    for (int64_t n = 0; n < outputs; ++n) {
      const Lanes weight = all(weights[n]);
#pragma GCC unroll 16
      for (int64_t v = 0; v < vectors; ++v) sums[n][v] = multiply_add(x[v], weight, sums[n][v]);
    }
  }
  float* const to = out + (first_output + first) * width;
#pragma GCC unroll 32
  for (int64_t n = 0; n < outputs; ++n)
#pragma GCC unroll 16
    for (int64_t v = 0; v < vectors; ++v)
      store(to + n * width + v * kLanes, layer.relu ? above_zero(sums[n][v]) : sums[n][v]);
}

template <int64_t block, class Index, int64_t vectors>
void many_rows_of(const Layer& layer, const Weights<Index>& w, int64_t b, const float* in, float* out) {
  constexpr int64_t outputs = kSums / vectors < block ? kSums / vectors : block;
  int64_t first = 0;
  for (; first + outputs <= block; first += outputs)
    many_rows<block, Index, vectors, outputs>(layer, w, b * block, first, in, out);
  if constexpr (block % outputs != 0) many_rows<block, Index, vectors, block % outputs>(layer, w, b * block, first, in, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Layers

// run(block, index) with the types of a layer's weights.
template <class Run>
ROBE_INLINE void with_kind(const Layer& layer, Run run) {
  using B16 = std::integral_constant<int64_t, 16>;
  using B32 = std::integral_constant<int64_t, 32>;
  if (!layer.inputs)
    run(B32(), static_cast<void*>(nullptr));
  else if (layer.wide)
    layer.block == 16 ? run(B16(), static_cast<uint32_t*>(nullptr)) : run(B32(), static_cast<uint32_t*>(nullptr));
  else
    layer.block == 16 ? run(B16(), static_cast<uint16_t*>(nullptr)) : run(B32(), static_cast<uint16_t*>(nullptr));
}

template <int64_t rows>
void chain_of_few(const Mlp& x, int64_t first) {
  const float* in = x.in + first * x.in_stride;
  int64_t in_stride = x.in_stride;
  for (int64_t l = 0; l < x.layers; ++l) {
    const Layer& layer = x.layer[l];
    float* const out = x.scratch + (l & 1) * x.scratch_half;
    const int64_t out_stride = layer.blocks * layer.block;
    with_kind(layer, [&](auto block, auto* index) {
      few_rows_of<decltype(block)::value, std::remove_pointer_t<decltype(index)>, rows>(layer, in, in_stride, out, out_stride);
    });
    in = out;
    in_stride = out_stride;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < x.width; ++i) x.out[(first + r) * x.width + i] = in[r * in_stride + i];
}

typedef float Four __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define ROBE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ROBE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (int __attribute__((vector_size(16)))){__VA_ARGS__})
#endif

// Four rows of four numbers, stride apart, become four columns.
ROBE_INLINE void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
  Four r[4];
  for (int64_t i = 0; i < 4; ++i) __builtin_memcpy(&r[i], from + i * stride, sizeof r[i]);
  const Four a = ROBE_SHUFFLE(r[0], r[1], 0, 4, 1, 5), b = ROBE_SHUFFLE(r[2], r[3], 0, 4, 1, 5);
  const Four c = ROBE_SHUFFLE(r[0], r[1], 2, 6, 3, 7), d = ROBE_SHUFFLE(r[2], r[3], 2, 6, 3, 7);
  const Four columns[4] = {ROBE_SHUFFLE(a, b, 0, 1, 4, 5), ROBE_SHUFFLE(a, b, 2, 3, 6, 7), ROBE_SHUFFLE(c, d, 0, 1, 4, 5),
                           ROBE_SHUFFLE(c, d, 2, 3, 6, 7)};
  for (int64_t i = 0; i < 4; ++i) __builtin_memcpy(to + i * to_stride, &columns[i], sizeof columns[i]);
}
#undef ROBE_SHUFFLE

// Rows of x's input, and zeros up to width, input by input.
ROBE_INLINE void turn(const Mlp& x, int64_t first, int64_t rows, int64_t width, float* to) {
  const float* const from = x.in + first * x.in_stride;
  const int64_t inputs = x.layer[0].in;
  for (int64_t r = 0; r < width; r += 4) {
    int64_t i = 0;
    if (r + 4 <= rows)
      for (; i + 4 <= inputs; i += 4) transpose(from + r * x.in_stride + i, x.in_stride, to + i * width + r, width);
    for (; i < inputs; ++i)
      for (int64_t n = r; n < r + 4; ++n) to[i * width + n] = n < rows ? from[n * x.in_stride + i] : 0;
  }
}

// Groups of rows go through a layer one after the other, so that a block's weights are read from the first cache.
template <int64_t vectors>
void chain_of_many(const Mlp& x, int64_t first, int64_t rows) {
  constexpr int64_t width = vectors * kLanes;
  const int64_t groups = (rows + width - 1) / width, each = x.scratch_half / groups;
  float* in = x.scratch;
  float* out = x.scratch + x.scratch_half;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t left = rows - g * width;
    turn(x, first + g * width, left < width ? left : width, width, in + g * each);
  }
  for (int64_t l = 0; l < x.layers; ++l) {
    const Layer& layer = x.layer[l];
    with_kind(layer, [&](auto block, auto* index) {
      using Index = std::remove_pointer_t<decltype(index)>;
      for (int64_t b = 0; b < layer.blocks; ++b) {
        const Weights<Index> w(layer, b);
        for (int64_t g = 0; g < groups; ++g)
          many_rows_of<decltype(block)::value, Index, vectors>(layer, w, b, in + g * each, out + g * each);
      }
    });
    float* const next = in;
    in = out;
    out = next;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < x.width; ++i)
      x.out[(first + r) * x.width + i] = in[r / width * each + i * width + r % width];
}

template <int64_t... rows>
void chain_of_few_at(const Mlp& x, int64_t first, int64_t end) {
  const auto run = [&](auto some) {
    for (; first + decltype(some)::value <= end; first += decltype(some)::value) chain_of_few<decltype(some)::value>(x, first);
  };
  (run(std::integral_constant<int64_t, rows>()), ...);
}

void mlp(const Mlp& x, int64_t begin, int64_t end) {
  while (end - begin >= 2 * kLanes) {
    const int64_t rows = end - begin < x.rows_at_once ? end - begin : x.rows_at_once;
    // The width that leaves the fewest lanes empty; of equal ones the widest.
    const auto lanes = [&](int64_t vectors) { return (rows + vectors * kLanes - 1) / (vectors * kLanes) * vectors; };
    if (lanes(3) <= lanes(2)) chain_of_many<3>(x, begin, rows);
    else chain_of_many<2>(x, begin, rows);
    begin += rows;
  }
  if constexpr (kLanes == 16) chain_of_few_at<12, 8, 4, 2, 1>(x, begin, end);
  else chain_of_few_at<6, 4, 2, 1>(x, begin, end);
}

}  // namespace ROBE_ISA
}  // namespace robe
