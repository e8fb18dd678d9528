// Density peaks with k nearest neighbours (Eqs. 9 and 10), batched.
//
// Clips of up to kMatrixTokens tokens take three launches: products, densities, and δ with the
// clusters (dpc_knn_short.cuh); or, above kShortTokens and of float32 tokens, center_tokens,
// distance_pass (which keeps the matrix of d², small enough for the L2 cache) and the last one. For
// longer clips each pass over the tiles computes d² anew, and only O(M · D) memory is used.
#include <algorithm>

#include "dpc_knn_short.cuh"

namespace cmpose {
namespace {

constexpr int kCenterThreads = 256;
constexpr int kCenterChannels = 64;  // of a block
constexpr int kFinishThreads = 512;
constexpr int kRankThreads = 256;

// -- centring -------------------------------------------------------------------------------------

// Stores two neighbouring channels as 16-bit numbers; of float32, as three pieces each.
__device__ __forceinline__ void store_pieces(float (&y)[2], float, uint16_t* to,
                                             int64_t piece_size) {
#pragma unroll
  for (int p = 0; p < 3; ++p) {  // 8 bits each: all 24 of y
    Vector<uint16_t, 2> piece;
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      piece.at[q] = float_to_bf16(y[q]);
      y[q] -= bf16_to_float(piece.at[q]);
    }
    *reinterpret_cast<Vector<uint16_t, 2>*>(to + p * piece_size) = piece;
  }
}
template <class T>
__device__ __forceinline__ void store_pieces(const float (&y)[2], T, uint16_t* to, int64_t) {
  *reinterpret_cast<Vector<uint16_t, 2>*>(to) = {from_float<T>(y[0]).bits,
                                                 from_float<T>(y[1]).bits};
}

// A block shifts 64 channels of a clip; a lane takes two neighbouring ones. A channel of 16-bit
// tokens is shifted only if no token rounds, so that the products of shifted tokens are still
// exact. Where one would round, the channel's spread is as large as its smallest magnitude, so that
// little can cancel. With KEEPS the clip's channels are read once, into shared memory; otherwise
// each of the passes over them reads them again.
template <class T, bool KEEPS>
__global__ void __launch_bounds__(kCenterThreads, 2)
    center_tokens(const T* __restrict__ tokens, const bool* __restrict__ valid,
                  uint16_t* __restrict__ pieces, int64_t piece_size, int count, int channels,
                  int depth) {
  constexpr int kWarps = kCenterThreads / kWarp;
  constexpr int kVector = 16 / sizeof(T), kVectors = kCenterChannels / kVector;
  SharedMemory shared;
  float* const parts = shared.take<float>(4 * kWarps * kCenterChannels);  // of each warp's rows
  float* const shifts = shared.take<float>(kCenterChannels);
  int* const rounds = shared.take<int>(kWarps * kCenterChannels);
  T* const kept = shared.take<T>(KEEPS ? count * kCenterChannels : 0);
  const int blocks = depth / kCenterChannels;
  const int64_t clip = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * kCenterChannels;
  const int warp = warp_id(), mine = 2 * lane_id();
  const T* const from = tokens + clip * count * channels + first;
  const int inside = min(kCenterChannels, channels - first);
  if constexpr (KEEPS) {
    const auto misaligned = reinterpret_cast<uint64_t>(from) | channels * sizeof(T);
    if (inside == kCenterChannels && misaligned % 16 == 0) {
      for (int i = threadIdx.x; i < count * kVectors; i += kCenterThreads) {
        const int64_t row = i / kVectors;
        const int part = i % kVectors * kVector;
        cp_async_16(kept + row * kCenterChannels + part, from + row * channels + part, true);
      }
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      for (int i = threadIdx.x; i < count * kCenterChannels; i += kCenterThreads) {
        const int64_t row = i / kCenterChannels;
        const int c = i % kCenterChannels;
        kept[i] = c < inside ? from[row * channels + c] : from_float<T>(0.0f);
      }
    }
    __syncthreads();
  }
  const auto load = [&](int i, float(&x)[2]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if constexpr (KEEPS) {
        x[q] = to_float(kept[i * kCenterChannels + mine + q]);
      } else {
        x[q] = mine + q < inside ? to_float(from[int64_t{i} * channels + mine + q]) : 0.0f;
      }
    }
  };

