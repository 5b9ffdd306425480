// swiglu -- the gated activation of a feed-forward layer: silu(gate) * up, or gelu(gate) * up.
//
// Math       s = 1 / (1 + exp(-z)),  y[r,c] = g * s * up[r,c] with g = gate[r,c] and
//            silu: z = g;  gelu_tanh: z = g * sqrt(8 / pi) * (1 + 0.044715 * g^2), the tanh form of gelu, because
//            (1 + tanh(z / 2)) / 2 = s
// Backward   grad_up[r,c]   = grad_y[r,c] * g * s
//            grad_gate[r,c] = grad_y[r,c] * up[r,c] * s * (1 + g * dz/dg * (1 - s)), s recomputed from gate
// Shapes     gate, up, y, grad_y, grad_gate, grad_up [R, F]: last dimension contiguous, row strides in elements, so
//            that gate and up may be the halves of one [R, 2F] product, and their gradients the halves of one
// Numerics   f32 | bf16 in and out; f32 arithmetic, exp within 2 ulp; one rounding, at the store
// Writes     outputs are overwritten; y may be gate or up; grad_gate and grad_up may be gate, up or grad_y (one
//            pointer, equal strides)
// Order      elementwise: same bits for any number of threads and rows on one ISA level
// Cost       memory bound; forward moves 3*R*F * sizeof(dtype) bytes, backward 5*R*F
// Reference  pyengine/reference/swiglu.py; Shazeer 2020, arXiv:2002.05202; Hendrycks & Gimpel 2016, arXiv:1606.08415
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

enum class GateActivation : uint8_t { silu, gelu_tanh };

struct SwigluFwd {
  const void* gate;
  const void* up;
  void* y;
  int64_t num_rows, num_cols;
  int64_t gate_row_stride, up_row_stride, y_row_stride;
  GateActivation activation;
  DType dtype;
};

struct SwigluBwd {
  const void* grad_y;
  const void* gate;
  const void* up;
  void* grad_gate;
  void* grad_up;
  int64_t num_rows, num_cols;
  int64_t grad_y_row_stride, gate_row_stride, up_row_stride, grad_gate_row_stride, grad_up_row_stride;
  GateActivation activation;
  DType dtype;
};

void swiglu_fwd_cpu(const SwigluFwd& args);
void swiglu_bwd_cpu(const SwigluBwd& args);
void swiglu_fwd_cuda(const SwigluFwd& args, void* stream);

// What one ISA level provides. Threads are the caller's business.
struct SwigluIsa {
  void (*fwd)(const SwigluFwd& args, int64_t row_begin, int64_t row_end);
  void (*bwd)(const SwigluBwd& args, int64_t row_begin, int64_t row_end);
};
PE_DECLARE_ISA_TABLE(SwigluIsa, swiglu);
const SwigluIsa& swiglu_isa();  // of the level in use

}  // namespace pe
