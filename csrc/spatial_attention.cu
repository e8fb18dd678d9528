// Attention over the up to 208 tokens of a frame: softmax(scale · q kᵀ) v, in one launch.
//
// An item is one head of one frame. A block takes every gridDim.x-th item. Its warps compute 16
// queries each against all of the item's keys, in as many rounds as the queries need, and each
// copies the same rows of K and V for all warps. A multiprocessor has registers for 8 warps: in two
// blocks of 4, which wait for each other at no barrier, where it has the shared memory for two, and
// in one block elsewhere. Three slots of shared memory hold a matrix each, and take turns:
//
//   slot 0   K of item 0      V of item 1      K of item 3 ...
//   slot 1   V of item 0      K of item 2      V of item 3
//   slot 2   K of item 1      V of item 2      K of item 4
//
// So while an item is computed the next one's K, then its V too, and its Q (straight into
// registers) are on their way. Barriers: between the products of the first round V has come, and
// between those of the last all warps have read K; at the item's end all have read V and the next K
// has come.
//
// All logits of a query are in registers at once, so that its softmax is exact and in one pass.
//
// In a product over channels, or over keys, the order of these does not matter, as long as both
// operands have the same. Channels are ordered so that a lane has 16 bytes side by side of every
// row of Q and K, keys so that eight lanes of such a load meet no bank twice (Order::key).
#include <algorithm>

#include "launch.cuh"

namespace cmpose {
namespace {

constexpr int kRows = 16;                           // queries of a tile
constexpr int kWarps = 8;                           // of a multiprocessor
constexpr unsigned kSystemShared = 1024;            // bytes that each block takes beside its own
constexpr int kKeyTiles = kMaxAttentionTokens / 8;  // of 8 keys
constexpr int kSlots = 3;
constexpr int kPlaces = 4;  // items whose places are known
constexpr float kLog2E = 1.4426950408889634f, kLog2 = 0.6931471805599453f;

// n / divisor for n below 2³¹.
struct Division {
  uint32_t divisor, factor, shift;

  explicit Division(int by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) /
                                   divisor) +
             1;
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * factor >> 32) + n) >> shift;
  }
};

struct Problem : SpatialAttention {
  Division by_heads, by_frames;
  int items, channels;
  bool options;  // there are lengths, or the log-sum-exp is wanted
};

// Where the 16-byte pieces of a matrix lie in its slot, and in which order a warp takes them.
template <int D>
struct Order {
  static_assert(D == 64 || D == 80, "other head dimensions need an order of their own");
  static constexpr int kPieces = D / 8;
  static constexpr int kPitch = D * 2;  // bytes
  static constexpr int kSlotBytes = kMaxAttentionTokens * kPitch;

  // The byte of a piece. The same piece of rows 0 to 7, and pieces 0 to 7 of a row, share no banks.
  // Eight rows further on it is 8 · kPitch further on.
  static __device__ __forceinline__ int at(int row, int piece) {
    return row * kPitch + (piece ^ (D == 64 ? row % 8 : row / 4 % 2)) * 16;
  }
  // From at(row, piece), where piece was 0 or 1, the byte of piece + 2 · pairs.
  static __device__ __forceinline__ int along(int at, int pairs) {
    return D == 64 ? at ^ pairs * 32 : at + pairs * 32;
  }
  // The key of column n of a tile. Pieces 0 to 3 of keys key(0) and key(1) share no banks, nor do
  // those of key(2) and key(3), ...
  static __device__ __forceinline__ int key(int n) {
    return D == 64 ? (n & 1) << 2 | n >> 1 : (n & 4) | (n & 1) << 1 | (n >> 1 & 1);
  }
};

// The part of lane's row that it takes for products over channels: words of two channels, a pair of
// words for every 16 channels.
template <int D>
struct Channels {
  uint32_t word[D / 8];

  // From where the row's piece `lane % 4` is; `next` is the one four pieces on, and `last` the
  // 8 bytes at 4 · (lane % 4) of pieces 8 and 9.
  __device__ __forceinline__ void load(const void* first, const void* next, const void* last) {
    take(*static_cast<const uint4*>(first), 0);
    take(*static_cast<const uint4*>(next), 4);
    if constexpr (D == 80) {
      const uint2 two = *static_cast<const uint2*>(last);
      word[8] = two.x;
      word[9] = two.y;
    }
  }

 private:
  __device__ __forceinline__ void take(const uint4& four, int from) {
    word[from] = four.x;
    word[from + 1] = four.y;
    word[from + 2] = four.z;
    word[from + 3] = four.w;
  }
};

