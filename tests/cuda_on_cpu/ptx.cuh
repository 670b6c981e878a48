// csrc/ptx.cuh for the emulator: what each instruction does, after the PTX ISA, "Warp Level Matrix Instructions".
//
// With g = lane / 4 and t = lane % 4 ("groupID" and "threadID_in_group"), lower 16 bits first in a register:
//
//   mma.m16n8k16   A [16, 16]   a0: A[g][2t, 2t+1]      a1: A[g+8][2t, 2t+1]
//                               a2: A[g][2t+8, 2t+9]    a3: A[g+8][2t+8, 2t+9]
//                  B [16, 8]    b0: B[2t, 2t+1][g]      b1: B[2t+8, 2t+9][g]
//                  C [16, 8]    c0, c1: C[g][2t, 2t+1]  c2, c3: C[g+8][2t, 2t+1]
//   ldmatrix.x4    lane 8i + r holds the address of row r of matrix i; register i: M_i[g][2t, 2t+1],
//                  and M_i[2t, 2t+1][g] with .trans
//
// The ISA leaves the accumulation open. Here it follows published models of tensor cores (Fasi et al., PeerJ CS 330;
// Khattak & Mikaitis, arXiv 2512.07004) with two extra bits: the sixteen products and c are each cut, towards zero, two
// bits below the last bit that float32 has for the largest of them; the exact sum of these is truncated to float32.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace isomerge {

namespace emulated {

using cuda_on_cpu::Lanes;
using cuda_on_cpu::Site;

inline float bfloat16_half(std::uint32_t pair, int half) {
  return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u);
}

inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::abs(static_cast<double>(nearest)) > std::abs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

// The sum of 17 terms as the tensor core forms it; products of two bfloat16 numbers are exact in float64.
inline float accumulated(const std::array<double, 17>& terms) {
  double largest = 0, plain = 0;
  for (const double term : terms) {
    largest = std::max(largest, std::abs(term));
    plain += term;
  }
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const std::uint64_t exponent = std::bit_cast<std::uint64_t>(largest) >> 52;  // biased by 1023
  const double unit = std::bit_cast<double>((exponent - 25) << 52);
  const double inverse = std::bit_cast<double>((2071 - exponent) << 52);
  std::int64_t sum = 0;
  for (const double term : terms) sum += static_cast<std::int64_t>(term * inverse);
  return truncated(static_cast<double>(sum) * unit);
}

struct Matrices {
  const void* row;
  std::uint32_t* registers;
};

template <bool kTransposed>
void load_matrices(const Lanes& lanes, unsigned mask) {
  if (mask != 0xffffffffu) cuda_on_cpu::fail("ldmatrix without all lanes");
  for (int matrix = 0; matrix < 4; ++matrix) {
    std::uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      const auto* address = static_cast<const unsigned char*>(static_cast<Matrices*>(lanes[8 * matrix + row])->row);
      const auto offset = address - cuda_on_cpu::shared_memory();
      if (offset < 0 || offset + 16 > static_cast<std::ptrdiff_t>(cuda_on_cpu::shared_bytes()) || offset % 16 != 0) {
        cuda_on_cpu::fail("ldmatrix: a row is outside of shared memory or not aligned to 16 bytes");
      }
      std::memcpy(elements[row], address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const std::uint32_t low = kTransposed ? elements[2 * t][g] : elements[g][2 * t];
      const std::uint32_t high = kTransposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      static_cast<Matrices*>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
}

struct Fragments {
  float* c;
  const std::uint32_t* a;
  std::uint32_t b[2];
};

inline void multiply_add(const Lanes& lanes, unsigned mask) {
  if (mask != 0xffffffffu) cuda_on_cpu::fail("mma without all lanes");
  float A[16][16], B[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const auto& mine = *static_cast<Fragments*>(lanes[lane]);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) A[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = bfloat16_half(mine.a[i], half);
      for (int i = 0; i < 2; ++i) B[2 * t + i * 8 + half][g] = bfloat16_half(mine.b[i], half);
    }
  }
  const auto is_zero = [](float x) { return x == 0; };
  if (std::all_of(&A[0][0], &A[0][0] + 256, is_zero) && std::all_of(&B[0][0], &B[0][0] + 128, is_zero)) return;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    float* c = static_cast<Fragments*>(lanes[lane])->c;
    for (int i = 0; i < 4; ++i) {
      std::array<double, 17> terms{c[i]};
      for (int k = 0; k < 16; ++k) terms[k + 1] = static_cast<double>(A[g + i / 2 * 8][k]) * B[k][2 * t + i % 2];
      c[i] = accumulated(terms);
    }
  }
}

}  // namespace emulated

inline void copy_async(void* shared, const void* global, int bytes) {
  const auto offset = static_cast<unsigned char*>(shared) - cuda_on_cpu::shared_memory();
  if (offset < 0 || offset + 16 > static_cast<std::ptrdiff_t>(cuda_on_cpu::shared_bytes())) {
    cuda_on_cpu::fail("cp.async writes outside of shared memory");
  }
  if (offset % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0 || bytes < 0 || bytes > 16) {
    cuda_on_cpu::fail("cp.async: an address is not aligned to 16 bytes, or bytes is not within 0 and 16");
  }
  cuda_on_cpu::defer([=] {
    std::array<unsigned char, 16> chunk{};
    std::memcpy(chunk.data(), global, bytes);
    std::memcpy(shared, chunk.data(), 16);
  });
}

inline void commit_copies() { cuda_on_cpu::commit(); }

template <int kPending>
void wait_copies() {
  cuda_on_cpu::wait(kPending);
}

inline void load_matrices(std::uint32_t (&matrices)[4], const void* row,
                          emulated::Site site = emulated::Site::current()) {
  emulated::Matrices mine{row, matrices};
  cuda_on_cpu::meet_warp(0xffffffffu, &mine, emulated::load_matrices<false>, site);
}

inline void load_matrices_transposed(std::uint32_t (&matrices)[4], const void* row,
                                     emulated::Site site = emulated::Site::current()) {
  emulated::Matrices mine{row, matrices};
  cuda_on_cpu::meet_warp(0xffffffffu, &mine, emulated::load_matrices<true>, site);
}

inline void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1,
                         emulated::Site site = emulated::Site::current()) {
  emulated::Fragments mine{c, a, {b0, b1}};
  cuda_on_cpu::meet_warp(0xffffffffu, &mine, emulated::multiply_add, site);
}

inline std::uint32_t pack_bfloat16(float low, float high) {
  const auto rounded = [](float x) -> std::uint32_t {
    if (std::isnan(x)) return 0x7fff;
    const std::uint32_t bits = __float_as_uint(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
}

}  // namespace isomerge
