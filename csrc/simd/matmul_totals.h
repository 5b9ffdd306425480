// Running totals of a block of y in panels, where a kernel keeps them in tiles or rows of its own.
#pragma once
#include "pe/matmul.h"
#include "simd/vec.h"

namespace pe::PE_ISA {

// Rows [row, row + num_rows), panels [panel, panel + num_panels).
struct MatmulBlock {
  int64_t row, num_rows, panel, num_panels;
};

// Calls body(y, total, num) for the columns of each panel and row; total_of(r, p) is where 16 totals lie.
template <class Y, class TotalOf, class Body>
static inline void for_each_run(const Matmul& a, const MatmulBlock& block, const TotalOf& total_of, const Body& body) {
  for (int64_t r = 0; r < block.num_rows; ++r)
    for (int64_t p = 0; p < block.num_panels; ++p) {
      const int64_t col = (block.panel + p) * kMatmulPanel, left = a.num_cols - col;
      body(static_cast<Y*>(a.y) + (block.row + r) * a.y_row_stride + col, total_of(r, p),
           left < kMatmulPanel ? left : kMatmulPanel);
    }
}

// Totals start at zero, or at y.
template <class TotalOf>
static inline void load_y(const Matmul& a, const MatmulBlock& block, const TotalOf& total_of) {
  if (!a.accumulate) return;
  for_each_run<float>(a, block, total_of, [](const float* y, float* total, int64_t n) {
    store(total, n == kMatmulPanel ? load(y) : load(y, n));
  });
}

template <class TotalOf>
static inline void store_y(const Matmul& a, const MatmulBlock& block, const TotalOf& total_of) {
  const auto put = [](auto* y, const float* total, int64_t n) {
    n == kMatmulPanel ? store(y, load(total)) : store(y, load(total), n);
  };
  a.y_dtype == DType::f32 ? for_each_run<float>(a, block, total_of, put) : for_each_run<bf16>(a, block, total_of, put);
}

}  // namespace pe::PE_ISA