  {
    float sum[2] = {}, number[2] = {}, low[2] = {INFINITY, INFINITY};
    float high[2] = {-INFINITY, -INFINITY};
    for (int i = warp; i < count; i += kWarps) {
      float x[2];
      load(i, x);
      const bool counts = !valid || valid[clip * count + i];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (!counts || !isfinite(x[q])) continue;
        sum[q] += x[q];
        number[q] += 1.0f;
        low[q] = fminf(low[q], x[q]);
        high[q] = fmaxf(high[q], x[q]);
      }
    }
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      float* const part = parts + 4 * (warp * kCenterChannels + mine + q);
      part[0] = sum[q], part[1] = number[q], part[2] = low[q], part[3] = high[q];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < kCenterChannels; c += kCenterThreads) {
    float sum = 0.0f, number = 0.0f, low = INFINITY, high = -INFINITY;
    for (int w = 0; w < kWarps; ++w) {
      const float* const part = parts + 4 * (w * kCenterChannels + c);
      sum += part[0];
      number += part[1];
      low = fminf(low, part[2]);
      high = fmaxf(high, part[3]);
    }
    shifts[c] = shift_of(sum, number, low, high);
  }
  __syncthreads();
  if constexpr (!std::is_same<T, float>::value) {
    bool exact[2] = {true, true};
    for (int i = warp; i < count; i += kWarps) {
      float x[2];
      load(i, x);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        exact[q] &= !isfinite(x[q]) || shifts_exactly<T>(x[q], shifts[mine + q]);
      }
    }
    rounds[warp * kCenterChannels + mine] = !exact[0];
    rounds[warp * kCenterChannels + mine + 1] = !exact[1];
    __syncthreads();
    for (int c = threadIdx.x; c < kCenterChannels; c += kCenterThreads) {
      for (int w = 0; w < kWarps; ++w) {
        if (rounds[w * kCenterChannels + c]) shifts[c] = 0.0f;
      }
    }
    __syncthreads();
  }
  for (int i = warp; i < count; i += kWarps) {
    float x[2];
    load(i, x);
#pragma unroll
    for (int q = 0; q < 2; ++q) x[q] = mine + q < inside ? x[q] - shifts[mine + q] : 0.0f;
    store_pieces(x, T{}, pieces + (clip * count + i) * depth + first + mine, piece_size);
  }
}

// -- order ----------------------------------------------------------------------------------------

// Larger: earlier in (log ρ descending, index ascending).
__device__ __forceinline__ uint64_t density_key(float log_density, int i) {
  return static_cast<uint64_t>(ordered(log_density)) << 32 | (0xffffffffu - i);
}

// Larger: earlier as a centre, in (usable, log ρ + log δ descending, index ascending).
__device__ __forceinline__ uint64_t center_key(float log_density, float delta, bool usable, int i) {
  return static_cast<uint64_t>(usable) << 63 |
         static_cast<uint64_t>(ordered(log_density + logf(delta))) << 31 | (0x7fffffffu - i);
}

// A thread finds one token's rank, by counting the tokens before it: the rank as a centre
// (CENTERS), or the rank by density.
template <bool CENTERS>
__global__ void __launch_bounds__(kRankThreads) rank_tokens(DistancePass pass, int blocks_a_clip) {
  SharedMemory shared;
  uint64_t* const tile = shared.take<uint64_t>(kRankThreads);
  const int64_t clip = blockIdx.x / blocks_a_clip, base = clip * pass.tokens;
  const int i =
      static_cast<int>(blockIdx.x % blocks_a_clip) * kRankThreads + static_cast<int>(threadIdx.x);
  const auto key = [&](int j) {
    const float log_density = pass.log_density[base + j];
    return CENTERS ? center_key(log_density, pass.delta[base + j], pass.usable[base + j], j)
                   : density_key(log_density, j);
  };
  const uint64_t mine = i < pass.tokens ? key(i) : 0;
  int rank = 0;
  for (int from = 0; from < pass.tokens; from += kRankThreads) {
    const int token = from + static_cast<int>(threadIdx.x);
    if (token < pass.tokens) tile[threadIdx.x] = key(token);
    __syncthreads();
    const int count = min(kRankThreads, pass.tokens - from);
    for (int j = 0; j < count; ++j) rank += tile[j] > mine;
    __syncthreads();
  }
  if (i >= pass.tokens) return;
  if constexpr (CENTERS) {
    pass.center_of[base + i] = rank < pass.clusters ? rank : -1;
    if (rank < pass.clusters) pass.centers[clip * pass.clusters + rank] = i;
  } else {
    pass.order[base + rank] = i;
  }
}

// -- the last launch for clips whose distances are kept -------------------------------------------

