// The gradient of attention over the up to 208 tokens of a frame, in one launch.
//
// A block takes items (one head of one frame) one after another, 16 queries a step:
//
//   Sᵀ = K Qᵀ, dPᵀ = V dOᵀ         [keys, 16 queries]: seven warps own the keys, up to 32 each
//   P = softmax(S), δ = Σ P∘dP     over the keys, so over the warps
//   dV += Pᵀ dO, dK += dSᵀ Q       with dS = P∘(dP − δ + dl); the sums stay in registers
//   dQ = dS K                      by the eighth warp, from dS in shared memory
//
// One barrier ends a step. In step n the owners compute Sᵀ and dPᵀ of 16 queries and tell their
// keys' maximum, Σ exp and Σ exp∘dP; in step n + 1 they know P and dS of those queries; in step n +
// 2 the eighth warp computes their dQ. As all keys of a row are on the chip, neither the output nor
// its log-sum-exp is read. No sum depends on which warp is first.
//
// The accumulator of a product [keys, queries] lies in the registers as the left operand of the
// next product, [keys, channels], does; the same four words of a tile of dSᵀ go to shared memory.
#include <algorithm>
#include <cmath>

#include "launch.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;    // queries of a step, and keys of a tile
constexpr int kTiles = 13;   // 208 keys
constexpr int kOwners = 7;   // warps that own keys: of owner w tiles w and w + 7
constexpr int kOwned = 2;    // tiles, at most
constexpr int kPlaces = 16;  // items whose places are known, a power of two
constexpr int kPlacesAhead = 8;
constexpr float kLog2E = 1.4426950408889634f;

struct Problem : SpatialAttentionBackward {
  int q_row, k_row, v_row, grad_row;  // strides of their tokens
  int tiles;                          // of keys; also steps that compute a product with the queries
  int steps;                          // of an item
  int share;                          // items of a block; the first `rest` blocks have one more
  int rest;
  float factor;  // of q kᵀ, not negative: a negative scale changes the sign of q kᵀ
  int plain;     // queries of a frame whose products need no change of sign: all, or none
};

// Where an item's matrices begin, in elements but for Q and dO, and how many of its tokens count.
struct Place {
  const void *q, *grad;
  int64_t k, v, out, rows;
  int count;
};

// What lies where in shared memory, in bytes. Of 64 channels the owners hold their K and V in
// registers; meanwhile the next item's K is copied, and its V loaded as soon as the last one is
// done with. Of 80 they read both again at each step, and an item's copies wait for the one before.
template <int D>
struct Layout {
  static constexpr bool kHolds = D == 64;
  static constexpr int kPieces = D / 8;  // of a row, 16 bytes each
  static constexpr int kTile = kRows * D * 2;
  static constexpr int kMatrix = kTiles * kTile;
  static constexpr int kRing = kHolds ? 7 : 3;  // steps whose Q and dO are here
  static constexpr int kSecond = kMatrix;       // another item's K, or V
  static constexpr int kSteps = 2 * kMatrix;
  static constexpr int kStepBytes = 2 * kTile;
  static constexpr int kChange = kSteps + kRing * kStepBytes;         // dSᵀ of a step
  static constexpr int kSums = kChange + kTiles * kRows * kRows * 2;  // what owners tell, and dl
  static constexpr int kHalf = kSums + (8 * 3 + 1) * kRows * 4 - kChange;  // another step's
  static constexpr int kPlacesAt = kChange + 2 * kHalf;
  static constexpr int kBytes = kPlacesAt + kPlaces * static_cast<int>(sizeof(Place));

  // Where a piece of a row lies in its matrix. Eight neighbouring rows' same pieces share no banks;
  // of 64 channels, nor do the halves of two rows.
  static __device__ __forceinline__ int at(int row, int piece) {
    const int other = kHolds ? (row & 1) << 2 | (row >> 1 & 3) : row >> 2 & 1;
    return row * D * 2 + (piece ^ other) * 16;
  }
  // From there, in a matrix that begins at a multiple of 128 bytes, 2 · part pieces on, where piece
  // was 0 or 1 (4 · n on, where it was less than 4 and part is 2 n).
  static __device__ __forceinline__ int along(int at, int part) {
    return kHolds ? at ^ part * 32 : at + part * 32;
  }
};

