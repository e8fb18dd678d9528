// Clips of more than kMatrixTokens tokens: only O(M · (D + k)) memory is used.
//
// A clip's pairs lie in square tiles, and each pair is formed once. The tile of token groups (i, i
// + n), counted modulo the number of groups, serves its rows and its columns; a launch takes one n,
// so that a group is the rows of at most one of its tiles and the columns of at most one. A pair's
// d² is compared in registers with the k-th smallest so far of both tokens, and hardly any is
// stored. Between two such launches merge_neighbors brings down those limits.
//
// A token's δ and its cluster are mostly found among its k nearest. Where they are not, search_rows
// forms the pairs of the remaining tokens once more.
#pragma once

#include <algorithm>

#include "dpc_knn.cuh"

namespace cmpose {

constexpr int kPairThreads = 128;  // 4 warps: 2 halves of the rows times 2 of the columns
constexpr int kPairWarps = kPairThreads / kWarp;
constexpr int kListThreads = 128;
constexpr int kOpenThreads = 1024;  // as many warps as a warp has lanes
constexpr int kRankThreads = 256;
constexpr int kSearchBlocks = 1024;  // that share the searches of all clips

// A token beside its d² to another: smaller is nearer.
constexpr uint64_t kNoNeighbor = ~uint64_t{0};
__device__ __forceinline__ uint64_t neighbor_key(float square, int token) {
  return static_cast<uint64_t>(__float_as_uint(square)) << 32 | static_cast<unsigned>(token);
}
__device__ __forceinline__ float key_square(uint64_t key) {
  return key == kNoNeighbor ? INFINITY : __uint_as_float(static_cast<unsigned>(key >> 32));
}
__device__ __forceinline__ int key_neighbor(uint64_t key) { return static_cast<int>(key); }

// A square tile of pairs. Float32's three pieces and three sums leave room for fewer of them.
template <class T>
struct PairTile {
  static constexpr bool kSplit = std::is_same<T, float>::value;
  static constexpr bool kBF16 = !std::is_same<T, fp16>::value;
  static constexpr int kPieces = kSplit ? 3 : 1;
  static constexpr int kSide = kSplit ? 64 : 128;  // tokens of a group
  static constexpr int kLines = 2 * kSide;         // the rows, then the columns
  static constexpr int kDepth = kSplit ? 16 : 32;  // channels of a slab
  static constexpr int kPitch = kDepth + 8;        // 8 rows in turn lie in different banks
  static constexpr int kSlab = kPieces * kLines * kPitch;
  static constexpr int kOfWarp = kSide / 2;
  static constexpr int kHigh = kOfWarp / 16, kWide = kOfWarp / 8;  // products of 16 × 8

  // Of neighbor_tiles, or of search_rows.
  static constexpr unsigned shared_bytes(bool searches) {
    return shared_part<uint16_t>(2 * kSlab) + (searches ? 4 : 2) * shared_part<float>(kLines) +
           (searches ? shared_part<uint64_t>(kLines) : 0);
  }
};

// A warp's part of a tile, in registers.
template <class T>
struct WarpPairs {
  using Tile = PairTile<T>;
  int row = warp_id() % 2 * Tile::kOfWarp, column = warp_id() / 2 * Tile::kOfWarp;  // its first
  float square[Tile::kHigh][Tile::kWide][4];  // products, then d²

  // The lane's 2 · kHigh rows, and 2 · kWide columns.
  __device__ __forceinline__ int row_at(int n) const { return row + n * 8 + lane_id() / 4; }
  __device__ __forceinline__ int column_at(int n) const {
    return column + n / 2 * 8 + lane_id() % 4 * 2 + n % 2;
  }
  __device__ __forceinline__ float& at(int r, int c) {
    return square[r / 2][c / 2][r % 2 * 2 + c % 2];
  }

