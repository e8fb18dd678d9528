// Kernels with one fault each, which running on the CPU must catch, and the same without it.
#include "device.cuh"
#include "planted.h"

namespace cmpose {
namespace {

constexpr int kThreads = 64;

// out[i] = in[(i + 1) % 64], through shared memory.
__global__ void rotate(const float* in, float* out, int fault) {
  SharedMemory shared;
  float* const values = shared.take<float>(kThreads);
  const int i = threadIdx.x;
  if (!(fault == kLateWrite && i == 5)) values[i] = in[i];
  if (fault != kMissingBarrier) __syncthreads();
  out[i] = values[(i + 1) % kThreads];
}

// out[i] = in[63 − i], twice through the same buffer.
__global__ void reverse_twice(const float* in, float* out, int fault) {
  SharedMemory shared;
  float* const values = shared.take<float>(kThreads);
  const int i = threadIdx.x;
  float value = in[i];
  for (int turn = 0; turn < 3; ++turn) {
    values[i] = value;
    __syncthreads();
    value = values[kThreads - 1 - i];
    if (fault != kMissingSecondBarrier) __syncthreads();
  }
  out[i] = value;
}

__global__ void divergent_barrier(float* out, int fault) {
  if (fault == kDivergentBarrier && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  if (fault == kHalfAtBarrier && threadIdx.x < 32) return;
  if (fault == kHalfAtBarrier && threadIdx.x < 48) __syncthreads();
  if (fault == kHalfAtBarrier && threadIdx.x >= 48) __syncwarp();
  out[threadIdx.x] = 1.0f;
}

__global__ void shuffle(const float* in, float* out, int fault) {
  const int i = threadIdx.x;
  float value = in[i];
  if (fault == kLaneOutsideMask) {
    value = __shfl_xor_sync(0x0000ffffu, value, 1);
  } else if (fault == kLaneMissing) {
    if (i % 2) value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else if (fault == kUnequalMasks) {
    value = __shfl_xor_sync(i < 16 ? 0xffffffffu : 0xfffffffeu, value, 1);
  } else if (fault == kSourceOutsideMask) {
    if (i < 16) value = __shfl_sync(0x0000ffffu, value, 20);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  }
  out[i] = value;
}

// out[i] = in[i], by cp.async.
__global__ void copy(const float* in, float* out, int fault) {
  SharedMemory shared;
  float* const values = shared.take<float>(kThreads);
  const int i = threadIdx.x;
  if (i < 16) {
    const int shift = fault == kUnalignedCopy ? 1 : 0;
    cp_async_16(values + 4 * i, in + 4 * i + shift, true);
    cp_async_commit();
    if (fault != kMissingWait) cp_async_wait<0>();
  }
  __syncthreads();
  out[i] = values[i];
}

// out[i] = Σ_t in[4 t + (i + 1) % 64] for four turns t, each copied while the one before is read.
__global__ void copy_ring(const float* in, float* out, int fault) {
  SharedMemory shared;
  float* const values = shared.take<float>(2 * kThreads);
  const int i = threadIdx.x;
  const auto load = [&](int turn) {
    if (i < 16 && turn < 4) {
      cp_async_16(values + turn % 2 * kThreads + 4 * i, in + 4 * turn + 4 * i, true);
    }
    cp_async_commit();
  };
  float sum = 0.0f;
  load(0);
  for (int turn = 0; turn < 4; ++turn) {
    load(turn + 1);
    cp_async_wait<1>();
    __syncthreads();
    sum += values[turn % 2 * kThreads + (i + 1) % kThreads];
    if (fault != kMissingRingBarrier) __syncthreads();
  }
  out[i] = sum;
}

__global__ void out_of_bounds(float* out, int fault) {
  SharedMemory shared;
  float* const values = shared.take<float>(kThreads);
  values[threadIdx.x + (fault == kSharedOutOfBounds ? 1 : 0)] = 1.0f;
  out[threadIdx.x + (fault == kGlobalOutOfBounds ? 1 : 0)] = 1.0f;
  if (fault == kOverflow) out[0] = static_cast<float>(0x7fffffff + static_cast<int>(threadIdx.x));
}

}  // namespace

void planted(const std::string& name, const float* in, float* out, int fault) {
  unsigned bytes = shared_part<float>(name == "copy_ring" ? 2 * kThreads : kThreads);
  if (fault == kTooMuchShared) bytes = 101380;
  const auto go = [&](auto kernel, auto... arguments) {
    launch("planted", kernel, 1, name == "shuffle" ? 32 : kThreads, bytes, nullptr, arguments...);
  };
  if (name == "rotate") go(rotate, in, out, fault);
  if (name == "reverse_twice") go(reverse_twice, in, out, fault);
  if (name == "divergent_barrier") go(divergent_barrier, out, fault);
  if (name == "shuffle") go(shuffle, in, out, fault);
  if (name == "copy") go(copy, in, out, fault);
  if (name == "copy_ring") go(copy_ring, in, out, fault);
  if (name == "out_of_bounds") go(out_of_bounds, out, fault);
}

}  // namespace cmpose
