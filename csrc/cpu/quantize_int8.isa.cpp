// ISA: scalar avx2 avx512
#include "pe/quantize_int8.h"

#include <math.h>

#include "simd/for_each_vec.h"
#include "simd/int8.h"

namespace pe::PE_ISA {
namespace {

// max |x| of a row, NaN where an element is not finite.
template <class T>
float abs_max(const T* x, int64_t n) {
  const VecF zero = set1(0.0f);
  VecF largest = zero, poison = zero;
  for_each_vec(n, [&](auto in, auto) {
    const VecF v = in(x);
    largest = max(largest, max(v, neg(v)));
    poison = add(poison, mul(v, zero));  // NaN for NaN and infinity, else zero
  });
  return max_lane(largest) + sum(poison);
}

template <class T>
void quantize_rows(const QuantizeInt8& a, int64_t row_begin, int64_t row_end) {
  const int64_t tail = a.num_cols % VecF::size, full = a.num_cols - tail;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_row_stride;
    int8_t* q = a.q + r * a.q_row_stride;
    const float largest = abs_max(x, a.num_cols);
    const bool usable = largest >= kQuantizeInt8Tiny;  // false for NaN
    a.scale[r] = usable ? largest / 127.0f : largest * 0.0f;
    if (!usable) {
      for (int64_t c = 0; c < a.num_cols; ++c) q[c] = 0;
      continue;
    }
    const VecF scale = set1(a.scale[r]);
    for (int64_t c = 0; c < full; c += VecF::size) store_int8(q + c, round(div(load(x + c), scale)));
    if (tail) store_int8(q + full, round(div(load(x + full, tail), scale)), tail);
  }
}

template <class T>
void dequantize_rows(const DequantizeInt8& a, int64_t row_begin, int64_t row_end) {
  const int64_t tail = a.num_cols % VecF::size, full = a.num_cols - tail;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const int8_t* q = a.q + r * a.q_row_stride;
    T* x = static_cast<T*>(a.x) + r * a.x_row_stride;
    const VecF scale = set1(a.scale[r]);
    for (int64_t c = 0; c < full; c += VecF::size) store(x + c, mul(load_int8(q + c), scale));
    if (tail) store(x + full, mul(load_int8(q + full, tail), scale), tail);
  }
}

void quantize(const QuantizeInt8& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? quantize_rows<float>(a, row_begin, row_end) : quantize_rows<bf16>(a, row_begin, row_end);
}
void dequantize(const DequantizeInt8& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? dequantize_rows<float>(a, row_begin, row_end) : dequantize_rows<bf16>(a, row_begin, row_end);
}

}  // namespace

constinit const QuantizeInt8Isa quantize_int8 = {quantize, dequantize};

}  // namespace pe::PE_ISA
