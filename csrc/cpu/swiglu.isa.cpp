// ISA: scalar avx2 avx512
#include "pe/swiglu.h"

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <class T>
void fwd_rows(const SwigluFwd& a, int64_t row_begin, int64_t row_end) {
  const VecF one = set1(1.0f);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* gate = static_cast<const T*>(a.gate) + r * a.gate_row_stride;
    const T* up = static_cast<const T*>(a.up) + r * a.up_row_stride;
    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF g = in(gate);
      out(y, mul(div(g, add(one, exp(neg(g)))), in(up)));
    });
  }
}

template <class T>
void bwd_rows(const SwigluBwd& a, int64_t row_begin, int64_t row_end) {
  const VecF one = set1(1.0f);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + r * a.grad_y_row_stride;
    const T* gate = static_cast<const T*>(a.gate) + r * a.gate_row_stride;
    const T* up = static_cast<const T*>(a.up) + r * a.up_row_stride;
    T* grad_gate = static_cast<T*>(a.grad_gate) + r * a.grad_gate_row_stride;
    T* grad_up = static_cast<T*>(a.grad_up) + r * a.grad_up_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF gy = in(grad_y), g = in(gate), u = in(up);
      const VecF s = sigmoid(g);
      out(grad_up, mul(gy, mul(g, s)));
      out(grad_gate, mul(mul(gy, u), mul(s, fma(g, sub(one, s), one))));
    });
  }
}

void fwd(const SwigluFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float>(a, row_begin, row_end) : fwd_rows<bf16>(a, row_begin, row_end);
}
void bwd(const SwigluBwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? bwd_rows<float>(a, row_begin, row_end) : bwd_rows<bf16>(a, row_begin, row_end);
}

}  // namespace

constinit const SwigluIsa swiglu = {fwd, bwd};

}  // namespace pe::PE_ISA
