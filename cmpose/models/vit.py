"""ViTPose's plain vision transformer (Xu et al., NeurIPS 2022), frame by frame.

Module and parameter names follow the original ViTPose checkpoints (``patch_embed.proj``,
``pos_embed``, ``blocks.0.attn.qkv``, ``last_norm``), so that weights map one to one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models import rows
from cmpose.models.layers import Conv2d, LayerNorm, Linear
from cmpose.ops import philox

PATCH = 16
"""Side of a patch in pixels."""

NORM_EPS = 1e-6
"""ε of ViTPose's layer norms (Hugging Face's port has 1e-12 by default)."""


@dataclass(frozen=True)
class ViTSize:
    """Width D, number of blocks, number of heads, and ViTPose's rate of stochastic depth."""

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
    """Stochastic depth (Huang et al., ECCV 2016): a residual branch is left out for whole samples.

    What is kept of the branch is multiplied so that its expectation stays. ``kept`` says for which
    samples it stays (:meth:`VisionTransformer.draw_kept`); it is either

    - [batch] int64, a permutation of the samples: the branch is computed for the first
      ⌊(1 − ``rate``) · batch⌉ of them alone (``model.drop_path_selection: exact``);
    - [batch] bool, drawn with probability 1 − ``rate`` for each: it is computed for all
      (``bernoulli``).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
        """x + branch(x), for the samples that keep the branch."""
        if self.rate == 0.0:
            return x + branch(x)
        if kept.dtype == torch.bool:
            shape = (x.shape[0],) + (1,) * (x.dim() - 1)
            return x + branch(x) * kept.view(shape).to(x.dtype) / (1.0 - self.rate)
        return rows.add_for_kept(x, branch, kept[: rows.kept_count(len(kept), self.rate)])


class Attention(nn.Module):
    """Multi-head self-attention over one axis of [B, T, S, D].

    Args:
        width: D.
        num_heads: H; d = D / H.
        attend: ``ops.spatial_attention`` (softmax over S) or ``ops.temporal_attention`` (over T).
        backend: which kernels run it.

    Raises:
        ValueError: if H does not divide D.
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
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, read: rows.Read = rows.everything) -> Tensor:
        """x → the same shape, or what ``read`` takes of it."""
        return self.proj(read(self.attend_heads(self.qkv(x))))

    def attend_heads(self, qkv: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v of every head: [B, T, S, 3·D], of any strides → [B, T, S, D]."""
        packed = qkv.unflatten(-1, (3, self.num_heads, -1))
        return self.attend(packed, backend=self.backend).flatten(-2)


class MLP(nn.Module):
    """Linear → GELU → Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: x + Attention(norm(x)), then x + MLP(norm(x)).

    ``kept`` [2, batch] says for which samples the two residual branches stay
    (:class:`DropPath`); None keeps all. ``read`` says which tokens are wanted of the result.
    """

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
        self.norm1 = LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, num_heads, attend, backend)
        self.norm2 = LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, kept: Tensor | None = None, read: rows.Read = rows.everything
    ) -> Tensor:
        if kept is None:
            x = read(x) + self.attn(self.norm1(x), read)
            return x + self.mlp(self.norm2(x))
        x = self.drop_path(x, lambda x: self.attn(self.norm1(x)), kept[0])
        return read(self.drop_path(x, lambda x: self.mlp(self.norm2(x)), kept[1]))


class BlockStack(nn.ModuleList):
    """Blocks one after the other: [B, T, S, D] → [B, T, S, D].

    Args:
        blocks: the blocks.
        recompute: keep no activations inside a block, but compute them again in the backward pass.
    """

    def __init__(self, blocks: Iterable[Block], recompute: bool) -> None:
        super().__init__(blocks)
        self.recompute = recompute

    def forward(
        self,
        x: Tensor,
        kept: Tensor | None = None,
        start: int = 0,
        read: rows.Read = rows.everything,
    ) -> Tensor:
        """x through the blocks from ``start`` on, and of the result what ``read`` takes.

        ``kept`` is [depth, 2, B], as in :class:`Block`.
        """
        for index, block in enumerate(self):
            if index >= start:
                block_read = read if index == len(self) - 1 else rows.everything
                run = partial(block, read=block_read)
                x = call_recomputing(run, self.recompute, x, None if kept is None else kept[index])
        return x


def call_recomputing(function: Callable[..., Any], recompute: bool, *arguments: Any) -> Any:
    """``function(*arguments)``; with ``recompute`` without keeping its activations.

    They are then computed again in the backward pass. Nothing in the model draws from torch's
    generators, so their state is not kept either, which a CUDA graph would not allow.
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


class PatchEmbed(nn.Module):
    """ViTPose's 16×16 patch convolution with padding 2: [B, 3, H, W] → [B, N, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = Conv2d(3, width, kernel_size=PATCH, stride=PATCH, padding=2)

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
                Conv2d(channels, out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.layers = nn.Sequential(*layers)
        self.proj = Conv2d(width, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(self.layers(images)).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """ViTPose's backbone: [B, 3, H, W] → [B, N, D] with N = (H/16)·(W/16).

    ``pos_embed`` [1, 1 + N, D] has MAE's position of a class token in front. There is no class
    token in the sequence; its position is added to every patch, as ViTPose does.

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
        depth = config.depth or size.depth
        conv = config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny")
        self.patch_embed = ConvStem(self.width) if conv else PatchEmbed(self.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1] + 1, self.width))
        drop_path = size.drop_path if config.drop_path < 0 else config.drop_path
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = BlockStack(
            (
                Block(
                    self.width,
                    self.num_heads,
                    config.mlp_ratio,
                    ops.spatial_attention,
                    config.backend,
                    rate,
                )
                for rate in rates
            ),
            config.checkpoint_activations,
        )
        self.last_norm = LayerNorm(self.width, eps=NORM_EPS)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        # A branch stays where a random 32-bit word is below this. It is a buffer, so that no step
        # copies it to the device, and in no checkpoint, because it follows from the configuration.
        self.drops = any(rates)
        self.drop_path_selection = config.drop_path_selection
        keep_below = [round((1.0 - rate) * 2.0**32) for rate in rates]
        self.keep_below = nn.Buffer(torch.tensor(keep_below), persistent=False)

    def draw_kept(self, seed: Tensor, first_clip: int, clips: int, frames: int) -> Tensor | None:
        """Which residual branches stay for which frames: [depth, 2, clips · frames].

        ``exact`` gives a permutation of the samples for each branch, whose first ones stay: a
        function of (seed, block, branch), of which clip comes first, and of how many there are.
        ``bernoulli`` gives bools, a function of (seed, clip, block, branch, frame): the same
        however the batch is divided. Both are the same on any device, in eager, compiled and
        captured steps. None when nothing is dropped.

        Args:
            seed: int64, one element.
            first_clip: global index of the first clip.
            clips: B.
            frames: T.
        """
        if not self.drops:
            return None
        depth = len(self.blocks)
        if self.drop_path_selection == "exact":
            branches = torch.arange(2 * depth, device=seed.device)
            first = torch.full((1,), first_clip, device=seed.device)
            tags = philox.TAG_KEPT_SAMPLES + branches
            orders = philox.exact_subsets(seed, first, tags, clips * frames)
            return orders.view(depth, 2, clips * frames)
        clip = first_clip + torch.arange(clips, device=seed.device)
        words = philox.words_of_clips(seed, clip, philox.TAG_DROP_PATH, depth * 2 * frames)
        words = words.view(clips, depth, 2, frames).permute(1, 2, 0, 3).flatten(2)
        return words < self.keep_below[:, None, None]

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """images [B, 3, H, W]; ``kept`` as :meth:`draw_kept` gives it, None drops nothing."""
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            raise ValueError(
                f"images are {tuple(images.shape[-2:])} (height, width), but model.image_size is "
                f"{tuple(self.image_size)}; crop to it or change model.image_size"
            )
        position = self.pos_embed.to(images.dtype)
        x = self.patch_embed(images) + position[:, 1:] + position[:, :1]
        # Every image is a clip of one frame to the attention op.
        x = self.blocks(x.unsqueeze(1), kept).squeeze(1)
        return self.last_norm(x)
