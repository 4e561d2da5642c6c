// A chain of linear layers with ReLU between them: its weights, checked once and kept.

#pragma once

#include <algorithm>
#include <climits>

#include "arguments.h"
#include "calls.h"

namespace robe {
namespace {

// What the operators take of chains: an entry for each layer. See pack_linear in dlrm/ops.py.
struct Layers {
  std::vector<Tensor> weights, biases, inputs, starts;

  explicit Layers(Arguments& in)
      : weights(in.list<Tensor>()), biases(in.list<Tensor>()), inputs(in.list<Tensor>()), starts(in.list<Tensor>()) {}

  size_t count() const {
    EXPECT(!weights.empty() && weights.size() == biases.size() && weights.size() == inputs.size() &&
               weights.size() == starts.size(),
           "weights, biases, inputs and starts: expected one of each for each layer");
    return weights.size();
  }
};

class Chain {
 public:
  int64_t width;         // of the output
  int64_t products = 0;  // multiplications for a row

  // Layers begin .. end.
  Chain(const Layers& all, size_t begin, size_t end, int64_t out_width, bool relu_last, const char* width_name)
      : width(out_width), lists_(end - begin) {
    int64_t before = 0;  // outputs of the layer before
    for (size_t l = begin; l < end; ++l) {
      const bool relu = l + 1 < end || relu_last;
      if (all.inputs[l].numel() || all.weights[l].dim() == 2)
        sparse(all.weights[l], all.inputs[l], all.starts[l], lists_[l - begin]);
      else
        dense(all.weights[l], l == begin ? -1 : before);
      Layer& layer = layers_.back();
      layer.relu = relu;
      const Tensor& b = all.biases[l];
      const int64_t outputs = product(layer.blocks, layer.block);
      EXPECT(b.dim() == 1 && b.numel() == outputs && b.scalar_type() == ScalarType::Float && b.is_contiguous(),
             "biases: expected contiguous float32 (" + str(outputs) + ",), got " + type(b) + " " + shape(b));
      layer.bias = static_cast<const float*>(b.const_data_ptr());
      if (l == begin) fan_in_ = layer.in;
      EXPECT(l == begin || layer.in <= before, "starts: expected at most " + str(before) + " inputs, got " + str(layer.in));
      kept_.push_back(all.weights[l]);
      kept_.push_back(b);
      before = outputs;
      widest_ = std::max({widest_, layer.in, outputs});
      products += all.weights[l].numel();
    }
    EXPECT(width >= 1 && width <= before, std::string(width_name) + ": expected 1 to " + str(before) + ", got " + str(width));
  }

  Chain(Chain&&) = default;  // a copy would point into the lists of the first

  int64_t fan_in() const { return fan_in_; }

  // Rows in (rows, fan_in), in_stride apart, to out (rows, width).
  void run(const float* in, int64_t in_stride, float* out, int64_t rows) const {
    // The activations of two layers, in half of what a second cache holds; fewer rows would read all weights more often.
    constexpr int64_t floats = 1 << 17;
    const auto whole = [](int64_t n) { return std::max<int64_t>(n, 1) * kRowsTogether; };
    const int64_t at_once = std::min(whole(floats / widest_ / kRowsTogether), whole((rows + kRowsTogether - 1) / kRowsTogether));
    static thread_local std::vector<float> scratch;  // freed with the thread
    const int64_t half = at_once * widest_;
    if (static_cast<int64_t>(scratch.size()) < 2 * half) scratch.resize(static_cast<size_t>(2 * half));
    kernels->mlp({layers_.data(), static_cast<int64_t>(layers_.size()), in, in_stride, out, width, scratch.data(), half, at_once},
                 0, rows);
  }

 private:
  // Inputs and starts are copied: they decide where is read, and must stay what was checked.
  struct Lists {
    std::vector<uint16_t> narrow;
    std::vector<uint32_t> wide;
    std::vector<int64_t> starts;
  };

  void dense(const Tensor& w, int64_t before) {
    EXPECT(w.dim() == 3 && w.size(2) == kPanel && w.scalar_type() == ScalarType::Float && w.is_contiguous() &&
               (before < 0 || w.size(1) <= before),
           "weights: expected contiguous float32 (panels, " + (before < 0 ? "fan_in" : str(before)) + ", " + str(kPanel) +
               "), got " + type(w) + " " + shape(w));
    layers_.push_back({static_cast<const float*>(w.const_data_ptr()), nullptr, nullptr, nullptr, w.size(1), w.size(0), kPanel,
                       false, false});
  }

  // starts: of each block, then the number of all weights, then the number of inputs.
  void sparse(const Tensor& w, const Tensor& inputs, const Tensor& starts, Lists& lists) {
    EXPECT(w.dim() == 2 && (w.size(1) == 16 || w.size(1) == 32) && w.scalar_type() == ScalarType::Float && w.is_contiguous(),
           "weights: expected contiguous float32 (n, 16) or (n, 32), got " + type(w) + " " + shape(w));
    EXPECT(inputs.dim() == 1 && inputs.numel() == w.size(0) && inputs.scalar_type() == ScalarType::Int && inputs.is_contiguous(),
           "inputs: expected contiguous int32 (" + str(w.size(0)) + ",), got " + type(inputs) + " " + shape(inputs));
    EXPECT(starts.dim() == 1 && starts.numel() >= 2 && starts.scalar_type() == ScalarType::Long && starts.is_contiguous(),
           "starts: expected contiguous int64 (blocks + 2,), got " + type(starts) + " " + shape(starts));
    const int64_t* const from = static_cast<const int64_t*>(starts.const_data_ptr());
    lists.starts.assign(from, from + starts.numel());
    const int64_t in = lists.starts.back(), blocks = starts.numel() - 2;
    lists.starts.pop_back();
    EXPECT(in >= 0 && in <= INT32_MAX, "starts: expected 0 to 2147483647 inputs, got " + str(in));
    EXPECT(lists.starts.front() == 0 && lists.starts.back() == w.size(0) && std::is_sorted(lists.starts.begin(), lists.starts.end()),
           "starts: expected to rise from 0 to " + str(w.size(0)) + ", the number of weights");
    const int32_t* const list = static_cast<const int32_t*>(inputs.const_data_ptr());
    const bool wide = in > 1 << 16;
    lists.wide.assign(list, list + w.size(0));
    for (const uint32_t x : lists.wide)
      EXPECT(static_cast<int64_t>(x) < in, "inputs: expected 0 to " + str(in - 1) + ", got " + str(static_cast<int32_t>(x)));
    if (!wide) {
      lists.narrow.assign(lists.wide.begin(), lists.wide.end());
      lists.wide.clear();
    }
    // Never null, which would say that the layer is dense.
    static const uint32_t none = 0;
    const void* at = wide ? static_cast<const void*>(lists.wide.data()) : lists.narrow.data();
    if (w.size(0) == 0) at = &none;
    layers_.push_back({static_cast<const float*>(w.const_data_ptr()), nullptr, at, lists.starts.data(), in, blocks, w.size(1),
                       wide, false});
  }

  std::vector<Tensor> kept_;
  std::vector<Lists> lists_;
  std::vector<Layer> layers_;
  int64_t fan_in_ = 0, widest_ = 1;
};

// The rows that are worth a thread, with so many multiplications each.
inline int64_t rows_worth_a_thread(int64_t products) { return std::max<int64_t>(1, (1 << 20) / std::max<int64_t>(1, products)); }

}  // namespace
}  // namespace robe
