// The operators robe::* on a CPU, registered through torch's stable ABI: one binary serves every torch from 2.10 on.
// What they compute is defined by the reference bodies in robe/ops.py and by robe/hashing.py; how, by kernels.h, which
// is compiled here once per instruction set. Threads are torch's own: a second OpenMP runtime beside it would fight it.

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "admission.h"
#include "job.h"

#define ROBE_ISA plain
#define ROBE_ISA_NAME "plain"
#define ROBE_LANES 4
#include "kernels.h"
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES

#if defined(__x86_64__)
#if defined(__clang__)
#define ROBE_TARGET_AVX2 _Pragma("clang attribute push(__attribute__((target(\"avx2,bmi,bmi2,fma,f16c\"))), apply_to=function)")
#define ROBE_TARGET_AVX512 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\"))), apply_to=function)")
#define ROBE_TARGET_END _Pragma("clang attribute pop")
#else
#define ROBE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,bmi,bmi2,fma,f16c\")")
#define ROBE_TARGET_AVX512 \
  _Pragma("GCC push_options")  \
  _Pragma("GCC target(\"avx2,bmi,bmi2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512\")")
#define ROBE_TARGET_END _Pragma("GCC pop_options")
#endif

ROBE_TARGET_AVX2
#define ROBE_FMA
#define ROBE_ISA avx2
#define ROBE_ISA_NAME "avx2"
#define ROBE_LANES 8
#include "kernels.h"
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES
ROBE_TARGET_END

ROBE_TARGET_AVX512
#define ROBE_ISA avx512
#define ROBE_ISA_NAME "avx512"
#define ROBE_LANES 16
#include "kernels.h"
#undef ROBE_ISA
#undef ROBE_ISA_NAME
#undef ROBE_LANES
ROBE_TARGET_END
#endif

namespace robe {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// ---------------------------------------------------------------------------------------------------------------------
// Which kernels

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> all{&plain::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                        __builtin_cpu_supports("fma");
  if (has_avx2) all.push_back(&avx2::kernels);
  if (has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    all.push_back(&avx512::kernels);
#endif
  return all;
}

const Kernels* kernels = usable().back();

// ---------------------------------------------------------------------------------------------------------------------
// Arguments

std::string str(int64_t x) { return std::to_string(x); }

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

// The arguments of an operator, in the order of its schema. torch's own conversion of strings leaks them.
struct Arguments {
  StableIValue* stack;

  Tensor tensor() { return to<Tensor>(*stack++); }
  std::optional<Tensor> maybe_tensor() { return to<std::optional<Tensor>>(*stack++); }
  int64_t integer() { return to<int64_t>(*stack++); }
  bool boolean() { return to<bool>(*stack++); }
  std::optional<int64_t> maybe_integer() { return to<std::optional<int64_t>>(*stack++); }
  template <class T>
  std::vector<T> list() {
    return to<std::vector<T>>(*stack++);
  }
  std::string text() {
    const auto handle = to<StringHandle>(*stack++);
    size_t length = 0;
    const char* data = nullptr;
    torch_string_length(handle, &length);
    torch_string_c_str(handle, &data);
    std::string copy(data, length);
    torch_delete_string(handle);
    return copy;
  }
};

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::Char: return Dtype::int8;
    default:
      throw std::invalid_argument("weight: expected a floating-point vector (m,), got " + type(t) + " " + shape(t));
  }
}

size_t item_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2;
}