// What an owner holds between steps.
template <int D>
struct Owner {
  static constexpr int kParts = Layout<D>::kHolds ? D / 16 : 0;
  float dk[kOwned][D / 8][4], dv[kOwned][D / 8][4];
  float s[kOwned][2][4], dp[kOwned][2][4];  // exp2 of the logits, less their maximum; dP
  float top;                                // that maximum, of a lane's query
  // Whether `k` has a tile. Both would leave too few registers for all else.
  static __device__ __forceinline__ constexpr bool holds_key(int tile) { return tile == 0; }
  uint32_t k[kOwned][kParts + 1][4], v[kOwned][kParts + 1][4];
};

// Where an owner tells what of a query, in floats: Σ exp (0), Σ exp∘dP (1), the maximum (2). A lane
// reads what four owners tell of one query at once. What one owner tells of all 16 lies in 16
// banks, and in 16 others of 0 and of 1; so the four are in another order for some queries, and
// for 1.
__device__ __forceinline__ int told_of(int what, int query) {
  return what * 8 * kRows + query * 4 + query / 8 + what % 2 * 2;
}
__device__ __forceinline__ int told_by(int owner) { return owner / 4 * 4 * kRows + owner % 4; }
constexpr int kLseAt = 3 * 8 * kRows;  // and there the gradients of the log-sum-exp begin

// The query that a lane speaks for, as does the one 16 lanes on. A lane of the products' results
// has queries 2 · mine, the next, and these plus 8: those of lanes mine, mine + 4, mine + 8, mine
// + 12.
__device__ __forceinline__ int query_of(int lane) {
  return lane / 8 % 2 * 8 + lane % 4 * 2 + lane / 4 % 2;
}

// A lane's part of the address of 16 rows that are loaded
struct Lanes {
  int rows;     // as the left operand of a product over channels, or the right one over rows,
  int columns;  // as the right operand of a product over channels;
  int told;     // and of the address of what it tells, in floats.
};
template <int D>
__device__ __forceinline__ Lanes find_lanes() {
  const int lane = lane_id();
  return {forgotten(Layout<D>::at(lane % 16, lane / 16)),
          forgotten(Layout<D>::at(lane % 8 + lane / 16 * 8, lane / 8 % 2)),
          forgotten(told_of(lane / 16, query_of(lane)))};
}
// Of the 16 rows from byte `at` on, with a lane's part, channels 16 · part and the next 15.
template <int D>
__device__ __forceinline__ void load_left(uint32_t (&a)[4], int at, int part) {
  ldmatrix_x4(a, cmpose_shared + Layout<D>::along(at, part));
}
template <int D>
__device__ __forceinline__ void load_right(uint32_t (&b)[4], int at, int part) {
  ldmatrix_x4_trans(b, cmpose_shared + Layout<D>::along(at, part));
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  mma_16x8x16<std::is_same<T, bf16>::value>(c, a, b0, b1);
}

// The role of a warp: an owner, or kOwners for the one that computes dQ. Warps of one quarter of an
// SM are four apart: that one, with most of the work, shares its quarter with the owner of one
// tile.
__device__ __forceinline__ int owner_of(int warp) {
  return warp == 3 ? kOwners - 1 : warp - (warp > 3) + (warp == 7);
}

// -- copies ---------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void find_place(const Problem& p, int number, int channels,
                                           Place* places) {
  const int block = static_cast<int>(blockIdx.x);
  const int item = block * p.share + min(block, p.rest) + number;
  const int frame = item / p.heads, head = item - frame * p.heads;
  const int clip = frame / p.frames, time = frame - clip * p.frames;
  const auto begin = [&](const HeadStrides& strides) {
    return clip * strides.clip + time * strides.frame + head * strides.head;
  };
  Place& place = places[number % kPlaces];
  place.q = static_cast<const T*>(p.q) + begin(p.q_strides);
  place.grad = static_cast<const T*>(p.grad) + begin(p.grad_strides);
  place.k = begin(p.k_strides);
  place.v = begin(p.v_strides);
  place.out = int64_t(frame) * p.tokens * p.out_stride + head * channels;
  place.rows = int64_t(item) * p.tokens;
  const int64_t length = p.lengths ? p.lengths[frame] : p.tokens;
  place.count = static_cast<int>(length < 0 ? 0 : length > p.tokens ? p.tokens : length);
}

