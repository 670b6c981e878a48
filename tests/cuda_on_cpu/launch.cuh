// csrc/launch.cuh for the emulator: the same two names, run by fibers.h.
#pragma once

#include <cuda_runtime.h>

namespace isomerge {

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t,
                   Arguments... arguments) {
  const auto body = [&] { kernel(Parameters(arguments)...); };
  return static_cast<cudaError_t>(
      cuda_on_cpu::run({grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes, body));
}

inline unsigned char* dynamic_shared() { return cuda_on_cpu::shared_memory(); }

}  // namespace isomerge
