// matmul_w4a16 -- the product with low-bit block weights and float activations, for every format of block_weights.h (the
// name is that of the family), each weight at its exact value.
//
// Math       y[m,n] = sum_k x[m,k] * w[n,k]
// Shapes     x [M, K], y [M, N]: last dimension contiguous, row strides in elements; weight N x K, see block_weights.h
// Numerics   x and y f32 | bf16, each on its own; arithmetic in f32, one rounding at the store. With round_x, x is f32
//            that is rounded to bf16 first, and all that is said of bf16 x holds. With the code c = q - z, a scale group
//            of 32 (or 16) k with its d and m contributes
//              s = fma(c[31], x[31], ... fma(c[1], x[1], fma(c[0], x[0], 0)))      k ascending
//              total = fma(d, s, total)
//              with a minimum: total = fma(m', sum_x, total), m' = fma(z, d, m) rounded once (d*q + m = d*(q-z) + m')
//            level avx512_bf16, x bf16: each 16 k have a chain of their own, in the order 2 0, 3 1, 6 4, 7 5, ... 15 13,
//            and s of 32 k is the sum of its two; subnormal x and s count as zero (the pairs of VDPBF16PS)
//            level amx, x bf16: s is (the same chain over even k) + (that over odd k); subnormal x and s count as zero
//            groups ascending; sum_x of 16 x halves until one is left: x[0..7] + x[8..15], and so on; of 32 x likewise
// Writes     y is overwritten; it may not overlap x or the workspace
// Order      an element of y depends on its row of x and its row of w alone, and its bits are the same on every ISA
//            level, but for bf16 x on avx512_bf16 and amx
// Cost       M = 1 streams the packed weights once; large M is bound by the multipliers, 2*M*N*K flops
// Reference  pyengine/reference/matmul_w4a16.py
#pragma once
#include <cstdint>

#include "pe/block_weights.h"
#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

struct MatmulW4A16 {
  const void* x;
  BlockWeights weight;
  void* y;
  float* workspace;  // matmul_w4a16_workspace_floats of it, filled by `prepare`; nullptr where that is 0
  int64_t num_rows;  // M
  int64_t x_row_stride, y_row_stride;
  DType x_dtype, y_dtype;
  bool round_x = false;  // x_dtype f32 only

  bool x_is_bf16() const { return x_dtype == DType::bf16 || round_x; }
};

// The workspace holds x in f32 [M, K] where it is, or is rounded to, bf16, then sum_x where the format has a minimum:
// [M, K/32], or [M, K/16] after room for those, so that weights of several formats can share the workspace of one x.
static constexpr int64_t matmul_w4a16_workspace_floats(BlockFormat format, bool x_is_bf16, int64_t num_rows,
                                                       int64_t num_cols) {
  const int64_t num_groups = num_rows * (num_cols / kGroupSize);
  return (x_is_bf16 ? num_rows * num_cols : 0) +
         (has_min(format) ? num_groups * (scale_groups(format) == 1 ? 1 : 3) : 0);
}

void matmul_w4a16_cpu(const MatmulW4A16& args);  // brings its own workspace: args.workspace is not read
void matmul_w4a16_cuda(const MatmulW4A16& args, void* stream);

// Threads are the caller's business. Every row must be prepared before a tile reads it.
struct MatmulW4A16Isa {
  void (*prepare)(const MatmulW4A16& args, int64_t row_begin, int64_t row_end);
  // y of the rows and of 16 columns per panel.
  void (*tile)(const MatmulW4A16& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
PE_DECLARE_ISA_TABLE(MatmulW4A16Isa, matmul_w4a16);
const MatmulW4A16Isa& matmul_w4a16_isa();  // of the level in use

}  // namespace pe
