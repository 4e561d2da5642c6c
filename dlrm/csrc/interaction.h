// The dot products of all pairs of N = F + 1 vectors of an example, and their gradient. Included once per instruction set,
// as model_kernels.h.

namespace robe {
namespace ROBE_ISA {

constexpr int64_t kRows = 4, kColumns = 16;  // of sums that stay in registers

template <class T>
ROBE_INLINE T multiply_add(T a, T b, T c) {
#if defined(ROBE_FMA)
  if constexpr (sizeof(T) == 4) return __builtin_fmaf(a, b, c);
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The N vectors of an example, N rounded up to whole blocks of rows: what is past the end repeats the last one.
template <class T>
ROBE_INLINE void vectors_of(const Interaction& x, int64_t example, const T** vectors) {
  vectors[0] = static_cast<const T*>(x.dense) + example * x.dense_stride;
  const T* const rows = static_cast<const T*>(x.embeddings) + example * x.example_stride;
  for (int64_t f = 0; f < x.features; ++f) vectors[f + 1] = rows + f * x.feature_stride;
  for (int64_t i = x.features + 1; i % kRows; ++i) vectors[i] = vectors[x.features];
}

template <class T>
void interact_of(const Interaction& x, int64_t begin, int64_t end) {
  const int64_t dim = x.dim, count = x.features + 1, padded = (count + kColumns - 1) / kColumns * kColumns;
  const T** const vectors = new const T*[count + kRows];
  T* const columns = new T[dim * padded]();  // the vectors, transposed, so that a product's sum runs down a register
  for (int64_t b = begin; b < end; ++b) {
    vectors_of(x, b, vectors);
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = 0; d < dim; ++d) columns[d * padded + j] = vectors[j][d];
    T* const out = static_cast<T*>(x.out) + b * x.out_stride;
    for (int64_t d = 0; d < dim; ++d) out[d] = vectors[0][d];
    T* const pairs = out + dim;
    for (int64_t i = 0; i < count; i += kRows)
      for (int64_t j = 0; j < i + kRows - 1 && j < count; j += kColumns) {
        // Named one by one, or the compiler keeps the sums in memory.
        const T *const v0 = vectors[i], *const v1 = vectors[i + 1], *const v2 = vectors[i + 2], *const v3 = vectors[i + 3];
        T s0[kColumns] = {}, s1[kColumns] = {}, s2[kColumns] = {}, s3[kColumns] = {};
        const T* column = columns + j;
        for (int64_t d = 0; d < dim; ++d, column += padded) {
          const T a0 = v0[d], a1 = v1[d], a2 = v2[d], a3 = v3[d];
          for (int64_t c = 0; c < kColumns; ++c) {
            s0[c] = multiply_add(a0, column[c], s0[c]);
            s1[c] = multiply_add(a1, column[c], s1[c]);
            s2[c] = multiply_add(a2, column[c], s2[c]);
            s3[c] = multiply_add(a3, column[c], s3[c]);
          }
        }
        const T* const sums[kRows] = {s0, s1, s2, s3};
        for (int64_t r = 0; r < kRows && i + r < count; ++r) {
          T* const row = pairs + (i + r) * (i + r - 1) / 2 + j;
          if (i + r - j >= kColumns)
            for (int64_t c = 0; c < kColumns; ++c) row[c] = sums[r][c];
          else
            for (int64_t c = 0; c < i + r - j; ++c) row[c] = sums[r][c];
        }
      }
  }
  delete[] vectors;
  delete[] columns;
}

template <class T>
void interact_grad_of(const Interaction& x, int64_t begin, int64_t end) {
  const int64_t dim = x.dim, count = x.features + 1, rows = (count + kRows - 1) / kRows * kRows;
  const T** const vectors = new const T*[count + kRows];
  T* const grads = new T[rows * count]();  // of the product of each two vectors, both ways round
  for (int64_t b = begin; b < end; ++b) {
    vectors_of(x, b, vectors);
    const T* const out = static_cast<const T*>(x.out) + b * x.out_stride;
    const T* pair = out + dim;
    for (int64_t i = 1; i < count; ++i)
      for (int64_t j = 0; j < i; ++j) grads[i * count + j] = grads[j * count + i] = *pair++;
    T* const dense = static_cast<T*>(x.dense_grad) + b * dim;
    T* const embeddings = static_cast<T*>(x.embeddings_grad) + b * x.features * dim;
    for (int64_t i = 0; i < count; i += kRows)
      for (int64_t d = 0; d < dim; d += kColumns) {
        const int64_t width = dim - d < kColumns ? dim - d : kColumns;
        T sums[kRows][kColumns] = {};
        if (width == kColumns) {
          for (int64_t j = 0; j < count; ++j)
            for (int64_t r = 0; r < kRows; ++r)
              for (int64_t c = 0; c < kColumns; ++c)
                sums[r][c] = multiply_add(grads[(i + r) * count + j], vectors[j][d + c], sums[r][c]);
        } else {
          for (int64_t j = 0; j < count; ++j)
            for (int64_t r = 0; r < kRows; ++r)
              for (int64_t c = 0; c < width; ++c)
                sums[r][c] = multiply_add(grads[(i + r) * count + j], vectors[j][d + c], sums[r][c]);
        }
        for (int64_t r = 0; r < kRows && i + r < count; ++r) {
          T* const to = i + r ? embeddings + (i + r - 1) * dim + d : dense + d;
          for (int64_t c = 0; c < width; ++c) to[c] = sums[r][c];
        }
      }
    for (int64_t d = 0; d < dim; ++d) dense[d] += out[d];
  }
  delete[] vectors;
  delete[] grads;
}

void interact(const Interaction& x, int64_t begin, int64_t end) {
  x.wide ? interact_of<double>(x, begin, end) : interact_of<float>(x, begin, end);
}

void interact_grad(const Interaction& x, int64_t begin, int64_t end) {
  x.wide ? interact_grad_of<double>(x, begin, end) : interact_grad_of<float>(x, begin, end);
}

}  // namespace ROBE_ISA
}  // namespace robe
