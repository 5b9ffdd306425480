// matmul_w4a8 -- the product with low-bit block weights and activations rounded to int8 in groups of 32, for every
// format of block_weights.h (the name is that of the family), each weight at its exact value.
//
// Math       y[m,n] = sum_k xq[m,k] * dx[m,k/32] * w[n,k]
//            a group of x with the largest magnitude a:  dx = a / 127,  xq = round_half_even(x * (127 / a))
//            a < 2^-100: dx = 0, xq = 0;  a NaN or an infinity in the group: dx = NaN, xq = 0, so y[m] is NaN
// Shapes     x [M, K], y [M, N]: last dimension contiguous, row strides in elements; weight N x K, see block_weights.h
// Layout     a quantised row is int8 xq [K], then f32 dx [K/32], then int32 sum(xq) [K/32], then the int32 sums of the
//            first 16 of each 32 [K/32]; rows follow without gaps, the first one aligned to 4 bytes
// Numerics   x and y f32 | bf16, each on its own. Per scale group (of 32 or 16 k, with its d and m), ascending:
//              i = sum_k (q - z) * xq                       exact in int32; formats with a minimum: z = 0
//              total = fma(float(i), d * dx, total)
//              with a minimum: total = fma(m * dx, float(sum(xq)), total)
//            one rounding at the store. Against matmul_w4a16 each x moves by at most dx / 2 (and one f32 rounding)
// Writes     y is overwritten; it may not overlap x or the quantised rows
// Order      an element of y depends on its row of x and its row of w alone, and its bits are the same on every ISA
//            level
// Cost       M = 1 streams the packed weights once; large M is bound by integer dot products, 2*M*N*K operations
// Reference  pyengine/reference/matmul_w4a8.py
#pragma once
#include <cstdint>

#include "pe/block_weights.h"
#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

struct MatmulW4A8 {
  const void* x;
  BlockWeights weight;
  void* y;
  uint8_t* quantized;  // [M] rows of quantized_row_bytes(K), filled by `quantize_rows`
  int64_t num_rows;    // M
  int64_t x_row_stride, y_row_stride;
  DType x_dtype, y_dtype;
};

static constexpr int64_t quantized_row_bytes(int64_t num_cols) {
  return num_cols + num_cols / kGroupSize * static_cast<int64_t>(sizeof(float) + 2 * sizeof(int32_t));
}

void matmul_w4a8_cpu(const MatmulW4A8& args);  // brings its own quantised rows: args.quantized is not read
void matmul_w4a8_cuda(const MatmulW4A8& args, void* stream);

// Threads are the caller's business. Every row must be quantised before a tile reads it.
struct MatmulW4A8Isa {
  void (*quantize_rows)(const MatmulW4A8& args, int64_t row_begin, int64_t row_end);
  // y of the rows and of 16 columns per panel; reads args.quantized, not args.x.
  void (*tile)(const MatmulW4A8& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
PE_DECLARE_ISA_TABLE(MatmulW4A8Isa, matmul_w4a8);
const MatmulW4A8Isa& matmul_w4a8_isa();  // of the level in use

}  // namespace pe
