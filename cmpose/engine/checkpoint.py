"""Checkpoints: a folder each, written beside and renamed, so that a killed run leaves none half.

``weights.safetensors`` holds the model, ``state.pt`` everything else that training needs (plain
tensors and numbers, loaded with ``weights_only=True``), ``config.json`` the recipe,
``skeleton.json`` what the keypoints are, as a COCO-style category.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.data.skeleton import Skeleton, default_skeleton, skeleton_of_category
from cmpose.engine.parallel import shard_like
from cmpose.models.cmpose import CMPose

WEIGHTS, STATE, CONFIG = "weights.safetensors", "state.pt", "config.json"
SKELETON = "skeleton.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or does not fit; the message names file and remedy."""


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: Path,
    name: str,
    weights: dict[str, Tensor],
    config: Config,
    state: dict[str, Any] | None = None,
    skeleton: Skeleton | None = None,
) -> Path:
    """Writes ``folder/name`` whole or not at all.

    Args:
        folder: where checkpoints lie.
        name: of the new one, such as ``step-00000120``.
        weights: the model's state dict.
        config: the recipe it was trained with.
        state: what else training needs; None for a model to be used only.
        skeleton: of the model; None is the default for its number of keypoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.tmp"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    save_file(tensors, partial / WEIGHTS, metadata={"format": "cmpose"})
    (partial / CONFIG).write_text(json.dumps(configuration.to_dict(config), indent=1))
    skeleton = skeleton or default_skeleton(config.model.num_keypoints)
    (partial / SKELETON).write_text(json.dumps(skeleton.category(), indent=1))
    if state is not None:
        torch.save(state, partial / STATE)
    for file in partial.iterdir():
        _sync(file)
    final = folder / name
    replaced = folder / f".{name}.old"
    if final.exists():
        os.rename(final, replaced)
    os.rename(partial, final)
    _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def name_of(step: int) -> str:
    """The folder name of a training checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def training_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` training checkpoints."""
    for old in training_checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old)


def find(path: str | Path) -> Path:
    """The checkpoint folder meant by a run's folder, a checkpoint's, or a file inside one.

    Raises:
        CheckpointError: when there is none.
    """
    path = Path(path)
    if path.is_file():
        path = path.parent
    candidates = [path, path / "model"]
    candidates += reversed(training_checkpoints(path / "checkpoints"))
    candidates += reversed(training_checkpoints(path))
    for candidate in candidates:
        if (candidate / WEIGHTS).is_file():
            return candidate
    raise CheckpointError(
        f"no checkpoint at {path}: give a run's folder, one of its checkpoints/step-*, or a "
        f"{WEIGHTS}"
    )


def load_config(folder: Path) -> Config:
    """The recipe stored in a checkpoint folder."""
    file = folder / CONFIG
    try:
        return configuration.from_dict(json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a whole checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load_skeleton(folder: Path, num_keypoints: int) -> Skeleton:
    """What a checkpoint's keypoints are; the default where it does not say (before there was K)."""
    file = folder / SKELETON
    if not file.is_file():
        return default_skeleton(num_keypoints)
    try:
        skeleton = skeleton_of_category(json.loads(file.read_text()), str(file))
    except ValueError as error:
        raise CheckpointError(
            f"{error}; {file} is damaged: use another checkpoint of the run"
        ) from error
    if len(skeleton) != num_keypoints:
        raise CheckpointError(
            f"{file}: has {len(skeleton)} keypoints, but {CONFIG} says model.num_keypoints="
            f"{num_keypoints}: use another checkpoint of the run"
        )
    return skeleton


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint folder."""
    file = folder / WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): use another checkpoint of the run"
        ) from error


def load_state(folder: Path) -> dict[str, Any]:
    """What training saved beside the weights."""
    file = folder / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {STATE}: it cannot be resumed from") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{file} cannot be read ({error}): delete {folder} to resume from the one before"
        ) from error


def load_into(model: CMPose, weights: dict[str, Tensor], source: object) -> None:
    """Copies weights into a model; every key and shape must fit.

    Raises:
        CheckpointError: naming the first misfits.
    """
    own = model.state_dict()
    wrong = [f"{k}: missing" for k in own if k not in weights]
    wrong += [f"{k}: unknown" for k in weights if k not in own]
    wrong += [
        f"{k}: {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise CheckpointError(
            f"{source} does not fit this model ({shown}): use the model section it was trained with"
        )
    model.load_state_dict({key: shard_like(value, own[key]) for key, value in weights.items()})


def load_model(path: str | Path, backend: str | None = None) -> tuple[CMPose, Config]:
    """The model in a run, checkpoint or exported folder, ready for inference, and its recipe."""
    folder = find(path)
    config = load_config(folder)
    config.model.pretrained = ""  # the weights come from here
    if backend is not None:
        config.model.backend = backend  # type: ignore[assignment]
    model = CMPose(config.model)
    load_into(model, load_weights(folder), folder)
    model.skeleton = load_skeleton(folder, config.model.num_keypoints)
    return model.eval(), config