// Where an item's matrices begin, in elements, and its result; how many of its keys count.
struct alignas(16) Place {
  int64_t q, k, v, out, lse;
  int count;
};

// One lane finds the place of the block's item `turn`. Behind the last it is the first item without
// keys, of which nothing is copied.
__device__ __forceinline__ void find_place(const Problem& p, int turn, Place* places) {
  const int64_t wanted = int64_t{turn} * gridDim.x + blockIdx.x;
  const bool there = wanted < p.items;
  const int item = there ? static_cast<int>(wanted) : 0;
  const uint32_t frame = p.by_heads(item), head = item - frame * p.heads;
  const uint32_t clip = p.by_frames(frame), time = frame - clip * p.frames;
  const auto begin = [&](const HeadStrides& strides) {
    return clip * strides.clip + time * strides.frame + head * strides.head;
  };
  Place& place = places[turn % kPlaces];
  place.q = begin(p.q_strides);
  place.k = begin(p.k_strides);
  place.v = begin(p.v_strides);
  place.out = (int64_t{frame} * p.tokens * p.heads + head) * p.channels;
  place.lse = int64_t{item} * p.tokens;
  int64_t count = p.tokens;
  if (p.lengths) count = p.lengths[frame];
  count = count < 0 ? 0 : count > p.tokens ? p.tokens : count;
  place.count = there ? static_cast<int>(count) : 0;
}

// This thread's lane, of which the compiler knows no more than that.
__device__ __forceinline__ int any_lane() { return forgotten(lane_id()) & (kWarp - 1); }

// The first row of a warp's tile.
template <int WARPS>
__device__ __forceinline__ int first_row(int tile) {
  return (warp_id() + WARPS * tile) * kRows;
}

// Calls `function` for each piece that this lane has of the 16 rows from `first` on: with the row,
// the piece, and the byte in a slot.
template <int D, class F>
__device__ __forceinline__ void for_pieces(int first, F function) {
  using O = Order<D>;
  const int lane = any_lane(), begin = first * O::kPitch;
#pragma unroll
  for (int i = 0; i < kRows / 4; ++i) {
    const int row = 4 * (i % 2) + lane / 8, piece = lane % 8;
    function(first + row + i / 2 * 8, piece, begin + i / 2 * 8 * O::kPitch + O::at(row, piece));
  }
  if constexpr (D == 80) {
    const int row = lane / 2, piece = 8 + lane % 2;
    function(first + row, piece, begin + O::at(row, piece));
  }
}

// Begins the copy of this warp's rows of K or V into a slot; zeros for keys that do not count.
template <class T, int D, int WARPS>
__device__ __forceinline__ void copy_rows(const void* matrix, int64_t place, int64_t stride,
                                          int count, int slot) {
  const int pitch = static_cast<int>(stride);
  const T* const rows = static_cast<const T*>(matrix) + place;
#pragma unroll
  for (int tile = 0; tile * WARPS * kRows < kMaxAttentionTokens; ++tile) {
    const int first = first_row<WARPS>(tile);
    if (first >= kMaxAttentionTokens) continue;
    for_pieces<D>(first, [&](int row, int piece, int at) {
      cp_async_16(cmpose_shared + slot + at, rows + (row * pitch + piece * 8), row < count);
    });
  }
  cp_async_commit();
}

// Loads the queries of a tile: rows lane / 4 and 8 more. Those behind the last are the last again.
template <class T, int D, int WARPS>
__device__ __forceinline__ void load_queries(const Problem& p, int64_t place, int tile,
                                             Channels<D> (&q)[2]) {
  const int lane = any_lane(), first = first_row<WARPS>(tile) + lane / 4;
  const T* const from = static_cast<const T*>(p.q) + place;
  const int pitch = static_cast<int>(p.q_strides.token);
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const T* const row = from + (min(first + 8 * high, p.tokens - 1) * pitch + lane % 4 * 8);
    q[high].load(row, row + 32, row + 64 - lane % 4 * 4);
  }
}

template <class T>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  mma_16x8x16<std::is_same<T, bf16>::value>(c, a, b0, b1);
}

// Queries as left operands; −q if the scale is negative, so that the largest q kᵀ is the largest
// logit. Without an instruction that changes them ptxas would leave the words where they were
// loaded and move them before every product.
template <int D>
__device__ __forceinline__ void as_left(const Channels<D> (&q)[2], float scale,
                                        uint32_t (&left)[D / 16][4]) {
  const uint32_t signs = scale < 0.0f ? 0x80008000u : 0u;
#pragma unroll
  for (int part = 0; part < D / 16; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) left[part][i] = q[i % 2].word[2 * part + i / 2] ^ signs;
  }
}

