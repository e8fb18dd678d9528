// Scores, importance and the split into causal and non-causal tokens, and the gradient.
#include <type_traits>

#include "launch.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 512;
constexpr int kMine = 8;               // keys of a lane
constexpr int kChunk = kMine * kWarp;  // keys that a warp sorts at once
constexpr int kIndexBits = 13;         // of a token among those whose clip fits shared memory

// A logit so that the largest comes first: the bits of the smallest integer. -0 counts as 0, NaN
// comes first.
__device__ __forceinline__ unsigned descending(float logit) { return ~ordered(logit); }
template <class T>
__device__ __forceinline__ unsigned descending(T logit) {
  static_assert(sizeof(T) == 2, "16 bits");
  const float value = to_float(logit);
  if (value != value) return 0;
  const unsigned bits = value == 0.0f ? 0u : logit.bits;
  return (bits & 0x8000u ? bits : ~(bits | 0x8000u)) & 0xffffu;
}

// One key a token: the logit above, the index below. Keys differ, and in ascending order a row's
// tokens are in the order (logit descending, index ascending).
template <class T>
struct Key {
  using Bits = std::conditional_t<sizeof(T) == 2, uint32_t, uint64_t>;
  static constexpr int kShift = 8 * sizeof(T);
  static constexpr Bits kLast = ~Bits{0};  // behind every key
  static __device__ __forceinline__ Bits of(T logit, int token) {
    return Bits{descending(logit)} << kShift | static_cast<Bits>(token);
  }
  static __device__ __forceinline__ unsigned logit(Bits key) {
    return static_cast<unsigned>(key >> kShift);
  }
  static __device__ __forceinline__ int token(Bits key) {
    return static_cast<int>(key & ((Bits{1} << kShift) - 1));
  }
};

template <class B>
__device__ __forceinline__ void exchange(B& low, B& high) {
  const B smaller = min(low, high);
  high = max(low, high);
  low = smaller;
}

// A warp sorts kChunk keys by a bitonic network: key r of lane i becomes number kMine · i + r.
template <class B>
__device__ __forceinline__ void sort_chunk(B (&keys)[kMine]) {
#pragma unroll
  for (int size = 2; size <= kChunk; size *= 2) {
    // Numbers i and j = i xor (size − 1), then i xor the strides: the smaller goes to the front.
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int other = stride == size / 2 ? size - 1 : stride;
      if (stride < kMine) {
#pragma unroll
        for (int r = 0; r < kMine; ++r) {
          if (r < (r ^ other)) exchange(keys[r], keys[r ^ other]);
        }
      } else {
        const bool behind = lane_id() & stride / kMine;
        B theirs[kMine];
#pragma unroll
        for (int r = 0; r < kMine; ++r) {
          theirs[r] = __shfl_xor_sync(kAllLanes, keys[r ^ other % kMine], other / kMine);
        }
#pragma unroll
        for (int r = 0; r < kMine; ++r) {
          const B smaller = min(theirs[r], keys[r]), larger = max(theirs[r], keys[r]);
          keys[r] = behind ? larger : smaller;
        }
      }
    }
  }
}

// How many of `count` ascending numbers are below `bound`; count is kChunk at most.
__device__ __forceinline__ int count_below(const unsigned* numbers, int count, unsigned bound) {
  int below = 0;
#pragma unroll
  for (int step = kChunk; step > 0; step /= 2) {
    if (below + step <= count && numbers[below + step - 1] < bound) below += step;
  }
  return below;
}

// A warp loads a row of logits and makes its scores, in shared memory.
template <class T>
__device__ __forceinline__ void load_scores(const T* logits, float* scores, int tokens) {
  float largest = -INFINITY;
#pragma unroll 8
  for (int i = lane_id(); i < tokens; i += kWarp) {
    const float logit = to_float(logits[i]);
    scores[i] = logit;
    if (logit > largest || logit != logit) largest = logit;
  }
  largest = warp_max(largest);
  float total = 0.0f;
  for (int i = lane_id(); i < tokens; i += kWarp) {
    scores[i] = expf(scores[i] - largest);
    total += scores[i];
  }
  total = warp_sum(total);
  for (int i = lane_id(); i < tokens; i += kWarp) scores[i] /= total;
}

