// ISA: scalar avx2 avx512
#include "pe/adamw.h"

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <class P, class G, class S>
void update_range(const Adamw& a, const AdamwFactors& f, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(a.param) + begin;
  float* master = a.master ? a.master + begin : nullptr;
  const G* grad = static_cast<const G*>(a.grad) + begin;
  S* exp_avg = static_cast<S*>(a.exp_avg) + begin;
  S* exp_avg_sq = static_cast<S*>(a.exp_avg_sq) + begin;
  const VecF decay = set1(f.decay), beta1 = set1(f.beta1), rest1 = set1(f.rest1), beta2 = set1(f.beta2),
             rest2 = set1(f.rest2), step_size = set1(f.step_size), correction2 = set1(f.correction2), eps = set1(f.eps),
             grad_scale = set1(f.grad_scale);
  for_each_vec(end - begin, [&](auto in, auto out) {
    const VecF g = mul(in(grad), grad_scale);
    const VecF m = add(mul(beta1, in(exp_avg)), mul(rest1, g));
    const VecF v = add(mul(beta2, in(exp_avg_sq)), mul(rest2, mul(g, g)));
    const VecF update = div(m, add(mul(sqrt(v), correction2), eps));
    const VecF p = sub(mul(master ? in(master) : in(param), decay), mul(step_size, update));
    out(exp_avg, m);
    out(exp_avg_sq, v);
    if (master) out(master, p);
    out(param, p);
  });
}

template <class P, class G>
void update_by_state(const Adamw& a, const AdamwFactors& f, int64_t begin, int64_t end) {
  a.state_dtype == DType::f32 ? update_range<P, G, float>(a, f, begin, end)
                              : update_range<P, G, bf16>(a, f, begin, end);
}

template <class P>
void update_by_grad(const Adamw& a, const AdamwFactors& f, int64_t begin, int64_t end) {
  a.grad_dtype == DType::f32 ? update_by_state<P, float>(a, f, begin, end) : update_by_state<P, bf16>(a, f, begin, end);
}

void update(const Adamw& a, const AdamwFactors& f, int64_t begin, int64_t end) {
  a.param_dtype == DType::f32 ? update_by_grad<float>(a, f, begin, end) : update_by_grad<bf16>(a, f, begin, end);
}

template <class T>
float sum_range(const SumOfSquares& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x) + begin;
  VecF acc = set1(0.0f);
  for_each_vec(end - begin, [&](auto in, auto) {
    const VecF v = in(x);
    acc = fma(v, v, acc);
  });
  return sum(acc);
}

float sum_of_squares(const SumOfSquares& a, int64_t begin, int64_t end) {
  return a.dtype == DType::f32 ? sum_range<float>(a, begin, end) : sum_range<bf16>(a, begin, end);
}

}  // namespace

constinit const AdamwIsa adamw = {update, sum_of_squares};

}  // namespace pe::PE_ISA
