// The passes over memory at either end of a merge. Each call is one thread's; pointers need no alignment.

#pragma once

#include <cstdint>
#include <vector>

#include "values.h"

enum class Reduction : int { none = 0, sum = 1, mean = 2 };

// base_out[i] = base[i] and, for each task t, weights[t] (tuned[t][i] - base[i]): to deltas[t stride + i], or their sum
// or mean over t to deltas[i], added in the order of t. Returns the sum over i of the squared sum over t, in float64.
double subtract(Values base, const std::vector<Values>& tuned, const std::vector<float>& weights, std::int64_t count,
                Reduction reduction, float* base_out, float* deltas, std::int64_t stride);

// The sum of squares, in float64.
double sum_squares(const float* values, std::int64_t count);

// out[i] = base[i] + scale update[i]: the product rounded, then the sum, then to `dtype`.
void finalize(Values base, const float* update, float scale, std::int64_t count, void* out, Dtype dtype);
