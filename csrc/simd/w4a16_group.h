// What every way of matmul_w4a16 shares: the sums of x, and the float arithmetic around the sum of a group.
#pragma once
#include "pe/matmul_w4a16.h"
#include "simd/panel.h"

namespace pe::PE_ISA {

// sum_x [M, K/32]; q4_1 only.
struct GroupSums {
  float* first;
  int64_t num_groups;
};

static inline GroupSums group_sums(const MatmulW4A16& a) {
  const int64_t copied = a.x_is_bf16() ? a.num_rows * a.weight.num_cols : 0;
  return {a.workspace + copied, a.weight.num_cols / kBlockSize};
}

// Fills the row's sums from its x, f32 or bf16.
template <class T>
static inline void store_group_sums(const GroupSums& sums, int64_t row, const T* x) {
  const auto half = [](const T* p) { return make_panel([&](int i) { return load(p + i * VecF::size); }); };
  for (int64_t g = 0; g < sums.num_groups; ++g, x += kBlockSize)
    sums.first[row * sums.num_groups + g] = sum(add(half(x), half(x + kPanelRows)));
}

struct W4A16Scales {
  PanelF d, m;  // m: q4_1 only, of the codes q - 8
};

template <BlockFormat format>
[[gnu::always_inline]] static inline W4A16Scales load_w4a16_scales(const uint8_t* group) {
  W4A16Scales scales;
  scales.d = load_f16(group + packed_code_bytes(format));
  if constexpr (format == BlockFormat::q4_1)
    scales.m = fma(panel_set1(8.0f), scales.d, load_f16(group + packed_code_bytes(format) + kScaleBytes));
  return scales;
}

// total of a row with group g added, whose codes gave s.
template <BlockFormat format>
[[gnu::always_inline]] static inline PanelF add_w4a16_group(const W4A16Scales& w, const PanelF& s,
                                                            const GroupSums& sum_x, int64_t row, int64_t g,
                                                            const PanelF& total) {
  const PanelF next = fma(w.d, s, total);
  if constexpr (format == BlockFormat::q4_1) return fma(w.m, panel_set1(sum_x.first[row * sum_x.num_groups + g]), next);
  return next;
}

}  // namespace pe::PE_ISA
