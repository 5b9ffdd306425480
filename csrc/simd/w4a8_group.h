// What every way of matmul_w4a8 shares: rows of quantised activations, and the float arithmetic of a scale group.
#pragma once
#include "pe/matmul_w4a8.h"
#include "simd/panel_dot.h"

namespace pe::PE_ISA {

struct QuantizedRow {
  const int8_t* values;
  const float* scales;
  const int32_t *sums, *first_sums;

  // sum(xq) over scale group `part` of group g.
  template <int parts>
  [[gnu::always_inline]] int32_t sum(int64_t g, int part) const {
    if constexpr (parts == 1) return sums[g];
    return part == 0 ? first_sums[g] : sums[g] - first_sums[g];
  }
};

static inline QuantizedRow quantized_row(const MatmulW4A8& a, int64_t row) {
  const int64_t num_groups = a.weight.num_cols / kGroupSize;
  const uint8_t* values = a.quantized + row * quantized_row_bytes(a.weight.num_cols);
  const float* scales = reinterpret_cast<const float*>(values + a.weight.num_cols);
  const int32_t* sums = reinterpret_cast<const int32_t*>(scales + num_groups);
  return {reinterpret_cast<const int8_t*>(values), scales, sums, sums + num_groups};
}

using W4A8Scales = GroupScales;

// The packed code of a zero weight; formats with a minimum have m for that.
static constexpr int32_t zero_code(BlockFormat format) { return has_min(format) ? 0 : middle_code(format); }

// total + the contribution of a scale group, whose integer sums are i: x_scale is dx of its group, x_sum its sum(xq).
template <bool has_min>
[[gnu::always_inline]] static inline PanelF add_w4a8_group(const W4A8Scales& w, const PanelI& i, float x_scale,
                                                           int32_t x_sum, const PanelF& total) {
  const PanelF scale = panel_set1(x_scale);
  const PanelF next = fma(to_float(i), mul(w.d, scale), total);
  if constexpr (has_min) return fma(mul(w.m, scale), panel_set1(static_cast<float>(x_sum)), next);
  return next;
}

}  // namespace pe::PE_ISA
