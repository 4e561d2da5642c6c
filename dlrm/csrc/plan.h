// A model's forward pass as one call. A plan is made once: its weights are checked then, and kept. A call brings rows.
//
// A thread takes some rows through all stages before the next ones, so that what lies between the stages stays in the
// second-level cache, and threads meet once.

#pragma once

#include <atomic>
#include <cmath>
#include <map>
#include <mutex>

#include "call.h"
#include "chain.h"

namespace robe {
namespace {

bool (*read_embeddings)(const Job*, int64_t begin, int64_t end) = nullptr;  // of the other library

constexpr int64_t kRowsAtOnce = 2 * kRowsTogether;

// The rows of a call: dense features, and ids (in a Job) or embeddings.
struct Input {
  const float* dense;
  int64_t dense_stride;
  const float* embeddings = nullptr;  // or null: they are to be read
  int64_t example_stride = 0, feature_stride = 0;
};

struct Plan {
  Call lookup;                // without ids
  std::vector<Chain> chains;  // the bottom MLP, the top MLP; V and W of each layer of a cross net, or none: dot products

  const Chain& bottom() const { return chains[0]; }
  const Chain& top() const { return chains[1]; }
  bool is_crossed() const { return chains.size() > 2; }
  int64_t features() const { return lookup.job.features; }
  int64_t dim() const { return lookup.job.dim; }
  int64_t interactions() const {
    return is_crossed() ? (features() + 1) * dim() : dim() + (features() + 1) * features() / 2;
  }

  // The layers of all chains, one after the other; of each chain its width and the number of its layers.
  void take_chains(const Layers& all, const std::vector<int64_t>& widths, const std::vector<int64_t>& layers) {
    EXPECT(layers.size() >= 2 && layers.size() % 2 == 0 && widths.size() == layers.size(),
           "widths and layers: expected entries for bottom, top, and V and W of each layer of a cross");
    size_t begin = 0;
    const size_t count = all.count();
    for (size_t c = 0; c < layers.size(); ++c) {
      const int64_t left = static_cast<int64_t>(count - begin);
      EXPECT(layers[c] >= 1 && layers[c] <= left, "layers: expected 1 to " + str(left) + ", got " + str(layers[c]));
      const size_t end = begin + static_cast<size_t>(layers[c]);
      chains.emplace_back(all, begin, end, widths[c], c == 0, "widths");
      begin = end;
    }
    EXPECT(begin == count, "weights: expected " + str(static_cast<int64_t>(begin)) + ", as layers says");
    const auto fits = [](const char* name, const Chain& chain, int64_t fan_in, int64_t width) {
      EXPECT(chain.fan_in() == fan_in && chain.width == width,
             std::string("weights: expected the ") + name + " to have " + str(fan_in) + " inputs and " + str(width) + " outputs, got " +
                 str(chain.fan_in()) + " and " + str(chain.width));
    };
    fits("bottom MLP", bottom(), bottom().fan_in(), dim());
    fits("top MLP", top(), interactions(), 1);
    for (size_t c = 2; c < chains.size(); c += 2) {
      fits("cross net", chains[c], interactions(), chains[c].width);
      fits("cross net", chains[c + 1], chains[c].width, interactions());
    }
  }

  int64_t products() const {
    int64_t sum = is_crossed() ? 0 : product(features(), features() + 1, dim()) / 2;
    for (const Chain& chain : chains) sum += chain.products;
    return std::max<int64_t>(sum, 1);
  }

