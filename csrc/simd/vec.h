// The f32 vector of the ISA being compiled, in pe::PE_ISA. A partial load fills the missing lanes with zero and touches
// no byte past the last element; a partial store writes no byte past it. f32 and bf16 memory, f32 arithmetic.
//
//   VecF::size                     lanes
//   load(p) load(p, n)             n elements, 0 < n < size; p is float* or bf16*
//   store(p, v) store(p, v, n)     to bf16 with round to nearest even, NaN kept
//   set1 add sub mul div fma neg max min sqrt select_gt
//   sum(v) max_lane(v)             a fixed tree over the lanes
//   exp(v)                         simd/vec_math.h
#pragma once

#if defined(__AVX512F__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_scalar.h"
#endif

#include "simd/vec_math.h"
