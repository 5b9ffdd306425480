// The maximum of a row of f32, and the numbers of the lanes.
#pragma once
#include <stdint.h>

#include "simd/vec.h"

namespace pe::PE_ISA {

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

}  // namespace pe::PE_ISA
