// The only way in which a kernel is started, and the only shared memory that it has.
//
//   cudaError_t launch(kernel, dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream, arguments...);
//   unsigned char* dynamic_shared();   // in a kernel: its shared_bytes, aligned to 128 bytes
//
// Kernels cut their arrays out of `dynamic_shared()` and declare no __shared__ variable. tests/cuda_on_cpu/launch.cuh
// stands in front of this file (-I order) where the kernels are compiled for a CPU, and gives both names the same
// meaning. Host entries are extern "C" and take pointers, int64_t sizes and strides, double scalars and the stream, and
// return cudaError_t: bindings.cpp and the tests (ctypes) call the very same symbols.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace isomerge {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than every device grants unasked
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // the error is returned; it must not be found again by whoever asks next
      return error;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  return shared_bytes;
}

}  // namespace isomerge
