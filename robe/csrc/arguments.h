// The arguments of operators: taken from torch's stack, described in errors, made anew. Shared by all libraries of kernels.

#pragma once

#include <algorithm>

#include "torch_abi.h"

namespace robe {
namespace {

std::string str(int64_t x) { return std::to_string(x); }

// The place of a name among others.
template <size_t n>
int64_t place_of(const char* argument, const std::string& name, const char* const (&names)[n]) {
  for (size_t k = 0; k < n; ++k)
    if (name == names[k]) return static_cast<int64_t>(k);
  std::string known = names[0];
  for (size_t k = 1; k < n; ++k) known += std::string(", ") + names[k];
  throw std::invalid_argument(std::string(argument) + ": expected one of " + known + ", got '" + name + "'");
}

std::string shape(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + str(t.size(i));
  return text + (t.dim() == 1 ? ",)" : ")");
}

std::string type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Short: return "torch.int16";
    case ScalarType::Char: return "torch.int8";
    case ScalarType::Byte: return "torch.uint8";
    case ScalarType::Bool: return "torch.bool";
    default: return "another type";
  }
}

// Python sees std::invalid_argument as ValueError, std::out_of_range as IndexError.
#define EXPECT(good, message) \
  do {                        \
    if (!(good)) throw std::invalid_argument(message); \
  } while (0)

// A product of sizes; what is too large for any memory is INT64_MAX.
template <class... Sizes>
int64_t product(Sizes... sizes) {
  int64_t result = 1;
  bool overflows = false, is_empty = false;
  for (const int64_t size : {static_cast<int64_t>(sizes)...}) {
    is_empty |= size == 0;
    overflows |= __builtin_mul_overflow(result, size, &result);
  }
  return is_empty ? 0 : overflows ? INT64_MAX : result;
}

// The stride of a dimension; of one that has no second entry 0, since torch allows any number there.
int64_t stride_of(const Tensor& t, int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; }

// The memory that a tensor reaches, from its first byte to behind its last.
struct Extent {
  const char *begin, *end;

  Extent(const Tensor& t, int64_t item) : begin(static_cast<const char*>(t.const_data_ptr())), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * stride_of(t, d);
    end += (last + 1) * item;
  }
  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};

Extent extent(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: case ScalarType::Long: return {t, 8};
    case ScalarType::Float: case ScalarType::Int: return {t, 4};
    case ScalarType::BFloat16: case ScalarType::Half: case ScalarType::Short: return {t, 2};
    default: return {t, 1};
  }
}

inline void apart(const char* written, const Extent& memory, const char* read, const Tensor& t) {
  EXPECT(!memory.meets(extent(t)), std::string(written) + ": expected memory of its own, but it shares some with " + read);
}

// The arguments of an operator, in the order of its schema.
struct Arguments {
  Value* stack;

  template <class T>
  T take() {
    return As<T>::take(*stack++);
  }
  Tensor tensor() { return take<Tensor>(); }
  std::optional<Tensor> maybe_tensor() { return take<std::optional<Tensor>>(); }
  int64_t integer() { return take<int64_t>(); }
  bool boolean() { return take<bool>(); }
  std::optional<int64_t> maybe_integer() { return take<std::optional<int64_t>>(); }
  std::string text() { return take<std::string>(); }
  template <class T>
  std::vector<T> list() {
    return take<std::vector<T>>();
  }
};

// A new contiguous tensor. aten::empty would go through the dispatcher, at the price of a whole lookup.
template <size_t n>
Tensor new_tensor(const int64_t (&sizes)[n], ScalarType type) {
  int64_t strides[n];
  int64_t stride = 1;
  for (size_t i = n; i-- > 0; stride = product(stride, std::max<int64_t>(sizes[i], 1))) strides[i] = stride;
  EXPECT(product(stride, 8) < INT64_MAX, "out: its sizes are too large for any memory");
  AtenTensorOpaque* handle = nullptr;
  const int32_t dtype = dtype_numbers()[static_cast<size_t>(type)];
  succeed(aoti_torch_empty_strided(n, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor (of one dimension or more) whose last dimension is contiguous: itself, or a copy.
Tensor dense_rows(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) <= 1 || t.stride(last) == 1) return t;
  try {
    return contiguous(t);
  } catch (const std::runtime_error&) {
    throw std::runtime_error(std::string(name) + ": no memory for a contiguous copy of " + shape(t));
  }
}

bool is_floating(const Tensor& t) {
  const ScalarType x = t.scalar_type();
  return x == ScalarType::Double || x == ScalarType::Float || x == ScalarType::BFloat16 || x == ScalarType::Half;
}

}  // namespace
}  // namespace robe