// δ, centres and assignment of a clip, from its matrix of d². Every block of a clip computes all of
// them, and merges its own 32 · V channels.
template <class T, int V>
__global__ void __launch_bounds__(kFinishThreads, 1)
    finish_clip(DistancePass pass, Merge merge, int slices) {
  SharedMemory shared;
  const int count = pass.tokens;
  uint64_t* const density_keys = shared.take<uint64_t>(count);
  uint64_t* const center_keys = shared.take<uint64_t>(count);
  int* const center_of = shared.take<int>(count);
  unsigned* const keys = shared.take<unsigned>(count);
  unsigned* const sorted = shared.take<unsigned>(count);
  int* const starts = shared.take<int>(pass.clusters + 1);
  int* const centers = shared.take<int>(pass.clusters);
  bool* const usable = shared.take<bool>(count);
  const int64_t clip = blockIdx.x / slices, base = clip * count;
  const int slice = static_cast<int>(blockIdx.x % slices);
  const float* const matrix = pass.matrix + base * count;
  const bool writes = slice == 0;

  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    density_keys[i] = density_key(pass.log_density[base + i], i);
    usable[i] = pass.usable[base + i];
  }
  __syncthreads();
  for (int i = warp_id(); i < count; i += kFinishThreads / kWarp) {
    const float* const row = matrix + int64_t{i} * count;
    const uint64_t mine = density_keys[i];
    float square = INFINITY;
    bool earlier = false;
    for (int from = lane_id(); from < count; from += 4 * kWarp) {
      float values[4];
      // The loads do not wait for each other nor for the conditions: hence & below, not &&.
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int j = from + u * kWarp;
        values[u] = j < count ? row[j] : INFINITY;
      }
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int j = min(from + u * kWarp, count - 1);
        const bool before = (from + u * kWarp < count) & (density_keys[j] > mine);
        earlier |= before;
        square = fminf(square, before & usable[j] ? values[u] : INFINITY);
      }
    }
    square = lowest_of_warp(square);
    if (!__ballot_sync(kAllLanes, earlier)) square = peak_square(pass, clip, i);
    if (lane_id() != 0) continue;
    const float delta = usable[i] ? sqrtf(square / pass.unit) : 0.0f;
    if (writes) pass.delta[base + i] = delta;
    center_keys[i] = center_key(pass.log_density[base + i], delta, usable[i], i);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kFinishThreads) {
    const uint64_t mine = center_keys[i];
    int rank = 0;
    for (int j = 0; j < count; ++j) rank += center_keys[j] > mine;
    center_of[i] = rank < pass.clusters ? rank : -1;
    if (rank < pass.clusters) centers[rank] = i;
  }
  __syncthreads();
  label_tokens(pass, clip, writes, centers, center_of, usable, keys);
  if (!merge.sums.weights) return;
  sort_by_cluster(keys, count, pass.clusters, sorted, starts);
  merge_slice<T, V>(merge, clip, count, pass.clusters, slice, sorted, starts);
}

unsigned finish_shared(int tokens, int clusters) {
  return 2 * shared_part<uint64_t>(tokens) + 3 * shared_part<int>(tokens) +
         shared_part<int>(clusters + 1) + shared_part<int>(clusters) + shared_part<bool>(tokens);
}

// Shared memory of center_tokens if it keeps `kept` tokens of a type of `bytes` bytes.
constexpr unsigned center_shared(int kept, int bytes) {
  return shared_part<float>(4 * kCenterThreads / kWarp * kCenterChannels) +
         shared_part<float>(kCenterChannels) +
         shared_part<int>(kCenterThreads / kWarp * kCenterChannels) +
         shared_part<char>(kept * bytes * kCenterChannels);
}

// It keeps at most so many tokens of 4 bytes, or twice as many of 2 bytes: two blocks then fit an
// SM.
constexpr int kCenterKept = 128;

// -- host -----------------------------------------------------------------------------------------

bool forms_triangle(const DpcKnn& shape) {
  return shape.clusters.tokens <= kShortTokens && shape.clusters.dtype != Dtype::kFloat32;
}

bool keeps_matrix(const DpcKnn& shape) { return shape.clusters.tokens <= kMatrixTokens; }

int depth_of(const DpcKnn& shape) {
  const int64_t channels = std::max(shape.clusters.channels, 1);
  return static_cast<int>(ceil_div(channels, kDepthMultiple)) * kDepthMultiple;
}

// Hands out 256-byte aligned parts of the workspace. With a null base it only measures the size.
struct Workspace {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* const part = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return part;
  }
};

