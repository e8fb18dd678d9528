"""Starting weights for a model."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from cmpose.models.cmpose import CMPose

WEIGHTS = "weights.safetensors"


def load_pretrained(model: CMPose, path: str | Path) -> str:
    """Copies every tensor of a cmpose checkpoint whose name and shape fit the model.

    Args:
        model: takes the weights, in place.
        path: a checkpoint folder, or its ``weights.safetensors``.

    Returns:
        One line for people: how many tensors were taken, which were left and why.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if not one tensor fits.
    """
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(
            f"model.pretrained={str(path)!r}: no {WEIGHTS} there; give a checkpoint folder such "
            "as RUN/model"
        )
    weights = load_file(file)
    own = model.state_dict()
    taken = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not taken:
        raise ValueError(
            f"model.pretrained={str(path)!r}: none of its {len(weights)} tensors fits this model "
            f"(it has {next(iter(weights), 'none')!r}, the model {next(iter(own))!r}); "
            "is it another architecture?"
        )
    model.load_state_dict(taken, strict=False)
    misshapen = sum(k in own for k in weights if k not in taken)
    unknown = len(weights) - len(taken) - misshapen
    return (
        f"{file}: {len(taken)} tensors taken; {misshapen} left for their shape, {unknown} for "
        f"their name; {len(own) - len(taken)} of the model's start fresh"
    )
