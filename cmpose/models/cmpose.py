"""CM-Pose: backbone → Multitask Coarse Learning → Fine Token Enhancement → head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from cmpose.config import ModelConfig
from cmpose.models.checks import check_config
from cmpose.models.coarse import CoarseLearning, CoarseOutput
from cmpose.models.fine import FineOutput, FineTokenEnhancement
from cmpose.models.head import STRIDE, DeconvHead, TokenHead
from cmpose.models.vit import VisionTransformer
from cmpose.models.weights.saved import SavedModel


class CMPoseOutput(NamedTuple):
    """heatmaps [B, K, H/4, W/4] of the key frame, and what the two stages before gave."""

    heatmaps: Tensor
    coarse: CoarseOutput
    fine: FineOutput | None


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class CMPose(SavedModel):
    """The full model (Chen et al., AAAI 2025).

    ``model(clips)`` with clips [B, T, 3, H, W] (normalised RGB) predicts the key frame's heatmaps.
    ``model(clips, seed)`` also runs the masked and the noised branch. ``seed``, one int64, decides
    what is corrupted and, in training mode, which residual branches drop path leaves out.
    ``first_clip`` is the global index of the first clip: with it the processes of a distributed
    run draw what a single process would. Everything is computed in the clips' dtype
    (``cmpose/models/layers.py``).

    Raises:
        ValueError: for a configuration that cannot work (``cmpose/models/checks.py``) or clips of
            another shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        check_config(config)
        super().__init__(config)
        self.backbone = VisionTransformer(config)
        width, heads, grid = self.backbone.width, self.backbone.num_heads, self.backbone.grid
        self.heatmap_size = (config.image_size[0] // STRIDE, config.image_size[1] // STRIDE)
        self.coarse = CoarseLearning(width, heads, grid[0] * grid[1], config)
        self.fine = FineTokenEnhancement(width, config) if config.fine != "off" else None
        self.head: DeconvHead | TokenHead
        if config.head == "deconv":
            self.head = DeconvHead(width, grid, config)
        else:
            self.head = TokenHead(width, heads, grid, config)
        self.apply(_initialise)
        self.coarse.reset()
        if config.identity_start:
            self.coarse.make_identity()
        self.head.reset()

    def forward(
        self, clips: Tensor, seed: Tensor | None = None, first_clip: int = 0
    ) -> CMPoseOutput:
        if clips.dim() != 5 or clips.shape[1] != self.config.num_frames or clips.shape[2] != 3:
            raise ValueError(
                f"clips has shape {tuple(clips.shape)}; expected [B, {self.config.num_frames}, 3, "
                f"{self.config.image_size[0]}, {self.config.image_size[1]}]"
            )
        B, T = clips.shape[:2]
        kept = None
        if seed is not None and self.training:
            kept = self.backbone.draw_kept(seed, first_clip, B, T)
        features = self.backbone(clips.flatten(0, 1), kept)
        features = features.view(B, T, *features.shape[1:])
        coarse = self.coarse(features, seed, first_clip)
        fine = self.fine(coarse.tokens, coarse.keypoint_tokens) if self.fine is not None else None
        if isinstance(self.head, DeconvHead):
            heatmaps = self.head(coarse.tokens if fine is None else fine.grid)
        else:
            tokens = coarse.tokens if fine is None else fine.fine
            heatmaps = self.head(coarse.keypoint_tokens, tokens)
        return CMPoseOutput(heatmaps, coarse, fine)
