// The passes of TIES: for thresholds, the majority, and the means of the entries that agree with the elected sign.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

constexpr std::int64_t DIGITS = 1 << 16;

// How often each digit of 16 bits occurs in the magnitudes of values: the high one, or with `high`, the low one of those
// that have this high one.
class Digits {
 public:
  // Counts are added to counts[DIGITS], all of them when this ends.
  Digits(std::optional<std::uint32_t> high, std::int64_t* counts);
  Digits(Digits&&) = default;
  ~Digits();

  void add(const float* values, std::int64_t count);

 private:
  void flush();

  std::optional<std::uint32_t> high_;
  std::int64_t* counts_;
  std::vector<std::uint32_t> even_, odd_;  // of high digits; neighbours are often alike: two counts go on at once
  std::int64_t waiting_ = 0;               // values that are counted there and not yet in `counts_`
};

// Of each column i, deltas[t stride + i] for all tasks t, entries below thresholds[t] in magnitude count as zero.

// The sum over all columns of the signs of their sums.
std::int64_t votes(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count);

// Of each column the mean of those entries that have the sign of their sum; where that is zero, the sign `majority`.
void elect(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, int majority,
           std::int64_t count, float* merged);