// q kᵀ of all keys.
template <class T, int D>
__device__ __forceinline__ void multiply_keys(const uint32_t (&q)[D / 16][4], int slot,
                                              float (&logits)[kKeyTiles][4]) {
  using O = Order<D>;
  const int lane = any_lane(), row = O::key(lane / 4), mine = lane % 4;
  const unsigned char* const low = cmpose_shared + slot + O::at(row, mine);
  const unsigned char* const high = cmpose_shared + slot + O::at(row, mine + 4);
  const unsigned char* const last = cmpose_shared + slot + O::at(row, 8 + mine / 2) + mine % 2 * 8;
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    const int at = 8 * n * O::kPitch;
    Channels<D> k;
    k.load(low + at, high + at, last + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) logits[n][i] = 0.0f;
#pragma unroll
    for (int part = 0; part < D / 16; ++part) {
      multiply<T>(logits[n], q[part], k.word[2 * part], k.word[2 * part + 1]);
    }
  }
}

// −∞ in place of the logits of tiles FROM to TO − 1's keys from `count` on.
template <int D, int FROM, int TO>
__device__ __forceinline__ void mask(float (&logits)[kKeyTiles][4], int count) {
  const int mine = any_lane() % 4 * 2;
#pragma unroll
  for (int n = FROM; n < TO; ++n) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool counts = 8 * n + Order<D>::key(mine + i) < count;
      logits[n][i] = counts ? logits[n][i] : -INFINITY;
      logits[n][i + 2] = counts ? logits[n][i + 2] : -INFINITY;
    }
  }
}

// weights = exp2(logits · scale − least), in 16 bits, where `least` is what the largest logit of
// the query gives; and their sums before they are rounded, over the four lanes of a query.
template <class T>
__device__ __forceinline__ void weigh(const float (&logits)[kKeyTiles][4], float scale,
                                      uint32_t (&weights)[kKeyTiles][2], float (&least)[2],
                                      float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY, sums[2] = {};
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      top = fmaxf(top, fmaxf(logits[n][2 * r], logits[n][2 * r + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    least[r] = top * scale;
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      const float a = exp2_fast(fmaf(logits[n][2 * r], scale, -least[r]));
      const float b = exp2_fast(fmaf(logits[n][2 * r + 1], scale, -least[r]));
      sums[0] += a;
      sums[1] += b;
      weights[n][r] = pair_from(T{}, a, b);
    }
    sum[r] = sums[0] + sums[1];
    sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
    sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
  }
}

// sums = weights · V of all keys.
template <class T, int D>
__device__ __forceinline__ void mix(const uint32_t (&weights)[kKeyTiles][2], int slot,
                                    float (&sums)[D / 8][4]) {
  using O = Order<D>;
  const int lane = any_lane(), matrix = lane / 8;  // of four: 8 keys, 8 more; then one piece on
  const int begin = slot + matrix % 2 * 8 * O::kPitch + O::at(O::key(lane % 8), matrix / 2);
#pragma unroll
  for (int n = 0; n < kKeyTiles; n += 2) {
    const uint32_t a[4] = {weights[n][0], weights[n][1], weights[n + 1][0], weights[n + 1][1]};
#pragma unroll
    for (int pair = 0; pair < O::kPieces / 2; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, cmpose_shared + O::along(begin, pair) + 8 * n * O::kPitch);
      multiply<T>(sums[2 * pair], a, b[0], b[1]);
      multiply<T>(sums[2 * pair + 1], a, b[2], b[3]);
    }
  }
}

