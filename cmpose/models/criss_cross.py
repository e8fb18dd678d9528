"""The spatio-temporal criss-cross network, Eq. 5."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.layers import Linear
from cmpose.models.vit import NORM_EPS, Block, run


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
        self.spatial = _stack(width, heads, config, ops.spatial_attention)
        self.temporal = _stack(width, heads, config, ops.temporal_attention)


class _TwoProjections(torch.autograd.Function):
    """x [..., D] times two weights [E, D] in one product, with biases [E]: two views [..., E].

    Written out because autograd would join the two gradients in one tensor [..., 2E] first, which
    moves more bytes than the one product saves; here each feeds its own accumulating product.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, a_bias: Tensor, b: Tensor, b_bias: Tensor) -> Any:
        ctx.save_for_backward(x, a, b)
        both = F.linear(x, torch.cat([a, b]), torch.cat([a_bias, b_bias]))
        first, second = both.split(len(a), dim=-1)
        return first, second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        # Casts of nothing, unless a caller's autocast made the outputs of another dtype.
        rows = x.flatten(0, -2).to(flat[0].dtype)
        weights = [weight.to(flat[0].dtype) for weight in weights]
        grad_x = (flat[0] @ weights[0]).addmm_(flat[1], weights[1])
        found = [part for g in flat for part in (g.t() @ rows, g.sum(0))]
        return grad_x.view_as(x), *found


def shared_projections(x: Tensor, a: Block, b: Block) -> tuple[Tensor, Tensor]:
    """What two blocks' norm and QKV projection make of the same x, by one product.

    The blocks' norms differ in scale γ and shift β only, which move into the projection:
    W (γ ⊙ x̂ + β) + b = (W ⊙ γ) x̂ + (W β + b). So x is normalised once, x̂ is kept once for the
    backward pass, and one [D, 6D] product reads it once.

    Args:
        x: [B, T, S, D].
        a: a block, of any attention.
        b: another one.

    Returns:
        Two [B, T, S, 3·D], views of one tensor.
    """
    normal = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    folded: list[Tensor] = []
    for block in (a, b):
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        folded += [weight * block.norm1.weight, torch.mv(weight, block.norm1.bias) + bias]
    # Folded in the weights' own precision and rounded once.
    first, second = _TwoProjections.apply(normal, *(part.to(x.dtype) for part in folded))
    return first, second


class CrissCross(nn.Module):
    """X̃ = Linear(D_T(D_S(X)) ⊕ D_S(D_T(X))), Eq. 5; X is [B, T, S, D], S = N + K slots.

    ⊕ is channel concatenation, brought back from 2D to D by two products added into one output.
    The linear map starts as the mean of the pathways, so that an untrained network passes the
    backbone's tokens on.
    """

    def __init__(self, width: int, backbone_heads: int, config: ModelConfig) -> None:
        super().__init__()
        heads = config.criss_cross_heads or backbone_heads
        self.recompute = config.checkpoint_activations
        self.first = PathwayBlocks(width, heads, config)
        # None shares: a second name for the same weights would be written twice to checkpoints.
        self.second = None if config.share_pathways else PathwayBlocks(width, heads, config)
        self.fuse_first = Linear(width, width)
        self.fuse_second = Linear(width, width, bias=False)

    def reset_fusion(self) -> None:
        """Starts ⊕ as the mean of the two pathways."""
        for linear in (self.fuse_first, self.fuse_second):
            nn.init.eye_(linear.weight)
            with torch.no_grad():
                linear.weight.mul_(0.5)
        nn.init.zeros_(self.fuse_first.bias)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both pathways' first blocks, which read the same X."""
        spatial: Block = self.first.spatial[0]  # type: ignore[assignment]
        temporal: Block = (self.second or self.first).temporal[0]  # type: ignore[assignment]
        qkv_s, qkv_t = shared_projections(x, spatial, temporal)
        return spatial.forward_projected(x, qkv_s), temporal.forward_projected(x, qkv_t)

    def _run(self, x: Tensor, *stacks: Iterable[nn.Module]) -> Tensor:
        for stack in stacks:
            for block in stack:
                x = run(block, self.recompute, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        other = self.second or self.first
        first, second = run(self._heads, self.recompute, x)
        first = self._run(first, self.first.spatial[1:], self.first.temporal)
        second = self._run(second, other.temporal[1:], other.spatial)
        out = self.fuse_first(first).flatten(0, -2)
        weight = self.fuse_second.weight.to(out.dtype)
        return out.addmm_(second.flatten(0, -2), weight.t()).view_as(x)
