// One row to int8 with one symmetric scale; the numerics of pe/quantize_int8.h.
#pragma once
#include "pe/quantize_int8.h"
#include "simd/for_each_vec.h"
#include "simd/int8.h"

namespace pe::PE_ISA {

// max |x|, NaN where an element is not finite.
template <class T>
static inline float finite_abs_max(const T* x, int64_t n) {
  const VecF zero = set1(0.0f);
  VecF largest = zero, poison = zero;
  for_each_vec(n, [&](auto in, auto) {
    const VecF v = in(x);
    largest = max(largest, max(v, neg(v)));
    poison = add(poison, mul(v, zero));  // NaN for NaN and infinity, else zero
  });
  return max_lane(largest) + sum(poison);
}

// Fills q and returns the scale.
template <class T>
static inline float quantize_row(const T* x, int64_t n, int8_t* q) {
  const int64_t tail = n % VecF::size, full = n - tail;
  const float largest = finite_abs_max(x, n);
  if (!(largest >= kQuantizeInt8Tiny)) {  // NaN too
    for (int64_t c = 0; c < n; ++c) q[c] = 0;
    return largest * 0.0f;
  }
  const float scale = largest / 127.0f;
  const VecF divisor = set1(scale);
  for (int64_t c = 0; c < full; c += VecF::size) store_int8(q + c, round(div(load(x + c), divisor)));
  if (tail) store_int8(q + full, round(div(load(x + full, tail), divisor)), tail);
  return scale;
}

}  // namespace pe::PE_ISA
