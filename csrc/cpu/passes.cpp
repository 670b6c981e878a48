#include "passes.h"

#include <algorithm>

namespace {

constexpr std::int64_t BLOCK = 1024;  // elements at a time: three arrays of 4 KiB stay in the first cache
constexpr std::int64_t LANES = 16;    // partial sums, so that the order of additions is that of no vector's width

struct Lanes {
  double lanes[LANES] = {};

  ISOMERGE_INLINE void add(const float* __restrict values, std::int64_t count) {
    std::int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
      for (std::int64_t lane = 0; lane < LANES; ++lane) {
        const double value = values[i + lane];
        lanes[lane] += value * value;
      }
    }
    for (std::int64_t lane = 0; i < count; ++i, ++lane) {
      const double value = values[i];
      lanes[lane] += value * value;
    }
  }

  ISOMERGE_INLINE double total() const {
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

}  // namespace

ISOMERGE_CLONES
double subtract(Values base, const std::vector<Values>& tuned, const std::vector<float>& weights, std::int64_t count,
                Reduction reduction, float* base_out, float* deltas, std::int64_t stride) {
  alignas(64) float total[BLOCK];
  float* __restrict const sum = total;
  const std::int64_t tasks = static_cast<std::int64_t>(tuned.size());
  const float divisor = reduction == Reduction::mean ? static_cast<float>(tasks) : 1.0f;
  Lanes squares;
  for (std::int64_t first = 0; first < count; first += BLOCK) {
    const std::int64_t length = std::min(BLOCK, count - first);
    float* __restrict origin = base_out + first;
    each(base, first, length, [=](std::int64_t i, float value) ISOMERGE_LAMBDA { origin[i] = value; });
    for (std::int64_t t = 0; t < tasks; ++t) {
      const float weight = weights[t];
      float* __restrict delta = deltas + t * stride + first;
      if (reduction == Reduction::none) {
        each(tuned[t], first, length,
             [=](std::int64_t i, float value) ISOMERGE_LAMBDA { delta[i] = weight * (value - origin[i]); });
        for (std::int64_t i = 0; i < length; ++i) sum[i] = t == 0 ? delta[i] : sum[i] + delta[i];
      } else if (t == 0) {
        each(tuned[t], first, length,
             [=](std::int64_t i, float value) ISOMERGE_LAMBDA { sum[i] = weight * (value - origin[i]); });
      } else {
        each(tuned[t], first, length,
             [=](std::int64_t i, float value) ISOMERGE_LAMBDA { sum[i] += weight * (value - origin[i]); });
      }
    }
    squares.add(total, length);
    if (reduction != Reduction::none) {
      float* __restrict reduced = deltas + first;
      for (std::int64_t i = 0; i < length; ++i) reduced[i] = total[i] / divisor;
    }
  }
  return squares.total();
}

ISOMERGE_CLONES
double sum_squares(const float* values, std::int64_t count) {
  Lanes squares;
  squares.add(values, count);
  return squares.total();
}

ISOMERGE_CLONES
void finalize(Values base, const float* update, float scale, std::int64_t count, void* out, Dtype dtype) {
  alignas(64) float merged[BLOCK];
  for (std::int64_t first = 0; first < count; first += BLOCK) {
    const std::int64_t length = std::min(BLOCK, count - first);
    float* __restrict const sum = merged;
    const float* __restrict added = update + first;
    each(base, first, length,
         [=](std::int64_t i, float value) ISOMERGE_LAMBDA { sum[i] = value + scale * added[i]; });
    narrow(merged, length, out, dtype, first);
  }
}