  // The logits' sigmoid for rows begin .. end; false where an id was outside its table.
  bool run(Job job, const Input& input, float* out, int64_t begin, int64_t end) const {
    const int64_t width = interactions(), own = features() * dim(), vectors = own + dim();
    int64_t rank = 0;
    for (size_t c = 2; c < chains.size(); c += 2) rank = std::max(rank, chains[c].width);
    static thread_local std::vector<float> kept;  // freed with the thread
    float* places[] = {nullptr, nullptr, nullptr, nullptr};
    lay_out(kept, {vectors, std::max(width, own), width, std::max(rank, dim())}, places);
    auto [together, crossed, product, small] = places;
    const char* const ids = static_cast<const char*>(job.ids);
    // Embeddings of a narrow type take the place of what is made later.
    job.embeddings = job.dtype == Dtype::bfloat16 ? crossed : together + dim();
    job.example_stride = job.dtype == Dtype::bfloat16 ? own : vectors;
    job.feature_stride = dim();
    for (int64_t done = begin; done < end; done += kRowsAtOnce) {
      const int64_t rows = std::min(kRowsAtOnce, end - done);
      Interaction x{};
      x.batch = rows, x.features = features(), x.dim = dim();
      x.dense = small, x.dense_stride = dim();
      x.embeddings = together + dim(), x.example_stride = vectors, x.feature_stride = dim();
      x.out = crossed, x.out_stride = width;
      if (input.embeddings) {
        x.embeddings = input.embeddings + done * input.example_stride;
        x.example_stride = input.example_stride, x.feature_stride = input.feature_stride;
      } else {
        job.ids = ids + done * job.ids_stride * (job.wide ? 8 : 4);
        job.batch = rows;
        if (!read_embeddings(&job, 0, job.bags())) return false;
        if (job.dtype == Dtype::bfloat16) widen(static_cast<const uint16_t*>(job.embeddings), own, together + dim(), vectors, rows);
      }
      bottom().run(input.dense + done * input.dense_stride, input.dense_stride, small, rows);
      if (is_crossed())
        cross(x, together, crossed, product, small, rows);
      else
        kernels->interact(x, 0, rows);
      top().run(crossed, width, out + done, rows);
      for (int64_t r = 0; r < rows; ++r) out[done + r] = 1 / (1 + std::exp(-out[done + r]));
    }
    return true;
  }

 private:
  // The cross net: all vectors of a row together, x0; then x = x0 * (W (V x) + b) + x.
  void cross(const Interaction& in, float* together, float* crossed, float* product, float* low_rank, int64_t rows) const {
    const int64_t width = interactions();
    const float *const dense = static_cast<const float*>(in.dense), *const embeddings = static_cast<const float*>(in.embeddings);
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = together + r * width;
      std::copy_n(dense + r * in.dense_stride, dim(), row);
      if (embeddings == together + dim()) continue;  // they are there already
      for (int64_t f = 0; f < features(); ++f)
        std::copy_n(embeddings + r * in.example_stride + f * in.feature_stride, dim(), row + (f + 1) * dim());
    }
    std::copy_n(together, rows * width, crossed);
    for (size_t c = 2; c < chains.size(); c += 2) {
      chains[c].run(crossed, width, low_rank, rows);
      chains[c + 1].run(low_rank, chains[c].width, product, rows);
      for (int64_t k = 0; k < rows * width; ++k) crossed[k] += together[k] * product[k];
    }
  }

  // Where matrices of kRowsAtOnce rows begin, one behind the other.
  static void lay_out(std::vector<float>& memory, std::initializer_list<int64_t> widths, float** places) {
    int64_t needed = 0;
    for (const int64_t width : widths) needed += kRowsAtOnce * width;
    if (static_cast<int64_t>(memory.size()) < needed) memory.resize(static_cast<size_t>(needed));
    float* next = memory.data();
    for (const int64_t width : widths) *places++ = next, next += kRowsAtOnce * width;
  }

  static void widen(const uint16_t* from, int64_t width, float* to, int64_t to_stride, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < width; ++i) {
        const uint32_t bits = static_cast<uint32_t>(from[r * width + i]) << 16;
        std::memcpy(to + r * to_stride + i, &bits, sizeof bits);
      }
  }
};

// Plans by number, so that a number which is none is an error.
class Plans {
 public:
  int64_t add(std::shared_ptr<const Plan> plan) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.emplace(++last_, std::move(plan));
    return last_;
  }
  void remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    plans_.erase(number);
  }
  std::shared_ptr<const Plan> at(int64_t number) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = plans_.find(number);
    EXPECT(found != plans_.end(), "plan: expected one that make_plan returned, got " + str(number));
    return found->second;
  }

 private:
  mutable std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Plan>> plans_;
  int64_t last_ = 0;
} plans;

