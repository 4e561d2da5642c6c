// The kernels for CPUs: operators of robe/ops/schema.py, registered with torch.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernel_set.h"
#define ROBE_KERNELS_OF_A_SET "kernels.h"
#include "instruction_sets.h"

#include "counting_operators.h"
#include "segments.h"

namespace robe {
namespace {

constexpr int64_t kStreamBytes = 16 << 20;  // embeddings that no cache keeps until they are read
constexpr int64_t kReadGrain = 32 << 10;    // bytes of embeddings that are worth a thread

void read(Call& call) {
  Job& job = call.job;
  const int64_t item = static_cast<int64_t>(item_size(job.dtype));
  const auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  job.stream = job.bags() * job.dim * item >= kStreamBytes && aligned(reinterpret_cast<intptr_t>(job.embeddings)) &&
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
  std::optional<Tensor> per_sample_weights = in.maybe_tensor();
  const std::string pooling = in.text();
  call.tables(in);
  Rest rest(in, kind);
  call.array(std::move(weight), std::move(rest.scale));
  call.layout();
  call.admission(std::move(rest.filter));
  call.bags(std::move(values), std::move(offsets), std::move(per_sample_weights), pooling);
  return std::move(rest.out);
}

using ReadArguments = std::optional<Tensor> (*)(Call&, Arguments&, Kind);

template <ReadArguments arguments>
void forward(Value* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  arguments(call, in, Kind::forward);
  call.new_embeddings();
  read(call);
  stack[0] = value_of(call.embeddings);
}

template <ReadArguments arguments>
void forward_out(Value* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  const Tensor out = *arguments(call, in, Kind::out);
  call.set_out(out);
  read(call);
}

template <ReadArguments arguments>
void backward(Value* stack, uint64_t, uint64_t) {
  auto call = std::make_unique<Call>();
  Arguments in{stack};
  const Tensor grad = in.tensor();
  arguments(*call, in, Kind::backward);
  call->gradient(grad);
  stack[0] = value_of(dense_gradient(std::move(call)));
}

void bag_weights_backward(Value* stack, uint64_t, uint64_t) {
  Call call;
  Arguments in{stack};
  const Tensor grad = in.tensor();
  bag_arguments(call, in, Kind::backward);
  EXPECT(call.per_sample_weights.has_value(), "per_sample_weights: expected a tensor, got None");
  call.gradient(grad);
  const int64_t sizes[1] = {call.ids.numel()};
  Tensor out = new_tensor(sizes, call.weight.scalar_type());
  void* const data = out.mutable_data_ptr();
  const int64_t used = call.values(), item = static_cast<int64_t>(item_size(call.job.dtype));
  if (used < sizes[0]) std::memset(static_cast<char*>(data) + used * item, 0, (sizes[0] - used) * item);
  const auto bounds = split(call, kReadGrain);
  std::atomic<bool> inside{true};
  each_part(static_cast<int64_t>(bounds.size()) - 1, [&](int64_t p) {
    if (bounds[p] < bounds[p + 1] && !kernels->weights_gradient(call.job, bounds[p], bounds[p + 1], data)) inside = false;
  });
  if (!inside) call.outside();
  stack[0] = value_of(out);
}

// The integers of a call of update_, in the order of LayoutCode in robe/ops/layout.py. pooling is that of Pooling.
struct LayoutCode {
  int64_t pooling, embedding_dim, block_size, hash, sign, is_padded, padding_idx;
};

std::vector<LayoutCode> unpack_layouts(const std::vector<int64_t>& numbers, size_t calls) {
  constexpr size_t entries = sizeof(LayoutCode) / sizeof(int64_t);
  EXPECT(numbers.size() == entries * calls, "layouts: expected " + str(entries) + " entries for each gradient, " +
                                                str(entries * calls) + ", got " + str(numbers.size()));
  std::vector<LayoutCode> layouts(calls);
  if (calls) std::memcpy(layouts.data(), numbers.data(), numbers.size() * sizeof(int64_t));
  for (const LayoutCode& layout : layouts)
    EXPECT(layout.pooling >= 0 && layout.pooling <= int64_t(std::size(kPoolings)) && layout.hash >= 0 &&
               layout.hash < int64_t(std::size(kHashes)),
           "layouts: unknown pooling or hash");
  return layouts;
}

// The gradients of any number of lookups and bags on one array, as update_ and sum_gradients take them. All lists are taken
// from the stack before any is checked, so that none leaks.
struct Gradients {
  std::vector<Tensor> grads, ids, offsets, per_sample_weights, table_keys, num_embeddings, filters;
  std::vector<int64_t> layouts;

