// What the forms of gelu are made of.
#pragma once

#include "simd/vec.h"

namespace pe::PE_ISA {

// The tanh form of gelu is x * sigmoid(z): z, and x * dz/dx.
struct GeluTanhLogit {
  static constexpr float kLinear = 1.5957691216057308f;  // sqrt(8 / pi)
  static constexpr float kCubic = 0.07135481282991068f;  // 0.044715 * sqrt(8 / pi)
  // Far past where the sigmoid is 0 or 1, and far below where a cube overflows. A NaN, as second operand, passes.
  static VecF clamped(VecF x) { return max(set1(-64.0f), min(set1(64.0f), x)); }
  static VecF value(VecF x) {
    const VecF c = clamped(x);
    return mul(c, fma(mul(c, c), set1(kCubic), set1(kLinear)));
  }
  static VecF times_derivative(VecF x) {
    const VecF c = clamped(x);
    return mul(c, fma(mul(c, c), set1(3.0f * kCubic), set1(kLinear)));
  }
};

// The normal distribution at x: its cumulative probability, and e^(-x^2 / 2).
struct Normal {
  VecF cumulative, bell;
};

// The tail beyond |x| is e^(-x^2 / 2) times a smooth function, here a polynomial in t = 1 / (1 + 0.38 |x|) without a
// constant term, minimax to 9e-9 for |x| <= 14, past which the bell is 0.
static inline Normal normal(VecF x) {
  const VecF a = max(x, neg(x)), one = set1(1.0f);
  const VecF t = div(one, fma(a, set1(0.38f), one));
  VecF p = set1(0.024289479f);
  p = fma(p, t, set1(-0.149234124f));
  p = fma(p, t, set1(0.368613056f));
  p = fma(p, t, set1(-0.434536331f));
  p = fma(p, t, set1(0.21024547f));
  p = fma(p, t, set1(-0.05593675f));
  p = fma(p, t, set1(0.106478141f));
  p = fma(p, t, set1(0.126634687f));
  p = fma(p, t, set1(0.151857742f));
  p = fma(p, t, set1(0.151588625f));
  const VecF bell = exp(mul(mul(x, x), set1(-0.5f)));
  const VecF tail = mul(mul(p, t), bell);
  return {select_gt(x, set1(0.0f), sub(one, tail), tail), bell};
}

}  // namespace pe::PE_ISA