// A new contiguous tensor; torch::stable::empty would go through the dispatcher, at the price of a whole lookup.
template <size_t n>
Tensor new_tensor(const int64_t (&sizes)[n], ScalarType type) {
  int64_t strides[n];
  int64_t stride = 1;
  for (size_t i = n; i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(n, sizes, strides, to<int32_t>(from(type)),
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor whose elements lie one after another in rows: itself, or a copy.
Tensor dense_rows(const Tensor& t) {
  return t.size(t.dim() - 1) > 1 && t.stride(t.dim() - 1) != 1 ? torch::stable::contiguous(t) : t;
}

// The arguments of one lookup or bag, checked, and the Job they make. Keeps the tensors that the Job points into.
struct Call {
  Tensor weight, ids, table_keys, num_embeddings;
  std::optional<Tensor> scale, offsets, factors, filter;
  Tensor rows;  // the embeddings or their gradient
  std::string hash;
  std::optional<int64_t> padding;
  std::vector<int64_t> bag_offsets;
  std::vector<int64_t> keys_in_turn, rows_in_turn;
  std::vector<uint64_t> rare, rare_in_turn;
  Job job{};

  void array(Tensor w, std::optional<Tensor> s) {
    job.dtype = dtype_of(w);
    EXPECT(w.dim() == 1, "weight: expected a floating-point vector (m,), got " + type(w) + " " + shape(w));
    weight = dense_rows(w);
    job.weight = weight.const_data_ptr();
    EXPECT(s.has_value() == (job.dtype == Dtype::int8), "scale: expected with an int8 weight, which has no gradient, and only with one");
    if (!s) return;
    scale = dense_rows(*s);
    EXPECT(scale->dim() == 1 && scale->scalar_type() == ScalarType::Float && scale->numel() > 0,
           "scale: expected a float32 vector, one entry per group of weights, got " + type(*scale) + " " + shape(*scale));
    // Groups are the smallest power of two that lets the scales cover the weights.
    while ((scale->numel() << job.group_shift) < weight.numel()) ++job.group_shift;
    job.scale = static_cast<const float*>(scale->const_data_ptr());
  }

  void tables(Arguments& in) {
    table_keys = in.tensor();
    num_embeddings = in.tensor();
    job.dim = in.integer();
    job.block = in.integer();
    hash = in.text();
    job.sign = in.boolean();
    padding = in.maybe_integer();
  }

  void layout() {
    EXPECT(table_keys.dim() == 1 && num_embeddings.dim() == 1 && table_keys.numel() == num_embeddings.numel(),
           "table_keys and num_embeddings: expected one entry per feature in each, got shapes " + shape(table_keys) +
               " and " + shape(num_embeddings));
    EXPECT(table_keys.scalar_type() == ScalarType::Long && num_embeddings.scalar_type() == ScalarType::Long,
           "table_keys and num_embeddings: expected int64");
    EXPECT(hash == "mix" || hash == "linear" || hash == "identity",
           "hash: expected one of mix, linear, identity, got '" + hash + "'");
    EXPECT(job.dim >= 1 && job.block >= 1, "embedding_dim and block_size: expected at least 1, got " + str(job.dim) +
                                               " and " + str(job.block));
    const int64_t size = weight.numel();
    job.hash = hash == "linear" ? Hash::linear : hash == "identity" ? Hash::identity : Hash::mix;
    if (job.hash == Hash::mix && job.block > job.dim) job.hash = Hash::span;
    EXPECT(job.hash == Hash::identity || size >= job.block,
           "weight: " + str(size) + " weights do not hold one block of " + str(job.block));
    EXPECT(table_keys.numel() > 0, "table_keys: expected at least one feature");
    table_keys = dense_rows(table_keys);
    num_embeddings = dense_rows(num_embeddings);
    job.keys = static_cast<const int64_t*>(table_keys.const_data_ptr());
    job.rows = static_cast<const int64_t*>(num_embeddings.const_data_ptr());
    job.features = table_keys.numel();
    job.choices = static_cast<uint64_t>(size - job.block + 1);
    job.padded = padding.has_value();
    job.padding = padding.value_or(0);
    if (job.hash == Hash::identity)
      for (int64_t f = 0; f < job.features; ++f)
        EXPECT(job.rows[f] > 0 && job.keys[f] >= 0 && job.keys[f] <= size - job.rows[f] * job.dim,
               "hash='identity': the table of feature " + str(f) + " does not lie within the array's " + str(size) +
                   " slots");
  }

  void admission(std::optional<Tensor> words) {
    if (!words) return;
    EXPECT(words->dim() == 1 && words->scalar_type() == ScalarType::Long && words->numel() > 0 && words->numel() >> 32 == 0,
           "filter: expected an int64 vector (W,), got " + type(*words) + " " + shape(*words));
    EXPECT(hash == "mix", "filter: expected hash 'mix' with it, got '" + hash + "'");
    filter = dense_rows(*words);
    job.filter = static_cast<const uint64_t*>(filter->const_data_ptr());
    job.filter_words = static_cast<uint64_t>(filter->numel());
    rare.resize(job.features + kSpare);
    for (int64_t f = 0; f < job.features; ++f)
      rare[f] = row_hash(job.keys[f], kRare);
    job.rare = rare.data();
  }

  void check_ids(const char* name, const Tensor& t, int64_t dim) {
    EXPECT(t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int,
           std::string(name) + ": expected int32 or int64, got " + type(t));
    EXPECT(t.dim() == dim,
           std::string(name) + ": expected " + str(dim) + " dimension" + (dim > 1 ? "s" : "") + ", got shape " + shape(t));
  }

  void one_id_each(Tensor t) {
    check_ids("ids", t, 2);
    EXPECT(t.size(1) == job.features,
           "ids: expected (B, " + str(job.features) + "), one column per feature, got " + shape(t));
    ids = t;
    // So that the tables of consecutive rows lie one after another wherever they begin; those of one example do already.
    const auto in_turn = [&](auto& places, const auto* values) {
      if (ids.size(0) <= 1) return values;
      places.resize(job.features + kTileBlocks + kSpare);
      std::copy_n(values, job.features, places.begin());
      for (size_t i = job.features; i < places.size(); ++i) places[i] = places[i - job.features];
      return static_cast<decltype(values)>(places.data());
    };
    job.keys = in_turn(keys_in_turn, job.keys);
    job.rows = in_turn(rows_in_turn, job.rows);
    if (job.filter) job.rare = in_turn(rare_in_turn, job.rare);
    job.mode = Mode::one;
    job.ids = ids.const_data_ptr();
    job.wide = ids.scalar_type() == ScalarType::Long;
    job.batch = ids.size(0);
    job.ids_stride = ids.stride(0);
    job.ids_feature_stride = ids.stride(1);
  }

  void bags(Tensor values, Tensor offs, std::optional<Tensor> weights, const std::string& mode) {
    check_ids("values", values, 1);
    check_ids("offsets", offs, 1);
    EXPECT(mode == "sum" || mode == "mean" || mode == "max",
           "mode: expected one of sum, mean, max, got '" + mode + "'");
    const int64_t entries = offs.numel();
    EXPECT(entries > 0 && (entries - 1) % job.features == 0, "offsets: expected (F * B + 1,) for F = " +
                                                                  str(job.features) + " features, got " + shape(offs));
    if (weights) {
      EXPECT(mode == "sum", "per_sample_weights: supported by mode 'sum' only, got mode '" + mode + "'");
      EXPECT(weights->dim() == 1 && weights->numel() == values.numel() &&
                 (weights->scalar_type() == weight.scalar_type() ||
                  (job.dtype == Dtype::int8 && weights->scalar_type() == ScalarType::Float)),
             "per_sample_weights: expected " + (job.dtype == Dtype::int8 ? "torch.float32" : type(weight)) + " " +
                 shape(values) + " as the weights and values, got " + type(*weights) + " " + shape(*weights));
      factors = *weights;
      job.factors = factors->const_data_ptr();
      job.factors_stride = factors->stride(0);
    }
    ids = values;
    job.mode = mode == "sum" ? Mode::sum : mode == "mean" ? Mode::mean : Mode::max;
    job.ids = ids.const_data_ptr();
    job.wide = ids.scalar_type() == ScalarType::Long;
    job.batch = (entries - 1) / job.features;
    job.ids_stride = ids.stride(0);
    bag_offsets.resize(entries);
    const bool wide = offs.scalar_type() == ScalarType::Long;
    const void* const data = offs.const_data_ptr();
    const int64_t stride = offs.stride(0);
    bool rising = true;
    for (int64_t k = 0; k < entries; ++k) {
      bag_offsets[k] = wide ? static_cast<const int64_t*>(data)[k * stride] : static_cast<const int32_t*>(data)[k * stride];
      rising &= k == 0 || bag_offsets[k] >= bag_offsets[k - 1];
    }
    EXPECT(rising && bag_offsets.front() == 0 && bag_offsets.back() <= values.numel(),
           "offsets: expected to rise from 0 to at most " + str(values.numel()) + ", the number of values, got " +
               str(bag_offsets.front()) + " ... " + str(bag_offsets.back()) + (rising ? "" : " and a fall between"));
    job.offsets = bag_offsets.data();
  }

  // The embeddings (B, F, D) or their gradient, or (B, F * D)-like slices of a larger tensor.
  void embeddings(const char* name, Tensor t, ScalarType expected) {
    EXPECT(t.dim() == 3 && t.size(0) == job.batch && t.size(1) == job.features && t.size(2) == job.dim,
           std::string(name) + ": expected shape (" + str(job.batch) + ", " + str(job.features) + ", " + str(job.dim) +
               "), got " + shape(t));
    EXPECT(t.scalar_type() == expected, std::string(name) + ": expected the dtype of the embeddings, got " + type(t));
    rows = t;
    job.rows_data = const_cast<void*>(rows.const_data_ptr());
    job.example_stride = rows.stride(0);
    job.feature_stride = rows.stride(1);
  }

  ScalarType out_type() const { return job.dtype == Dtype::int8 ? ScalarType::Float : weight.scalar_type(); }

  void new_embeddings() {
    const int64_t sizes[3] = {job.batch, job.features, job.dim};
    embeddings("out", new_tensor(sizes, out_type()), out_type());
  }

  void gradient(const Tensor& grad) {
    EXPECT(job.dtype != Dtype::int8, "weight: an int8 array has no gradient");
    const Tensor same = grad.scalar_type() == weight.scalar_type() ? grad : torch::stable::to(grad, weight.scalar_type());
    embeddings("grad", dense_rows(same), weight.scalar_type());
  }

  // Ids of bags begin .. end: about the work they make.
  int64_t values() const { return job.mode == Mode::one ? job.bags() : job.offsets[job.bags()]; }

  [[noreturn]] void outside() const {
    bool found = false;
    int64_t feature = 0, id = 0;
    const auto look = [&](int64_t f, int64_t position) {
      const int64_t x = job.wide ? static_cast<const int64_t*>(job.ids)[position] : static_cast<const int32_t*>(job.ids)[position];
      if (found || (job.padded && x == job.padding) || job.rows[f] == 0 || (x >= 0 && x < job.rows[f])) return;
      found = true, feature = f, id = x;
    };
    if (job.mode == Mode::one) {
      for (int64_t b = 0; b < job.batch; ++b)
        for (int64_t f = 0; f < job.features; ++f) look(f, b * job.ids_stride + f * job.ids_feature_stride);
    } else {
      for (int64_t k = 0; k < job.bags(); ++k)
        for (int64_t v = job.offsets[k]; v < job.offsets[k + 1]; ++v) look(k / job.batch, v * job.ids_stride);
    }
    throw std::out_of_range("index out of range: id " + str(id) + " of feature " + str(feature) + ", whose table has " +
                            str(job.rows[feature]) + " rows");
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Work for threads

// Cuts bags into parts of about as many values each, none below ``grain`` bytes of embeddings.
std::vector<int64_t> split(const Call& call, int64_t grain) {
  const Job& job = call.job;
  const int64_t bags = job.bags(), work = call.values() + (job.mode == Mode::one ? 0 : bags);
  const int64_t bytes = work * job.dim * static_cast<int64_t>(item_size(job.dtype));
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(bytes < 2 * grain ? 1 : torch::stable::get_num_threads(), bytes / grain));
  std::vector<int64_t> bounds(parts + 1);
  for (int64_t p = 1; p < parts; ++p) {
    const int64_t target = work / parts * p;
    if (job.mode == Mode::one) {
      bounds[p] = target;
      continue;
    }
    int64_t low = bounds[p - 1], high = bags;  // the first bag with that much work before it
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (job.offsets[middle] + middle < target) low = middle + 1;
      else high = middle;
    }
    bounds[p] = low;
  }
  bounds[parts] = bags;
  return bounds;
}

template <class Use>
void each_part(int64_t parts, Use use) {
  if (parts == 1) {
    use(0);
    return;
  }
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) use(p);
  });
}

