// One call of lookup or bag: its arguments, checked, as the Job that the kernels work on.

#pragma once

#include <cstring>
#include <memory>

#include "arguments.h"
#include "job.h"

namespace robe {
namespace {

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

inline size_t item_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : dtype == Dtype::int8 ? 1 : 2;
}

// The arguments of one lookup or bag, checked, and the Job they make. Keeps the tensors that the Job points into.
struct Call {
  Tensor weight, ids, table_keys, num_embeddings;
  std::optional<Tensor> scale, offsets, per_sample_weights, filter;
  Tensor embeddings;  // or their gradient
  std::string hash;
  std::optional<int64_t> padding;
  std::vector<int64_t> bag_offsets;
  std::vector<int64_t> exact_keys, exact_num_embeddings, keys_in_turn, num_embeddings_in_turn;
  std::vector<uint64_t> shared, shared_in_turn;
  Job job{};

  void array(Tensor w, std::optional<Tensor> s) {
    job.dtype = dtype_of(w);
    EXPECT(w.dim() == 1, "weight: expected a floating-point vector (m,), got " + type(w) + " " + shape(w));
    weight = dense_rows("weight", w);
    job.weight = weight.const_data_ptr();
    EXPECT(s.has_value() == (job.dtype == Dtype::int8), "scale: expected with an int8 weight, which has no gradient, and only with one");
    if (!s) return;
    EXPECT(s->dim() == 1 && s->scalar_type() == ScalarType::Float && s->numel() > 0,
           "scale: expected a float32 vector, one entry per group of weights, got " + type(*s) + " " + shape(*s));
    scale = dense_rows("scale", *s);
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
    job.hash = static_cast<Hash>(place_of("hash", hash, kHashes));
    EXPECT(job.dim >= 1 && job.block >= 1, "embedding_dim and block_size: expected at least 1, got " + str(job.dim) +
                                               " and " + str(job.block));
    EXPECT(job.dim <= INT32_MAX, "embedding_dim: expected at most 2147483647, got " + str(job.dim));
    const int64_t size = weight.numel();
    if (job.hash == Hash::mix && job.block > job.dim) job.hash = Hash::span;
    EXPECT(job.hash == Hash::identity || size >= job.block,
           "weight: " + str(size) + " weights do not hold one block of " + str(job.block));
    EXPECT(table_keys.numel() > 0, "table_keys: expected at least one feature");
    if (job.hash == Hash::span)
      EXPECT(product(job.block, job.dim) < INT64_MAX, "block_size: blocks of " + str(job.block) + " are too long");
    table_keys = dense_rows("table_keys", table_keys);
    num_embeddings = dense_rows("num_embeddings", num_embeddings);
    job.keys = static_cast<const int64_t*>(table_keys.const_data_ptr());
    job.num_embeddings = static_cast<const int64_t*>(num_embeddings.const_data_ptr());
    job.features = table_keys.numel();
    job.choices = static_cast<uint64_t>(size - job.block + 1);
    job.padded = padding.has_value();
    job.padding = padding.value_or(0);
    for (int64_t f = 0; f < job.features; ++f)
      EXPECT(job.num_embeddings[f] >= 0, "num_embeddings: expected 0 or more, got " + str(job.num_embeddings[f]) +
                                             " for feature " + str(f));
    if (job.hash != Hash::identity) return;
    // Here keys and bounds lead to addresses, so they must stay what was checked.
    exact_keys.assign(job.keys, job.keys + job.features);
    exact_num_embeddings.assign(job.num_embeddings, job.num_embeddings + job.features);
    job.keys = exact_keys.data();
    job.num_embeddings = exact_num_embeddings.data();
    for (int64_t f = 0; f < job.features; ++f)
      EXPECT(job.num_embeddings[f] > 0 && job.keys[f] >= 0 && job.keys[f] <= size - product(job.num_embeddings[f], job.dim),
             "hash='identity': the table of feature " + str(f) + " does not lie within the array's " + str(size) + " slots");
  }

  void admission(std::optional<Tensor> words) {
    if (!words) return;
    EXPECT(words->dim() == 1 && words->scalar_type() == ScalarType::Long && words->numel() > 0 && words->numel() >> 32 == 0,
           "filter: expected an int64 vector (W,), got " + type(*words) + " " + shape(*words));
    EXPECT(hash == "mix", "filter: expected hash 'mix' with it, got '" + hash + "'");
    filter = dense_rows("filter", *words);
    job.filter = static_cast<const uint64_t*>(filter->const_data_ptr());
    job.filter_words = static_cast<uint64_t>(filter->numel());
    shared.resize(job.features + kSpare);
    for (int64_t f = 0; f < job.features; ++f)
      shared[f] = row_hash(job.keys[f], kSharedId);
    job.shared = shared.data();
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
    job.num_embeddings = in_turn(num_embeddings_in_turn, job.num_embeddings);
    if (job.filter) job.shared = in_turn(shared_in_turn, job.shared);
    job.pooling = Pooling::none;
    job.ids = ids.const_data_ptr();
    job.wide = ids.scalar_type() == ScalarType::Long;
    job.batch = ids.size(0);
    job.ids_stride = stride_of(ids, 0);
    job.ids_feature_stride = stride_of(ids, 1);
  }

