// project_scale.cuh on tensor cores. A block computes C transposed, W_tᵀ Q_t: tiles of mma have 16 rows and 8 columns,
// so the long side n takes the rows and the short side s, often 38 or 96, the columns, of which fewer are wasted. Sums
// of squares go to one partial per column of warps and are added up in a fixed order: the same bits in every run.

#include <project_scale.cuh>
#include <tile_product.cuh>

#include <cuda_bf16.h>

#include <algorithm>
#include <limits>

namespace isomerge {
namespace {

constexpr int kColumns = 128;  // of C per block

// 32 x 48 sums per warp, 48 registers and as many for the chain. Wide: 96 rows of C by 8 warps, which share the tile of
// W; 28 KB per stage, one block per multiprocessor. Narrow: 48 rows by 4 warps, 24 KB per stage, two blocks per
// multiprocessor (144 KB of 163 on sm_80; a third on sm_90 would leave 168 registers per thread, which spill).
template <bool kIsWide>
constexpr TileConfig kTile = kIsWide ? TileConfig{kColumns, 96, 4, 2, 32, 4} : TileConfig{kColumns, 48, 4, 1, 32, 3};
template <bool kIsWide>
constexpr int kBlocks = kIsWide ? 1 : 2;

constexpr int kSumThreads = 128;

// The tiles waste the fewer rows the narrower they are; where both waste the same, the wide ones read W less often.
constexpr bool is_wide(std::int64_t s) { return ceil_div<std::int64_t>(s, 48) % 2 == 0; }

constexpr TileConfig tile(std::int64_t s) { return is_wide(s) ? kTile<true> : kTile<false>; }

constexpr std::int64_t row_tiles(std::int64_t s) { return ceil_div<std::int64_t>(s, tile(s).n); }

// Partial sums of squares per column of C and task.
constexpr std::int64_t partials_per_task(std::int64_t s) { return row_tiles(s) * tile(s).warps_n; }

// Tile `blockIdx.x` of C, row tiles fastest, as they share columns of W in L2; matrices are batch x tasks.
template <class Weight, bool kIsWide>
__global__ void __launch_bounds__(kTile<kIsWide>.threads(), kBlocks<kIsWide>)
    project_scale_kernel(Stack<Weight> W, Stack<float> Q, const float* row_scale, float* C, double* partials,
                         std::int64_t s_tiles, std::int64_t n_tiles) {
  constexpr TileConfig kConfig = kTile<kIsWide>;
  using Product = TileProduct<Weight, float, SumOver::kRows, kConfig>;
  const std::int64_t n = W.first.cols, s = Q.first.cols;
  const std::int64_t s_tile = blockIdx.x % s_tiles, n_tile = blockIdx.x / s_tiles % n_tiles;
  const std::int64_t matrix = blockIdx.x / s_tiles / n_tiles;
  typename Product::Sums sums = {};
  Product::add(sums, W[matrix], n_tile * kColumns, Q[matrix], s_tile * kConfig.n, 0, W.first.rows, false);

  const int lane = threadIdx.x % kWarp, warp_column = threadIdx.x / kWarp % kConfig.warps_n;
  double* squares = partials + ((matrix * s_tiles + s_tile) * kConfig.warps_n + warp_column) * n;
#pragma unroll
  for (int i = 0; i < Product::kRowGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t col = n_tile * kColumns + Product::row(i) + half * 8;
      double square = 0;
#pragma unroll
      for (int j = 0; j < Product::kColGroups; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const std::int64_t row = s_tile * kConfig.n + Product::col(j) + e;
          if (row >= s || col >= n) continue;
          const float value = row_scale[matrix * s + row] * sums[i][j][half * 2 + e];
          C[(matrix * s + row) * n + col] = value;
          square += static_cast<double>(value) * value;
        }
      }
      square += __shfl_xor_sync(kAllLanes, square, 1);  // the four lanes that share this column of C
      square += __shfl_xor_sync(kAllLanes, square, 2);
      if (lane % 4 == 0 && col < n) squares[col] = square;
    }
  }
}

