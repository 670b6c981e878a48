// Elements that are merged on their way from files, without ever lying in memory as a whole.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "passes.h"

// Elements of an open file from the byte `offset` on.
struct Stretch {
  int file;
  std::int64_t offset;
  Dtype dtype;
};

// Sums over all elements, in float64.
struct Squares {
  double sum;     // of the squared sum over t of weights[t] (tuned[t] - base)
  double update;  // of the squared update: that sum, or the mean over t
};

// outs[a][i] = base[i] + scales[a] update[i], rounded as by `finalize`, update[i] as by `subtract`.
// Nothing, and what `outs` holds is of no use, unless every block could be read and its update is finite and not zero.
std::optional<Squares> blend(Stretch base, const std::vector<Stretch>& tuned, const std::vector<float>& weights,
                             std::int64_t count, Reduction reduction, const std::vector<float>& scales,
                             const std::vector<void*>& outs, Dtype dtype);
