// The operators that count ids. Checks and their order are those of robe/ops/counting.py.

#pragma once

#include "arguments.h"
#include "counting.h"

namespace robe {
namespace {

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

void count_ids(Value* stack, uint64_t, uint64_t) {
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
    apart("clicks", extent(*clicks), "counters", counters);
    x.labels_strides = broadcast_strides("labels", *labels, ScalarType::Bool, ids);
    x.labels = static_cast<const uint8_t*>(labels->const_data_ptr());
  }
  robe::count_ids(of_all, of_clicks, counters.size(1), x);
}

void id_counts(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), given = in.tensor();
  const int32_t* const from_counters = counters_of("counters", counters);
  EXPECT(given.dim() == 1 && given.scalar_type() == ScalarType::Long,
         "row_hashes: expected an int64 vector (n,), got " + type(given) + " " + shape(given));
  const Tensor row_hashes = dense_rows("row_hashes", given);
  const int64_t sizes[1] = {row_hashes.numel()};
  Tensor out = new_tensor(sizes, ScalarType::Long);
  robe::id_counts(from_counters, counters.size(1), static_cast<const int64_t*>(row_hashes.const_data_ptr()), row_hashes.numel(),
            static_cast<int64_t*>(out.mutable_data_ptr()));
  stack[0] = value_of(out);
}

Tensor vector_of(const std::vector<int64_t>& values) {
  const int64_t sizes[1] = {static_cast<int64_t>(values.size())};
  Tensor out = new_tensor(sizes, ScalarType::Long);
  std::copy(values.begin(), values.end(), static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

void frequent_rows(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), ids = in.tensor(), keys = in.tensor();
  const int64_t times = in.integer();
  const Tensor recent = in.tensor();
  const int32_t* const from_counters = counters_of("counters", counters);
  const Ids x = ids_of(ids, keys);
  EXPECT(recent.dim() == 1 && recent.numel() > 1 && recent.scalar_type() == ScalarType::Long && recent.is_contiguous(),
         "recent: expected a contiguous int64 vector of 2 or more, got " + type(recent) + " " + shape(recent));
  stack[0] = value_of(vector_of(robe::frequent_rows(from_counters, counters.size(1), x, times,
                                          static_cast<int64_t*>(recent.mutable_data_ptr()), recent.numel())));
}

void observe_ids(Value* stack, uint64_t, uint64_t) {
  Arguments in{stack};
  const Tensor counters = in.tensor(), ids = in.tensor(), keys = in.tensor(), words = in.tensor();
  const int64_t threshold = in.integer();
  int32_t* const of_all = counters_of("counters", counters);
  const Ids x = ids_of(ids, keys);
  EXPECT(words.dim() == 1 && words.scalar_type() == ScalarType::Long && words.numel() > 0,
         "filter: expected an int64 vector (W,), got " + type(words) + " " + shape(words));
  const Tensor filter = dense_rows("filter", words);
  stack[0] = value_of(vector_of(robe::observe_ids(of_all, counters.size(1), static_cast<const uint64_t*>(filter.const_data_ptr()),
                                        static_cast<uint64_t>(filter.numel()), x, threshold)));
}

}  // namespace
}  // namespace robe
