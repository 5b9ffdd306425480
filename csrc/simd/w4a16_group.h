// What every way of matmul_w4a16 shares: the sums of x, and the float arithmetic around the sum of a scale group.
#pragma once
#include "pe/matmul_w4a16.h"
#include "simd/panel_codes.h"

namespace pe::PE_ISA {

// sum_x [M, number of scale groups]; formats with a minimum only.
struct GroupSums {
  float* first;
  int64_t num_groups;
};

static inline GroupSums group_sums(const MatmulW4A16& a) {
  const int64_t num_cols = a.weight.num_cols;
  const int64_t copied = a.x_is_bf16() ? a.num_rows * num_cols : 0;
  if (scale_groups(a.weight.format) == 1) return {a.workspace + copied, num_cols / kGroupSize};
  return {a.workspace + copied + a.num_rows * (num_cols / kGroupSize), num_cols / kGroupSize * 2};
}

// Fills the row's sums from its x, f32 or bf16.
template <class T>
static inline void store_group_sums(const MatmulW4A16& a, int64_t row, const T* x) {
  const auto half = [](const T* p) { return make_panel([&](int i) { return load(p + i * VecF::size); }); };
  const GroupSums sums = group_sums(a);
  float* out = sums.first + row * sums.num_groups;
  if (scale_groups(a.weight.format) == 1)
    for (int64_t g = 0; g < sums.num_groups; ++g, x += kGroupSize) out[g] = sum(add(half(x), half(x + kPanelRows)));
  else
    for (int64_t g = 0; g < sums.num_groups; ++g, x += kGroupSize / 2) out[g] = sum(half(x));
}

using W4A16Scales = GroupScales;  // m: of the codes q - z

template <BlockFormat format>
[[gnu::always_inline]] static inline W4A16Scales load_w4a16_scales(const uint8_t* panel, int64_t g, int part) {
  W4A16Scales scales = load_group_scales<format>(panel, g, part);
  if constexpr (has_min(format))
    scales.m = fma(panel_set1(static_cast<float>(middle_code(format))), scales.d, scales.m);
  return scales;
}

// total of a row with scale group i added, whose codes gave s.
template <bool has_min>
[[gnu::always_inline]] static inline PanelF add_w4a16_group(const W4A16Scales& w, const PanelF& s,
                                                            const GroupSums& sum_x, int64_t row, int64_t i,
                                                            const PanelF& total) {
  const PanelF next = fma(w.d, s, total);
  if constexpr (has_min) return fma(w.m, panel_set1(sum_x.first[row * sum_x.num_groups + i]), next);
  return next;
}

}  // namespace pe::PE_ISA