constexpr int64_t kStreamBytes = 16 << 20;  // embeddings that no cache keeps until they are read
constexpr int64_t kAhead = 128;  // records to prefetch before their turn
constexpr int64_t kReadGrain = 32 << 10, kWriteGrain = 16 << 10;  // bytes of embeddings that are worth a thread

void read(Call& call) {
  Job& job = call.job;
  const int64_t item = static_cast<int64_t>(item_size(job.dtype));
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  job.stream = job.bags() * job.dim * item >= kStreamBytes && aligned(reinterpret_cast<intptr_t>(job.rows_data)) &&
               aligned(job.example_stride * item) && aligned(job.feature_stride * item);
  const auto bounds = split(call, kReadGrain);
  std::atomic<bool> inside{true};
  each_part(static_cast<int64_t>(bounds.size()) - 1, [&](int64_t p) {
    if (bounds[p] < bounds[p + 1] && !kernels->read(job, bounds[p], bounds[p + 1])) inside = false;
#if defined(__x86_64__)
    _mm_sfence();  // streamed stores are ordered before whatever comes next
#endif
  });
  if (!inside) call.outside();
}

// Sorts the gradients of calls by the segment of the array they go to, each segment's in the order of the calls and of
// their ids; then use(segments, segment, scratch) once for each segment, on any thread. A slot's gradients are so summed
// in the order of the ids, whatever the number of threads. weight and state are what use will write, or null.
template <class Use>
void by_segment(const std::vector<std::unique_ptr<Call>>& calls, const void* weight, void* const* state, Use use) {
  const Call& front = *calls.front();
  const int64_t slots = front.weight.numel();
  int shift = 12;  // 16 kB of float32: sums stay in the first cache
  while (shift > 8 && slots >> shift < 64) --shift;
  while (shift < 15 && slots >> shift > 16384) ++shift;
  const int64_t segments = (slots + (int64_t{1} << shift) - 1) >> shift;

  struct Part {
    const Call* call;
    int64_t begin, end;
  };
  std::vector<Part> parts;
  for (const auto& call : calls) {
    const auto bounds = split(*call, kWriteGrain);
    for (size_t p = 0; p + 1 < bounds.size(); ++p)
      if (bounds[p] < bounds[p + 1]) parts.push_back({call.get(), bounds[p], bounds[p + 1]});
  }
  const int64_t n = static_cast<int64_t>(parts.size());
  std::vector<std::vector<int64_t>> cursors(n);
  std::atomic<int64_t> outside{n};
  each_part(n, [&](int64_t p) {
    cursors[p].assign(segments, 0);
    if (!kernels->count(parts[p].call->job, parts[p].begin, parts[p].end, shift, cursors[p].data())) {
      int64_t first = outside;
      while (p < first && !outside.compare_exchange_weak(first, p)) {}
    }
  });
  if (outside < n) parts[outside].call->outside();
  std::vector<int64_t> ends(segments);
  int64_t total = 0;
  for (int64_t s = 0; s < segments; ++s) {
    for (auto& cursor : cursors) {
      const int64_t here = cursor[s];
      cursor[s] = total;
      total += here;
    }
    ends[s] = total;
  }
  const bool wide = front.job.dtype == Dtype::float64;
  const size_t record = wide ? sizeof(Record<double, double>) : sizeof(Record<float, float>);
  const std::unique_ptr<char[]> records(new char[total * record]);
  each_part(n, [&](int64_t p) {
    kernels->fill(parts[p].call->job, parts[p].begin, parts[p].end, shift, records.get(), cursors[p].data());
  });

  const Segments sorted{records.get(), ends.data(), shift, slots};
  std::atomic<int64_t> next{0};
  const int64_t workers = n == 1 ? 1 : std::min<int64_t>(torch::stable::get_num_threads(), segments);
  each_part(workers, [&](int64_t) {
    const size_t size = size_t{1} << shift;
    const std::unique_ptr<char[]> scratch(new char[size * (wide ? 8 : 4) + size / 8]());
    constexpr int64_t some = 16;  // hot ids make segments uneven, so threads take a few at a time
    for (int64_t s = next.fetch_add(some); s < segments; s = next.fetch_add(some)) {
      const int64_t end = std::min(s + some, segments);
      int64_t ahead = s;  // the first segment that was not prefetched yet
      for (int64_t segment = s; segment < end; ++segment) {
        for (; ahead < end && (ahead <= segment + 1 || ends[ahead - 1] - ends[segment] < kAhead); ++ahead)
          kernels->prefetch(front.job.dtype, sorted, ahead, weight, state);
        use(sorted, segment, scratch.get());
      }
    }
  });
}

