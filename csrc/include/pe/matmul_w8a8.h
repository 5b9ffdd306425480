// matmul_w8a8 -- activations times weights, both int8: one scale per row of activations, one per row of weights.
//
// Math       y[m,n] = x_scale[m] * w_scale[n] * sum_k(x[m,k] * w[n,k])
// Packing    packed[n / 16][k / 4][n % 16][k % 4] = w[n,k] + 128 as u8; rows past N and columns past K hold 128. One
//            64-byte line is what one step of any level reads. The 128 is taken out again exactly: packed rows give
//            sum_k(x * w) + 128 * sum_k(x)
// Shapes     x [M, K] int8, last dimension contiguous, row stride in elements; w [N, K] int8 contiguous in [-127, 127];
//            packed [ceil(N/16), ceil(K/4), 16, 4] u8 contiguous; x_scale, x_sum [M], w_scale [N] contiguous; y [M, N],
//            last dimension contiguous; K <= kMatmulW8A8MaxK
// Numerics   the sum is exact: integers, int32, all of K (|sum| <= 128 * 127 * 2^17 < 2^31; what is added on the way
//            wraps and unwraps). y = x_scale * (w_scale * f32(sum)): three roundings in f32, one more to bf16
// Writes     y is overwritten and may not overlap an input
// Order      integers have no order: same bits for any M, number of threads and tile, and on every ISA level
// Cost       M small: bound by the stream of N*K bytes of weights; M large: M*N*K multiply-adds, 64 per instruction
//            with VNNI, 32 with AVX-512, 16 with AVX2, up to 16,384 with AMX
// Reference  pyengine/reference/matmul_w8a8.py; Xiao et al. 2023 (SmoothQuant), arXiv:2211.10438, per-token and
//            per-channel scales
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kMatmulW8A8MaxK = 1 << 17;
constexpr int64_t kMatmulW8A8PanelRows = 16;
constexpr int64_t kMatmulW8A8Step = 4;  // elements of K in one line

struct MatmulW8A8 {
  const int8_t* x;
  const float* x_scale;
  const int32_t* x_sum;  // sum_k x[m,k], by x_sum of the table
  const uint8_t* packed;
  const float* w_scale;
  void* y;
  int64_t m, n, k;
  int64_t x_row_stride, y_row_stride;
  DType dtype;  // of y
};

constexpr int64_t matmul_w8a8_num_panels(int64_t n) { return (n + kMatmulW8A8PanelRows - 1) / kMatmulW8A8PanelRows; }
constexpr int64_t matmul_w8a8_num_steps(int64_t k) { return (k + kMatmulW8A8Step - 1) / kMatmulW8A8Step; }

// x_sum of `args` is not read: it is computed here.
void matmul_w8a8_cpu(const MatmulW8A8& args);
// Throws ArgumentError where w holds -128.
void matmul_w8a8_pack_cpu(const int8_t* w, int64_t n, int64_t k, uint8_t* packed);

// What one ISA level provides. Threads are the caller's business.
struct MatmulW8A8Isa {
  void (*x_sum)(const int8_t* x, int64_t x_row_stride, int64_t k, int64_t row_begin, int64_t row_end, int32_t* out);
  // Rows [row_begin, row_end) of y, columns of panels [panel_begin, panel_end).
  void (*tile)(const MatmulW8A8& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
PE_DECLARE_ISA_TABLE(MatmulW8A8Isa, matmul_w8a8);
const MatmulW8A8Isa& matmul_w8a8_isa();  // of the level in use

}  // namespace pe
