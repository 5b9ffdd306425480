// Sums over a warp and over a block, in a fixed order.
#pragma once

namespace pe {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the sum.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kFullWarp, v, offset);
  return v;
}

// Every thread gets the sum. blockDim.x is a multiple of 32; `scratch` holds 32 floats. A caller that uses `scratch` again
// must synchronise first.
__device__ inline float block_sum(float v, float* scratch) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_sum(lane < static_cast<int>(blockDim.x) / kWarpSize ? scratch[lane] : 0.0f);
}

}  // namespace pe
