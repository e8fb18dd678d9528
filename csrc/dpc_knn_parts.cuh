// What the ways of dpc_knn share: the shift that centres a channel, and merging within the last
// launch.
#pragma once

#include <algorithm>

#include "clusters.cuh"
#include "dpc_knn.cuh"

namespace cmpose {

// What is subtracted from a clip's tokens in one channel, so that |x|² + |y|² − 2xy does not
// cancel: the mean, rounded to a multiple of a power of two that is about as large as the spread
// around it. The shift then has so few bits that x − shift hardly ever rounds, and whole numbers
// stay whole.
__device__ __forceinline__ float shift_of(float sum, float count, float low, float high) {
  if (count == 0.0f || low == high) return count == 0.0f ? 0.0f : high;
  const float mean = sum / count;
  const float spread = fmaxf(high - mean, mean - low);
  const float unit = __uint_as_float((__float_as_uint(spread) + 0x7fffffu) & 0x7f800000u);
  const float shift = rintf(mean / unit) * unit;
  return isfinite(shift) ? shift : 0.0f;
}

// Whether x − shift is exact and a number of type T.
template <class T>
__device__ __forceinline__ bool shifts_exactly(float x, float shift) {
  const float y = x - shift;
  return to_float(from_float<T>(y)) == y && y + shift == x;
}

struct Merge {
  ClusterSums sums;  // if its weights are null, nothing is merged
  const void* tokens;
  void* merged;
  float* total;
  float* exact;
  int channels;
};

// One warp sums cluster `c` of a clip over 32 · V channels from `first` on, in index order as
// merge_clusters does. f, out and exact point to this clip's part of the tensors.
template <class T, int V>
__device__ __forceinline__ void sum_cluster(const T* f, const ClusterSums& sums, int64_t clip,
                                            int tokens, int channels, int c, int first,
                                            const unsigned* sorted, const int* starts, T* out,
                                            float* total_out, float* exact) {
  constexpr int kAhead = 8;  // loads in flight a lane
  const int channel = first + lane_id() * V;
  const bool inside = channel < channels;
  const int end = starts[c + 1];
  float sum[V] = {};
  float total = 0.0f;
  for (int p = starts[c]; p < end; p += kAhead) {
    Vector<T, V> row[kAhead] = {};
    float weight[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u >= end) continue;
      const int j = key_token(sorted[p + u]);
      weight[u] = load_number(sums.weights, sums.weight_dtype, clip * tokens + j);
      if (inside) {
        row[u] = *reinterpret_cast<const Vector<T, V>*>(f + int64_t{j} * channels + channel);
      }
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u >= end) continue;
      total += weight[u];
      float values[V];
      to_floats(row[u], values);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += weight[u] * values[v];
    }
  }
  if (total_out && lane_id() == 0) *total_out = total;
  if (!inside) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (sums.normalize) sum[v] = total == 0.0f ? 0.0f : sum[v] / total;
  }
  const int64_t at = static_cast<int64_t>(c) * channels + channel;
  *reinterpret_cast<Vector<T, V>*>(out + at) = from_floats<T>(sum);
  if (exact) store_floats<V>(exact + at, sum);
}

// Clusters of a clip's tokens, from its matrix of d²: a token goes to the nearest usable centre, of
// equally near ones to the first; a centre to its own cluster. keys [M] are for sort_by_cluster; if
// the block `writes`, the clip's results are written. center_of is −1 for tokens that are none.
__device__ __forceinline__ void label_tokens(const DistancePass& pass, int64_t clip, bool writes,
                                             const int* centers, const int* center_of,
                                             const bool* usable, unsigned* keys) {
  const int count = pass.tokens, threads = static_cast<int>(blockDim.x);
  const float* const matrix = pass.matrix + clip * count * count;
  for (int i = threadIdx.x; i < count; i += threads) {
    float low = INFINITY;
    int nearest = 0;
#pragma unroll 8
    for (int c = 0; c < pass.clusters; ++c) {
      const float square = matrix[int64_t{centers[c]} * count + i];  // symmetric: by rows
      if (usable[centers[c]] && square < low) {
        low = square;
        nearest = c;
      }
    }
    const int label = center_of[i] >= 0 && usable[i] ? center_of[i] : nearest;
    keys[i] = cluster_key(label, i);
    if (writes) pass.assignment[clip * count + i] = label;
  }
  if (!writes) return;
  for (int c = threadIdx.x; c < pass.clusters; c += threads) {
    pass.centers[clip * pass.clusters + c] = centers[c];
  }
}

// The block merges 32 · V channels of a clip, one warp a cluster, after sort_by_cluster. The clip's
// first slice writes the clusters' weights too.
template <class T, int V>
__device__ __forceinline__ void merge_slice(const Merge& merge, int64_t clip, int tokens,
                                            int clusters, int slice, const unsigned* sorted,
                                            const int* starts) {
  const int64_t out = clip * clusters;
  for (int c = warp_id(); c < clusters; c += static_cast<int>(blockDim.x) / kWarp) {
    sum_cluster<T, V>(static_cast<const T*>(merge.tokens) + clip * tokens * merge.channels,
                      merge.sums, clip, tokens, merge.channels, c, slice * kWarp * V, sorted,
                      starts, static_cast<T*>(merge.merged) + out * merge.channels,
                      slice == 0 ? merge.total + out + c : nullptr,
                      merge.exact ? merge.exact + out * merge.channels : nullptr);
  }
}

}  // namespace cmpose
