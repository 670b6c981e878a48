// The machine that the emulated kernels run on: one block at a time, one fiber per thread, on one core.
//
// A fiber runs until it meets others: at a barrier or in a warp-wide instruction. A warp runs until it waits for the
// block, as far ahead of the others as barriers allow, in the chosen order. What a thread must not see before a barrier
// it therefore does see in some order, and results differ.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_on_cpu {

using Site = std::source_location;

struct Index {
  unsigned x, y, z;
};

// Stops the launch, which then returns cudaErrorLaunchFailure; `emulated_error()` has the message and where it was.
[[noreturn]] void fail(const char* message);

// Returns when every thread of the block has arrived at this very line.
void meet_block(const Site& site);

// Returns when every lane in `mask` has arrived with the same mask, site and `combine`. The last to arrive calls
// combine(lanes, mask) first: lanes[i] is what lane i gave as `mine` (null outside of the mask), to read inputs from
// and to write results to. The structs live on the stacks of the waiting threads.
using Lanes = std::array<void*, 32>;
void meet_warp(unsigned mask, void* mine, void (*combine)(const Lanes&, unsigned), const Site& site);

// Asynchronous copies of the calling thread. `defer` runs the copy at any moment until the wait: at once in reverse
// order, as late as allowed in forward order, by chance in random order. `commit` closes a group; `wait(n)` returns
// when at most the n latest groups are incomplete. A thread that ends with copies in flight is an error.
void defer(std::function<void()> copy);
void commit();
void wait(std::size_t groups_in_flight);

int lane();  // of the calling thread, 0..31

unsigned char* shared_memory();
std::size_t shared_bytes();

int run(Index grid, Index block, std::size_t shared_bytes, const std::function<void()>& kernel);

}  // namespace cuda_on_cpu