  explicit Gradients(Arguments& in)
      : grads(in.list<Tensor>()), ids(in.list<Tensor>()), offsets(in.list<Tensor>()),
        per_sample_weights(in.list<Tensor>()), table_keys(in.list<Tensor>()), num_embeddings(in.list<Tensor>()),
        filters(in.list<Tensor>()), layouts(in.list<int64_t>()) {}

  // One call for each gradient of some ids.
  std::vector<std::unique_ptr<Call>> calls(const Tensor& weight) const {
    const std::pair<const char*, size_t> lengths[] = {
        {"ids", ids.size()},
        {"offsets", offsets.size()},
        {"per_sample_weights", per_sample_weights.size()},
        {"table_keys", table_keys.size()},
        {"num_embeddings", num_embeddings.size()},
        {"filters", filters.size()}};
    for (const auto& [name, length] : lengths)
      EXPECT(length == grads.size(),
             std::string(name) + ": expected one for each gradient, " + str(grads.size()) + ", got " + str(length));
    const auto codes = unpack_layouts(layouts, grads.size());
    std::vector<std::unique_ptr<Call>> calls;
    for (size_t k = 0; k < grads.size(); ++k) {
      auto call = one(weight, codes[k], k);
      if (call->values()) calls.push_back(std::move(call));
    }
    return calls;
  }

