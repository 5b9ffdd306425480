// ISA: scalar avx2 avx512
#include "pe/layer_norm.h"

#include <math.h>

#include "simd/for_each_vec.h"

namespace pe::PE_ISA {
namespace {

struct Moments {
  float mean, variance;
};

// The mean twice: what the differences to the first leave is far smaller than its rounding error.
template <class T>
Moments moments(const T* row, int64_t n) {
  const int64_t tail = n % VecF::size, full = n - tail;
  VecF acc = set1(0.0f);  // lanes past the end load as zero, so they add nothing
  for_each_vec(n, [&](auto in, auto) { acc = add(acc, in(row)); });
  const float mean = sum(acc) / static_cast<float>(n);
  const VecF center = set1(mean);
  VecF sum_d = set1(0.0f), sum_dd = sum_d;
  const auto put = [&](VecF d) {
    sum_d = add(sum_d, d);
    sum_dd = fma(d, d, sum_dd);
  };
  for (int64_t i = 0; i < full; i += VecF::size) put(sub(load(row + i), center));
  if (tail) {
    float means[VecF::size];  // whose lanes past the end are zero too once loaded
    store(means, center);
    put(sub(load(row + full, tail), load(static_cast<const float*>(means), tail)));
  }
  const float rest = sum(sum_d) / static_cast<float>(n);
  return {mean + rest, sum(sum_dd) / static_cast<float>(n) - rest * rest};
}

template <class T>
void fwd_rows(const LayerNormFwd& a, int64_t row_begin, int64_t row_end) {
  const T* weight = static_cast<const T*>(a.weight);
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* h = static_cast<const T*>(a.x) + r * a.x_row_stride;
    if (a.residual) {
      const T* x = h;
      const T* residual = static_cast<const T*>(a.residual) + r * a.residual_row_stride;
      T* sum_row = static_cast<T*>(a.h) + r * a.h_row_stride;
      for_each_vec(a.num_cols, [&](auto in, auto out) { out(sum_row, add(in(x), in(residual))); });
      h = sum_row;
    }
    const auto [mean, variance] = moments(h, a.num_cols);
    const float rstd = 1.0f / sqrtf(variance + a.eps);
    if (a.mean) a.mean[r] = mean;
    if (a.rstd) a.rstd[r] = rstd;

    T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
    const VecF center = set1(mean), scale = set1(rstd);
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF n = mul(sub(in(h), center), scale);
      out(y, bias ? fma(n, in(weight), in(bias)) : mul(n, in(weight)));
    });
  }
}

template <class T>
void bwd_rows(const LayerNormBwd& a, int64_t row_begin, int64_t row_end, float* grads_block) {
  const T* weight = static_cast<const T*>(a.weight);
  const VecF zero = set1(0.0f);
  float *grad_weight = grads_block, *grad_bias = grads_block + a.num_cols;
  for_each_vec(2 * a.num_cols, [&](auto, auto out) { out(grads_block, zero); });
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* grad_y = static_cast<const T*>(a.grad_y) + r * a.grad_y_row_stride;
    const T* h = static_cast<const T*>(a.h) + r * a.h_row_stride;
    const T* grad_h_in = a.grad_h_in ? static_cast<const T*>(a.grad_h_in) + r * a.grad_h_in_row_stride : nullptr;
    T* grad_h = static_cast<T*>(a.grad_h) + r * a.grad_h_row_stride;

    const VecF center = set1(a.mean[r]), rstd = set1(a.rstd[r]);
    VecF sum_g = zero, sum_gn = zero;
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF gy = in(grad_y), n = mul(sub(in(h), center), rstd), g = mul(gy, in(weight));
      sum_g = add(sum_g, g);
      sum_gn = fma(g, n, sum_gn);
      const float *weight_so_far = grad_weight, *bias_so_far = grad_bias;
      out(grad_weight, fma(gy, n, in(weight_so_far)));
      out(grad_bias, add(in(bias_so_far), gy));
    });
    const auto num_cols = static_cast<float>(a.num_cols);
    const VecF mean_g = set1(sum(sum_g) / num_cols), pull = set1(-sum(sum_gn) / num_cols);
    for_each_vec(a.num_cols, [&](auto in, auto out) {
      const VecF n = mul(sub(in(h), center), rstd), g = mul(in(grad_y), in(weight));
      VecF grad = mul(rstd, fma(n, pull, sub(g, mean_g)));
      if (grad_h_in) grad = add(grad, in(grad_h_in));
      out(grad_h, grad);
    });
  }
}

// out [n] = the sum of rows `stride` apart, in ascending order.
template <class T>
void sum_blocks(const float* blocks, int64_t num_blocks, int64_t stride, int64_t n, T* sums) {
  for_each_vec(n, [&](auto in, auto out) {
    VecF acc = set1(0.0f);
    for (int64_t b = 0; b < num_blocks; ++b) acc = add(acc, in(blocks + b * stride));
    out(sums, acc);
  });
}

template <class T>
void finish(const LayerNormBwd& a, const float* blocks, int64_t num_blocks) {
  sum_blocks(blocks, num_blocks, 2 * a.num_cols, a.num_cols, static_cast<T*>(a.grad_weight));
  if (a.grad_bias)
    sum_blocks(blocks + a.num_cols, num_blocks, 2 * a.num_cols, a.num_cols, static_cast<T*>(a.grad_bias));
}

void fwd(const LayerNormFwd& a, int64_t row_begin, int64_t row_end) {
  a.dtype == DType::f32 ? fwd_rows<float>(a, row_begin, row_end) : fwd_rows<bf16>(a, row_begin, row_end);
}
void bwd(const LayerNormBwd& a, int64_t row_begin, int64_t row_end, float* block) {
  a.dtype == DType::f32 ? bwd_rows<float>(a, row_begin, row_end, block) : bwd_rows<bf16>(a, row_begin, row_end, block);
}
void bwd_finish(const LayerNormBwd& a, const float* blocks, int64_t num_blocks) {
  a.dtype == DType::f32 ? finish<float>(a, blocks, num_blocks) : finish<bf16>(a, blocks, num_blocks);
}

}  // namespace

constinit const LayerNormIsa layer_norm = {fwd, bwd, bwd_finish};

}  // namespace pe::PE_ISA
