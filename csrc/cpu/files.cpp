#include "files.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <memory>

#include "clones.h"
#include "draws.h"
#include "election.h"

namespace {

// Bytes of a block, of all its arrays but the update: they stay in a second-level cache, to which the kernel copies twice
// as fast as to memory. Between half and twice as much there is no difference; shorter calls take longer than the copies.
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

// rows[t stride + i] for all tasks t, added in their order, to rows[i].
ISOMERGE_CLONES
void add(float* rows, std::int64_t tasks, std::int64_t stride, std::int64_t count) {
  float* __restrict sum = rows;
  for (std::int64_t i = 0; i < count; ++i) sum[i] += 0.0f;  // a zero without sign, as every sum that starts from one
  for (std::int64_t t = 1; t < tasks; ++t) {
    const float* __restrict row = rows + t * stride;
    for (std::int64_t i = 0; i < count; ++i) sum[i] += row[i];
  }
}

// The models' elements and their deltas, a block after the other.
class Blocks {
 public:
  Blocks(const Models& models, Reduction reduction)
      : models_(models),
        files_{models.base},
        reduction_(models.drop ? Reduction::none : reduction),
        rows_(reduction_ == Reduction::none ? static_cast<std::int64_t>(models.tuned.size()) : 1) {
    files_.insert(files_.end(), models.tuned.begin(), models.tuned.end());
    std::int64_t together = 0;  // bytes of an element
    for (const Stretch& file : files_) together += size_of(file.dtype);
    if (reduction_ == Reduction::none) together += (1 + rows_) * static_cast<std::int64_t>(sizeof(float));
    stride = std::min(models.count, std::max(CACHED / together, LEAST));
    raw_.reset(new float[files_.size() * stride]);
    origin.reset(new float[stride]);
    deltas.reset(new float[rows_ * stride]);
    for (std::size_t i = 0; i < files_.size(); ++i) values_.push_back({raw_.get() + i * stride, files_[i].dtype});
    tasks_.assign(values_.begin() + 1, values_.end());
  }

  // Whether there is another block, which is then in memory; a failure ends them.
  bool next() {
    first += elements;
    elements = std::min(models_.count - first, stride);
    if (elements <= 0) return false;
    for (std::size_t i = 0; i < files_.size(); ++i) {
      const std::int64_t size = size_of(files_[i].dtype);
      char* const to = reinterpret_cast<char*>(raw_.get() + i * stride);
      failed = failed || !read(files_[i].file, files_[i].offset + first * size, elements * size, to);
    }
    if (failed) return false;
    square_ = subtract(values_[0], tasks_, models_.weights, elements, reduction_, origin.get(), deltas.get(), stride);
    sum += square_;
    failed = !std::isfinite(square_);
    for (std::int64_t t = 0; models_.drop && t < rows_; ++t) {
      const Drop& dropped = *models_.drop;
      float* const row = deltas.get() + t * stride;
      drop(row, elements, dropped.density, dropped.seed, dropped.first + t * dropped.apart + first, row);
    }
    return !failed;
  }

  // The squared norm of the block's update, where that is the reduction: all of it in the first row.
  double reduce() {
    if (models_.drop) add(deltas.get(), rows_, stride, elements);
    return reduction_ == Reduction::sum ? square_ : sum_squares(deltas.get(), elements);
  }

  void finish(const float* update, const Outputs& outputs) const {
    for (std::size_t a = 0; a < outputs.scales.size(); ++a) {
      finalize({origin.get(), Dtype::float32}, update, outputs.scales[a], elements,
               behind(outputs.outs[a], first, outputs.dtype), outputs.dtype);
    }
  }

  std::int64_t first = 0, elements = 0, stride;
  std::unique_ptr<float[]> origin, deltas;  // [stride], [tasks or 1][stride]
  double sum = 0;                           // of the squared sums of the deltas, so far
  bool failed = false;

 private:
  const Models& models_;
  std::vector<Stretch> files_;
  Reduction reduction_;
  std::int64_t rows_;
  std::unique_ptr<float[]> raw_;
  std::vector<Values> values_, tasks_;
  double square_ = 0;  // of the block
};

}  // namespace

std::optional<Squares> blend(const Models& models, Reduction reduction, const Outputs& outputs) {
  Blocks blocks(models, reduction);
  double squares = 0;
  while (blocks.next()) {
    const double square = blocks.reduce();
    if (square == 0) return std::nullopt;
    squares += square;
    blocks.finish(blocks.deltas.get(), outputs);
  }
  if (blocks.failed) return std::nullopt;
  return Squares{blocks.sum, squares};
}

std::optional<Squares> elect(const Models& models, const std::vector<float>& thresholds, int majority,
                             const Outputs& outputs) {
  Blocks blocks(models, Reduction::none);
  const std::unique_ptr<float[]> update(new float[blocks.stride]);
  double squares = 0;
  while (blocks.next()) {
    elect(blocks.deltas.get(), blocks.stride, thresholds, majority, blocks.elements, update.get());
    squares += sum_squares(update.get(), blocks.elements);
    blocks.finish(update.get(), outputs);
  }
  if (blocks.failed || squares == 0) return std::nullopt;
  return Squares{blocks.sum, squares};
}

std::optional<std::int64_t> votes(const Models& models, const std::vector<float>& thresholds) {
  Blocks blocks(models, Reduction::none);
  std::int64_t total = 0;
  while (blocks.next()) total += votes(blocks.deltas.get(), blocks.stride, thresholds, blocks.elements);
  if (blocks.failed) return std::nullopt;
  return total;
}

bool count_digits(const Models& models, const std::vector<std::optional<std::uint32_t>>& highs, std::int64_t* counts) {
  Blocks blocks(models, Reduction::none);
  std::vector<Digits> tasks;
  tasks.reserve(highs.size());
  for (std::size_t t = 0; t < highs.size(); ++t) tasks.emplace_back(highs[t], counts + t * DIGITS);
  while (blocks.next()) {
    for (std::size_t t = 0; t < tasks.size(); ++t) tasks[t].add(blocks.deltas.get() + t * blocks.stride, blocks.elements);
  }
  return !blocks.failed;
}
