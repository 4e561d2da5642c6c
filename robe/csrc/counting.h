// Counting of ids in a count-min sketch (robe/sketches.py), one id after another: what comes out does not depend on
// threads. The counters of an id lie all over hundreds of MB, so they are asked for some ids ahead of their turn.

#pragma once

#include <algorithm>
#include <vector>

#include "job.h"

namespace robe {

constexpr int kDepth = 4;  // counters of an id
constexpr uint64_t kSalt = 0xD1B54A32D192ED03;

// Ids of any shape, with what is broadcast to them. Strides count elements, 0 where a dimension repeats.
struct Ids {
  const void* ids;
  bool wide;            // int64, else int32
  const int64_t* keys;
  const uint8_t* labels;  // of torch.bool, whose bytes may be any; or null: none has one
  std::vector<int64_t> sizes;  // at least one dimension
  std::vector<int64_t> ids_strides, keys_strides, labels_strides;
};

// use(row hash, label) of each id in order.
template <class Use>
void each_row(const Ids& x, Use use) {
  if (std::count(x.sizes.begin(), x.sizes.end(), 0)) return;
  const int64_t last = static_cast<int64_t>(x.sizes.size()) - 1, length = x.sizes[last];
  int64_t lines = 1;
  for (int64_t d = 0; d < last; ++d) lines *= x.sizes[d];
  const int64_t step = x.ids_strides[last], keys_step = x.keys_strides[last], labels_step = x.labels_strides[last];
  for (int64_t line = 0; line < lines; ++line) {
    int64_t id = 0, key = 0, label = 0;
    for (int64_t d = last - 1, rest = line; d >= 0; rest /= x.sizes[d--]) {
      const int64_t here = rest % x.sizes[d];
      id += here * x.ids_strides[d];
      key += here * x.keys_strides[d];
      label += here * x.labels_strides[d];
    }
    for (int64_t i = 0; i < length; ++i, id += step, key += keys_step, label += labels_step) {
      const int64_t value = x.wide ? static_cast<const int64_t*>(x.ids)[id] : static_cast<const int32_t*>(x.ids)[id];
      use(row_hash(x.keys[key], value), x.labels && x.labels[label] != 0);
    }
  }
}

struct Turn {
  uint64_t row, place[kDepth];
  bool label;
};

// Rows that wait for their counters: use(turn) in the order in which they were pushed, the last ones at finish.
template <class Use>
class Queue {
 public:
  // clicks: counters that are used of rows with a label only, or null; depth: how many counters of a row are used.
  Queue(const int32_t* counters, const int32_t* clicks, int64_t width, int depth, Use use)
      : counters_(counters), clicks_(clicks), width_(static_cast<uint64_t>(width)), depth_(depth), use_(use) {}

  void push(uint64_t row, bool label) {
    Turn& turn = turns_[count_ % kAhead];
    if (count_ >= kAhead) use_(turn);
    ++count_;
    turn.row = row;
    turn.label = label;
    for (int k = 0; k < depth_; ++k) {
      turn.place[k] = k * width_ + multiply_high(mix64(row + (k + 1) * kSalt), width_);
      __builtin_prefetch(counters_ + turn.place[k], 1);
      if (clicks_ && label) __builtin_prefetch(clicks_ + turn.place[k], 1);
    }
  }

  void finish() {
    for (uint64_t i = count_ > kAhead ? count_ - kAhead : 0; i < count_; ++i) use_(turns_[i % kAhead]);
  }

 private:
  static constexpr uint64_t kAhead = 32;
  const int32_t *counters_, *clicks_;
  uint64_t width_, count_ = 0;
  int depth_;
  Use use_;
  Turn turns_[kAhead];
};

ROBE_INLINE int32_t least(const int32_t* counters, const Turn& turn) {
  int32_t count = counters[turn.place[0]];
  for (int k = 1; k < kDepth; ++k) count = std::min(count, counters[turn.place[k]]);
  return count;
}

// Raises those of a row's counters that are the least; returns what they are then.
ROBE_INLINE int32_t add(int32_t* counters, const Turn& turn) {
  const int32_t before = least(counters, turn), count = before + (before < INT32_MAX);
  for (int k = 0; k < kDepth; ++k) counters[turn.place[k]] = std::max(counters[turn.place[k]], count);
  return count;
}

inline void count_ids(int32_t* counters, int32_t* clicks, int64_t width, const Ids& ids) {
  Queue queue(counters, clicks, width, kDepth, [&](const Turn& turn) {
    add(counters, turn);
    if (clicks && turn.label) add(clicks, turn);
  });
  each_row(ids, [&](uint64_t row, bool label) { queue.push(row, label); });
  queue.finish();
}

inline void id_counts(const int32_t* counters, int64_t width, const int64_t* row_hashes, int64_t n, int64_t* out) {
  Queue queue(counters, nullptr, width, kDepth, [&](const Turn& turn) { *out++ = least(counters, turn); });
  for (int64_t i = 0; i < n; ++i) queue.push(static_cast<uint64_t>(row_hashes[i]), false);
  queue.finish();
}

// Rows counted ``times`` or more; not again those that are in ``recent``, where each row has one place.
inline std::vector<int64_t> frequent_rows(const int32_t* counters, int64_t width, const Ids& ids, int64_t times,
                                          int64_t* recent, int64_t places) {
  std::vector<int64_t> row_hashes;
  const auto place = [&](uint64_t row) -> int64_t& { return recent[multiply_high(row, static_cast<uint64_t>(places))]; };
  Queue whole(counters, nullptr, width, kDepth, [&](const Turn& turn) {
    const int64_t row = static_cast<int64_t>(turn.row);
    if (place(turn.row) != row && least(counters, turn) >= times) row_hashes.push_back(place(turn.row) = row);
  });
  // Most ids are rare, and one counter tells.
  Queue first(counters, nullptr, width, 1, [&](const Turn& turn) {
    if (counters[turn.place[0]] >= times) whole.push(turn.row, false);
  });
  each_row(ids, [&](uint64_t row, bool) {
    if (place(row) != static_cast<int64_t>(row)) first.push(row, false);
  });
  first.finish();
  whole.finish();
  return row_hashes;
}

// Counts the ids that the filter does not admit; returns the row hashes that have then been counted ``threshold`` times.
inline std::vector<int64_t> observe_ids(int32_t* counters, int64_t width, const uint64_t* filter, uint64_t words,
                                        const Ids& ids, int64_t threshold) {
  std::vector<int64_t> row_hashes;
  Queue queue(counters, nullptr, width, kDepth, [&](const Turn& turn) {
    if (add(counters, turn) >= threshold) row_hashes.push_back(static_cast<int64_t>(turn.row));
  });
  each_row(ids, [&](uint64_t row, bool) {
    if (!admitted(filter, words, row)) queue.push(row, false);
  });
  queue.finish();
  return row_hashes;
}

}  // namespace robe