  // Forms the products. token_of(line) is the token of a row or column of the tile, or −1. Before a
  // block's next call there must be a barrier.
  template <class F>
  __device__ __forceinline__ void multiply(const LongPass& pass, int64_t clip, uint16_t* slabs,
                                           F token_of) {
    constexpr int kParts = Tile::kDepth / 8, kStep = kPairThreads / kParts;
    constexpr int kEach = Tile::kLines / kStep;  // lines that a thread copies 16 bytes of
    const int part = static_cast<int>(threadIdx.x) % kParts * 8;
    const int first = static_cast<int>(threadIdx.x) / kParts;
    const uint16_t* from[kEach];
    unsigned present = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int token = token_of(first + i * kStep);
      present |= static_cast<unsigned>(token >= 0) << i;
      from[i] = pass.pieces + (clip * pass.tokens + max(token, 0)) * pass.depth + part;
    }
    const auto load = [&](int slab) {
      uint16_t* const to = slabs + slab % 2 * Tile::kSlab + first * Tile::kPitch + part;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int p = 0; p < Tile::kPieces; ++p) {
          if (p > 0 && p >= pass.piece_count) continue;
          cp_async_16(to + (p * Tile::kLines + i * kStep) * Tile::kPitch,
                      from[i] + p * pass.piece_size, present >> i & 1);
        }
        from[i] += Tile::kDepth;
      }
    };
    Sums<Tile::kSplit> sums[Tile::kHigh][Tile::kWide];
    const int slabs_of_all = pass.depth / Tile::kDepth;
    load(0);
    cp_async_commit();
    for (int s = 0; s < slabs_of_all; ++s) {
      cp_async_wait<0>();
      __syncthreads();  // the slab is there, and nobody reads the one before
      if (s + 1 < slabs_of_all) load(s + 1);
      cp_async_commit();
      const uint16_t* const slab = slabs + s % 2 * Tile::kSlab;
#pragma unroll
      for (int channel = 0; channel < Tile::kDepth; channel += 16) {
        uint32_t a[Tile::kHigh][Tile::kPieces][4], b[Tile::kPieces][4];
#pragma unroll
        for (int high = 0; high < Tile::kHigh; ++high) {
          load_left<Tile>(a[high], slab, row + high * 16, channel, pass.piece_count);
        }
#pragma unroll
        for (int wide = 0; wide < Tile::kWide; wide += 2) {
          load_right<Tile>(b, slab, Tile::kSide + column + wide * 8, channel, pass.piece_count);
#pragma unroll
          for (int high = 0; high < Tile::kHigh; ++high) {
            cmpose::multiply<Tile>(sums[high][wide], a[high], b, 0, pass.piece_count);
            cmpose::multiply<Tile>(sums[high][wide + 1], a[high], b, 1, pass.piece_count);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2 * Tile::kHigh; ++r) {
#pragma unroll
      for (int c = 0; c < 2 * Tile::kWide; ++c) {
        at(r, c) = sums[r / 2][c / 2].total(r % 2 * 2 + c % 2);
      }
    }
  }

  // Makes d² of the products: infinite or NaN where a norm is infinite, and at times a little less
  // than 0.
  __device__ __forceinline__ void subtract(const float* norms) {
    float x[2 * Tile::kHigh];
#pragma unroll
    for (int r = 0; r < 2 * Tile::kHigh; ++r) x[r] = norms[row_at(r)];
#pragma unroll
    for (int c = 0; c < 2 * Tile::kWide; ++c) {
      const float y = norms[Tile::kSide + column_at(c)];
#pragma unroll
      for (int r = 0; r < 2 * Tile::kHigh; ++r) at(r, c) = (x[r] + y) - 2.0f * at(r, c);
    }
  }
};

// -- neighbours -----------------------------------------------------------------------------------

constexpr int kRoles = 4;  // a token's neighbours come from two warps by rows and two by columns

// The lanes of `peers`, which differ in bits FROM … TO / 2, hold d² of one token to others. Those
// below `limit`, at most k of them, go to `list`, smallest first, and their number to `count`.
template <int FROM, int TO, int N, class F>
__device__ __forceinline__ void keep_lowest(float (&values)[N], float limit, int k, unsigned peers,
                                            uint64_t* list, uint8_t* count, F token_of) {
  const auto lowest = [&] {
    float low = values[0];
#pragma unroll
    for (int q = 1; q < N; ++q) low = fminf(low, values[q]);
    return low;
  };
  float mine = lowest();
  if (!__ballot_sync(kAllLanes, mine < limit)) return;
  int length = 0;
  do {
    float low = mine;
#pragma unroll
    for (int bits = FROM; bits < TO; bits *= 2) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, bits));
    }
    const bool takes = low < limit && length < k;
    const unsigned with = __ballot_sync(kAllLanes, takes && mine == low) & peers;
    const bool owns = takes & (lane_id() == __ffs(static_cast<int>(with)) - 1);
    int taken = -1;  // the first of equal values
