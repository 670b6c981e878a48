// shift_cov.cuh on tensor cores, in up to three kernels: Y = X Δᵀ for a chunk of tokens, the tiles of Yᵀ Y below and on
// the diagonal split over tokens, and one ordered sum of the splits into both halves of `out`. No atomics: the same
// bits in every run. X Δᵀ is never stored whole, and how tokens are split depends on the sizes alone.

#include <shift_cov.cuh>
#include <tile_product.cuh>

#include <cuda_bf16.h>

#include <algorithm>
#include <limits>

namespace isomerge {
namespace {

// 128 x 128 by 8 warps of 64 x 32: 64 registers for the sums, 64 for the running chain. One block of 256 threads per
// multiprocessor then, as its registers allow no second; four stages of 32 KB take 128 KB of the 163 of sm_80.
constexpr int kTile = 128;
template <class T>
constexpr TileConfig kGramTile = {kTile, kTile, 2, 4, sizeof(T) == 2 ? 64 : 32, 4};
constexpr TileConfig kShiftTile = {kTile, kTile, 2, 4, 32, 4};  // 24 KB or, for float32 X, 32 KB per stage

constexpr int kBlock = 32, kSumThreads = 256;  // of the ordered sum: 32 x 32 elements of out per block
constexpr std::int64_t kTokens = 512;          // splits and chunks are multiples of this
constexpr std::int64_t kChunk = 2048;          // tokens of X Δᵀ stored at a time, over the batch: 16 rows of tiles
constexpr std::int64_t kProcessors = 132;      // of an H100 or H200; a constant, so that all devices split alike
constexpr std::int64_t kMaxSplits = 64;        // 64 x 64 KB per tile

constexpr __host__ __device__ std::int64_t triangle(std::int64_t rows) { return rows * (rows + 1) / 2; }

struct Cell {
  std::int64_t row, col;
};

// The index-th cell of the lower triangle, row by row. The loops correct the rounding of the root.
__device__ __forceinline__ Cell lower_cell(std::int64_t index) {
  auto row = static_cast<std::int64_t>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while (row * (row + 1) / 2 > index) --row;
  while ((row + 1) * (row + 2) / 2 <= index) ++row;
  return {row, index - row * (row + 1) / 2};
}

// Y[b] = X[b] Δ[b]ᵀ, one tile per block, columns of tiles fastest: neighbours share their rows of X in L2.
template <class T>
__global__ void __launch_bounds__(kShiftTile.threads(), 1)
    feature_shift_kernel(Stack<T> X, Stack<float> delta, float* Y, std::int64_t pitch, std::int64_t row_tiles,
                         std::int64_t col_tiles) {
  using Product = TileProduct<T, float, SumOver::kColumns, kShiftTile>;
  const std::int64_t tile = blockIdx.x % (row_tiles * col_tiles), b = blockIdx.x / (row_tiles * col_tiles);
  const std::int64_t row0 = tile / col_tiles * kTile, col0 = tile % col_tiles * kTile;
  typename Product::Sums sums = {};
  Product::add(sums, X[b], row0, delta[b], col0, 0, X.first.cols, false);
#pragma unroll
  for (int i = 0; i < Product::kRowGroups; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const std::int64_t row = row0 + Product::row(i) + half * 8;
      if (row >= X.first.rows) continue;
      float* to = Y + (b * X.first.rows + row) * pitch;
#pragma unroll
      for (int j = 0; j < Product::kColGroups; ++j) {
        const std::int64_t col = col0 + Product::col(j);
        if (col < pitch) *reinterpret_cast<float2*>(to + col) = {sums[i][j][half * 2], sums[i][j][half * 2 + 1]};
      }
    }
  }
}

// partials[split, b, tile] = the tile's products over the split's tokens, row by row; += after the first chunk.
template <class T>
__global__ void __launch_bounds__(kGramTile<T>.threads(), 1)
    gram_kernel(Stack<T> Y, std::int64_t tiles, std::int64_t tokens_per_split, float* partials, bool first) {
  using Product = TileProduct<T, T, SumOver::kRows, kGramTile<T>>;
  const Matrix<T> mine = Y[blockIdx.x / tiles];
  const Cell cell = lower_cell(blockIdx.x % tiles);
  const std::int64_t begin = blockIdx.y * tokens_per_split, end = min(begin + tokens_per_split, mine.rows);
  if (begin >= end) return;  // the last chunk is shorter; the first one reaches all splits
  typename Product::Sums sums = {};
  Product::add(sums, mine, cell.row * kTile, mine, cell.col * kTile, begin, end, cell.row == cell.col);
  float* partial = partials + (static_cast<std::int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * (kTile * kTile);
#pragma unroll
  for (int i = 0; i < Product::kRowGroups; ++i) {
#pragma unroll
    for (int j = 0; j < Product::kColGroups; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* to = reinterpret_cast<float2*>(partial + (Product::row(i) + half * 8) * kTile + Product::col(j));
        float2 sum = {sums[i][j][half * 2], sums[i][j][half * 2 + 1]};
        if (!first) sum = {sum.x + to->x, sum.y + to->y};
        *to = sum;
      }
    }
  }
}

// out[b] += the splits' sums, in their order and in float64, of one 32 x 32 cell and, mirrored, of its transpose.
template <class Out>
__global__ void __launch_bounds__(kSumThreads)
    add_splits_kernel(const float* partials, std::int64_t splits, std::int64_t split_stride, std::int64_t tiles,
                      Out* out, std::int64_t d) {
  auto* sums = reinterpret_cast<double*>(dynamic_shared());
  constexpr int kPitch = kBlock + 1, kPerTile = kTile / kBlock;
  const std::int64_t cells = triangle(ceil_div<std::int64_t>(d, kBlock)), b = blockIdx.x / cells;
  const Cell cell = lower_cell(blockIdx.x % cells);
  const std::int64_t tile = triangle(cell.row / kPerTile) + cell.col / kPerTile;
  const float* from = partials + (b * tiles + tile) * (kTile * kTile) + cell.row % kPerTile * kBlock * kTile +
                      cell.col % kPerTile * kBlock;
  const int col = threadIdx.x % kBlock;
  for (int row = threadIdx.x / kBlock; row < kBlock; row += kSumThreads / kBlock) {
    double sum = 0;
    for (std::int64_t split = 0; split < splits; ++split) sum += from[split * split_stride + row * kTile + col];
    sums[row * kPitch + col] = sum;
  }
  __syncthreads();
  const bool diagonal = cell.row == cell.col;
  for (int row = threadIdx.x / kBlock; row < kBlock; row += kSumThreads / kBlock) {
    const std::int64_t i = cell.row * kBlock + row, j = cell.col * kBlock + col;
    if (i < d && j < d) {
      const bool above = diagonal && row < col;
      Out& element = out[(b * d + i) * d + j];
      element = static_cast<Out>(element + sums[above ? col * kPitch + row : row * kPitch + col]);
    }
    const std::int64_t mirrored_i = cell.col * kBlock + row, mirrored_j = cell.row * kBlock + col;
    if (!diagonal && mirrored_i < d && mirrored_j < d) {
      Out& element = out[(b * d + mirrored_i) * d + mirrored_j];
      element = static_cast<Out>(element + sums[col * kPitch + row]);
    }
  }
}

// How a call is cut up: a pure function of its sizes.
struct Layout {
  std::int64_t d, tiles, cells;                  // of one moment: its side, tiles and blocks of the ordered sum
  std::int64_t chunk, splits, tokens_per_split;  // tokens of a chunk of Y, and how they are split
  std::int64_t pitch;                            // of the rows of Y
  std::int64_t partial_numbers, shift_numbers;   // float32 numbers in the workspace: partial sums, then Y

