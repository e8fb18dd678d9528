// Clips of up to kShortTokens tokens. gram_clip centres 16-bit tokens and forms their products, of
// each pair once: the upper triangle of the Gram matrix, whose diagonal has the norms. density_rows
// makes d² of them and finds densities. cluster_clip then holds a clip's d² in its registers, finds
// δ, centres and clusters there, and merges; for float32 tokens too, whose d² and densities are
// from distance_pass.
#pragma once

#include "dpc_knn_parts.cuh"

namespace cmpose {

constexpr int kShortTokens = 192;
constexpr int kGroup = 16;  // tokens: a tile of the triangle has 16 × 16 products
constexpr int kTile = kGroup * kGroup;
constexpr int kSideGroups = 3;  // a warp forms 3 × 3 tiles
constexpr int kSide = kSideGroups * kGroup;

// Blocks that share a clip's channels. More of them leave more sums of products to add up
// afterwards, fewer leave more SMs idle; and a clip's bits must not depend on the batch.
constexpr int kGramSlices = 3;
constexpr int kGramThreads = 384;
constexpr int kGramWarps = kGramThreads / kWarp;
constexpr int kChunk = 64;               // channels that a block centres and multiplies at a time
constexpr int kChunkPitch = kChunk + 8;  // rows start 16 bytes apart modulo 128
constexpr int kChunkBuffers = 3;
constexpr int kDensityThreads = 384;
constexpr int kDensityWarps = kDensityThreads / kWarp;
constexpr int kClusterThreads = 512;
constexpr int kClusterWarps = kClusterThreads / kWarp;

__host__ __device__ constexpr int sides_of(int tokens) { return (tokens + kSide - 1) / kSide; }

// Tiles of the triangle come column by column: tile (r, c), r ≤ c, is at c (c + 1) / 2 + r.
__host__ __device__ constexpr int tiles_before(int column) { return column * (column + 1) / 2; }
__host__ __device__ constexpr int tiles_of(int tokens) {
  return tiles_before(sides_of(tokens) * kSideGroups);
}

inline int gram_slices(int channels) {
  return std::min(kGramSlices, static_cast<int>(ceil_div(std::max(channels, 1), kChunk)));
}

constexpr unsigned gram_shared(int tokens) {
  return shared_part<uint16_t>(kChunkBuffers * sides_of(tokens) * kSide * kChunkPitch) +
         shared_part<float>(4 * kGramWarps * kChunk) + shared_part<float>(4 * kChunk);
}

// Rows of d² in density_rows; they start 8 or 24 banks apart.
__host__ __device__ constexpr int row_pitch(int tokens) { return sides_of(tokens) * kSide + 8; }

constexpr unsigned density_shared(int tokens) {
  return shared_part<float>(tokens) + shared_part<float>(kSide * row_pitch(tokens));
}

constexpr unsigned cluster_shared(int tokens, int clusters) {
  return shared_part<bool>(tokens) + 5 * shared_part<unsigned>(tokens) +
         shared_part<int>(clusters + 1) + shared_part<int>(clusters);
}

// -- products -------------------------------------------------------------------------------------

// Shifts the tokens of a chunk in shared memory, as center_tokens does. `counted` has a bit for
// each of the warp's rows: whether it counts for the mean. All threads of the block must call it.
template <class T>
__device__ __forceinline__ void center_chunk(uint16_t* chunk, int count, unsigned counted,
                                             float* parts, float* totals) {
  const int warp = warp_id(), mine = 2 * lane_id();
  using Pair = Vector<float, 2>;
  const auto row = [&](int i) {
    return reinterpret_cast<uint32_t*>(chunk + i * kChunkPitch + mine);
  };
  {
    Pair sum{}, number{}, low{INFINITY, INFINITY}, high{-INFINITY, -INFINITY};
    for (int i = warp, bits = counted; i < count; i += kGramWarps, bits >>= 1) {
      if (!(bits & 1)) continue;
      Pair x;
      pair_to_floats(T{}, *row(i), x.at[0], x.at[1]);
#pragma unroll
      for (int q = 0; q < 2; ++q) {
        if (!isfinite(x.at[q])) continue;
        sum.at[q] += x.at[q];
        number.at[q] += 1.0f;
        low.at[q] = fminf(low.at[q], x.at[q]);
        high.at[q] = fmaxf(high.at[q], x.at[q]);
      }
    }
    const auto part = [&](int quantity) {
      return reinterpret_cast<Pair*>(parts + (quantity * kGramWarps + warp) * kChunk + mine);
    };
    *part(0) = sum, *part(1) = number, *part(2) = low, *part(3) = high;
  }
  __syncthreads();
  if (threadIdx.x < 4 * kChunk) {
    const int quantity = static_cast<int>(threadIdx.x) / kChunk;
    const float* const part =
        parts + quantity * kGramWarps * kChunk + static_cast<int>(threadIdx.x) % kChunk;
    float total = part[0];
#pragma unroll
    for (int w = 1; w < kGramWarps; ++w) {
      const float x = part[w * kChunk];
      total = quantity < 2 ? total + x : quantity == 2 ? fminf(total, x) : fmaxf(total, x);
    }
    totals[threadIdx.x] = total;
  }
  __syncthreads();
  float shift[2];
#pragma unroll
  for (int q = 0; q < 2; ++q) {
    const float* const total = totals + mine + q;
    shift[q] = shift_of(total[0], total[kChunk], total[2 * kChunk], total[3 * kChunk]);
  }
  // Every warp finds all 64 shifts, so that all warps go the same way.
  if (!__ballot_sync(kAllLanes, shift[0] != 0.0f || shift[1] != 0.0f)) return;
  Pair rounds{};
  for (int i = warp; i < count; i += kGramWarps) {
    float x[2];
    pair_to_floats(T{}, *row(i), x[0], x[1]);
#pragma unroll
    for (int q = 0; q < 2; ++q) {
      if (isfinite(x[q]) && !shifts_exactly<T>(x[q], shift[q])) rounds.at[q] = 1.0f;
    }
  }
  *reinterpret_cast<Pair*>(parts + warp * kChunk + mine) = rounds;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kGramWarps; ++w) {
    const Pair part = *reinterpret_cast<const Pair*>(parts + w * kChunk + mine);
    if (part.at[0] != 0.0f) shift[0] = 0.0f;
    if (part.at[1] != 0.0f) shift[1] = 0.0f;
  }
  for (int i = warp; i < count; i += kGramWarps) {
    float x[2];
    pair_to_floats(T{}, *row(i), x[0], x[1]);
    *row(i) = pair_from(T{}, x[0] - shift[0], x[1] - shift[1]);
  }
  __syncthreads();
}

