// layer_norm -- normalisation to mean 0 and variance 1 over the last dimension, with an optional residual added first.
//
// Math       h[r,c]         = x[r,c] + residual[r,c]            (h = x without a residual)
//            mean[r]        = mean_c(h[r,c])
//            rstd[r]        = 1 / sqrt(mean_c((h[r,c] - mean[r])^2) + eps)
//            y[r,c]         = (h[r,c] - mean[r]) * rstd[r] * weight[c] + bias[c]      (bias = 0 without one)
// Backward   n[r,c]         = (h[r,c] - mean[r]) * rstd[r],  g[r,c] = grad_y[r,c] * weight[c]
//            grad_h[r,c]    = rstd[r] * (g[r,c] - mean_c(g[r,c]) - n[r,c] * mean_c(g[r,c] * n[r,c])) + grad_h_in[r,c]
//            grad_weight[c] = sum_r(grad_y[r,c] * n[r,c]),  grad_bias[c] = sum_r(grad_y[r,c])
// Shapes     x, residual, h, y, grad_y, grad_h_in, grad_h [R, C]: last dimension contiguous, row strides in elements
//            weight, bias, grad_weight, grad_bias [C] contiguous; mean, rstd [R] f32
// Numerics   f32 | bf16 in and out; sums and products in f32; the variance from differences to the mean, whose own mean
//            corrects the first; one rounding, at the store. h is rounded to its dtype before it is normalised, so that
//            y depends only on the h that is stored
// Writes     outputs are overwritten (=), never accumulated (+=); y may not overlap an input, except that without a
//            residual it may be x (one pointer, equal strides); h may be x or residual
// Order      same bits for any number of threads and rows on one ISA level: a row is one tree, the gradients of weight
//            and bias are summed over blocks of kLayerNormRowBlock rows in ascending order
// Cost       memory bound; forward moves (2*R*C + 2*C) * sizeof(dtype) bytes, with a residual (4*R*C + 2*C)
// Reference  pyengine/reference/layer_norm.py; Ba, Kiros & Hinton 2016, arXiv:1607.06450
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr int64_t kLayerNormRowBlock = 32;

struct LayerNormFwd {
  const void* x;
  const void* residual;  // nullptr: none
  const void* weight;
  const void* bias;  // nullptr: none
  void* h;           // nullptr without a residual
  void* y;
  float *mean, *rstd;  // nullptr when no backward will follow
  int64_t num_rows, num_cols;
  int64_t x_row_stride, residual_row_stride, h_row_stride, y_row_stride;
  float eps;
  DType dtype;  // of x, residual, weight, bias, h and y
};

struct LayerNormBwd {
  const void* grad_y;
  const void* grad_h_in;  // nullptr: h has no other use
  const void* h;
  const void* weight;
  const float *mean, *rstd;
  void* grad_h;
  void* grad_weight;
  void* grad_bias;  // nullptr: there is no bias
  int64_t num_rows, num_cols;
  int64_t grad_y_row_stride, grad_h_in_row_stride, h_row_stride, grad_h_row_stride;
  DType dtype;
};

void layer_norm_fwd_cpu(const LayerNormFwd& args);
void layer_norm_bwd_cpu(const LayerNormBwd& args);

// What one ISA level provides. Threads are the caller's business.
struct LayerNormIsa {
  void (*fwd)(const LayerNormFwd& args, int64_t row_begin, int64_t row_end);
  // Writes grad_h of the rows and overwrites grads_block [2, C] with their part of grad_weight and of grad_bias.
  void (*bwd)(const LayerNormBwd& args, int64_t row_begin, int64_t row_end, float* grads_block);
  // grad_weight and grad_bias = sums over blocks [num_blocks, 2, C], in ascending order.
  void (*bwd_finish)(const LayerNormBwd& args, const float* grads_blocks, int64_t num_blocks);
};
PE_DECLARE_ISA_TABLE(LayerNormIsa, layer_norm);
const LayerNormIsa& layer_norm_isa();  // of the level in use

}  // namespace pe
