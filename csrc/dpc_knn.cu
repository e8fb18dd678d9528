// Density peaks with k nearest neighbours (Eqs. 9 and 10), batched.
//
// Clips of up to kMatrixTokens tokens take three launches: products, densities, and δ with the
// clusters (dpc_knn_short.cuh); or, above kShortTokens and of float32 tokens, center_tokens,
// distance_pass (which keeps the matrix of d², small enough for the L2 cache) and the last one.
// Longer clips: dpc_knn_long.cuh.
#include <algorithm>

#include "dpc_knn_long.cuh"
#include "dpc_knn_short.cuh"

namespace cmpose {
namespace {

constexpr int kCenterThreads = 256;
constexpr int kCenterChannels = 64;  // of a block
constexpr int kCenterAhead = 8;      // tokens loaded at a time
constexpr int kFinishThreads = 512;

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
  T* const cached = shared.take<T>(KEEPS ? count * kCenterChannels : 0);
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
        cp_async_16(cached + row * kCenterChannels + part, from + row * channels + part, true);
      }
      cp_async_commit();
      cp_async_wait<0>();
    } else {
      for (int i = threadIdx.x; i < count * kCenterChannels; i += kCenterThreads) {
        const int64_t row = i / kCenterChannels;
        const int c = i % kCenterChannels;
        cached[i] = c < inside ? from[row * channels + c] : from_float<T>(0.0f);
      }
    }
    __syncthreads();
  }
  const auto load = [&](auto aligned, int i, float(&x)[2]) {
    if constexpr (KEEPS) {
      to_floats(*reinterpret_cast<const Vector<T, 2>*>(cached + i * kCenterChannels + mine), x);
    } else if constexpr (decltype(aligned)::value) {
      Vector<T, 2> pair = {};
      const T* const at = from + int64_t{i} * channels + mine;
      if (mine < inside) pair = *reinterpret_cast<const Vector<T, 2>*>(at);
      to_floats(pair, x);
    } else {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        x[q] = mine + q < inside ? to_float(from[int64_t{i} * channels + mine + q]) : 0.0f;
      }
    }
  };
  // Calls `function` for each of the warp's tokens in turn. Several are loaded before the first is
  // needed, as a trip to memory takes as long as hundreds of instructions; without a condition,
  // else the compiler waits for each.
  const auto go_over = [&](auto aligned, auto function) {
    int i = warp;
    for (; i + (kCenterAhead - 1) * kWarps < count; i += kCenterAhead * kWarps) {
      float x[kCenterAhead][2];
#pragma unroll
      for (int a = 0; a < kCenterAhead; ++a) load(aligned, i + a * kWarps, x[a]);
#pragma unroll
      for (int a = 0; a < kCenterAhead; ++a) function(i + a * kWarps, x[a]);
    }
    for (; i < count; i += kWarps) {
      float x[2];
      load(aligned, i, x);
      function(i, x);
    }
  };
  const auto address = reinterpret_cast<uint64_t>(from) | channels * sizeof(T);
  const auto for_tokens = [&](auto function) {
    if (KEEPS || address % (2 * sizeof(T)) == 0) {
      go_over(std::true_type{}, function);
    } else {
      go_over(std::false_type{}, function);
    }
  };

  {
    float sum[2] = {}, number[2] = {}, low[2] = {INFINITY, INFINITY};
    float high[2] = {-INFINITY, -INFINITY};
    for_tokens([&](int i, const float(&x)[2]) {
      const bool counts = !valid || valid[clip * count + i];
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (!counts || !isfinite(x[q])) continue;
        sum[q] += x[q];
        number[q] += 1.0f;
        low[q] = fminf(low[q], x[q]);
        high[q] = fmaxf(high[q], x[q]);
      }
    });
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
    for_tokens([&](int, const float(&x)[2]) {
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        exact[q] &= !isfinite(x[q]) || shifts_exactly<T>(x[q], shifts[mine + q]);
      }
    });
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
  for_tokens([&](int i, float(&x)[2]) {
#pragma unroll
    for (int q = 0; q < 2; ++q) x[q] = mine + q < inside ? x[q] - shifts[mine + q] : 0.0f;
    store_pieces(x, T{}, pieces + (clip * count + i) * depth + first + mine, piece_size);
  });
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

// How many tokens lie in a group of a longer clip.
int group_tokens(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? PairTile<float>::kSide : PairTile<bf16>::kSide;
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

LongPass lay_out(const DpcKnn& shape, Workspace& workspace) {
  const Clusters& c = shape.clusters;
  const int64_t all = c.clips * c.tokens;
  LongPass pass{};
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
    const int k = shape.neighbors;
    pass.groups = static_cast<int>(ceil_div(c.tokens, group_tokens(c.dtype)));
    pass.norms = workspace.take<float>(all);
    pass.limits = workspace.take<float>(all);
    pass.nearest = workspace.take<uint64_t>(all * k);
    pass.fresh = workspace.take<uint64_t>(all * std::max(kRoles * k, kSearchParts));
    pass.parts = pass.fresh;  // which is read no more by then
    pass.counts = workspace.take<uint8_t>(all * kRoles);
    pass.open = workspace.take<int>(all);
    pass.open_count = workspace.take<int>(c.clips);
    pass.peaks = workspace.take<int>(c.clips);
    pass.center_of = workspace.take<int>(all);
  }
  return pass;
}

