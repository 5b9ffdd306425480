// One block per row; contract in csrc/include/pe/rms_norm.h.
#include <cuda_runtime.h>

#include "common/convert.cuh"
#include "common/reduce.cuh"
#include "pe/rms_norm.h"

namespace pe {
namespace {

template <class T>
__global__ void rms_norm_fwd_kernel(RmsNormFwd a) {
  const int64_t r = blockIdx.x;
  const T* x = static_cast<const T*>(a.x) + r * a.x_row_stride;
  const T* weight = static_cast<const T*>(a.weight);
  T* y = static_cast<T*>(a.y) + r * a.y_row_stride;
  const T* residual = a.residual ? static_cast<const T*>(a.residual) + r * a.residual_row_stride : nullptr;
  T* h = a.residual ? static_cast<T*>(a.h) + r * a.h_row_stride : nullptr;

  float sum_sq = 0.0f;
  for (int64_t c = threadIdx.x; c < a.num_cols; c += blockDim.x) {
    float v = to_float(x[c]);
    if (residual) {
      h[c] = from_float<T>(v + to_float(residual[c]));
      v = to_float(h[c]);
    }
    sum_sq += v * v;
  }
  __shared__ float scratch[kWarpSize];
  sum_sq = block_sum(sum_sq, scratch);

  const float rstd = 1.0f / sqrtf(sum_sq / static_cast<float>(a.num_cols) + a.eps);
  if (threadIdx.x == 0 && a.rstd) a.rstd[r] = rstd;
  // Each thread reads back only what it wrote itself.
  const T* normed = residual ? h : x;
  for (int64_t c = threadIdx.x; c < a.num_cols; c += blockDim.x)
    y[c] = from_float<T>(to_float(normed[c]) * rstd * (to_float(weight[c]) + a.weight_offset));
}

}  // namespace

int rms_norm_fwd_cuda(const RmsNormFwd& args, void* stream) {
  if (args.num_rows == 0) return cudaSuccess;  // a grid of 0 blocks is a launch error
  const int num_threads = args.num_cols >= 4096 ? 512 : 128;
  const auto kernel = args.dtype == DType::f32 ? rms_norm_fwd_kernel<float> : rms_norm_fwd_kernel<bf16>;
  kernel<<<static_cast<unsigned>(args.num_rows), num_threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cudaGetLastError();
}

}  // namespace pe
