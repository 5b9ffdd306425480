// gelu -- the Gaussian error linear unit, the activation of a feed-forward layer without a gate.
//
// Math       erf:  y[r,c] = x * P(x) with x = x[r,c] and P the cumulative normal distribution, (1 + erf(x / sqrt 2)) / 2
//            tanh: y[r,c] = x * s with s = 1 / (1 + exp(-z)), z = x * sqrt(8 / pi) * (1 + 0.044715 * x^2), which is
//                  x * (1 + tanh(z / 2)) / 2
// Backward   erf:  grad_x[r,c] = grad_y[r,c] * (P(x) + x * exp(-x^2 / 2) / sqrt(2 pi))
//            tanh: grad_x[r,c] = grad_y[r,c] * s * (1 + x * dz/dx * (1 - s))
// Shapes     x, y, grad_y, grad_x [R, C]: last dimension contiguous, row strides in elements
// Numerics   f32 | bf16 in and out; f32 arithmetic; exp within 2 ulp; the smaller of P(x) and 1 - P(x) within
//            (8 + x^2) * 2^-24 of itself; one rounding, at the store
// Writes     outputs are overwritten; y may be x; grad_x may be x or grad_y (one pointer, equal strides)
// Order      elementwise: same bits for any number of threads and rows on one ISA level
// Cost       memory bound; forward moves 2*R*C * sizeof(dtype) bytes, backward 3*R*C
// Reference  pyengine/reference/gelu.py; Hendrycks & Gimpel 2016, arXiv:1606.08415
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

enum class GeluForm : uint8_t { erf, tanh };

struct GeluFwd {
  const void* x;
  void* y;
  int64_t num_rows, num_cols;
  int64_t x_row_stride, y_row_stride;
  GeluForm form;
  DType dtype;
};

struct GeluBwd {
  const void* grad_y;
  const void* x;
  void* grad_x;
  int64_t num_rows, num_cols;
  int64_t grad_y_row_stride, x_row_stride, grad_x_row_stride;
  GeluForm form;
  DType dtype;
};

void gelu_fwd_cpu(const GeluFwd& args);
void gelu_bwd_cpu(const GeluBwd& args);

// What one ISA level provides. Threads are the caller's business.
struct GeluIsa {
  void (*fwd)(const GeluFwd& args, int64_t row_begin, int64_t row_end);
  void (*bwd)(const GeluBwd& args, int64_t row_begin, int64_t row_end);
};
PE_DECLARE_ISA_TABLE(GeluIsa, gelu);
const GeluIsa& gelu_isa();  // of the level in use

}  // namespace pe
