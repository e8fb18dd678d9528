// Kernels that the compile check must refuse, each for one reason, and one that it must accept.
// They are compiled as those of csrc/ are, and never run.

// Keeps kValues floats of each thread alive at once.
template <int kValues>
__device__ __forceinline__ void mix(float* data, int rounds) {
  float values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = data[i * 1024 + threadIdx.x];
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += values[(i + 7) % kValues] * values[0];
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) data[i * 1024 + threadIdx.x] = values[i];
}

// 1,024 threads leave 64 registers to each, so that not all values fit.
__global__ void __launch_bounds__(1024) spilling_kernel(float* data, int rounds) {
  mix<96>(data, rounds);
}

__global__ void __launch_bounds__(128) hungry_kernel(float* data, int rounds) {
  mix<128>(data, rounds);
}

// Registers cannot be indexed by a number known only at run time.
template <int kSize>
__global__ void stack_kernel(float* data, const int* index) {
  float values[kSize];
  for (int i = 0; i < kSize; ++i) values[i] = data[i];
  values[index[0]] = 1.f;
  float sum = 0;
  for (int i = 0; i < kSize; ++i) sum += values[index[i]];
  data[threadIdx.x] = sum;
}

template __global__ void stack_kernel<64>(float*, const int*);

__device__ __noinline__ float helper(const float* data, const int* index) {
  float values[32];
  for (int i = 0; i < 32; ++i) values[index[i]] = data[i];
  float sum = 0;
  for (int i = 0; i < 32; ++i) sum += values[index[i + 32]];
  return sum;
}

// The stack frame is the called function's.
__global__ void calling_kernel(float* data, const int* index) {
  data[threadIdx.x] = helper(data, index);
}

namespace {

__global__ void modest_kernel(float* data) {
  __shared__ float tile[1024];
  tile[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = tile[1023 - threadIdx.x];
}

}  // namespace

void launch(float* data) { modest_kernel<<<1, 1024>>>(data); }
