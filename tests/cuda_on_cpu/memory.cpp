// memory.h by pages without access, and the two of its functions that tests/emulate.py calls through ctypes.

#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sys/mman.h>
#include <unistd.h>
#include <utility>

namespace cuda_on_cpu {
namespace {

constexpr std::size_t kGuard = 1 << 20;

std::map<void*, std::pair<unsigned char*, std::size_t>> mappings;  // start of a buffer -> the whole mapping

}  // namespace

unsigned char* reserve(std::size_t bytes) {
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapping == MAP_FAILED) std::abort();
  return static_cast<unsigned char*>(mapping);
}

unsigned char* guarded(std::size_t bytes, std::size_t alignment) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t body = (bytes + alignment + page - 1) / page * page, total = body + 2 * kGuard;
  unsigned char* first = reserve(total);
  std::memset(first + kGuard, kPoison, body);
  mprotect(first, kGuard, PROT_NONE);
  mprotect(first + kGuard + body, kGuard, PROT_NONE);
  unsigned char* buffer = first + kGuard + (body - bytes) / alignment * alignment;
  mappings[buffer] = {first, total};
  return buffer;
}

void release(void* buffer) {
  const auto found = mappings.find(buffer);
  munmap(found->second.first, found->second.second);
  mappings.erase(found);
}

}  // namespace cuda_on_cpu

extern "C" void* emulated_allocate(std::int64_t bytes) {
  return cuda_on_cpu::guarded(static_cast<std::size_t>(bytes), 16);
}

extern "C" void emulated_free(void* buffer) { cuda_on_cpu::release(buffer); }
