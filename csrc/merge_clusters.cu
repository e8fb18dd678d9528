// One token a cluster (Eq. 11), and the gradient.
#include "clusters.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 512;
constexpr int kCountThreads = 256;
// Up to these sizes each block orders its clip by itself; beyond them, other kernels do it first.
constexpr int kSharedTokens = 1024;
constexpr int kSharedClusters = 4096;

bool sorts_in_shared(const Clusters& shape) {
  return shape.tokens <= kSharedTokens && shape.clusters <= kSharedClusters;
}

unsigned shared_bytes(int tokens, int clusters) {
  return 2 * shared_part<int>(tokens) + shared_part<int>(clusters + 1);
}

// A thread finds the rank of one token in its clip's order by (cluster, index), by counting.
__global__ void __launch_bounds__(kCountThreads)
    order_clips(const int64_t* __restrict__ assignment, int* __restrict__ members, int tokens,
                int clusters, int blocks_a_clip) {
  SharedMemory shared;
  int* const tile = shared.take<int>(kCountThreads);
  const int64_t clip = blockIdx.x / blocks_a_clip;
  const int i =
      static_cast<int>(blockIdx.x % blocks_a_clip) * kCountThreads + static_cast<int>(threadIdx.x);
  const int64_t* const labels = assignment + clip * tokens;
  const int mine = i < tokens ? cluster_of(labels[i], clusters) : 0;
  int rank = 0;
  for (int from = 0; from < tokens; from += kCountThreads) {
    const int token = from + static_cast<int>(threadIdx.x);
    if (token < tokens) tile[threadIdx.x] = cluster_of(labels[token], clusters);
    __syncthreads();
    const int count = min(kCountThreads, tokens - from);
    for (int j = 0; j < count; ++j) {
      rank += tile[j] < mine || (tile[j] == mine && from + j < i);
    }
    __syncthreads();
  }
  if (i < tokens) members[clip * tokens + rank] = i;
}

__global__ void __launch_bounds__(kCountThreads)
    mark_clips(const int64_t* __restrict__ assignment, const int* __restrict__ members,
               int* __restrict__ starts, int tokens, int clusters, int blocks_a_clip) {
  const int64_t clip = blockIdx.x / blocks_a_clip;
  const int p =
      static_cast<int>(blockIdx.x % blocks_a_clip) * kCountThreads + static_cast<int>(threadIdx.x);
  if (p > tokens) return;
  const int64_t* const labels = assignment + clip * tokens;
  const int* const order = members + clip * tokens;
  mark_starts(starts + clip * (clusters + 1), p,
              p ? cluster_of(labels[order[p - 1]], clusters) : -1,
              p < tokens ? cluster_of(labels[order[p]], clusters) : clusters);
}

// A block sums all clusters of a clip over 32 · V channels, one warp for each cluster. With SORTS
// it orders the clip's tokens by itself.
template <class T, int V, bool SORTS>
__global__ void __launch_bounds__(kThreads, 1)
    sum_kernel(const T* __restrict__ tokens, ClusterSums sums,
               const int64_t* __restrict__ assignment, T* __restrict__ merged,
               float* __restrict__ total, float* __restrict__ exact,
               const int* __restrict__ members, const int* __restrict__ starts, int token_count,
               int channels, int clusters, int slices) {
  const int64_t clip = blockIdx.x / slices;
  const int slice = static_cast<int>(blockIdx.x % slices);
  if constexpr (SORTS) {
    SharedMemory shared;
    int* const labels = shared.take<int>(token_count);
    int* const my_members = shared.take<int>(token_count);
    int* const my_starts = shared.take<int>(clusters + 1);
    for (int i = threadIdx.x; i < token_count; i += kThreads) {
      labels[i] = cluster_of(assignment[clip * token_count + i], clusters);
    }
    __syncthreads();
    sort_by_cluster(labels, token_count, clusters, my_members, my_starts);
    members = my_members;
    starts = my_starts;
  } else {
    members += clip * token_count;
    starts += clip * (clusters + 1);
  }
  const int64_t out = clip * clusters;
  for (int c = warp_id(); c < clusters; c += kThreads / kWarp) {
    sum_cluster<T, V>(tokens + clip * sums.rows * channels, sums, clip, token_count, channels, c,
                      slice * kWarp * V, members, starts, merged + out * channels,
                      total && slice == 0 ? total + out + c : nullptr,
                      exact ? exact + out * channels : nullptr);
  }
}

