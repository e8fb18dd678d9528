// cmpose._C: the ops of ops.h for Python, with tensors as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace py = pybind11;

namespace {

using cmpose::Clusters;
using cmpose::DpcKnn;
using cmpose::Dtype;
using cmpose::SelectTokens;

using Address = uintptr_t;  // 0: none

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

using Strides = std::array<int64_t, 4>;

cmpose::HeadStrides strides_of(const Strides& s) { return {s[0], s[1], s[2], s[3]}; }

Dtype dtype_of(int code) {
  if (code < 0 || code > 2) {
    throw std::invalid_argument("dtype must be 0 (float32), 1 (float16) or 2 (bfloat16), got " +
                                std::to_string(code));
  }
  return static_cast<Dtype>(code);
}

Clusters clusters_of(int dtype, int64_t clips, int tokens, int channels, int clusters) {
  return {dtype_of(dtype), clips, tokens, channels, clusters};
}

DpcKnn dpc_knn_of(int dtype, int64_t clips, int tokens, int channels, int neighbors, int clusters,
                  bool scale, bool include_self, bool global_max, bool tf32) {
  if (neighbors < 1 || neighbors > cmpose::kMaxNeighbors || tokens > cmpose::kMaxTokens) {
    throw std::invalid_argument("dpc_knn takes 1 to " + std::to_string(cmpose::kMaxNeighbors) +
                                " neighbors and up to " + std::to_string(cmpose::kMaxTokens) +
                                " tokens, got " + std::to_string(neighbors) + " and " +
                                std::to_string(tokens));
  }
  return {clusters_of(dtype, clips, tokens, channels, clusters),
          neighbors,
          scale,
          include_self,
          global_max,
          tf32};
}

py::dict build_info() {
  py::dict info;
  info["archs"] = CMPOSE_CUDA_ARCHS_BUILT;
  info["ptx"] = CMPOSE_CUDA_PTX_BUILT;
  info["nvcc"] = CMPOSE_NVCC_VERSION;
  info["version"] = CMPOSE_VERSION;
#ifdef CUDA_ON_CPU
  info["on_cpu"] = true;
#else
  info["on_cpu"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA C++ kernels of cmpose; pointers and the stream are integers";
  m.def("build_info", &build_info);
  m.def("shared_memory", [] {
    std::map<std::string, unsigned> all = cmpose::clusters_shared();
    all.merge(cmpose::dpc_knn_shared());
    all.merge(cmpose::spatial_attention_shared());
    all.merge(cmpose::spatial_attention_backward_shared());
    return all;
  });
  m.def("select_tokens_shared", &cmpose::select_tokens_shared, py::arg("keypoints"),
        py::arg("tokens"));
  m.attr("MAX_NEIGHBORS") = cmpose::kMaxNeighbors;
  m.attr("MAX_TOKENS") = cmpose::kMaxTokens;
  m.attr("MATRIX_TOKENS") = cmpose::kMatrixTokens;

  m.def("select_tokens", [](int dtype, int64_t clips, int keypoints, int tokens, bool maximum,
                            int per_keypoint, Address logits, Address scores, Address importance,
                            Address causal, Address noncausal, Address stream) {
    cmpose::select_tokens({dtype_of(dtype), clips, keypoints, tokens, maximum}, per_keypoint,
                          at<void>(logits), at<void>(scores), at<void>(importance),
                          at<int64_t>(causal), at<int64_t>(noncausal), at<void>(stream));
  });
  m.def("select_tokens_backward", [](int dtype, int64_t clips, int keypoints, int tokens,
                                     bool maximum, Address logits, Address d_scores,
                                     Address d_importance, Address d_logits, Address stream) {
    cmpose::select_tokens_backward({dtype_of(dtype), clips, keypoints, tokens, maximum},
                                   at<void>(logits), at<void>(d_scores), at<void>(d_importance),
                                   at<void>(d_logits), at<void>(stream));
  });

  m.def("clusters_workspace", [](int dtype, int64_t clips, int tokens, int channels, int clusters) {
    return cmpose::clusters_workspace(clusters_of(dtype, clips, tokens, channels, clusters));
  });
  m.def("merge_clusters",
        [](int dtype, int64_t clips, int tokens, int channels, int clusters, int weight_dtype,
           bool normalize, Address f, Address weights, Address assignment, Address merged,
           Address total, Address exact, Address workspace, Address stream) {
          cmpose::merge_clusters(clusters_of(dtype, clips, tokens, channels, clusters),
                                 dtype_of(weight_dtype), normalize, at<void>(f), at<void>(weights),
                                 at<int64_t>(assignment), at<void>(merged), at<float>(total),
                                 at<float>(exact), at<void>(workspace), at<void>(stream));
        });
  m.def("merge_clusters_backward",
        [](int dtype, int64_t clips, int tokens, int channels, int clusters, int weight_dtype,
           bool normalize, Address f, Address weights, Address assignment, Address total,
           Address exact, Address d_merged, Address d_tokens, Address d_weights, Address stream) {
          cmpose::merge_clusters_backward(
              clusters_of(dtype, clips, tokens, channels, clusters), dtype_of(weight_dtype),
              normalize, at<void>(f), at<void>(weights), at<int64_t>(assignment), at<float>(total),
              at<float>(exact), at<void>(d_merged), at<void>(d_tokens), at<void>(d_weights),
              at<void>(stream));
        });

  m.def("unmerge_tokens",
        [](int dtype, int64_t clips, int tokens, int channels, int clusters, int causal_tokens,
           Address causal, Address merged, Address causal_index, Address noncausal_index,
           Address assignment, Address out, Address stream) {
          cmpose::unmerge_tokens(clusters_of(dtype, clips, tokens, channels, clusters),
                                 causal_tokens, at<void>(causal), at<void>(merged),
                                 at<int64_t>(causal_index), at<int64_t>(noncausal_index),
                                 at<int64_t>(assignment), at<void>(out), at<void>(stream));
        });
  m.def("unmerge_tokens_backward",
        [](int dtype, int64_t clips, int tokens, int channels, int clusters, int causal_tokens,
           Address d_tokens, Address causal_index, Address noncausal_index, Address assignment,
           Address d_causal, Address d_merged, Address workspace, Address stream) {
          cmpose::unmerge_tokens_backward(
              clusters_of(dtype, clips, tokens, channels, clusters), causal_tokens,
              at<void>(d_tokens), at<int64_t>(causal_index), at<int64_t>(noncausal_index),
              at<int64_t>(assignment), at<void>(d_causal), at<void>(d_merged), at<void>(workspace),
              at<void>(stream));
        });

  m.attr("MAX_ATTENTION_TOKENS") = cmpose::kMaxAttentionTokens;
  m.def("spatial_attention",
        [](int dtype, int64_t clips, int frames, int tokens, int heads, int channels, double scale,
           const Strides& q_strides, const Strides& k_strides, const Strides& v_strides,
           int multiprocessors, int shared, Address q, Address k, Address v, Address lengths,
           Address out, Address lse, Address stream) {
          cmpose::spatial_attention(
              {clips, frames, tokens, heads, static_cast<float>(scale), strides_of(q_strides),
               strides_of(k_strides), strides_of(v_strides), at<void>(q), at<void>(k), at<void>(v),
               at<int64_t>(lengths), at<void>(out), at<float>(lse)},
              dtype_of(dtype), channels, multiprocessors, shared, at<void>(stream));
        });
  m.def("spatial_attention_backward",
        [](int dtype, int64_t clips, int frames, int tokens, int heads, int channels, double scale,
           const Strides& q_strides, const Strides& k_strides, const Strides& v_strides,
           const Strides& grad_strides, int out_stride, int blocks, Address q, Address k, Address v,
           Address grad, Address lengths, Address grad_lse, Address dq, Address dk, Address dv,
           Address stream) {
          cmpose::spatial_attention_backward(
              {clips, frames, tokens, heads, static_cast<float>(scale), strides_of(q_strides),
               strides_of(k_strides), strides_of(v_strides), strides_of(grad_strides), at<void>(q),
               at<void>(k), at<void>(v), at<void>(grad), at<int64_t>(lengths), at<float>(grad_lse),
               at<void>(dq), at<void>(dk), at<void>(dv), out_stride},
              dtype_of(dtype), channels, blocks, at<void>(stream));
        });

  m.def("dpc_knn_workspace",
        [](int dtype, int64_t clips, int tokens, int channels, int neighbors, int clusters) {
          return cmpose::dpc_knn_workspace(dpc_knn_of(dtype, clips, tokens, channels, neighbors,
                                                      clusters, true, true, false, false));
        });
  m.def("dpc_knn", [](int dtype, int64_t clips, int tokens, int channels, int neighbors,
                      int clusters, bool scale, bool include_self, bool global_max, bool tf32,
                      Address f, Address valid, Address log_density, Address delta, Address centers,
                      Address assignment, Address workspace, Address stream) {
    cmpose::dpc_knn(dpc_knn_of(dtype, clips, tokens, channels, neighbors, clusters, scale,
                               include_self, global_max, tf32),
                    at<void>(f), at<bool>(valid), at<float>(log_density), at<float>(delta),
                    at<int64_t>(centers), at<int64_t>(assignment), at<void>(workspace),
                    at<void>(stream));
  });
  m.def("dpc_knn_merge", [](int dtype, int64_t clips, int tokens, int channels, int neighbors,
                            int clusters, bool scale, bool include_self, bool global_max, bool tf32,
                            Address f, Address valid, Address log_density, Address delta,
                            Address centers, Address assignment, int weight_dtype, bool normalize,
                            Address weights, Address merged, Address total, Address exact,
                            Address workspace, Address stream) {
    cmpose::dpc_knn_merge(dpc_knn_of(dtype, clips, tokens, channels, neighbors, clusters, scale,
                                     include_self, global_max, tf32),
                          at<void>(f), at<bool>(valid), at<float>(log_density), at<float>(delta),
                          at<int64_t>(centers), at<int64_t>(assignment), dtype_of(weight_dtype),
                          normalize, at<void>(weights), at<void>(merged), at<float>(total),
                          at<float>(exact), at<void>(workspace), at<void>(stream));
  });
}