DistancePass lay_out(const DpcKnn& shape, Workspace& workspace) {
  const Clusters& c = shape.clusters;
  const int64_t all = c.clips * c.tokens;
  DistancePass pass{};
  pass.tokens = c.tokens;
  pass.depth = depth_of(shape);
  pass.neighbors = shape.neighbors;
  pass.clusters = c.clusters;
  pass.unit = shape.scale ? static_cast<float>(std::max(c.channels, 1)) : 1.0f;
  pass.include_self = shape.include_self;
  pass.global_max = shape.global_max;
  if (forms_triangle(shape)) {
    pass.products = workspace.take<float>(c.clips * gram_slices(c.channels) *
                                          int64_t{tiles_of(c.tokens)} * kTile);
  } else {
    pass.piece_size = all * pass.depth;
    const bool split = c.dtype == Dtype::kFloat32;
    pass.piece_count = !split ? 1 : shape.tf32 ? 2 : 3;
    pass.pieces = workspace.take<uint16_t>(pass.piece_size * (split ? 3 : 1));
  }
  pass.usable = workspace.take<bool>(all);
  pass.farthest = workspace.take<float>(all);
  if (keeps_matrix(shape)) {
    pass.matrix = workspace.take<float>(all * c.tokens);
  } else {
    pass.norms = workspace.take<float>(all);
    pass.order = workspace.take<int>(all);
    pass.center_of = workspace.take<int>(all);
  }
  return pass;
}

template <class T, int ROWS, int COLUMNS, Stage STAGE>
void run_pass(const DistancePass& pass, int64_t clips, void* stream) {
  using Shape = Tile<T, ROWS, COLUMNS>;
  const int tokens_a_block = STAGE == Stage::kNorms ? COLUMNS : ROWS;
  const int blocks = static_cast<int>(ceil_div(pass.tokens, tokens_a_block));
  launch("dpc_knn", distance_pass<T, ROWS, COLUMNS, STAGE>, clips * blocks, kTileThreads,
         Shape::shared_bytes(), stream, pass, blocks);
}

// The rows of a tile for clips beyond kMatrixTokens: many, because each loaded number then serves
// more products. Float32's three pieces and three sums leave no room for as many.
template <class T>
constexpr int kStreamRows = std::is_same<T, float>::value ? 64 : 128;

// For clips whose d² are kept: small tiles, so that there are many blocks, and the width that
// leaves the fewest columns empty.
template <class T>
void find_neighbors(const DistancePass& pass, int64_t clips, void* stream) {
  if constexpr (!std::is_same<T, float>::value) {
    if (ceil_div(pass.tokens, 192) * 192 <= ceil_div(pass.tokens, 128) * 128) {
      return run_pass<T, 64, 192, Stage::kNeighbors>(pass, clips, stream);
    }
  }
  run_pass<T, 64, 128, Stage::kNeighbors>(pass, clips, stream);
}

// Calls `last` with the last launch's vector width and how many blocks share a clip.
template <class T, class F>
void with_slices(const Clusters& shape, const void* tokens, const Merge& merge, F last) {
  const auto slices = [&](int vector) {
    return merge.sums.weights ? slices_of(shape.channels, vector) : 1;
  };
  constexpr int kVector = 16 / sizeof(T);
  whole_vectors<T>(shape.channels, tokens, merge.merged, merge.exact)
      ? last(std::integral_constant<int, kVector>{}, slices(kVector))
      : last(std::integral_constant<int, 1>{}, slices(1));
}

// d² and densities of clips whose products are formed once a pair.
template <class T>
void find_short_neighbors(const Clusters& shape, const DistancePass& pass, const void* tokens,
                          void* stream) {
  const int slices = gram_slices(shape.channels);
  launch("dpc_knn",
         whole_vectors<T>(shape.channels, tokens) ? gram_clip<T, true> : gram_clip<T, false>,
         shape.clips * slices, kGramThreads, gram_shared(shape.tokens), stream,
         static_cast<const T*>(tokens), pass.valid, pass.products, shape.tokens, shape.channels,
         slices);
  launch("dpc_knn", density_rows, shape.clips * sides_of(shape.tokens), kDensityThreads,
         density_shared(shape.tokens), stream, pass, slices);
}

// Centres the tokens of clips, as 16-bit numbers.
template <class T>
void center(const Clusters& shape, const DistancePass& pass, const void* tokens, void* stream) {
  const bool keeps = shape.tokens * sizeof(T) <= kCenterKept * sizeof(float);
  launch("dpc_knn", keeps ? center_tokens<T, true> : center_tokens<T, false>,
         shape.clips * (pass.depth / kCenterChannels), kCenterThreads,
         center_shared(keeps ? shape.tokens : 0, sizeof(T)), stream, static_cast<const T*>(tokens),
         pass.valid, const_cast<uint16_t*>(pass.pieces), pass.piece_size, shape.tokens,
         shape.channels, pass.depth);
}