template <class T, int ROWS, int COLUMNS>
void run_pass(const DistancePass& pass, int64_t clips, void* stream) {
  const int blocks = static_cast<int>(ceil_div(pass.tokens, ROWS));
  launch("dpc_knn", distance_pass<T, ROWS, COLUMNS>, clips * blocks, kTileThreads,
         Tile<T, ROWS, COLUMNS>::shared_bytes(), stream, pass, blocks);
}

// Small tiles, so that there are many blocks, and the width that leaves the fewest columns empty.
template <class T>
void find_neighbors(const DistancePass& pass, int64_t clips, void* stream) {
  if constexpr (!std::is_same<T, float>::value) {
    if (ceil_div(pass.tokens, 192) * 192 <= ceil_div(pass.tokens, 128) * 128) {
      return run_pass<T, 64, 192>(pass, clips, stream);
    }
  }
  run_pass<T, 64, 128>(pass, clips, stream);
}

constexpr unsigned list_shared(int neighbors) {
  return shared_part<uint64_t>(kListThreads * neighbors);
}
constexpr unsigned open_shared() {
  return shared_part<uint64_t>(kOpenThreads / kWarp) + shared_part<int>(kOpenThreads / kWarp);
}

// Finds δ (or with CENTERS clusters) among the nearest, then by a search for what is left.
template <class T, bool CENTERS>
void find_rest(const LongPass& pass, int64_t clips, void* stream) {
  launch("dpc_knn", find_among_nearest<CENTERS>, clips, kOpenThreads, open_shared(), stream, pass);
  const int64_t items = int64_t{pass.groups} * kSearchParts;
  const int blocks = static_cast<int>(std::min(items, ceil_div(kSearchBlocks, clips)));
  launch("dpc_knn", search_rows<T, CENTERS>, clips * blocks, kPairThreads,
         PairTile<T>::shared_bytes(true), stream, pass, blocks);
  const int settles = static_cast<int>(ceil_div(pass.tokens, kListThreads));
  launch("dpc_knn", settle_rows<CENTERS>, clips * settles, kListThreads, 0, stream, pass, settles);
}

// All of a clip of more than kMatrixTokens tokens, once they are centred.
template <class T>
void cluster_long(const LongPass& pass, int64_t clips, void* stream) {
  const int64_t all = clips * pass.tokens;
  const int apart = pass.groups / 2;
  for (int n = 0; n <= apart; ++n) {
    const int tiles = n > 0 && 2 * n == pass.groups ? n : pass.groups;  // each pair once
    launch("dpc_knn", neighbor_tiles<T>, clips * tiles, kPairThreads,
           PairTile<T>::shared_bytes(false), stream, pass, tiles, n);
    launch("dpc_knn", merge_neighbors, ceil_div(all, kListThreads), kListThreads,
           list_shared(pass.neighbors), stream, pass, all, n == 0, n == apart);
  }
  find_rest<T, false>(pass, clips, stream);
  const int blocks = static_cast<int>(ceil_div(pass.tokens, kRankThreads));
  launch("dpc_knn", rank_centers, clips * blocks, kRankThreads, shared_part<unsigned>(kRankThreads),
         stream, pass, blocks);
  find_rest<T, true>(pass, clips, stream);
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
  LongPass pass = lay_out(shape, parts);
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
        const bool fits = c.tokens <= kShortTokens;
        launch("dpc_knn", fits ? cluster_clip<T, kVector> : finish_clip<T, kVector>,
               c.clips * slices, fits ? kClusterThreads : kFinishThreads,
               fits ? cluster_shared(c.tokens, c.clusters) : finish_shared(c.tokens, c.clusters),
               stream, pass, merge, slices);
      });
      return;
    }
    center<T>(c, pass, tokens, stream);
    cluster_long<T>(pass, c.clips, stream);
  });
}

}  // namespace

std::map<std::string, unsigned> dpc_knn_shared() {
  const unsigned most =
      std::max(Tile<float, 64, 128>::shared_bytes(), Tile<bf16, 64, 192>::shared_bytes());
  const auto pairs = [](bool searches) {
    return std::max(PairTile<float>::shared_bytes(searches),
                    PairTile<bf16>::shared_bytes(searches));
  };
  return {{"center_tokens", center_shared(kCenterKept, 4)},
          {"distance_pass", most},
          {"neighbor_tiles", pairs(false)},
          {"search_rows", pairs(true)},
          {"merge_neighbors", list_shared(kMaxNeighbors)},
          {"find_among_nearest", open_shared()},
          {"rank_centers", shared_part<unsigned>(kRankThreads)},
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
