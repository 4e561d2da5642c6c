// Work cut into parts for threads.

#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace robe {
namespace {

// Cuts bags into parts of about as many values each, none below ``grain`` bytes of embeddings.
std::vector<int64_t> split(const Call& call, int64_t grain) {
  const Job& job = call.job;
  const int64_t bags = job.bags(), work = call.values() + (job.pooling == Pooling::none ? 0 : bags);
  const int64_t bytes = product(work, job.dim, item_size(job.dtype));
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(bytes < 2 * grain ? 1 : get_num_threads(), bytes / grain));
  std::vector<int64_t> bounds(parts + 1);
  for (int64_t p = 1; p < parts; ++p) {
    const int64_t target = work / parts * p;
    if (job.pooling == Pooling::none) {
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
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) use(p);
  });
}

}  // namespace
}  // namespace robe
