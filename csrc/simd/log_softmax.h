// log(sum(exp)) of a row of logits in blocks of fixed size, in pe::PE_ISA: the shape of the sum depends on the position
// of a logit in its row only, so a row may come in one piece or block by block.
#pragma once
#include <math.h>

#include "pe/linear_cross_entropy.h"
#include "simd/vec.h"

namespace pe::PE_ISA {

static inline float exp_of(float x) { return max_lane(exp(set1(x))); }

// One vector of logits; -inf past the end, which adds nothing.
static inline VecF load_logits(const float* p, int64_t n) {
  if (n >= VecF::size) return load(p);
  alignas(64) float padded[VecF::size];
  store(padded, set1(-INFINITY));
  store(padded, load(p, n), n);
  return load(padded);
}

// num <= kLseBlock. The block is shifted by its maximum, or by 0 if that is infinite.
static inline LogSumExp lse_block(const float* logits, int64_t num) {
  VecF top = set1(-INFINITY);
  for (int64_t i = 0; i < num; i += VecF::size) top = max(load_logits(logits + i, num - i), top);  // a NaN is skipped
  const float block_max = max_lane(top);
  const VecF shift = set1(__builtin_isfinite(block_max) ? block_max : 0.0f);
  VecF total = set1(0.0f);
  for (int64_t i = 0; i < num; i += VecF::size)
    total = add(total, exp(sub(load_logits(logits + i, num - i), shift)));  // and stays here
  return {block_max, sum(total)};
}

static inline LogSumExp lse_merge(LogSumExp a, LogSumExp b) {
  const float top = a.max > b.max ? a.max : b.max;
  // -inf: that sum is 0. +inf: so is the result. Either may be NaN.
  if (!__builtin_isfinite(a.max) || !__builtin_isfinite(b.max)) return {top, a.sum + b.sum};
  return {top, a.sum * exp_of(a.max - top) + b.sum * exp_of(b.max - top)};
}

static inline float lse_finish(LogSumExp total) { return total.max + logf(total.sum); }

static inline float lse_row(const float* logits, int64_t num) {
  LogSumExp total = {-INFINITY, 0.0f};
  for (int64_t i = 0; i < num; i += kLseBlock)
    total = lse_merge(total, lse_block(logits + i, num - i < kLseBlock ? num - i : kLseBlock));
  return lse_finish(total);
}

}  // namespace pe::PE_ISA
