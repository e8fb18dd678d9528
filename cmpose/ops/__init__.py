"""The fused ops of CM-Pose, each usable on its own; see docs/ops.md."""

from cmpose.ops.backends import (
    BackendUnavailable,
    Explanation,
    FallbackWarning,
    available,
    backend,
    explain,
)
from cmpose.ops.checks import without_value_checks
from cmpose.ops.corrupt_tokens import CorruptedTokens, corrupt_tokens
from cmpose.ops.dpc_knn import ClusterResult, dpc_knn, dpc_knn_merge
from cmpose.ops.heatmap_loss import heatmap_loss
from cmpose.ops.knn import Neighbors, knn
from cmpose.ops.merge_clusters import merge_clusters
from cmpose.ops.reconstruction_loss import reconstruction_loss
from cmpose.ops.select_tokens import SelectedTokens, select_tokens
from cmpose.ops.spatial_attention import spatial_attention
from cmpose.ops.temporal_attention import temporal_attention
from cmpose.ops.unmerge_tokens import unmerge_tokens
from cmpose.ops.warp_clips import warp_clips

__all__ = [
    "BackendUnavailable",
    "ClusterResult",
    "CorruptedTokens",
    "Explanation",
    "FallbackWarning",
    "Neighbors",
    "SelectedTokens",
    "available",
    "backend",
    "corrupt_tokens",
    "dpc_knn",
    "dpc_knn_merge",
    "explain",
    "heatmap_loss",
    "knn",
    "merge_clusters",
    "reconstruction_loss",
    "select_tokens",
    "spatial_attention",
    "temporal_attention",
    "unmerge_tokens",
    "warp_clips",
    "without_value_checks",
]
