// Numbers as checkpoints store them, and their way to float32 and back; rounding is to nearest, ties to even.

#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct Values {
  const void* data;
  Dtype dtype;
};

template <class To, class From>
ISOMERGE_INLINE To bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

ISOMERGE_INLINE float widened_bfloat16(std::uint16_t value) {
  return bits<float>(static_cast<std::uint32_t>(value) << 16);
}

ISOMERGE_INLINE float widened_float16(std::uint16_t value) {
  const std::uint32_t sign = (value & 0x8000u) << 16, magnitude = value & 0x7fffu;
  const std::uint32_t normal = (magnitude << 13) + (112u << 23);
  const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-24f;  // no subnormal: none flushed
  const std::uint32_t subnormal = bits<std::uint32_t>(small);
  const std::uint32_t infinite = 0x7f800000u | (magnitude << 13);
  return bits<float>(sign | (magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : infinite));
}

ISOMERGE_INLINE std::uint16_t rounded_bfloat16(float value) {
  const std::uint32_t raw = bits<std::uint32_t>(value);
  const std::uint32_t rounded = (raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((raw & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

ISOMERGE_INLINE std::uint16_t rounded_float16(float value) {
  const std::uint32_t raw = bits<std::uint32_t>(value), sign = (raw >> 16) & 0x8000u, magnitude = raw & 0x7fffffffu;
  const std::uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Half an integer's distance is 2^-24, that of float16's subnormals: the addition rounds to them.
  const std::uint32_t subnormal = bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t bounded = normal < 0x7c00u ? normal : 0x7c00u;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : bounded;
  return static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}

// Calls use(i, value in float32) for the elements i = 0 .. count - 1 from `first` on.
template <class Use>
ISOMERGE_INLINE void each(Values values, std::int64_t first, std::int64_t count, Use use) {
  if (values.dtype == Dtype::float32) {
    const float* __restrict exact = static_cast<const float*>(values.data) + first;
    for (std::int64_t i = 0; i < count; ++i) use(i, exact[i]);
    return;
  }
  const std::uint16_t* __restrict raw = static_cast<const std::uint16_t*>(values.data) + first;
  if (values.dtype == Dtype::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) use(i, widened_bfloat16(raw[i]));
  } else {
    for (std::int64_t i = 0; i < count; ++i) use(i, widened_float16(raw[i]));
  }
}

// `count` elements to the place `first` of `out`, rounded to its dtype.
ISOMERGE_INLINE void narrow(const float* __restrict values, std::int64_t count, void* out, Dtype dtype,
                            std::int64_t first) {
  if (dtype == Dtype::float32) {
    std::memcpy(static_cast<float*>(out) + first, values, count * sizeof(float));
    return;
  }
  std::uint16_t* __restrict rounded = static_cast<std::uint16_t*>(out) + first;
  if (dtype == Dtype::bfloat16) {
    for (std::int64_t i = 0; i < count; ++i) rounded[i] = rounded_bfloat16(values[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) rounded[i] = rounded_float16(values[i]);
  }
}