// A warp's products: 3 × 3 tiles, whose rows start at token `row` and columns at token `column`; on
// the diagonal only those of the upper triangle.
struct Square {
  int row, column;
  float sums[kSideGroups][kSideGroups][2][4] = {};  // of each tile 8 columns, and 8 more

  __device__ __forceinline__ bool has(int x, int y) const { return x <= y || row != column; }

  template <class T>
  __device__ __forceinline__ void multiply(const uint16_t* chunk) {
    const int lane = lane_id();
    constexpr bool kBF16 = std::is_same<T, bf16>::value;
    const uint16_t* const left = chunk + (row + lane % 16) * kChunkPitch + lane / 16 * 8;
    const uint16_t* const right =
        chunk + (column + lane % 8 + lane / 16 * 8) * kChunkPitch + lane / 8 % 2 * 8;
#pragma unroll
    for (int channel = 0; channel < kChunk; channel += 16) {
      uint32_t a[kSideGroups][4], b[kSideGroups][4];
#pragma unroll
      for (int x = 0; x < kSideGroups; ++x) {
        ldmatrix_x4(a[x], left + x * kGroup * kChunkPitch + channel);
        ldmatrix_x4(b[x], right + x * kGroup * kChunkPitch + channel);
      }
#pragma unroll
      for (int x = 0; x < kSideGroups; ++x) {
#pragma unroll
        for (int y = 0; y < kSideGroups; ++y) {
          if (!has(x, y)) continue;
          mma_16x8x16<kBF16>(sums[x][y][0], a[x], b[y][0], b[y][1]);
          mma_16x8x16<kBF16>(sums[x][y][1], a[x], b[y][2], b[y][3]);
        }
      }
    }
  }

