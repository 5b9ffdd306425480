// ISA: scalar avx2 avx512
#include "pe/swiglu.h"

#include "simd/for_each_vec.h"
#include "simd/gelu.h"

namespace pe::PE_ISA {
namespace {

// z of the contract, its derivative, and 1 - s.
template <GateActivation A>
struct Logit;

template <>
struct Logit<GateActivation::silu> {
  static VecF value(VecF g) { return g; }
  static VecF times_derivative(VecF g) { return g; }  // g * dz/dg
  static VecF complement(VecF, VecF s) { return sub(set1(1.0f), s); }
};

template <>
struct Logit<GateActivation::gelu_tanh> : GeluTanhLogit {
  // dz/dg grows, so 1 - s needs all its bits where s is nearly 1.
  static VecF complement(VecF z, VecF) { return sigmoid(neg(z)); }
};

template <class T, GateActivation A>
void fwd_rows(const SwigluFwd& a, int64_t row_begin, int64_t row_end) {
  const VecF one = set1(1.0f);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* gate = static_cast<const T*>(a.gate) + r * a.gate_row_stride;
    const T* up = static_cast<const T*>(a.up) + r * a.up_row_stride;
    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF g = in(gate);
      out(y, mul(div(g, add(one, exp(neg(Logit<A>::value(g))))), in(up)));
    });
  }
}

template <class T, GateActivation A>
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
      const VecF z = Logit<A>::value(g), s = sigmoid(z);
      out(grad_up, mul(gy, mul(g, s)));
      out(grad_gate, mul(mul(gy, u), mul(s, fma(Logit<A>::times_derivative(g), Logit<A>::complement(z, s), one))));
    });
  }
}

template <GateActivation A>
void fwd_of(const SwigluFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float, A>(a, row_begin, row_end) : fwd_rows<bf16, A>(a, row_begin, row_end);
}
template <GateActivation A>
void bwd_of(const SwigluBwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? bwd_rows<float, A>(a, row_begin, row_end) : bwd_rows<bf16, A>(a, row_begin, row_end);
}

void fwd(const SwigluFwd& a, int64_t row_begin, int64_t row_end) {
  a.activation == GateActivation::silu ? fwd_of<GateActivation::silu>(a, row_begin, row_end)
                                       : fwd_of<GateActivation::gelu_tanh>(a, row_begin, row_end);
}
void bwd(const SwigluBwd& a, int64_t row_begin, int64_t row_end) {
  a.activation == GateActivation::silu ? bwd_of<GateActivation::silu>(a, row_begin, row_end)
                                       : bwd_of<GateActivation::gelu_tanh>(a, row_begin, row_end);
}

}  // namespace

constinit const SwigluIsa swiglu = {fwd, bwd};

}  // namespace pe::PE_ISA
