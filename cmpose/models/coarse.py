"""Multitask Coarse Learning: the pose task with token reconstruction and denoising beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.criss_cross import CrissCross
from cmpose.models.layers import Linear


class Reconstruction(NamedTuple):
    """One auxiliary task: tokens predicted [B, T, N, D] and which were corrupted [B, T, N]."""

    prediction: Tensor
    corrupted: Tensor


class CoarseOutput(NamedTuple):
    """What the first stage hands on.

    tokens [B, N, D] and keypoint_tokens [B, K, D] are fused over time; features F_v [B, T, N, D]
    are the backbone's; mask and noise are the auxiliary tasks (None when off or at inference).
    """

    tokens: Tensor
    keypoint_tokens: Tensor
    features: Tensor
    mask: Reconstruction | None
    noise: Reconstruction | None


class TemporalFusion(nn.Module):
    """T frames into one: per slot, concat T·D → Linear D. [B, T, S, D] → [B, S, D].

    Starts by passing the key frame (the middle one) through.
    """

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.width = width
        self.num_frames = num_frames
        self.linear = Linear(num_frames * width, width)

    def reset(self) -> None:
        """Starts as the identity on the key frame."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        key = self.num_frames // 2 * self.width
        with torch.no_grad():
            nn.init.eye_(self.linear.weight[:, key : key + self.width])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2).flatten(2))


class CoarseLearning(nn.Module):
    """First stage: F_v → corrupted copies → criss-cross network → fused tokens.

    While training, the clean, masked and noised copies of X = F_v ⊕ F_k go through the
    criss-cross network as one batch; at inference there is the clean one alone. Keypoint tokens
    are learned, copied to every frame and never corrupted (Eq. 4).
    """

    def __init__(self, width: int, heads: int, num_tokens: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_tokens = num_tokens
        slots = num_tokens + config.num_keypoints
        self.keypoint_tokens = nn.Parameter(torch.zeros(config.num_keypoints, width))
        self.frame_embed = nn.Parameter(torch.zeros(config.num_frames, 1, width))
        self.slot_embed = nn.Parameter(torch.zeros(1, slots, width))
        self.criss_cross = CrissCross(width, heads, config)
        self.fusion = TemporalFusion(width, config.num_frames)

    def reset(self) -> None:
        """Initial values of the embeddings and of the two maps that start as pass-through."""
        for embedding in (self.frame_embed, self.slot_embed):
            nn.init.trunc_normal_(embedding, std=0.02)
        # The backbone's final norm leaves its tokens at unit scale; beside them, keypoint tokens
        # of 0.02 would drown in what they attend and stay alike.
        nn.init.trunc_normal_(self.keypoint_tokens, std=1.0)
        self.criss_cross.reset_fusion()
        self.fusion.reset()

    def _branches(self, features: Tensor, seed: Tensor, first_clip: int):
        """Clean, masked and noised X, without the branch of a task that is off."""
        c = self.config
        corrupted = ops.corrupt_tokens(
            features,
            self.keypoint_tokens.to(features.dtype),
            (self.frame_embed + self.slot_embed).to(features.dtype),
            seed=seed,
            mask_ratio=c.mask_ratio,
            noise_ratio=c.noise_ratio,
            noise_std=c.noise_std,
            selection=c.corruption,
            position_after=c.positions_after_corruption,
            first_clip=first_clip,
            backend=c.backend,
        )
        keep = [0] + [1] * c.mask_task + [2] * c.denoise_task
        x = corrupted.x if len(keep) == 3 else corrupted.x[keep]
        return x, corrupted.masked, corrupted.noised

    def _clean(self, features: Tensor) -> Tensor:
        B, T = features.shape[:2]
        keypoints = self.keypoint_tokens.to(features.dtype).expand(B, T, -1, -1)
        x = torch.cat([features, keypoints], dim=2)
        return x + (self.frame_embed + self.slot_embed).to(features.dtype)

    def forward(self, features: Tensor, seed: Tensor | None, first_clip: int = 0) -> CoarseOutput:
        """features F_v [B, T, N, D]; ``seed`` (one int64) corrupts, None is inference."""
        B, T, N, D = features.shape
        tasks = self.config.mask_task or self.config.denoise_task
        mask = noise = None
        if seed is None or not tasks:
            clean = self.criss_cross(self._clean(features))
        else:
            x, masked, noised = self._branches(features, seed, first_clip)
            branches = self.criss_cross(x.flatten(0, 1)).view(len(x), B, T, -1, D)
            clean = branches[0]
            if self.config.mask_task:
                mask = Reconstruction(branches[1, :, :, :N], masked)
            if self.config.denoise_task:
                noise = Reconstruction(branches[-1, :, :, :N], noised)
        fused = self.fusion(clean)
        return CoarseOutput(fused[:, :N], fused[:, N:], features, mask, noise)
