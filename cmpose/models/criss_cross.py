"""The spatio-temporal criss-cross network, Eq. 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models import fused
from cmpose.models.layers import Linear
from cmpose.models.rows import ALL, Distinct, Reads
from cmpose.models.vit import Block, BlockStack


class PathwayBlocks(nn.Module):
    """D_S and D_T: pre-norm blocks that attend within a frame, and along time at each slot."""

    def __init__(self, width: int, heads: int, config: ModelConfig) -> None:
        super().__init__()

        def stack(attend: Callable[..., Tensor]) -> BlockStack:
            return BlockStack(
                (
                    Block(width, heads, config.mlp_ratio, attend, config.backend)
                    for _ in range(config.criss_cross_depth)
                ),
                config.checkpoint_activations,
            )

        self.spatial = stack(ops.spatial_attention)
        self.temporal = stack(ops.temporal_attention)


class CrissCross(nn.Module):
    """X̃ = Linear(D_T(D_S(X)) ⊕ D_S(D_T(X))), Eq. 5, with X [B, T, S, D] and S = N + K slots.

    ⊕ concatenates channels; the linear map brings 2D back to D. It starts as the mean of the two
    pathways, so that an untrained network passes the backbone's tokens on. Its weight [D, 2D] is
    kept as two halves: ``fuse_first`` for the pathway that begins in space, ``fuse_second`` for
    the one that begins in time.
    """

    def __init__(self, width: int, backbone_heads: int, config: ModelConfig) -> None:
        super().__init__()
        heads = config.criss_cross_heads or backbone_heads
        self.first = PathwayBlocks(width, heads, config)
        # Pathways that share their blocks have no ``second``: a second name for the same weights
        # would be written twice to checkpoints.
        self.second = None if config.share_pathways else PathwayBlocks(width, heads, config)
        self.fuse_first = Linear(width, width)
        self.fuse_second = Linear(width, width, bias=False)

    def reset_fusion(self) -> None:
        """Makes the linear map after ⊕ the mean of the two pathways."""
        for linear in (self.fuse_first, self.fuse_second):
            nn.init.eye_(linear.weight)
            with torch.no_grad():
                linear.weight.mul_(0.5)
        nn.init.zeros_(self.fuse_first.bias)

    def forward(self, x: Tensor, reads: Reads = ALL, distinct: Distinct | None = None) -> Tensor:
        """X [B, T, S, D] → X̃ of the same shape, or of the tokens that are read alone.

        ``distinct`` says which tokens of X differ, where it is known that others do not.
        """
        first, second = self.first, self.first if self.second is None else self.second
        # D_S(X) and D_T(X).
        spatial, temporal = fused.both_stacks(
            first.spatial, second.temporal, x, reads.between, distinct
        )
        # Linear(D_T(D_S(X)) ⊕ D_S(D_T(X))).
        return fused.linear_of_concat(
            first.temporal(spatial, read=reads.first),
            second.spatial(temporal, read=reads.second),
            self.fuse_first,
            self.fuse_second,
        )
