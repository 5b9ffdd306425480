// What every way of matmul_w4a8 shares: rows of quantised activations, and the float arithmetic of a group.
#pragma once
#include "pe/matmul_w4a8.h"
#include "simd/panel_dot.h"

namespace pe::PE_ISA {

struct QuantizedRow {
  const int8_t* values;
  const float* scales;
  const int32_t* sums;
};

static inline QuantizedRow quantized_row(const MatmulW4A8& a, int64_t row) {
  const uint8_t* values = a.quantized + row * quantized_row_bytes(a.weight.num_cols);
  const uint8_t* scales = values + a.weight.num_cols;
  const uint8_t* sums = scales + a.weight.num_cols / kBlockSize * static_cast<int64_t>(sizeof(float));
  return {reinterpret_cast<const int8_t*>(values), reinterpret_cast<const float*>(scales),
          reinterpret_cast<const int32_t*>(sums)};
}

struct W4A8Scales {
  PanelF d, m;  // m: q4_1 only
};

template <BlockFormat format>
[[gnu::always_inline]] static inline W4A8Scales load_w4a8_scales(const uint8_t* group) {
  W4A8Scales scales;
  scales.d = load_f16(group + packed_code_bytes(format));
  if constexpr (format == BlockFormat::q4_1) scales.m = load_f16(group + packed_code_bytes(format) + kScaleBytes);
  return scales;
}

// The packed code of a zero weight; q4_1 has m for that.
static constexpr int32_t zero_code(BlockFormat format) {
  return format == BlockFormat::q4_0 ? 8 : format == BlockFormat::q8_0 ? 128 : 0;
}

// total + the contribution of group g, whose integer sums are i.
template <BlockFormat format>
[[gnu::always_inline]] static inline PanelF add_w4a8_group(const W4A8Scales& w, const PanelI& i, const QuantizedRow& x,
                                                           int64_t g, const PanelF& total) {
  const PanelF scale = panel_set1(x.scales[g]);
  const PanelF next = fma(to_float(i), mul(w.d, scale), total);
  if constexpr (format == BlockFormat::q4_1)
    return fma(mul(w.m, scale), panel_set1(static_cast<float>(x.sums[g])), next);
  return next;
}

}  // namespace pe::PE_ISA
