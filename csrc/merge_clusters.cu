// One token a cluster (Eq. 11), and the gradient.
#include <algorithm>

#include "clusters.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 256;
constexpr int kCountThreads = 256;
// Up to these sizes each block orders its clip by itself; beyond them, other kernels do it first.
constexpr int kWholeTokens = 256;
constexpr int kWholeClusters = 4096;
// Of a longer clip a block holds so many rows at a time.
constexpr int kTileTokens = 128;
constexpr int kRowBytes = 128;  // of a row in a block's shared memory: 4 for each lane of a warp

bool sorts_in_shared(const Clusters& shape) {
  return shape.tokens <= kWholeTokens && shape.clusters <= kWholeClusters;
}

// A token of the block's rows: which row it is, and its weight.
struct Member {
  int row;
  float weight;
};

unsigned shared_bytes(int tokens, int clusters, bool sorts) {
  const int rows = sorts ? tokens : std::min(tokens, kTileTokens);
  const unsigned bytes = shared_part<char>(rows * kRowBytes) + shared_part<Member>(rows);
  if (!sorts) return bytes;
  return bytes + shared_part<float>(tokens) + 2 * shared_part<unsigned>(tokens) +
         shared_part<int>(clusters + 1);
}

// A thread finds the rank of one token in its clip's order by (cluster, index), by counting.
__global__ void __launch_bounds__(kCountThreads)
    order_clips(const int64_t* __restrict__ assignment, int* __restrict__ members, int tokens,
                int clusters, int blocks_a_clip) {
  SharedMemory shared;
  unsigned* const tile = shared.take<unsigned>(kCountThreads);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t clip = blockIdx.x / blocks_a_clip;
  const int own = static_cast<int>(blockIdx.x % blocks_a_clip) * kCountThreads, i = own + thread;
  const int64_t* const labels = assignment + clip * tokens;
  const unsigned mine = i < tokens ? cluster_of(labels[i], clusters) : 0;
  int rank = 0;
  for (int from = 0; from < tokens; from += kCountThreads) {
    // What is behind the last token comes before none.
    tile[thread] =
        from + thread < tokens ? cluster_of(labels[from + thread], clusters) : 0xffffffffu;
    __syncthreads();
    // Of equal clusters the earlier token comes first.
    const unsigned bound = from < own ? mine + 1 : mine;
#pragma unroll 4
    for (int j = 0; j < kCountThreads; j += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(tile + j);
      rank += (others.x < bound) + (others.y < bound) + (others.z < bound) + (others.w < bound);
    }
    if (from == own) {
      for (int j = 0; j < thread; ++j) rank += tile[j] == mine;
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

// Puts kRowBytes of each of `count` rows, from channel `first` on, into `slab`, with zeros behind
// the last channel. `token(i)` is the token of row i. If WHOLE, the copies of 16 bytes have only
// begun then.
template <class T, bool WHOLE, class F>
__device__ __forceinline__ void fetch_rows(const T* f, const ClusterSums& sums, int64_t clip,
                                           int tokens, int channels, int first, int count, T* slab,
                                           F token) {
  constexpr int kPiece = WHOLE ? 16 / sizeof(T) : 1;
  constexpr int kPieces = kRowBytes / sizeof(T) / kPiece;  // of a row
  for (int i = threadIdx.x; i < count * kPieces; i += kThreads) {
    const int channel = first + i % kPieces * kPiece;
    int64_t source = token(i / kPieces);
    if (sums.index) source = sums.index[clip * tokens + source];
    // A source outside the clip's rows is undefined, but never out of bounds.
    const bool present = source >= 0 && source < sums.rows && channel < channels;
    const T* const from = f + (present ? source * channels + channel : 0);
    if constexpr (WHOLE) {
      cp_async_16(slab + i * kPiece, from, present);
    } else {
      slab[i] = present ? *from : T{};
    }
  }
  if constexpr (WHOLE) cp_async_commit();
}

// A lane's sums over its cluster's tokens so far.
template <class T>
struct LaneSums {
  static constexpr int kChannels = 4 / sizeof(T);
  float at[kChannels] = {};
  float total = 0.0f;  // of the weights
};

// Adds the tokens order[0] .. order[count - 1], in this order.
template <class T>
__device__ __forceinline__ void add_rows(LaneSums<T>& sum, const T* slab, const Member* order,
                                         int count) {
  using Part = Vector<T, LaneSums<T>::kChannels>;
  constexpr int kAhead = 4;  // loads in flight
  const Part* const mine = reinterpret_cast<const Part*>(slab) + lane_id();
  for (int p = 0; p < count; p += kAhead) {
    Member member[kAhead] = {};
    Part part[kAhead] = {};
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u < count) member[u] = order[p + u];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u < count) part[u] = mine[member[u].row * kWarp];
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (p + u >= count) continue;
      float values[LaneSums<T>::kChannels];
      to_floats(part[u], values);
#pragma unroll
      for (int v = 0; v < LaneSums<T>::kChannels; ++v) sum.at[v] += member[u].weight * values[v];
      sum.total += member[u].weight;
    }
  }
}

