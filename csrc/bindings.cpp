// isomerge._C: the host entries of the kernels for Python. Pointers and streams are integers; nothing here knows torch.

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cholesky.cuh"
#include "device_limits.cuh"
#include "jacobi.cuh"
#include "project_scale.cuh"
#include "shift_cov.cuh"

namespace py = pybind11;

namespace {

// What Python passes for a parameter: an integer for a pointer, and for a stream, which is one.
template <class Parameter>
using Passed = std::conditional_t<std::is_pointer_v<Parameter>, std::uintptr_t, Parameter>;

template <class Parameter>
Parameter given(Passed<Parameter> value) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return reinterpret_cast<Parameter>(value);
  } else {
    return value;
  }
}

template <class Parameter>
std::string described(const char* name, Passed<Parameter> value) {
  if constexpr (std::is_pointer_v<Parameter>) {
    return "";
  } else {
    return std::string(name) + "=" + std::to_string(value) + ", ";
  }
}

// Binds a launch under `name`, its parameters as Python's arguments in their order. The GIL is released while it runs;
// an error is raised as RuntimeError that names the op, its sizes and CUDA's error. Faults that show only while the
// kernel runs are found by whoever synchronises next, as with every kernel.
template <class... Parameters, class... Names>
void bind(py::module_& module, const char* name, cudaError_t (*entry)(Parameters...), Names... names) {
  static_assert(sizeof...(Parameters) == sizeof...(Names), "one name per parameter");
  const auto call = [=](Passed<Parameters>... values) {
    const cudaError_t error = entry(given<Parameters>(values)...);
    if (error == cudaSuccess) return;
    std::string sizes = (described<Parameters>(names, values) + ...);
    sizes.resize(sizes.size() - 2);
    throw std::runtime_error(std::string(name) + "(" + sizes + "): " + cudaGetErrorName(error) + ", " +
                             cudaGetErrorString(error));
  };
  module.def(name, call, py::arg(names)..., py::call_guard<py::gil_scoped_release>());
}

template <class... Sizes, class... Names>
void bind(py::module_& module, const char* name, std::int64_t (*function)(Sizes...), Names... names) {
  module.def(name, function, py::arg(names)...);
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

std::string status() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("no device: ") + cudaGetErrorName(error);
  }
  for (int device = 0; device < count; ++device) {
    int shared = 0;
    cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (shared < isomerge::kMaxSharedBytes) {
      return "no device: number " + std::to_string(device) + " gives a thread block " + std::to_string(shared / 1024) +
             " KB of shared memory, expected " + std::to_string(isomerge::kMaxSharedBytes / 1024) +
             ", as compute capabilities 8.0, 9.0 and 10.0 do";
    }
  }
  return std::to_string(count) + " device" + (count == 1 ? "" : "s");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CUDA kernels of isomerge; isomerge.backends.cuda is the way to call them.";
  module.attr("cuda_version") = CUDART_VERSION;
  module.def("device_count", device_count, "Number of CUDA devices, 0 without a driver.");
  module.def("status", status, "How many devices there are, or CUDA's reason why none.");

  bind(module, "cholesky_inverse", cholesky_inverse_launch, "G", "factor", "inverse", "status", "batch", "s", "shift",
       "stream");
  bind(module, "small_eigh", small_eigh_launch, "G", "values", "vectors", "status", "batch", "s", "stream");
  bind(module, "shift_cov", shift_cov_launch, "X", "x_bytes", "batch", "tokens", "n", "x_batch_stride", "x_row_stride",
       "delta", "m", "delta_batch_stride", "delta_row_stride", "out", "out_bytes", "workspace", "stream");
  bind(module, "shift_cov_workspace_bytes", shift_cov_workspace_bytes, "batch", "tokens", "n", "m");
  bind(module, "project_scale", project_scale_launch, "Q", "q_matrix_stride", "q_row_stride", "W", "w_bytes",
       "w_matrix_stride", "w_row_stride", "row_scale", "batch", "tasks", "m", "n", "s", "C", "column_squares",
       "workspace", "stream");
  bind(module, "project_scale_workspace_bytes", project_scale_workspace_bytes, "batch", "tasks", "n", "s");
}
