"""Operations of CM-Pose's matrix products and convolutions, from its shapes.

Two a multiply-add, as everywhere. Distances of DPC-kNN, norms, activations and losses are left out:
they are not what the model's utilisation is counted in.
"""

from __future__ import annotations

from cmpose.config import ModelConfig
from cmpose.models.vit import PATCH, VIT_SIZES


def _linear(rows: int, inside: int, outside: int) -> int:
    return 2 * rows * inside * outside


def _blocks(rows: int, width: int, ratio: float) -> int:
    """The linear layers of a transformer block: QKV, projection, MLP."""
    return _linear(rows, width, 4 * width) + 2 * _linear(rows, width, int(ratio * width))


def _attention(sequences: int, length: int, width: int) -> int:
    return 2 * 2 * sequences * length * length * width


def _stem(config: ModelConfig, width: int) -> tuple[int, int]:
    """The stem of a frame; and of it the first convolution, whose input takes no gradient."""
    height, breadth = config.image_size
    tokens = height // PATCH * (breadth // PATCH)
    if config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny"):
        total = first = 0
        channels = 3
        for level, out in enumerate((width // 8, width // 4, width // 2, width), 1):
            one = _linear((height >> level) * (breadth >> level), 9 * channels, out)
            first, total, channels = first or one, total + one, out
        return total + _linear(tokens, width, width), first
    patch = _linear(tokens, 3 * PATCH * PATCH, width)
    return patch, patch


def forward_flops(config: ModelConfig) -> dict[str, int]:
    """A clip's forward pass in training, by part."""
    size = VIT_SIZES[config.backbone]
    D, depth = size.width, config.depth or size.depth
    T, K = config.num_frames, config.num_keypoints
    height, breadth = config.image_size
    N = height // PATCH * (breadth // PATCH)
    S = N + K
    branches = 1 + config.mask_task + config.denoise_task
    stem, _ = _stem(config, D)
    backbone = T * (stem + depth * (_blocks(N, D, config.mlp_ratio) + _attention(1, N, D)))
    # Both pathways run both blocks.
    attention = _attention(T, S, D) + _attention(S, T, D)
    linear = 2 * _blocks(T * S, D, config.mlp_ratio)
    pathways = 2 * config.criss_cross_depth
    fusion = _linear(S, T * D, D)
    found = {
        "backbone": backbone,
        "criss-cross attention": branches * pathways * attention,
        "other criss-cross": branches * (pathways * linear + 2 * _linear(T * S, D, D)) + fusion,
    }
    if config.fine != "off":
        found["selection, clustering, merge"] = _linear(S, D, D) + _linear(K, D, N)
    if config.head != "deconv":
        raise ValueError(f"model.head={config.head!r}: the formula is for 'deconv'")
    channels = config.head_channels
    found["head"] = (
        _linear(N, D, 16 * channels)
        + _linear(4 * N, channels, 16 * channels)
        + _linear(16 * N, channels, K)
    )
    return found


def step_flops(config: ModelConfig) -> int:
    """A clip's forward and backward pass: every product once more for each of its two factors.

    Except the first convolution: images take no gradient.
    """
    _, first = _stem(config, VIT_SIZES[config.backbone].width)
    return 3 * sum(forward_flops(config).values()) - config.num_frames * first
