// A copy through shared memory, and the same with one thing done worse, for
// tests/csrc/test_gate.py.
#include <cuda_runtime.h>

enum Fault { kNone, kNarrow, kScattered, kTwice, kConflicts, kWork, kShared };

template <int FAULT>
__global__ void __launch_bounds__(256) move(const uint4* from, uint4* to, int number) {
  __shared__ unsigned words[FAULT == kShared ? 10240 : 1024];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int at = blockIdx.x * 256 + thread;
  unsigned values[4];
  if (FAULT == kNarrow) {
    const volatile unsigned* narrow = reinterpret_cast<const volatile unsigned*>(from + at);
    for (int k = 0; k < 4; ++k) values[k] = narrow[k];
  } else {
    const int source = FAULT == kScattered ? at % 32 * (number / 32) + at / 32 : at;
    const uint4 all = from[source];
    values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
  }
  if (FAULT == kTwice) values[0] += from[at + number].x;
  for (int k = 0; k < 4; ++k) {
    words[FAULT == kConflicts ? lane * 32 + warp * 4 + k : k * 256 + thread] = values[k];
  }
  __syncthreads();
  for (int k = 0; k < 4; ++k) values[k] = words[k * 256 + thread];
  if (FAULT == kWork) {
    for (int k = 0; k < 40; ++k) values[0] = values[0] * 1664525u + values[1];
  }
  to[at] = make_uint4(values[0], values[1], values[2], values[3]);
}

template __global__ void move<kNone>(const uint4*, uint4*, int);
template __global__ void move<kNarrow>(const uint4*, uint4*, int);
template __global__ void move<kScattered>(const uint4*, uint4*, int);
template __global__ void move<kTwice>(const uint4*, uint4*, int);
template __global__ void move<kConflicts>(const uint4*, uint4*, int);
template __global__ void move<kWork>(const uint4*, uint4*, int);
template __global__ void move<kShared>(const uint4*, uint4*, int);