  // A tile's sums stay in the order in which the lanes hold them: [half][lane][4].
  __device__ __forceinline__ void store(float* tiles) const {
#pragma unroll
    for (int x = 0; x < kSideGroups; ++x) {
#pragma unroll
      for (int y = 0; y < kSideGroups; ++y) {
        if (!has(x, y)) continue;
        const int tile = tiles_before(column / kGroup + y) + row / kGroup + x;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          store_16(tiles + tile * kTile + (half * kWarp + lane_id()) * 4, sums[x][y][half]);
        }
      }
    }
  }
};

// The warp's square, or one without rows (−1). Squares beside the diagonal have three tiles more,
// so they come first; warps 8 and 9 come last, as 0 and 1 of the same quarters of the SM have such.
__device__ __forceinline__ Square square_of_warp(int sides) {
  const int warp = warp_id();
  int n = warp < 8 ? warp : warp < 10 ? warp + 2 : warp - 2;
  for (int column = 1; column < sides; ++column) {
    if (n < column) return {n * kSide, column * kSide};
    n -= column;
  }
  return n < sides ? Square{n * kSide, n * kSide} : Square{-1, -1};
}

// A block forms the products of a clip over a slice of the channels: [clip, slice, tiles] of 16 ×
// 16 sums. With WHOLE rows are copied 16 bytes at a time.
template <class T, bool WHOLE>
__global__ void __launch_bounds__(kGramThreads, 1)
    gram_clip(const T* __restrict__ tokens, const bool* __restrict__ valid,
              float* __restrict__ products, int count, int channels, int slices) {
  SharedMemory shared;
  const int sides = sides_of(count), rows = sides * kSide;
  uint16_t* const chunks = shared.take<uint16_t>(kChunkBuffers * rows * kChunkPitch);
  float* const parts = shared.take<float>(4 * kGramWarps * kChunk);
  float* const totals = shared.take<float>(4 * kChunk);
  const int64_t clip = blockIdx.x / slices;
  const int slice = static_cast<int>(blockIdx.x % slices);
  const int all = (channels + kChunk - 1) / kChunk;
  const int first = all * slice / slices, end = all * (slice + 1) / slices;
  const T* const from = tokens + clip * count * channels;
  const auto buffer = [&](int chunk) {
    return chunks + (chunk - first) % kChunkBuffers * rows * kChunkPitch;
  };
  const auto fetch = [&](int chunk) {
    constexpr int kPieces = WHOLE ? kChunk / 8 : kChunk;  // of a row
    const int part = static_cast<int>(threadIdx.x) % kPieces * (kChunk / kPieces);
    const int channel = chunk * kChunk + part;
    uint16_t* const to = buffer(chunk) + part;
    for (int i = static_cast<int>(threadIdx.x) / kPieces; i < rows; i += kGramThreads / kPieces) {
      const bool present = i < count && channel < channels;
      const T* const source = from + (present ? int64_t{i} * channels + channel : 0);
      if constexpr (WHOLE) {
        cp_async_16(to + i * kChunkPitch, source, present);
      } else {
        to[i * kChunkPitch] = present ? source->bits : uint16_t{0};
      }
    }
  };
  for (int c = 0; c < kChunkBuffers; ++c) {
    if (first + c < end) fetch(first + c);
    cp_async_commit();
  }
  const int token = warp_id() + lane_id() * kGramWarps;
  const unsigned counted =
      __ballot_sync(kAllLanes, token < count && (!valid || valid[clip * count + token]));
  Square square = square_of_warp(sides);
  for (int c = first; c < end; ++c) {
    cp_async_wait<kChunkBuffers - 1>();
    __syncthreads();
    center_chunk<T>(buffer(c), count, counted, parts, totals);
    if (square.row >= 0) square.multiply<T>(buffer(c));
    if (c + kChunkBuffers < end) {
      __syncthreads();
      fetch(c + kChunkBuffers);
    }
    cp_async_commit();
  }
  if (square.row >= 0) square.store(products + blockIdx.x * int64_t{tiles_of(count)} * kTile);
}

// -- densities ------------------------------------------------------------------------------------