#pragma unroll
    for (int q = N - 1; q >= 0; --q) taken = owns & (values[q] == low) ? q : taken;
    if (owns) list[length] = neighbor_key(fmaxf(low, 0.0f), token_of(taken));
#pragma unroll
    for (int q = 0; q < N; ++q) values[q] = q == taken ? INFINITY : values[q];
    length += takes;
    mine = lowest();
  } while (__ballot_sync(kAllLanes, mine < limit && length < k));
  if (length > 0 && lane_id() == __ffs(static_cast<int>(peers)) - 1) {
    *count = static_cast<uint8_t>(length);
  }
}

// The first of the launches, in which a tile's rows are its columns: its diagonal has the norms.
template <class T>
__device__ __forceinline__ void find_norms(const LongPass& pass, WarpPairs<T>& pairs, int64_t base,
                                           int first, float* norms) {
  using Tile = PairTile<T>;
  if (pairs.row == pairs.column && lane_id() / 8 == lane_id() % 4) {
#pragma unroll
    for (int r = 0; r < 2 * Tile::kHigh; ++r) {
      const int line = pairs.row_at(r), token = first + line;
      const float norm = lane_id() / 4 % 2 ? pairs.at(r, 2 * r + 1) : pairs.at(r, 2 * r);
      const bool there = token < pass.tokens;
      const bool usable = there && is_sound(norm) && (!pass.valid || pass.valid[base + token]);
      norms[line] = norms[Tile::kSide + line] = usable ? norm : INFINITY;
      if (!there) continue;
      pass.norms[base + token] = norm;
      pass.usable[base + token] = usable;
      for (int role = 0; role < kRoles; ++role) pass.counts[(base + token) * kRoles + role] = 0;
    }
  }
  __syncthreads();
}

// Tiles of groups (i, i + apart), with each token's neighbours among them.
template <class T>
__global__ void __launch_bounds__(kPairThreads, 2)
    neighbor_tiles(LongPass pass, int tiles, int apart) {
  using Tile = PairTile<T>;
  SharedMemory shared;
  float* const norms = shared.take<float>(Tile::kLines);
  float* const limits = shared.take<float>(Tile::kLines);
  uint16_t* const slabs = shared.take<uint16_t>(2 * Tile::kSlab);
  const int64_t clip = blockIdx.x / tiles, base = clip * pass.tokens;
  const int group = static_cast<int>(blockIdx.x % tiles);
  const int first_row = group * Tile::kSide,
            first_column = (group + apart) % pass.groups * Tile::kSide;
  const auto token_of = [&](int line) {
    const int token = line < Tile::kSide ? first_row + line : first_column + line - Tile::kSide;
    return token < pass.tokens ? token : -1;
  };
  for (int line = threadIdx.x; line < Tile::kLines; line += kPairThreads) {
    const int token = token_of(line);
    const float limit = apart == 0 ? INFINITY : token < 0 ? -INFINITY : pass.limits[base + token];
    limits[line] = limit;  // −∞ of a token that is not usable
    norms[line] = apart == 0 || limit == -INFINITY ? INFINITY : pass.norms[base + token];
  }
  WarpPairs<T> pairs;
  pairs.multiply(pass, clip, slabs, token_of);
  if (apart == 0) find_norms(pass, pairs, base, first_row, norms);
  pairs.subtract(norms);

  const int lane = lane_id(), k = pass.neighbors;
  if (pass.global_max) {
    float far = 0.0f;
#pragma unroll
    for (int r = 0; r < 2 * Tile::kHigh; ++r) {
#pragma unroll
      for (int c = 0; c < 2 * Tile::kWide; ++c) {
        far = pairs.at(r, c) < INFINITY ? fmaxf(far, pairs.at(r, c)) : far;
      }
    }
    far = warp_max(far);
    float* const farthest = pass.farthest + base + group * kPairWarps + warp_id();
    if (lane == 0) *farthest = apart == 0 ? far : fmaxf(*farthest, far);
  }
#pragma unroll
  for (int r = 0; r < 2 * Tile::kHigh; ++r) {
    const int line = pairs.row_at(r);
    const int64_t at = (base + first_row + line) * kRoles + pairs.column / Tile::kOfWarp;
    float values[2 * Tile::kWide];
#pragma unroll
    for (int c = 0; c < 2 * Tile::kWide; ++c) {
      const bool itself = apart == 0 && line == pairs.column_at(c);
      values[c] = itself && !pass.include_self ? INFINITY : pairs.at(r, c);
    }
    keep_lowest<1, 4>(values, limits[line], k, 0xfu << lane / 4 * 4, pass.fresh + at * k,
                      pass.counts + at, [&](int c) { return first_column + pairs.column_at(c); });
  }
  if (apart == 0) return;  // both tokens of a pair were rows
#pragma unroll
  for (int c = 0; c < 2 * Tile::kWide; ++c) {
    const int line = pairs.column_at(c);
    const int64_t at = (base + first_column + line) * kRoles + 2 + pairs.row / Tile::kOfWarp;
    float values[2 * Tile::kHigh];
#pragma unroll
    for (int r = 0; r < 2 * Tile::kHigh; ++r) values[r] = pairs.at(r, c);
    keep_lowest<4, 32>(values, limits[Tile::kSide + line], k, 0x11111111u << lane % 4,
                       pass.fresh + at * k, pass.counts + at,
                       [&](int r) { return first_row + pairs.row_at(r); });
  }
}