Tensor dense_gradient(std::unique_ptr<Call> call) {
  const int64_t sizes[1] = {call->weight.numel()};
  Tensor out = new_tensor(sizes, call->weight.scalar_type());
  void* const data = out.mutable_data_ptr();
  const Dtype dtype = call->job.dtype;
  std::vector<std::unique_ptr<Call>> calls;
  calls.push_back(std::move(call));
  by_segment(calls, nullptr, nullptr, [&](const Segments& segments, int64_t segment, void* scratch) {
    kernels->gradient(dtype, segments, segment, scratch, data);
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Operators: schemas in robe/ops.py

// What follows the arguments of the tables: scale and filter, between them the tensor to write into, or filter alone.
enum class Kind { forward, out, backward };

struct Rest {
  std::optional<Tensor> scale, out, filter;

  Rest(Arguments& in, Kind kind) {
    if (kind != Kind::backward) scale = in.maybe_tensor();
    if (kind == Kind::out) out = in.tensor();
    filter = in.maybe_tensor();
  }
};

// The arguments from weight on; all are taken before any is checked, so that none leaks.
std::optional<Tensor> lookup_arguments(Call& call, Arguments& in, Kind kind) {
  Tensor weight = in.tensor(), ids = in.tensor();
  call.tables(in);
  Rest rest(in, kind);
  call.array(std::move(weight), std::move(rest.scale));
  call.layout();
  call.admission(std::move(rest.filter));
  call.one_id_each(std::move(ids));
  return std::move(rest.out);
}

std::optional<Tensor> bag_arguments(Call& call, Arguments& in, Kind kind) {
  Tensor weight = in.tensor(), values = in.tensor(), offsets = in.tensor();
  std::optional<Tensor> factors = in.maybe_tensor();
  const std::string mode = in.text();
  call.tables(in);
  Rest rest(in, kind);
  call.array(std::move(weight), std::move(rest.scale));
  call.layout();
  call.admission(std::move(rest.filter));
  call.bags(std::move(values), std::move(offsets), std::move(factors), mode);
  return std::move(rest.out);
}

using ReadArguments = std::optional<Tensor> (*)(Call&, Arguments&, Kind);

template <ReadArguments arguments>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  arguments(call, in, Kind::forward);
  call.new_embeddings();
  read(call);
  stack[0] = from(call.rows);
}

template <ReadArguments arguments>
void forward_out(StableIValue* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  const Tensor out = *arguments(call, in, Kind::out);
  EXPECT(call.job.dim == 1 || out.dim() != 3 || out.stride(2) == 1, "out: expected its last dimension to be contiguous");
  call.embeddings("out", out, call.out_type());
  read(call);
}

template <ReadArguments arguments>
void backward(StableIValue* stack, uint64_t, uint64_t) {
  auto call = std::make_unique<Call>();
  Arguments in{stack};
  const Tensor grad = in.tensor();
  arguments(*call, in, Kind::backward);
  call->gradient(grad);
  stack[0] = from(dense_gradient(std::move(call)));
}

void bag_weights_backward(StableIValue* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  const Tensor grad = in.tensor();
  bag_arguments(call, in, Kind::backward);
  call.gradient(grad);
  const int64_t sizes[1] = {call.ids.numel()};
  Tensor out = new_tensor(sizes, call.weight.scalar_type());
  void* const data = out.mutable_data_ptr();
  std::memset(static_cast<char*>(data) + call.values() * item_size(call.job.dtype), 0,
              (call.ids.numel() - call.values()) * item_size(call.job.dtype));
  const auto bounds = split(call, kReadGrain);
  std::atomic<bool> inside{true};
  each_part(static_cast<int64_t>(bounds.size()) - 1, [&](int64_t p) {
    if (bounds[p] < bounds[p + 1] && !kernels->factor_grad(call.job, bounds[p], bounds[p + 1], data)) inside = false;
  });
  if (!inside) call.outside();
  stack[0] = from(out);
}

// update_: the gradients of any number of lookups and bags on one array, and the rule applied to the slots they touch.
void update(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor weight = in.tensor();
  const auto state = in.list<Tensor>();
  const std::string rule = in.text();
  const auto options = in.list<double>();
  const auto grads = in.list<Tensor>(), ids = in.list<Tensor>(), offsets = in.list<Tensor>();
  const auto factors = in.list<Tensor>(), table_keys = in.list<Tensor>(), num_embeddings = in.list<Tensor>();
  const auto filters = in.list<Tensor>();
  const auto layouts = in.list<int64_t>();

  static const char* const hashes[] = {"mix", "linear", "identity"};
  static const char* const modes[] = {"one", "sum", "mean", "max"};
  constexpr size_t entries = 7;  // of layouts, for each call
  EXPECT(weight.is_contiguous(), "weight: expected contiguous");
  for (const Tensor& s : state)
    EXPECT(s.is_contiguous() && s.numel() == weight.numel() && s.scalar_type() == weight.scalar_type(),
           "state: expected tensors like weight");
  EXPECT(layouts.size() == entries * grads.size(), "layouts: expected 7 entries for each gradient");
  std::vector<std::unique_ptr<Call>> calls;
  for (size_t k = 0; k < grads.size(); ++k) {
    const int64_t* const layout = &layouts[entries * k];
    EXPECT(layout[0] >= 0 && layout[0] < 4 && layout[3] >= 0 && layout[3] < 3, "layouts: unknown mode or hash");
    auto call = std::make_unique<Call>();
    call->array(weight, std::nullopt);
    call->table_keys = table_keys[k];
    call->num_embeddings = num_embeddings[k];
    call->job.dim = layout[1];
    call->job.block = layout[2];
    call->hash = hashes[layout[3]];
    call->job.sign = layout[4];
    if (layout[5]) call->padding = layout[6];
    call->layout();
    if (filters[k].numel()) call->admission(filters[k]);
    if (layout[0] == 0) {
      call->one_id_each(ids[k]);
    } else {
      const bool weighted = factors[k].numel() > 0 || ids[k].numel() == 0;
      call->bags(ids[k], offsets[k], weighted && layout[0] == 1 ? std::optional<Tensor>(factors[k]) : std::nullopt,
                 modes[layout[0]]);
    }
    call->gradient(grads[k]);
    if (call->values()) calls.push_back(std::move(call));
  }
  Update applied{};
  EXPECT(rule == "sgd" || rule == "adagrad" || rule == "adam", "rule: expected one of sgd, adagrad, adam, got '" + rule + "'");
  applied.rule = rule == "sgd" ? Rule::sgd : rule == "adagrad" ? Rule::adagrad : Rule::adam;
  EXPECT(options.size() == 5, "options: expected 5");
  std::copy(options.begin(), options.end(), applied.options);
  const size_t needed = applied.rule == Rule::adam ? 2 : applied.rule == Rule::adagrad || options[2] != 0 ? 1 : 0;
  EXPECT(state.size() >= needed && state.size() <= 2, "state: expected " + str(needed) + " tensors for " + rule);
  for (size_t i = 0; i < state.size(); ++i) applied.state[i] = state[i].mutable_data_ptr();
  void* const data = weight.mutable_data_ptr();
  if (calls.empty()) return;
  const Dtype dtype = calls.front()->job.dtype;
  by_segment(calls, data, applied.state, [&](const Segments& segments, int64_t segment, void* scratch) {
    kernels->update(dtype, segments, segment, scratch, data, applied);
  });
}

// dot_interaction(dense, embeddings) and its backward(grad, dense, embeddings).
struct InteractionCall {
  Tensor dense, embeddings, out;
  ScalarType type;
  Interaction x{};

  static Tensor wide(const Tensor& t, bool keep) {
    return dense_rows(keep || t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float));
  }

  InteractionCall(const Tensor& d, const Tensor& e) : type(d.scalar_type()) {
    EXPECT(d.dim() == 2 && e.dim() == 3 && d.size(0) == e.size(0) && d.size(1) == e.size(2),
           "dense and embeddings: expected (B, D) and (B, F, D), got " + shape(d) + " and " + shape(e));
    EXPECT(type == e.scalar_type() && (type == ScalarType::Float || type == ScalarType::Double ||
                                       type == ScalarType::BFloat16 || type == ScalarType::Half),
           "dense and embeddings: expected one floating-point dtype, got " + robe::type(d) + " and " + robe::type(e));
    x.wide = type == ScalarType::Double;
    dense = wide(d, x.wide);
    embeddings = wide(e, x.wide);
    x.batch = e.size(0), x.features = e.size(1), x.dim = e.size(2);
    x.dense = dense.const_data_ptr(), x.rows = embeddings.const_data_ptr();
    x.dense_stride = dense.stride(0), x.example_stride = embeddings.stride(0);
    x.feature_stride = embeddings.stride(1);
  }

  ScalarType computed() const { return x.wide ? ScalarType::Double : ScalarType::Float; }
  int64_t width() const { return x.dim + (x.features + 1) * x.features / 2; }
  Tensor narrow(const Tensor& t) const { return type == computed() ? t : torch::stable::to(t, type); }

  void run(void (*kernel)(const Interaction&, int64_t, int64_t)) {
    constexpr int64_t products = 1 << 17;  // multiplications that are worth a thread
    const int64_t each = width() * x.dim;
    torch::stable::parallel_for(0, x.batch, std::max<int64_t>(1, products / std::max<int64_t>(each, 1)),
                                [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  }
};

void dot_interaction(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor dense = in.tensor(), embeddings = in.tensor();
  InteractionCall call(dense, embeddings);
  const int64_t sizes[2] = {call.x.batch, call.width()};
  call.out = new_tensor(sizes, call.computed());
  call.x.out = call.out.mutable_data_ptr();
  call.x.out_stride = sizes[1];
  call.run(kernels->interact);
  stack[0] = from(call.narrow(call.out));
}

void dot_interaction_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor grad = in.tensor(), dense = in.tensor(), embeddings = in.tensor();
  InteractionCall call(dense, embeddings);
  EXPECT(grad.dim() == 2 && grad.size(0) == call.x.batch && grad.size(1) == call.width(),
         "grad: expected shape (" + str(call.x.batch) + ", " + str(call.width()) + "), got " + shape(grad));
  call.out = dense_rows(grad.scalar_type() == call.computed() ? grad : torch::stable::to(grad, call.computed()));
  call.x.out = const_cast<void*>(call.out.const_data_ptr());
  call.x.out_stride = call.out.stride(0);
  const int64_t sizes[3] = {call.x.batch, call.x.features, call.x.dim}, dense_sizes[2] = {call.x.batch, call.x.dim};
  Tensor dense_grad = new_tensor(dense_sizes, call.computed());
  Tensor rows_grad = new_tensor(sizes, call.computed());
  call.x.dense_grad = dense_grad.mutable_data_ptr();
  call.x.rows_grad = rows_grad.mutable_data_ptr();
  call.run(kernels->interact_grad);
  stack[0] = from(call.narrow(dense_grad));
  stack[1] = from(call.narrow(rows_grad));
}

// mlp(x, weights, biases, width, relu_last): see robe/ops.py.
void mlp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor given = in.tensor();
  const auto weights = in.list<Tensor>(), biases = in.list<Tensor>();
  Mlp x{};
  x.width = in.integer();
  const bool relu_last = in.boolean();
  EXPECT(given.dim() == 2 && given.scalar_type() == ScalarType::Float,
         "x: expected a float32 matrix (B, fan_in), got " + type(given) + " " + shape(given));
  const Tensor input = dense_rows(given);
  EXPECT(!weights.empty() && weights.size() == biases.size(), "weights and biases: expected one of each for each layer");
  std::vector<Layer> layers(weights.size());
  int64_t before = input.size(1), products = 0;  // outputs of the layer before
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &w = weights[i], &b = biases[i];
    EXPECT(w.dim() == 3 && w.size(2) == kPanel && w.scalar_type() == ScalarType::Float && w.is_contiguous() &&
               (i ? w.size(1) <= before : w.size(1) == before),
           "weights: expected contiguous float32 (panels, " + str(before) + ", " + str(kPanel) + "), got " + type(w) + " " +
               shape(w));
    EXPECT(b.dim() == 1 && b.numel() == w.size(0) * kPanel && b.scalar_type() == ScalarType::Float && b.is_contiguous(),
           "biases: expected contiguous float32 (" + str(w.size(0) * kPanel) + ",), got " + type(b) + " " + shape(b));
    layers[i] = {static_cast<const float*>(w.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()), w.size(1),
                 w.size(0), i + 1 < weights.size() || relu_last};
    before = b.numel();
    products += w.numel();
  }
  EXPECT(x.width >= 1 && x.width <= before, "width: expected 1 to " + str(before) + ", got " + str(x.width));
  x.layer = layers.data();
  x.layers = static_cast<int64_t>(layers.size());
  x.rows = input.size(0);
  x.in = static_cast<const float*>(input.const_data_ptr());
  x.in_stride = input.stride(0);
  const int64_t sizes[2] = {x.rows, x.width};
  Tensor out = new_tensor(sizes, ScalarType::Float);
  x.out = static_cast<float*>(out.mutable_data_ptr());
  constexpr int64_t worth = 1 << 20;  // multiplications that are worth a thread
  torch::stable::parallel_for(0, x.rows, std::max<int64_t>(1, worth / std::max<int64_t>(1, products)),
                              [&](int64_t begin, int64_t end) { kernels->mlp(x, begin, end); });
  stack[0] = from(out);
}

