// Squared distances between a clip's tokens, tile by tile on tensor cores; and distance_pass, which
// keeps all of a clip's, with each token's nearest neighbours.
//
// d² = |x|² + |y|² − 2xy of centred tokens (see center_tokens). The norms are the diagonal of the
// same products, added in the same order. So d² of equal tokens is exactly 0, and d² is symmetric,
// as in the reference, which computes it from differences.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace cmpose {

constexpr int kTileThreads = 256;   // 8 warps: 2 halves of the rows times 4 quarters of the columns
constexpr int kDepthMultiple = 64;  // channels are filled up with zeros to a multiple of this

// What the passes over the tiles read and write; B clips of M tokens.
struct DistancePass {
  const uint16_t* pieces;  // [pieces, B, M, depth]: tokens as 16-bit numbers, or as sums of three
  int64_t piece_size;      // B · M · depth
  int piece_count;         // of three, how many are used
  int tokens, depth, neighbors, clusters;
  float unit;  // squared distances are divided by it
  bool include_self, global_max;
  const bool* valid;  // [B, M], the caller's, or null
  bool* usable;       // [B, M]: valid, with a sound norm
  float* products;    // [B, slices, tiles, 16 · 16]: see gram_clip
  float* matrix;      // [B, M, M] of d²
  float* farthest;    // [B, M]: the largest d² to a usable token
  float* log_density;
  float* delta;
  int64_t* centers;
  int64_t* assignment;
};

// What those of longer clips do; see dpc_knn_long.cuh.
struct LongPass : DistancePass {
  int groups;         // of tokens, a clip
  float* norms;       // [B, M]
  float* limits;      // [B, M]: d² of the last of the k nearest so far
  uint64_t* nearest;  // [B, M, k]: d² and token
  uint64_t* fresh;    // [B, M, kRoles, k]: what the last tiles found
  uint8_t* counts;    // [B, M, kRoles]: how many
  int* open;          // [B, M]: tokens whose δ, or cluster, is not known yet
  int* open_count;    // [B]
  int* peaks;         // [B]: which of the open tokens is the peak, or −1
  int* center_of;     // [B, M]: the cluster whose centre the token is, or −1
  uint64_t* parts;    // [B, M, kSearchParts]: what was found for the open tokens
};

// How a tile lies in shared memory. Tokens of T = float come in three bfloat16 pieces.
template <class T, int ROWS, int COLUMNS>
struct Tile {
  static_assert(ROWS % 32 == 0 && COLUMNS % ROWS == 0, "a block's rows lie in one tile's columns");
  static constexpr bool kSplit = std::is_same<T, float>::value;
  static constexpr bool kBF16 = !std::is_same<T, fp16>::value;
  static constexpr int kPieces = kSplit ? 3 : 1;
  static constexpr int kDepth = kSplit ? 32 : 64;  // channels of a slab
  static constexpr int kPitch = kDepth + 8;        // rows start 16 bytes apart modulo 128
  static constexpr int kLines = ROWS + COLUMNS;
  static constexpr int kSlab = kPieces * kLines * kPitch;  // 16-bit numbers
  static constexpr int kDistancePitch = COLUMNS + 8;
  static constexpr int kGroups = COLUMNS / 16;

  static constexpr unsigned shared_bytes() {
    const unsigned slabs = shared_part<uint16_t>(2 * kSlab);
    const unsigned distances = shared_part<float>(ROWS * kDistancePitch);
    return shared_part<int>(kLines) + shared_part<float>(kLines) + shared_part<bool>(kLines) +
           shared_part<float>(ROWS * kMaxNeighbors) + shared_part<float>(ROWS) +
           (slabs > distances ? slabs : distances);
  }
};

// Sums of products of x = h + m + l and y likewise, where h is the first of the three pieces:
// main = Σ hh + mm, left = Σ h_x (m + l)_y and right = Σ (m + l)_x h_y. If x and y are exchanged,
// so are left and right; main + (left + right) is therefore the same for (x, y) and (y, x).
template <bool SPLIT>
struct Sums {
  float main[4] = {}, left[SPLIT ? 4 : 1] = {}, right[SPLIT ? 4 : 1] = {};

  __device__ __forceinline__ float total(int i) const {
    if constexpr (SPLIT) return main[i] + (left[i] + right[i]);
    return main[i];
  }
};