// A warp ranks a row's tokens, and lowers best_rank to the ranks. Of more than kChunk tokens it
// sorts each chunk, and adds what the other chunks have before a token; `sorted` has their logits.
template <class T>
__device__ __forceinline__ void rank_row(const T* logits, unsigned* sorted, int* best_rank,
                                         int tokens) {
  for (int chunk = 0; chunk < tokens; chunk += kChunk) {
    typename Key<T>::Bits keys[kMine];
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const int i = chunk + r * kWarp + lane_id();
      keys[r] = i < tokens ? Key<T>::of(logits[i], i) : Key<T>::kLast;
    }
    sort_chunk(keys);
#pragma unroll
    for (int r = 0; r < kMine; ++r) {
      const int rank = kMine * lane_id() + r;  // in the chunk
      if (chunk + rank >= tokens) continue;
      if (tokens <= kChunk) {
        atomicMin(best_rank + Key<T>::token(keys[r]), rank);  // the order does not matter
      } else {
        sorted[chunk + rank] = Key<T>::logit(keys[r]);
      }
    }
  }
  if (tokens <= kChunk) return;
  __syncwarp();
  for (int i = lane_id(); i < tokens; i += kWarp) {
    const unsigned mine = descending(logits[i]);
    int rank = 0;
    for (int chunk = 0; chunk < tokens; chunk += kChunk) {
      // Of equal logits the earlier token comes first.
      const unsigned bound = chunk + kChunk <= i ? mine + 1 : mine;
      rank += count_below(sorted + chunk, min(kChunk, tokens - chunk), bound);
    }
    for (int j = i / kChunk * kChunk; j < i; ++j) rank += descending(logits[j]) == mine;
    atomicMin(best_rank + i, rank);
  }
}

// One block for each clip, one warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    select_forward(const T* __restrict__ logits, T* __restrict__ scores, T* __restrict__ importance,
                   int64_t* __restrict__ causal, int64_t* __restrict__ noncausal, int keypoints,
                   int tokens, int chosen, bool maximum) {
  SharedMemory shared;
  float* const rows = shared.take<float>(keypoints * tokens);
  uint64_t* const order = shared.take<uint64_t>(tokens);  // smaller: chosen earlier
  int* const best_rank = shared.take<int>(tokens);
  unsigned* const is_causal = shared.take<unsigned>(tokens);  // a bit each
  unsigned* const sorted = tokens > kChunk ? shared.take<unsigned>(keypoints * tokens) : nullptr;
  const int64_t clip = blockIdx.x;
  const int64_t base = clip * keypoints * tokens;
  for (int i = threadIdx.x; i < tokens; i += kThreads) best_rank[i] = tokens;
  __syncthreads();
  for (int k = warp_id(); k < keypoints; k += kThreads / kWarp) {
    const int row = k * tokens;
    load_scores(logits + base + row, rows + row, tokens);
    for (int i = lane_id(); i < tokens; i += kWarp) {
      scores[base + row + i] = from_float<T>(rows[row + i]);
    }
    rank_row(logits + base + row, sorted + row, best_rank, tokens);
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    float sum = 0.0f, best = rows[i];
    for (int k = 0; k < keypoints; ++k) {
      const float value = rows[k * tokens + i];
      sum += value;
      if (value > best || value != value) best = value;
    }
    importance[clip * tokens + i] = from_float<T>(maximum ? best : sum / keypoints);
    order[i] = static_cast<uint64_t>(best_rank[i]) << (32 + kIndexBits) |
               static_cast<uint64_t>(descending(best)) << kIndexBits | static_cast<unsigned>(i);
  }
  __syncthreads();

  const int whole = (tokens + kWarp - 1) / kWarp * kWarp;  // no lane is left out of a vote
  for (int i = threadIdx.x; i < whole; i += kThreads) {
    const uint64_t mine = order[min(i, tokens - 1)];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < tokens; ++j) rank += order[j] < mine;
    const unsigned votes = __ballot_sync(kAllLanes, i < tokens && rank < chosen);
    if (lane_id() == 0) is_causal[i / kWarp] = votes;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    const unsigned bit = 1u << i % kWarp, votes = is_causal[i / kWarp];
    int before = __popc(votes & (bit - 1));
    for (int w = 0; w < i / kWarp; ++w) before += __popc(is_causal[w]);
    if (votes & bit) {
      causal[clip * chosen + before] = i;
    } else {
      noncausal[clip * (tokens - chosen) + i - before] = i;
    }
  }
}

