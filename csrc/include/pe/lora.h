// lora -- low-rank adapters of linear layers, another one per row of a batch.
//
// Math       u[m,j]  = scale * sum_k(x[m,k] * a[j,k])
//            y[m,n] += sum_j(u[m,j] * b[n,j])                    a, b and scale are those of the adapter of row m
// Backward   grad_u[m,j] = scale * sum_n(grad_y[m,n] * b[n,j])   products of pe/matmul.h; the gradient of y passes
//            grad_x[m,k] = sum_j(grad_u[m,j] * a[j,k])
//            grad_a[j,k] = sum_m(grad_u[m,j] * x[m,k])
//            grad_b[n,j] = sum_m(grad_y[m,n] * u[m,j])
// Shapes     x [M, K] and y [M, N]: unit column stride, row strides in elements; 1 <= rank <= kLoraMaxRank
//            a [rank, K] and b [N, rank], each packed by matmul_pack_cpu in its own dtype
//            rows: a segment is the rows of one adapter, wherever they lie; a row is in one segment of a call, or none
// Numerics   f32 | bf16 for x and y, f32 | bf16 for a and b; f32 arithmetic. u is rounded to f32 after its sum and after
//            scale; y is read as it is stored and rounded once, at the store
// Writes     y is added to (+=) in the rows of the segments; a row of no segment keeps its bits. y may not overlap x
// Order      each value is one fixed expression, whatever the other rows, segments, threads and split. u: K is cut at
//            multiples of kMatmulKBlock; a block is four chains of fused multiply-adds from 0, of the k that leave the
//            same remainder by four, with k ascending, added as (0 + 1) + (2 + 3); the block sums are added to 0 in
//            ascending order. y: one chain from 0 with j ascending, then added to y. The scalar level rounds the product
//            before the addition
// Cost       2*M*rank*(K + N) flops. Small M is bound by reading a and b once
// Reference  pyengine/reference/lora.py; Hu et al. 2021, arXiv:2106.09685
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"
#include "pe/matmul.h"

namespace pe {

constexpr int64_t kLoraMaxRank = 256;

// One segment: the rows of one adapter of one linear layer.
struct Lora {
  const void* x;
  void* y;
  const int32_t* rows;  // [num_rows], ascending; nullptr: row i is i
  const void* a;        // packed
  const void* b;        // packed
  float* u;             // [M, matmul_num_panels(rank) * kMatmulPanel]: written in the rows of the segment
  int64_t num_rows, depth, num_cols, rank;  // of the segment, K, N
  int64_t x_row_stride, y_row_stride, u_row_stride;
  float scale;
  DType dtype;  // of x and y
  DType a_dtype, b_dtype;
};

// Rows of a segment, and panels of a (shrink) or of b (expand), that one task takes.
struct LoraTile {
  int64_t row_begin, row_end, panel_begin, panel_end;
};

// The products, one after the other: u, then y. The tiles of all segments are numbered through: first [num_segments + 1]
// is filled with the number of the first tile of each, and of all.
enum class LoraProduct { shrink, expand };
void lora_number_tiles(const Lora* segments, int64_t num_segments, LoraProduct product, int64_t* first);
void lora_run_tiles(const Lora* segments, int64_t num_segments, LoraProduct product, const int64_t* first,
                    int64_t tile_begin, int64_t tile_end);

// Both products of all segments.
void lora_cpu(const Lora* segments, int64_t num_segments);

// What one ISA level provides. Threads are the caller's business; any split gives the same bits.
struct LoraIsa {
  // u of the tile. All of u of a row comes before any of its y.
  void (*shrink)(const Lora& args, const LoraTile& tile);
  void (*expand)(const Lora& args, const LoraTile& tile);
};
PE_DECLARE_ISA_TABLE(LoraIsa, lora);
const LoraIsa& lora_isa();  // of the level in use

}  // namespace pe
