"""Starting weights for a model: finds and reads a file, takes what fits, tells what it left."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import defaultdict
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cmpose.models.cmpose import CMPose
from cmpose.models.vit import VIT_SIZES
from cmpose.models.weights import layouts, packaged
from cmpose.models.weights.containers import WeightSet, choose, find_sets
from cmpose.models.weights.folder import WEIGHTS, error_line, fault_of
from cmpose.models.weights.layouts import PART, Layout, Translation

_TIMM_SMALL = (
    "timm's ViT-S has 6 heads, ViTPose's 12: the file does not tell, and with 6 the blocks "
    "compute something else"
)


def _file_of(path: str | Path) -> Path:
    """The file itself; in a folder its or its model's tensors, or the only ``.pth`` file.

    The name of a packaged model stands for its folder.
    """
    location = packaged.named(path) or Path(path).expanduser()
    if location.is_dir():
        candidates = [
            location / WEIGHTS,
            location / "model" / WEIGHTS,
            *sorted(location.glob("*.pth")),
        ]
        if candidates[0].is_file() or candidates[1].is_file() or len(candidates) == 3:
            return next(file for file in candidates if file.is_file())
    elif location.is_file():
        return location
    raise FileNotFoundError(
        f"model.pretrained={str(path)!r}: no {WEIGHTS} and no file of weights there; give a file "
        f"(.safetensors or .pth) or a model's folder{packaged.in_words()}"
    )


def _load(path: str | Path, file: Path) -> dict[str, Any]:
    """The file's contents; only data is read, no code of the file is run."""
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(
                f"model.pretrained={str(path)!r}: {file.name} is no safetensors file "
                f"({error_line(error)}): is it whole?"
            ) from error
    try:
        # MAE's files keep their options in a Namespace; building one runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        which = f" ({match[1]})" if match else ""
        raise ValueError(
            f"model.pretrained={str(path)!r}: {file.name} holds more than weights, or is "
            f"damaged: it asks for Python objects{which}, which may run any code, so it is not "
            "read. If you trust it, save its tensors: torch.save(torch.load(FILE, "
            "weights_only=False)['state_dict'], NEW), or .state_dict() of a whole model"
        ) from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(
            f"model.pretrained={str(path)!r}: {file.name} cannot be read ({error_line(error)}): "
            "is it whole?"
        ) from error


def read_weights(path: str | Path, own: dict[str, Tensor]) -> tuple[Path, WeightSet, str]:
    """The file that ``path`` means, and the weights in it that fit a model best.

    Args:
        path: a ``.safetensors`` or ``.pth`` file, or a folder with one.
        own: the model's state dict.

    Returns:
        The file; the set of weights, see :func:`cmpose.models.weights.containers.choose`; and a
        line of text on the choice if there was one, else nothing.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, needs more than tensors and plain data, or does not
            tell which of its weights are meant.
    """
    file = _file_of(path)
    content: Any = _load(path, file)
    sets = find_sets(content)
    if not sets:
        raise ValueError(
            f"model.pretrained={str(path)!r}: {file.name} holds no tensors by name; it is "
            f"{_described(content)}"
        )
    try:
        return file, *choose(sets, lambda each: layouts.nearest(each.tensors, own)[1])
    except ValueError as error:
        raise ValueError(f"model.pretrained={str(path)!r}: {file.name} {error}") from error


def _described(content: Any) -> str:
    """What a file holds instead of tensors by name."""
    if not isinstance(content, dict):
        return f"of type {type(content).__name__}"
    keys = [f"{key!r:.40} ({type(value).__name__})" for key, value in content.items()]
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return f"a dictionary of {', '.join(keys[:8]) or 'nothing'}{more}"


