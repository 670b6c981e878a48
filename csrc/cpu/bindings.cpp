// isomerge._cpu: the passes for Python. Addresses are integers; nothing here knows torch. The GIL is released.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "draws.h"
#include "election.h"
#include "files.h"
#include "passes.h"

namespace py = pybind11;

namespace {

using Given = std::pair<std::uintptr_t, int>;             // address, dtype
using GivenStretch = std::tuple<int, std::int64_t, int>;  // file, offset, dtype

template <class Pointer>
Pointer at(std::uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

Values values(const Given& given) { return {at<const void*>(given.first), static_cast<Dtype>(given.second)}; }

Stretch stretch(const GivenStretch& given) {
  return {std::get<0>(given), std::get<1>(given), static_cast<Dtype>(std::get<2>(given))};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "Passes over memory on the CPU; isomerge.backends.native is the way to call them.";
  module.def(
      "subtract",
      [](const Given& base, const std::vector<Given>& tuned, const std::vector<float>& weights, std::int64_t count,
         int reduction, std::uintptr_t base_out, std::uintptr_t deltas, std::int64_t stride) {
        std::vector<Values> tasks;
        for (const Given& task : tuned) tasks.push_back(values(task));
        const py::gil_scoped_release released;
        return subtract(values(base), tasks, weights, count, static_cast<Reduction>(reduction), at<float*>(base_out),
                        at<float*>(deltas), stride);
      },
      py::arg("base"), py::arg("tuned"), py::arg("weights"), py::arg("count"), py::arg("reduction"),
      py::arg("base_out"), py::arg("deltas"), py::arg("stride"));
  module.def(
      "sum_squares",
      [](std::uintptr_t address, std::int64_t count) {
        const py::gil_scoped_release released;
        return sum_squares(at<const float*>(address), count);
      },
      py::arg("values"), py::arg("count"));
  module.def(
      "finalize",
      [](const Given& base, std::uintptr_t update, float scale, std::int64_t count, const Given& out) {
        const py::gil_scoped_release released;
        finalize(values(base), at<const float*>(update), scale, count, at<void*>(out.first),
                 static_cast<Dtype>(out.second));
      },
      py::arg("base"), py::arg("update"), py::arg("scale"), py::arg("count"), py::arg("out"));
  module.def(
      "blend",
      [](const GivenStretch& base, const std::vector<GivenStretch>& tuned, const std::vector<float>& weights,
         std::int64_t count, int reduction, const std::vector<float>& scales, const std::vector<std::uintptr_t>& outs,
         int dtype) -> std::optional<std::pair<double, double>> {
        std::vector<Stretch> tasks;
        for (const GivenStretch& task : tuned) tasks.push_back(stretch(task));
        std::vector<void*> merged;
        for (const std::uintptr_t address : outs) merged.push_back(at<void*>(address));
        const py::gil_scoped_release released;
        const auto squares = blend(stretch(base), tasks, weights, count, static_cast<Reduction>(reduction), scales,
                                   merged, static_cast<Dtype>(dtype));
        if (!squares) return std::nullopt;
        return std::make_pair(squares->sum, squares->update);
      },
      py::arg("base"), py::arg("tuned"), py::arg("weights"), py::arg("count"), py::arg("reduction"),
      py::arg("scales"), py::arg("outs"), py::arg("dtype"));
  module.def(
      "kth_largest",
      [](std::uintptr_t address, std::int64_t count, std::int64_t k) {
        const py::gil_scoped_release released;
        return kth_largest(at<const float*>(address), count, k);
      },
      py::arg("values"), py::arg("count"), py::arg("k"));
  module.def(
      "elect",
      [](std::uintptr_t deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count,
         std::uintptr_t merged) {
        const py::gil_scoped_release released;
        elect(at<const float*>(deltas), stride, thresholds, count, at<float*>(merged));
      },
      py::arg("deltas"), py::arg("stride"), py::arg("thresholds"), py::arg("count"), py::arg("merged"));
  module.def(
      "drop",
      [](std::uintptr_t given, std::int64_t count, double density, std::uint64_t seed, std::int64_t first,
         std::uintptr_t kept) {
        const py::gil_scoped_release released;
        drop(at<const float*>(given), count, density, seed, first, at<float*>(kept));
      },
      py::arg("values"), py::arg("count"), py::arg("density"), py::arg("seed"), py::arg("first"), py::arg("kept"));
}
