// Stands in front of CUDA's header of this name (-I order) and lets g++ compile the kernels of csrc/ for a CPU:
//
//   g++ -std=c++20 -x c++ -Itests/cuda_on_cpu -Icsrc csrc/<kernel>.cu tests/cuda_on_cpu/*.cpp        (tests/emulate.py)
//
// What kernels may use:
//   keywords         __global__ __device__ __host__ __forceinline__ __launch_bounds__ __align__; not __shared__, but
//                    dynamic_shared() of launch.cuh
//   indices          threadIdx blockIdx blockDim gridDim warpSize
//   rendezvous       __syncthreads() __syncthreads_or(p) __syncwarp(mask), __shfl_sync and its _up, _down, _xor forms,
//                    __ballot_sync __any_sync __all_sync; everything else warp-wide is built on meet_warp (fibers.h)
//   asynchronous     defer, commit, wait (fibers.h), on which ptx.cuh of this directory builds cp.async
//   numbers          the C functions, min and max, rsqrt, the vector types and conversions below; cuda_bf16.h
// What it finds: a missing barrier (results differ between orders, shared memory starts as NaN), a barrier that not all
// threads reach at the same line (error, no hang), an access beyond shared memory or a buffer of `emulated_allocate`
// (error), a launch beyond the limits of sm_90. What it cannot find: races of more than two warps that no order shows,
// missing fences between blocks, and anything about speed. Products are not fused into sums as nvcc does.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

// ------------------------------------------------------------------------------------------------ host interface

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = void*;

// ------------------------------------------------------------------------------------------------ types and indices

#define CUDA_ON_CPU_VECTORS(type, name)                                           \
  struct alignas(2 * sizeof(type)) name##2 {                                      \
    type x, y;                                                                    \
  };                                                                              \
  struct name##3 {                                                                \
    type x, y, z;                                                                 \
  };                                                                              \
  struct alignas(sizeof(type) < 8 ? 4 * sizeof(type) : 16) name##4 {              \
    type x, y, z, w;                                                              \
  };                                                                              \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;
inline constexpr int warpSize = 32;

// ------------------------------------------------------------------------------------------------ rendezvous

inline void __syncthreads(cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) { cuda_on_cpu::meet_block(site); }

inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_cpu::Site site = cuda_on_cpu::Site::current()) {
  cuda_on_cpu::meet_warp(mask, nullptr, [](const cuda_on_cpu::Lanes&, unsigned) {}, site);
}

namespace cuda_on_cpu {

template <class Value>
struct Shuffle {
  Value value;
  int source;  // the lane to read from
  Value result;
};

template <class Value>
Value shuffle(unsigned mask, Value value, int source, const Site& site) {
  Shuffle<Value> mine{value, source, value};
  const auto combine = [](const Lanes& lanes, unsigned) {
    for (void* lane : lanes) {
      if (lane == nullptr) continue;
      auto& reader = *static_cast<Shuffle<Value>*>(lane);
      if (lanes[reader.source] == nullptr) fail("a shuffle reads from a lane outside of its mask");
      reader.result = static_cast<Shuffle<Value>*>(lanes[reader.source])->value;
    }
  };
  meet_warp(mask, &mine, combine, site);
  return mine.result;
}

struct Vote {
  bool predicate;
  unsigned result;
};

inline unsigned vote(unsigned mask, bool predicate, const Site& site) {
  Vote mine{predicate, 0};
  const auto combine = [](const Lanes& lanes, unsigned) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) {
      if (lanes[i] != nullptr && static_cast<Vote*>(lanes[i])->predicate) result |= 1u << i;
    }
    for (void* lane : lanes) {
      if (lane != nullptr) static_cast<Vote*>(lane)->result = result;
    }
  };
  meet_warp(mask, &mine, combine, site);
  return mine.result;
}

bool any_of_block(bool predicate, const Site& site);

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::current()

// The source lane of each follows the table of the programming guide: out of its section of `width` lanes, a lane reads
// its own value.
template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const int self = cuda_on_cpu::lane(), first = self & ~(width - 1);
  return cuda_on_cpu::shuffle(mask, value, first + (source & (width - 1)), site);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int self = cuda_on_cpu::lane(), first = self & ~(width - 1), source = self - int(delta);
  return cuda_on_cpu::shuffle(mask, value, source < first ? self : source, site);
}

template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const int self = cuda_on_cpu::lane(), last = self | (width - 1), source = self + int(delta);
  return cuda_on_cpu::shuffle(mask, value, source > last ? self : source, site);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const int self = cuda_on_cpu::lane(), last = self | (width - 1), source = self ^ lane_mask;
  return cuda_on_cpu::shuffle(mask, value, source > last ? self : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote(mask, predicate == 0, site) == 0;
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::any_of_block(predicate != 0, site);
}

// ------------------------------------------------------------------------------------------------ numbers

using std::ilogb;
using std::max;
using std::min;
using std::scalbn;

inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }

template <class Value>
Value __ldg(const Value* address) {
  return *address;
}
