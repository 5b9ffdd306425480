// The last step of matmul_w8a8.
#pragma once
#include "pe/matmul_w8a8.h"
#include "simd/for_each_vec.h"

namespace pe::PE_ISA {

template <class T>
static inline void store_columns_as(const MatmulW8A8& a, int64_t row, int64_t panel, const int32_t* raw) {
  float sums[kMatmulW8A8PanelRows];
  const uint32_t offset = 128u * static_cast<uint32_t>(a.x_sum[row]);
  for (int c = 0; c < kMatmulW8A8PanelRows; ++c)
    sums[c] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(raw[c]) - offset));
  const int64_t begin = panel * kMatmulW8A8PanelRows, left = a.n - begin;
  const float* w_scale = a.w_scale + begin;
  T* y = static_cast<T*>(a.y) + row * a.y_row_stride + begin;
  const VecF x_scale = set1(a.x_scale[row]);
  for_each_vec(left < kMatmulW8A8PanelRows ? left : kMatmulW8A8PanelRows, [&](auto in, auto out) {
    const float* exact = sums;
    out(y, mul(x_scale, mul(in(w_scale), in(exact))));
  });
}

// y[row] of the columns of a panel, whose raw[c] = sum_k x[k] * (w[c,k] + 128) modulo 2^32.
static inline void store_columns(const MatmulW8A8& a, int64_t row, int64_t panel, const int32_t* raw) {
  a.dtype == DType::f32 ? store_columns_as<float>(a, row, panel, raw) : store_columns_as<bf16>(a, row, panel, raw);
}

}  // namespace pe::PE_ISA
