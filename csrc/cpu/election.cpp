#include "election.h"

#include <algorithm>
#include <cmath>

#include "values.h"

namespace {

constexpr std::int64_t BLOCK = 1024;       // columns at a time: four arrays of 4 KiB stay in the first cache
constexpr std::int64_t GUESSED = 1 << 14;  // columns that are decided by one guess of the majority

constexpr int LOW = 16, HIGH = 15;                       // bits of a magnitude: the digits that are counted
constexpr std::int64_t COUNTED = std::int64_t{1} << 30;  // values whose counts 32 bits hold

ISOMERGE_INLINE std::uint32_t high_digit(float value) { return bits<std::uint32_t>(value) << 1 >> (LOW + 1); }

// Which digit the k-th largest value has; k becomes its rank among the values of that digit.
std::uint32_t digit_of(const std::vector<std::int64_t>& counts, std::int64_t& k) {
  std::uint32_t digit = static_cast<std::uint32_t>(counts.size()) - 1;
  while (k > counts[digit]) k -= counts[digit--];
  return digit;
}

int sign(std::int64_t value) { return (value > 0) - (value < 0); }

// Columns first .. first + length - 1: their means to `merged`, with `majority` where a sum is zero. Returns the sum of
// the signs of all sums.
ISOMERGE_INLINE std::int64_t decide(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds,
                                    std::int64_t first, std::int64_t length, int majority, float* __restrict merged) {
  alignas(64) float sums[2][BLOCK];
  alignas(64) std::int32_t counts[2][BLOCK];
  float* __restrict const positive = sums[0];
  float* __restrict const negative = sums[1];
  std::int32_t* __restrict const positives = counts[0];
  std::int32_t* __restrict const negatives = counts[1];
  std::fill_n(positive, length, 0.0f);
  std::fill_n(negative, length, 0.0f);
  std::fill_n(positives, length, 0);
  std::fill_n(negatives, length, 0);
  for (std::size_t t = 0; t < thresholds.size(); ++t) {
    const float* __restrict delta = deltas + static_cast<std::int64_t>(t) * stride + first;
    const float threshold = thresholds[t];
    for (std::int64_t i = 0; i < length; ++i) {
      const float value = delta[i], magnitude = std::fabs(value);
      const float kept = magnitude >= threshold ? value : 0.0f;
      positive[i] += std::max(kept, 0.0f);
      negative[i] += std::max(-kept, 0.0f);
      positives[i] += static_cast<std::int32_t>(kept > 0.0f);  // of whole numbers no masked stores are made
      negatives[i] += static_cast<std::int32_t>(kept < 0.0f);
    }
  }
  std::int32_t votes = 0;
  const float undecided = static_cast<float>(majority);
  for (std::int64_t i = 0; i < length; ++i) {
    const float elected = positive[i] - negative[i];
    const float winner = elected == 0.0f ? undecided : elected;
    const float above = positive[i] / static_cast<float>(std::max(positives[i], 1));
    const float below = 0.0f - negative[i] / static_cast<float>(std::max(negatives[i], 1));
    merged[first + i] = winner > 0.0f ? above : winner < 0.0f ? below : 0.0f;
    votes += static_cast<std::int32_t>(elected > 0.0f) - static_cast<std::int32_t>(elected < 0.0f);
  }
  return votes;
}

ISOMERGE_CLONES
std::int64_t decide_blocks(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds,
                           std::int64_t first, std::int64_t last, int majority, float* merged) {
  std::int64_t votes = 0;
  for (; first < last; first += BLOCK) {
    votes += decide(deltas, stride, thresholds, first, std::min(BLOCK, last - first), majority, merged);
  }
  return votes;
}

// How often each low digit occurs among the values whose high digit is `high`, most often few.
ISOMERGE_CLONES
void count_low_digits(const float* values, std::int64_t count, std::uint32_t high, std::int64_t* counts) {
  constexpr std::int64_t STEP = 32;  // looked at together
  for (std::int64_t first = 0; first < count; first += STEP) {
    const std::int64_t length = std::min(STEP, count - first);
    std::uint32_t found = 0;
    for (std::int64_t i = first; i < first + length; ++i) {
      found |= high_digit(values[i]) == high ? 1u : 0u;
    }
    if (!found) continue;
    for (std::int64_t i = first; i < first + length; ++i) {
      if (high_digit(values[i]) == high) ++counts[bits<std::uint32_t>(values[i]) & ((1u << LOW) - 1)];
    }
  }
}

}  // namespace

float kth_largest(const float* values, std::int64_t count, std::int64_t k) {
  // Magnitudes are ordered as their bits. Neighbours are often alike: two tables let two counts go on at once.
  std::vector<std::uint32_t> even(1 << HIGH), odd(1 << HIGH);
  std::vector<std::int64_t> totals(1 << HIGH);
  for (std::int64_t first = 0; first < count; first += COUNTED) {
    const std::int64_t last = std::min(count, first + COUNTED);
    std::fill(even.begin(), even.end(), 0);
    std::fill(odd.begin(), odd.end(), 0);
    std::int64_t i = first;
    for (; i + 2 <= last; i += 2) {
      ++even[high_digit(values[i])];
      ++odd[high_digit(values[i + 1])];
    }
    if (i < last) ++even[high_digit(values[i])];
    for (std::size_t digit = 0; digit < totals.size(); ++digit) totals[digit] += std::int64_t{even[digit]} + odd[digit];
  }
  const std::uint32_t high = digit_of(totals, k);
  std::vector<std::int64_t> lower(1 << LOW);
  count_low_digits(values, count, high, lower.data());
  return bits<float>(high << LOW | digit_of(lower, k));
}

void elect(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count,
           float* merged) {
  std::int64_t votes = 0;
  std::vector<int> guesses;
  for (std::int64_t first = 0; first < count; first += GUESSED) {
    guesses.push_back(sign(votes));
    votes += decide_blocks(deltas, stride, thresholds, first, std::min(first + GUESSED, count), guesses.back(), merged);
  }
  for (std::size_t block = 0; block < guesses.size(); ++block) {
    if (guesses[block] == sign(votes)) continue;
    const std::int64_t first = static_cast<std::int64_t>(block) * GUESSED;
    decide_blocks(deltas, stride, thresholds, first, std::min(first + GUESSED, count), sign(votes), merged);
  }
}
