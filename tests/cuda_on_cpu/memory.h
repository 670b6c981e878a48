// Memory in which accesses out of bounds are errors.
#pragma once

#include <cstddef>

namespace cuda_on_cpu {

constexpr int kPoison = 0xff;  // repeated, NaN as bfloat16, float32 and float64, and -1 as an integer

// Pages that cost nothing until they are touched.
unsigned char* reserve(std::size_t bytes);

// `bytes` of poison, aligned to `alignment`, that end less than `alignment` before 1 MiB without access and begin less
// than a page behind as much.
unsigned char* guarded(std::size_t bytes, std::size_t alignment);

void release(void* buffer);

}  // namespace cuda_on_cpu
