// Sums of a clip's tokens by cluster, in index order, so that they have the same bits every time.
// They need neither atomics nor a sorting algorithm. merge_clusters, the gradient of unmerge_tokens
// and the last launch of dpc_knn_merge make them.
#pragma once

#include "launch.cuh"

namespace cmpose {

// Loads a number whose type is known only at run time.
__device__ __forceinline__ float load_number(const void* numbers, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(numbers)[index];
  if (dtype == Dtype::kFloat16) return to_float(static_cast<const fp16*>(numbers)[index]);
  return to_float(static_cast<const bf16*>(numbers)[index]);
}

__device__ __forceinline__ void store_number(void* numbers, Dtype dtype, int64_t index,
                                             float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(numbers)[index] = value;
  } else if (dtype == Dtype::kFloat16) {
    static_cast<fp16*>(numbers)[index] = from_float<fp16>(value);
  } else {
    static_cast<bf16*>(numbers)[index] = from_float<bf16>(value);
  }
}

// Stores V neighbouring floats, 16 bytes at a time if there are that many.
template <int V>
__device__ __forceinline__ void store_floats(float* to, const float (&values)[V]) {
  constexpr int kStep = V < 4 ? 1 : 4;
#pragma unroll
  for (int v = 0; v < V; v += kStep) {
    Vector<float, kStep> part;
#pragma unroll
    for (int u = 0; u < kStep; ++u) part.at[u] = values[v + u];
    *reinterpret_cast<Vector<float, kStep>*>(to + v) = part;
  }
}

template <int V>
__device__ __forceinline__ void load_floats(const float* from, float (&values)[V]) {
  constexpr int kStep = V < 4 ? 1 : 4;
#pragma unroll
  for (int v = 0; v < V; v += kStep) {
    const auto part = *reinterpret_cast<const Vector<float, kStep>*>(from + v);
#pragma unroll
    for (int u = 0; u < kStep; ++u) values[v + u] = part.at[u];
  }
}

// What is summed: Σ w_j f_j over the tokens of a cluster, divided by Σ w_j if `normalize`.
struct ClusterSums {
  const void* weights;  // w [B, M]; null for weights of 1
  Dtype weight_dtype;
  bool normalize;
  const int64_t* index;  // [B, M]: in which of a clip's `rows` rows token j lies; null: in row j
  int rows;
};

// A label outside 0 .. clusters−1 belongs to no cluster.
__device__ __forceinline__ int cluster_of(int64_t label, int clusters) {
  return label >= 0 && label < clusters ? static_cast<int>(label) : clusters;
}

// Sets starts[c] = p for each cluster that starts at position `p` of a clip's tokens sorted by
// cluster: cluster c's tokens are at starts[c] .. starts[c+1]−1. `before` and `here` are the
// clusters at p−1 and p, with −1 before the first token and `clusters` behind the last.
__device__ __forceinline__ void mark_starts(int* starts, int p, int before, int here) {
  for (int c = before + 1; c <= here; ++c) starts[c] = p;
}

// A token as a key of its clip's order by (cluster, index): cluster in the high bits, index in the
// low ones. For clips that a block orders by itself, of up to 1,024 tokens and 2²² − 2 clusters.
constexpr int kIndexBits = 10;
__device__ __forceinline__ unsigned cluster_key(int cluster, int token) {
  return static_cast<unsigned>(cluster) << kIndexBits | static_cast<unsigned>(token);
}
__device__ __forceinline__ int key_token(unsigned key) {
  return static_cast<int>(key & ((1u << kIndexBits) - 1));
}
__device__ __forceinline__ int key_cluster(unsigned key) {
  return static_cast<int>(key >> kIndexBits);
}

// The block orders a clip's tokens: sorted [M] are the keys in ascending order, and starts
// [clusters + 1] tells where each cluster starts in it. All lie in shared memory; `keys` [M] was
// written by the same threads, thread i keys i, i + blockDim.x, ..., and its part has room up to a
// multiple of 4. Each key's rank is counted, which for the few tokens of a clip is faster than a
// sort.
__device__ __forceinline__ void sort_by_cluster(unsigned* keys, int tokens, int clusters,
                                                unsigned* sorted, int* starts) {
  if (threadIdx.x < 3 && tokens + static_cast<int>(threadIdx.x) < (tokens + 3) / 4 * 4) {
    keys[tokens + threadIdx.x] = 0xffffffffu;  // before no key
  }
  __syncthreads();
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const unsigned mine = keys[i];
    int rank = 0;
#pragma unroll 4
    for (int j = 0; j < tokens; j += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(keys + j);
      rank += (others.x < mine) + (others.y < mine) + (others.z < mine) + (others.w < mine);
    }
    sorted[rank] = mine;
  }
  __syncthreads();
  for (int p = threadIdx.x; p <= tokens; p += blockDim.x) {
    mark_starts(starts, p, p ? key_cluster(sorted[p - 1]) : -1,
                p < tokens ? key_cluster(sorted[p]) : clusters);
  }
  __syncthreads();
}

// Whether a lane can take 16 bytes of numbers of type T at once: row lengths and pointers are
// multiples of 16 bytes.
template <class T, class... P>
bool whole_vectors(int channels, P... pointers) {
  uint64_t all = channels * sizeof(T);
  ((all |= reinterpret_cast<uint64_t>(pointers)), ...);
  return all % 16 == 0;
}

// How many blocks share a clip's channels, with 32 · `vector` channels each.
inline int slices_of(int channels, int vector) {
  return static_cast<int>(ceil_div(channels > 0 ? channels : 1, kWarp * vector));
}

// Launches the sums of all clips, with the results of merge_clusters. Defined in merge_clusters.cu.
void sum_clusters(const char* name, const Clusters& shape, const ClusterSums& sums,
                  const void* tokens, const int64_t* assignment, void* merged, float* total,
                  float* exact, void* workspace, void* stream);

}  // namespace cmpose
