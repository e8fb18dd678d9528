"""Multitask Coarse Learning: beside the pose task, masked and noised tokens are restored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.criss_cross import CrissCross
from cmpose.models.layers import Linear
from cmpose.models.rows import corrupted_tokens, distinct_tokens, reads
from cmpose.models.vit import Block


class Reconstruction(NamedTuple):
    """What an auxiliary task has restored.

    ``corrupted`` [B, T, N] bool says which tokens were corrupted. ``prediction`` holds the restored
    tokens: [B, M, D], those at the indices ``tokens`` [B, M] among a clip's T·N; or, where
    ``tokens`` is None, all of them, [B, T, N, D].
    """

    prediction: Tensor
    corrupted: Tensor
    tokens: Tensor | None


class CoarseOutput(NamedTuple):
    """Results of the first stage.

    ``tokens`` [B, N, D] and ``keypoint_tokens`` [B, K, D] are fused over time; the latter are
    [B, 0, D] where nothing reads them (``fine: off`` with ``head: deconv``). ``features`` F_v
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
        self.reads_keypoints = config.fine != "off" or config.head == "token"
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

    def make_identity(self) -> None:
        """Lets the backbone's tokens of the key frame through as they are (``identity_start``).

        X is F_v ⊕ F_k without embeddings, the criss-cross network's residual branches give zero,
        and ⊕ and the temporal fusion pass tokens on as :meth:`reset` has left them.
        """
        nn.init.zeros_(self.frame_embed)
        nn.init.zeros_(self.slot_embed)
        for module in self.criss_cross.modules():
            if isinstance(module, Block):
                for last in (module.attn.proj, module.mlp.fc2):
                    nn.init.zeros_(last.weight)
                    nn.init.zeros_(last.bias)

    def _clean(self, features: Tensor) -> Tensor:
        """X = F_v ⊕ F_k, with its embeddings: [B, T, N, D] → [B, T, N+K, D]."""
        B, T = features.shape[:2]
        keypoints = self.keypoint_tokens.to(features.dtype).expand(B, T, -1, -1)
        x = torch.cat([features, keypoints], dim=2)
        return x + (self.frame_embed + self.slot_embed).to(features.dtype)

    def corrupt(
        self, features: Tensor, seed: Tensor, first_clip: int
    ) -> tuple[Tensor, list[Tensor]]:
        """X clean and corrupted [R, B, T, N+K, D]; for each corrupted one where, [B, T, N] bool.

        The masked X comes before the noised one. A task that is off has none, so R is 2 or 3.
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
        return x, [masked] * c.mask_task + [noised] * c.denoise_task

    def _restore(
        self, x: Tensor, corrupted: Sequence[Tensor]
    ) -> tuple[Tensor, list[Reconstruction]]:
        """X̃ of the clean branch [B, T, slots, D], and the auxiliary tasks, all in one batch.

        x and ``corrupted`` are as :meth:`corrupt` gives them. With ``corruption: exact`` only the
        tokens that are read are computed to the end.
        """
        c = self.config
        (R, B, T, _, D), N = x.shape, corrupted[0].shape[2]
        tokens: list[Tensor] | None = None
        if c.corruption == "exact":
            ratios = [c.mask_ratio] * c.mask_task + [c.noise_ratio] * c.denoise_task
            tokens = [corrupted_tokens(*pair) for pair in zip(corrupted, ratios, strict=True)]
        read = reads(x.shape, N, keypoints=self.reads_keypoints, tokens=tokens)
        distinct = None
        if tokens is not None:
            position = (self.frame_embed + self.slot_embed).to(x.dtype)
            masked = position if c.positions_after_corruption else torch.zeros_like(position)
            replacements = [masked] * c.mask_task + [None] * c.denoise_task
            distinct = distinct_tokens(x, corrupted, tokens, replacements)
        restored = self.criss_cross(x.flatten(0, 1), read, distinct)
        if tokens is None:
            clean, *others = restored.unflatten(0, (R, B)).unbind()
            return clean, [
                Reconstruction(other[:, :, :N], flags, None)
                for other, flags in zip(others, corrupted, strict=True)
            ]
        sizes = [chosen.numel() for chosen in tokens]
        clean, *others = restored.split([len(restored) - sum(sizes), *sizes])
        return clean.view(B, T, -1, D), [
            Reconstruction(other.view(B, -1, D), flags, chosen)
            for other, flags, chosen in zip(others, corrupted, tokens, strict=True)
        ]

    def forward(self, features: Tensor, seed: Tensor | None, first_clip: int = 0) -> CoarseOutput:
        """features F_v [B, T, N, D]; ``seed`` (one int64) corrupts, None is inference."""
        N = features.shape[2]
        mask = noise = None
        if seed is None or not (self.config.mask_task or self.config.denoise_task):
            x = self._clean(features)
            clean = self.criss_cross(x, reads(x[None].shape, N, keypoints=self.reads_keypoints))
        else:
            clean, tasks = self._restore(*self.corrupt(features, seed, first_clip))
            mask = tasks[0] if self.config.mask_task else None
            noise = tasks[-1] if self.config.denoise_task else None
        tokens = self.fusion(clean)
        return CoarseOutput(tokens[:, :N], tokens[:, N:], features, mask, noise)
