// fibers.h: the scheduler, and what tests/emulate.py calls through ctypes.

#include "fibers.h"

#include "memory.h"

#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

cuda_on_cpu::Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024, kMaxThreads = 1024, kMaxShared = 227 * 1024;

enum class State { ready, at_barrier, in_warp, ended };

struct Fiber {
  Index index;
  State state;
  bool started;
  Site site;           // where it waits
  unsigned mask;       // for whom it waits, in a warp
  void* mine;          // and with what
  void (*combine)(const Lanes&, unsigned);
  jmp_buf here;
  ucontext_t start;
  std::deque<std::vector<std::function<void()>>> groups;  // of asynchronous copies; the last one is open
};

std::vector<Fiber> fibers(kMaxThreads);
std::array<unsigned, kMaxThreads / 32> ready;  // a bit per lane
unsigned char* stacks = nullptr;
std::size_t threads = 0, arrived = 0;  // of the running block: all, those at the barrier
Fiber* current = nullptr;
bool block_votes = false;
jmp_buf scheduler;
const std::function<void()>* kernel = nullptr;
std::size_t dynamic_bytes = 0;
unsigned char* dynamic_memory = nullptr;

enum Order : std::int64_t { forward = 0, reverse = -1 };  // a positive number is the seed of a random order
std::int64_t order = forward;
std::mt19937_64 generator;

std::string error;
struct Launch {
  Index grid, block;
  std::uint64_t shared_bytes, barriers;
};
std::vector<Launch> launches;

// ---------------------------------------------------------------------------------------------- fibers

std::string place(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(site.line());
}

bool same(const Site& a, const Site& b) { return a.line() == b.line() && a.column() == b.column(); }

std::string name(const Fiber& fiber) {
  char text[96];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u)", fiber.index.x, fiber.index.y,
                fiber.index.z, blockIdx.x, blockIdx.y, blockIdx.z);
  return text;
}

void wake(Fiber& fiber) {
  const auto i = static_cast<std::size_t>(&fiber - fibers.data());
  fiber.state = State::ready;
  ready[i / 32] |= 1u << i % 32;
}

// The calling thread now waits, or has ended.
void stop(State state) {
  const auto i = static_cast<std::size_t>(current - fibers.data());
  current->state = state;
  ready[i / 32] &= ~(1u << i % 32);
}

void yield() {
  if (_setjmp(current->here) == 0) _longjmp(scheduler, 1);
}

void body() {
  (*kernel)();
  for (const auto& group : current->groups) {
    if (!group.empty()) fail("the thread ends with asynchronous copies in flight");
  }
  stop(State::ended);
  _longjmp(scheduler, 1);
}

// Runs one fiber until it waits or ends; false when the launch has failed.
bool resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) == 0) {
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  return error.empty();
}

void prepare(Fiber& fiber, std::size_t i) {
  fiber.index = {static_cast<unsigned>(i % blockDim.x), static_cast<unsigned>(i / blockDim.x % blockDim.y),
                 static_cast<unsigned>(i / blockDim.x / blockDim.y)};
  wake(fiber);
  fiber.started = false;
  fiber.groups.assign(1, {});
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks + i * kStackBytes;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, body, 0);
}

void explain_deadlock(const Fiber& waiting) {
  const auto has_ended = [](const Fiber& fiber) { return fiber.state == State::ended; };
  const auto ended = std::count_if(fibers.begin(), fibers.begin() + static_cast<std::ptrdiff_t>(threads), has_ended);
  error = name(waiting) + " waits at " + place(waiting.site) + " for threads that never arrive; " +
          std::to_string(ended) + " of " + std::to_string(threads) + " have ended";
}

// The warp to run next: one of those with ready lanes, or -1. The first one gets as far ahead of the others as barriers
// allow, or the last one, or any.
int next_warp() {
  const int warps = static_cast<int>((threads + 31) / 32);
  int chosen = -1;
  std::uint64_t candidates = 0;
  for (int warp = 0; warp < warps; ++warp) {
    if (ready[warp] == 0) continue;
    ++candidates;
    if (order == forward) return warp;
    if (order == reverse || generator() % candidates == 0) chosen = warp;
  }
  return chosen;
}

void run_block() {
  std::memset(dynamic_memory, kPoison, dynamic_bytes);
  arrived = 0;
  ready.fill(0);
  for (std::size_t i = 0; i < threads; ++i) prepare(fibers[i], i);
  std::array<int, 32> lanes;
  std::iota(lanes.begin(), lanes.end(), 0);
  if (order == reverse) std::reverse(lanes.begin(), lanes.end());
  for (int warp = next_warp(); warp >= 0; warp = next_warp()) {
    if (order > 0) std::shuffle(lanes.begin(), lanes.end(), generator);
    const unsigned running = ready[warp];
    for (int lane : lanes) {
      if ((running >> lane & 1) && !resume(fibers[warp * 32 + lane])) return;
    }
  }
  for (std::size_t i = 0; i < threads; ++i) {
    if (fibers[i].state != State::ended) return explain_deadlock(fibers[i]);
  }
}

void report_bad_access(int, siginfo_t* info, void*) {
  char text[200];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u) of block (%u, %u, %u): access outside of its buffers at %p",
                threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z, info->si_addr);
  error = text;
  _longjmp(scheduler, 1);
}

