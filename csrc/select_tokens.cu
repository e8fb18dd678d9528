// Scores, importance and the split into causal and non-causal tokens, and the gradient.
#include "launch.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 512;

struct Parts {
  float* logits;   // [K, N]
  float* largest;  // [K]
  float* total;    // [K], Σ exp(logit − largest)
};

// The parts that the forward and the backward kernel need.
__device__ __forceinline__ Parts take_parts(SharedMemory& shared, int keypoints, int tokens) {
  Parts parts;
  parts.logits = shared.take<float>(keypoints * tokens);
  parts.largest = shared.take<float>(keypoints);
  parts.total = shared.take<float>(keypoints);
  return parts;
}

__device__ __forceinline__ float score(const Parts& parts, int keypoint, int token, int tokens) {
  return expf(parts.logits[keypoint * tokens + token] - parts.largest[keypoint]) /
         parts.total[keypoint];
}

// The block loads a clip's logits and finds each row's softmax, one warp a row.
template <class T>
__device__ __forceinline__ void load_rows(const T* logits, const Parts& parts, int keypoints,
                                          int tokens) {
  for (int i = threadIdx.x; i < keypoints * tokens; i += kThreads) {
    parts.logits[i] = to_float(logits[i]);
  }
  __syncthreads();
  for (int k = warp_id(); k < keypoints; k += kThreads / kWarp) {
    const float* const row = parts.logits + k * tokens;
    float largest = row[0];
    for (int i = lane_id(); i < tokens; i += kWarp) {
      if (row[i] > largest || row[i] != row[i]) largest = row[i];
    }
    largest = warp_max(largest);
    float total = 0.0f;
    for (int i = lane_id(); i < tokens; i += kWarp) total += expf(row[i] - largest);
    total = warp_sum(total);
    if (lane_id() == 0) {
      parts.largest[k] = largest;
      parts.total[k] = total;
    }
  }
  __syncthreads();
}

// One block for each clip. A token's rank is found by counting the tokens that come before it.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    select_forward(const T* __restrict__ logits, T* __restrict__ scores, T* __restrict__ importance,
                   int64_t* __restrict__ causal, int64_t* __restrict__ noncausal, int keypoints,
                   int tokens, int chosen, bool maximum) {
  SharedMemory shared;
  const Parts parts = take_parts(shared, keypoints, tokens);
  unsigned* const keys = shared.take<unsigned>(keypoints * tokens);  // logits, ordered
  uint64_t* const order = shared.take<uint64_t>(tokens);             // smaller: chosen earlier
  int* const best_rank = shared.take<int>(tokens);
  int* const is_causal = shared.take<int>(tokens);
  const int64_t clip = blockIdx.x;
  const int64_t base = clip * keypoints * tokens;
  load_rows(logits + base, parts, keypoints, tokens);
  for (int i = threadIdx.x; i < keypoints * tokens; i += kThreads) {
    scores[base + i] = from_float<T>(score(parts, i / tokens, i % tokens, tokens));
    keys[i] = ordered(parts.logits[i]);
  }
  for (int i = threadIdx.x; i < tokens; i += kThreads) best_rank[i] = tokens;
  __syncthreads();

  // A token's rank in a row counts those before it in (logit descending, index ascending).
  for (int element = threadIdx.x; element < keypoints * tokens; element += kThreads) {
    const int i = element % tokens;
    const unsigned* const row = keys + element / tokens * tokens;
    const unsigned mine = row[i];
    int rank = 0;
    for (int j = 0; j < tokens; ++j) rank += row[j] > mine || (row[j] == mine && j < i);
    atomicMin(best_rank + i, rank);  // of integers: the order does not matter
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    float sum = 0.0f, best = score(parts, 0, i, tokens);
    for (int k = 0; k < keypoints; ++k) {
      const float value = score(parts, k, i, tokens);
      sum += value;
      if (value > best || value != value) best = value;
    }
    importance[clip * tokens + i] = from_float<T>(maximum ? best : sum / keypoints);
    order[i] = static_cast<uint64_t>(best_rank[i]) << 32 | static_cast<unsigned>(~ordered(best));
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    const uint64_t mine = order[i];
    int rank = 0;
    for (int j = 0; j < tokens; ++j) rank += order[j] < mine || (order[j] == mine && j < i);
    is_causal[i] = rank < chosen;
  }
  __syncthreads();

  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    int before = 0;
    for (int j = 0; j < i; ++j) before += is_causal[j];
    if (is_causal[i]) {
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
  const Parts parts = take_parts(shared, keypoints, tokens);
  float* const best = shared.take<float>(tokens);
  float* const share = shared.take<float>(tokens);  // of the importance's gradient
  const int64_t clip = blockIdx.x;
  const int64_t base = clip * keypoints * tokens;
  load_rows(logits + base, parts, keypoints, tokens);
  for (int i = threadIdx.x; i < tokens; i += kThreads) {
    float largest = score(parts, 0, i, tokens);
    int attained = maximum ? 0 : keypoints;
    if (maximum) {
      for (int k = 0; k < keypoints; ++k) largest = fmaxf(largest, score(parts, k, i, tokens));
      for (int k = 0; k < keypoints; ++k) attained += score(parts, k, i, tokens) == largest;
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
      const float value = score(parts, k, i, tokens);
      dot += value * gradient(i, value);
    }
    dot = warp_sum(dot);
    for (int i = lane_id(); i < tokens; i += kWarp) {
      const float value = score(parts, k, i, tokens);
      d_logits[base + k * tokens + i] = from_float<T>(value * (gradient(i, value) - dot));
    }
  }
}

unsigned shared_forward(int keypoints, int tokens) {
  return 2 * shared_part<float>(keypoints * tokens) + 2 * shared_part<float>(keypoints) +
         shared_part<uint64_t>(tokens) + 2 * shared_part<int>(tokens);
}

unsigned shared_backward(int keypoints, int tokens) {
  return shared_part<float>(keypoints * tokens) + 2 * shared_part<float>(keypoints) +
         2 * shared_part<float>(tokens);
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
