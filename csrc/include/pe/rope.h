// rope -- rotary position embedding with half-split pairs: element i of a head is rotated with element i + D/2.
//
// Math       c = cos[positions[t],i], s = sin[positions[t],i] (s = -sin[...] when inverse), 0 <= i < D/2
//            y[t,h,i]       = x[t,h,i] * c - x[t,h,i+D/2] * s
//            y[t,h,i+D/2]   = x[t,h,i+D/2] * c + x[t,h,i] * s
// Backward   the same rotation of grad_y by the opposite angle: inverse flipped; also where the tables are scaled
// Tables     rope_table: cos[p,i], sin[p,i] = scale * cos, sin(p * inv_freq[i]), in double, rounded once to f32
// Shapes     x, y [T, H, D]: D even, last dimension contiguous, token and head strides in elements
//            cos, sin [P, D/2] f32 contiguous; positions [T] int32, each in [0, P); inv_freq [D/2] f64
// Numerics   f32 | bf16 in and out; two products and one sum in f32, no fused multiply-add; one rounding, at the store
// Writes     y is overwritten; it may be x itself (same pointer and strides), else it may not overlap x
// Order      elementwise: same bits for any number of threads and tokens, and on every ISA level
// Cost       memory bound; moves 2*T*H*D * sizeof(dtype) bytes and the rows of the tables in use
// Reference  pyengine/reference/rope.py; Su et al. 2021, arXiv:2104.09864
#pragma once
#include <cstdint>

#include "pe/dtype.h"
#include "pe/isa.h"

namespace pe {

struct Rope {
  const void* x;
  const float* cos;
  const float* sin;
  const int32_t* positions;
  void* y;
  int64_t num_tokens, num_heads, head_dim, num_positions;
  int64_t x_token_stride, x_head_stride, y_token_stride, y_head_stride;
  bool inverse;
  DType dtype;  // of x and y
};

// Throws ArgumentError for the first position outside the tables, before anything is written.
void rope_cpu(const Rope& args);
void rope_cuda(const Rope& args, void* stream);

// cos_out, sin_out [num_positions, num_freqs].
void rope_table(const double* inv_freq, int64_t num_freqs, int64_t num_positions, double scale, float* cos_out,
                float* sin_out);

// What one ISA level provides. Positions are valid; threads are the caller's business.
struct RopeIsa {
  void (*rotate)(const Rope& args, int64_t token_begin, int64_t token_end);
};
PE_DECLARE_ISA_TABLE(RopeIsa, rope);
const RopeIsa& rope_isa();  // of the level in use

}  // namespace pe
