#include "draws.h"

#include <cmath>

#include "clones.h"

namespace {

// Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators", with the constants of Vigna's version.
constexpr std::uint64_t STEP = 0x9E3779B97F4A7C15;

ISOMERGE_INLINE std::uint64_t mixed(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

ISOMERGE_CLONES
void drop(const float* values, std::int64_t count, double density, std::uint64_t seed, std::int64_t first,
          float* kept) {
  const float divisor = static_cast<float>(density);
  // a whole number is below the bound where it is below the next whole number from it
  const std::uint64_t bound = static_cast<std::uint64_t>(std::ceil(density * 0x1p32));
  const std::uint64_t start = seed + (static_cast<std::uint64_t>(first) + 1) * STEP;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint64_t draw = mixed(start + static_cast<std::uint64_t>(i) * STEP) >> 32;
    kept[i] = draw < bound ? values[i] / divisor : 0.0f;
  }
}