// Element (r, r) of a tile in the order in which lanes hold it.
__device__ __forceinline__ int diagonal_at(int r) {
  return (r / 8 * kWarp + r % 8 * 4 + r % 8 / 2) * 4 + r / 8 * 2 + r % 2;
}

// The k smallest of a row's values, `EACH` a lane: their sum in ascending order, and how many of
// them are finite. Of two rows at a time, so that one need not wait for the other.
template <int EACH>
__device__ __forceinline__ void sum_nearest(float (&values)[2][EACH], int k, float (&sum)[2],
                                            int (&finite)[2]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    sum[row] = 0.0f, finite[row] = 0;
#pragma unroll
    for (int n = EACH - 1; n > 0; --n) {  // each lane sorts its own
#pragma unroll
      for (int q = 0; q < n; ++q) {
        const float low = fminf(values[row][q], values[row][q + 1]);
        values[row][q + 1] = fmaxf(values[row][q], values[row][q + 1]);
        values[row][q] = low;
      }
    }
  }
  for (int n = 0; n < k; ++n) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float(&mine)[EACH] = values[row];
      const float next = lowest_of_warp(mine[0]);
      const unsigned with = __ballot_sync(kAllLanes, mine[0] == next);
      if (next < INFINITY) sum[row] += next, ++finite[row];
      if (lane_id() != __ffs(static_cast<int>(with)) - 1) continue;  // one of equal values only
#pragma unroll
      for (int q = 0; q + 1 < EACH; ++q) mine[q] = mine[q + 1];
      mine[EACH - 1] = INFINITY;
    }
  }
}

// Fills kSide rows of d², from token `first` on, from products summed up over the slices; infinite
// where a norm is not sound.
__device__ __forceinline__ void fill_rows(const float* products, int slices, int tiles, int first,
                                          int count, const float* norms, float* rows) {
  const int groups = sides_of(count) * kSideGroups, lane = lane_id(), pitch = row_pitch(count);
  for (int n = warp_id(); n < kSideGroups * groups; n += kDensityWarps) {
    const int mine = first / kGroup + n / groups, other = n % groups;
    const bool upper = mine <= other;  // the tile has this group's tokens as rows
    const int tile = upper ? tiles_before(other) + mine : tiles_before(mine) + other;
    float sums[2][kGramSlices][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < kGramSlices; ++s) {
        if (s >= slices) continue;
        load_floats<4>(products + (s * tiles + tile) * kTile + (half * kWarp + lane) * 4,
                       sums[half][s]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float product = sums[half][0][i];
#pragma unroll
        for (int s = 1; s < kGramSlices; ++s) {
          if (s < slices) product += sums[half][s][i];
        }
        const int r = lane / 4 + i / 2 * 8, c = half * 8 + lane % 4 * 2 + i % 2;
        const int at = upper ? r : c, to = upper ? c : r;
        const int token = mine * kGroup + at, neighbor = other * kGroup + to;
        if (token >= count || neighbor >= count) continue;
        const float both = norms[token] + norms[neighbor];
        float square = fmaxf(both - 2.0f * product, 0.0f);
        if (token == neighbor) square = 0.0f;
        if (!(both < INFINITY)) square = INFINITY;
        rows[(token - first) * pitch + neighbor] = square;
      }
    }
  }
}