// Counting (robe/admission.py). The checks and their order are those in robe/ops.py.
int32_t* counters_of(const char* name, const Tensor& t) {
  EXPECT(t.dim() == 2 && t.size(0) == kDepth && t.size(1) > 0 && t.scalar_type() == ScalarType::Int && t.is_contiguous(),
         std::string(name) + ": expected contiguous int32 (4, W), got " + type(t) + " " + shape(t));
  return static_cast<int32_t*>(t.mutable_data_ptr());
}

std::vector<int64_t> broadcast_strides(const char* name, const Tensor& t, ScalarType expected, const Tensor& ids) {
  bool fits = t.scalar_type() == expected && t.dim() <= ids.dim();
  std::vector<int64_t> strides(std::max<int64_t>(ids.dim(), 1), 0);
  for (int64_t d = 1; fits && d <= t.dim(); ++d) {
    const int64_t size = t.size(t.dim() - d);
    fits = size == 1 || size == ids.size(ids.dim() - d);
    if (size > 1) strides[strides.size() - d] = t.stride(t.dim() - d);
  }
  EXPECT(fits, std::string(name) + (expected == ScalarType::Bool ? ": expected torch.bool" : ": expected torch.int64") +
                   ", broadcastable to ids " + shape(ids) + ", got " + type(t) + " " + shape(t));
  return strides;
}

