// matmul -- matrix product with transposed weights, the shape of every linear layer.
//
// Math       y[m,n] = sum_k(x[m,k] * w[n,k])                    (accumulate: y[m,n] += the same)
// Backward   grad_x[m,k] = sum_n(grad_y[m,n] * w[n,k])          the same product on w transposed
//            grad_w[n,k] = sum_m(grad_y[m,n] * x[m,k])          the same product on grad_y and x transposed
// Shapes     x [M, K] and w [N, K]: any strides, in elements; y [M, N]: unit column stride
//            packed [ceil(N / kMatmulPanel)][K][kMatmulPanel]: panels of rows of w, column by column, padded with 0
// Numerics   f32 | bf16 for each of x, w and y; f32 arithmetic; one rounding, at the store
// Writes     y is overwritten (=), or added to (+=) with accumulate, which takes y in f32; y may not overlap an input
// Order      each y[m,n] is one fixed expression, whatever M, N, threads and split: K is cut at multiples of
//            kMatmulKBlock; a block is one chain of fused multiply-adds from 0 with k ascending; the block sums are
//            added to 0 (accumulate: to y) in ascending order. The scalar level rounds the product before the addition.
//            Level avx512_bf16, x and w bf16: a block is one chain in the order 1 0, 3 2, 5 4, ... of its k; subnormal
//            operands and sums count as zero (the pairs of VDPBF16PS)
//            Level amx, x and w bf16: K is cut at multiples of 32; a block is (the chain of its even k) + (that of its
//            odd k); subnormal operands, sums and y count as zero
// Cost       2*M*N*K flops. Small M is bound by reading packed once, large M by the multipliers. matmul_unpacked_cpu
//            holds at most kMatmulScratchBytes, or one panel, of packed weights at a time
// Reference  pyengine/reference/matmul.py; Goto & van de Geijn 2008, doi:10.1145/1356052.1356053
#pragma once
#include <cstddef>
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kMatmulPanel = 16;
constexpr int64_t kMatmulKBlock = 256;
constexpr size_t kMatmulScratchBytes = size_t{4} << 20;

struct MatmulPack {
  const void* w;
  int64_t w_row_stride, w_col_stride;
  int64_t num_rows, num_cols;  // N, K
  DType w_dtype, packed_dtype;
  void* packed;
};

struct Matmul {
  const void* x;
  const void* packed;
  void* y;
  int64_t num_rows, num_cols, depth;  // M, N, K
  int64_t x_row_stride, y_row_stride;
  DType x_dtype, w_dtype, y_dtype;  // w_dtype: of packed
  int64_t x_col_stride = 1;
  bool accumulate = false;
};

int64_t matmul_num_panels(int64_t num_rows);
// Size of the packed form of w [num_rows, num_cols]. Throws ArgumentError where it does not fit 63 bits.
size_t matmul_packed_bytes(int64_t num_rows, int64_t num_cols, DType packed_dtype);

void matmul_pack_cpu(const MatmulPack& args);
void matmul_cpu(const Matmul& args);
// Packs `w` into scratch memory as it goes; `args.packed` and `w.packed` are not used.
void matmul_unpacked_cpu(const Matmul& args, const MatmulPack& w);

// What one ISA level provides. Threads are the caller's business.
struct MatmulIsa {
  void (*pack)(const MatmulPack& args, int64_t panel_begin, int64_t panel_end);
  // y of the rows and of the columns that the panels hold. Any split gives the same bits; a call reads its panels once
  // for up to 6 rows, and keeps them in the second-level cache for more.
  void (*tile)(const Matmul& args, int64_t row_begin, int64_t row_end, int64_t panel_begin, int64_t panel_end);
};
PE_DECLARE_ISA_TABLE(MatmulIsa, matmul);
const MatmulIsa& matmul_isa();  // of the level in use

}  // namespace pe
