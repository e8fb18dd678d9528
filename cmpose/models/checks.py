"""What a model's configuration must satisfy."""

from __future__ import annotations

from cmpose.config import ModelConfig
from cmpose.models.vit import PATCH

_MOST = 1e30
"""More than any weight or deviation of use; its square is still finite in float64."""
_RANGES: dict[str, tuple[float, float]] = {
    "num_frames": (1, 1001),
    "num_keypoints": (1, 10_000),
    "depth": (0, 1000),
    "noise_std": (0, _MOST),
    "mask_ratio": (0, 1),
    "noise_ratio": (0, 1),
    "criss_cross_depth": (1, 1000),
    "criss_cross_heads": (0, 1000),
    "mlp_ratio": (0.01, 1000),
    "reconstruction_weight": (0, _MOST),
    "selection_weight": (0, _MOST),
    "head_channels": (1, 65_536),
    "sigma": (1e-3, _MOST),
}
"""The least and the largest value of fields; far more than memory has room for is refused here,
because a model that is built until memory runs out may take the whole machine with it."""
_SIDE = 16_384
"""The largest side of a crop in pixels."""


def check_config(config: ModelConfig) -> None:
    """Checks that a model can be built of ``config``.

    Raises:
        ValueError: naming the first field that cannot work, its value and what to do.
    """
    height, width = config.image_size
    if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
        raise ValueError(
            f"model.image_size={tuple(config.image_size)}: both sides must be multiples of "
            f"{PATCH}; the nearest is ({max(1, round(height / PATCH)) * PATCH}, "
            f"{max(1, round(width / PATCH)) * PATCH})"
        )
    if max(height, width) > _SIDE:
        raise ValueError(
            f"model.image_size={tuple(config.image_size)}: both sides must be at most {_SIDE}"
        )
    if config.num_frames < 1 or config.num_frames % 2 == 0:
        raise ValueError(
            f"model.num_frames={config.num_frames}: must be odd and at least 1 "
            "(the key frame is the middle one)"
        )
    if config.num_keypoints < 1:
        raise ValueError(
            f"model.num_keypoints={config.num_keypoints}: must be at least 1 "
            "(only training takes 0, for as many as the annotations have)"
        )
    for name, (least, most) in _RANGES.items():
        value = getattr(config, name)
        if not least <= value <= most:
            raise ValueError(f"model.{name}={value}: must lie in [{least:g}, {most:g}]")
    if config.drop_path >= 1:
        raise ValueError(
            f"model.drop_path={config.drop_path}: must be less than 1, or negative for the "
            "backbone's usual rate"
        )
    if config.identity_start and config.head != "deconv":
        raise ValueError(
            f"model.identity_start=true needs model.head=deconv, the head that ViTPose has; it is "
            f"{config.head}"
        )
    if config.fine != "off":
        _check_fine(config, height // PATCH * (width // PATCH))


def _check_fine(config: ModelConfig, tokens: int) -> None:
    """The fields of Fine Token Enhancement, on frames of so many tokens."""
    causal = config.tokens_per_keypoint * config.num_keypoints
    if config.tokens_per_keypoint < 1 or causal > tokens:
        most = tokens // config.num_keypoints
        remedy = f"use 1 to {most}" if most else "use a larger model.image_size, or model.fine=off"
        raise ValueError(
            f"model.tokens_per_keypoint={config.tokens_per_keypoint}: "
            f"{config.tokens_per_keypoint} × {config.num_keypoints} keypoints = {causal} causal "
            f"tokens, but a frame of {config.image_size[0]}×{config.image_size[1]} has {tokens}; "
            f"{remedy}"
        )
    if config.fine == "causal_only":
        return
    noncausal = tokens - causal
    for name in ("num_clusters", "neighbors"):
        value = getattr(config, name)
        if not 1 <= value <= noncausal:
            raise ValueError(
                f"model.{name}={value}: must lie between 1 and the {noncausal} non-causal tokens "
                f"({tokens} tokens − {causal} causal); change it or tokens_per_keypoint"
            )