Ids ids_of(const Tensor& ids, const Tensor& keys) {
  const ScalarType of_ids = ids.scalar_type();
  EXPECT(of_ids == ScalarType::Long || of_ids == ScalarType::Int, "ids: expected int32 or int64, got " + type(ids));
  Ids x{};
  x.wide = of_ids == ScalarType::Long;
  x.ids_strides = broadcast_strides("ids", ids, of_ids, ids);
  x.keys_strides = broadcast_strides("keys", keys, ScalarType::Long, ids);
  x.labels_strides.assign(x.ids_strides.size(), 0);
  for (int64_t d = 0; d < ids.dim(); ++d) x.sizes.push_back(ids.size(d));
  if (x.sizes.empty()) x.sizes.push_back(1);
  x.ids = ids.const_data_ptr();
  x.keys = static_cast<const int64_t*>(keys.const_data_ptr());
  return x;
}

void count_ids(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), ids = in.tensor(), keys = in.tensor();
  const auto clicks = in.maybe_tensor(), labels = in.maybe_tensor();
  int32_t* const of_all = counters_of("counters", counters);
  Ids x = ids_of(ids, keys);
  EXPECT(clicks.has_value() == labels.has_value(), "clicks and labels: expected both or neither");
  int32_t* of_clicks = nullptr;
  if (clicks) {
    of_clicks = counters_of("clicks", *clicks);
    EXPECT(clicks->size(1) == counters.size(1), "clicks: expected the shape of counters, " + shape(counters) + ", got " +
                                                    shape(*clicks));
    x.labels_strides = broadcast_strides("labels", *labels, ScalarType::Bool, ids);
    x.labels = static_cast<const bool*>(labels->const_data_ptr());
  }
  robe::count_ids(of_all, of_clicks, counters.size(1), x);
}

