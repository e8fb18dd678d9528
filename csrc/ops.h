// The host side of the CUDA C++ ops. Pointers are device pointers to contiguous tensors; a call
// launches on `stream` of the current device and does not wait. All throw std::runtime_error with
// CUDA's message when a launch fails, std::invalid_argument for arguments no kernel takes.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace cmpose {

enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// -- select_tokens --------------------------------------------------------------------------------

struct SelectTokens {
  Dtype dtype;
  int64_t clips;
  int keypoints, tokens;  // K, N
  bool maximum;           // importance is the maximum over keypoints, not the mean
};

void select_tokens(const SelectTokens& shape, int per_keypoint, const void* logits, void* scores,
                   void* importance, int64_t* causal, int64_t* noncausal, void* stream);
// d_scores and d_importance may each be null.
void select_tokens_backward(const SelectTokens& shape, const void* logits, const void* d_scores,
                            const void* d_importance, void* d_logits, void* stream);
// Bytes of shared memory that a clip of K × N logits takes.
unsigned select_tokens_shared(int keypoints, int tokens);

// -- merge_clusters, unmerge_tokens ---------------------------------------------------------------

struct Clusters {
  Dtype dtype;  // of the tokens
  int64_t clips;
  int tokens, channels, clusters;  // M, D, L
};

// Bytes of workspace for summing a clip's tokens by cluster; 0 when shared memory does.
int64_t clusters_workspace(const Clusters& shape);

// merged [B, L, D]; total [B, L] float32, each cluster's weights summed; exact [B, L, D] float32,
// merged before it was rounded, or null.
void merge_clusters(const Clusters& shape, Dtype weight_dtype, bool normalize, const void* tokens,
                    const void* weights, const int64_t* assignment, void* merged, float* total,
                    float* exact, void* workspace, void* stream);
// d_tokens and d_weights may each be null.
void merge_clusters_backward(const Clusters& shape, Dtype weight_dtype, bool normalize,
                             const void* tokens, const void* weights, const int64_t* assignment,
                             const float* total, const float* exact, const void* d_merged,
                             void* d_tokens, void* d_weights, void* stream);

// `shape.tokens` counts the non-causal tokens, M; there are `causal_tokens` others, C.
void unmerge_tokens(const Clusters& shape, int causal_tokens, const void* causal,
                    const void* merged, const int64_t* causal_index, const int64_t* noncausal_index,
                    const int64_t* assignment, void* tokens, void* stream);
// d_causal and d_merged may each be null.
void unmerge_tokens_backward(const Clusters& shape, int causal_tokens, const void* d_tokens,
                             const int64_t* causal_index, const int64_t* noncausal_index,
                             const int64_t* assignment, void* d_causal, void* d_merged,
                             void* workspace, void* stream);

// -- dpc_knn --------------------------------------------------------------------------------------

constexpr int kMaxNeighbors = 16;
constexpr int kMaxTokens = 65536;
constexpr int kMatrixTokens = 512;  // of a clip of more tokens only the nearest are kept

struct DpcKnn {
  Clusters clusters;  // dtype, B, M, D, L
  int neighbors;      // k
  bool scale, include_self, global_max;
  bool tf32;  // float32 tokens in two bfloat16 pieces instead of three
};

int64_t dpc_knn_workspace(const DpcKnn& shape);
// valid [B, M] bool, or null.
void dpc_knn(const DpcKnn& shape, const void* tokens, const bool* valid, float* log_density,
             float* delta, int64_t* centers, int64_t* assignment, void* workspace, void* stream);
// dpc_knn, with merge_clusters of its clusters in the last launch; M ≤ kMatrixTokens.
void dpc_knn_merge(const DpcKnn& shape, const void* tokens, const bool* valid, float* log_density,
                   float* delta, int64_t* centers, int64_t* assignment, Dtype weight_dtype,
                   bool normalize, const void* weights, void* merged, float* total, float* exact,
                   void* workspace, void* stream);

// -- spatial_attention ----------------------------------------------------------------------------

constexpr int kMaxAttentionTokens = 208;

// Of a tensor [B, T, S, H, d] whose channels lie side by side, in elements.
struct HeadStrides {
  int64_t clip, frame, token, head;
};

// softmax(scale · q kᵀ) v over the tokens of each frame. Rows of q, k and v are aligned to 16
// bytes; the stride of tokens times kMaxAttentionTokens is less than 2³¹ elements.
struct SpatialAttention {
  int64_t clips;
  int frames, tokens, heads;  // T, S, H
  float scale;
  HeadStrides q_strides, k_strides, v_strides;
  const void *q, *k, *v;
  const int64_t* lengths;  // [B, T], how many tokens of a frame count, or null: all
  void* out;               // [B, T, S, H, d], contiguous
  float* lse;              // [B, T, H, S], or null
};

// For a card of so many multiprocessors, each with `shared` bytes of shared memory.
void spatial_attention(const SpatialAttention& shape, Dtype dtype, int channels,
                       int multiprocessors, int shared, void* stream);

// The gradient of softmax(scale · q kᵀ) v over the tokens of each frame. Rows of q, k, v and grad
// are aligned to 16 bytes; the stride of tokens times kMaxAttentionTokens is less than 2³¹
// elements.
struct SpatialAttentionBackward {
  int64_t clips;
  int frames, tokens, heads;  // T, S, H
  float scale;
  HeadStrides q_strides, k_strides, v_strides, grad_strides;
  const void *q, *k, *v;
  const void* grad;        // of the output
  const int64_t* lengths;  // [B, T], how many tokens of a frame count, or null: all
  const float* grad_lse;   // [B, T, H, S], or null
  void *dq, *dk, *dv;      // [B, T, S, H, d], contiguous but for out_stride
  int out_stride;          // from a token to the next
};

// `blocks` is how many blocks share the items, at most.
void spatial_attention_backward(const SpatialAttentionBackward& problem, Dtype dtype, int channels,
                                int blocks, void* stream);

// -- the most shared memory of a block
// ---------------------------------------------------------------------

// Kernel → bytes of dynamic shared memory. select_tokens takes what K × N logits need.
std::map<std::string, unsigned> clusters_shared();
std::map<std::string, unsigned> dpc_knn_shared();
std::map<std::string, unsigned> spatial_attention_shared();
std::map<std::string, unsigned> spatial_attention_backward_shared();

}  // namespace cmpose
