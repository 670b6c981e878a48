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

// What `drop` leaves of a delta; the numbers of element i of task t are drawn from first + t apart + i.
struct Drop {
  double density;
  std::uint64_t seed;
  std::int64_t first, apart;
};

// `count` elements of a base and of what was tuned from it, task by task, with the weights of these. Deltas are those of
// `subtract`, or what is left of them by `drop`.
struct Models {
  Stretch base;
  std::vector<Stretch> tuned;
  std::vector<float> weights;
  std::int64_t count;
  std::optional<Drop> drop;
};

// What is made of an update: outs[a][i] = base[i] + scales[a] update[i], rounded as by `finalize`.
struct Outputs {
  std::vector<float> scales;
  std::vector<void*> outs;
  Dtype dtype;
};

// Sums over all elements, in float64.
struct Squares {
  double sum;     // of the squared sum over t of weights[t] (tuned[t] - base), whatever is dropped
  double update;  // of the squared update
};

// All of these give nothing, and what they have written is of no use, where a block cannot be read or the sum of its
// deltas is not finite.

// The update is the sum of the deltas over t, or their mean, of which nothing is dropped. Nothing also where a block's
// update is zero.
std::optional<Squares> blend(const Models& models, Reduction reduction, const Outputs& outputs);

// The update is that of `elect`. Nothing also where it is zero everywhere.
std::optional<Squares> elect(const Models& models, const std::vector<float>& thresholds, int majority,
                             const Outputs& outputs);

// Those of `votes`.
std::optional<std::int64_t> votes(const Models& models, const std::vector<float>& thresholds);

// Adds to counts[t][DIGITS] those of `Digits` with highs[t] over the deltas of task t. Whether everything was counted.
bool count_digits(const Models& models, const std::vector<std::optional<std::uint32_t>>& highs, std::int64_t* counts);
