// L and L⁻¹ in one elimination, one block per matrix, the matrix in registers.
//
// Step j takes row i > j to row i - (a_ij / a_jj) row j, and does the same to the identity beside the matrix. Columns
// up to j of the matrix are then done with, and those beyond j of the identity still untouched, so both live in one
// lower triangle: entry (i, k) belongs to the inverse where k <= j. What step j needs of the others is one line of s
// numbers: row j of the inverse left of the pivot, and column j of the matrix from the pivot on. It goes through
// shared memory, twice buffered, so that each step has a single barrier.
//
// 256 threads hold the triangle cyclically in 16 x 16 tiles: at s = 128, 36 numbers a thread instead of 128 KB of
// shared memory, 16 reads for up to 36 products a step, and all threads at work until the last tile. Shared memory is
// for L alone, packed (66.5 KB at s = 128 with the lines), which is then written row by row.

#include "cholesky.cuh"

#include <common.cuh>
#include <launch.cuh>

namespace isomerge {
namespace {

constexpr int kTile = 16;
constexpr int kThreads = kTile * kTile;

constexpr __host__ __device__ int packed(int i, int k) { return i * (i + 1) / 2 + k; }

template <int Side>
constexpr std::size_t shared_bytes(int s) {
  return sizeof(double) * (2 * Side + packed(s, 0));
}

// Rows 16 A + threadIdx.y and columns 16 B + threadIdx.x, B <= A, of a triangle of at most Side rows.
template <int Side>
struct Triangle {
  static constexpr int kTiles = Side / kTile;
  double tiles[packed(kTiles, 0)];

  __device__ double& operator()(int A, int B) { return tiles[packed(A, B)]; }
};

template <int Side>
__global__ void __launch_bounds__(kThreads)
cholesky_kernel(const double* __restrict__ G, double* __restrict__ factor, double* __restrict__ inverse,
                int32_t* __restrict__ status, int s, double shift) {
  constexpr int kTiles = Side / kTile;
  auto* lines = reinterpret_cast<double*>(dynamic_shared());  // [2, Side]
  double* L = lines + 2 * Side;                               // packed
  const int row = threadIdx.y, column = threadIdx.x, thread = kTile * row + column;
  const int64_t offset = int64_t{blockIdx.x} * s * s;
  G += offset, factor += offset, inverse += offset;

  Triangle<Side> a;
  double diagonal = 0;
#pragma unroll
  for (int A = 0; A < kTiles; ++A) {
#pragma unroll
    for (int B = 0; B <= A; ++B) {
      const int i = kTile * A + row, k = kTile * B + column;
      a(A, B) = i < s && k <= i ? G[i * s + k] : 0.0;
      if (i == k) diagonal += a(A, B);
    }
  }
  const double shifted = shift * block_sum(diagonal, lines);
#pragma unroll
  for (int A = 0; A < kTiles; ++A) {
    if (row == column) a(A, A) += shifted;
  }

  int failed = 0;
#pragma unroll
  for (int J = 0; J < kTiles; ++J) {  // unrolled, so that tiles above row j cost nothing and registers have fixed names
    for (int t = 0; t < kTile && kTile * J + t < s && failed == 0; ++t) {
      const int j = kTile * J + t;
      double* line = lines + j % 2 * Side;
#pragma unroll
      for (int A = J; A < kTiles; ++A) {
        if (column == t && kTile * A + row >= j) line[kTile * A + row] = a(A, J);
      }
#pragma unroll
      for (int B = 0; B <= J; ++B) {
        if (row == t && kTile * B + column < j) line[kTile * B + column] = a(J, B);
      }
      __syncthreads();

      const double pivot = line[j];
      if (!(pivot > 0 && pivot < INFINITY)) {
        failed = j + 1;
        break;
      }
      const double root = sqrt(pivot), reciprocal = 1 / pivot;
      if (thread < s) {
        if (thread >= j) L[packed(thread, j)] = line[thread] / root;
        inverse[j * s + thread] = thread > j ? 0.0 : (thread == j ? 1.0 : line[thread]) / root;
      }

      double multiplier[kTiles], entry[kTiles];  // of row i, of column k
#pragma unroll
      for (int A = J; A < kTiles; ++A) {
        const int i = kTile * A + row;
        multiplier[A] = i > j ? line[i] * reciprocal : 0.0;
      }
#pragma unroll
      for (int B = 0; B < kTiles; ++B) {
        const int k = kTile * B + column;
        entry[B] = k == j ? 1.0 : line[k];
      }
#pragma unroll
      for (int A = J; A < kTiles; ++A) {
        if (column == t && kTile * A + row > j) a(A, J) = 0;  // column j now belongs to the inverse
#pragma unroll
        for (int B = 0; B <= A; ++B) a(A, B) -= multiplier[A] * entry[B];
      }
    }
  }

  __syncthreads();
  for (int entry = thread; entry < s * s; entry += kThreads) {
    const int i = entry / s, k = entry % s;
    factor[entry] = failed != 0 ? NAN : k <= i ? L[packed(i, k)] : 0.0;
    if (failed != 0) inverse[entry] = NAN;
  }
  if (thread == 0) status[blockIdx.x] = failed;
}

}  // namespace

extern "C" cudaError_t cholesky_inverse_launch(const double* G, double* factor, double* inverse, int32_t* status,
                                               int64_t batch, int64_t s, double shift, cudaStream_t stream) {
  if (batch < 0 || batch > INT32_MAX || s < 0 || s > 128 || !(shift >= 0)) return cudaErrorInvalidValue;
  if (batch == 0 || s == 0) return cudaSuccess;
  const auto run = [&]<int Side>() {
    return launch(cholesky_kernel<Side>, dim3(static_cast<unsigned>(batch)), dim3(kTile, kTile),
                  shared_bytes<Side>(static_cast<int>(s)), stream, G, factor, inverse, status, static_cast<int>(s),
                  shift);
  };
  return s <= 32 ? run.operator()<32>() : s <= 64 ? run.operator()<64>() : s <= 96 ? run.operator()<96>()
                                                                                   : run.operator()<128>();
}

}  // namespace isomerge