 private:
  std::unique_ptr<Call> one(const Tensor& weight, const LayoutCode& layout, size_t k) const {
    auto call = std::make_unique<Call>();
    call->array(weight, std::nullopt);
    call->table_keys = table_keys[k];
    call->num_embeddings = num_embeddings[k];
    call->job.dim = layout.embedding_dim;
    call->job.block = layout.block_size;
    call->hash = kHashes[layout.hash];
    call->job.sign = layout.sign;
    if (layout.is_padded) call->padding = layout.padding_idx;
    call->layout();
    if (filters[k].numel()) call->admission(filters[k]);
    const auto pooling = static_cast<Pooling>(layout.pooling);
    if (pooling == Pooling::none) {
      call->one_id_each(ids[k]);
    } else {
      const bool weighted = per_sample_weights[k].numel() > 0 || ids[k].numel() == 0;
      auto weights = weighted && pooling == Pooling::sum ? std::optional<Tensor>(per_sample_weights[k]) : std::nullopt;
      call->bags(ids[k], offsets[k], std::move(weights), kPoolings[layout.pooling - 1]);
    }
    call->gradient(grads[k]);
    return call;
  }
};

Dtype dtype_of_gradient(const Tensor& weight) {
  const Dtype dtype = dtype_of(weight);
  EXPECT(dtype != Dtype::int8 && weight.dim() == 1,
         "weight: expected a floating-point vector (m,), got " + type(weight) + " " + shape(weight));
  return dtype;
}

// update_: the rule applied to the slots that gradients touch.
void update(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor weight = in.tensor();
  const auto state = in.list<Tensor>();
  const std::string rule = in.text();
  const auto options = in.list<double>();
  const Gradients gradients(in);

  Update applied{};
  applied.rule = static_cast<Rule>(place_of("rule", rule, kRules));
  EXPECT(options.size() == 5, "options: expected 5, got " + str(options.size()));
  for (const double option : options) EXPECT(std::isfinite(option), "options: expected finite numbers");
  std::copy(options.begin(), options.end(), applied.options);
  const Dtype dtype = dtype_of_gradient(weight);
  EXPECT(weight.is_contiguous(), "weight: expected contiguous");
  const size_t needed = applied.states();
  EXPECT(state.size() >= needed && state.size() <= 2,
         "state: expected " + str(needed) + " tensors for " + rule + ", got " + str(state.size()));
  for (const Tensor& s : state) {
    EXPECT(s.is_contiguous() && s.dim() == 1 && s.numel() == weight.numel() && s.scalar_type() == weight.scalar_type(),
           "state: expected tensors like weight");
    apart("state", extent(s), "weight", weight);
  }
  if (state.size() == 2) apart("state", extent(state[0]), "the other state", state[1]);
  const auto calls = gradients.calls(weight);
  for (const Tensor& grad : gradients.grads) {
    apart("weight", extent(weight), "grads", grad);
    for (const Tensor& s : state) apart("state", extent(s), "grads", grad);
  }
  for (size_t i = 0; i < state.size(); ++i) applied.state[i] = state[i].mutable_data_ptr();
  void* const data = weight.mutable_data_ptr();
  if (calls.empty()) return;
  by_segment(calls, data, applied.state, [&](const Segments& segments, int64_t segment, void* scratch) {
    kernels->update(dtype, segments, segment, scratch, data, applied);
  });
}

// sum_gradients: the slots that gradients touch, rising, and the sum that each gets.
void sum_gradients(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor weight = in.tensor();
  const Gradients gradients(in);
  const Dtype dtype = dtype_of_gradient(weight);
  const auto calls = gradients.calls(weight);
  const bool wide = dtype == Dtype::float64;
  const size_t item = wide ? sizeof(double) : sizeof(float);

  struct Found {
    std::vector<int64_t> slots;
    std::vector<char> values;
  };
  std::vector<Found> found;
  if (!calls.empty()) {
    found.resize(segments_of(weight.numel()).count);
    by_segment(calls, nullptr, nullptr, [&](const Segments& segments, int64_t segment, void* scratch) {
      const size_t begin = segment ? segments.ends[segment - 1] : 0;
      if (begin == static_cast<size_t>(segments.ends[segment])) return;
      Found& here = found[segment];
      here.slots.resize(size_t{1} << segments.shift);
      here.values.resize(here.slots.size() * item);
      const int64_t n = kernels->sums(dtype, segments, segment, scratch, here.slots.data(), here.values.data());
      here.slots.resize(n);
      here.slots.shrink_to_fit();
      here.values.resize(n * item);
      here.values.shrink_to_fit();
    });
  }
  int64_t sizes[1] = {0};
  for (const Found& f : found) sizes[0] += static_cast<int64_t>(f.slots.size());
  Tensor slots = new_tensor(sizes, ScalarType::Long), values = new_tensor(sizes, wide ? ScalarType::Double : ScalarType::Float);
  if (sizes[0]) {
    int64_t* slot = static_cast<int64_t*>(slots.mutable_data_ptr());
    char* value = static_cast<char*>(values.mutable_data_ptr());
    for (const Found& f : found) {
      slot = std::copy(f.slots.begin(), f.slots.end(), slot);
      value = std::copy(f.values.begin(), f.values.end(), value);
    }
  }
  stack[0] = value_of(slots);
  stack[1] = value_of(values);
}

const Registration registration(
    "robe", {
        {"count_ids_", &count_ids},
        {"id_counts", &id_counts},
        {"frequent_rows_", &frequent_rows},
        {"observe_ids_", &observe_ids},
        {"lookup", &forward<lookup_arguments>},
        {"lookup_forward", &forward<lookup_arguments>},
        {"lookup_out", &forward_out<lookup_arguments>},
        {"lookup_backward", &backward<lookup_arguments>},
        {"bag", &forward<bag_arguments>},
        {"bag_forward", &forward<bag_arguments>},
        {"bag_out", &forward_out<bag_arguments>},
        {"bag_backward", &backward<bag_arguments>},
        {"bag_weights_backward", &bag_weights_backward},
        {"update_", &update},
        {"sum_gradients", &sum_gradients},
    });

}  // namespace
}  // namespace robe

// What kernels->read is, for other libraries of kernels: they are built with this one, from the same headers.
extern "C" ROBE_EXPORT bool robe_read(const robe::Job* job, int64_t begin, int64_t end) {
  return robe::kernels->read(*job, begin, end);
}
