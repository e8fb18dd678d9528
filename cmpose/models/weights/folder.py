"""A model's folder, the one format in which models are kept, loaded and handed on.

``model.safetensors`` holds the tensors, ``config.json`` the recipe (its section ``model`` builds
the network), ``skeleton.json`` what the keypoints are, as a COCO-style category, and ``README.md``
the model card if there is one. A training checkpoint is such a folder with ``state.pt`` in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import Skeleton, default_skeleton
from cmpose.files import recover, whole_folder

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
SKELETON, STATE = "skeleton.json", "state.pt"
_FILES = (STATE, WEIGHTS, CONFIG, SKELETON, CARD)
"""All that may be in a model's folder. The state goes first when a checkpoint is deleted."""
_ANOTHER = "use another checkpoint of the run"


class CheckpointError(RuntimeError):
    """A model's folder cannot be read or does not fit; the message says what to do about it."""


def write(
    folder: Path,
    weights: dict[str, Tensor],
    config: Config,
    skeleton: Skeleton | None = None,
    card: str = "",
    more: Callable[[Path], None] | None = None,
    remedy: str = "",
) -> Path:
    """Writes a model's folder whole or not at all, in place of one that is there.

    Of that one, what is no part of a model stays.

    Args:
        folder: the new one.
        weights: the model's state dict.
        config: the recipe.
        skeleton: of the model; None is the default for its number of keypoints.
        card: the model card; empty writes none.
        more: called with the unfinished folder, to write what else belongs there.
        remedy: what to do about a failure, for the message.

    Raises:
        OutputError: when it cannot be written.
    """
    from safetensors.torch import save_file  # a model is built without the package

    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    skeleton = skeleton or default_skeleton(config.model.num_keypoints)
    with whole_folder(folder, remedy, is_ours=lambda path: path.name in _FILES) as partial:
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(configuration.to_dict(config), indent=1) + "\n")
        (partial / SKELETON).write_text(json.dumps(skeleton.category(), indent=1) + "\n")
        if card:
            (partial / CARD).write_text(card)
        if more is not None:
            more(partial)
    return folder


def remove_model(folder: Path) -> None:
    """Deletes what :func:`write` wrote, and the folder if nothing else is in it."""
    recover(folder)
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # not there, or its user has put something there
        folder.rmdir()


def is_model(folder: Path) -> bool:
    """Whether there are a model's weights in the folder."""
    return (folder / WEIGHTS).is_file()


def holds_any(folder: Path) -> bool:
    """Whether a file of a model, whole or not, is in the folder."""
    return any((folder / name).exists() for name in _FILES)


def load_config(folder: Path) -> Config:
    """The recipe stored in a model's folder."""
    from cmpose.data.formats.reader import read  # a model is built without msgspec

    file = folder / CONFIG
    try:
        return configuration.from_dict(read(file, dict[str, Any], CheckpointError, _ANOTHER))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} has no {CONFIG}: it is not a whole checkpoint") from error
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load_skeleton(folder: Path, num_keypoints: int) -> Skeleton:
    """What a checkpoint's keypoints are.

    Checkpoints from before other keypoints could be trained do not say: they get the default.
    """
    from cmpose.data.formats.skeleton import read_skeleton

    file = folder / SKELETON
    if not file.is_file():
        return default_skeleton(num_keypoints)
    try:
        skeleton = read_skeleton(file)
    except AnnotationError as error:
        raise CheckpointError(f"{error}: it is damaged, {_ANOTHER}") from error
    if len(skeleton) != num_keypoints:
        raise CheckpointError(
            f"{file}: has {len(skeleton)} keypoints, but {CONFIG} says model.num_keypoints="
            f"{num_keypoints}: use another checkpoint of the run"
        )
    return skeleton


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The model's tensors in a folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error_line(error)}): use another checkpoint of the run"
        ) from error


def fault_of(tensor: Tensor, *, floating: bool) -> str:
    """What keeps a tensor of a file from being weights, in words for its user; else nothing.

    Args:
        tensor: of the file.
        floating: whether the model computes with it; else it counts batches.
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        layout = str(tensor.layout).removeprefix("torch.")
        form = "quantised" if tensor.is_quantized else "empty (meta)" if tensor.is_meta else layout
        return f"is {form}: weights are dense; convert it (to_dense, dequantize) and save it again"
    numbers = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if floating and tensor.dtype not in numbers:
        return f"is {kind}: weights are float16, bfloat16, float32 or float64; save it as one"
    if not floating or not tensor.numel():
        return ""
    # NaN goes through both. A float64 may be too large for the model's float32.
    ends = torch.stack(torch.aminmax(tensor)).float()
    if not torch.isfinite(ends).all():
        wrong = (~torch.isfinite(tensor.float())).sum().item()
        return (
            f"holds {wrong} of {tensor.numel()} values that are NaN or infinite: the training it "
            "is of diverged, or it is damaged; use another"
        )
    return ""


def error_line(error: Exception) -> str:
    """What a library says of a file that it cannot read, in a line of at most 200 characters.

    torch puts its advice to whoever wrote the loading first, and may repeat the file's own bytes.
    """
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    line = (text.splitlines() or [type(error).__name__])[0]
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= 200 else line[:197] + "..."


def load_into(
    model: nn.Module,
    weights: dict[str, Tensor],
    source: object,
    shard: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Copies weights into a model; every key and shape must fit, every number be finite.

    Args:
        model: takes them.
        weights: whole tensors.
        source: what to call them in an error.
        shard: called with a whole tensor and the model's own; returns this process's part of the
            former. None for a model that is not in shards.

    Raises:
        CheckpointError: naming the first tensors that do not fit, or the first with such numbers.
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
    for key, value in weights.items():
        if fault := fault_of(value, floating=own[key].is_floating_point()):
            raise CheckpointError(f"{source}: {key} {fault}")
    if shard is not None:
        weights = {key: shard(value, own[key]) for key, value in weights.items()}
    model.load_state_dict(weights)
