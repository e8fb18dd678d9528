"""The spatio-temporal criss-cross network, Eq. 5."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.vit import Block, run_block


def _stack(
    width: int, heads: int, config: ModelConfig, attend: Callable[..., Tensor]
) -> nn.ModuleList:
    return nn.ModuleList(
        Block(width, heads, config.mlp_ratio, attend, config.backend)
        for _ in range(config.criss_cross_depth)
    )


class PathwayBlocks(nn.Module):
    """D_S and D_T: pre-norm blocks that attend within a frame, and along time at each slot."""

    def __init__(self, width: int, heads: int, config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.checkpoint_activations
        self.spatial = _stack(width, heads, config, ops.spatial_attention)
        self.temporal = _stack(width, heads, config, ops.temporal_attention)

    def _run(self, blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for block in blocks:
            x = run_block(block, x, self.recompute)
        return x

    def spatial_then_temporal(self, x: Tensor) -> Tensor:
        """D_T(D_S(X)), [B, T, S, D] → the same."""
        return self._run(self.temporal, self._run(self.spatial, x))

    def temporal_then_spatial(self, x: Tensor) -> Tensor:
        """D_S(D_T(X)), [B, T, S, D] → the same."""
        return self._run(self.spatial, self._run(self.temporal, x))


class CrissCross(nn.Module):
    """X̃ = Linear(D_T(D_S(X)) ⊕ D_S(D_T(X))), Eq. 5; X is [B, T, S, D], S = N + K slots.

    ⊕ is channel concatenation, brought back from 2D to D by two products added into one output.
    The linear map starts as the mean of the pathways, so that an untrained network passes the
    backbone's tokens on.
    """

    def __init__(self, width: int, backbone_heads: int, config: ModelConfig) -> None:
        super().__init__()
        heads = config.criss_cross_heads or backbone_heads
        self.first = PathwayBlocks(width, heads, config)
        # None shares: a second name for the same weights would be written twice to checkpoints.
        self.second = None if config.share_pathways else PathwayBlocks(width, heads, config)
        self.fuse_first = nn.Linear(width, width)
        self.fuse_second = nn.Linear(width, width, bias=False)

    def reset_fusion(self) -> None:
        """Starts ⊕ as the mean of the two pathways."""
        for linear in (self.fuse_first, self.fuse_second):
            nn.init.eye_(linear.weight)
            with torch.no_grad():
                linear.weight.mul_(0.5)
        nn.init.zeros_(self.fuse_first.bias)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first.spatial_then_temporal(x)
        second = (self.second or self.first).temporal_then_spatial(x)
        return self.fuse_first(first) + self.fuse_second(second)
