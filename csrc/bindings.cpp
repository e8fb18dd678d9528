// Placeholder of the module cmpose._C; the real one replaces it.
#include <pybind11/pybind11.h>

#include "ops.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("fill", [](uintptr_t out, int64_t size, float value, uintptr_t stream) {
    cmpose::fill(reinterpret_cast<float*>(out), size, value, reinterpret_cast<void*>(stream));
  });
  m.def("build_info", [] {
    py::dict info;
    info["archs"] = CMPOSE_CUDA_ARCHS_BUILT;
    info["ptx"] = CMPOSE_CUDA_PTX_BUILT;
    info["nvcc"] = CMPOSE_NVCC_VERSION;
    info["version"] = CMPOSE_VERSION;
    info["on_cpu"] = false;
    return info;
  });
  m.def("shared_memory", [] { return py::dict(); });
}