void cluster(const DpcKnn& shape, const void* tokens, const bool* valid, float* log_density,
             float* delta, int64_t* centers, int64_t* assignment, const Merge& merge,
             void* workspace, void* stream) {
  const Clusters& c = shape.clusters;
  Workspace parts{static_cast<char*>(workspace)};
  DistancePass pass = lay_out(shape, parts);
  pass.valid = valid;
  pass.log_density = log_density;
  pass.delta = delta;
  pass.centers = centers;
  pass.assignment = assignment;
  with_type(c.dtype, [&](auto number) {
    using T = decltype(number);
    if (keeps_matrix(shape)) {
      if (forms_triangle(shape)) {
        if constexpr (!std::is_same<T, float>::value) {
          find_short_neighbors<T>(c, pass, tokens, stream);
        }
      } else {
        center<T>(c, pass, tokens, stream);
        find_neighbors<T>(pass, c.clips, stream);
      }
      with_slices<T>(c, tokens, merge, [&](auto vector, int slices) {
        constexpr int kVector = decltype(vector)::value;
        const bool held = c.tokens <= kShortTokens;
        launch("dpc_knn", held ? cluster_clip<T, kVector> : finish_clip<T, kVector>,
               c.clips * slices, held ? kClusterThreads : kFinishThreads,
               held ? cluster_shared(c.tokens, c.clusters) : finish_shared(c.tokens, c.clusters),
               stream, pass, merge, slices);
      });
      return;
    }
    center<T>(c, pass, tokens, stream);
    constexpr int kRows = kStreamRows<T>;
    run_pass<T, kRows, 128, Stage::kNorms>(pass, c.clips, stream);
    run_pass<T, kRows, 128, Stage::kNeighbors>(pass, c.clips, stream);
    const int blocks = static_cast<int>(ceil_div(c.tokens, kRankThreads));
    const unsigned bytes = shared_part<uint64_t>(kRankThreads);
    launch("dpc_knn", rank_tokens<false>, c.clips * blocks, kRankThreads, bytes, stream, pass,
           blocks);
    run_pass<T, kRows, 128, Stage::kDelta>(pass, c.clips, stream);
    launch("dpc_knn", rank_tokens<true>, c.clips * blocks, kRankThreads, bytes, stream, pass,
           blocks);
    run_pass<T, kRows, 128, Stage::kAssign>(pass, c.clips, stream);
  });
}

}  // namespace

std::map<std::string, unsigned> dpc_knn_shared() {
  const unsigned most =
      std::max({Tile<float, 64, 128>::shared_bytes(), Tile<bf16, 64, 192>::shared_bytes(),
                Tile<bf16, 128, 128>::shared_bytes()});
  return {{"center_tokens", center_shared(kCenterKept, 4)},
          {"distance_pass", most},
          {"rank_tokens", shared_part<uint64_t>(kRankThreads)},
          {"finish_clip", finish_shared(kMatrixTokens, kMatrixTokens)},
          {"gram_clip", gram_shared(kShortTokens)},
          {"density_rows", density_shared(kShortTokens)},
          {"cluster_clip", cluster_shared(kShortTokens, kShortTokens)}};
}

int64_t dpc_knn_workspace(const DpcKnn& shape) {
  Workspace parts{nullptr};
  lay_out(shape, parts);
  return parts.used;
}

void dpc_knn(const DpcKnn& shape, const void* tokens, const bool* valid, float* log_density,
             float* delta, int64_t* centers, int64_t* assignment, void* workspace, void* stream) {
  cluster(shape, tokens, valid, log_density, delta, centers, assignment, Merge{}, workspace,
          stream);
}

void dpc_knn_merge(const DpcKnn& shape, const void* tokens, const bool* valid, float* log_density,
                   float* delta, int64_t* centers, int64_t* assignment, Dtype weight_dtype,
                   bool normalize, const void* weights, void* merged, float* total, float* exact,
                   void* workspace, void* stream) {
  if (!keeps_matrix(shape)) {
    throw std::invalid_argument("dpc_knn_merge takes up to " + std::to_string(kMatrixTokens) +
                                " tokens, got " + std::to_string(shape.clusters.tokens));
  }
  const ClusterSums sums{weights, weight_dtype, normalize, nullptr, shape.clusters.tokens};
  const Merge merge{sums, tokens, merged, total, exact, shape.clusters.channels};
  cluster(shape, tokens, valid, log_density, delta, centers, assignment, merge, workspace, stream);
}

}  // namespace cmpose