// make_plan(weight, <tables>, scale, filter, <layers>, widths, layers): see dlrm/ops.py.
void make_plan(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  auto plan = std::make_shared<Plan>();
  Tensor weight = in.tensor();
  plan->lookup.tables(in);
  auto scale = in.maybe_tensor(), filter = in.maybe_tensor();
  const Layers all(in);
  const auto widths = in.list<int64_t>(), layers = in.list<int64_t>();
  EXPECT(read_embeddings, "make_plan: robe's kernels are not loaded");
  plan->lookup.array(std::move(weight), std::move(scale));
  plan->lookup.layout();
  plan->lookup.admission(std::move(filter));
  EXPECT(plan->lookup.out_type() == ScalarType::Float || plan->lookup.out_type() == ScalarType::BFloat16,
         "weight: expected float32, bfloat16 or int8, got " + type(plan->lookup.weight));
  plan->take_chains(all, widths, layers);
  const int64_t sizes[1] = {1};
  Tensor number = new_tensor(sizes, ScalarType::Long);
  *static_cast<int64_t*>(number.mutable_data_ptr()) = plans.add(std::move(plan));
  stack[0] = value_of(number);
}

int64_t number_of(const Tensor& plan) {
  EXPECT(plan.scalar_type() == ScalarType::Long && plan.dim() == 1 && plan.numel() == 1,
         "plan: expected int64 (1,), got " + type(plan) + " " + shape(plan));
  return *static_cast<const int64_t*>(plan.const_data_ptr());
}

// drop_plan(plan): see dlrm/ops.py.
void drop_plan(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  plans.remove(number_of(in.tensor()));
}

// run_plan(plan, dense, ids, embeddings): see dlrm/ops.py.
void run_plan(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor number = in.tensor(), given = in.tensor();
  std::optional<Tensor> ids = in.maybe_tensor(), embeddings = in.maybe_tensor();
  const std::shared_ptr<const Plan> plan = plans.at(number_of(number));
  EXPECT(given.dim() == 2 && given.size(1) == plan->bottom().fan_in() && given.scalar_type() == ScalarType::Float,
         "dense: expected float32 (B, " + str(plan->bottom().fan_in()) + "), got " + type(given) + " " + shape(given));
  EXPECT(ids.has_value() != embeddings.has_value(), "ids and embeddings: expected one of them");
  const Tensor dense = dense_rows("dense", given);
  const int64_t sizes[1] = {dense.size(0)};
  Call call = plan->lookup;
  Input input{static_cast<const float*>(dense.const_data_ptr()), stride_of(dense, 0)};
  if (ids) {
    call.one_id_each(std::move(*ids));
    EXPECT(call.job.batch == sizes[0], "dense and ids: expected as many rows, got " + str(sizes[0]) + " and " + str(call.job.batch));
  } else {
    const Tensor& e = *embeddings;
    EXPECT(e.dim() == 3 && e.size(0) == sizes[0] && e.size(1) == plan->features() && e.size(2) == plan->dim() &&
               e.scalar_type() == ScalarType::Float,
           "embeddings: expected float32 (" + str(sizes[0]) + ", " + str(plan->features()) + ", " + str(plan->dim()) + "), got " +
               type(e) + " " + shape(e));
    embeddings = dense_rows("embeddings", e);
    input.embeddings = static_cast<const float*>(embeddings->const_data_ptr());
    input.example_stride = stride_of(*embeddings, 0), input.feature_stride = stride_of(*embeddings, 1);
  }
  Tensor out = new_tensor(sizes, ScalarType::Float);
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  std::atomic<bool> inside{true};
  parallel_for(0, sizes[0], rows_worth_a_thread(plan->products()), [&](int64_t begin, int64_t end) {
    if (!plan->run(call.job, input, to, begin, end)) inside = false;
  });
  if (!inside) call.outside();
  stack[0] = value_of(out);
}

}  // namespace
}  // namespace robe
