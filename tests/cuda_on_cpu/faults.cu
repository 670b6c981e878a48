// Kernels with one fault each: what the emulator must find. Each entry has a sound variant (fault = 0).

#include <cuda_runtime.h>
#include <launch.cuh>

#include <cstdint>

namespace {

// out[i] = sum of the threads' numbers 1..n, by a tree in shared memory; without its barriers when faulty.
__global__ void tree_sum(double* out, int64_t faulty) {
  auto* partial = reinterpret_cast<double*>(isomerge::dynamic_shared());
  const unsigned i = threadIdx.x;
  partial[i] = i + 1;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (i < half) partial[i] += partial[i + half];
    if (!faulty) __syncthreads();
  }
  out[i] = partial[0];
}

// Every thread passes its number to its right; without the barrier between reading and overwriting when faulty.
__global__ void rotate(double* out, int64_t faulty) {
  auto* ring = reinterpret_cast<double*>(isomerge::dynamic_shared());
  const unsigned i = threadIdx.x, left = (i + blockDim.x - 1) % blockDim.x;
  ring[i] = i;
  __syncthreads();
  for (int step = 0; step < 3; ++step) {
    const double received = ring[left];
    if (!faulty) __syncthreads();
    ring[i] = received;
    __syncthreads();
  }
  out[i] = ring[i];
}

__global__ void divergent(double* out, int64_t faulty) {
  if (faulty == 1 && threadIdx.x == 3) return;  // one thread ends, the others wait
  if (faulty == 2 && threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (faulty == 3 && threadIdx.x % 32 == 5) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  if (faulty == 3) __syncthreads();
  out[threadIdx.x] = threadIdx.x;
}

__global__ void beyond(double* out, int64_t faulty) {
  auto* shared = reinterpret_cast<double*>(isomerge::dynamic_shared());
  shared[threadIdx.x] = 1;
  if (faulty == 1) shared[threadIdx.x + blockDim.x] = 1;
  const int64_t i = faulty == 2 ? threadIdx.x + 2 : threadIdx.x;
  out[i] = threadIdx.x;
  if (faulty == 3) out[threadIdx.x] = out[-1024];
}

__global__ void asynchronous(double* out, const double* in, int64_t faulty) {
  auto* shared = reinterpret_cast<double*>(isomerge::dynamic_shared());
  const unsigned i = threadIdx.x;
  cuda_on_cpu::defer([=] { shared[i] = in[i]; });
  cuda_on_cpu::commit();
  if (faulty != 1) cuda_on_cpu::wait(0);
  out[i] = shared[i];
  if (faulty == 2) cuda_on_cpu::defer([=] { shared[i] = in[i]; });
}

__global__ void lanes(double* out, int64_t faulty) {
  const unsigned i = threadIdx.x, everyone = 0xffffffffu, half = i % 32 < 16 ? 0xffffu : 0xffff0000u;
  double sum = i;
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(faulty == 1 ? everyone << 1 : half, sum, offset);
  const double first = __shfl_sync(half, sum, 3, 16), up = __shfl_up_sync(everyone, sum, 1);
  const double down = __shfl_down_sync(everyone, double(i), 4, 8);
  const unsigned odd = __ballot_sync(everyone, i % 2);
  const bool all = __all_sync(everyone, i < 64), any = __any_sync(everyone, i == 33);
  out[i] = first + 1000 * up + 1e6 * down + 1e8 * (odd == 0xaaaaaaaau) + 2e8 * all + 4e8 * any;
}

}  // namespace

using isomerge::launch;

extern "C" cudaError_t fault_tree_sum(double* out, int64_t threads, int64_t faulty, cudaStream_t stream) {
  return launch(tree_sum, 1, unsigned(threads), threads * sizeof(double), stream, out, faulty);
}
extern "C" cudaError_t fault_rotate(double* out, int64_t threads, int64_t faulty, cudaStream_t stream) {
  return launch(rotate, 1, unsigned(threads), threads * sizeof(double), stream, out, faulty);
}
extern "C" cudaError_t fault_divergent(double* out, int64_t threads, int64_t faulty, cudaStream_t stream) {
  return launch(divergent, 1, unsigned(threads), 0, stream, out, faulty);
}
extern "C" cudaError_t fault_beyond(double* out, int64_t threads, int64_t faulty, cudaStream_t stream) {
  return launch(beyond, 1, unsigned(threads), threads * sizeof(double), stream, out, faulty);
}
extern "C" cudaError_t fault_asynchronous(double* out, const double* in, int64_t threads, int64_t faulty,
                                          cudaStream_t stream) {
  return launch(asynchronous, 1, unsigned(threads), threads * sizeof(double), stream, out, in, faulty);
}
extern "C" cudaError_t fault_lanes(double* out, int64_t threads, int64_t faulty, cudaStream_t stream) {
  return launch(lanes, 1, unsigned(threads), 0, stream, out, faulty);
}
extern "C" cudaError_t fault_limits(int64_t grid, int64_t block, int64_t shared_bytes, cudaStream_t stream) {
  return launch(divergent, unsigned(grid), unsigned(block), shared_bytes, stream, static_cast<double*>(nullptr),
                int64_t{0});
}