// Begins the copy of Q and dO of a step's queries to byte `step`; zeros for padding.
template <class T, int D>
__device__ __forceinline__ void copy_step(const Problem& p, const Place& place, int first,
                                          int step) {
  using L = Layout<D>;
  constexpr int kCopies = 2 * kRows * L::kPieces;
#pragma unroll
  for (int begin = 0; begin < kCopies; begin += kThreads) {
    const int x = begin + forgotten(threadIdx.x);
    if (begin + kThreads > kCopies && x >= kCopies) break;
    const bool upstream = x >= kRows * L::kPieces;
    const int row = first + x / L::kPieces % kRows, piece = x % L::kPieces;
    const T* const from = static_cast<const T*>(upstream ? place.grad : place.q);
    const int stride = upstream ? p.grad_row : p.q_row;
    cp_async_16(cmpose_shared + step + L::at(x / L::kPieces, piece),
                from + (row * stride + piece * 8), row < place.count);
  }
}

// Begins the copy of K, or V, into `matrix`: from where the item's begins, with the stride of its
// tokens; zeros for padding.
template <class T, int D>
__device__ __forceinline__ void copy_matrix(const void* source, int64_t begin, int stride,
                                            int count, int tiles, int matrix) {
  using L = Layout<D>;
  const T* const from = static_cast<const T*>(source) + begin;
#pragma unroll 1
  for (int x = forgotten(threadIdx.x); x < tiles * kRows * L::kPieces; x += kThreads) {
    const int row = x / L::kPieces, piece = x % L::kPieces;
    const bool present = row < count;
    cp_async_16(cmpose_shared + matrix + L::at(row, piece),
                from + (present ? row * stride : 0) + piece * 8, present);
  }
}
template <class T, int D>
__device__ __forceinline__ void copy_keys(const Problem& p, const Place& place, int matrix) {
  copy_matrix<T, D>(p.k, place.k, p.k_row, place.count, p.tiles, matrix);
}
template <class T, int D>
__device__ __forceinline__ void copy_values(const Problem& p, const Place& place, int matrix) {
  copy_matrix<T, D>(p.v, place.v, p.v_row, place.count, p.tiles, matrix);
}

// An owner's V. In its products channels come in another order: a lane of four has 8 neighbouring
// ones, 16 bytes, of every 32, where ldmatrix would give it 2 of every 8.
template <class T, int D, int TILES>
__device__ __forceinline__ void load_values(const Problem& p, const Place& place, int owner,
                                            Owner<D>& own) {
  const int lane = forgotten(lane_id());
  const T* const from = static_cast<const T*>(p.v) + place.v + lane % 4 * 8;
  // 0, which ptxas does not know: without an instruction that changes them it would leave the words
  // where they were loaded and move them before every product.
  const uint32_t none = static_cast<uint32_t>(p.tiles) >> 31;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int high = 0; high < 2; ++high) {
      const int row = (owner + kOwners * tile) * kRows + 8 * high + lane / 4;
#pragma unroll
      for (int half = 0; half < D / 32; ++half) {
        uint4 words{0, 0, 0, 0};
        if (row < place.count) {
          words = *reinterpret_cast<const uint4*>(from + row * p.v_row + 32 * half);
        }
        own.v[tile][2 * half][high] = words.x ^ none;
        own.v[tile][2 * half][high + 2] = words.y ^ none;
        own.v[tile][2 * half + 1][high] = words.z ^ none;
        own.v[tile][2 * half + 1][high + 2] = words.w ^ none;
      }
    }
  }
}

