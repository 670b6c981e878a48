// One operand of a tile of a product, on its way from global memory through shared memory to tensor cores.
//
// It is copied as it lies, by cp.async, and read as fragments of bfloat16: by ldmatrix where it is bfloat16, transposed
// where the sum runs over rows. A float32 operand is split in registers into three bfloat16 planes of 8 bits: their sum
// is the float32 to its 24 bits, from 2^-110 up to where bfloat16 ends, 3.39e38.
#pragma once

#include <common.cuh>
#include <ptx.cuh>

#include <cstdint>

namespace isomerge {

// A row-major matrix in global memory. Elements of a row are adjacent; outside of rows x cols it counts as zero.
template <class T>
struct Matrix {
  const T* data;
  std::int64_t rows, cols, stride;  // rows and cols below 2^31
};

// Matrices of one shape, `stride` elements apart.
template <class T>
struct Stack {
  Matrix<T> first;
  std::int64_t stride;

  __device__ __forceinline__ Matrix<T> operator[](std::int64_t i) const {
    return {first.data + i * stride, first.rows, first.cols, first.stride};
  }
};

// Which index of the operands as they lie in memory the sum runs over: Yᵀ Y sums over rows, X Δᵀ over columns.
enum class SumOver { kRows, kColumns };

// kExtent x kDepth summands of one operand in shared memory, in its own row-major order and dtype.
template <class T, SumOver kSumOver, int kExtent, int kDepth>
struct SharedTile {
  using Element = T;
  static constexpr bool kSumOverRows = kSumOver == SumOver::kRows;
  static constexpr int kSummands = kDepth;
  static constexpr int kRows = kSumOverRows ? kDepth : kExtent;
  static constexpr int kPerChunk = 16 / sizeof(T);
  static constexpr int kChunks = (kSumOverRows ? kExtent : kDepth) / kPerChunk;  // of 16 bytes, per row
  static constexpr int kPitch = kChunks <= 4 ? 4 : (kChunks + 7) / 8 * 8;
  static constexpr int kBytes = kRows * kPitch * 16;
  static constexpr int kPlanes = sizeof(T) == 2 ? 1 : 3;

  // Chunks of a row change places within 128 bytes, all banks of shared memory. A quarter of an ldmatrix reads one
  // chunk of eight rows; a float32 fragment two chunks of four rows (by columns) or of four pairs of rows (by rows).
  static __device__ __forceinline__ int offset(int row, int chunk) {
    int moved = chunk;
    if constexpr (sizeof(T) == 4) {
      moved ^= ((kSumOverRows ? row / 2 : row) & 3) * 2;
    } else {
      moved ^= kPitch == 4 ? row / 2 & 3 : row & 7;
    }
    return (row * kPitch + moved) * 16;
  }

  // Bytes to the element `extent` along the result and `depth` along the sum.
  static __device__ __forceinline__ int element(int extent, int depth) {
    const int row = kSumOverRows ? depth : extent, col = kSumOverRows ? extent : depth;
    return offset(row, col / kPerChunk) + col % kPerChunk * static_cast<int>(sizeof(T));
  }

  // The same for an element further than the one at `from` by constant multiples of 8. Rows 8 apart are swizzled alike,
  // and the bits that are added to the chunk are 0 in `from`, by the order in which TileProduct deals out fragments: so
  // this is one exclusive or at most, and the rest becomes part of the instruction that reads.
  static __device__ __forceinline__ int further(int from, int extent, int depth) {
    const int rows = kSumOverRows ? depth : extent;
    const int chunks = (kSumOverRows ? extent : depth) / kPerChunk;
    return (from ^ chunks % 8 * 16) + chunks / 8 * 128 + rows * kPitch * 16;
  }

  // A 16 x 16 fragment is four 8 x 8 matrices. In a left operand of mma, the second lies along the result; in a right
  // one, along the sum: there 0 and 1, then 2 and 3, serve 8 columns each and must be neighbours in registers.
  template <bool kIsRight>
  static constexpr __device__ __forceinline__ int along_result(int matrix) {
    return (kIsRight ? matrix / 2 : matrix % 2) * 8;
  }
  template <bool kIsRight>
  static constexpr __device__ __forceinline__ int along_sum(int matrix) {
    return (kIsRight ? matrix % 2 : matrix / 2) * 8;
  }

