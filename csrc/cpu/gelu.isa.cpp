// ISA: scalar avx2 avx512
#include "simd/gelu.h"

#include "pe/gelu.h"
#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <GeluForm F>
struct Form;

template <>
struct Form<GeluForm::erf> {
  static VecF value(VecF x) { return mul(x, normal(x).cumulative); }
  static VecF derivative(VecF x) {
    const Normal at_x = normal(x);
    const VecF slope = mul(mul(x, set1(0.3989422804014327f)), at_x.bell);  // 1 / sqrt(2 pi)
    // Past this the bell is 0, and an infinite x would make it NaN.
    return select_gt(mul(x, x), set1(208.0f), at_x.cumulative, add(at_x.cumulative, slope));
  }
};

template <>
struct Form<GeluForm::tanh> {
  static VecF value(VecF x) { return div(x, add(set1(1.0f), exp(neg(GeluTanhLogit::value(x))))); }
  static VecF derivative(VecF x) {
    // dz/dx grows, so 1 - s needs all its bits where s is nearly 1.
    const VecF z = GeluTanhLogit::value(x);
    return mul(sigmoid(z), fma(GeluTanhLogit::times_derivative(x), sigmoid(neg(z)), set1(1.0f)));
  }
};

template <class T, GeluForm F>
void fwd_rows(const GeluFwd& a, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* x = static_cast<const T*>(a.x) + r * a.x_row_stride;
    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) { out(y, Form<F>::value(in(x))); });
  }
}

template <class T, GeluForm F>
void bwd_rows(const GeluBwd& a, int64_t row_begin, int64_t row_end) {
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + r * a.grad_y_row_stride;
    const T* x = static_cast<const T*>(a.x) + r * a.x_row_stride;
    T* grad_x = static_cast<T*>(a.grad_x) + r * a.grad_x_row_stride;
    for_each_vec(a.num_cols, [&](auto in, auto out) { out(grad_x, mul(in(grad_y), Form<F>::derivative(in(x)))); });
  }
}

template <GeluForm F>
void fwd_of(const GeluFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float, F>(a, row_begin, row_end) : fwd_rows<bf16, F>(a, row_begin, row_end);
}
template <GeluForm F>
void bwd_of(const GeluBwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? bwd_rows<float, F>(a, row_begin, row_end) : bwd_rows<bf16, F>(a, row_begin, row_end);
}

void fwd(const GeluFwd& a, int64_t row_begin, int64_t row_end) {
  a.form == GeluForm::erf ? fwd_of<GeluForm::erf>(a, row_begin, row_end)
                          : fwd_of<GeluForm::tanh>(a, row_begin, row_end);
}
void bwd(const GeluBwd& a, int64_t row_begin, int64_t row_end) {
  a.form == GeluForm::erf ? bwd_of<GeluForm::erf>(a, row_begin, row_end)
                          : bwd_of<GeluForm::tanh>(a, row_begin, row_end);
}

}  // namespace

constinit const GeluIsa gelu = {fwd, bwd};

}  // namespace pe::PE_ISA
