// op_name -- FILL: what it is, in one line.
//
// Math       FILL: y[r,c] = x[r,c]
// Backward   FILL: grad_x[r,c] = grad_y[r,c]
// Shapes     FILL: x, y, grad_y, grad_x [R, C]: last dimension contiguous, row strides in elements
// Numerics   FILL: f32 | bf16 in and out; f32 arithmetic; one rounding, at the store
// Writes     FILL: outputs are overwritten (=), never accumulated (+=); y may not overlap x
// Order      FILL: elementwise: same bits for any number of threads and rows, and on every ISA level
// Cost       FILL: memory bound; moves 2*R*C * sizeof(dtype) bytes
// Reference  FILL: pyengine/reference/op_name.py; the paper
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

struct OpNameFwd {
  const void* x;
  void* y;
  int64_t num_rows, num_cols;
  int64_t x_row_stride, y_row_stride;
  DType dtype;  // of x and y
};

struct OpNameBwd {
  const void* grad_y;
  void* grad_x;
  int64_t num_rows, num_cols;
  int64_t grad_y_row_stride, grad_x_row_stride;
  DType dtype;  // of grad_y and grad_x
};

void op_name_fwd_cpu(const OpNameFwd& args);
void op_name_bwd_cpu(const OpNameBwd& args);

// What one ISA level provides. Threads are the caller's business.
struct OpNameIsa {
  void (*fwd)(const OpNameFwd& args, int64_t row_begin, int64_t row_end);
  void (*bwd)(const OpNameBwd& args, int64_t row_begin, int64_t row_end);
};
PE_DECLARE_ISA_TABLE(OpNameIsa, op_name);
const OpNameIsa& op_name_isa();  // of the level in use

}  // namespace pe
