// The two passes of TIES: thresholds, and the means of the entries that agree with the elected sign.

#pragma once

#include <cstdint>
#include <vector>

// The k-th largest magnitude, 1 <= k <= count, of values that are not NaN.
float kth_largest(const float* values, std::int64_t count, std::int64_t k);

// Of each column i, deltas[t stride + i] for all tasks t, without entries below thresholds[t] in magnitude: the mean of
// those that have the sign of their sum; where that is zero, the sign of the sum over all columns of their signs.
void elect(const float* deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count,
           float* merged);
