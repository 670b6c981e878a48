#include "files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <memory>

namespace {

// Bytes of all models that are read at a time: the kernel copies them to a second-level cache twice as fast as to memory.
// From 2^15 to 2^17 elements of five bfloat16 models there is no difference; shorter calls take longer than the copies.
constexpr std::int64_t CACHED = 640 << 10, LEAST = 4096;

static_assert(sizeof(off_t) == 8, "files are longer than 2 GiB");

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Whether `count` bytes from `offset` on were read.
bool read(int file, std::int64_t offset, std::int64_t count, char* to) {
  while (count > 0) {
    const ssize_t done = pread(file, to, static_cast<std::size_t>(count), static_cast<off_t>(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return false;
    to += done, offset += done, count -= done;
  }
  return true;
}

void* behind(void* values, std::int64_t elements, Dtype dtype) {
  return static_cast<char*>(values) + elements * size_of(dtype);
}

}  // namespace

std::optional<Squares> blend(Stretch base, const std::vector<Stretch>& tuned, const std::vector<float>& weights,
                             std::int64_t count, Reduction reduction, const std::vector<float>& scales,
                             const std::vector<void*>& outs, Dtype dtype) {
  std::vector<Stretch> models{base};
  models.insert(models.end(), tuned.begin(), tuned.end());
  std::int64_t together = 0;  // bytes of an element of all models
  for (const Stretch& model : models) together += size_of(model.dtype);
  const std::int64_t length = std::min(count, std::max(CACHED / together, LEAST));
  const std::unique_ptr<float[]> raw(new float[models.size() * length]), origin(new float[length]),
      update(new float[length]);
  std::vector<Values> values;
  for (std::size_t i = 0; i < models.size(); ++i) values.push_back({raw.get() + i * length, models[i].dtype});
  const std::vector<Values> tasks(values.begin() + 1, values.end());
  Squares squares{};
  for (std::int64_t first = 0; first < count; first += length) {
    const std::int64_t elements = std::min(length, count - first);
    for (std::size_t i = 0; i < models.size(); ++i) {
      const std::int64_t size = size_of(models[i].dtype);
      char* const to = reinterpret_cast<char*>(raw.get() + i * length);
      if (!read(models[i].file, models[i].offset + first * size, elements * size, to)) return std::nullopt;
    }
    const double sum = subtract(values[0], tasks, weights, elements, reduction, origin.get(), update.get(), 0);
    const double square = reduction == Reduction::sum ? sum : sum_squares(update.get(), elements);
    if (!std::isfinite(sum) || square == 0) return std::nullopt;
    squares.sum += sum, squares.update += square;
    for (std::size_t a = 0; a < scales.size(); ++a) {
      finalize({origin.get(), Dtype::float32}, update.get(), scales[a], elements, behind(outs[a], first, dtype), dtype);
    }
  }
  return squares;
}
