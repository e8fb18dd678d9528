"""The clips that a recipe names: annotations read, checked, and cut to its frames."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from cmpose.config import Config, DataConfig
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.posetrack import listed, load_annotations, validate

_CPU = torch.device("cpu")


def warp_place(data: DataConfig, device: torch.device) -> Literal["host", "device"]:
    """Where crops are made for a model on ``device``."""
    if data.warp == "auto":
        return "device" if device.type == "cuda" else "host"
    return data.warp


def open_clips(
    config: Config, *, train: bool, device: torch.device = _CPU, quiet: bool = False
) -> ClipDataset:
    """The training or the evaluation clips of a recipe; prints what was skipped and why.

    Args:
        config: the recipe.
        train: which clips.
        device: of the model; decides what ``data.warp = auto`` is.
        quiet: prints nothing.
    """
    data = replace(config.data, warp=warp_place(config.data, device))
    root = Path(data.root).expanduser()
    annotations = data.train_annotations if train else data.val_annotations
    sequences = load_annotations(annotations, root, data.format, on_error=data.on_error)
    expected = data.train_sequences if train else data.val_sequences
    validate(sequences, expected_sequences=expected or None)
    clips = ClipDataset(
        sequences,
        root,
        config.model.image_size,
        config.model.num_frames,
        data,
        train=train,
        seed=config.train.seed,
        cache_bytes=data.frame_cache_mb << 20,
    )
    if not quiet:
        print(clips.report())
    return clips


def fit_keypoints(config: Config, clips: ClipDataset) -> Config:
    """The recipe with ``model.num_keypoints`` of the annotations where it is 0.

    Raises:
        ValueError: where it is another number than theirs.
    """
    count = config.model.num_keypoints
    if count == 0:
        return replace(config, model=replace(config.model, num_keypoints=len(clips.skeleton)))
    if count != len(clips.skeleton):
        raise ValueError(
            f"model.num_keypoints={count}, but the annotations have {listed(clips.skeleton)}: set "
            f"model.num_keypoints={len(clips.skeleton)}, or 0 to take it from them"
        )
    return config