// column_squares[b, j] = Σ_p partials[b, p, j], in the order of p.
__global__ void __launch_bounds__(kSumThreads)
    add_partials_kernel(const double* partials, std::int64_t count, std::int64_t n, double* column_squares) {
  const std::int64_t blocks = ceil_div<std::int64_t>(n, kSumThreads), b = blockIdx.x / blocks;
  const std::int64_t col = blockIdx.x % blocks * kSumThreads + threadIdx.x;
  if (col >= n) return;
  double sum = 0;
  for (std::int64_t p = 0; p < count; ++p) sum += partials[(b * count + p) * n + col];
  column_squares[b * n + col] = sum;
}

template <bool kIsWide, class Weight>
cudaError_t launch_tiles(const Stack<Weight>& W, const Stack<float>& Q, const float* row_scale, std::int64_t matrices,
                         float* C, double* partials, cudaStream_t stream) {
  using Product = TileProduct<Weight, float, SumOver::kRows, kTile<kIsWide>>;
  const std::int64_t s_tiles = row_tiles(Q.first.cols), n_tiles = ceil_div<std::int64_t>(W.first.cols, kColumns);
  if (matrices * s_tiles * n_tiles > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  return launch(project_scale_kernel<Weight, kIsWide>, static_cast<unsigned>(matrices * s_tiles * n_tiles),
                Product::kThreads, Product::kSharedBytes, stream, W, Q, row_scale, C, partials, s_tiles, n_tiles);
}

template <class Weight>
cudaError_t launch_products(const Stack<Weight>& W, const Stack<float>& Q, const float* row_scale,
                            std::int64_t matrices, float* C, double* partials, cudaStream_t stream) {
  return is_wide(Q.first.cols) ? launch_tiles<true>(W, Q, row_scale, matrices, C, partials, stream)
                               : launch_tiles<false>(W, Q, row_scale, matrices, C, partials, stream);
}

}  // namespace
}  // namespace isomerge

std::int64_t project_scale_workspace_bytes(std::int64_t batch, std::int64_t tasks, std::int64_t n, std::int64_t s) {
  return batch * tasks * isomerge::partials_per_task(s) * n * static_cast<std::int64_t>(sizeof(double));
}

cudaError_t project_scale_launch(const float* Q, std::int64_t q_matrix_stride, std::int64_t q_row_stride, const void* W,
                                 std::int64_t w_bytes, std::int64_t w_matrix_stride, std::int64_t w_row_stride,
                                 const float* row_scale, std::int64_t batch, std::int64_t tasks, std::int64_t m,
                                 std::int64_t n, std::int64_t s, float* C, double* column_squares, void* workspace,
                                 cudaStream_t stream) {
  using namespace isomerge;
  if (batch < 0 || tasks < 0 || m < 0 || n < 0 || s < 0) return cudaErrorInvalidValue;
  if ((w_bytes != 2 && w_bytes != 4) || std::max({m, n, s}) > std::numeric_limits<int>::max()) {
    return cudaErrorInvalidValue;
  }
  if (batch == 0 || n == 0) return cudaSuccess;

  const Stack<float> bases = {{Q, m, s, q_row_stride}, q_matrix_stride};
  auto* partials = static_cast<double*>(workspace);
  if (tasks * s > 0) {
    cudaError_t error;
    if (w_bytes == 2) {
      const auto* first = static_cast<const __nv_bfloat16*>(W);
      const Stack<__nv_bfloat16> weights = {{first, m, n, w_row_stride}, w_matrix_stride};
      error = launch_products(weights, bases, row_scale, batch * tasks, C, partials, stream);
    } else {
      const Stack<float> weights = {{static_cast<const float*>(W), m, n, w_row_stride}, w_matrix_stride};
      error = launch_products(weights, bases, row_scale, batch * tasks, C, partials, stream);
    }
    if (error != cudaSuccess) return error;
  }
  const std::int64_t blocks = batch * ceil_div<std::int64_t>(n, kSumThreads);
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  return launch(add_partials_kernel, static_cast<unsigned>(blocks), kSumThreads, 0, stream, partials,
                tasks * partials_per_task(s), n, column_squares);
}
