// The model's kernels for CPUs: operators of dlrm/ops.py, registered with torch.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "calls.h"
#define ROBE_KERNELS_OF_A_SET "model_kernels.h"
#include "instruction_sets.h"

#include "arguments.h"
#include "plan.h"

namespace robe {
namespace {

// dot_interaction(dense, embeddings) and its backward(grad, dense, embeddings).
struct InteractionCall {
  Tensor dense, embeddings, out;
  ScalarType type;
  Interaction x{};

  static Tensor wide(const char* name, const Tensor& t, bool keep) {
    return dense_rows(name, keep || t.scalar_type() == ScalarType::Float ? t : convert(t, ScalarType::Float));
  }

  InteractionCall(const Tensor& d, const Tensor& e) : type(d.scalar_type()) {
    EXPECT(d.dim() == 2 && e.dim() == 3 && d.size(0) == e.size(0) && d.size(1) == e.size(2),
           "dense and embeddings: expected (B, D) and (B, F, D), got " + shape(d) + " and " + shape(e));
    EXPECT(type == e.scalar_type() && (type == ScalarType::Float || type == ScalarType::Double ||
                                       type == ScalarType::BFloat16 || type == ScalarType::Half),
           "dense and embeddings: expected one floating-point dtype, got " + robe::type(d) + " and " + robe::type(e));
    x.wide = type == ScalarType::Double;
    EXPECT(e.size(1) < INT32_MAX, "embeddings: expected less than 2147483647 features, got " + str(e.size(1)));
    dense = wide("dense", d, x.wide);
    embeddings = wide("embeddings", e, x.wide);
    x.batch = e.size(0), x.features = e.size(1), x.dim = e.size(2);
    x.dense = dense.const_data_ptr(), x.embeddings = embeddings.const_data_ptr();
    x.dense_stride = stride_of(dense, 0), x.example_stride = stride_of(embeddings, 0);
    x.feature_stride = stride_of(embeddings, 1);
    EXPECT(x.dim < INT32_MAX, "dense: expected less than 2147483647 columns, got " + str(x.dim));
  }

  ScalarType computed() const { return x.wide ? ScalarType::Double : ScalarType::Float; }
  int64_t width() const { return x.dim + (x.features + 1) * x.features / 2; }
  Tensor narrow(const Tensor& t) const { return type == computed() ? t : convert(t, type); }

  void run(void (*kernel)(const Interaction&, int64_t, int64_t)) {
    constexpr int64_t products = 1 << 17;  // multiplications that are worth a thread
    const int64_t each = product(width(), x.dim);
    parallel_for(0, x.batch, std::max<int64_t>(1, products / std::max<int64_t>(each, 1)),
                                [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
  }
};

void dot_interaction(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor dense = in.tensor(), embeddings = in.tensor();
  InteractionCall call(dense, embeddings);
  const int64_t sizes[2] = {call.x.batch, call.width()};
  call.out = new_tensor(sizes, call.computed());
  call.x.out = call.out.mutable_data_ptr();
  call.x.out_stride = sizes[1];
  call.run(kernels->interact);
  stack[0] = value_of(call.narrow(call.out));
}

void dot_interaction_backward(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor grad = in.tensor(), dense = in.tensor(), embeddings = in.tensor();
  InteractionCall call(dense, embeddings);
  EXPECT(grad.dim() == 2 && grad.size(0) == call.x.batch && grad.size(1) == call.width(),
         "grad: expected shape (" + str(call.x.batch) + ", " + str(call.width()) + "), got " + shape(grad));
  EXPECT(is_floating(grad), "grad: expected floating-point numbers, got " + type(grad));
  call.out = dense_rows("grad", grad.scalar_type() == call.computed() ? grad : convert(grad, call.computed()));
  call.x.out = const_cast<void*>(call.out.const_data_ptr());
  call.x.out_stride = stride_of(call.out, 0);
  const int64_t sizes[3] = {call.x.batch, call.x.features, call.x.dim}, dense_sizes[2] = {call.x.batch, call.x.dim};
  Tensor dense_grad = new_tensor(dense_sizes, call.computed());
  Tensor embeddings_grad = new_tensor(sizes, call.computed());
  call.x.dense_grad = dense_grad.mutable_data_ptr();
  call.x.embeddings_grad = embeddings_grad.mutable_data_ptr();
  call.run(kernels->interact_grad);
  stack[0] = value_of(call.narrow(dense_grad));
  stack[1] = value_of(call.narrow(embeddings_grad));
}

// mlp(x, <layers>, width, relu_last): see dlrm/ops.py.
void mlp(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor given = in.tensor();
  const Layers layers(in);
  const int64_t width = in.integer();
  const bool relu_last = in.boolean();
  EXPECT(given.dim() == 2 && given.scalar_type() == ScalarType::Float,
         "x: expected a float32 matrix (B, fan_in), got " + type(given) + " " + shape(given));
  const Chain chain(layers, 0, layers.count(), width, relu_last, "width");
  EXPECT(given.size(1) == chain.fan_in(), "x: expected (B, " + str(chain.fan_in()) + "), got " + shape(given));
  const Tensor input = dense_rows("x", given);
  const int64_t sizes[2] = {input.size(0), chain.width}, stride = stride_of(input, 0);
  Tensor out = new_tensor(sizes, ScalarType::Float);
  const float* const from = static_cast<const float*>(input.const_data_ptr());
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  parallel_for(0, sizes[0], rows_worth_a_thread(chain.products), [&](int64_t begin, int64_t end) {
    chain.run(from + begin * stride, stride, to + begin * chain.width, end - begin);
  });
  stack[0] = value_of(out);
}

const Registration registration(
    "dlrm", {
        {"dot_interaction", &dot_interaction},
        {"dot_interaction_backward", &dot_interaction_backward},
        {"mlp", &mlp},
        {"make_plan", &make_plan},
        {"run_plan", &run_plan},
        {"drop_plan", &drop_plan},
    });

}  // namespace
}  // namespace robe

// Take the reader of embeddings from the other library of kernels.
extern "C" ROBE_EXPORT void robe_connect(bool (*read)(const robe::Job*, int64_t, int64_t)) { robe::read_embeddings = read; }
