#include "election.h"

#include <algorithm>
#include <cmath>

#include "values.h"

namespace {

constexpr std::int64_t BLOCK = 1024;  // columns at a time: four arrays of 4 KiB stay in the first cache

constexpr int DIGIT = 16, HIGH = 15;                     // bits of a digit, and of the high one without the sign
constexpr std::int64_t COUNTED = std::int64_t{1} << 30;  // values whose counts 32 bits hold

ISOMERGE_INLINE std::uint32_t high_digit(float value) { return bits<std::uint32_t>(value) << 1 >> (DIGIT + 1); }

// What is kept of the columns first .. first + length - 1: sums of the positive entries and of the negative ones'
// magnitudes.
struct Sums {
  alignas(64) float positive[BLOCK], negative[BLOCK];
};

// Calls seen(i, entry or zero) for every entry, in addition.
template <class Seen>
ISOMERGE_INLINE void add(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds,
                         std::int64_t first, std::int64_t length, Sums& sums, Seen seen) {
  float* __restrict const positive = sums.positive;
  float* __restrict const negative = sums.negative;
  std::fill_n(positive, length, 0.0f);
  std::fill_n(negative, length, 0.0f);
  for (std::size_t t = 0; t < thresholds.size(); ++t) {
    const float* __restrict delta = deltas + static_cast<std::int64_t>(t) * stride + first;
    const float threshold = thresholds[t];
    for (std::int64_t i = 0; i < length; ++i) {
      const float value = delta[i], magnitude = std::fabs(value);
      const float kept = magnitude >= threshold ? value : 0.0f;
      positive[i] += std::max(kept, 0.0f);
      negative[i] += std::max(-kept, 0.0f);
      seen(i, kept);
    }
  }
}

// The means of columns first .. first + length - 1 to `merged`.
ISOMERGE_INLINE void decide(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds,
                            std::int64_t first, std::int64_t length, int majority, float* __restrict merged) {
  Sums sums;
  alignas(64) std::int32_t counts[2][BLOCK];
  std::int32_t* __restrict const positives = counts[0];
  std::int32_t* __restrict const negatives = counts[1];
  std::fill_n(positives, length, 0);
  std::fill_n(negatives, length, 0);
  add(deltas, stride, thresholds, first, length, sums, [&](std::int64_t i, float kept) ISOMERGE_LAMBDA {
    positives[i] += static_cast<std::int32_t>(kept > 0.0f);  // of whole numbers no masked stores are made
    negatives[i] += static_cast<std::int32_t>(kept < 0.0f);
  });
  const float undecided = static_cast<float>(majority);
  for (std::int64_t i = 0; i < length; ++i) {
    const float elected = sums.positive[i] - sums.negative[i];
    const float winner = elected == 0.0f ? undecided : elected;
    const float above = sums.positive[i] / static_cast<float>(std::max(positives[i], 1));
    const float below = 0.0f - sums.negative[i] / static_cast<float>(std::max(negatives[i], 1));
    merged[first + i] = winner > 0.0f ? above : winner < 0.0f ? below : 0.0f;
  }
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
      if (high_digit(values[i]) == high) ++counts[bits<std::uint32_t>(values[i]) & (DIGITS - 1)];
    }
  }
}

}  // namespace

Digits::Digits(std::optional<std::uint32_t> high, std::int64_t* counts) : high_(high), counts_(counts) {
  if (!high_) {
    even_.resize(1 << HIGH);
    odd_.resize(1 << HIGH);
  }
}

Digits::~Digits() { flush(); }

void Digits::add(const float* values, std::int64_t count) {
  if (high_) {
    count_low_digits(values, count, *high_, counts_);
    return;
  }
  while (count > 0) {
    if (waiting_ == COUNTED) flush();
    const std::int64_t length = std::min(count, COUNTED - waiting_);
    std::int64_t i = 0;
    for (; i + 2 <= length; i += 2) {
      ++even_[high_digit(values[i])];
      ++odd_[high_digit(values[i + 1])];
    }
    if (i < length) ++even_[high_digit(values[i])];
    waiting_ += length, values += length, count -= length;
  }
}

void Digits::flush() {
  if (waiting_ == 0) return;
  for (std::size_t digit = 0; digit < even_.size(); ++digit) counts_[digit] += std::int64_t{even_[digit]} + odd_[digit];
  std::fill(even_.begin(), even_.end(), 0);
  std::fill(odd_.begin(), odd_.end(), 0);
  waiting_ = 0;
}

ISOMERGE_CLONES
std::int64_t votes(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count) {
  std::int64_t total = 0;
  for (std::int64_t first = 0; first < count; first += BLOCK) {
    const std::int64_t length = std::min(BLOCK, count - first);
    Sums sums;
    add(deltas, stride, thresholds, first, length, sums, [](std::int64_t, float) ISOMERGE_LAMBDA {});
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < length; ++i) {
      const float elected = sums.positive[i] - sums.negative[i];
      sum += static_cast<std::int32_t>(elected > 0.0f) - static_cast<std::int32_t>(elected < 0.0f);
    }
    total += sum;
  }
  return total;
}

ISOMERGE_CLONES
void elect(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, int majority,
           std::int64_t count, float* merged) {
  for (std::int64_t first = 0; first < count; first += BLOCK) {
    decide(deltas, stride, thresholds, first, std::min(BLOCK, count - first), majority, merged);
  }
}
