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
  for (size_t i = n; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorOpaque* handle = nullptr;
  const int32_t dtype = dtype_numbers()[static_cast<size_t>(type)];
  succeed(aoti_torch_empty_strided(n, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor whose last dimension is contiguous: itself, or a copy.
Tensor dense_rows(Tensor t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) > 1 && t.stride(last) != 1 ? contiguous(t) : t;
}

}  // namespace
}  // namespace robe
