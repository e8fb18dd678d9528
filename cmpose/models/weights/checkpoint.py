"""Checkpoints of training: each is a model's folder (``cmpose/models/weights/folder.py``).

Its ``state.pt`` holds everything else that training needs: plain tensors and numbers, which are
loaded with ``weights_only=True``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmpose.config import Backend, Config
from cmpose.data.skeleton import Skeleton
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import folder as model_folder
from cmpose.models.weights import packaged
from cmpose.models.weights.folder import (
    CONFIG,
    STATE,
    WEIGHTS,
    CheckpointError,
    error_line,
    load_config,
    load_into,
    load_skeleton,
    load_weights,
)

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "MODEL",
    "STATE",
    "WEIGHTS",
    "CheckpointError",
    "average",
    "discard",
    "evaluation_folder",
    "find",
    "load_config",
    "load_into",
    "load_model",
    "load_skeleton",
    "load_state",
    "load_weights",
    "name_of",
    "prune",
    "save",
    "training_checkpoints",
]

CHECKPOINTS, MODEL, EVALUATIONS = "checkpoints", "model", "evaluations"
"""Folders in a run's: of its checkpoints, of the final model, and of what ``evaluate`` writes."""

_NAME = re.compile(r"step-(\d{8})")


def save(
    folder: Path,
    name: str,
    weights: dict[str, Tensor],
    config: Config,
    state: dict[str, Any] | None = None,
    skeleton: Skeleton | None = None,
    card: str = "",
    remedy: str = "",
) -> Path:
    """Writes ``folder/name`` whole or not at all.

    Args:
        folder: where checkpoints lie.
        name: of the new one, such as ``step-00000120``.
        weights: the model's state dict.
        config: the recipe it was trained with.
        state: what else training needs; None for a model that is not trained on.
        skeleton: of the model; None is the default for its number of keypoints.
        card: the model card; empty writes none.
        remedy: what to do about a failure, for the message.

    Raises:
        OutputError: when it cannot be written.
    """

    def more(partial: Path) -> None:
        if state is not None:
            torch.save(state, partial / STATE)

    return model_folder.write(folder / name, weights, config, skeleton, card, more, remedy)


def name_of(step: int) -> str:
    """The folder name of a training checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def training_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    # One that is deleted with its user's notes in it is not there any more.
    return sorted(
        p for p in folder.iterdir() if _NAME.fullmatch(p.name) and model_folder.holds_any(p)
    )


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest ``keep`` training checkpoints; what is not theirs stays."""
    for old in training_checkpoints(folder)[: -max(keep, 1)]:
        model_folder.remove_model(old)


def discard(run: Path) -> None:
    """Deletes a run's training checkpoints and its model; what is not theirs stays."""
    for folder in training_checkpoints(run / CHECKPOINTS):
        model_folder.remove_model(folder)
    with suppress(OSError):  # none there, or something else in it
        (run / CHECKPOINTS).rmdir()
    model_folder.remove_model(run / MODEL)


def find(path: str | Path) -> Path:
    """The checkpoint folder meant by a run's folder, a checkpoint's, a file inside one, or a name.

    The name is a packaged model's.

    Raises:
        CheckpointError: when there is none.
    """
    if (folder := packaged.named(path)) is not None:
        return folder
    path = Path(path)
    if path.is_file():
        path = path.parent
    candidates = [path, path / MODEL]
    candidates += reversed(training_checkpoints(path / CHECKPOINTS))
    candidates += reversed(training_checkpoints(path))
    for candidate in candidates:
        if model_folder.is_model(candidate):
            return candidate
    raise CheckpointError(
        f"no checkpoint at {path}: give a run's folder, one of its checkpoints/step-*, or a "
        f"{WEIGHTS}{packaged.in_words()}"
    )


def evaluation_folder(folder: Path) -> Path:
    """Where evaluations of a model's weights are kept: outside of its own folder.

    A checkpoint's folder is deleted when newer ones are there, and a model's is handed on.

    Args:
        folder: of the model.

    Returns:
        ``RUN/evaluations/step-N`` for a run's checkpoint or final model; for any other model
        ``evaluations/NAME`` beside it.
    """
    if folder.name in ("", ".."):
        folder = Path(os.path.abspath(folder))
    run, name = folder.parent, folder.name
    if run.name == CHECKPOINTS:
        run = run.parent
    elif name == MODEL and (run / CONFIG).is_file():
        # The final model is that of the last checkpoint, which is saved right before it.
        name = next((c.name for c in reversed(training_checkpoints(run / CHECKPOINTS))), MODEL)
    return run / EVALUATIONS / name


def load_state(folder: Path) -> dict[str, Any]:
    """What training saved beside the weights."""
    file = folder / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {STATE}: it cannot be resumed from") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{file} cannot be read ({error_line(error)}): delete {folder} to resume from the one "
            "before"
        ) from error


def load_model(path: str | Path, backend: Backend | None = None) -> tuple[CMPose, Config]:
    """The model in a run, checkpoint or exported folder, ready for inference, and its recipe."""
    model = CMPose.from_pretrained(find(path), backend=backend)
    assert model.recipe is not None
    return model, model.recipe


def average(paths: Sequence[str | Path], backend: Backend | None = None) -> tuple[CMPose, Config]:
    """The model whose weights are the mean of several models', and the first one's recipe.

    It is a "soup": Wortsman et al., "Model soups" (ICML 2022). w = (w₁ + … + wₙ) / n, in float64;
    means and variances of batch normalisation likewise. It makes sense for models that were trained
    on from the same weights.

    Args:
        paths: each as for :func:`find`; one alone is taken as it is.
        backend: of the model.

    Raises:
        CheckpointError: a checkpoint is not there, or is of another network than the first.
    """
    folders = [find(path) for path in paths]
    model, config = load_model(folders[0], backend)
    weights = model.state_dict()
    total = {key: value.double() for key, value in weights.items()}
    for folder in folders[1:]:
        other, recipe = load_model(folder, backend)
        network = replace(recipe.model, pretrained=config.model.pretrained)
        settings = network, other.skeleton, recipe.data.udp
        if settings != (config.model, model.skeleton, config.data.udp):
            raise CheckpointError(
                f"{folder} has other settings of model, another skeleton or another data.udp than "
                f"{folders[0]}: average models of one recipe"
            )
        for key, value in other.state_dict().items():
            total[key] += value
    # Counts of batches, which are whole numbers, are rounded down.
    model.load_state_dict(
        {key: (total[key] / len(folders)).to(value.dtype) for key, value in weights.items()}
    )
    return model, config