void id_counts(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), given = in.tensor();
  const int32_t* const from_counters = counters_of("counters", counters);
  EXPECT(given.dim() == 1 && given.scalar_type() == ScalarType::Long,
         "rows: expected an int64 vector (n,), got " + type(given) + " " + shape(given));
  const Tensor rows = dense_rows(given);
  const int64_t sizes[1] = {rows.numel()};
  Tensor out = new_tensor(sizes, ScalarType::Long);
  robe::id_counts(from_counters, counters.size(1), static_cast<const int64_t*>(rows.const_data_ptr()), rows.numel(),
            static_cast<int64_t*>(out.mutable_data_ptr()));
  stack[0] = from(out);
}

Tensor vector_of(const std::vector<int64_t>& values) {
  const int64_t sizes[1] = {static_cast<int64_t>(values.size())};
  Tensor out = new_tensor(sizes, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

void frequent_rows(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), ids = in.tensor(), keys = in.tensor();
  const int64_t times = in.integer();
  const Tensor recent = in.tensor();
  const int32_t* const from_counters = counters_of("counters", counters);
  const Ids x = ids_of(ids, keys);
  EXPECT(recent.dim() == 1 && recent.numel() > 1 && recent.scalar_type() == ScalarType::Long && recent.is_contiguous(),
         "recent: expected a contiguous int64 vector of 2 or more, got " + type(recent) + " " + shape(recent));
  stack[0] = from(vector_of(robe::frequent_rows(from_counters, counters.size(1), x, times,
                                          static_cast<int64_t*>(recent.mutable_data_ptr()), recent.numel())));
}

void observe_ids(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), ids = in.tensor(), keys = in.tensor(), words = in.tensor();
  const int64_t threshold = in.integer();
  int32_t* const of_all = counters_of("counters", counters);
  const Ids x = ids_of(ids, keys);
  EXPECT(words.dim() == 1 && words.scalar_type() == ScalarType::Long && words.numel() > 0,
         "filter: expected an int64 vector (W,), got " + type(words) + " " + shape(words));
  const Tensor filter = dense_rows(words);
  stack[0] = from(vector_of(robe::observe_ids(of_all, counters.size(1), static_cast<const uint64_t*>(filter.const_data_ptr()),
                                        static_cast<uint64_t>(filter.numel()), x, threshold)));
}