// Stores 16 rows of a gradient, but padding. Four lanes that hold two neighbouring channels each of
// four pieces exchange them first, so that each stores a piece, 16 bytes.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Problem& p, void* out, const Place& place,
                                           int first, const float (&sums)[D / 8][4], float factor) {
  constexpr int kPieces = D / 8;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int lane = forgotten(lane_id()), mine = lane % 4, row = first + 8 * high + lane / 4;
    T* const to = static_cast<T*>(out) + place.out + int64_t(row) * p.out_stride;
#pragma unroll
    for (int begin = 0; begin < kPieces; begin += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (begin + n < kPieces) {
          const float(&pair)[4] = sums[begin + n < kPieces ? begin + n : 0];
          words[n] = pair_from(T{}, pair[2 * high] * factor, pair[2 * high + 1] * factor);
        }
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if (n & bit) continue;
          const uint32_t given = mine & bit ? words[n] : words[n | bit];
          const uint32_t got = __shfl_xor_sync(kAllLanes, given, bit);
          (mine & bit ? words[n] : words[n | bit]) = got;
        }
      }
      if (row < place.count && begin + mine < kPieces) {
        *reinterpret_cast<uint4*>(to + (begin + mine) * 8) =
            uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

// The gradients of padding are 0.
template <class T, int D>
__device__ __forceinline__ void clear_padding(const Problem& p, const Place& place) {
  constexpr int kPieces = D / 8;
  for (int x = threadIdx.x; x < (p.tokens - place.count) * kPieces; x += kThreads) {
    const int row = place.count + x / kPieces, piece = x % kPieces;
    const int64_t at = place.out + int64_t(row) * p.out_stride + piece * 8;
    for (void* const out : {p.dq, p.dk, p.dv}) {
      *reinterpret_cast<uint4*>(static_cast<T*>(out) + at) = uint4{0, 0, 0, 0};
    }
  }
}

// -- a step of an owner ---------------------------------------------------------------------------

// Sᵀ and dPᵀ of the keys of this warp and the 16 queries at `step` in shared memory.
template <class T, int D, int TILES>
__device__ __forceinline__ void products(Owner<D>& own, int owner, int keys, int step,
                                         Lanes lanes) {
  using L = Layout<D>;
  const int lane = forgotten(lane_id()), group = lane / 4, mine = lane % 4;
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) own.s[tile][i / 4][i % 4] = own.dp[tile][i / 4][i % 4] = 0.0f;
  }
#pragma unroll
  for (int part = 0; part < D / 16; ++part) {
    uint32_t b[4], g[4], a[4];
    load_left<D>(b, step + lanes.columns, part);
    if constexpr (!L::kHolds) load_left<D>(g, step + L::kTile + lanes.columns, part);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      if constexpr (L::kHolds) {
        const bool held = own.holds_key(tile);
        if (!held) load_left<D>(a, keys + (owner + kOwners * tile) * L::kTile + lanes.rows, part);
        const uint32_t(&left)[4] = held ? own.k[tile][part] : a;
        multiply<T>(own.s[tile][0], left, b[0], b[1]);
        multiply<T>(own.s[tile][1], left, b[2], b[3]);
      } else {
        const int first = (owner + kOwners * tile) * L::kTile + lanes.rows;
        load_left<D>(a, keys + first, part);
        multiply<T>(own.s[tile][0], a, b[0], b[1]);
        multiply<T>(own.s[tile][1], a, b[2], b[3]);
        load_left<D>(a, L::kSecond + first, part);
        multiply<T>(own.dp[tile][0], a, g[0], g[1]);
        multiply<T>(own.dp[tile][1], a, g[2], g[3]);
      }
    }
  }
  if constexpr (L::kHolds) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i % 2, half = i / 2;
      const uint4 words = *reinterpret_cast<const uint4*>(
          cmpose_shared + L::along(step + L::kTile + 8 * n * D * 2 + L::at(group, mine), 2 * half));
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        multiply<T>(own.dp[tile][n], own.v[tile][2 * half], words.x, words.y);
        multiply<T>(own.dp[tile][n], own.v[tile][2 * half + 1], words.z, words.w);
      }
    }
  }
}

// From products to exp2(logits − their maximum), and what the other owners need of them.
template <class T, int D, int TILES>
__device__ __forceinline__ void tell(const Problem& p, Owner<D>& own, int owner, int first,
                                     int count, int lane_told, float* sums) {
  const int lane = forgotten(lane_id()), group = lane / 4, mine = lane % 4;
  if (first + kRows > min(count, p.plain)) {
#pragma unroll
    for (int i = 0; i < TILES * 8; ++i) {
      float& s = own.s[i / 8][i / 4 % 2][i % 4];
      if (p.scale < 0.0f) s = -s;
      // Queries behind the last one add nothing, whatever K and V are.
      if (first + i / 4 % 2 * 8 + 2 * mine + i % 2 >= count) {
        s = own.dp[i / 8][i / 4 % 2][i % 4] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int key = (owner + kOwners * tile) * kRows;
    if (key + kRows > count) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (key + i % 4 / 2 * 8 + group >= count) own.s[tile][i / 4][i % 4] = -INFINITY;
      }
    }
  }
  // Of four queries, 2 · mine, the next, and these plus 8, the eight lanes that have these find the
  // maximum, each that of one query, and share it.
  float tops[4], told[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    tops[i] = fmaxf(own.s[0][i / 2][i % 2], own.s[0][i / 2][i % 2 + 2]);
    if (TILES == 2) {
      tops[i] =
          fmaxf(tops[i], fmaxf(own.s[TILES - 1][i / 2][i % 2], own.s[TILES - 1][i / 2][i % 2 + 2]));
    }
  }
#pragma unroll
  for (int bit = 8, left = 2; bit >= 4; bit /= 2, left /= 2) {
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float given = lane & bit ? tops[i] : tops[left + i];
      const float kept = lane & bit ? tops[left + i] : tops[i];
      tops[i] = fmaxf(kept, __shfl_xor_sync(kAllLanes, given, bit));
    }
  }
  float top = fmaxf(tops[0], __shfl_xor_sync(kAllLanes, tops[0], 16)) * p.factor;
  top = fmaxf(top, -3.4e38f);  // of masked keys alone, whose exp2 is 0 then
  // Over these lanes each then keeps one of eight sums: Σ exp, or Σ exp∘dP, of one query.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int n = i / 2, column = i % 2;
    const float least = __shfl_sync(kAllLanes, top, 4 * i + mine);
    float norm = 0.0f, delta = 0.0f;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
      for (int at = column; at < 4; at += 2) {
        const float power = exp2_fast(fmaf(own.s[tile][n][at], p.factor, -least));
        own.s[tile][n][at] = power;
        norm += power;
        delta += power * own.dp[tile][n][at];
      }
    }
    const float given = lane & 16 ? norm : delta;
    told[i] = (lane & 16 ? delta : norm) + __shfl_xor_sync(kAllLanes, given, 16);
  }