// A thread adds what the last tiles found to a token's k nearest, and so brings down its limit;
// after the last tiles it finds the density: log ρ = −(mean of the k smallest d²), added in
// ascending order as in the reference.
__global__ void __launch_bounds__(kListThreads)
    merge_neighbors(LongPass pass, int64_t all, bool first, bool last) {
  SharedMemory shared;
  const int k = pass.neighbors;
  uint64_t* const mine = shared.take<uint64_t>(kListThreads * k) + threadIdx.x;
  const int64_t token = int64_t{blockIdx.x} * kListThreads + threadIdx.x;
  if (token >= all) return;
  const auto near = [&](int n) -> uint64_t& { return mine[n * kListThreads]; };
  using Counts = Vector<uint8_t, kRoles>;
  auto* const counts = reinterpret_cast<Counts*>(pass.counts) + token;
  const Counts lengths = *counts;
  const bool any = lengths.at[0] || lengths.at[1] || lengths.at[2] || lengths.at[3];
  if (any || first || last) {
    for (int n = 0; n < k; ++n) near(n) = first ? kNoNeighbor : pass.nearest[token * k + n];
  }
  if (any) {
    for (int role = 0; role < kRoles; ++role) {
      const uint64_t* const list = pass.fresh + (token * kRoles + role) * k;
      for (int n = 0; n < lengths.at[role]; ++n) {
        const uint64_t key = list[n];
        if (key >= near(k - 1)) continue;
        int to = k - 1;
        for (; to > 0 && near(to - 1) > key; --to) near(to) = near(to - 1);
        near(to) = key;
      }
    }
    *counts = Counts{};
  }
  if (any || first) {
    for (int n = 0; n < k; ++n) pass.nearest[token * k + n] = near(n);
    pass.limits[token] = pass.usable[token] ? key_square(near(k - 1)) : -INFINITY;
  }
  if (!last) return;
  float sum = 0.0f;
  int count = 0;
  for (; count < k && near(count) != kNoNeighbor; ++count) sum += key_square(near(count));
  const float mean = sum / (static_cast<float>(max(count, 1)) * pass.unit);
  pass.log_density[token] = pass.usable[token] ? 0.0f - mean : -INFINITY;
}

// -- what is not among the nearest ----------------------------------------------------------------

constexpr int kSearchParts = 8;  // blocks share a search's columns

// Whether token j, of log density `theirs`, comes before token i.
__device__ __forceinline__ bool is_earlier(float theirs, int j, float mine, int i) {
  return theirs > mine || (theirs == mine && j < i);
}

