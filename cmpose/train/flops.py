"""Floating-point operations of a training step, from the layers' formulas, and of cards."""

from __future__ import annotations

from dataclasses import dataclass

from cmpose.config import ModelConfig
from cmpose.models.vit import PATCH, VIT_SIZES


@dataclass(frozen=True)
class Card:
    """A card by its datasheet.

    Attributes:
        name: as it is sold.
        flops_16: dense FLOP/s of 16-bit products.
        flops_32: FLOP/s of float32 products.
        bandwidth: bytes/s of its memory.
    """

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float


CARDS = (
    Card("RTX 4090", 165.2e12, 82.6e12, 1.008e12),
    Card("H200 SXM", 989e12, 67e12, 4.8e12),
)


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Floating-point operations of a clip's forward pass in training, by part of the model.

    A multiplication and an addition are two operations. Only matrix products, convolutions and
    attention count, as in torch's ``FlopCounterMode``; the clustering's distances do not.
    """
    size = VIT_SIZES[config.backbone]
    D, depth, T, K = size.width, config.depth or size.depth, config.num_frames, config.num_keypoints
    height, width = (side // PATCH for side in config.image_size)
    N = height * width
    S, hidden = N + K, int(D * config.mlp_ratio)

    def block(rows: int, keys: int) -> float:
        return 2 * rows * (4 * D * D + 2 * D * hidden) + 4 * rows * keys * D

    if config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny"):
        stem, channels, pixels = 0.0, 3, N * PATCH * PATCH
        for out in (D // 8, D // 4, D // 2, D):
            pixels //= 4
            stem += 2 * pixels * 9 * channels * out
            channels = out
        stem += 2 * N * D * D
    else:
        stem = 2 * N * 3 * PATCH * PATCH * D
    branches = 1 + config.mask_task + config.denoise_task
    rows = branches * T * S
    pathway = config.criss_cross_depth * (block(rows, S) + block(rows, T))
    parts = {
        "stem": T * stem,
        "backbone": depth * block(T * N, N),
        "coarse": 2 * pathway + 4 * rows * D * D,
        "fusion": 2 * S * T * D * D,
    }
    loose = N
    if config.fine != "off":
        parts["fine"] = 2 * (K + N) * D * D + 2 * K * N * D
        loose = config.tokens_per_keypoint * K
        loose += config.num_clusters if config.fine == "full" else 0
    C = config.head_channels
    if config.head == "deconv":
        parts["head"] = 2 * N * 16 * (D * C + 4 * C * C) + 2 * 16 * N * C * K
    else:
        attention = 4 * K * D * D + 4 * loose * D * D + 4 * K * loose * D
        parts["head"] = attention + 4 * K * D * hidden + 2 * K * D * 16 * N
    return {name: float(value) for name, value in parts.items()}


def training_flops(config: ModelConfig) -> float:
    """Operations of a clip's forward and backward pass.

    They are three times the forward pass's, less the first layer's gradient to the pixels, which is
    not computed, and plus the second forward pass of recomputed blocks.
    """
    parts = forward_flops(config)
    first = parts["stem"]
    if config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny"):
        D, pixels = VIT_SIZES[config.backbone].width, config.image_size[0] * config.image_size[1]
        first = config.num_frames * 2 * (pixels // 4) * 9 * 3 * (D // 8)
    total = 3 * sum(parts.values()) - first
    if config.checkpoint_activations:
        S = config.image_size[0] * config.image_size[1] // PATCH**2 + config.num_keypoints
        rows = (1 + config.mask_task + config.denoise_task) * config.num_frames * S
        size = VIT_SIZES[config.backbone]
        fuse = 4 * rows * size.width**2
        total += parts["backbone"] + parts["coarse"] - fuse
        # Recomputing a part ends before its last product, whose result the backward pass does not
        # need. The first blocks of the two pathways are one part.
        last = 2 * size.width * int(size.width * config.mlp_ratio)
        depth = config.depth or size.depth
        total -= last * depth * config.num_frames * (S - config.num_keypoints)
        total -= last * (4 * config.criss_cross_depth - 1) * rows
    return total