#pragma unroll
  for (int bit = 8, left = 2; bit >= 4; bit /= 2, left /= 2) {
#pragma unroll
    for (int i = 0; i < left; ++i) {
      const float given = lane & bit ? told[i] : told[left + i];
      const float kept = lane & bit ? told[left + i] : told[i];
      told[i] = kept + __shfl_xor_sync(kAllLanes, given, bit);
    }
  }
  float* const to = sums + (lane_told ^ told_by(owner));
  to[0] = told[0];
  if (lane < 16) to[2 * 8 * kRows] = top;
  own.top = top;
}

// What all owners told of a lane's query: this owner's exp2 times `share` is P, and dS is
// P (dP − `mean`). `own_top` is what it told itself.
__device__ __forceinline__ void join(const float* told, int lane_told, float own_top, bool lse,
                                     float& share, float& mean) {
  // Its query's first four owners; of a lane from 16 on, the last four.
  const float* const sums = told + (lane_told & 60) + (lane_told & 128) / 2;
  float tops[4], norms[4], deltas[4];
  const auto load = [&](float(&to)[4], int from) {
    const uint4 four = *reinterpret_cast<const uint4*>(sums + from);
    to[0] = __uint_as_float(four.x), to[1] = __uint_as_float(four.y);
    to[2] = __uint_as_float(four.z), to[3] = __uint_as_float(four.w);
  };
  load(norms, 0);
  load(deltas, 8 * kRows);
  load(tops, 2 * 8 * kRows);
  float top = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 16));
  float norm = 0.0f, delta = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float power = exp2_fast(tops[i] - top);
    norm += norms[i] * power;
    delta += deltas[i ^ 2] * power;
  }
  norm += __shfl_xor_sync(kAllLanes, norm, 16);
  delta += __shfl_xor_sync(kAllLanes, delta, 16);
  const float inverse = inverse_fast(norm);
  share = exp2_fast(own_top - top) * inverse;
  mean = delta * inverse;
  if (lse) mean -= told[kLseAt + (lane_told & 60) / 4];
}

// P and dS of the step before; dSᵀ goes to shared memory, dV and dK grow.
template <class T, int D, int TILES>
__device__ __forceinline__ void grow(const Problem& p, Owner<D>& own, int owner, int step,
                                     int change, Lanes lanes) {
  using L = Layout<D>;
  const int lane = forgotten(lane_id()), group = lane / 4, mine = lane % 4;
  float share, mean;
  join(reinterpret_cast<const float*>(cmpose_shared + change + L::kSums - L::kChange), lanes.told,
       own.top, p.grad_lse, share, mean);
  uint32_t weights[TILES][4], changes[TILES][4];
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float shares[2], means[2];
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      shares[column] = __shfl_sync(kAllLanes, share, 8 * n + 4 * column + mine);
      means[column] = __shfl_sync(kAllLanes, mean, 8 * n + 4 * column + mine);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int key = (owner + kOwners * tile) * kRows + group;
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const float* const dp = own.dp[tile][n] + 2 * high;
        const float first = own.s[tile][n][2 * high] * shares[0];
        const float second = own.s[tile][n][2 * high + 1] * shares[1];
        weights[tile][2 * n + high] = pair_from(T{}, first, second);
        changes[tile][2 * n + high] =
            pair_from(T{}, first * (dp[0] - means[0]), second * (dp[1] - means[1]));
        *reinterpret_cast<uint32_t*>(cmpose_shared + change + (key + 8 * high) * kRows * 2 +
                                     (n ^ group / 4) * 16 + mine * 4) = changes[tile][2 * n + high];
      }
    }
  }
