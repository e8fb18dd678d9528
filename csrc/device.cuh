// What the kernels share: number types, integer keys in the order of numbers, shared memory, warp
// sums.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "ptx.cuh"

namespace cmpose {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// 16-bit numbers as they lie in memory.
struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(fp16 value) { return fp16_to_float(value.bits); }
__device__ __forceinline__ float to_float(bf16 value) { return bf16_to_float(value.bits); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ fp16 from_float<fp16>(float value) {
  return {float_to_fp16(value)};
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float value) {
  return {float_to_bf16(value)};
}

// Two numbers in one word, the first in its low half.
__device__ __forceinline__ void pair_to_floats(fp16, uint32_t word, float& low, float& high) {
  low = fp16_to_float(static_cast<uint16_t>(word));
  high = fp16_to_float(static_cast<uint16_t>(word >> 16));
}
__device__ __forceinline__ void pair_to_floats(bf16, uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ uint32_t pair_from(fp16, float low, float high) {
  return floats_to_fp16x2(low, high);
}
__device__ __forceinline__ uint32_t pair_from(bf16, float low, float high) {
  return floats_to_bf16x2(low, high);
}

// COUNT neighbouring numbers, loaded and stored at once.
template <class T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
  T at[COUNT];
};

// Numbers of a vector as floats, and back. 16-bit numbers are taken from words and put into words
// two at a time: one by one, half of the instructions would only move bits.
template <class T, int COUNT>
__device__ __forceinline__ void to_floats(const Vector<T, COUNT>& from, float (&to)[COUNT]) {
  if constexpr (sizeof(T) == 2 && COUNT % 2 == 0) {
    uint32_t words[COUNT / 2];
    memcpy(words, &from, sizeof(from));
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) pair_to_floats(T{}, words[i], to[2 * i], to[2 * i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to[i] = to_float(from.at[i]);
  }
}
template <class T, int COUNT>
__device__ __forceinline__ Vector<T, COUNT> from_floats(const float (&from)[COUNT]) {
  Vector<T, COUNT> to;
  if constexpr (sizeof(T) == 2 && COUNT % 2 == 0) {
    uint32_t words[COUNT / 2];
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) words[i] = pair_from(T{}, from[2 * i], from[2 * i + 1]);
    memcpy(&to, words, sizeof(to));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) to.at[i] = from_float<T>(from[i]);
  }
  return to;
}

// Unsigned integers that compare as the floats do. -0 counts as 0; NaN comes above infinity.
__device__ __forceinline__ unsigned ordered(float value) {
  if (value != value) return 0xffffffffu;
  const unsigned bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The dynamic shared memory of the block. Kernels use no other shared memory, so that all of it is
// handed out here and the tests' CPU build can watch every access.
extern __shared__ __align__(128) unsigned char cmpose_shared[];

// Hands out parts of that memory, one after another, each aligned to 16 bytes.
struct SharedMemory {
  unsigned offset = 0;
  template <class T>
  __device__ __forceinline__ T* take(int count) {
    T* const part = reinterpret_cast<T*>(cmpose_shared + offset);
    offset += (static_cast<unsigned>(sizeof(T)) * count + 15) / 16 * 16;
    return part;
  }
};

// The bytes that SharedMemory::take uses for a part; for the host.
template <class T>
constexpr unsigned shared_part(int count) {
  return (static_cast<unsigned>(sizeof(T)) * count + 15) / 16 * 16;
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Every lane gets the sum, added in the same order in every lane.
__device__ __forceinline__ float warp_sum(float value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}
__device__ __forceinline__ float warp_max(float value) {
  for (int bits = 16; bits > 0; bits /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, value, bits);
    value = other > value || other != other ? other : value;  // NaN stays
  }
  return value;
}

}  // namespace cmpose