template <class Shape>
__device__ __forceinline__ void multiply(Sums<Shape::kSplit>& sums,
                                         const uint32_t (&a)[Shape::kPieces][4],
                                         const uint32_t (&b)[Shape::kPieces][4], int half,
                                         int pieces) {
  const int at = 2 * half;
  mma_16x8x16<Shape::kBF16>(sums.main, a[0], b[0][at], b[0][at + 1]);
  if constexpr (Shape::kSplit) {
    mma_16x8x16<true>(sums.left, a[0], b[1][at], b[1][at + 1]);
    mma_16x8x16<true>(sums.right, a[1], b[0][at], b[0][at + 1]);
    if (pieces == 3) {
      mma_16x8x16<true>(sums.main, a[1], b[1][at], b[1][at + 1]);
      mma_16x8x16<true>(sums.left, a[0], b[2][at], b[2][at + 1]);
      mma_16x8x16<true>(sums.right, a[2], b[0][at], b[0][at + 1]);
    }
  }
}

// The block's view of a tile while it works on it.
template <class T, int ROWS, int COLUMNS>
struct TileView {
  using Shape = Tile<T, ROWS, COLUMNS>;
  int* ids;          // [lines]: the token of each row and column, or −1
  float* norms;      // [lines]
  bool* usable;      // [lines]
  float* best;       // [rows, kMaxNeighbors]: each row's smallest d² so far
  float* farthest;   // [rows]
  uint16_t* slabs;   // two of them
  float* distances;  // [rows, pitch], where the slabs were
  int64_t clip;
  int row, column;  // the first ones

  __device__ __forceinline__ float distance(int r, int c) const {
    return distances[r * Shape::kDistancePitch + c];
  }
};

// Starts the copies (cp.async) of one slab of the tile's lines.
template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void load_slab(const DistancePass& pass,
                                          const TileView<T, ROWS, COLUMNS>& tile, int slab) {
  using Shape = Tile<T, ROWS, COLUMNS>;
  constexpr int kChunks = Shape::kDepth / 8;  // of 16 bytes a line
  uint16_t* const to = tile.slabs + slab % 2 * Shape::kSlab;
  const uint16_t* const from =
      pass.pieces + tile.clip * pass.tokens * pass.depth + slab * Shape::kDepth;
  const int chunks = pass.piece_count * Shape::kLines * kChunks;
  for (int i = threadIdx.x; i < chunks; i += kTileThreads) {
    const int part = i % kChunks, line = i / kChunks % Shape::kLines;
    const int piece = i / kChunks / Shape::kLines;
    const int id = tile.ids[line];
    const int64_t source = piece * pass.piece_size + int64_t{max(id, 0)} * pass.depth + part * 8;
    cp_async_16(to + (piece * Shape::kLines + line) * Shape::kPitch + part * 8, from + source,
                id >= 0);
  }
}

// Whether distances can be computed from a squared norm: it is not NaN, and no sum overflows.
__device__ __forceinline__ bool is_sound(float norm) { return norm <= 0x1p125f; }

// 16 lines as the left factor: rows of 16 channels.
template <class Shape>
__device__ __forceinline__ void load_left(uint32_t (&a)[Shape::kPieces][4], const uint16_t* slab,
                                          int line, int channel, int pieces) {
#pragma unroll
  for (int p = 0; p < Shape::kPieces; ++p) {
    if (p > 0 && p >= pieces) continue;
    ldmatrix_x4(a[p], slab + (p * Shape::kLines + line + lane_id() % 16) * Shape::kPitch + channel +
                          lane_id() / 16 * 8);
  }
}

// 16 lines as two right factors of 8 columns each.
template <class Shape>
__device__ __forceinline__ void load_right(uint32_t (&b)[Shape::kPieces][4], const uint16_t* slab,
                                           int line, int channel, int pieces) {
#pragma unroll
  for (int p = 0; p < Shape::kPieces; ++p) {
    if (p > 0 && p >= pieces) continue;
    const int mine = line + lane_id() % 8 + lane_id() / 16 * 8;
    ldmatrix_x4(
        b[p], slab + (p * Shape::kLines + mine) * Shape::kPitch + channel + lane_id() / 8 % 2 * 8);
  }
}

