// The maximum and the log-sum-exp of a row of f32 logits, in one fixed order of operations.
#pragma once
#include <math.h>

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {

constexpr int64_t kLogSumExpBlock = 4096;

static inline VecF lane_indices() {
  static constexpr float kIota[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(sizeof kIota / sizeof kIota[0] >= VecF::size);
  return load(kIota);
}

// The largest of n >= 1 values; a NaN may or may not be seen.
static inline float row_max(const float* x, int64_t n) {
  float best = x[0];
  if (n < VecF::size) {
    for (int64_t i = 1; i < n; ++i) best = x[i] > best ? x[i] : best;
    return best;
  }
  VecF acc = load(x);
  for (int64_t i = VecF::size; i + VecF::size <= n; i += VecF::size) acc = max(acc, load(x + i));
  return max_lane(max(acc, load(x + n - VecF::size)));  // the last vector overlaps the one before it
}

// log(sum(exp(logits))): the maximum; then exp(logit - maximum) added lane by lane over blocks of kLogSumExpBlock, the
// lanes of a block by sum(), the blocks in ascending order in f32; the logarithm in double. NaN where a logit is NaN
// or +inf, -inf where all are.
static inline float row_lse(const float* logits, int64_t n) {
  const float largest = row_max(logits, n);
  if (largest == -INFINITY) {
    for (int64_t i = 0; i < n; ++i)
      if (logits[i] != logits[i]) return logits[i];
    return largest;
  }
  const VecF shift = set1(largest), zero = set1(0.0f);
  float total = 0.0f;
  for (int64_t begin = 0; begin < n; begin += kLogSumExpBlock) {
    const int64_t end = begin + kLogSumExpBlock < n ? begin + kLogSumExpBlock : n;
    const int64_t tail = (end - begin) % VecF::size;
    VecF acc = zero;
    for (int64_t i = begin; i < end - tail; i += VecF::size) acc = add(acc, exp(sub(load(logits + i), shift)));
    if (tail) {
      const VecF e = exp(sub(load(logits + end - tail, tail), shift));
      acc = add(acc, select_gt(set1(static_cast<float>(tail)), lane_indices(), e, zero));
    }
    total += sum(acc);
  }
  return static_cast<float>(static_cast<double>(largest) + log(static_cast<double>(total)));
}

}  // namespace pe::PE_ISA