// A block sums all clusters of a clip over kRowBytes of its rows, one warp for each cluster. The
// warps together bring the rows into shared memory, so that a cluster with most of the tokens
// makes no warp wait for memory more often than another. With SORTS all rows are fetched at once,
// and meanwhile the block orders the tokens by itself.
template <class T, bool WHOLE, bool SORTS>
__global__ void __launch_bounds__(kThreads, 3)
    sum_kernel(const T* __restrict__ tokens, ClusterSums sums,
               const int64_t* __restrict__ assignment, T* __restrict__ merged,
               float* __restrict__ total, float* __restrict__ exact,
               const int* __restrict__ members, const int* __restrict__ starts, int token_count,
               int channels, int clusters, int slices) {
  constexpr int kChannels = kRowBytes / sizeof(T), kMine = LaneSums<T>::kChannels;
  const int64_t clip = blockIdx.x / slices;
  const int first = static_cast<int>(blockIdx.x % slices) * kChannels;
  const int tile_rows = SORTS ? token_count : min(token_count, kTileTokens);
  SharedMemory shared;
  T* const slab = shared.take<T>(tile_rows * kChannels);
  Member* const order = shared.take<Member>(tile_rows);
  const T* const f = tokens + clip * sums.rows * channels;
  const auto weight_of = [&](int token) {
    return sums.weights ? load_number(sums.weights, sums.weight_dtype, clip * token_count + token)
                        : 1.0f;
  };
  if constexpr (SORTS) {
    fetch_rows<T, WHOLE>(f, sums, clip, token_count, channels, first, token_count, slab,
                         [](int i) { return i; });
    float* const weights = shared.take<float>(token_count);
    unsigned* const keys = shared.take<unsigned>(token_count);
    unsigned* const sorted = shared.take<unsigned>(token_count);
    int* const my_starts = shared.take<int>(clusters + 1);
    for (int i = threadIdx.x; i < token_count; i += kThreads) {
      keys[i] = cluster_key(cluster_of(assignment[clip * token_count + i], clusters), i);
      weights[i] = weight_of(i);
    }
    sort_by_cluster(keys, token_count, clusters, sorted, my_starts);
    for (int p = threadIdx.x; p < token_count; p += kThreads) {
      const int token = key_token(sorted[p]);
      order[p] = {token, weights[token]};
    }
    starts = my_starts;
  } else {
    members += clip * token_count;
    starts += clip * (clusters + 1);
  }

  const int channel = first + lane_id() * kMine;
  LaneSums<T> sum;
  int c = warp_id();  // the warp's next cluster, whose sum may have begun in the tile before
  int tile = 0;
  do {
    const int end = min(tile + tile_rows, token_count);
    if constexpr (!SORTS) {
      fetch_rows<T, WHOLE>(f, sums, clip, token_count, channels, first, end - tile, slab,
                           [&](int i) { return members[tile + i]; });
      for (int i = threadIdx.x; i < end - tile; i += kThreads) {
        order[i] = {i, weight_of(members[tile + i])};
      }
    }
    if constexpr (WHOLE) cp_async_wait<0>();
    __syncthreads();
    for (; c < clusters; c += kThreads / kWarp) {
      const int from = max(starts[c], tile), until = starts[c + 1];
      if (from < end) add_rows(sum, slab, order + (from - tile), min(until, end) - from);
      if (until > end) break;
      const int64_t row = clip * clusters + c;
#pragma unroll
      for (int v = 0; v < kMine; ++v) {
        if (sums.normalize) sum.at[v] = sum.total == 0.0f ? 0.0f : sum.at[v] / sum.total;
      }
      if constexpr (WHOLE) {
        if (channel < channels) {
          *reinterpret_cast<Vector<T, kMine>*>(merged + row * channels + channel) =
              from_floats<T>(sum.at);
          if (exact) {
            Vector<float, kMine> unrounded;
            memcpy(&unrounded, sum.at, sizeof(unrounded));
            *reinterpret_cast<Vector<float, kMine>*>(exact + row * channels + channel) = unrounded;
          }
        }
      } else {
#pragma unroll
        for (int v = 0; v < kMine; ++v) {
          if (channel + v >= channels) break;
          merged[row * channels + channel + v] = from_float<T>(sum.at[v]);
          if (exact) exact[row * channels + channel + v] = sum.at[v];
        }
      }
      if (total && first == 0 && lane_id() == 0) total[row] = sum.total;
      sum = {};
    }
    if constexpr (!SORTS) __syncthreads();
    tile = end;
  } while (tile < token_count);
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
    Vector<T, V> gradient = {}, token = {};
    float middle[V] = {}, gradients[V], values[V], out[V];
    if (member) {  // every load before the first use, also of the sum of the weights
      gradient = *reinterpret_cast<const Vector<T, V>*>(d_merged + cluster * channels + channel);
      if (d_weights) {
        token = *reinterpret_cast<const Vector<T, V>*>(tokens + row * channels + channel);
        if (sums.normalize) load_floats<V>(exact + cluster * channels + channel, middle);
      }
    }
    to_floats(gradient, gradients);
    to_floats(token, values);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      out[v] = passes ? factor * gradients[v] : 0.0f;
      dot += gradients[v] * (values[v] - middle[v]);
    }
    if (d_tokens) {
      *reinterpret_cast<Vector<T, V>*>(d_tokens + row * channels + channel) = from_floats<T>(out);
    }
  }
  if (!d_weights) return;
  dot = warp_sum(dot);
  if (lane_id() == 0)
    store_number(d_weights, sums.weight_dtype, row, passes ? dot / divisor : 0.0f);
}

}  // namespace

std::map<std::string, unsigned> clusters_shared() {
  return {{"order_clips", shared_part<int>(kCountThreads)},
          {"sum_kernel", shared_bytes(kWholeTokens, kWholeClusters, true)}};
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
    const int slices = static_cast<int>(ceil_div(shape.channels, kRowBytes / sizeof(T)));
    const auto launch_kernel = [&](auto kernel) {
      launch(name, kernel, shape.clips * slices, kThreads,
             shared_bytes(shape.tokens, shape.clusters, shared), stream,
             static_cast<const T*>(tokens), sums, assignment, static_cast<T*>(merged), total, exact,
             members, starts, shape.tokens, shape.channels, shape.clusters, slices);
    };
    const bool whole = whole_vectors<T>(shape.channels, tokens, merged, exact);
    if (shared) {
      whole ? launch_kernel(sum_kernel<T, true, true>) : launch_kernel(sum_kernel<T, false, true>);
    } else {
      whole ? launch_kernel(sum_kernel<T, true, false>)
            : launch_kernel(sum_kernel<T, false, false>);
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
