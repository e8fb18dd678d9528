// Launching kernels, on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "ops.h"

namespace cmpose {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Launches `blocks` blocks with dynamic shared memory and does not wait; 0 blocks launch nothing.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), int64_t blocks, int threads,
            unsigned shared_bytes, void* stream, A... arguments) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) {
    throw std::runtime_error(std::string(name) + ": " + std::to_string(blocks) +
                             " blocks are more than a grid holds; split the batch");
  }
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...), name);
}

// Calls `function` with a value of the type that `dtype` names.
template <class F>
void with_type(Dtype dtype, F function) {
  switch (dtype) {
    case Dtype::kFloat32:
      return function(float{});
    case Dtype::kFloat16:
      return function(fp16{});
    case Dtype::kBFloat16:
      return function(bf16{});
  }
  throw std::invalid_argument("dtype must be 0 (float32), 1 (float16) or 2 (bfloat16)");
}

}  // namespace cmpose
