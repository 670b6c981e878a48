// One kernel per instruction of ptx.cuh, with registers as they are: tests hold them to the formulas of the PTX ISA.

#include <launch.cuh>
#include <ptx.cuh>
#include <shared_tile.cuh>

#include <cuda_bf16.h>

#include <cstdint>

namespace {

using namespace isomerge;

// c [32, 4] += a [32, 4] b [32, 2], lane by lane, `count` times in a row.
__global__ void multiply_add_kernel(const std::uint32_t* a, const std::uint32_t* b, float* c, std::int64_t count) {
  const unsigned lane = threadIdx.x;
  std::uint32_t left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[4 * lane + i];
    sums[i] = c[4 * lane + i];
  }
  for (std::int64_t i = 0; i < count; ++i) multiply_add(sums, left, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sums[i];
}

// matrices [32, 4] from `bytes` of shared memory, of which lane i gives the address rows[i].
__global__ void load_matrices_kernel(const unsigned char* memory, std::int64_t bytes, const std::int32_t* rows,
                                     std::int64_t transposed, std::uint32_t* matrices) {
  unsigned char* shared = dynamic_shared();
  const unsigned lane = threadIdx.x;
  for (std::int64_t i = lane; i < bytes; i += 32) shared[i] = memory[i];
  __syncthreads();
  std::uint32_t loaded[4];
  if (transposed != 0) {
    load_matrices_transposed(loaded, shared + rows[lane]);
  } else {
    load_matrices(loaded, shared + rows[lane]);
  }
  for (int i = 0; i < 4; ++i) matrices[4 * lane + i] = loaded[i];
}

// Lane i copies counts[i] bytes; all wait, or, if faulty, only for the copies before these.
__global__ void copy_kernel(const unsigned char* from, const std::int32_t* counts, std::int64_t faulty,
                            unsigned char* to) {
  unsigned char* shared = dynamic_shared();
  const unsigned lane = threadIdx.x;
  copy_async(shared + 16 * lane, from + 16 * lane, counts[lane]);
  commit_copies();
  if (faulty != 0) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  __syncthreads();
  for (int i = 0; i < 16; ++i) to[16 * lane + i] = shared[16 * (31 - lane) + i];
  wait_copies<0>();
}

__global__ void pack_kernel(const float* low, const float* high, std::uint32_t* pairs) {
  pairs[threadIdx.x] = pack_bfloat16(low[threadIdx.x], high[threadIdx.x]);
}

// Bytes at which the lanes read matrix i of the fragment at `extent`, `depth`: [4, 32], or [32] for ldmatrix.
template <class Tile, bool kIsRight>
__global__ void addresses_kernel(std::int64_t warp_extent, std::int64_t extent, std::int64_t depth,
                                 std::int32_t* bytes) {
  const int from = Tile::template lane_offset<kIsRight>(static_cast<int>(warp_extent));
  const int e = static_cast<int>(extent), d = static_cast<int>(depth);
  if constexpr (Tile::kPlanes == 1) {
    bytes[threadIdx.x] = Tile::further(from, e, d);
  } else {
    for (int i = 0; i < 4; ++i) {
      bytes[32 * i + threadIdx.x] =
          Tile::further(from, e + Tile::template along_result<kIsRight>(i), d + Tile::template along_sum<kIsRight>(i));
    }
  }
}

}  // namespace

extern "C" {

cudaError_t emulate_multiply_add(const std::uint32_t* a, const std::uint32_t* b, float* c, std::int64_t count) {
  return launch(multiply_add_kernel, 1, 32, 0, nullptr, a, b, c, count);
}

cudaError_t emulate_load_matrices(const unsigned char* memory, std::int64_t bytes, const std::int32_t* rows,
                                  std::int64_t transposed, std::uint32_t* matrices) {
  return launch(load_matrices_kernel, 1, 32, bytes, nullptr, memory, bytes, rows, transposed, matrices);
}

cudaError_t emulate_copy(const unsigned char* from, const std::int32_t* counts, std::int64_t faulty,
                         unsigned char* to) {
  return launch(copy_kernel, 1, 32, 512, nullptr, from, counts, faulty, to);
}

cudaError_t emulate_pack(const float* low, const float* high, std::int64_t count, std::uint32_t* pairs) {
  return launch(pack_kernel, 1, static_cast<unsigned>(count), 0, nullptr, low, high, pairs);
}

#define ADDRESSES(name, T, sum, extent, depth, right)                                                           \
  cudaError_t name(std::int64_t warp, std::int64_t e, std::int64_t d, std::int32_t* bytes) {                    \
    using Tile = SharedTile<T, sum, extent, depth>;                                                             \
    return launch(addresses_kernel<Tile, right>, 1, 32, 0, nullptr, warp, e, d, bytes);                         \
  }

ADDRESSES(addresses_bfloat16_rows, __nv_bfloat16, SumOver::kRows, 128, 64, false)
ADDRESSES(addresses_bfloat16_rows_right, __nv_bfloat16, SumOver::kRows, 128, 64, true)
ADDRESSES(addresses_bfloat16_columns, __nv_bfloat16, SumOver::kColumns, 128, 32, false)
ADDRESSES(addresses_float32_rows, float, SumOver::kRows, 128, 32, false)
ADDRESSES(addresses_float32_rows_right, float, SumOver::kRows, 96, 32, true)
ADDRESSES(addresses_float32_columns, float, SumOver::kColumns, 128, 32, false)
ADDRESSES(addresses_float32_columns_right, float, SumOver::kColumns, 128, 32, true)
}