// Finds δ of a token among its k nearest. All that are nearer than the last of them are there.
__device__ __forceinline__ bool find_delta(const LongPass& pass, int64_t base, int token,
                                           int peak) {
  float* const delta = pass.delta + base + token;
  if (!pass.usable[base + token]) {
    *delta = 0.0f;
    return true;
  }
  if (token == peak) {
    if (!pass.global_max) return false;
    float far = 0.0f;
    for (int i = 0; i < pass.groups * kPairWarps; ++i) far = fmaxf(far, pass.farthest[base + i]);
    *delta = sqrtf(far / pass.unit);
    return true;
  }
  const float mine = pass.log_density[base + token];
  for (int n = 0; n < pass.neighbors; ++n) {
    const uint64_t key = pass.nearest[(base + token) * pass.neighbors + n];
    if (key == kNoNeighbor) break;
    const int j = key_neighbor(key);
    if (!is_earlier(pass.log_density[base + j], j, mine, token)) continue;
    *delta = sqrtf(key_square(key) / pass.unit);
    return true;
  }
  return false;
}

// Likewise its cluster, that of the nearest centre, of equally near ones of the first. A centre as
// far away as the last of the k nearest may have an equal that is not among them.
__device__ __forceinline__ bool find_cluster(const LongPass& pass, int64_t base, int token) {
  const int own = pass.center_of[base + token];
  const bool usable = pass.usable[base + token];
  int64_t* const cluster = pass.assignment + base + token;
  if ((own >= 0 && usable) || !is_sound(pass.norms[base + token])) {
    *cluster = own >= 0 && usable ? own : 0;
    return true;
  }
  if (!usable) return false;
  const uint64_t* const list = pass.nearest + (base + token) * pass.neighbors;
  const float limit = key_square(list[pass.neighbors - 1]);
  uint64_t best = kNoNeighbor;
  for (int n = 0; n < pass.neighbors && key_square(list[n]) < limit; ++n) {
    const int center = pass.center_of[base + key_neighbor(list[n])];
    if (center >= 0) best = min(best, neighbor_key(key_square(list[n]), center));
  }
  if (best != kNoNeighbor) *cluster = key_neighbor(best);
  return best != kNoNeighbor;
}