  // What this lane reads first of a fragment that begins at `extent`: for ldmatrix row lane % 8 of matrix lane / 8, in
  // float32 its own pair of the first matrix, at lane / 4 along the result and lane % 4 * 2 along the sum.
  template <bool kIsRight>
  static __device__ __forceinline__ int lane_offset(int extent) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kPlanes == 3) return element(extent + lane / 4, lane % 4 * 2);
    const int e = extent + along_result<kIsRight>(lane / 8), d = along_sum<kIsRight>(lane / 8);
    return kSumOverRows ? element(e, d + lane % 8) : element(e + lane % 8, d);
  }

  // Planes of the fragment `extent` and `depth` further than the one that `from` is a lane_offset into.
  template <bool kIsRight>
  static __device__ __forceinline__ void fragment(std::uint32_t (&planes)[kPlanes][4], const unsigned char* shared,
                                                  int from, int extent, int depth) {
    if constexpr (kPlanes == 1 && kSumOverRows) {
      load_matrices_transposed(planes[0], shared + further(from, extent, depth));
    } else if constexpr (kPlanes == 1) {
      load_matrices(planes[0], shared + further(from, extent, depth));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned char* pair =
            shared + further(from, extent + along_result<kIsRight>(i), depth + along_sum<kIsRight>(i));
        constexpr int kNext = kSumOverRows ? kPitch * 16 : static_cast<int>(sizeof(T));
        float2 rest = {*reinterpret_cast<const T*>(pair), *reinterpret_cast<const T*>(pair + kNext)};
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          planes[p][i] = pack_bfloat16(rest.x, rest.y);
          rest.x -= __uint_as_float(planes[p][i] << 16);
          rest.y -= __uint_as_float(planes[p][i] & 0xffff0000u);
        }
      }
    }
  }
};

// One thread's part in copying the tiles of one operand, stage after stage: the same place in all, so that within a
// matrix a stage costs an instruction per chunk.
template <class Tile, int kThreads>
class TileCopy {
  using T = typename Tile::Element;

 public:
  // From the tile whose first element is at `extent` along the result and `depth` along the sum.
  __device__ __forceinline__ TileCopy(const Matrix<T>& matrix, std::int64_t extent, std::int64_t depth) {
    const std::int64_t row = (Tile::kSumOverRows ? depth : extent) + first_row();
    const std::int64_t col = (Tile::kSumOverRows ? extent : depth) + first_chunk() * Tile::kPerChunk;
    next_ = matrix.data + row * matrix.stride + col;
    stride_ = matrix.stride;
    rows_left_ = static_cast<int>(matrix.rows - row);
    cols_left_ = static_cast<int>(matrix.cols - col);
    const std::uint64_t row_bytes = static_cast<std::uint64_t>(stride_) * sizeof(T);
    aligned_ = (reinterpret_cast<std::uintptr_t>(matrix.data) | row_bytes) % 16 == 0;
  }

  // Starts the copy of the next tile; elements outside of the matrix become zeros.
  __device__ __forceinline__ void start(unsigned char* tile) {
    unsigned char* target = tile + Tile::offset(first_row(), first_chunk());
    const bool rows_inside = rows_left_ > (kPasses - 1) * kRowsPerPass;
    const bool cols_inside = cols_left_ >= (kGroups - 1) * kChunkStep + Tile::kPerChunk;
    if (rows_inside && cols_inside && aligned_) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          if (exists(group)) copy_async(target + moved(pass, group), source(pass, group), 16);
        }
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < kPasses * kGroups; ++i) {
        if (exists(i % kGroups)) copy_at_edge(target + moved(i / kGroups, i % kGroups), i / kGroups, i % kGroups);
      }
    }
    if constexpr (Tile::kSumOverRows) {
      next_ += Tile::kSummands * stride_;
      rows_left_ -= Tile::kSummands;
    } else {
      next_ += Tile::kSummands;
      cols_left_ -= Tile::kSummands;
    }
  }

 private:
  // Eight neighbouring lanes copy 128 bytes of a row. A thread takes every kRowsPerPass-th row and every eighth chunk:
  // the swizzle moves these alike.
  static constexpr int kLanes = Tile::kChunks < 8 ? Tile::kChunks : 8;
  static constexpr int kRowsPerPass = kThreads / kLanes, kPasses = Tile::kRows / kRowsPerPass;
  static constexpr int kGroups = ceil_div(Tile::kChunks, kLanes), kChunkStep = kLanes * Tile::kPerChunk;
  static_assert(kRowsPerPass % 8 == 0 && kPasses * kRowsPerPass == Tile::kRows);

  static __device__ __forceinline__ int first_row() { return threadIdx.x / kLanes; }
  static __device__ __forceinline__ int first_chunk() { return threadIdx.x % kLanes; }
  static __device__ __forceinline__ bool exists(int group) { return first_chunk() + group * kLanes < Tile::kChunks; }
  static __device__ __forceinline__ int moved(int pass, int group) {
    return (pass * kRowsPerPass * Tile::kPitch + group * kLanes) * 16;
  }

  __device__ __forceinline__ const T* source(int pass, int group) const {
    return next_ + pass * kRowsPerPass * stride_ + group * kChunkStep;
  }

  __device__ __forceinline__ void copy_at_edge(unsigned char* target, int pass, int group) const {
    const int left = rows_left_ > pass * kRowsPerPass ? cols_left_ - group * kChunkStep : 0;
    const int valid = max(0, min(left, Tile::kPerChunk));
    if (aligned_) {
      copy_async(target, source(pass, group), valid * static_cast<int>(sizeof(T)));
    } else {
      for (int e = 0; e < Tile::kPerChunk; ++e) {
        reinterpret_cast<T*>(target)[e] = e < valid ? source(pass, group)[e] : T{};
      }
    }
  }

  const T* next_;  // this thread's first element of the next tile
  std::int64_t stride_;
  int rows_left_, cols_left_;  // from there to the end of the matrix
  bool aligned_;               // whether every row begins at a multiple of 16 bytes, as cp.async needs it
};

}  // namespace isomerge
