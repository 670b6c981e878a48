// What several kernels share: sizes of the machine, integer division, reductions over a warp and over a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace isomerge {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

template <class Integer>
constexpr __host__ __device__ Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

struct Sum {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a + b;
  }
};

struct Max {
  template <class Real>
  __device__ Real operator()(Real a, Real b) const {
    return a > b ? a : b;
  }
};

// Over the 32 lanes, the same bits in each: every step combines the same two numbers in both partners.
template <class Combine, class Real>
__device__ __forceinline__ Real warp_reduce(Real value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = Combine{}(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

// Over a block of whole warps, the same bits in every thread; `scratch` holds one number per warp. Every thread must
// arrive. Begins and ends with a barrier, so `scratch` may be reused at once.
template <class Combine, class Real>
__device__ __forceinline__ Real block_reduce(Real value, Real* scratch) {
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int warps = blockDim.x * blockDim.y * blockDim.z / kWarp;
  value = warp_reduce<Combine>(value);
  __syncthreads();
  if (thread % kWarp == 0) scratch[thread / kWarp] = value;
  __syncthreads();
  Real result = scratch[0];
  for (int warp = 1; warp < warps; ++warp) result = Combine{}(result, scratch[warp]);
  __syncthreads();
  return result;
}

template <class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
  return warp_reduce<Sum>(value);
}

template <class Real>
__device__ __forceinline__ Real block_sum(Real value, Real* scratch) {
  return block_reduce<Sum>(value, scratch);
}

}  // namespace isomerge