// d l_ki = S_ki (t_ki − Σ_j S_kj t_kj), where t is the gradient of S, both its own and what comes
// through the importance. The keypoints that attain a maximum share its gradient evenly.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    select_backward(const T* __restrict__ logits, const T* __restrict__ d_scores,
                    const T* __restrict__ d_importance, T* __restrict__ d_logits, int keypoints,
                    int tokens, bool maximum) {
  SharedMemory shared;
  float* const rows = shared.take<float>(keypoints * tokens);
  float* const best = shared.take<float>(tokens);
  float* const share = shared.take<float>(tokens);  // of the importance's gradient
  const int64_t clip = blockIdx.x;
  const int64_t base = clip * keypoints * tokens;
  for (int k = warp_id(); k < keypoints; k += kThreads / kWarp) {
    load_scores(logits + base + k * tokens, rows + k * tokens, tokens);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    float largest = rows[i];
    int attained = maximum ? 0 : keypoints;
    if (maximum) {
      for (int k = 0; k < keypoints; ++k) largest = fmaxf(largest, rows[k * tokens + i]);
      for (int k = 0; k < keypoints; ++k) attained += rows[k * tokens + i] == largest;
    }
    best[i] = largest;
    const float gradient = d_importance ? to_float(d_importance[clip * tokens + i]) : 0.0f;
    share[i] = gradient / attained;
  }
  __syncthreads();
  for (int k = warp_id(); k < keypoints; k += kThreads / kWarp) {
    const auto gradient = [&](int i, float value) {
      const float direct = d_scores ? to_float(d_scores[base + k * tokens + i]) : 0.0f;
      return !maximum || value == best[i] ? direct + share[i] : direct;
    };
    float dot = 0.0f;
    for (int i = lane_id(); i < tokens; i += kWarp) {
      const float value = rows[k * tokens + i];
      dot += value * gradient(i, value);
    }
    dot = warp_sum(dot);
    for (int i = lane_id(); i < tokens; i += kWarp) {
      const float value = rows[k * tokens + i];
      d_logits[base + k * tokens + i] = from_float<T>(value * (gradient(i, value) - dot));
    }
  }
}

unsigned shared_forward(int keypoints, int tokens) {
  const int rows = tokens > kChunk ? 2 : 1;
  return rows * shared_part<float>(keypoints * tokens) + shared_part<uint64_t>(tokens) +
         2 * shared_part<int>(tokens);
}

unsigned shared_backward(int keypoints, int tokens) {
  return shared_part<float>(keypoints * tokens) + 2 * shared_part<float>(tokens);
}

}  // namespace

unsigned select_tokens_shared(int keypoints, int tokens) {
  return shared_forward(keypoints, tokens);
}

void select_tokens(const SelectTokens& shape, int per_keypoint, const void* logits, void* scores,
                   void* importance, int64_t* causal, int64_t* noncausal, void* stream) {
  with_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    launch("select_tokens", select_forward<T>, shape.clips, kThreads,
           shared_forward(shape.keypoints, shape.tokens), stream, static_cast<const T*>(logits),
           static_cast<T*>(scores), static_cast<T*>(importance), causal, noncausal, shape.keypoints,
           shape.tokens, per_keypoint * shape.keypoints, shape.maximum);
  });
}

void select_tokens_backward(const SelectTokens& shape, const void* logits, const void* d_scores,
                            const void* d_importance, void* d_logits, void* stream) {
  with_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    launch("select_tokens_backward", select_backward<T>, shape.clips, kThreads,
           shared_backward(shape.keypoints, shape.tokens), stream, static_cast<const T*>(logits),
           static_cast<const T*>(d_scores), static_cast<const T*>(d_importance),
           static_cast<T*>(d_logits), shape.keypoints, shape.tokens, shape.maximum);
  });
}

}  // namespace cmpose
