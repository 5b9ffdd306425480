// The last step of a product with packed block weights.
#pragma once
#include "pe/dtype.h"
#include "simd/panel.h"

namespace pe::PE_ISA {

// y[row, 16 * panel ...] = total, cut at the last column. Args has y, y_row_stride, y_dtype and weight.
template <class Args>
static inline void store_panel(const Args& a, int64_t row, int64_t panel, const PanelF& total) {
  const int64_t first = row * a.y_row_stride + panel * kPanelRows, left = a.weight.num_rows - panel * kPanelRows;
  const auto store_to = [&](auto* y) {
    left >= kPanelRows ? panel_store(y + first, total) : panel_store(y + first, total, left);
  };
  a.y_dtype == DType::f32 ? store_to(static_cast<float*>(a.y)) : store_to(static_cast<bf16*>(a.y));
}

}  // namespace pe::PE_ISA