  void bags(Tensor values, Tensor offs, std::optional<Tensor> weights, const std::string& pooling) {
    check_ids("values", values, 1);
    check_ids("offsets", offs, 1);
    job.pooling = static_cast<Pooling>(1 + place_of("pooling", pooling, kPoolings));
    const int64_t entries = offs.numel();
    EXPECT(entries > 0 && (entries - 1) % job.features == 0, "offsets: expected (F * B + 1,) for F = " +
                                                                  str(job.features) + " features, got " + shape(offs));
    if (weights) {
      EXPECT(job.pooling == Pooling::sum, "per_sample_weights: supported with pooling 'sum' only, got pooling '" + pooling + "'");
      EXPECT(weights->dim() == 1 && weights->numel() == values.numel() &&
                 weights->scalar_type() == out_type(),
             "per_sample_weights: expected " + (job.dtype == Dtype::int8 ? "torch.float32" : type(weight)) + " " +
                 shape(values) + " as the weights and values, got " + type(*weights) + " " + shape(*weights));
      per_sample_weights = *weights;
      job.per_sample_weights = per_sample_weights->const_data_ptr();
      job.per_sample_weights_stride = stride_of(*per_sample_weights, 0);
    }
    ids = values;
    job.ids = ids.const_data_ptr();
    job.wide = ids.scalar_type() == ScalarType::Long;
    job.batch = (entries - 1) / job.features;
    job.ids_stride = stride_of(ids, 0);
    bag_offsets.resize(entries);
    const bool wide = offs.scalar_type() == ScalarType::Long;
    const void* const data = offs.const_data_ptr();
    const int64_t stride = stride_of(offs, 0);
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

  void check_shape(const char* name, const Tensor& t) const {
    EXPECT(t.dim() == 3 && t.size(0) == job.batch && t.size(1) == job.features && t.size(2) == job.dim,
           std::string(name) + ": expected shape (" + str(job.batch) + ", " + str(job.features) + ", " + str(job.dim) +
               "), got " + shape(t));
  }

  // The embeddings (B, F, D) or their gradient, or (B, F * D)-like slices of a larger tensor.
  void set_embeddings(Tensor t) {
    embeddings = std::move(t);
    job.embeddings = const_cast<void*>(embeddings.const_data_ptr());
    job.example_stride = stride_of(embeddings, 0);
    job.feature_stride = stride_of(embeddings, 1);
  }

  // A tensor of the caller's to write the embeddings into.
  void set_out(const Tensor& t) {
    check_shape("out", t);
    EXPECT(t.scalar_type() == out_type(), "out: expected the dtype of the embeddings, got " + type(t));
    EXPECT(t.size(2) == 1 || t.stride(2) == 1, "out: expected its last dimension to be contiguous");
    // The rows lie one behind the other, first along one dimension, then along the other.
    int64_t outer = stride_of(t, 0), inner = stride_of(t, 1), count = job.features;
    if (job.batch > 1 && job.features > 1 && outer < inner) std::swap(outer, inner), count = job.batch;
    EXPECT(t.numel() == 0 || ((count == 1 || inner >= job.dim) && (job.bags() == count || outer >= (count - 1) * inner + job.dim)),
           "out: expected each entry to have memory of its own");
    const Extent memory = extent(t);
    apart("out", memory, "weight", weight);
    apart("out", memory, "ids", ids);
    apart("out", memory, "table_keys", table_keys);
    apart("out", memory, "num_embeddings", num_embeddings);
    if (scale) apart("out", memory, "scale", *scale);
    if (filter) apart("out", memory, "filter", *filter);
    if (per_sample_weights) apart("out", memory, "per_sample_weights", *per_sample_weights);
    set_embeddings(t);
  }

  ScalarType out_type() const { return job.dtype == Dtype::int8 ? ScalarType::Float : weight.scalar_type(); }

  void new_embeddings() {
    const int64_t sizes[3] = {job.batch, job.features, job.dim};
    set_embeddings(new_tensor(sizes, out_type()));
  }

  void gradient(const Tensor& grad) {
    EXPECT(job.dtype != Dtype::int8, "weight: an int8 array has no gradient");
    check_shape("grad", grad);
    EXPECT(is_floating(grad), "grad: expected floating-point numbers, got " + type(grad));
    const bool same = grad.scalar_type() == weight.scalar_type();
    set_embeddings(dense_rows("grad", same ? grad : convert(grad, weight.scalar_type())));
  }

  // Ids of bags begin .. end: about the work they make.
  int64_t values() const { return job.pooling == Pooling::none ? job.bags() : job.offsets[job.bags()]; }

  [[noreturn]] void outside() const {
    bool found = false;
    int64_t feature = 0, id = 0;
    const auto look = [&](int64_t f, int64_t position) {
      const int64_t x = job.wide ? static_cast<const int64_t*>(job.ids)[position] : static_cast<const int32_t*>(job.ids)[position];
      if (found || (job.padded && x == job.padding) || job.num_embeddings[f] == 0 || (x >= 0 && x < job.num_embeddings[f])) return;
      found = true, feature = f, id = x;
    };
    if (job.pooling == Pooling::none) {
      for (int64_t b = 0; b < job.batch; ++b)
        for (int64_t f = 0; f < job.features; ++f) look(f, b * job.ids_stride + f * job.ids_feature_stride);
    } else {
      for (int64_t k = 0; k < job.bags(); ++k)
        for (int64_t v = job.offsets[k]; v < job.offsets[k + 1]; ++v) look(k / job.batch, v * job.ids_stride);
    }
    if (!found) throw std::out_of_range("index out of range: an id that other threads have changed since");
    throw std::out_of_range("index out of range: id " + str(id) + " of feature " + str(feature) + ", whose table has " +
                            str(job.num_embeddings[feature]) + " rows");
  }
};

}  // namespace
}  // namespace robe
