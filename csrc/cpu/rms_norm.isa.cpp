// ISA: scalar avx2 avx512
#include "pe/rms_norm.h"

#include <math.h>

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

template <class T>
void fwd_rows(const RmsNormFwd& a, int64_t row_begin, int64_t row_end) {
  const T* weight = static_cast<const T*>(a.weight);
  const VecF offset = set1(a.weight_offset);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* h = static_cast<const T*>(a.x) + r * a.x_row_stride;
    if (a.residual) {
      const T* x = h;
      const T* residual = static_cast<const T*>(a.residual) + r * a.residual_row_stride;
      T* sum_row = static_cast<T*>(a.h) + r * a.h_row_stride;
      for_each_vec(a.num_cols, [&](auto in, auto out) { out(sum_row, add(in(x), in(residual))); });
      h = sum_row;
    }
    VecF acc = set1(0.0f);  // lanes past the end load as zero, so they add nothing
    for_each_vec(a.num_cols, [&](auto in, auto) {
      const VecF v = in(h);
      acc = fma(v, v, acc);
    });
    const float rstd = 1.0f / sqrtf(sum(acc) / static_cast<float>(a.num_cols) + a.eps);
    if (a.rstd) a.rstd[r] = rstd;

    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    const VecF scale = set1(rstd);
    for_each_vec(a.num_cols, [&](auto in, auto out) { out(y, mul(mul(in(h), scale), add(in(weight), offset))); });
  }
}

template <class T>
void bwd_rows(const RmsNormBwd& a, int64_t row_begin, int64_t row_end, float* grad_weight_block) {
  const T* weight = static_cast<const T*>(a.weight);
  const VecF offset = set1(a.weight_offset), zero = set1(0.0f);
  for_each_vec(a.num_cols, [&](auto, auto out) { out(grad_weight_block, zero); });
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + r * a.grad_y_row_stride;
    const T* h = static_cast<const T*>(a.h) + r * a.h_row_stride;
    const T* grad_h_in = a.grad_h_in ? static_cast<const T*>(a.grad_h_in) + r * a.grad_h_in_row_stride : nullptr;
    T* grad_h = static_cast<T*>(a.grad_h) + r * a.grad_h_row_stride;

    const VecF rstd = set1(a.rstd[r]);
    VecF acc = zero;
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF gy = in(grad_y), x = in(h);
      acc = fma(mul(gy, add(in(weight), offset)), x, acc);
      const float* previous = grad_weight_block;
      out(grad_weight_block, fma(mul(gy, x), rstd, in(previous)));
    });
    const float mean = sum(acc) / static_cast<float>(a.num_cols);
    const VecF pull = set1(-a.rstd[r] * a.rstd[r] * mean);
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF g = mul(in(grad_y), add(in(weight), offset));
      VecF grad = mul(rstd, fma(in(h), pull, g));
      if (grad_h_in) grad = add(grad, in(grad_h_in));
      out(grad_h, grad);
    });
  }
}

template <class T>
void finish(const RmsNormBwd& a, const float* blocks, int64_t num_blocks) {
  T* grad_weight = static_cast<T*>(a.grad_weight);
  for_each_vec(a.num_cols, [&](auto in, auto out) {
    VecF acc = set1(0.0f);
    for (int64_t b = 0; b < num_blocks; ++b) acc = add(acc, in(blocks + b * a.num_cols));
    out(grad_weight, acc);
  });
}

void fwd(const RmsNormFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float>(a, row_begin, row_end) : fwd_rows<bf16>(a, row_begin, row_end);
}
void bwd(const RmsNormBwd& a, int64_t row_begin, int64_t row_end, float* block) {
  a.dtype == DType::f32 ? bwd_rows<float>(a, row_begin, row_end, block) : bwd_rows<bf16>(a, row_begin, row_end, block);
}
void bwd_finish(const RmsNormBwd& a, const float* blocks, int64_t num_blocks) {
  a.dtype == DType::f32 ? finish<float>(a, blocks, num_blocks) : finish<bf16>(a, blocks, num_blocks);
}

}  // namespace

constinit const RmsNormIsa rms_norm = {fwd, bwd, bwd_finish};

}  // namespace pe::PE_ISA
