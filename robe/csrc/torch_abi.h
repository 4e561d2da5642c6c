// torch's stable C ABI, as much of it as the kernels use: tensors, the arguments of operators, registration, threads.
//
// The functions are declared here and found in libtorch_cpu when the library is loaded, so that building needs no torch and
// one build serves every torch from 2.10 on, in every Python. torch documents them in torch/csrc/stable/c/shim.h and
// torch/csrc/inductor/aoti_torch/c/shim.h. All but the plain queries return 0 where all went well.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern "C" {

struct AtenTensorOpaque;
struct StableListOpaque;
struct StringOpaque;
struct TorchLibraryOpaque;

int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_dtype_float64();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_int64();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_memory_format_contiguous_format();

int32_t aoti_torch_get_dim(AtenTensorOpaque*, int64_t* dim);
int32_t aoti_torch_get_numel(AtenTensorOpaque*, int64_t* numel);
int32_t aoti_torch_get_sizes(AtenTensorOpaque*, int64_t** sizes);      // borrowed
int32_t aoti_torch_get_strides(AtenTensorOpaque*, int64_t** strides);  // borrowed
int32_t aoti_torch_get_dtype(AtenTensorOpaque*, int32_t* dtype);
int32_t aoti_torch_is_contiguous(AtenTensorOpaque*, bool* is_contiguous);
int32_t torch_get_const_data_ptr(AtenTensorOpaque*, const void** data);  // borrowed
int32_t torch_get_mutable_data_ptr(AtenTensorOpaque*, void** data);      // borrowed
int32_t aoti_torch_new_tensor_handle(AtenTensorOpaque*, AtenTensorOpaque** same_tensor);
int32_t aoti_torch_delete_tensor_object(AtenTensorOpaque*);
int32_t aoti_torch_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device_type, int32_t device_index, AtenTensorOpaque** tensor);

int32_t torch_list_size(StableListOpaque*, size_t* size);
int32_t torch_list_get_item(StableListOpaque*, size_t index, uint64_t* element);
int32_t torch_delete_list(StableListOpaque*);
int32_t torch_string_length(StringOpaque*, size_t* length);
int32_t torch_string_c_str(StringOpaque*, const char** data);
int32_t torch_delete_string(StringOpaque*);

int32_t torch_call_dispatcher(const char* name, const char* overload, uint64_t* stack, uint64_t version);
int32_t aoti_torch_library_init_impl(const char* ns, const char* key, const char* file, uint32_t line,
                                     TorchLibraryOpaque** library);
int32_t torch_library_impl(TorchLibraryOpaque*, const char* name, void (*body)(uint64_t*, uint64_t, uint64_t),
                           uint64_t version);
int32_t aoti_torch_delete_library_object(TorchLibraryOpaque*);

int32_t torch_get_num_threads(uint32_t* threads);
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*part)(int64_t, int64_t, void*), void* context);
}