def _check_numbers(weights: WeightSet, layout: Layout, own: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the first of the known tensors that are no finite numbers."""
    for key, tensor in weights.tensors.items():
        name = (layout.rename(key) or "").partition(PART)[0]
        if name in own or ".mlp.experts.0." in name:
            floating = name not in own or own[name].is_floating_point()
            if fault := fault_of(tensor, floating=floating):
                raise ValueError(f"{weights.keys[key]} {fault}")


def load_pretrained(model: CMPose, path: str | Path) -> str:
    """Copies those of a file's tensors that fit into the model.

    It reads ViTPose's checkpoints with the original's, mmpose 1.x's and Hugging Face's keys, ViTs
    of MAE and timm, and cmpose's own files (:data:`cmpose.models.weights.layouts.LAYOUTS`).

    Args:
        model: takes the weights, in place.
        path: see :func:`read_weights`.

    Returns:
        Lines of text: what was taken, what was changed to fit, what was left and why.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read (see :func:`read_weights`), is of another width or
            depth, holds what is no finite number where weights should be, or nothing of it fits.
    """
    own = model.state_dict()
    file, chosen, choice = read_weights(path, own)
    weights = chosen.tensors
    layout, known_keys = layouts.nearest(weights, own)
    try:
        _check_numbers(chosen, layout, own)
    except ValueError as error:
        raise ValueError(f"model.pretrained={str(path)!r}: {file.name}: {error}") from error
    translation = layouts.translate(weights, layout, own, model.backbone.grid)
    if layout.name == "cmpose" and "fine.gate" in own and "fine.gate" not in translation.tensors:
        translation.tensors["fine.gate"] = torch.ones_like(own["fine.gate"])
        translation.notes.append("it has no gate before its Fine Token Enhancement: taken as open")
    width, depth = size_of(translation.tensors)
    _check_size(model, path, layout, width, depth)
    misshapen = {k for k, v in translation.tensors.items() if k in own and own[k].shape != v.shape}
    broken = {name.rpartition(".")[0] for name in misshapen} - {"backbone", "coarse"}
    taken = {
        k: v
        for k, v in translation.tensors.items()
        # Half a layer, such as the bias of a head whose weight does not fit, is not taken.
        if k in own and k not in misshapen and k.rpartition(".")[0] not in broken
    }
    if not taken:
        raise ValueError(
            f"model.pretrained={str(path)!r}: none of its {len(weights)} tensors fits this model; "
            f"the nearest layout is {layout.name}'s ({known_keys} keys of it), in which there is "
            f"{layout.example!r}; the file has "
            f"{', '.join(map(repr, list(chosen.keys.values())[:3]))}. "
            "Is it another architecture?"
        )
    if layout.name == "MAE or timm ViT" and width == VIT_SIZES["small"].width:
        translation.notes.append(_TIMM_SMALL)
    model.load_state_dict(taken, strict=False)
    if choice:
        translation.notes.insert(0, choice)
    return _report(model, file, translation, taken, own)


def size_of(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """Width and number of blocks of a backbone under the model's names; 0 where there is none."""
    norms = [v for k, v in tensors.items() if re.fullmatch(r"backbone\..*norm\d?\.weight", k)]
    blocks = [int(m[1]) for k in tensors if (m := re.match(r"backbone\.blocks\.(\d+)\.", k))]
    return (norms[0].numel() if norms else 0), max(blocks, default=-1) + 1


def _backbone_of(width: int, depth: int) -> str | None:
    fits = (name for name, s in VIT_SIZES.items() if (s.width, s.depth) == (width, depth))
    return next(fits, None)


def _check_size(model: CMPose, path: str | Path, layout: Layout, width: int, depth: int) -> None:
    own = model.backbone.width, len(model.backbone.blocks)
    # Where model.depth is set, that many of the file's first blocks are wanted.
    if not (width and depth) or (width, depth) == own or (width == own[0] and model.config.depth):
        return
    name = _backbone_of(width, depth)
    advice = f"set model.backbone={name}" if name else "there is no model.backbone of that size"
    if width == own[0]:
        advice += f", or model.depth={min(depth, own[1])} to take the first blocks alone"
    raise ValueError(
        f"model.pretrained={str(path)!r} ({layout.name}) has width {width} and {depth} blocks, "
        f"but model.backbone={model.config.backbone} has width {own[0]} and {own[1]}: {advice}"
    )


def _report(
    model: CMPose,
    file: Path,
    translation: Translation,
    taken: dict[str, Tensor],
    own: dict[str, Tensor],
) -> str:
    """What :func:`load_pretrained` returns."""
    left = _left(model, translation, taken, own)
    if any(name.startswith("head.final_layer.") for name in translation.tensors) and not any(
        name.startswith("head.deconv_layers.") for name in translation.tensors
    ):
        translation.notes.append("its head is ViTPose's simple one; the model's has deconvolutions")
    width, depth = size_of(translation.tensors)
    size = _backbone_of(width, depth)
    kind = translation.layout.name
    if depth:
        kind += f", ViT {size or f'of width {width} with {depth} blocks'}"
    lines = [f"{file} ({kind}): {len(taken)} tensors taken: {layouts.parts_of(taken)}"]
    lines += [f"  {note}" for note in translation.notes]
    for why, names in left.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        lines.append(f"  left {len(names)}: {shown} ({why})")
    fresh = [name for name in own if name not in taken]
    lines.append(
        f"  {len(fresh)} of the model's {len(own)} tensors start fresh: {layouts.parts_of(fresh)}"
        if fresh
        else "  nothing starts fresh"
    )
    return "\n".join(lines)


def _left(
    model: CMPose,
    translation: Translation,
    taken: dict[str, Tensor],
    own: dict[str, Tensor],
) -> dict[str, list[str]]:
    """Reason → names of the tensors that were not taken for it."""
    left: dict[str, list[str]] = defaultdict(list)
    for key, why in translation.left.items():
        left[why].append(key)
    for name, tensor in translation.tensors.items():
        if name in taken:
            continue
        if name in own and own[name].shape == tensor.shape:
            left["the rest of its layer does not fit"].append(name)
        elif name in own:
            shapes = f"{list(tensor.shape)} in the file, {list(own[name].shape)} in the model"
            left[f"of another shape: {shapes}"].append(name)
        elif (block := re.match(r"backbone\.blocks\.(\d+)\.", name)) and int(block[1]) >= len(
            model.backbone.blocks
        ):
            left[f"model.depth={model.config.depth}"].append(name)
        elif name.startswith("head.deconv_layers.") or name.startswith("head.final_layer."):
            left[f"model.head={model.config.head}"].append(name)
        else:
            left[layouts.why_unknown(name)].append(name)
    return left
