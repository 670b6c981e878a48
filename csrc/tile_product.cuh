// One block's tile of a product on tensor cores: total[i, j] += Σ_k left(k, i) right(k, j), of bfloat16 or float32.
//
// Products: an operand is one or three planes of bfloat16 (shared_tile.cuh). Of their products those below 2^-24 of the
// first are left out: bfloat16 x bfloat16 takes 1, float32 x bfloat16 3, float32 x float32 6. TF32 would take 3 at half
// the rate, the same cost, for two planes of 11 bits; and nothing loads its operands transposed.
//
// Sums: published models of tensor cores cut every term that is added, towards zero, near the last bit of the largest.
// A chain of n additions of one sign then loses about n 2^-24 of its sum. So chains are short: after kChain additions,
// at the end of a stage, they are added to `total` in ordinary float32, which rounds to nearest. It costs one FADD per
// sum, against 6 to 12 additions of 16 products each on the tensor core.
#pragma once

#include <device_limits.cuh>
#include <launch.cuh>
#include <shared_tile.cuh>

#include <cstdint>

namespace isomerge {

struct TileConfig {
  int m, n;              // of the result
  int warps_m, warps_n;  // how the warps share it
  int depth;             // summands per stage
  int stages;            // in shared memory: one in use, the others on their way

  constexpr int threads() const { return warps_m * warps_n * kWarp; }
};

constexpr int kChain = 6;

template <class Left, class Right, SumOver kSumOver, TileConfig kConfig>
struct TileProduct {
  using LeftTile = SharedTile<Left, kSumOver, kConfig.m, kConfig.depth>;
  using RightTile = SharedTile<Right, kSumOver, kConfig.n, kConfig.depth>;

  static constexpr int kM = kConfig.m, kN = kConfig.n;
  static constexpr int kThreads = kConfig.threads();
  static constexpr int kPairs = LeftTile::kPlanes * RightTile::kPlanes, kProducts = kPairs == 9 ? 6 : kPairs;
  static constexpr int kFlushStages = ceil_div(kChain, kConfig.depth / 16 * kProducts);
  static constexpr int kStageBytes = LeftTile::kBytes + RightTile::kBytes;
  static constexpr int kSharedBytes = kConfig.stages * kStageBytes;

  // Fragments of 16 rows and of 16 columns are dealt out to the warps in turn.
  static constexpr int kRowStep = kConfig.warps_m * 16, kColStep = kConfig.warps_n * 16;
  static constexpr int kRowGroups = kM / kRowStep, kColGroups = kN / kColStep * 2;  // of one warp, 16 x 8 each

  static_assert(kRowGroups * kRowStep == kM && kColGroups / 2 * kColStep == kN);
  static_assert(kConfig.depth % 16 == 0 && kConfig.stages >= 2);
  static_assert(kSharedBytes <= kMaxSharedBytes);

  // Sums of one thread: rows row(i), row(i) + 8 and columns col(j), col(j) + 1 of the block's tile, in the order
  // (row, col), (row, col + 1), (row + 8, col), (row + 8, col + 1).
  using Sums = float[kRowGroups][kColGroups][4];

  static __device__ __forceinline__ int row(int i) { return i * kRowStep + warp_row() + threadIdx.x % kWarp / 4; }

  static __device__ __forceinline__ int col(int j) {
    return j / 2 * kColStep + warp_col() + j % 2 * 8 + threadIdx.x % 4 * 2;
  }

  // total += the product over summands begin..end, of rows left0.. and columns right0.. of the result. `end` is that of
  // the operands, or a multiple of the depth behind `begin`. `same`: both operands are one tile, as on the diagonal of
  // a Gram matrix, and it is copied once.
  static __device__ __forceinline__ void add(Sums& total, const Matrix<Left>& left, std::int64_t left0,
                                             const Matrix<Right>& right, std::int64_t right0, std::int64_t begin,
                                             std::int64_t end, bool same) {
    unsigned char* shared = dynamic_shared();
    const int steps = static_cast<int>(ceil_div<std::int64_t>(end - begin, kConfig.depth));
    TileCopy<LeftTile, kThreads> left_copy(left, left0, begin);
    TileCopy<RightTile, kThreads> right_copy(right, right0, begin);

    const auto copy = [&](int step) {
      if (step < steps) {
        unsigned char* stage = shared + step % kConfig.stages * kStageBytes;
        left_copy.start(stage);
        if (!same) right_copy.start(stage + LeftTile::kBytes);
      }
      commit_copies();  // an empty group too, so that groups count stages
    };

    Sums chain = {};
    const auto flush = [&] {
#pragma unroll
      for (int i = 0; i < kRowGroups; ++i) {
#pragma unroll
        for (int j = 0; j < kColGroups; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            total[i][j][e] += chain[i][j][e];
            chain[i][j][e] = 0;
          }
        }
      }
    };

    const int left_from = LeftTile::template lane_offset<false>(warp_row());
    const int right_from = RightTile::template lane_offset<true>(warp_col()) + (same ? 0 : LeftTile::kBytes);
    for (int step = 0; step < kConfig.stages - 1; ++step) copy(step);
    for (int step = 0; step < steps; ++step) {
      wait_copies<kConfig.stages - 2>();
      __syncthreads();  // this stage has landed for all threads, and none still reads the one that is copied into next
      copy(step + kConfig.stages - 1);
      const int stage = step % kConfig.stages * kStageBytes;
      multiply_stage(chain, shared, stage + left_from, stage + right_from);
      if (step % kFlushStages == kFlushStages - 1) flush();
    }
    flush();
    wait_copies<0>();
  }

 private:
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / kWarp / kConfig.warps_n * 16; }
  static __device__ __forceinline__ int warp_col() { return threadIdx.x / kWarp % kConfig.warps_n * 16; }

  static __device__ __forceinline__ void multiply_stage(Sums& chain, const unsigned char* shared, int left, int right) {
#pragma unroll
    for (int depth = 0; depth < kConfig.depth; depth += 16) {
      std::uint32_t b[kColGroups / 2][RightTile::kPlanes][4];
#pragma unroll
      for (int j = 0; j < kColGroups / 2; ++j) {
        RightTile::template fragment<true>(b[j], shared, right, j * kColStep, depth);
      }
#pragma unroll
      for (int i = 0; i < kRowGroups; ++i) {
        std::uint32_t a[LeftTile::kPlanes][4];
        LeftTile::template fragment<false>(a, shared, left, i * kRowStep, depth);
#pragma unroll
        for (int least = 2; least >= 0; --least) {  // the small products first: fewer terms are cut beside a large sum
#pragma unroll
          for (int p = 0; p < LeftTile::kPlanes; ++p) {
            const int q = least - p;
            if (q < 0 || q >= RightTile::kPlanes) continue;
#pragma unroll
            for (int j = 0; j < kColGroups; ++j) {  // innermost: neighbours in time do not wait for each other
              multiply_add(chain[i][j], a[p], b[j / 2][q][j % 2 * 2], b[j / 2][q][j % 2 * 2 + 1]);
            }
          }
        }
      }
    }
  }
};

}  // namespace isomerge
