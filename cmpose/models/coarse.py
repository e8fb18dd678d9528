"""Multitask Coarse Learning: beside the pose task, masked and noised tokens are restored."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.criss_cross import CrissCross
from cmpose.models.fused import in_one_batch
from cmpose.models.layers import Linear


class Reconstruction(NamedTuple):
    """An auxiliary task: tokens as predicted [B, T, N, D]; which were corrupted [B, T, N] bool."""

    prediction: Tensor
    corrupted: Tensor


class CoarseOutput(NamedTuple):
    """Results of the first stage.

    ``tokens`` [B, N, D] and ``keypoint_tokens`` [B, K, D] are fused over time. ``features`` F_v
    [B, T, N, D] are the backbone's. ``mask`` and ``noise`` are the auxiliary tasks, None when they
    are off and at inference.
    """

    tokens: Tensor
    keypoint_tokens: Tensor
    features: Tensor
    mask: Reconstruction | None
    noise: Reconstruction | None


class TemporalFusion(nn.Module):
    """T frames into one: Linear(concat of a slot's T tokens). [B, T, S, D] → [B, S, D].

    It starts by passing the key frame (the middle one) through.
    """

    def __init__(self, width: int, num_frames: int) -> None:
        super().__init__()
        self.width = width
        self.num_frames = num_frames
        self.linear = Linear(num_frames * width, width)

    def reset(self) -> None:
        """Makes the linear map the identity on the key frame."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        key = self.num_frames // 2 * self.width
        with torch.no_grad():
            nn.init.eye_(self.linear.weight[:, key : key + self.width])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2).flatten(2))


class CoarseLearning(nn.Module):
    """First stage: F_v → X and its corrupted copies → criss-cross network → fused tokens.

    X = F_v ⊕ F_k (Eq. 4) joins the keypoint tokens F_k, which are learned, copied to every frame
    and never corrupted. Learned embeddings of frames and slots are added to it. While training,
    the clean, the masked and the noised X go through the criss-cross network (Eq. 5); at inference
    only the clean one does.
    """

    def __init__(self, width: int, heads: int, num_tokens: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        slots = num_tokens + config.num_keypoints
        self.keypoint_tokens = nn.Parameter(torch.zeros(config.num_keypoints, width))
        self.frame_embed = nn.Parameter(torch.zeros(config.num_frames, 1, width))
        self.slot_embed = nn.Parameter(torch.zeros(1, slots, width))
        self.criss_cross = CrissCross(width, heads, config)
        self.fusion = TemporalFusion(width, config.num_frames)

    def reset(self) -> None:
        """Sets the embeddings' initial values, and lets both linear maps pass tokens through."""
        for embedding in (self.frame_embed, self.slot_embed):
            nn.init.trunc_normal_(embedding, std=0.02)
        # The backbone's final norm leaves its tokens at unit scale. Keypoint tokens of scale 0.02
        # would be small beside the tokens they attend, and stay alike.
        nn.init.trunc_normal_(self.keypoint_tokens, std=1.0)
        self.criss_cross.reset_fusion()
        self.fusion.reset()

    def _clean(self, features: Tensor) -> Tensor:
        """X = F_v ⊕ F_k, with its embeddings: [B, T, N, D] → [B, T, N+K, D]."""
        B, T = features.shape[:2]
        keypoints = self.keypoint_tokens.to(features.dtype).expand(B, T, -1, -1)
        x = torch.cat([features, keypoints], dim=2)
        return x + (self.frame_embed + self.slot_embed).to(features.dtype)

    def corrupt(
        self, features: Tensor, seed: Tensor, first_clip: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """X clean, masked and noised [R, B, T, N+K, D], and which tokens are masked and noised.

        A task that is off has no branch, so R is 2 or 3. The flags are [B, T, N] bool.
        """
        c = self.config
        x, masked, noised = ops.corrupt_tokens(
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
        if not (c.mask_task and c.denoise_task):
            x = x[[0] + [1] * c.mask_task + [2] * c.denoise_task]
        return x, masked, noised

    def forward(self, features: Tensor, seed: Tensor | None, first_clip: int = 0) -> CoarseOutput:
        """features F_v [B, T, N, D]; ``seed`` (one int64) corrupts, None is inference."""
        N = features.shape[2]
        mask = noise = None
        if seed is None or not (self.config.mask_task or self.config.denoise_task):
            clean = self.criss_cross(self._clean(features))
        else:
            inputs, masked, noised = self.corrupt(features, seed, first_clip)
            outputs = in_one_batch(self.criss_cross, inputs)
            clean = outputs[0]
            if self.config.mask_task:
                mask = Reconstruction(outputs[1, :, :, :N], masked)
            if self.config.denoise_task:
                noise = Reconstruction(outputs[-1, :, :, :N], noised)
        tokens = self.fusion(clean)
        return CoarseOutput(tokens[:, :N], tokens[:, N:], features, mask, noise)
