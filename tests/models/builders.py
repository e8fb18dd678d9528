"""Small models and inputs for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPose


def small_config(**fields) -> ModelConfig:
    """A tiny CM-Pose on 64×48 crops: 12 tokens, 2 keypoints of 2 tokens, 3 clusters."""
    values: dict = {
        "backbone": "tiny",
        "depth": 1,
        "image_size": (64, 48),
        "num_keypoints": 2,
        "tokens_per_keypoint": 2,
        "num_clusters": 3,
        "neighbors": 2,
        "head_channels": 8,
    }
    return ModelConfig(**(values | fields))


def build(seed: int = 0, **fields) -> CMPose:
    """A small model with weights drawn by ``seed``."""
    torch.manual_seed(seed)
    return CMPose(small_config(**fields))


def clips(batch: int, config: ModelConfig, seed: int = 1) -> Tensor:
    """Random clips [B, T, 3, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.num_frames, 3, *config.image_size, generator=generator)


def seed_tensor(value: int = 7) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)
