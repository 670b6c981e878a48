// Two-sided cyclic Jacobi in float64, one block per matrix, s / 2 rotations at a time.
//
// A sweep is a round-robin tournament: with n = s players, or s + 1, in n - 1 rounds each meets each other once. The
// n / 2 pairs of a round are disjoint, so their rotations are one orthogonal J, and G <- JᵀGJ splits into 2 x 2 blocks,
// one for each two pairs, that touch no other's entries: a round is two steps, the rotations with the diagonal blocks,
// and the other blocks with the eigenvectors V <- V J.
//
// Equal eigenvalues. Entries between them are of second order, but ask for rotations by large angles, which spoil what
// the sweep has done for entries of first order: two eigenvalues of multiplicity 64 took more than 24 sweeps. While
// there are larger entries these pairs are passed over: 9 sweeps.
//
// Where things live. At s = 128 G is 64.5 KB of shared memory as a packed triangle. V, 128 KB, would fit beside it on
// sm_90 only; it is in registers: four threads hold a row, 16 pairs each. So that registers have fixed names, pairs
// stay in place and columns move, as on a round table: neighbours pass one number up and one down in each round.
// 512 threads of up to 128 registers are the whole register file: one block per multiprocessor.

#include "jacobi.cuh"

#include <common.cuh>
#include <launch.cuh>