  Layout(std::int64_t batch, std::int64_t tokens, std::int64_t n, std::int64_t m) {
    d = m > 0 ? m : n;
    tiles = triangle(ceil_div<std::int64_t>(d, kTile));
    cells = triangle(ceil_div<std::int64_t>(d, kBlock));
    // A batch fills the machine by itself, so it shares the chunk.
    const std::int64_t shared = std::max(kTokens, kChunk / std::max<std::int64_t>(batch, 1) / kTokens * kTokens);
    chunk = m > 0 ? std::min(tokens, shared) : tokens;
    choose_splits(batch * tiles, ceil_div(chunk, kTokens));
    pitch = ceil_div<std::int64_t>(m, 4) * 4;  // rows of Y begin at multiples of 16 bytes
    partial_numbers = splits * batch * tiles * kTile * kTile;
    shift_numbers = m > 0 ? batch * chunk * pitch : 0;
  }

  // The fewest splits of least time, in units of 512 tokens of one tile: waves of blocks times the tokens of each, plus
  // one unit for what a split costs. That is 128 KB written and read against 17 MFLOP of products, 128 FLOP per byte,
  // about what tensor cores and memory are built for.
  void choose_splits(std::int64_t blocks, std::int64_t units) {
    std::int64_t least = std::numeric_limits<std::int64_t>::max();
    for (std::int64_t candidate = 1; candidate <= std::min(units, kMaxSplits); ++candidate) {
      const std::int64_t per_split = ceil_div(units, candidate);
      const std::int64_t time = ceil_div(blocks * candidate, kProcessors) * (per_split + 1);
      if (time >= least || ceil_div(units, per_split) < candidate) continue;  // no split may be empty
      least = time;
      splits = candidate;
      tokens_per_split = per_split * kTokens;
    }
  }
};

template <class T>
cudaError_t launch_gram(const Stack<T>& Y, const Layout& layout, std::int64_t batch, float* partials, bool first,
                        cudaStream_t stream) {
  using Product = TileProduct<T, T, SumOver::kRows, kGramTile<T>>;
  const dim3 grid(static_cast<unsigned>(batch * layout.tiles), static_cast<unsigned>(layout.splits));
  return launch(gram_kernel<T>, grid, Product::kThreads, Product::kSharedBytes, stream, Y, layout.tiles,
                layout.tokens_per_split, partials, first);
}

template <class Out>
cudaError_t launch_add_splits(const float* partials, const Layout& layout, std::int64_t batch, void* out,
                              cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(batch * layout.cells);
  return launch(add_splits_kernel<Out>, grid, kSumThreads, kBlock * (kBlock + 1) * sizeof(double), stream, partials,
                layout.splits, batch * layout.tiles * kTile * kTile, layout.tiles, static_cast<Out*>(out), layout.d);
}

// All partial sums: X in one go, or chunk by chunk through Y.
template <class T>
cudaError_t launch_moments(const Stack<T>& X, const Stack<float>& delta, const Layout& layout, std::int64_t batch,
                           float* partials, cudaStream_t stream) {
  using Shift = TileProduct<T, float, SumOver::kColumns, kShiftTile>;
  if (delta.first.data == nullptr) return launch_gram(X, layout, batch, partials, true, stream);
  float* Y = partials + layout.partial_numbers;
  for (std::int64_t begin = 0; begin < X.first.rows; begin += layout.chunk) {
    const std::int64_t tokens = std::min(layout.chunk, X.first.rows - begin);
    const Matrix<T>& all = X.first;
    const Stack<T> part = {{all.data + begin * all.stride, tokens, all.cols, all.stride}, X.stride};
    const Stack<float> shifts = {{Y, tokens, layout.d, layout.pitch}, tokens * layout.pitch};
    const std::int64_t row_tiles = ceil_div<std::int64_t>(tokens, kTile);
    const std::int64_t col_tiles = ceil_div<std::int64_t>(layout.d, kTile);
    cudaError_t error = launch(feature_shift_kernel<T>, static_cast<unsigned>(batch * row_tiles * col_tiles),
                               Shift::kThreads, Shift::kSharedBytes, stream, part, delta, Y, layout.pitch, row_tiles,
                               col_tiles);
    if (error == cudaSuccess) error = launch_gram(shifts, layout, batch, partials, begin == 0, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace isomerge

std::int64_t shift_cov_workspace_bytes(std::int64_t batch, std::int64_t tokens, std::int64_t n, std::int64_t m) {
  if (batch <= 0 || tokens <= 0 || n <= 0) return 0;
  const isomerge::Layout layout(batch, tokens, n, m);
  return (layout.partial_numbers + layout.shift_numbers) * static_cast<std::int64_t>(sizeof(float));
}

cudaError_t shift_cov_launch(const void* X, std::int64_t x_bytes, std::int64_t batch, std::int64_t tokens,
                             std::int64_t n, std::int64_t x_batch_stride, std::int64_t x_row_stride,
                             const float* delta, std::int64_t m, std::int64_t delta_batch_stride,
                             std::int64_t delta_row_stride, void* out, std::int64_t out_bytes, void* workspace,
                             cudaStream_t stream) {
  using namespace isomerge;
  if (batch < 0 || tokens < 0 || n < 0 || m < 0 || (delta == nullptr) != (m == 0)) return cudaErrorInvalidValue;
  if ((x_bytes != 2 && x_bytes != 4) || (out_bytes != 4 && out_bytes != 8)) return cudaErrorInvalidValue;
  if (std::max({tokens, n, m}) > std::numeric_limits<int>::max()) return cudaErrorInvalidValue;
  if (batch == 0 || tokens == 0 || n == 0) return cudaSuccess;

  const Layout layout(batch, tokens, n, m);
  if (batch * layout.cells > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  auto* partials = static_cast<float*>(workspace);
  const Stack<float> deltas = {{delta, m, n, delta_row_stride}, delta_batch_stride};

  cudaError_t error;
  if (x_bytes == 2) {
    const Stack<__nv_bfloat16> inputs = {{static_cast<const __nv_bfloat16*>(X), tokens, n, x_row_stride},
                                         x_batch_stride};
    error = launch_moments(inputs, deltas, layout, batch, partials, stream);
  } else {
    const Stack<float> inputs = {{static_cast<const float*>(X), tokens, n, x_row_stride}, x_batch_stride};
    error = launch_moments(inputs, deltas, layout, batch, partials, stream);
  }
  if (error != cudaSuccess) return error;
  return out_bytes == 4 ? launch_add_splits<float>(partials, layout, batch, out, stream)
                        : launch_add_splits<double>(partials, layout, batch, out, stream);
}