// Answers bad accesses on a stack of its own while it lives.
class FaultHandler {
 public:
  FaultHandler() : stack_(64 * 1024) {
    stack_t ours = {};
    ours.ss_sp = stack_.data();
    ours.ss_size = stack_.size();
    sigaltstack(&ours, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = report_bad_access;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  std::vector<unsigned char> stack_;
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

}  // namespace

// ------------------------------------------------------------------------------------------------ fibers.h

void fail(const char* message) {
  error = name(*current) + ": " + message;
  _longjmp(scheduler, 1);
}

void meet_block(const Site& site) {
  stop(State::at_barrier);
  current->site = site;
  if (++arrived == threads) {
    arrived = 0;
    for (std::size_t i = 0; i < threads; ++i) {
      if (!same(fibers[i].site, site)) {
        const std::string message = "the threads of its block wait at different barriers, " + place(site) + " and " +
                                    place(fibers[i].site);
        fail(message.c_str());
      }
      wake(fibers[i]);
    }
    ++launches.back().barriers;
  }
  yield();
}

bool any_of_block(bool predicate, const Site& site) {
  block_votes = block_votes || predicate;
  meet_block(site);
  const bool result = block_votes;
  meet_block(site);
  block_votes = false;
  meet_block(site);
  return result;
}

int lane() { return static_cast<int>((current - fibers.data()) % 32); }

void meet_warp(unsigned mask, void* mine, void (*combine)(const Lanes&, unsigned), const Site& site) {
  if ((mask >> lane() & 1) == 0) fail("the mask of a warp-wide instruction leaves out its caller");
  static int nothing;
  stop(State::in_warp);
  current->site = site;
  current->mask = mask;
  current->mine = mine == nullptr ? &nothing : mine;
  current->combine = combine;
  Fiber* warp = current - lane();
  const std::size_t lanes = std::min<std::size_t>(32, fibers.data() + threads - warp);
  Lanes given = {};
  bool all = true;
  for (std::size_t i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (i >= lanes || warp[i].state == State::ended) fail("the mask of a warp-wide instruction names an absent lane");
    all = all && warp[i].state == State::in_warp && warp[i].mask == mask && warp[i].combine == combine &&
          same(warp[i].site, site);
    given[i] = warp[i].mine;
  }
  if (all) {
    combine(given, mask);
    for (std::size_t i = 0; i < 32; ++i) {
      if (mask >> i & 1) wake(warp[i]);
    }
  }
  yield();
}

void defer(std::function<void()> copy) {
  if (order == reverse || (order > 0 && generator() % 2 == 0)) return copy();
  current->groups.back().push_back(std::move(copy));
}

void commit() { current->groups.emplace_back(); }

void wait(std::size_t groups_in_flight) {
  while (current->groups.size() > groups_in_flight + 1) {
    for (const auto& copy : current->groups.front()) copy();
    current->groups.pop_front();
  }
}

unsigned char* shared_memory() { return dynamic_memory; }
std::size_t shared_bytes() { return dynamic_bytes; }

int run(Index grid, Index block, std::size_t bytes, const std::function<void()>& function) {
  threads = std::size_t{block.x} * block.y * block.z;
  if (bytes > kMaxShared) return 1;  // cudaErrorInvalidValue
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || std::uint64_t{grid.x} * grid.y * grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return 9;  // cudaErrorInvalidConfiguration
  }
  if (stacks == nullptr) stacks = reserve(kMaxThreads * kStackBytes);
  const FaultHandler handler;
  launches.push_back({grid, block, bytes, 0});
  kernel = &function;
  blockDim = block;
  gridDim = grid;
  dynamic_bytes = bytes;
  dynamic_memory = static_cast<unsigned char*>(guarded(bytes, 128));
  block_votes = false;
  error.clear();
  for (unsigned z = 0; z < grid.z && error.empty(); ++z) {
    for (unsigned y = 0; y < grid.y && error.empty(); ++y) {
      for (unsigned x = 0; x < grid.x && error.empty(); ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
    }
  }
  release(dynamic_memory);
  return error.empty() ? 0 : 719;  // cudaErrorLaunchFailure
}

}  // namespace cuda_on_cpu

// ------------------------------------------------------------------------------------------------ for ctypes

using namespace cuda_on_cpu;

extern "C" void emulated_begin(std::int64_t chosen) {
  order = chosen;
  generator.seed(static_cast<std::uint64_t>(chosen));
  launches.clear();
  error.clear();
}

extern "C" const char* emulated_error() { return error.c_str(); }

extern "C" std::int64_t emulated_launches() { return static_cast<std::int64_t>(launches.size()); }

// grid x, y, z, block x, y, z, shared bytes, barriers passed
extern "C" void emulated_launch(std::int64_t i, std::int64_t* numbers) {
  const Launch& launch = launches.at(static_cast<std::size_t>(i));
  const std::int64_t values[] = {launch.grid.x,  launch.grid.y,  launch.grid.z,
                                 launch.block.x, launch.block.y, launch.block.z,
                                 static_cast<std::int64_t>(launch.shared_bytes),
                                 static_cast<std::int64_t>(launch.barriers)};
  std::memcpy(numbers, values, sizeof values);
}
