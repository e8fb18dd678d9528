"""CM-Pose: backbone → Multitask Coarse Learning → Fine Token Enhancement → head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from cmpose.config import Backend, Config, ModelConfig
from cmpose.data.skeleton import default_skeleton
from cmpose.models.coarse import CoarseLearning, CoarseOutput
from cmpose.models.fine import FineOutput, FineTokenEnhancement
from cmpose.models.head import STRIDE, DeconvHead, TokenHead
from cmpose.models.vit import PATCH, VisionTransformer
from cmpose.models.weights import folder
from cmpose.models.weights.card import model_card


class CMPoseOutput(NamedTuple):
    """heatmaps [B, K, H/4, W/4] of the key frame, and what the stages handed on."""

    heatmaps: Tensor
    coarse: CoarseOutput
    fine: FineOutput | None


def check_config(config: ModelConfig) -> None:
    """Raises ValueError naming the first field that cannot work, its value and what to do."""
    height, width = config.image_size
    if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
        raise ValueError(
            f"model.image_size={tuple(config.image_size)}: both sides must be multiples of "
            f"{PATCH}; the nearest is ({max(1, round(height / PATCH)) * PATCH}, "
            f"{max(1, round(width / PATCH)) * PATCH})"
        )
    if config.num_frames < 1 or config.num_frames % 2 == 0:
        raise ValueError(
            f"model.num_frames={config.num_frames}: must be odd and at least 1 "
            "(the key frame is the middle one)"
        )
    if config.num_keypoints < 1:
        raise ValueError(
            f"model.num_keypoints={config.num_keypoints}: must be at least 1 "
            "(training alone takes 0, for as many as the annotations have)"
        )
    for name in ("mask_ratio", "noise_ratio"):
        ratio = getattr(config, name)
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"model.{name}={ratio}: must lie in [0, 1]")
    if config.fine == "off":
        return
    tokens = height // PATCH * (width // PATCH)
    causal = config.tokens_per_keypoint * config.num_keypoints
    if config.tokens_per_keypoint < 1 or causal > tokens:
        raise ValueError(
            f"model.tokens_per_keypoint={config.tokens_per_keypoint}: "
            f"{config.tokens_per_keypoint} × {config.num_keypoints} keypoints = {causal} causal "
            f"tokens, but a frame of {height}×{width} has {tokens}; "
            f"use 1 to {tokens // config.num_keypoints}"
        )
    rest = tokens - causal
    if config.fine == "full":
        for name in ("num_clusters", "neighbors"):
            value = getattr(config, name)
            if not 1 <= value <= rest:
                raise ValueError(
                    f"model.{name}={value}: must lie between 1 and the {rest} non-causal tokens "
                    f"({tokens} tokens − {causal} causal); change it or tokens_per_keypoint"
                )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class CMPose(nn.Module):
    """The full model (Chen et al., AAAI 2025).

    ``model(clips)`` with clips [B, T, 3, H, W] (normalised RGB) predicts the key frame's heatmaps.
    ``model(clips, seed)`` also runs the masked and the noised branch; ``seed`` is one int64 that
    decides what is corrupted and, in training mode, which residual branches drop path leaves out;
    ``first_clip`` is the global index of the first clip, so that the processes of a distributed
    run draw what a single one would. The clips' dtype is the computation's (models/layers.py).
    ``skeleton`` says what the K keypoints are; until it is set, PoseTrack's 15 or nameless ones.

    Raises:
        ValueError: for a configuration that cannot work (``check_config``) or clips of another
            shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        check_config(config)
        self.config = config
        self.skeleton = default_skeleton(config.num_keypoints)
        self.recipe: Config | None = None
        """The whole recipe, where the model comes from a folder; it says how crops are made."""
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
        coarse = self.coarse(features.view(B, T, *features.shape[1:]), seed, first_clip)
        fine = self.fine(coarse.tokens, coarse.keypoint_tokens) if self.fine is not None else None
        if isinstance(self.head, DeconvHead):
            heatmaps = self.head(coarse.tokens if fine is None else fine.grid)
        else:
            tokens = coarse.tokens if fine is None else fine.fine
            heatmaps = self.head(coarse.keypoint_tokens, tokens)
        return CMPoseOutput(heatmaps, coarse, fine)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, backend: Backend | None = None) -> CMPose:
        """The model in a folder that :meth:`save_pretrained` or training wrote, in eval mode.

        Args:
            path: a local folder with ``model.safetensors`` and ``config.json``, such as
                ``RUN/model`` or a checkpoint.
            backend: which kernels run the ops; None keeps the recipe's.

        Raises:
            CheckpointError: when there is no such folder, or its files are damaged or do not fit.
        """
        place = Path(path).expanduser()
        if not folder.is_model(place):
            advice = "give a model's folder, such as RUN/model"
            if not place.exists() and len(Path(path).parts) == 2 and not place.is_absolute():
                advice += (
                    "; names on a hub are not looked up: download the repository (hf download "
                    f"{path} --local-dir DIR) and give DIR"
                )
            raise folder.CheckpointError(f"{path}: there is no {folder.WEIGHTS} there; {advice}")
        recipe = folder.load_config(place)
        if backend is not None:
            recipe.model.backend = backend
        model = cls(recipe.model)
        model.recipe = recipe
        folder.load_into(model, folder.load_weights(place), place)
        model.skeleton = folder.load_skeleton(place, recipe.model.num_keypoints)
        return model.eval()

    def save_pretrained(
        self,
        path: str | Path,
        *,
        recipe: Config | None = None,
        evaluations: Sequence[Mapping[str, Any]] = (),
    ) -> Path:
        """Writes ``model.safetensors``, ``config.json`` and a generated model card, ``README.md``.

        Args:
            path: the folder, written whole or not at all; a model that is there is replaced.
            recipe: what it was trained with; None takes ``self.recipe``, or the defaults beside
                this model's own section.
            evaluations: what is known of these weights (``model_card``);
                what is not given is called unknown.

        Raises:
            FileExistsError: if the folder holds anything but a model.
        """
        place = Path(path).expanduser()
        if (
            place.exists()
            and not folder.is_model(place)
            and (not place.is_dir() or any(place.iterdir()))
        ):
            raise FileExistsError(f"{path} holds something else than a model: give a new folder")
        recipe = recipe or self.recipe or Config(model=self.config)
        card = model_card(recipe, evaluations)
        return folder.write(place, self.state_dict(), recipe, self.skeleton, card)
