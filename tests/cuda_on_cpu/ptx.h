// The instructions of csrc/ptx.cuh, for a CPU.
#pragma once

#include "cuda_runtime.h"

namespace cmpose {

inline float fp16_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

inline uint16_t float_to_fp16(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}

inline float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, to even
}

inline uint32_t floats_to_fp16x2(float low, float high) {
  return static_cast<uint32_t>(float_to_fp16(high)) << 16 | float_to_fp16(low);
}
inline uint32_t floats_to_bf16x2(float low, float high) {
  return static_cast<uint32_t>(float_to_bf16(high)) << 16 | float_to_bf16(low);
}

// c += a · b for one warp: a 16×16 by rows, b 16×8 by columns, in the register layout of PTX's
// mma.m16n8k16. Exact products and sums, truncated to float32 every 8 of the 16.
template <bool BF16>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                 int line = __builtin_LINE()) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto slots = cuda_on_cpu::collective(0xffffffffu, mine, 6, line);
  const auto value = [](uint32_t word, int half) {
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    return BF16 ? bf16_to_float(bits) : fp16_to_float(bits);
  };
  const int lane = cuda_on_cpu::lane(), group = lane / 4, pair = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i / 2, column = 2 * pair + i % 2;  // row group or group + 8
    float result = c[i];
    for (int step = 0; step < 2; ++step) {
      double sum = result;
      for (int k = 8 * step; k < 8 * step + 8; ++k) {
        const uint32_t left = slots[4 * group + k % 8 / 2][high + 2 * step];
        const uint32_t right = slots[4 * column + k % 8 / 2][4 + step];
        sum += static_cast<double>(value(left, k % 2)) * value(right, k % 2);
      }
      result = static_cast<float>(sum);
      if (std::isfinite(result) && std::fabs(result) > std::fabs(sum))
        result = std::nextafterf(result, 0.0f);
    }
    c[i] = result;
  }
}

// Four 8×8 matrices of 16-bit numbers; lane i gives the address of row i % 8 of matrix i / 8.
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  const auto address = reinterpret_cast<uint64_t>(row);
  const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  const auto slots = cuda_on_cpu::collective(0xffffffffu, mine, 2, line);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const uint32_t* const slot = slots[8 * i + lane / 4];
    const auto from = reinterpret_cast<const unsigned char*>(slot[0] | uint64_t(slot[1]) << 32);
    if (reinterpret_cast<uint64_t>(from) % 16) cuda_on_cpu::fail("ldmatrix of an unaligned row");
    std::memcpy(&r[i], from + 4 * (lane % 4), 4);
  }
}

// The same with each matrix transposed.
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
  const auto address = reinterpret_cast<uint64_t>(row);
  const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  const auto slots = cuda_on_cpu::collective(0xffffffffu, mine, 2, line);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int half = 0; half < 2; ++half) {
      const uint32_t* const slot = slots[8 * i + 2 * (lane % 4) + half];
      const auto from = reinterpret_cast<const unsigned char*>(slot[0] | uint64_t(slot[1]) << 32);
      if (reinterpret_cast<uint64_t>(from) % 16) cuda_on_cpu::fail("ldmatrix of an unaligned row");
      std::memcpy(&pair[half], from + 2 * (lane / 4), 2);
    }
    r[i] = pair[0] | uint32_t(pair[1]) << 16;
  }
}

inline float exp2_fast(float x) {
  const float power = std::exp2(x);
  return std::fabs(power) < 0x1p-126f ? 0.0f : power;
}

inline float log2_fast(float x) { return std::log2(x); }
inline float inverse_fast(float x) { return 1.0f / x; }

inline int forgotten(int value) { return value; }

inline void store_16(float* to, const float (&from)[4]) {
  if (reinterpret_cast<uint64_t>(to) % 16) cuda_on_cpu::fail("four floats to an unaligned address");
  std::memcpy(to, from, 16);
}

// 16 bytes from global to shared memory, zeros unless `present`; they arrive at cp_async_wait, or
// at once: CUDA_ON_CPU_COPIES.
inline void cp_async_16(void* shared, const void* global, bool present) {
  if (reinterpret_cast<uint64_t>(shared) % 16)
    cuda_on_cpu::fail("cp.async to an unaligned address");
  if (present && reinterpret_cast<uint64_t>(global) % 16)
    cuda_on_cpu::fail("cp.async from an unaligned address");
  cuda_on_cpu::copy_later(shared, present ? global : nullptr, 16);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int GROUPS_IN_FLIGHT>
void cp_async_wait() {
  cuda_on_cpu::wait_for_copies(GROUPS_IN_FLIGHT);
}

}  // namespace cmpose