// Stores 16 rows of the result. Four lanes that hold two neighbouring channels each of four pieces
// exchange them first, so that each stores a piece, 16 bytes.
template <class T, int D>
__device__ __forceinline__ void store_rows(const Problem& p, int64_t place, int first,
                                           const float (&sums)[D / 8][4], const float (&by)[2]) {
  constexpr int kPieces = D / 8;
  const int lane = any_lane(), mine = lane % 4, pitch = p.heads * D;
  T* const out = static_cast<T*>(p.out) + place;
#pragma unroll
  for (int high = 0; high < 2; ++high) {
    const int row = first + 8 * high + lane / 4;
#pragma unroll
    for (int begin = 0; begin < kPieces; begin += 4) {
      uint32_t words[4] = {};
#pragma unroll
      for (int n = 0; n < 4 && begin + n < kPieces; ++n) {
        const float(&four)[4] = sums[begin + n];
        words[n] = pair_from(T{}, four[2 * high] * by[high], four[2 * high + 1] * by[high]);
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
      if (row < p.tokens && begin + mine < kPieces) {
        *reinterpret_cast<uint4*>(out + (row * pitch + (begin + mine) * 8)) =
            uint4{words[0], words[1], words[2], words[3]};
      }
    }
  }
}

// All that was copied but the last group is here, and all warps are.
__device__ __forceinline__ void meet() {
  cp_async_wait<1>();
  __syncthreads();
}

// The slot behind a slot; both as their first byte.
template <int D>
__device__ __forceinline__ int after(int slot) {
  constexpr int kBytes = Order<D>::kSlotBytes;
  return slot == (kSlots - 1) * kBytes ? 0 : slot + kBytes;
}

template <class T, int D, int WARPS>
__device__ __forceinline__ void copy_keys(const Problem& p, int turn, int slot,
                                          const Place* places) {
  const Place& place = places[turn % kPlaces];
  copy_rows<T, D, WARPS>(p.k, place.k, p.k_strides.token, place.count, slot);
}
template <class T, int D, int WARPS>
__device__ __forceinline__ void copy_values(const Problem& p, int turn, int slot,
                                            const Place* places) {
  const Place& place = places[turn % kPlaces];
  copy_rows<T, D, WARPS>(p.v, place.v, p.v_strides.token, place.count, slot);
}

// Writes the log-sum-exp of a tile's queries, each by one of its four lanes; −∞ where they are
// padding.
__device__ __forceinline__ void store_lse(const Problem& p, const Place& place, int first,
                                          const float (&least)[2], const float (&sum)[2]) {
  const int lane = any_lane(), high = lane % 2, row = first + 8 * high + lane / 4;
  if (lane % 4 >= 2 || row >= p.tokens) return;
  const float lse = ((high ? least[1] : least[0]) + log2_fast(high ? sum[1] : sum[0])) * kLog2;
  p.lse[place.lse + row] = row < place.count ? lse : -INFINITY;
}

// Queries that are padding get 0.
template <int D>
__device__ __forceinline__ void clear_padding(int first, int count, float (&sums)[D / 8][4],
                                              float (&by)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (first + 8 * r + any_lane() / 4 < count) continue;
    by[r] = 0.0f;
#pragma unroll
    for (int piece = 0; piece < D / 8; ++piece) sums[piece][2 * r] = sums[piece][2 * r + 1] = 0.0f;
  }
}

// A round: the result of 16 queries of each warp that has some. `q` are these, then those of the
// warp's next round.
template <class T, int D, int WARPS>
__device__ __forceinline__ void compute(const Problem& p, int turn, int round, bool last_round,
                                        int slot, float scale, Place* places, Channels<D> (&q)[2]) {
  const int first = first_row<WARPS>(round);
  const bool works = first < p.tokens;
  float logits[kKeyTiles][4];
  if (works) {
    uint32_t left[D / 16][4];
    as_left<D>(q, p.scale, left);
    multiply_keys<T, D>(left, slot, logits);
  }
  if (WARPS == kWarps || round == 0 || last_round) meet();
  if (last_round) {
    copy_values<T, D, WARPS>(p, turn + 1, slot, places);
    if (threadIdx.x == (WARPS - 1) * kWarp) find_place(p, turn + 3, places);
  }
  if (!works) return;
  const Place& place = places[turn % kPlaces];
  uint32_t weights[kKeyTiles][2];
  float least[2], sum[2], sums[D / 8][4] = {};
  if (place.count < kMaxAttentionTokens) {
    mask<D, kKeyTiles - 2, kKeyTiles>(logits, place.count);
    if (place.count < kMaxAttentionTokens - 16) mask<D, 0, kKeyTiles - 2>(logits, place.count);
  }
  weigh<T>(logits, scale, weights, least, sum);
  const int next = WARPS == kWarps ? 1 : round + 1;
  const bool other = !last_round && first_row<WARPS>(next) < p.tokens;
  load_queries<T, D, WARPS>(p, places[(turn + !other) % kPlaces].q, other ? next : 0, q);
  mix<T, D>(weights, after<D>(slot), sums);
  float by[2] = {inverse_fast(sum[0]), inverse_fast(sum[1])};
  if (p.options) {  // one test, so that without options a round has no more than this
    if (place.count < min(first + kRows, p.tokens)) clear_padding<D>(first, place.count, sums, by);
    if (p.lse) store_lse(p, place, first, least, sum);
  }
  store_rows<T, D>(p, place.out, first, sums, by);
}

