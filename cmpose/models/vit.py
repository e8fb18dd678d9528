"""ViTPose's plain vision transformer (Xu et al., NeurIPS 2022), frame by frame.

Module and parameter names follow the original ViTPose checkpoints (``patch_embed.proj``,
``pos_embed``, ``blocks.0.attn.qkv``, ``last_norm``), so that weights map one to one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmpose import ops
from cmpose.config import ModelConfig

PATCH = 16
"""Side of a patch in pixels."""

NORM_EPS = 1e-6
"""ViTPose's layer-norm ε (Hugging Face's port defaults to 1e-12)."""


@dataclass(frozen=True)
class ViTSize:
    """Width D, number of blocks and heads, and ViTPose's stochastic depth rate."""

    width: int
    depth: int
    heads: int
    drop_path: float


VIT_SIZES = {
    "tiny": ViTSize(192, 4, 3, 0.0),
    "small": ViTSize(384, 12, 12, 0.1),
    "base": ViTSize(768, 12, 12, 0.3),
    "large": ViTSize(1024, 24, 16, 0.5),
    "huge": ViTSize(1280, 32, 16, 0.55),
}


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole samples with probability ``rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * (torch.rand(shape, device=x.device) < keep).to(x.dtype) / keep


class Attention(nn.Module):
    """Multi-head self-attention over one axis of [B, T, S, D], straight from the packed QKV.

    Args:
        width: D.
        num_heads: H; d = D / H.
        attend: ``ops.spatial_attention`` (softmax over S) or ``ops.temporal_attention`` (over T).
        backend: which kernel runs it.
    """

    def __init__(
        self, width: int, num_heads: int, attend: Callable[..., Tensor], backend: str
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide the width {width}; "
                "set model.criss_cross_heads to a divisor"
            )
        self.num_heads = num_heads
        self.attend = attend
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, S, D = x.shape
        qkv = self.qkv(x).view(B, T, S, 3, self.num_heads, D // self.num_heads)
        return self.proj(self.attend(qkv, backend=self.backend).flatten(-2))


class MLP(nn.Module):
    """Linear → GELU → Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attend: Callable[..., Tensor],
        backend: str,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, attend, backend)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_block(block: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """``block(x)``; with ``recompute`` its activations are rebuilt in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, use_reentrant=False)
    return block(x)


class PatchEmbed(nn.Module):
    """ViTPose's 16×16 patch convolution with padding 2: [B, 3, H, W] → [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH, padding=2)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Four stride-2 3×3 convolutions with batch norm, then 1×1: [B, 3, H, W] → [B, N, D].

    For models trained from scratch, where a bare patch convolution learns too slowly.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out in (width // 8, width // 4, width // 2, width):
            layers += [
                nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.layers(images)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViTPose's backbone: [B, 3, H, W] → [B, N, D] with N = (H/16)·(W/16).

    ``pos_embed`` keeps MAE's class slot, which is added to every patch:
    ``x + pos[:, 1:] + pos[:, :1]``; there is no class token in the sequence.

    Raises:
        ValueError: if an image's size is not the configured one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = VIT_SIZES[config.backbone]
        self.width = size.width
        self.num_heads = size.heads
        self.image_size = config.image_size
        self.grid = (config.image_size[0] // PATCH, config.image_size[1] // PATCH)
        self.recompute = config.checkpoint_activations
        depth = config.depth or size.depth
        conv = config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny")
        self.patch_embed = ConvStem(self.width) if conv else PatchEmbed(self.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, self.width))
        drop_path = size.drop_path if config.drop_path < 0 else config.drop_path
        self.blocks = nn.ModuleList(
            Block(
                self.width,
                self.num_heads,
                config.mlp_ratio,
                ops.spatial_attention,
                config.backend,
                drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.last_norm = nn.LayerNorm(self.width, eps=NORM_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} (height, width), but model.image_size is "
                f"{tuple(self.image_size)}; crop to it or change model.image_size"
            )
        x = self.patch_embed(images) + self.pos_embed[:, 1:] + self.pos_embed[:, :1]
        x = x.unsqueeze(1)  # the attention op's frame axis
        for block in self.blocks:
            x = run_block(block, x, self.recompute)
        return self.last_norm(x.squeeze(1))