#pragma unroll
  for (int part = 0; part < D / 16; ++part) {
    uint32_t b[4];
    load_right<D>(b, step + L::kTile + lanes.rows, part);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      multiply<T>(own.dv[tile][2 * part], weights[tile], b[0], b[1]);
      multiply<T>(own.dv[tile][2 * part + 1], weights[tile], b[2], b[3]);
    }
    load_right<D>(b, step + lanes.rows, part);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      multiply<T>(own.dk[tile][2 * part], changes[tile], b[0], b[1]);
      multiply<T>(own.dk[tile][2 * part + 1], changes[tile], b[2], b[3]);
    }
  }
}

template <class T, int D, int TILES>
__device__ __forceinline__ void store_keys(const Problem& p, const Place& place, int owner,
                                           Owner<D>& own) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int first = (owner + kOwners * tile) * kRows;
    store_rows<T, D>(p, p.dk, place, first, own.dk[tile], p.scale);
    store_rows<T, D>(p, p.dv, place, first, own.dv[tile], 1.0f);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) own.dk[tile][i / 4][i % 4] = own.dv[tile][i / 4][i % 4] = 0.0f;
  }
}

// -- a step of the eighth warp --------------------------------------------------------------------

template <class T, int D>
__device__ __forceinline__ void query_gradients(const Problem& p, const Place& place, int first,
                                                int keys, int change, Lanes lanes,
                                                float (&sums)[D / 8][4]) {
  const int lane = forgotten(lane_id());
  // The four 8×8 matrices of a tile: first 8 queries of 8 keys, next 8 queries; then of 8 more
  // keys.
  const int key = lane / 16 * 8 + lane % 8, half = lane / 8 % 2 ^ lane / 4 % 2;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) sums[i / 4][i % 4] = 0.0f;
#pragma unroll 1
  for (int tile = 0; tile < p.tiles; ++tile) {
    uint32_t a[4], b[4];
    ldmatrix_x4_trans(a, cmpose_shared + change + (tile * kRows + key) * kRows * 2 + half * 16);
#pragma unroll
    for (int part = 0; part < D / 16; ++part) {
      load_right<D>(b, keys + tile * Layout<D>::kTile + lanes.rows, part);
      multiply<T>(sums[2 * part], a, b[0], b[1]);
      multiply<T>(sums[2 * part + 1], a, b[2], b[3]);
    }
  }
  store_rows<T, D>(p, p.dq, place, first, sums, p.scale);
}

// -- the kernel -----------------------------------------------------------------------------------

// Where a block is.
struct Cursor {
  int item, step;    // the item counted from the block's first one
  int slot, before;  // the bytes of this step's Q and dO, and of those of the step before
  int half;          // added to the byte of what changes with every other step
  int done, of;      // steps done, of so many in a row that have queries

  __device__ __forceinline__ bool computes() const { return done < of; }
  __device__ __forceinline__ bool follows() const { return unsigned(done - 1) < unsigned(of); }
  __device__ __forceinline__ bool finishes() const { return done >= 2; }
};

template <class T, int D, int TILES>
__device__ __forceinline__ void owner_step(const Problem& p, const Place* places, Owner<D>& own,
                                           int owner, const Cursor& now, Lanes lanes) {
  using L = Layout<D>;
  if (now.follows()) {
    grow<T, D, TILES>(p, own, owner, now.before, L::kChange + L::kHalf - now.half, lanes);
    if (now.step == (L::kHolds ? 0 : p.tiles)) {
      store_keys<T, D, TILES>(p, places[(now.item - L::kHolds) % kPlaces], owner, own);
    }
  }
  if (!now.computes()) return;
  const Place& place = places[now.item % kPlaces];
  const int keys = L::kHolds ? now.item % 2 * L::kSecond : 0;
  if constexpr (L::kHolds) {
    if (now.step == 0) {
      load_values<T, D, TILES>(p, place, owner, own);
#pragma unroll
      for (int i = 0; i < TILES * D / 16; ++i) {
        const int tile = i / (D / 16), part = i % (D / 16);
        if (own.holds_key(tile)) {
          load_left<D>(own.k[tile][part], keys + (owner + kOwners * tile) * L::kTile + lanes.rows,
                       part);
        }
      }
    }
  }
  products<T, D, TILES>(own, owner, keys, now.slot, lanes);
  tell<T, D, TILES>(p, own, owner, now.step * kRows, place.count, lanes.told,
                    reinterpret_cast<float*>(cmpose_shared + L::kSums + now.half));
}