template <class T, int D, int WARPS>
__global__ void __launch_bounds__(WARPS* kWarp, kWarps / WARPS)
    spatial_attention_forward(Problem p) {
  Place* const places = reinterpret_cast<Place*>(cmpose_shared + kSlots * Order<D>::kSlotBytes);
  const int turns = (p.items - 1 - static_cast<int>(blockIdx.x)) / static_cast<int>(gridDim.x) + 1;
  int rounds = 1;
#pragma unroll
  for (int n = WARPS * kRows; n < kMaxAttentionTokens; n += WARPS * kRows) rounds += p.tokens > n;
  // Not 0, which times the infinite logits of masked keys would be NaN.
  const float scale = fminf(fmaxf(fabsf(p.scale) * kLog2E, 1.2e-38f), 3e38f);
  if (threadIdx.x < 3) find_place(p, threadIdx.x, places);
  __syncthreads();
  Channels<D> q[2];
  copy_keys<T, D, WARPS>(p, 0, 0, places);
  copy_values<T, D, WARPS>(p, 0, after<D>(0), places);
  copy_keys<T, D, WARPS>(p, 1, after<D>(after<D>(0)), places);
  load_queries<T, D, WARPS>(p, places[0].q, 0, q);
  cp_async_wait<2>();
  __syncthreads();
  int slot = 0;
  for (int turn = 0; turn < turns; ++turn) {
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      const bool last_round = round + 1 == rounds;
      compute<T, D, WARPS>(p, turn, round, last_round, slot, scale, places, q);
    }
    meet();
    slot = after<D>(slot);
    copy_keys<T, D, WARPS>(p, turn + 2, slot, places);
    slot = after<D>(slot);
  }
}

template <int D>
constexpr unsigned shared_bytes() {
  return kSlots * Order<D>::kSlotBytes + kPlaces * sizeof(Place);
}

}  // namespace

void spatial_attention(const SpatialAttention& shape, Dtype dtype, int channels,
                       int multiprocessors, int shared, void* stream) {
  const int64_t items = shape.clips * shape.frames * shape.heads;
  if (items == 0 || shape.tokens == 0) return;
  if (shape.tokens > kMaxAttentionTokens || (channels != 64 && channels != 80) ||
      dtype == Dtype::kFloat32 || items + 4 * int64_t{multiprocessors} > 0x7fffffff) {
    throw std::invalid_argument("spatial_attention takes up to " +
                                std::to_string(kMaxAttentionTokens) +
                                " tokens of 64 or 80 channels in 16 bits");
  }
  const Problem problem{
      shape,    Division(shape.heads),     Division(shape.frames), static_cast<int>(items),
      channels, shape.lse || shape.lengths};
  const auto run = [&](auto one, auto two, unsigned bytes) {
    const bool halves = 2 * (bytes + kSystemShared) <= static_cast<unsigned>(shared);
    const int64_t blocks = int64_t{halves ? 2 : 1} * multiprocessors;
    launch("spatial_attention", halves ? two : one, std::min(items, blocks),
           (halves ? kWarps / 2 : kWarps) * kWarp, bytes, stream, problem);
  };
  const auto of_type = [&](auto number) {
    using T = decltype(number);
    channels == 64 ? run(spatial_attention_forward<T, 64, kWarps>,
                         spatial_attention_forward<T, 64, kWarps / 2>, shared_bytes<64>())
                   : run(spatial_attention_forward<T, 80, kWarps>,
                         spatial_attention_forward<T, 80, kWarps / 2>, shared_bytes<80>());
  };
  dtype == Dtype::kFloat16 ? of_type(fp16{}) : of_type(bf16{});
}

std::map<std::string, unsigned> spatial_attention_shared() {
  std::map<std::string, unsigned> bytes;
  for (const char* type : {"fp16", "bf16"}) {
    for (const char* warps : {"8", "4"}) {
      const std::string kernel = std::string("spatial_attention_forward<") + type + ", ";
      bytes[kernel + "64, " + warps + ">"] = shared_bytes<64>();
      bytes[kernel + "80, " + warps + ">"] = shared_bytes<80>();
    }
  }
  return bytes;
}

}  // namespace cmpose
