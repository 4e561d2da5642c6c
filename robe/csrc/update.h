// The rules of optimizers, on the slots that the records of a segment touch.
// The first part is included once; the second once per instruction set, by kernels.h.

#ifndef ROBE_UPDATE_H
#define ROBE_UPDATE_H

#include <cstddef>

namespace robe {

enum class Rule { sgd, adagrad, adam };
constexpr const char* kRules[] = {"sgd", "adagrad", "adam"};

// An optimizer's step. options: its rate, weight decay, and three of the rule's own.
struct Update {
  Rule rule;
  void* state[2];
  double options[5];

  size_t states() const { return rule == Rule::adam ? 2 : rule == Rule::adagrad || options[2] != 0 ? 1 : 0; }
};

}  // namespace robe

#endif

#ifdef ROBE_ISA
namespace robe {
namespace ROBE_ISA {

// The rules, on n neighbouring slots. Arithmetic in S, state and weights stored as T.
template <class T>
ROBE_INLINE void apply(const Update& update, int64_t n, const Sum<T>* __restrict__ sums, T* __restrict__ weight,
                       T* __restrict__ first, T* __restrict__ second) {
  using S = Sum<T>;
  const S rate = static_cast<S>(update.options[0]), decay = static_cast<S>(update.options[1]);
  const S x = static_cast<S>(update.options[2]), y = static_cast<S>(update.options[3]);
  const S z = static_cast<S>(update.options[4]);
  switch (update.rule) {
    case Rule::sgd:  // x: momentum
      if (x == S{0}) {
        for (int64_t i = 0; i < n; ++i) {
          const S w = static_cast<S>(weight[i]);
          weight[i] = static_cast<T>(w - rate * (sums[i] + decay * w));
        }
      } else {
        for (int64_t i = 0; i < n; ++i) {
          const S w = static_cast<S>(weight[i]);
          const S velocity = x * static_cast<S>(first[i]) + (sums[i] + decay * w);
          first[i] = static_cast<T>(velocity);
          weight[i] = static_cast<T>(w - rate * velocity);
        }
      }
      break;
    case Rule::adagrad:  // x: eps
      for (int64_t i = 0; i < n; ++i) {
        const S w = static_cast<S>(weight[i]), g = sums[i] + decay * w;
        const S total = static_cast<S>(first[i]) + g * g;
        first[i] = static_cast<T>(total);
        weight[i] = static_cast<T>(w - rate * g / (std::sqrt(total) + x));
      }
      break;
    case Rule::adam:  // x, y: betas; z: eps. rate and eps hold the bias corrections.
      for (int64_t i = 0; i < n; ++i) {
        const S w = static_cast<S>(weight[i]), g = sums[i] + decay * w;
        const S mean = x * static_cast<S>(first[i]) + (S{1} - x) * g;
        const S square = y * static_cast<S>(second[i]) + (S{1} - y) * g * g;
        first[i] = static_cast<T>(mean);
        second[i] = static_cast<T>(square);
        weight[i] = static_cast<T>(w - rate * mean / (std::sqrt(square) + z));
      }
  }
}

// Sums the records of a segment, and calls each(from, to) for each run of slots that they touch, in rising order. The
// scratch holds sums and a bit for each slot; all are zero between calls.
template <class T, class Each>
ROBE_INLINE void each_touched_run(const Segments& segments, int64_t segment, void* scratch, Each each) {
  int64_t n;
  const auto* const records = records_of<T>(segments, segment, n);
  if (!n) return;
  const int64_t size = int64_t{1} << segments.shift, words = size / 64;
  Sum<T>* const sums = static_cast<Sum<T>*>(scratch);
  uint64_t* const touched = reinterpret_cast<uint64_t*>(sums + size);
  sum_records<T>(records, n, sums);
  int64_t first = words, last = 0;  // words of touched that hold bits
  for (int64_t r = 0; r < n; ++r) {
    int64_t bit = records[r].start;
    first = bit >> 6 < first ? bit >> 6 : first;
    last = (bit + records[r].length - 1) >> 6 > last ? (bit + records[r].length - 1) >> 6 : last;
    for (const int64_t stop = bit + records[r].length; bit < stop;) {
      const int64_t in_word = bit & 63, span = 64 - in_word < stop - bit ? 64 - in_word : stop - bit;
      touched[bit >> 6] |= (~uint64_t{0} >> (64 - span)) << in_word;
      bit += span;
    }
  }
  const auto end_run = [&](int64_t from, int64_t to) {
    each(from, to);
    for (int64_t i = from; i < to; ++i) sums[i] = 0;
  };
  int64_t run = -1;  // where the current run of touched slots began
  for (int64_t w = first; w <= last; ++w) {
    uint64_t bits = touched[w];
    touched[w] = 0;
    if (run >= 0 ? bits == ~uint64_t{0} : bits == 0) continue;
    for (int64_t bit = w * 64, stop = bit + 64; bit < stop;) {
      const uint64_t rest = (run >= 0 ? ~bits : bits) >> (bit & 63);
      if (!rest) break;
      bit += __builtin_ctzll(rest);
      if (run < 0) {
        run = bit;
      } else {
        end_run(run, bit);
        run = -1;
      }
    }
  }
  if (run >= 0) end_run(run, (last + 1) * 64);
}

void update(Dtype dtype, const Segments& segments, int64_t segment, void* scratch, void* weight, const Update& rule) {
  with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    const Sum<T>* const sums = static_cast<const Sum<T>*>(scratch);
    T* const weights = static_cast<T*>(weight) + (segment << segments.shift);
    T* state[2] = {static_cast<T*>(rule.state[0]), static_cast<T*>(rule.state[1])};
    for (T*& s : state)
      if (s) s += segment << segments.shift;
    each_touched_run<T>(segments, segment, scratch, [&](int64_t from, int64_t to) {
      apply<T>(rule, to - from, sums + from, weights + from, state[0] ? state[0] + from : nullptr,
               state[1] ? state[1] + from : nullptr);
    });
  });
}

int64_t sums(Dtype dtype, const Segments& segments, int64_t segment, void* scratch, int64_t* slots, void* values) {
  return with_dtype(dtype, [&](auto t) {
    using T = typename decltype(t)::type;
    int64_t n = 0;
    each_touched_run<T>(segments, segment, scratch, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i, ++n) {
        slots[n] = (segment << segments.shift) + i;
        static_cast<Sum<T>*>(values)[n] = static_cast<const Sum<T>*>(scratch)[i];
      }
    });
    return n;
  });
}

}  // namespace ROBE_ISA
}  // namespace robe
#endif
