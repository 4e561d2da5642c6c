// A chain of linear layers with ReLU between them: its weights, checked once and kept.

#pragma once

#include "arguments.h"
#include "calls.h"

namespace robe {
namespace {

struct Chain {
  std::vector<Tensor> kept;
  std::vector<Layer> layers;
  int64_t width = 0;     // of the output
  int64_t products = 0;  // multiplications for a row

  // weights: of each layer, (panels, fan_in, kPanel); biases: (panels * kPanel,); see dlrm/ops.py.
  Chain(std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t out_width, bool relu_last,
        const char* width_name = "width")
      : width(out_width) {
    EXPECT(!weights.empty() && weights.size() == biases.size(), "weights and biases: expected one of each for each layer");
    int64_t before = 0;  // outputs of the layer before
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor &w = weights[i], &b = biases[i];
      EXPECT(w.dim() == 3 && w.size(2) == kPanel && w.scalar_type() == ScalarType::Float && w.is_contiguous() &&
                 (i == 0 || w.size(1) <= before),
             "weights: expected contiguous float32 (panels, " + (i ? str(before) : "fan_in") + ", " + str(kPanel) + "), got " +
                 type(w) + " " + shape(w));
      EXPECT(b.dim() == 1 && b.numel() == product(w.size(0), kPanel) && b.scalar_type() == ScalarType::Float && b.is_contiguous(),
             "biases: expected contiguous float32 (" + str(product(w.size(0), kPanel)) + ",), got " + type(b) + " " + shape(b));
      layers.push_back({static_cast<const float*>(w.const_data_ptr()), static_cast<const float*>(b.const_data_ptr()), w.size(1),
                        w.size(0), i + 1 < weights.size() || relu_last});
      before = b.numel();
      products += w.numel();
    }
    EXPECT(width >= 1 && width <= before, std::string(width_name) + ": expected 1 to " + str(before) + ", got " + str(width));
    kept = std::move(weights);
    for (Tensor& bias : biases) kept.push_back(std::move(bias));
  }

  int64_t fan_in() const { return layers[0].in; }

  // Rows in (rows, fan_in), in_stride apart, to out (rows, width).
  void run(const float* in, int64_t in_stride, float* out, int64_t rows) const {
    kernels->mlp({layers.data(), static_cast<int64_t>(layers.size()), rows, in, in_stride, out, width}, 0, rows);
  }
};

// The rows that are worth a thread, with so many multiplications each.
inline int64_t rows_worth_a_thread(int64_t products) { return std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, products)); }

}  // namespace
}  // namespace robe
