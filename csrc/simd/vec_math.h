// Elementary functions on VecF, written once in terms of its operations.
#pragma once

namespace pe::PE_ISA {

// e^x within 2 ulp; 0 below -104, inf above 88.73, NaN stays NaN.
// Cody-Waite reduction x = n ln 2 + r, |r| <= ln 2 / 2, and the Cephes expf polynomial.
static inline VecF exp(VecF x) {
  // min and max return their second operand when one is NaN, so NaN passes through both.
  const VecF clamped = max(set1(-104.0f), min(set1(89.0f), x));
  const VecF n = round(mul(clamped, set1(1.44269504f)));
  VecF r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  VecF p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, mul(r, r), add(r, set1(1.0f)));
  return scale_by_power_of_2(p, n);
}

// 1 / (1 + e^-x).
static inline VecF sigmoid(VecF x) { return div(set1(1.0f), add(set1(1.0f), exp(neg(x)))); }

}  // namespace pe::PE_ISA