STABLE_TORCH_LIBRARY_IMPL(robe, CPU, m) {
  m.impl("count_ids_", &count_ids);
  m.impl("id_counts", &id_counts);
  m.impl("frequent_rows_", &frequent_rows);
  m.impl("observe_ids_", &observe_ids);
  m.impl("mlp", &mlp);
  m.impl("dot_interaction", &dot_interaction);
  m.impl("dot_interaction_backward", &dot_interaction_backward);
  m.impl("lookup", &forward<lookup_arguments>);
  m.impl("lookup_forward", &forward<lookup_arguments>);
  m.impl("lookup_out", &forward_out<lookup_arguments>);
  m.impl("lookup_backward", &backward<lookup_arguments>);
  m.impl("bag", &forward<bag_arguments>);
  m.impl("bag_forward", &forward<bag_arguments>);
  m.impl("bag_out", &forward_out<bag_arguments>);
  m.impl("bag_backward", &backward<bag_arguments>);
  m.impl("bag_weights_backward", &bag_weights_backward);
  m.impl("update_", &update);
}

}  // namespace
}  // namespace robe

extern "C" {

// The instruction set in use.
const char* robe_isa() { return robe::kernels->name; }

// Use another instruction set, by name; false where this machine lacks it. For tests and measurements.
bool robe_set_isa(const char* name) {
  for (const robe::Kernels* each : robe::usable())
    if (!std::strcmp(each->name, name)) {
      robe::kernels = each;
      return true;
    }
  return false;
}
}