// A block makes kSide rows of a clip's d² from the products, and finds their densities.
__global__ void __launch_bounds__(kDensityThreads, 1) density_rows(DistancePass pass, int slices) {
  constexpr int kColumns = kShortTokens / kWarp;
  SharedMemory shared;
  const int count = pass.tokens, sides = sides_of(count), tiles = tiles_of(count);
  const int pitch = row_pitch(count), lane = lane_id();
  float* const norms = shared.take<float>(count);  // infinite where one is not sound
  float* const rows = shared.take<float>(kSide * pitch);
  const int64_t clip = blockIdx.x / sides, base = clip * count;
  const int first = static_cast<int>(blockIdx.x % sides) * kSide;
  const float* const products = pass.products + clip * slices * tiles * kTile;
  for (int j = threadIdx.x; j < count; j += kDensityThreads) {
    const int group = j / kGroup;
    const float* const from =
        products + (tiles_before(group) + group) * kTile + diagonal_at(j % kGroup);
    float norm = from[0];
    for (int s = 1; s < slices; ++s) norm += from[s * tiles * kTile];
    norms[j] = is_sound(norm) ? norm : INFINITY;
  }
  __syncthreads();
  fill_rows(products, slices, tiles, first, count, norms, rows);
  unsigned usable = 0;  // a bit for each of the lane's columns
#pragma unroll
  for (int q = 0; q < kColumns; ++q) {
    const int j = lane + kWarp * q;
    const bool good = j < count && norms[j] < INFINITY && (!pass.valid || pass.valid[base + j]);
    usable |= static_cast<unsigned>(good) << q;
  }
  __syncthreads();
  // A warp takes two neighbouring rows at a time.
  for (int r = 2 * warp_id(); r < kSide && first + r < count; r += 2 * kDensityWarps) {
    float values[2][kColumns], sum[2], far[2] = {};
    int finite[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int i = first + r + row;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        const int j = lane + kWarp * q;
        float& value = values[row][q];
        value = INFINITY;
        if (i >= count || j >= count) continue;
        value = rows[(r + row) * pitch + j];
        pass.matrix[(base + i) * count + j] = value;
        if (usable >> q & 1) far[row] = fmaxf(far[row], value);
        if (!(usable >> q & 1) || (!pass.include_self && i == j)) value = INFINITY;
      }
      far[row] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(far[row])));
    }
    sum_nearest(values, pass.neighbors, sum, finite);
    const int i = first + r + lane;  // the token whose results lane 0 or 1 writes
    if (lane > 1 || i >= count) continue;
    const bool good = norms[i] < INFINITY && (!pass.valid || pass.valid[base + i]);
    const float mean = (lane ? sum[1] : sum[0]) /
                       (static_cast<float>(max(lane ? finite[1] : finite[0], 1)) * pass.unit);
    pass.usable[base + i] = good;
    pass.log_density[base + i] = good ? 0.0f - mean : -INFINITY;
    pass.farthest[base + i] = good ? (lane ? far[1] : far[0]) : 0.0f;
  }
}

// -- clusters -------------------------------------------------------------------------------------

// A clip's d² as a warp holds them: rows warp + 16 r, columns lane + 32 q.
struct ClipView {
  static constexpr int kRows = kShortTokens / kClusterWarps, kColumns = kShortTokens / kWarp;
  static_assert(2 * kClusterWarps == kWarp, "is_lower knows most columns beforehand");
  int count, warp, lane;
  float square[kRows][kColumns];

  __device__ __forceinline__ int token(int r) const { return warp + kClusterWarps * r; }
  __device__ __forceinline__ int column(int q) const { return lane + kWarp * q; }
  // Whether column q's token comes before row r's, in (key descending, index ascending).
  __device__ __forceinline__ bool is_before(int q, unsigned theirs, int r, unsigned mine) const {
    const bool lower = q < r / 2 || (q == r / 2 && lane < warp + r % 2 * kClusterWarps);
    return lower ? theirs >= mine : theirs > mine;
  }
  // The lane's columns of a clip's keys, `rest` behind the last.
  __device__ __forceinline__ void load(unsigned (&keys)[kColumns], const unsigned* from,
                                       unsigned rest) const {
#pragma unroll
    for (int q = 0; q < kColumns; ++q) keys[q] = column(q) < count ? from[column(q)] : rest;
  }

  // Of the warp's tokens lane r gets: the smallest d² to a usable token before token(r), where
  // `keys` are 0 for unusable tokens.
  __device__ __forceinline__ float nearest_before(const unsigned (&keys)[kColumns],
                                                  const unsigned* all) const {
    float own = INFINITY;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (token(r) >= count) continue;
      const unsigned mine = all[token(r)];
      float low = INFINITY;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) {
        if (is_before(q, keys[q], r, mine)) low = fminf(low, square[r][q]);
      }
      low = lowest_of_warp(low);
      if (lane == r) own = low;
    }
    return own;
  }

  // Likewise how many tokens come before token(r).
  __device__ __forceinline__ unsigned count_before(const unsigned (&keys)[kColumns],
                                                   const unsigned* all) const {
    unsigned own = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (token(r) >= count) continue;
      const unsigned mine = all[token(r)];
      unsigned before = 0;
#pragma unroll
      for (int q = 0; q < kColumns; ++q) before += is_before(q, keys[q], r, mine);
      before = __reduce_add_sync(kAllLanes, before);
      if (lane == r) own = before;
    }
    return own;
  }
};

