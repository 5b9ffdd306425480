// quantize_int8 -- rows to int8 with one symmetric f32 scale each, and back.
//
// Math       scale[r] = max_c |x[r,c]| / 127,  q[r,c] = round(x[r,c] / scale[r]), half to even
//            x[r,c]   = q[r,c] * scale[r]
// Shapes     x, q [R, C]: last dimension contiguous, row strides in elements; scale [R] f32 contiguous; R, C >= 0
// Numerics   x f32 | bf16, f32 arithmetic; q in [-127, 127], so -128 never occurs and -q always fits. The error of an
//            element is at most scale / 2 and one rounding. A row with max |x| < kQuantizeInt8Tiny (a zero row too)
//            gets scale 0 and q 0: below it, scale would be subnormal. A row with NaN or infinity gets scale NaN and
//            q 0, and so becomes NaN when it is dequantised
// Writes     outputs are overwritten and may not overlap inputs
// Order      same bits for any number of threads and rows, and on every ISA level: a maximum has no order, the rest is
//            elementwise
// Cost       memory bound; quantise reads x twice (the second time from cache) and writes R*C bytes
// Reference  pyengine/reference/quantize_int8.py; Dettmers et al. 2022, arXiv:2208.07339, vector-wise quantisation
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

constexpr float kQuantizeInt8Tiny = 0x1p-119f;

struct QuantizeInt8 {
  const void* x;
  int8_t* q;
  float* scale;
  int64_t num_rows, num_cols;
  int64_t x_row_stride, q_row_stride;
  DType dtype;  // of x
};

struct DequantizeInt8 {
  const int8_t* q;
  const float* scale;
  void* x;
  int64_t num_rows, num_cols;
  int64_t q_row_stride, x_row_stride;
  DType dtype;  // of x
};

void quantize_int8_cpu(const QuantizeInt8& args);
void dequantize_int8_cpu(const DequantizeInt8& args);
void quantize_int8_cuda(const QuantizeInt8& args, void* stream);

// What one ISA level provides. Threads are the caller's business.
struct QuantizeInt8Isa {
  void (*quantize)(const QuantizeInt8& args, int64_t row_begin, int64_t row_end);
  void (*dequantize)(const DequantizeInt8& args, int64_t row_begin, int64_t row_end);
};
PE_DECLARE_ISA_TABLE(QuantizeInt8Isa, quantize_int8);
const QuantizeInt8Isa& quantize_int8_isa();  // of the level in use

}  // namespace pe