// What the eighth warp does in a step: dQ of the step before the last one.
template <class T, int D>
__device__ __forceinline__ void query_step(const Problem& p, const Place* places,
                                           float (&sums)[D / 8][4], const Cursor& now,
                                           Lanes lanes) {
  using L = Layout<D>;
  const Place& place = places[now.item % kPlaces];
  float dl = 0.0f;
  const int query = now.step * kRows + lane_id() % kRows;
  if (p.grad_lse && now.computes() && query < place.count) dl = p.grad_lse[place.rows + query];
  if (now.finishes()) {
    const bool behind = L::kHolds && now.step < 2;  // an item's end
    const int item = now.item - behind, step = now.step - 2 + behind * p.steps;
    query_gradients<T, D>(p, places[item % kPlaces], step * kRows,
                          L::kHolds ? item % 2 * L::kSecond : 0, L::kChange + now.half, lanes,
                          sums);
  }
  if (p.grad_lse && lane_id() < kRows) {
    reinterpret_cast<float*>(cmpose_shared + L::kSums + now.half)[kLseAt + lane_id()] = dl;
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1) attention_backward(const Problem p) {
  using L = Layout<D>;
  const int owner = owner_of(__shfl_sync(kAllLanes, warp_id(), 0));
  const int block = static_cast<int>(blockIdx.x), items = p.share + (block < p.rest);
  Place* const places = reinterpret_cast<Place*>(cmpose_shared + L::kPlacesAt);

  if (static_cast<int>(threadIdx.x) < min(items, kPlacesAhead)) {
    find_place<T>(p, threadIdx.x, D, places);
  }
  if (owner >= min(p.tiles, kOwners)) {  // for good
    for (int x = lane_id(); x < 2 * 3 * kRows; x += kWarp) {
      const int what = x / kRows % 3;
      float* const sums =
          reinterpret_cast<float*>(cmpose_shared + L::kSums + x / (3 * kRows) * L::kHalf);
      sums[told_of(what, x % kRows) ^ told_by(owner)] = what < 2 ? 0.0f : -INFINITY;
    }
  }
  __syncthreads();
  copy_keys<T, D>(p, places[0], 0);
  if constexpr (!L::kHolds) copy_values<T, D>(p, places[0], L::kSecond);
  int next = 0, next_item = 0;  // the step whose Q and dO are copied next
  const auto copy_next = [&](int to) {
    if (next_item < items) {
      copy_step<T, D>(p, places[next_item % kPlaces], next * kRows, to);
    }
    if (++next == p.tiles) next = 0, ++next_item;
  };
#pragma unroll 1
  for (int i = 0; i < L::kRing - 1; ++i) {
    copy_next(L::kSteps + i * L::kStepBytes);
    cp_async_commit();
  }
  cp_async_wait<0>();
  __syncthreads();

  Owner<D> own;
#pragma unroll
  for (int i = 0; i < kOwned * D / 2; ++i) {
    const int tile = i / (D / 2), at = i % (D / 2);
    own.dk[tile][at / 4][at % 4] = own.dv[tile][at / 4][at % 4] = 0.0f;
  }
  const Lanes lanes = find_lanes<D>();
  const int owned = owner < kOwners ? (owner < p.tiles) + (owner + kOwners < p.tiles) : 3;
  constexpr int kEnd = L::kSteps + L::kRing * L::kStepBytes;
  Cursor now{0, 0, L::kSteps, kEnd - L::kStepBytes, 0, 0, L::kHolds ? items * p.tiles : p.tiles};
  while (L::kHolds ? now.done < now.of + 2 : now.item < items) {
    const int role = forgotten(owner);
    if (owned == 2) {
      owner_step<T, D, 2>(p, places, own, role, now, lanes);
    } else if (owned == 1) {
      owner_step<T, D, 1>(p, places, own, role, now, lanes);
    } else if (owned == 3) {
      query_step<T, D>(p, places, own.dk[0], now, lanes);
    }
    if (L::kHolds && p.steps >= L::kRing) {
      cp_async_wait<L::kRing - 3>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();

    if (now.computes()) {
      copy_next(now.before);
      now.before = now.slot;
      now.slot = now.slot + L::kStepBytes < kEnd ? now.slot + L::kStepBytes : L::kSteps;
    }
    if (now.item + 1 < items) {
      const Place& following = places[(now.item + 1) % kPlaces];
      if constexpr (L::kHolds) {
        if (now.step == 1) copy_keys<T, D>(p, following, (now.item + 1) % 2 * L::kSecond);
      } else {
        if (now.step == p.tiles) copy_values<T, D>(p, following, L::kSecond);
        if (now.step == p.steps - 1) {
          copy_keys<T, D>(p, following, 0);
          cp_async_commit();
          cp_async_wait<0>();
          __syncthreads();
        }
      }
    }
    if (now.step == 0 && now.item < items) {
      if (p.lengths) clear_padding<T, D>(p, places[now.item % kPlaces]);
      if (threadIdx.x == kThreads - 1 && now.item + kPlacesAhead < items) {
        find_place<T>(p, now.item + kPlacesAhead, D, places);
      }
    }
    cp_async_commit();
    now.half = L::kHalf - now.half;
    ++now.done;
    if (++now.step == p.steps) {
      now.step = 0;
      if (!L::kHolds) now.done = 0;
      ++now.item;
    }
  }
}

}  // namespace

void spatial_attention_backward(const SpatialAttentionBackward& shape, Dtype dtype, int channels,
                                int blocks, void* stream) {
  const auto start = [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int D = decltype(width)::value;
    const int64_t items = shape.clips * shape.frames * shape.heads;
    if (items > 0x7fffffff) {
      throw std::runtime_error("spatial_attention_backward: " + std::to_string(items) +
                               " items are too many; split the batch");
    }
    const int used = static_cast<int>(std::min<int64_t>(std::max(blocks, 1), items));
    // Where K of the next item is copied from the second step on, it is needed two steps later at
    // the earliest; with one K, an item's last two steps are those that only finish what is begun.
    const int least = Layout<D>::kHolds ? 3 : 1, more = Layout<D>::kHolds ? 0 : 2;
    const int tiles = std::max(static_cast<int>(ceil_div(shape.tokens, kRows)), least);
    const Problem given{
        shape, static_cast<int>(shape.q_strides.token), static_cast<int>(shape.k_strides.token),
        static_cast<int>(shape.v_strides.token), static_cast<int>(shape.grad_strides.token), tiles,
        tiles + more, used ? static_cast<int>(items / used) : 0,
        used ? static_cast<int>(items % used) : 0,
        // Not 0, which times the infinite logits of masked keys would be NaN.
        std::min(std::max(std::fabs(shape.scale) * kLog2E, 1.2e-38f), 3e38f),
        shape.scale < 0.0f ? 0 : shape.tokens};
    launch("spatial_attention_backward", attention_backward<T, D>, used, kThreads,
           Layout<D>::kBytes, stream, given);
  };
  const auto with_width = [&](auto type) {
    if (channels == 64) return start(type, std::integral_constant<int, 64>{});
    if (channels == 80) return start(type, std::integral_constant<int, 80>{});
    throw std::invalid_argument("spatial_attention_backward takes 64 or 80 channels, got " +
                                std::to_string(channels));
  };
  if (shape.tokens < 1 || shape.tokens > kMaxAttentionTokens) {
    throw std::invalid_argument("spatial_attention_backward takes 1 to " +
                                std::to_string(kMaxAttentionTokens) + " tokens, got " +
                                std::to_string(shape.tokens));
  }
  if (dtype == Dtype::kBFloat16) return with_width(bf16{});
  if (dtype == Dtype::kFloat16) return with_width(fp16{});
  throw std::invalid_argument("spatial_attention_backward takes bfloat16 and float16");
}

std::map<std::string, unsigned> spatial_attention_backward_shared() {
  return {{"attention_backward<bf16, 64>", Layout<64>::kBytes},
          {"attention_backward<bf16, 80>", Layout<80>::kBytes},
          {"attention_backward<fp16, 64>", Layout<64>::kBytes},
          {"attention_backward<fp16, 80>", Layout<80>::kBytes}};
}

}  // namespace cmpose