// δ, centres and clusters of a clip, from its d² and densities. Every block of a clip finds all of
// them, and merges its own 32 · V channels.
template <class T, int V>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_clip(DistancePass pass, Merge merge, int slices) {
  SharedMemory shared;
  const int count = pass.tokens;
  bool* const usable = shared.take<bool>(count);
  unsigned* const density_keys = shared.take<unsigned>(count);
  unsigned* const center_keys = shared.take<unsigned>(count);
  int* const center_of = shared.take<int>(count);
  unsigned* const keys = shared.take<unsigned>(count);
  unsigned* const sorted = shared.take<unsigned>(count);
  int* const starts = shared.take<int>(pass.clusters + 1);
  int* const centers = shared.take<int>(pass.clusters);
  const int64_t clip = blockIdx.x / slices, base = clip * count;
  const int slice = static_cast<int>(blockIdx.x % slices);
  const bool writes = slice == 0;

  ClipView view{count, warp_id(), lane_id(), {}};
#pragma unroll
  for (int r = 0; r < ClipView::kRows; ++r) {
    const float* const row = pass.matrix + (base + view.token(r)) * count;
#pragma unroll
    for (int q = 0; q < ClipView::kColumns; ++q) {
      const bool there = view.token(r) < count && view.column(q) < count;
      view.square[r][q] = there ? row[view.column(q)] : INFINITY;
    }
  }
  for (int i = threadIdx.x; i < count; i += kClusterThreads) {
    density_keys[i] = ordered(pass.log_density[base + i]);
    usable[i] = pass.usable[base + i];
  }
  __syncthreads();
  // Lane r writes what is found of the warp's row r.
  const int own = view.token(view.lane);
  const bool keeps = view.lane < ClipView::kRows && own < count;
  const bool own_usable = keeps && usable[own];

  unsigned of_columns[ClipView::kColumns];
  view.load(of_columns, density_keys, 0);
  unsigned highest = 0, peak = ~0u;  // the token before which none comes
#pragma unroll
  for (int q = 0; q < ClipView::kColumns; ++q) highest = max(highest, of_columns[q]);
  highest = __reduce_max_sync(kAllLanes, highest);
#pragma unroll
  for (int q = 0; q < ClipView::kColumns; ++q) {
    if (view.column(q) >= count) continue;
    if (of_columns[q] == highest) peak = min(peak, static_cast<unsigned>(view.column(q)));
    if (!usable[view.column(q)]) of_columns[q] = 0;  // before none
  }
  peak = __reduce_min_sync(kAllLanes, peak);
  float square = view.nearest_before(of_columns, density_keys);
  if (static_cast<int>(peak) % kClusterWarps == view.warp) {
    const float far = peak_square(pass, clip, static_cast<int>(peak));
    if (own == static_cast<int>(peak)) square = far;
  }
  if (keeps) {
    const float delta = own_usable ? sqrtf(square / pass.unit) : 0.0f;
    if (writes) pass.delta[base + own] = delta;
    // Unusable tokens come last.
    center_keys[own] = own_usable ? ordered(pass.log_density[base + own] + logf(delta)) : 0;
  }
  __syncthreads();

  view.load(of_columns, center_keys, 0);
  const unsigned rank = view.count_before(of_columns, center_keys);
  const bool is_center = keeps && rank < static_cast<unsigned>(pass.clusters);
  if (keeps) center_of[own] = is_center ? static_cast<int>(rank) : -1;
  if (is_center) centers[rank] = own;
  __syncthreads();
  label_tokens(pass, clip, writes, centers, center_of, usable, keys);
  if (!merge.sums.weights) return;
  sort_by_cluster(keys, count, pass.clusters, sorted, starts);
  merge_slice<T, V>(merge, clip, count, pass.clusters, slice, sorted, starts);
}

}  // namespace cmpose
