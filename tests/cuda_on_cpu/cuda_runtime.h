// What of CUDA the kernels in csrc/ use, for a CPU: with this folder first on the include path g++
// compiles the very same .cu files, and the tests run them.
//
// Blocks run one after another. A block's threads are fibers of one operating-system thread: each
// runs until it waits at a barrier or in a warp collective, then the next one does. Their order is
// CUDA_ON_CPU_ORDER: "forward" (the default), "backward", or a number that seeds a shuffle, anew at
// every turn. A kernel without races gives the same bits in every order.
//
// What is caught: barriers that not all threads of a block reach, or that they reach at different
// lines; collectives of a lane outside its mask, with unequal masks, or that some lane of the mask
// never reaches; shared memory read before it is written (it is NaN at first); cp.async data read
// before it is waited for (copies are made at the wait); more shared memory than a block of an RTX
// 4090 has, or more than 48 KB without asking; with AddressSanitizer every access outside a tensor
// or outside the shared memory asked for; with other orders of threads, missing barriers.
//
// What is not modelled: memory ordering between blocks, that threads run at once, bank conflicts,
// registers, launch limits other than shared memory, float contraction (a*b+c may be fused on a
// GPU), and the exact rounding of tensor cores: products here are exact and sums truncated every 8
// channels; what they do inside a step is not documented.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

namespace cuda_on_cpu {

constexpr unsigned kSharedLimit = 101376;  // bytes a block, RTX 4090
constexpr unsigned kSharedDefault = 48 * 1024;
constexpr int kSlotWords = 8;

int lane();

// Runs `body` once for every thread of every block; returns whether all of them ended.
int run(dim3 grid, dim3 block, unsigned shared_bytes, unsigned allowed_bytes,
        const std::function<void()>& body);
void barrier(int line);
// Lends `words` words to the other lanes of `mask`, once all of them are here: [lane][word].
const uint32_t (*collective(unsigned mask, const uint32_t* words, int count, int line))[kSlotWords];
void copy_later(void* to, const void* from, int bytes);  // from may be null: zeros
void commit_copies();
void wait_for_copies(int groups_in_flight);
void allow_shared(const void* kernel, unsigned bytes);
unsigned allowed_shared(const void* kernel);
[[noreturn]] void fail(const char* what);
const char* last_failure();

// Where launches go instead, if it is set: the kernel's address, blocks, threads, bytes of dynamic
// shared memory, and the parameters as CUDA lays them out. Returns why it failed, or null.
using Taker = const char* (*)(const void* kernel, unsigned blocks, unsigned threads,
                              unsigned shared_bytes, const char* parameters, unsigned bytes);
extern Taker taker;
bool hand_over(const void* kernel, dim3 grid, dim3 block, unsigned shared_bytes,
               const std::vector<char>& parameters);

template <class T>
T from_lane(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) <= 8, "4 or 8 bytes");
  uint32_t words[2];
  std::memcpy(words, &value, sizeof(T));
  const auto slots = collective(mask, words, sizeof(T) / 4, line);
  if (!(mask >> (source & 31) & 1)) fail("a shuffle reads a lane outside its mask");
  std::memcpy(&value, slots[source & 31], sizeof(T));
  return value;
}

template <class F>
unsigned reduce(unsigned mask, unsigned value, F combine, int line) {
  const auto slots = collective(mask, &value, 1, line);
  bool first = true;
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    result = first ? slots[i][0] : combine(result, slots[i][0]);
    first = false;
  }
  return result;
}

}  // namespace cuda_on_cpu

// -- inside kernels -------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_on_cpu::collective(mask, nullptr, 0, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::from_lane(mask, value, source, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, int line = __builtin_LINE()) {
  return cuda_on_cpu::from_lane(mask, value, cuda_on_cpu::lane() ^ bits, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const unsigned bit = predicate ? 1u << cuda_on_cpu::lane() : 0u;
  return cuda_on_cpu::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; }, line);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return cuda_on_cpu::reduce(
      mask, value, [](unsigned a, unsigned b) { return b < a ? b : a; }, line);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return cuda_on_cpu::reduce(
      mask, value, [](unsigned a, unsigned b) { return b > a ? b : a; }, line);
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, int line = __builtin_LINE()) {
  return cuda_on_cpu::reduce(mask, value, [](unsigned a, unsigned b) { return a + b; }, line);
}
inline int atomicMin(int* address, int value) {
  const int before = *address;
  if (value < before) *address = value;
  return before;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint64_t min(uint64_t a, uint64_t b) { return a < b ? a : b; }
inline uint64_t max(uint64_t a, uint64_t b) { return a > b ? a : b; }
using std::isfinite;

// -- on the host ----------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::last_failure(); }

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
  cuda_on_cpu::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<unsigned>(value));
  return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... a) {
  if (cuda_on_cpu::taker) {
    std::vector<char> bytes;
    const auto append = [&](const auto& value) {
      bytes.resize((bytes.size() + alignof(decltype(value)) - 1) / alignof(decltype(value)) *
                   alignof(decltype(value)));
      const char* const from = reinterpret_cast<const char*>(&value);
      bytes.insert(bytes.end(), from, from + sizeof(value));
    };
    (append(static_cast<P>(a)), ...);
    return cuda_on_cpu::hand_over(reinterpret_cast<const void*>(kernel), config->gridDim,
                                  config->blockDim, static_cast<unsigned>(config->dynamicSmemBytes),
                                  bytes)
               ? cudaSuccess
               : cudaErrorLaunchFailure;
  }
  const std::tuple<P...> arguments(static_cast<P>(a)...);
  const bool ended = cuda_on_cpu::run(
      config->gridDim, config->blockDim, static_cast<unsigned>(config->dynamicSmemBytes),
      cuda_on_cpu::allowed_shared(reinterpret_cast<const void*>(kernel)),
      [&] { std::apply(kernel, arguments); });
  return ended ? cudaSuccess : cudaErrorLaunchFailure;
}
