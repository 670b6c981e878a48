// Random dropping: what DARE does to a delta.

#pragma once

#include <cstdint>

// kept[i] = values[i] / density where the first 32 bits of number first + i of SplitMix64, started from `seed`, are
// below density 2^32, else 0.
void drop(const float* values, std::int64_t count, double density, std::uint64_t seed, std::int64_t first, float* kept);
