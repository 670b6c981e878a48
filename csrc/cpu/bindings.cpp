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
using GivenDrop = std::tuple<double, std::uint64_t, std::int64_t, std::int64_t>;

template <class Pointer>
Pointer at(std::uintptr_t address) {
  return reinterpret_cast<Pointer>(address);
}

Values values(const Given& given) { return {at<const void*>(given.first), static_cast<Dtype>(given.second)}; }

Stretch stretch(const GivenStretch& given) {
  return {std::get<0>(given), std::get<1>(given), static_cast<Dtype>(std::get<2>(given))};
}

Outputs outputs(const std::vector<float>& scales, const std::vector<std::uintptr_t>& outs, int dtype) {
  Outputs made{scales, {}, static_cast<Dtype>(dtype)};
  for (const std::uintptr_t address : outs) made.outs.push_back(at<void*>(address));
  return made;
}

std::optional<std::pair<double, double>> pair(const std::optional<Squares>& squares) {
  if (!squares) return std::nullopt;
  return std::make_pair(squares->sum, squares->update);
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
      "count_digits",
      [](std::uintptr_t address, std::int64_t count, std::optional<std::uint32_t> high, std::uintptr_t counts) {
        const py::gil_scoped_release released;
        Digits(high, at<std::int64_t*>(counts)).add(at<const float*>(address), count);
      },
      py::arg("values"), py::arg("count"), py::arg("high"), py::arg("counts"));
  module.def(
      "votes",
      [](std::uintptr_t deltas, std::int64_t stride, const std::vector<float>& thresholds, std::int64_t count) {
        const py::gil_scoped_release released;
        return votes(at<const float*>(deltas), stride, thresholds, count);
      },
      py::arg("deltas"), py::arg("stride"), py::arg("thresholds"), py::arg("count"));
  module.def(
      "elect",
      [](std::uintptr_t deltas, std::int64_t stride, const std::vector<float>& thresholds, int majority,
         std::int64_t count, std::uintptr_t merged) {
        const py::gil_scoped_release released;
        elect(at<const float*>(deltas), stride, thresholds, majority, count, at<float*>(merged));
      },
      py::arg("deltas"), py::arg("stride"), py::arg("thresholds"), py::arg("majority"), py::arg("count"),
      py::arg("merged"));
  module.def(
      "drop",
      [](std::uintptr_t given, std::int64_t count, double density, std::uint64_t seed, std::int64_t first,
         std::uintptr_t kept) {
        const py::gil_scoped_release released;
        drop(at<const float*>(given), count, density, seed, first, at<float*>(kept));
      },
      py::arg("values"), py::arg("count"), py::arg("density"), py::arg("seed"), py::arg("first"), py::arg("kept"));

  py::class_<Models>(module, "Models")
      .def(py::init([](const GivenStretch& base, const std::vector<GivenStretch>& tuned,
                       const std::vector<float>& weights, std::int64_t count, const std::optional<GivenDrop>& drop) {
             Models models{stretch(base), {}, weights, count, std::nullopt};
             for (const GivenStretch& task : tuned) models.tuned.push_back(stretch(task));
             if (drop) models.drop = std::apply([](auto... values) { return Drop{values...}; }, *drop);
             return models;
           }),
           py::arg("base"), py::arg("tuned"), py::arg("weights"), py::arg("count"), py::arg("drop"))
      .def("blend",
           [](const Models& models, int reduction, const std::vector<float>& scales,
              const std::vector<std::uintptr_t>& outs, int dtype) {
             const py::gil_scoped_release released;
             return pair(blend(models, static_cast<Reduction>(reduction), outputs(scales, outs, dtype)));
           },
           py::arg("reduction"), py::arg("scales"), py::arg("outs"), py::arg("dtype"))
      .def("elect",
           [](const Models& models, const std::vector<float>& thresholds, int majority,
              const std::vector<float>& scales, const std::vector<std::uintptr_t>& outs, int dtype) {
             const py::gil_scoped_release released;
             return pair(elect(models, thresholds, majority, outputs(scales, outs, dtype)));
           },
           py::arg("thresholds"), py::arg("majority"), py::arg("scales"), py::arg("outs"), py::arg("dtype"))
      .def("votes",
           [](const Models& models, const std::vector<float>& thresholds) {
             const py::gil_scoped_release released;
             return votes(models, thresholds);
           },
           py::arg("thresholds"))
      .def("count_digits",
           [](const Models& models, const std::vector<std::optional<std::uint32_t>>& highs, std::uintptr_t counts) {
             const py::gil_scoped_release released;
             return count_digits(models, highs, at<std::int64_t*>(counts));
           },
           py::arg("highs"), py::arg("counts"));
}