// One warp a token: d f_j = (s_j / Σ s) g_c and d s_j = (g_c · (f_j − F_c)) / Σ s.
template <class T, int V>
__global__ void __launch_bounds__(kCountThreads)
    merge_backward(const T* __restrict__ tokens, ClusterSums sums,
                   const int64_t* __restrict__ assignment, const float* __restrict__ total,
                   const float* __restrict__ exact, const T* __restrict__ d_merged,
                   T* __restrict__ d_tokens, void* __restrict__ d_weights, int64_t rows,
                   int token_count, int channels, int clusters) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kCountThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const int c = cluster_of(assignment[row], clusters);
  const int64_t cluster = row / token_count * clusters + c;
  const bool member = c < clusters;
  float divisor = 1.0f;
  if (sums.normalize && member) divisor = total[cluster];
  // A cluster whose weights sum to 0 is 0 and has no gradient.
  const bool passes = member && divisor != 0.0f;
  const float factor = passes ? load_number(sums.weights, sums.weight_dtype, row) / divisor : 0.0f;
  float dot = 0.0f;
  for (int channel = lane_id() * V; channel < channels; channel += kWarp * V) {
    Vector<T, V> gradient = {}, token = {}, out;
    float middle[V] = {};
    if (passes) {  // every load before the first use
      gradient = *reinterpret_cast<const Vector<T, V>*>(d_merged + cluster * channels + channel);
      if (d_weights) {
        token = *reinterpret_cast<const Vector<T, V>*>(tokens + row * channels + channel);
        if (sums.normalize) load_floats<V>(exact + cluster * channels + channel, middle);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out.at[v] = from_float<T>(factor * to_float(gradient.at[v]));
      dot += to_float(gradient.at[v]) * (to_float(token.at[v]) - middle[v]);
    }
    if (d_tokens) *reinterpret_cast<Vector<T, V>*>(d_tokens + row * channels + channel) = out;
  }
  if (!d_weights) return;
  dot = warp_sum(dot);
  if (lane_id() == 0)
    store_number(d_weights, sums.weight_dtype, row, passes ? dot / divisor : 0.0f);
}

}  // namespace

std::map<std::string, unsigned> clusters_shared() {
  return {{"order_clips", shared_part<int>(kCountThreads)},
          {"sum_kernel", shared_bytes(kSharedTokens, kSharedClusters)}};
}

int64_t clusters_workspace(const Clusters& shape) {
  if (sorts_in_shared(shape)) return 0;
  return 4 * shape.clips * (int64_t{shape.tokens} + shape.clusters + 1);
}

void sum_clusters(const char* name, const Clusters& shape, const ClusterSums& sums,
                  const void* tokens, const int64_t* assignment, void* merged, float* total,
                  float* exact, void* workspace, void* stream) {
  const bool shared = sorts_in_shared(shape);
  int* const members = static_cast<int*>(workspace);
  int* const starts = shared ? nullptr : members + shape.clips * shape.tokens;
  if (!shared) {
    const int order_blocks = static_cast<int>(ceil_div(shape.tokens, kCountThreads));
    launch(name, order_clips, shape.clips * order_blocks, kCountThreads,
           shared_part<int>(kCountThreads), stream, assignment, members, shape.tokens,
           shape.clusters, order_blocks);
    const int mark_blocks = static_cast<int>(ceil_div(shape.tokens + 1, kCountThreads));
    launch(name, mark_clips, shape.clips * mark_blocks, kCountThreads, 0, stream, assignment,
           members, starts, shape.tokens, shape.clusters, mark_blocks);
  }
  with_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    const auto launch_kernel = [&](auto kernel, int vector, unsigned bytes) {
      const int slices = slices_of(shape.channels, vector);
      launch(name, kernel, shape.clips * slices, kThreads, bytes, stream,
             static_cast<const T*>(tokens), sums, assignment, static_cast<T*>(merged), total, exact,
             members, starts, shape.tokens, shape.channels, shape.clusters, slices);
    };
    constexpr int kVector = 16 / sizeof(T);
    const unsigned bytes = shared_bytes(shape.tokens, shape.clusters);
    const bool whole = whole_vectors<T>(shape.channels, tokens, merged, exact);
    if (shared) {
      whole ? launch_kernel(sum_kernel<T, kVector, true>, kVector, bytes)
            : launch_kernel(sum_kernel<T, 1, true>, 1, bytes);
    } else {
      whole ? launch_kernel(sum_kernel<T, kVector, false>, kVector, 0)
            : launch_kernel(sum_kernel<T, 1, false>, 1, 0);
    }
  });
}

void merge_clusters(const Clusters& shape, Dtype weight_dtype, bool normalize, const void* tokens,
                    const void* weights, const int64_t* assignment, void* merged, float* total,
                    float* exact, void* workspace, void* stream) {
  const ClusterSums sums{weights, weight_dtype, normalize, nullptr, shape.tokens};
  sum_clusters("merge_clusters", shape, sums, tokens, assignment, merged, total, exact, workspace,
               stream);
}

void merge_clusters_backward(const Clusters& shape, Dtype weight_dtype, bool normalize,
                             const void* tokens, const void* weights, const int64_t* assignment,
                             const float* total, const float* exact, const void* d_merged,
                             void* d_tokens, void* d_weights, void* stream) {
  const ClusterSums sums{weights, weight_dtype, normalize, nullptr, shape.tokens};
  const int64_t rows = shape.clips * shape.tokens;
  with_type(shape.dtype, [&](auto number) {
    using T = decltype(number);
    const auto launch_kernel = [&](auto kernel) {
      launch("merge_clusters_backward", kernel, ceil_div(rows, kCountThreads / kWarp),
             kCountThreads, 0, stream, static_cast<const T*>(tokens), sums, assignment, total,
             exact, static_cast<const T*>(d_merged), static_cast<T*>(d_tokens), d_weights, rows,
             shape.tokens, shape.channels, shape.clusters);
    };
    constexpr int kVector = 16 / sizeof(T);
    const bool whole = whole_vectors<T>(shape.channels, tokens, d_merged, d_tokens, exact);
    whole ? launch_kernel(merge_backward<T, kVector>) : launch_kernel(merge_backward<T, 1>);
  });
}

}  // namespace cmpose