namespace isomerge {
namespace {

constexpr int kThreadsPerRow = 4;
constexpr int kMaxSweeps = 40;  // 6 to 10 are usual; sixteen decades of eigenvalues took 25, the most of those tried
constexpr float kNear = 0.1f;   // of a typical off-diagonal entry: smaller ones between near eigenvalues are left
constexpr double kEps = 2.220446049250313e-16;

template <int Side>
struct Config {
  static constexpr int kThreads = kThreadsPerRow * Side;
  static constexpr int kPairs = Side / 2 / kThreadsPerRow;  // held by one thread
  static constexpr int kRotations = Side / 2 + kThreadsPerRow;
};

// Pair k of one thread's quarter, each quarter one entry further: four lanes then read from different banks.
template <int Side>
__device__ __forceinline__ int rotation_index(int pair) {
  return pair + pair / Config<Side>::kPairs;
}

__device__ __forceinline__ int triangle(int i, int k) {
  const int low = min(i, k), high = max(i, k);
  return high * (high + 1) / 2 + low;
}

// The players of a pair: player n - 1 keeps its seat, the others move by one from round to round.
struct Pair {
  int p, q;
};

__device__ __forceinline__ Pair seated(int pair, int round, int n) {
  const int p = round + pair, q = round - pair;
  return {p >= n - 1 ? p - (n - 1) : p, pair == 0 ? n - 1 : q < 0 ? q + n - 1 : q};
}

// Of the smaller of the two angles that take an off-diagonal entry, not zero, to zero.
struct Rotation {
  double sin, tan, half;  // the last of half the angle
};

__device__ __forceinline__ Rotation annihilate(double pp, double qq, double pq) {
  const double tau = (qq - pp) / (2 * pq);
  const double tan = copysign(1 / (fabs(tau) + sqrt(1 + tau * tau)), tau);
  const double cos = 1 / sqrt(1 + tan * tan);
  return {tan * cos, tan, tan * cos / (1 + cos)};
}

// (p, q) <- (cos p - sin q, sin p + cos q), written as a correction to p and to q (Rutishauser 1966): at s = 128,
// VᵀV - I is then 1.5e-15 after all sweeps instead of 3e-14.
__device__ __forceinline__ void rotate(double& p, double& q, double2 sin_half) {
  const double old = p;
  p -= sin_half.x * (q + sin_half.y * p);
  q += sin_half.x * (old - sin_half.y * q);
}

template <int Side>
constexpr std::size_t shared_bytes(int n) {
  const int warps = Config<Side>::kThreads / kWarp;
  return sizeof(double) * (2 * Config<Side>::kRotations + warps + Side + n * (n + 1) / 2) + sizeof(int32_t) * Side;
}

template <int Side>
__global__ void __launch_bounds__(Config<Side>::kThreads, 1)
jacobi_kernel(const double* __restrict__ G, double* __restrict__ values, double* __restrict__ vectors,
              int32_t* __restrict__ status, int s) {
  using C = Config<Side>;
  const int n = s + s % 2, pairs = n / 2;  // an odd side gets a player whose row is zero, which no rotation touches
  auto* rotations = reinterpret_cast<double2*>(dynamic_shared());
  auto* scratch = reinterpret_cast<double*>(rotations + C::kRotations);  // one number per warp
  double* diagonal = scratch + C::kThreads / kWarp;                      // [Side]
  double* g = diagonal + Side;                                           // packed triangle
  auto* place = reinterpret_cast<int32_t*>(g + n * (n + 1) / 2);         // [Side]
  const int thread = threadIdx.x, row = thread / kThreadsPerRow, quarter = thread % kThreadsPerRow;
  const int first_pair = quarter * C::kPairs;
  G += int64_t{blockIdx.x} * s * s, vectors += int64_t{blockIdx.x} * s * s, values += int64_t{blockIdx.x} * s;

  bool finite = true;
  double largest = 0;
  for (int entry = thread; entry < n * n; entry += C::kThreads) {
    const int i = entry / n, k = entry % n;
    if (k > i) continue;
    const double value = i < s ? G[i * s + k] : 0.0;
    g[triangle(i, k)] = value;
    finite = finite && fabs(value) < INFINITY;
    largest = fmax(largest, fabs(value));
  }
  if (__syncthreads_or(!finite)) {
    for (int entry = thread; entry < s * s; entry += C::kThreads) vectors[entry] = NAN;
    if (thread < s) values[thread] = NAN;
    if (thread == 0) status[blockIdx.x] = -1;
    return;
  }
  largest = block_reduce<Max>(largest, scratch);
  const int exponent = largest > 0 ? ilogb(largest) : 0;  // entries of 1 and below: no square overflows
  for (int entry = thread; entry < n * (n + 1) / 2; entry += C::kThreads) g[entry] = scalbn(g[entry], -exponent);

  // V = I, columns in the seats of round 0; seats beyond the table are empty and rotate by nothing.
  double top[C::kPairs], bottom[C::kPairs];
#pragma unroll
  for (int k = 0; k < C::kPairs; ++k) {
    const Pair columns = seated(first_pair + k, 0, n);
    top[k] = first_pair + k < pairs && columns.p == row ? 1 : 0;
    bottom[k] = first_pair + k < pairs && columns.q == row ? 1 : 0;
  }
  for (int pair = pairs + thread; pair < Side / 2; pair += C::kThreads) {
    rotations[rotation_index<Side>(pair)] = make_double2(0, 0);
  }
  __syncthreads();

  int sweep = 0;
  for (;; ++sweep) {
    double off = 0, all = 0;  // squared Frobenius norms, off the diagonal and of all
    for (int entry = thread; entry < n * n; entry += C::kThreads) {
      const int i = entry / n, k = entry % n;
      if (k > i) continue;
      const double square = g[triangle(i, k)] * g[triangle(i, k)];
      all += (k < i ? 2 : 1) * square;
      off += (k < i ? 2 : 0) * square;
    }
    all = block_sum(all, scratch);
    off = block_sum(off, scratch);
    if (off <= kEps * kEps * all) break;
    if (sweep == kMaxSweeps) {
      sweep = -2;
      break;
    }
    const float typical = static_cast<float>(sqrt(off) / n);  // of the entries off the diagonal

    for (int round = 0; round < n - 1; ++round) {
      if (thread < pairs) {
        const Pair pair = seated(thread, round, n);
        double &pp = g[triangle(pair.p, pair.p)], &qq = g[triangle(pair.q, pair.q)], &pq = g[triangle(pair.p, pair.q)];
        Rotation rotation = {0, 0, 0};
        if (pq != 0 && !(fabs(pq) < kNear * typical && fabs(qq - pp) < typical)) {
          rotation = annihilate(pp, qq, pq);
          pp -= rotation.tan * pq;
          qq += rotation.tan * pq;
          pq = 0;
        }
        rotations[rotation_index<Side>(thread)] = make_double2(rotation.sin, rotation.half);
      }
      __syncthreads();

      for (int block = thread; block < pairs * (pairs - 1) / 2; block += C::kThreads) {  // row by row, K > M
        const int K = static_cast<int>(1 + sqrtf(1.0f + 8.0f * block)) / 2, M = block - K * (K - 1) / 2;
        const Pair rows = seated(K, round, n), columns = seated(M, round, n);
        const double2 left = rotations[rotation_index<Side>(K)], right = rotations[rotation_index<Side>(M)];
        double &pp = g[triangle(rows.p, columns.p)], &pq = g[triangle(rows.p, columns.q)];
        double &qp = g[triangle(rows.q, columns.p)], &qq = g[triangle(rows.q, columns.q)];
        double a = pp, b = pq, c = qp, d = qq;
        rotate(a, b, right);
        rotate(c, d, right);
        rotate(a, c, left);
        rotate(b, d, left);
        pp = a, pq = b, qp = c, qq = d;
      }
#pragma unroll
      for (int k = 0; k < C::kPairs; ++k) {
        rotate(top[k], bottom[k], rotations[quarter * (C::kPairs + 1) + k]);
      }
      // The table turns by one seat: the top row to the left, the bottom row to the right, bottom 0 stays.
      if (pairs > 1) {
        const double from_right = __shfl_down_sync(kAllLanes, top[0], 1, kThreadsPerRow);
        const double from_left = __shfl_up_sync(kAllLanes, bottom[C::kPairs - 1], 1, kThreadsPerRow);
        const double leaving = top[0];
#pragma unroll
        for (int k = 0; k < C::kPairs; ++k) {
          const double next = k + 1 < C::kPairs ? top[k + 1] : from_right;
          top[k] = first_pair + k == pairs - 1 ? bottom[k] : next;
        }
        const double stays = bottom[0];
#pragma unroll
        for (int k = C::kPairs - 1; k > 0; --k) bottom[k] = bottom[k - 1];
        bottom[0] = quarter == 0 ? stays : from_left;
        if (quarter == 0) bottom[1] = leaving;
      }
      __syncthreads();
    }
  }

  if (thread < s) diagonal[thread] = g[triangle(thread, thread)];
  __syncthreads();
  if (thread < s) {
    const double value = diagonal[thread];
    int smaller = 0;  // and equal ones before it: each eigenvalue has a place of its own
    for (int i = 0; i < s; ++i) smaller += diagonal[i] < value || (diagonal[i] == value && i < thread);
    place[thread] = smaller;
    values[smaller] = scalbn(value, exponent);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < C::kPairs; ++k) {  // after whole sweeps every column is back in its first seat
    if (row >= s || first_pair + k >= pairs) continue;
    const Pair columns = seated(first_pair + k, 0, n);
    vectors[row * s + place[columns.p]] = top[k];
    if (columns.q < s) vectors[row * s + place[columns.q]] = bottom[k];
  }
  if (thread == 0) status[blockIdx.x] = sweep;
}

}  // namespace

extern "C" cudaError_t small_eigh_launch(const double* G, double* values, double* vectors, int32_t* status,
                                         int64_t batch, int64_t s, cudaStream_t stream) {
  if (batch < 0 || batch > INT32_MAX || s < 0 || s > 128) return cudaErrorInvalidValue;
  if (batch == 0 || s == 0) return cudaSuccess;
  const auto run = [&]<int Side>() {
    return launch(jacobi_kernel<Side>, dim3(static_cast<unsigned>(batch)), dim3(Config<Side>::kThreads),
                  shared_bytes<Side>(static_cast<int>(s + s % 2)), stream, G, values, vectors, status,
                  static_cast<int>(s));
  };
  return s <= 32 ? run.operator()<32>() : s <= 64 ? run.operator()<64>() : s <= 96 ? run.operator()<96>()
                                                                                   : run.operator()<128>();
}

}  // namespace isomerge