// Fills tile.distances with d² of the tile's rows and columns, infinite where a norm is not sound.
template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void compute_tile(const DistancePass& pass,
                                             const TileView<T, ROWS, COLUMNS>& tile) {
  using Shape = Tile<T, ROWS, COLUMNS>;
  constexpr int kHigh = ROWS / 32, kPairs = COLUMNS / 64;  // 16 rows, and 16 columns, of a warp
  constexpr int kTurns = (Shape::kGroups + 7) / 8;
  const int lane = lane_id(), warp = warp_id();
  const int my_row = warp % 2 * (ROWS / 2), my_column = ROWS + warp / 2 * (COLUMNS / 4);
  const int pieces = pass.piece_count;
  Sums<Shape::kSplit> sums[kHigh][2 * kPairs];
  Sums<Shape::kSplit> diagonal[kTurns][2];

  const int slabs = pass.depth / Shape::kDepth;
  load_slab(pass, tile, 0);
  cp_async_commit();
  for (int s = 0; s < slabs; ++s) {
    if (s + 1 < slabs) load_slab(pass, tile, s + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const uint16_t* const slab = tile.slabs + s % 2 * Shape::kSlab;
#pragma unroll
    for (int channel = 0; channel < Shape::kDepth; channel += 16) {
      uint32_t a[kHigh][Shape::kPieces][4], b[Shape::kPieces][4];
#pragma unroll
      for (int high = 0; high < kHigh; ++high) {
        load_left<Shape>(a[high], slab, my_row + high * 16, channel, pieces);
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        load_right<Shape>(b, slab, my_column + pair * 16, channel, pieces);
#pragma unroll
        for (int high = 0; high < kHigh; ++high) {
          multiply<Shape>(sums[high][2 * pair], a[high], b, 0, pieces);
          multiply<Shape>(sums[high][2 * pair + 1], a[high], b, 1, pieces);
        }
      }
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn) {
        const int line = ROWS + (warp + 8 * turn) * 16;
        if (line >= Shape::kLines || tile.ids[line] < 0) continue;
        load_left<Shape>(a[0], slab, line, channel, pieces);
        load_right<Shape>(b, slab, line, channel, pieces);
        multiply<Shape>(diagonal[turn][0], a[0], b, 0, pieces);
        multiply<Shape>(diagonal[turn][1], a[0], b, 1, pieces);
      }
    }
    __syncthreads();
  }

  if (lane / 8 == lane % 4) {  // the lanes that hold the products' diagonals
    const int i = lane / 4, odd = i % 2;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int line = ROWS + (warp + 8 * turn) * 16;
      if (line >= Shape::kLines) continue;
      const auto& low = diagonal[turn][0];
      const auto& high = diagonal[turn][1];
      tile.norms[line + i] = odd ? low.total(1) : low.total(0);        // an array in registers
      tile.norms[line + 8 + i] = odd ? high.total(3) : high.total(2);  // has no index
    }
  }
  __syncthreads();
  if (tile.column <= tile.row && tile.row < tile.column + COLUMNS) {
    // The block's rows are among these columns, in the first of its tiles; they stay for the rest.
    for (int r = threadIdx.x; r < ROWS; r += kTileThreads) {
      tile.norms[r] = tile.norms[ROWS + tile.row - tile.column + r];
    }
    __syncthreads();
  }
  for (int line = threadIdx.x; line < Shape::kLines; line += kTileThreads) {
    const int id = tile.ids[line];
    tile.usable[line] = id >= 0 && is_sound(tile.norms[line]) &&
                        (!pass.valid || pass.valid[tile.clip * pass.tokens + id]);
  }
#pragma unroll
  for (int high = 0; high < kHigh; ++high) {
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = my_row + high * 16 + lane / 4 + i / 2 * 8;
        const int c = my_column - ROWS + t * 8 + lane % 4 * 2 + i % 2;
        const float x = tile.norms[r], y = tile.norms[ROWS + c];
        float square = fmaxf((x + y) - 2.0f * sums[high][t].total(i), 0.0f);
        if (tile.ids[r] == tile.ids[ROWS + c]) square = 0.0f;
        if (!(is_sound(x) && is_sound(y))) square = INFINITY;
        tile.distances[r * Shape::kDistancePitch + c] = square;
      }
    }
  }
  __syncthreads();
}

// Non-negative floats compare as their bits do.
__device__ __forceinline__ float lowest_of_warp(float value) {
  return __uint_as_float(__reduce_min_sync(kAllLanes, __float_as_uint(value)));
}