namespace robe {
namespace {

using Value = uint64_t;  // an argument on torch's stack, or a pointer to it

constexpr uint64_t kTorchVersion = (uint64_t{2} << 56) | (uint64_t{10} << 48);  // whose conventions are followed

inline void succeed(int32_t error) {
  if (error) throw std::runtime_error("robe: a call into torch failed");
}

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

enum class ScalarType : int32_t { Double, Float, BFloat16, Half, Long, Int, Short, Char, Byte, Bool, Other };

// torch's number of each ScalarType, in its order.
inline const std::array<int32_t, 10>& dtype_numbers() {
  static const std::array<int32_t, 10> numbers{
      aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16(),
      aoti_torch_dtype_int64(),   aoti_torch_dtype_int32(),   aoti_torch_dtype_int16(),    aoti_torch_dtype_int8(),
      aoti_torch_dtype_uint8(),   aoti_torch_dtype_bool()};
  return numbers;
}

// Owns a reference to a tensor of torch.
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(AtenTensorOpaque* handle) : handle_(handle) {}  // takes it over
  Tensor(const Tensor& other) {
    if (other.handle_) succeed(aoti_torch_new_tensor_handle(other.handle_, &handle_));
  }
  Tensor(Tensor&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Tensor& operator=(Tensor other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorOpaque* release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return get<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return get<int64_t>(aoti_torch_get_numel); }
  int64_t size(int64_t d) const { return get<int64_t*>(aoti_torch_get_sizes)[d]; }
  int64_t stride(int64_t d) const { return get<int64_t*>(aoti_torch_get_strides)[d]; }
  bool is_contiguous() const { return get<bool>(aoti_torch_is_contiguous); }
  const void* const_data_ptr() const { return get<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return get<void*>(torch_get_mutable_data_ptr); }
  ScalarType scalar_type() const {
    const int32_t number = get<int32_t>(aoti_torch_get_dtype);
    const auto& numbers = dtype_numbers();
    for (size_t i = 0; i < numbers.size(); ++i)
      if (numbers[i] == number) return static_cast<ScalarType>(i);
    return ScalarType::Other;
  }

 private:
  template <class T>
  T get(int32_t (*query)(AtenTensorOpaque*, T*)) const {
    T answer{};
    succeed(query(handle_, &answer));
    return answer;
  }

  AtenTensorOpaque* handle_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------
// Arguments and results

template <class T>
struct As {  // numbers and pointers lie in the first bytes
  static T take(Value value) {
    static_assert(sizeof(T) <= sizeof(Value));
    T result;
    std::memcpy(&result, &value, sizeof(T));
    return result;
  }
};

template <>
struct As<Tensor> {
  static Tensor take(Value value) { return Tensor(As<AtenTensorOpaque*>::take(value)); }
};

template <class T>
struct As<std::optional<T>> {  // a pointer to the value, or null
  static std::optional<T> take(Value value) {
    Value* const inside = As<Value*>::take(value);
    if (!inside) return std::nullopt;
    std::optional<T> result(As<T>::take(*inside));
    delete inside;
    return result;
  }
};

template <>
struct As<std::string> {
  static std::string take(Value value) {
    StringOpaque* const handle = As<StringOpaque*>::take(value);
    size_t length = 0;
    const char* data = nullptr;
    succeed(torch_string_length(handle, &length));
    succeed(torch_string_c_str(handle, &data));
    std::string copy(data, length);
    succeed(torch_delete_string(handle));
    return copy;
  }
};

template <class T>
struct As<std::vector<T>> {
  static std::vector<T> take(Value value) {
    StableListOpaque* const handle = As<StableListOpaque*>::take(value);
    size_t size = 0;
    succeed(torch_list_size(handle, &size));
    std::vector<T> result;
    result.reserve(size);
    for (size_t i = 0; i < size; ++i) {
      Value element = 0;
      succeed(torch_list_get_item(handle, i, &element));
      result.push_back(As<T>::take(element));
    }
    succeed(torch_delete_list(handle));
    return result;
  }
};

template <class T>
Value value_of(T number) {
  static_assert(sizeof(T) <= sizeof(Value));
  Value value = 0;
  std::memcpy(&value, &number, sizeof(T));
  return value;
}

inline Value value_of(Tensor tensor) { return value_of(tensor.release()); }

inline Value value_of(ScalarType type) { return value_of(dtype_numbers()[static_cast<size_t>(type)]); }

// ---------------------------------------------------------------------------------------------------------------------
// torch's own operators, threads, registration

// A contiguous copy, or the tensor itself where it is contiguous.
inline Tensor contiguous(const Tensor& t) {
  Value stack[2] = {value_of(Tensor(t)), value_of(aoti_torch_memory_format_contiguous_format())};
  succeed(torch_call_dispatcher("aten::contiguous", "", stack, kTorchVersion));
  return As<Tensor>::take(stack[0]);
}

// The values in another dtype.
inline Tensor convert(const Tensor& t, ScalarType type) {
  Value stack[5] = {value_of(Tensor(t)), value_of(type), value_of(false), value_of(false), 0};
  succeed(torch_call_dispatcher("aten::to", "dtype", stack, kTorchVersion));
  return As<Tensor>::take(stack[0]);
}

inline int64_t get_num_threads() {
  uint32_t threads = 1;
  succeed(torch_get_num_threads(&threads));
  return threads;
}

// use(first, last) of parts of begin .. end on torch's threads, none below ``grain``.
template <class Use>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Use& use) {
  const auto part = [](int64_t first, int64_t last, void* context) { (*static_cast<const Use*>(context))(first, last); };
  succeed(torch_parallel_for(begin, end, grain, part, const_cast<Use*>(&use)));
}

using Body = void (*)(Value* stack, uint64_t inputs, uint64_t outputs);

// Registers the bodies of operators for CPU tensors, until the library is unloaded.
class Registration {
 public:
  Registration(const char* ns, std::initializer_list<std::pair<const char*, Body>> bodies) {
    succeed(aoti_torch_library_init_impl(ns, "CPU", __FILE__, __LINE__, &library_));
    for (const auto& [name, body] : bodies) succeed(torch_library_impl(library_, name, body, kTorchVersion));
  }
  Registration(const Registration&) = delete;
  ~Registration() { aoti_torch_delete_library_object(library_); }

 private:
  TorchLibraryOpaque* library_ = nullptr;
};

}  // namespace
}  // namespace robe
