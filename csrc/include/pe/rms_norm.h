// rms_norm -- root mean square normalisation over the last dimension, with an optional residual added first.
//
// Math       h[r,c]         = x[r,c] + residual[r,c]            (h = x without a residual)
//            rstd[r]        = 1 / sqrt(mean_c(h[r,c]^2) + eps)
//            y[r,c]         = h[r,c] * rstd[r] * (weight[c] + weight_offset)
// Backward   g[r,c]         = grad_y[r,c] * (weight[c] + weight_offset)
//            grad_h[r,c]    = rstd[r] * (g[r,c] - h[r,c] * rstd[r]^2 * mean_c(g[r,c] * h[r,c])) + grad_h_in[r,c]
//            grad_weight[c] = sum_r(grad_y[r,c] * h[r,c] * rstd[r])
// Shapes     x, residual, h, y, grad_y, grad_h_in, grad_h [R, C]: last dimension contiguous, row strides in elements
//            weight, grad_weight [C] contiguous; rstd [R] f32
// Numerics   f32 | bf16 in and out; sums and products in f32; one rounding, at the store. h is rounded to its dtype
// before
//            it is normalised, so that y depends only on the h that is stored
// Writes     outputs are overwritten (=), never accumulated (+=); y may not overlap an input, except that without a
//            residual it may be x (one pointer, equal strides); h may be x or residual
// Order      same bits for any number of threads and rows on one ISA level: a row is one tree, grad_weight is summed
// over
//            blocks of kRmsNormRowBlock rows in ascending order
// Cost       memory bound; forward moves (2*R*C + C) * sizeof(dtype) bytes, with a residual (4*R*C + C)
// Reference  pyengine/reference/rms_norm.py; Zhang & Sennrich 2019, arXiv:1910.07467
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kRmsNormRowBlock = 64;

struct RmsNormFwd {
  const void* x;
  const void* residual;  // nullptr: none
  const void* weight;
  void* h;  // nullptr without a residual
  void* y;
  float* rstd;  // nullptr when no backward will follow
  int64_t num_rows, num_cols;
  int64_t x_row_stride, residual_row_stride, h_row_stride, y_row_stride;
  float eps, weight_offset;
  DType dtype;  // of x, residual, weight, h and y
};

struct RmsNormBwd {
  const void* grad_y;
  const void* grad_h_in;  // nullptr: h has no other use
  const void* h;
  const void* weight;
  const float* rstd;
  void* grad_h;
  void* grad_weight;
  int64_t num_rows, num_cols;
  int64_t grad_y_row_stride, grad_h_in_row_stride, h_row_stride, grad_h_row_stride;
  float weight_offset;
  DType dtype;
};

void rms_norm_fwd_cpu(const RmsNormFwd& args);
void rms_norm_bwd_cpu(const RmsNormBwd& args);
// Returns the cudaError_t of the launch.
int rms_norm_fwd_cuda(const RmsNormFwd& args, void* stream);

// What one ISA level provides. Threads are the caller's business.
struct RmsNormIsa {
  void (*fwd)(const RmsNormFwd& args, int64_t row_begin, int64_t row_end);
  // Writes grad_h of the rows and overwrites grad_weight_block [C] with their part of grad_weight.
  void (*bwd)(const RmsNormBwd& args, int64_t row_begin, int64_t row_end, float* grad_weight_block);
  // grad_weight = sum over blocks [num_blocks, C], in ascending order.
  void (*bwd_finish)(const RmsNormBwd& args, const float* grad_weight_blocks, int64_t num_blocks);
};
PE_DECLARE_ISA_TABLE(RmsNormIsa, rms_norm);
const RmsNormIsa& rms_norm_isa();  // of the level in use

}  // namespace pe
