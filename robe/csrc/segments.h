// Gradients sorted by the segment of the array that they go to, so that each segment is summed and updated by one thread.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "parallel.h"

namespace robe {
namespace {

constexpr int64_t kAhead = 128;  // records to prefetch before their turn
constexpr int64_t kWriteGrain = 16 << 10;  // bytes of gradients that are worth a thread

// log2 of the slots in a segment, and the number of segments of an array.
struct SegmentCount {
  int shift;
  int64_t count;
};

SegmentCount segments_of(int64_t slots) {
  int shift = 12;  // 16 kB of float32: sums stay in the first cache
  while (shift > 8 && slots >> shift < 64) --shift;
  while (shift < 15 && slots >> shift > 16384) ++shift;
  return {shift, (slots + (int64_t{1} << shift) - 1) >> shift};
}

// Sorts the gradients of calls by the segment of the array they go to, each segment's in the order of the calls and of
// their ids; then use(segments, segment, scratch) once for each segment, on any thread. A slot's gradients are so summed
// in the order of the ids, whatever the number of threads. weight and state are what use will write, or null.
template <class Use>
void by_segment(const std::vector<std::unique_ptr<Call>>& calls, const void* weight, void* const* state, Use use) {
  const Call& front = *calls.front();
  const int64_t slots = front.weight.numel();
  const SegmentCount all = segments_of(slots);
  const int shift = all.shift;
  const int64_t segments = all.count;

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
  std::vector<Pieces> pieces(n);
  std::atomic<int64_t> outside{n};
  each_part(n, [&](int64_t p) {
    cursors[p].assign(segments, 0);
    if (!kernels->collect(parts[p].call->job, parts[p].begin, parts[p].end, shift, pieces[p], cursors[p].data())) {
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
    kernels->sort(front.job.dtype, pieces[p], shift, records.get(), cursors[p].data());
    pieces[p] = Pieces{};
  });

  const Segments sorted{records.get(), ends.data(), shift, slots};
  std::atomic<int64_t> next{0};
  const int64_t workers = n == 1 ? 1 : std::min<int64_t>(get_num_threads(), segments);
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

}  // namespace
}  // namespace robe