// The first of a clip's tokens in the order of density.
__device__ __forceinline__ int find_peak(const LongPass& pass, int64_t base, uint64_t* parts) {
  uint64_t best = 0;
  for (int i = threadIdx.x; i < pass.tokens; i += kOpenThreads) {
    best = max(best, static_cast<uint64_t>(ordered(pass.log_density[base + i])) << 32 |
                         (0xffffffffu - static_cast<unsigned>(i)));
  }
  const auto largest = [&] {
    for (int bits = 16; bits > 0; bits /= 2) {
      best = max(best, __shfl_xor_sync(kAllLanes, best, bits));
    }
  };
  largest();
  if (lane_id() == 0) parts[warp_id()] = best;
  __syncthreads();
  best = parts[lane_id()];
  largest();
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

// A block finds δ (or with CENTERS clusters) of a clip's tokens among their nearest, and lists the
// others.
template <bool CENTERS>
__global__ void __launch_bounds__(kOpenThreads) find_among_nearest(LongPass pass) {
  SharedMemory shared;
  uint64_t* const parts = shared.take<uint64_t>(kOpenThreads / kWarp);
  int* const counts = shared.take<int>(kOpenThreads / kWarp);
  const int64_t clip = blockIdx.x, base = clip * pass.tokens;
  const int peak = CENTERS ? 0 : find_peak(pass, base, parts);
  int before = 0;
  for (int from = 0; from < pass.tokens; from += kOpenThreads) {
    const int token = from + static_cast<int>(threadIdx.x);
    bool open = token < pass.tokens;
    if (open) {
      open = CENTERS ? !find_cluster(pass, base, token) : !find_delta(pass, base, token, peak);
    }
    const unsigned with = __ballot_sync(kAllLanes, open);
    if (lane_id() == 0) counts[warp_id()] = __popc(with);
    __syncthreads();
    const auto of_warp = static_cast<unsigned>(counts[lane_id()]);
    const unsigned earlier = __reduce_add_sync(kAllLanes, lane_id() < warp_id() ? of_warp : 0u) +
                             static_cast<unsigned>(__popc(with & ((1u << lane_id()) - 1)));
    const int to = before + static_cast<int>(earlier);
    before += static_cast<int>(__reduce_add_sync(kAllLanes, of_warp));
    if (open) pass.open[base + to] = token;
    if (!CENTERS && token == peak) pass.peaks[clip] = open ? to : -1;
    __syncthreads();
  }
  if (threadIdx.x == 0) pass.open_count[clip] = before;
}

// Of a row of pairs the smallest d² to what comes before it (or with CENTERS to a centre), beside
// the column; and the largest.
template <class T, bool CENTERS>
__device__ __forceinline__ void search_tile(WarpPairs<T>& pairs, const float* log_density,
                                            const int* ids, int first_column, bool has_peak,
                                            uint64_t* best, float* farthest) {
  using Tile = PairTile<T>;
#pragma unroll
  for (int r = 0; r < 2 * Tile::kHigh; ++r) {
    const int line = pairs.row_at(r);
    float low = INFINITY, far = 0.0f;
    int at = 0;
#pragma unroll
    for (int c = 0; c < 2 * Tile::kWide; ++c) {
      const float raw = pairs.at(r, c);
      if (!(raw < INFINITY)) continue;  // NaN too
      const float square = fmaxf(raw, 0.0f);
      const int column = Tile::kSide + pairs.column_at(c);
      const bool counts =
          CENTERS || is_earlier(log_density[column], ids[column], log_density[line], ids[line]);
      if (has_peak) far = fmaxf(far, square);
      if (!counts || !(square < low)) continue;
      low = square;
      at = first_column + pairs.column_at(c);
    }
    uint64_t key = low < INFINITY ? neighbor_key(low, at) : kNoNeighbor;
    key = min(key, __shfl_xor_sync(kAllLanes, key, 1));
    key = min(key, __shfl_xor_sync(kAllLanes, key, 2));
    if (has_peak) {
      far = fmaxf(far, __shfl_xor_sync(kAllLanes, far, 1));
      far = fmaxf(far, __shfl_xor_sync(kAllLanes, far, 2));
    }
    if (lane_id() % 4 != 0) continue;
    best[line] = min(best[line], key);
    if (has_peak) farthest[line] = fmaxf(farthest[line], far);
  }
}

// The search among all tokens (or with CENTERS among the centres) for those that are still open. A
// block takes a group of them and a part of the columns at a time.
template <class T, bool CENTERS>
__global__ void __launch_bounds__(kPairThreads, 2) search_rows(LongPass pass, int blocks) {
  using Tile = PairTile<T>;
  SharedMemory shared;
  int* const ids = shared.take<int>(Tile::kLines);
  float* const norms = shared.take<float>(Tile::kLines);
  float* const log_density = shared.take<float>(Tile::kLines);
  float* const farthest = shared.take<float>(Tile::kLines);
  uint64_t* const best = shared.take<uint64_t>(Tile::kLines);
  uint16_t* const slabs = shared.take<uint16_t>(2 * Tile::kSlab);
  const int64_t clip = blockIdx.x / blocks, base = clip * pass.tokens;
  const int count = pass.open_count[clip];
  const int columns = CENTERS ? pass.clusters : pass.tokens;
  const int tiles = (columns + Tile::kSide - 1) / Tile::kSide;
  const int peak = CENTERS ? -1 : pass.peaks[clip];  // its place among the open ones, or −1
  WarpPairs<T> pairs;
  const int side = pairs.column / Tile::kOfWarp * Tile::kSide;  // each half of the columns has its
  for (int item = static_cast<int>(blockIdx.x % blocks); item / kSearchParts * Tile::kSide < count;
       item += blocks) {
    const int first_row = item / kSearchParts * Tile::kSide, part = item % kSearchParts;
    const bool has_peak = peak >= first_row && peak < first_row + Tile::kSide;
    for (int line = threadIdx.x; line < Tile::kLines; line += kPairThreads) {
      best[line] = kNoNeighbor;
      farthest[line] = 0.0f;
    }
    __syncthreads();
    const int end = tiles * (part + 1) / kSearchParts;
    for (int tile = tiles * part / kSearchParts; tile < end; ++tile) {
      const int first_column = tile * Tile::kSide;
      for (int line = threadIdx.x; line < Tile::kLines; line += kPairThreads) {
        const bool is_row = line < Tile::kSide;
        const int at = is_row ? first_row + line : first_column + line - Tile::kSide;
        int id = -1;
        if (at < (is_row ? count : columns)) {
          id = is_row ? pass.open[base + at] : at;
          if (CENTERS && !is_row) {
            id = static_cast<int>(pass.centers[clip * pass.clusters + at]);
          }
        }
        ids[line] = id;
        const bool counts = id >= 0 && (is_row || pass.usable[base + id]);
        norms[line] = counts ? pass.norms[base + id] : INFINITY;
        log_density[line] = id >= 0 ? pass.log_density[base + id] : -INFINITY;
      }
      __syncthreads();
      pairs.multiply(pass, clip, slabs, [&](int line) { return ids[line]; });
      pairs.subtract(norms);
      search_tile<T, CENTERS>(pairs, log_density, ids, first_column, has_peak, best + side,
                              farthest + side);
      __syncthreads();
    }
    for (int line = threadIdx.x; line < Tile::kSide; line += kPairThreads) {
      if (first_row + line >= count) continue;
      pass.parts[(base + first_row + line) * kSearchParts + part] =
          min(best[line], best[Tile::kSide + line]);
      if (first_row + line != peak) continue;
      pass.farthest[base + part] = fmaxf(farthest[line], farthest[Tile::kSide + line]);
    }
    __syncthreads();
  }
}

// Brings the parts of a search together, a thread a token.
template <bool CENTERS>
__global__ void __launch_bounds__(kListThreads) settle_rows(LongPass pass, int blocks) {
  const int64_t clip = blockIdx.x / blocks, base = clip * pass.tokens;
  const int row = static_cast<int>(blockIdx.x % blocks * kListThreads + threadIdx.x);
  if (row >= pass.open_count[clip]) return;
  const int token = pass.open[base + row];
  uint64_t best = kNoNeighbor;
  for (int p = 0; p < kSearchParts; ++p) {
    best = min(best, pass.parts[(base + row) * kSearchParts + p]);
  }
  if constexpr (CENTERS) {
    pass.assignment[base + token] = best == kNoNeighbor ? 0 : key_neighbor(best);
  } else {
    float square = key_square(best);
    if (row == pass.peaks[clip]) {
      square = 0.0f;
      for (int p = 0; p < kSearchParts; ++p) square = fmaxf(square, pass.farthest[base + p]);
    }
    pass.delta[base + token] = sqrtf(square / pass.unit);
  }
}

// -- centres --------------------------------------------------------------------------------------

// A thread finds one token's rank as a centre, in (usable, log ρ + log δ descending, index
// ascending), by counting the tokens before it.
__global__ void __launch_bounds__(kRankThreads) rank_centers(LongPass pass, int blocks) {
  SharedMemory shared;
  unsigned* const tile = shared.take<unsigned>(kRankThreads);
  const int64_t clip = blockIdx.x / blocks, base = clip * pass.tokens;
  const int first = static_cast<int>(blockIdx.x % blocks) * kRankThreads;
  const int thread = static_cast<int>(threadIdx.x), i = first + thread;
  const auto key = [&](int j) {  // 0 where there is no token
    if (j >= pass.tokens) return 0u;
    if (!pass.usable[base + j]) return 1u;
    return ordered(pass.log_density[base + j] + logf(pass.delta[base + j]));
  };
  const unsigned mine = key(i);
  int rank = 0;
  for (int from = 0; from < pass.tokens; from += kRankThreads) {
    tile[thread] = key(from + thread);
    __syncthreads();
    const unsigned limit = mine - (from < first);  // equal ones before this block's count
    const int own = from == first ? thread : 0;    // and those before the token
#pragma unroll 4
    for (int j = 0; j < kRankThreads; j += 4) {
      const uint4 keys = *reinterpret_cast<const uint4*>(tile + j);
      rank += (keys.x > limit) + (keys.y > limit) + (keys.z > limit) + (keys.w > limit);
    }
    for (int j = 0; j < own; ++j) rank += tile[j] == mine;
    __syncthreads();
  }
  if (i >= pass.tokens) return;
  pass.center_of[base + i] = rank < pass.clusters ? rank : -1;
  if (rank < pass.clusters) pass.centers[clip * pass.clusters + rank] = i;
}

}  // namespace cmpose
