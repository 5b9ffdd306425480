// ISA: scalar avx2 avx512
#include "pe/quantize_int8.h"

#include "simd/quantize_row.h"

namespace pe::PE_ISA {
namespace {

template <class T>
void quantize_rows(const QuantizeInt8& a, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r)
    a.scale[r] = quantize_row(static_cast<const T*>(a.x) + r * a.x_row_stride, a.num_cols, a.q + r * a.q_row_stride);
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