// For row r: keeps the k smallest and the largest d² so far, and stores the row of the matrix.
template <class T, int ROWS, int COLUMNS>
__device__ __forceinline__ void keep_neighbors(const DistancePass& pass,
                                               const TileView<T, ROWS, COLUMNS>& tile, int r) {
  constexpr int kEach = COLUMNS / kWarp;
  const int lane = lane_id(), i = tile.row + r, k = pass.neighbors;
  float values[kEach];
  float far = 0.0f, low = INFINITY;
#pragma unroll
  for (int q = 0; q < kEach; ++q) {
    const int c = lane + kWarp * q, j = tile.column + c;
    const float value = tile.distance(r, c);
    const bool there = j < pass.tokens;
    if (there) pass.matrix[(tile.clip * pass.tokens + i) * pass.tokens + j] = value;
    const bool usable = there && tile.usable[ROWS + c];
    if (usable) far = fmaxf(far, value);
    values[q] = usable && (pass.include_self || j != i) ? value : INFINITY;
    low = fminf(low, values[q]);
  }
  if (!tile.usable[r]) return;
  far = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(far)));
  if (lane == 0) tile.farthest[r] = fmaxf(tile.farthest[r], far);
  float* const best = tile.best + r * kMaxNeighbors;
  if (lowest_of_warp(low) >= best[k - 1]) return;
  float mine = lane < k ? best[lane] : INFINITY;
  float merged = INFINITY;
  for (int n = 0; n < k; ++n) {
    float candidate = mine;
#pragma unroll
    for (int q = 0; q < kEach; ++q) candidate = fminf(candidate, values[q]);
    const float next = lowest_of_warp(candidate);
    if (next == INFINITY) break;
    if (lane == n) merged = next;
    if (lane != __ffs(static_cast<int>(__ballot_sync(kAllLanes, candidate == next))) - 1) continue;
    bool taken = mine == next;  // one of equal values only
    if (taken) mine = INFINITY;
#pragma unroll
    for (int q = 0; q < kEach; ++q) {
      if (taken || values[q] != next) continue;
      values[q] = INFINITY;
      taken = true;
    }
  }
  __syncwarp();
  if (lane < k) best[lane] = merged;
}

// log ρ = −(mean of the k smallest d²), added in ascending order as in the reference.
__device__ __forceinline__ float log_density_of(const float* best, int k, float unit) {
  float sum = 0.0f;
  int count = 0;
  for (int n = 0; n < k; ++n) {
    if (best[n] == INFINITY) break;
    sum += best[n];
    ++count;
  }
  return 0.0f - sum / (max(count, 1) * unit);
}

// d² of the peak's δ: its own largest, or the clip's. All lanes of a warp must call it.
__device__ __forceinline__ float peak_square(const DistancePass& pass, int64_t clip, int token) {
  const float* const farthest = pass.farthest + clip * pass.tokens;
  if (!pass.global_max) return farthest[token];
  float far = 0.0f;
  for (int i = lane_id(); i < pass.tokens; i += kWarp) far = fmaxf(far, farthest[i]);
  return warp_max(far);
}

// A block goes through all tiles of its rows.
template <class T, int ROWS, int COLUMNS>
__global__ void __launch_bounds__(kTileThreads, 1)
    distance_pass(DistancePass pass, int row_blocks) {
  using Shape = Tile<T, ROWS, COLUMNS>;
  SharedMemory shared;
  TileView<T, ROWS, COLUMNS> tile;
  tile.ids = shared.take<int>(Shape::kLines);
  tile.norms = shared.take<float>(Shape::kLines);
  tile.usable = shared.take<bool>(Shape::kLines);
  tile.best = shared.take<float>(ROWS * kMaxNeighbors);
  tile.farthest = shared.take<float>(ROWS);
  tile.slabs = shared.take<uint16_t>(2 * Shape::kSlab);
  tile.distances = reinterpret_cast<float*>(tile.slabs);
  tile.clip = blockIdx.x / row_blocks;
  tile.row = static_cast<int>(blockIdx.x % row_blocks) * ROWS;
  const int64_t base = tile.clip * pass.tokens;
  for (int i = threadIdx.x; i < ROWS * kMaxNeighbors; i += kTileThreads) tile.best[i] = INFINITY;
  for (int r = threadIdx.x; r < ROWS; r += kTileThreads) tile.farthest[r] = 0.0f;
  // The tile whose columns include the block's rows comes first, because it has their norms.
  const int tiles = (pass.tokens + COLUMNS - 1) / COLUMNS, own = tile.row / COLUMNS;
  for (int t = 0; t < tiles; ++t) {
    tile.column = (own + t) % tiles * COLUMNS;
    for (int line = threadIdx.x; line < Shape::kLines; line += kTileThreads) {
      const int token = line < ROWS ? tile.row + line : tile.column + line - ROWS;
      tile.ids[line] = token < pass.tokens ? token : -1;
    }
    __syncthreads();
    compute_tile(pass, tile);
    for (int r = warp_id(); r < ROWS && tile.row + r < pass.tokens; r += kTileThreads / kWarp) {
      keep_neighbors(pass, tile, r);
    }
    __syncthreads();
  }
  for (int r = threadIdx.x; r < ROWS && tile.row + r < pass.tokens; r += kTileThreads) {
    const int64_t token = base + tile.row + r;
    const bool usable = tile.usable[r];
    pass.log_density[token] =
        usable ? log_density_of(tile.best + r * kMaxNeighbors, pass.neighbors, pass.unit)
               : -INFINITY;
    pass.farthest[token] = tile.farthest[r];
    pass.usable[token] = usable;
  }
}

}  // namespace cmpose
