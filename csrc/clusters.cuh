// Sums of a clip's tokens by cluster, in index order, so that they have the same bits every time.
// They need neither atomics nor a sorting algorithm. merge_clusters, the gradient of unmerge_tokens
// and the last launch of dpc_knn_merge use them.
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

// The block orders a clip's tokens by (cluster, index): `members` is the order and `starts` where
// each cluster starts in it. labels [M] (input), members [M] and starts [clusters + 1] lie in
// shared memory. Each token's rank is counted, which for the few tokens of a clip is faster than a
// sort.
__device__ __forceinline__ void sort_by_cluster(const int* labels, int tokens, int clusters,
                                                int* members, int* starts) {
  for (int i = threadIdx.x; i < tokens; i += blockDim.x) {
    const int mine = labels[i];
    int rank = 0;
    for (int j = 0; j < tokens; ++j) rank += labels[j] < mine || (labels[j] == mine && j < i);
    members[rank] = i;
  }
  __syncthreads();
  for (int p = threadIdx.x; p <= tokens; p += blockDim.x) {
    mark_starts(starts, p, p ? labels[members[p - 1]] : -1,
                p < tokens ? labels[members[p]] : clusters);
  }
  __syncthreads();
}

// One warp sums cluster `c` of one clip over 32 · V channels from `first` on.
//
// f, out and exact point to this clip's part of the tensors; `sums` has the tensors of all clips.
// All lanes of the warp must call it.
template <class T, int V>
__device__ __forceinline__ void sum_cluster(const T* f, const ClusterSums& sums, int64_t clip,
                                            int tokens, int channels, int c, int first,
                                            const int* members, const int* starts, T* out,
                                            float* total_out, float* exact) {
  constexpr int kAhead = 8;  // loads in flight a lane
  const int channel = first + lane_id() * V;
  const bool inside = channel < channels;
  const int begin = starts[c], end = starts[c + 1];
  float sum[V] = {};
  float total = 0.0f;
  for (int p = begin; p < end; p += kAhead) {
    Vector<T, V> row[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      weight[u] = 0.0f;
      if (p + u >= end) continue;
      const int j = members[p + u];
      const int64_t token = clip * tokens + j;
      int64_t source = j;
      if (sums.index) {
        source = sums.index[token];
        if (source < 0 || source >= sums.rows) {  // undefined, but never out of bounds
          row[u] = {};
          continue;
        }
      }
      weight[u] = sums.weights ? load_number(sums.weights, sums.weight_dtype, token) : 1.0f;
      if (inside) {
        row[u] = *reinterpret_cast<const Vector<T, V>*>(f + source * channels + channel);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u >= end) continue;
      total += weight[u];
      if (!inside) continue;
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight[u] * to_float(row[u].at[v]);
    }
  }
  if (total_out && lane_id() == 0) *total_out = total;
  if (!inside) return;
  Vector<T, V> result;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (sums.normalize) sum[v] = total == 0.0f ? 0.0f : sum[v] / total;
    result.at[v] = from_float<T>(sum[v]);
  }
  *reinterpret_cast<Vector<T, V>*>(out + static_cast<int64_t>(c) * channels + channel) = result;
  if (exact) {
    store_floats<V>(exact + static_cast<int64_t>(c) * channels + channel, sum);
  }
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
