// Puts causal and merged tokens back into their cells of the grid; and the gradient.
#include "clusters.cuh"

namespace cmpose {
namespace {

constexpr int kThreads = 256;

// One warp copies one token's row, in pieces of type V.
template <class V>
__global__ void __launch_bounds__(kThreads)
    unmerge_forward(const V* __restrict__ causal, const V* __restrict__ merged,
                    const int64_t* __restrict__ causal_index,
                    const int64_t* __restrict__ noncausal_index,
                    const int64_t* __restrict__ assignment, V* __restrict__ tokens, int64_t rows,
                    int causal_count, int noncausal_count, int clusters, int pieces) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const int cells = causal_count + noncausal_count;
  const int64_t clip = row / cells;
  const int slot = static_cast<int>(row % cells);
  const V* from;
  int64_t cell;
  if (slot < causal_count) {
    const int64_t index = clip * causal_count + slot;
    cell = causal_index[index];
    from = causal + index * pieces;
  } else {
    const int64_t index = clip * noncausal_count + slot - causal_count;
    const int64_t cluster = assignment[index];
    if (cluster < 0 || cluster >= clusters) return;  // undefined, but never out of bounds
    cell = noncausal_index[index];
    from = merged + (clip * clusters + cluster) * pieces;
  }
  if (cell < 0 || cell >= cells) return;
  V* const to = tokens + (clip * cells + cell) * pieces;
  for (int i = lane_id(); i < pieces; i += kWarp) to[i] = from[i];
}

template <class V>
__global__ void __launch_bounds__(kThreads)
    gather_causal(const V* __restrict__ d_tokens, const int64_t* __restrict__ causal_index,
                  V* __restrict__ d_causal, int64_t rows, int causal_count, int cells, int pieces) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const int64_t cell = causal_index[row];
  if (cell < 0 || cell >= cells) return;
  const V* const from = d_tokens + (row / causal_count * cells + cell) * pieces;
  for (int i = lane_id(); i < pieces; i += kWarp) d_causal[row * pieces + i] = from[i];
}

// Calls `function` with the largest piece (16, 4 or 2 bytes) of which row lengths and pointers are
// multiples.
template <class F, class... P>
void with_piece(int64_t row_bytes, F function, P... pointers) {
  const uint64_t all =
      (static_cast<uint64_t>(row_bytes) | ... | reinterpret_cast<uint64_t>(pointers));
  if (all % 16 == 0) return function(uint4{});
  if (all % 4 == 0) return function(uint32_t{});
  function(uint16_t{});
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace

void unmerge_tokens(const Clusters& shape, int causal_tokens, const void* causal,
                    const void* merged, const int64_t* causal_index, const int64_t* noncausal_index,
                    const int64_t* assignment, void* tokens, void* stream) {
  const int64_t row_bytes = shape.channels * bytes_of(shape.dtype);
  const int64_t rows = shape.clips * (causal_tokens + shape.tokens);
  with_piece(
      row_bytes,
      [&](auto piece) {
        using V = decltype(piece);
        launch("unmerge_tokens", unmerge_forward<V>, ceil_div(rows, kThreads / kWarp), kThreads, 0,
               stream, static_cast<const V*>(causal), static_cast<const V*>(merged), causal_index,
               noncausal_index, assignment, static_cast<V*>(tokens), rows, causal_tokens,
               shape.tokens, shape.clusters, static_cast<int>(row_bytes / sizeof(V)));
      },
      causal, merged, tokens);
}

void unmerge_tokens_backward(const Clusters& shape, int causal_tokens, const void* d_tokens,
                             const int64_t* causal_index, const int64_t* noncausal_index,
                             const int64_t* assignment, void* d_causal, void* d_merged,
                             void* workspace, void* stream) {
  const int cells = causal_tokens + shape.tokens;
  if (d_causal) {
    const int64_t row_bytes = shape.channels * bytes_of(shape.dtype);
    const int64_t rows = shape.clips * causal_tokens;
    with_piece(
        row_bytes,
        [&](auto piece) {
          using V = decltype(piece);
          launch("unmerge_tokens_backward", gather_causal<V>, ceil_div(rows, kThreads / kWarp),
                 kThreads, 0, stream, static_cast<const V*>(d_tokens), causal_index,
                 static_cast<V*>(d_causal), rows, causal_tokens, cells,
                 static_cast<int>(row_bytes / sizeof(V)));
        },
        d_tokens, d_causal);
  }
  if (d_merged) {
    const ClusterSums sums{nullptr, Dtype::kFloat32, false, noncausal_index, cells};
    sum_clusters("unmerge_tokens_backward", shape, sums, d_tokens, assignment, d_merged, nullptr,
                 nullptr, workspace, stream);
  }
}

}  // namespace cmpose
