"""Key layouts of published ViT and ViTPose checkpoints, mapped to the names of :class:`CMPose`.

A layout renames keys one by one. :func:`translate` does what takes more than a new name: it joins
three projections into one, chooses an expert of ViTPose+, resizes position embeddings and patch
kernels, and matches COCO's keypoints with PoseTrack's joints by name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmpose.data.skeleton import JOINTS, SLOTS17
from cmpose.models.vit import PATCH

QKV = ("query", "key", "value")
PART = "#"
"""Marks one of the tensors that are joined: ``blocks.0.attn.qkv.weight#0`` is the query's."""

SHARED_SLOTS = {
    joint: SLOTS17.index(name)
    for joint, name in enumerate(JOINTS)
    if name not in ("head_bottom", "head_top")
}
"""Joint → row of a head of 17 keypoints. COCO's order and PoseTrack18's slots agree except in eyes
and ears: there PoseTrack18 has other points, for which no row is taken."""


class Layout(NamedTuple):
    """A way to name the tensors of a ViT with or without ViTPose's head."""

    name: str
    example: str
    """A key that every file in this layout has."""
    rename: Callable[[str], str | None]
    """The layout's key → the model's; None for a tensor that the model has no name for."""


def _by_rules(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    """The first rule (pattern, new name) whose pattern is the whole key gives the new name."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules]

    def rename(key: str) -> str | None:
        for pattern, new in compiled:
            if match := pattern.fullmatch(key):
                return match.expand(new)
        return None

    return rename


_HF_BLOCK = r"(?:backbone\.|vit\.)?encoder\.layer\.(\d+)\."

LAYOUTS = (
    Layout(
        "original ViTPose",
        "backbone.blocks.0.attn.qkv.weight",
        _by_rules(
            (r"(backbone\.(?:patch_embed\.proj|blocks|last_norm)\..*)", r"\1"),
            (r"backbone\.pos_embed", r"backbone.pos_embed"),
            (r"keypoint_head\.(.*)", r"head.\1"),
        ),
    ),
    Layout("cmpose", "coarse.keypoint_tokens", lambda key: key),
    Layout(
        "mmpose 1.x",
        "backbone.layers.0.attn.qkv.weight",
        _by_rules(
            (r"backbone\.pos_embed", r"backbone.pos_embed"),
            (r"backbone\.patch_embed\.projection\.(.*)", r"backbone.patch_embed.proj.\1"),
            (r"backbone\.layers\.(\d+)\.ln([12])\.(.*)", r"backbone.blocks.\1.norm\2.\3"),
            (r"backbone\.layers\.(\d+)\.attn\.(.*)", r"backbone.blocks.\1.attn.\2"),
            (r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(.*)", r"backbone.blocks.\1.mlp.fc1.\2"),
            (r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(.*)", r"backbone.blocks.\1.mlp.fc2.\2"),
            (r"backbone\.ln1\.(.*)", r"backbone.last_norm.\1"),
            (r"head\.((?:deconv_layers|final_layer)\..*)", r"head.\1"),
        ),
    ),
    Layout(
        "Hugging Face VitPose",
        "backbone.encoder.layer.0.attention.attention.query.weight",
        _by_rules(
            (r"(?:backbone\.|vit\.)?embeddings\.position_embeddings", r"backbone.pos_embed"),
            (
                r"(?:backbone\.|vit\.)?embeddings\.patch_embeddings\.projection\.(.*)",
                r"backbone.patch_embed.proj.\1",
            ),
            *(
                (
                    rf"{_HF_BLOCK}attention\.attention\.{name}\.(.*)",
                    rf"backbone.blocks.\1.attn.qkv.\2{PART}{part}",
                )
                for part, name in enumerate(QKV)
            ),
            (rf"{_HF_BLOCK}attention\.output\.dense\.(.*)", r"backbone.blocks.\1.attn.proj.\2"),
            (rf"{_HF_BLOCK}layernorm_before\.(.*)", r"backbone.blocks.\1.norm1.\2"),
            (rf"{_HF_BLOCK}layernorm_after\.(.*)", r"backbone.blocks.\1.norm2.\2"),
            (rf"{_HF_BLOCK}(mlp\..*)", r"backbone.blocks.\1.\2"),
            (rf"{_HF_BLOCK}intermediate\.dense\.(.*)", r"backbone.blocks.\1.mlp.fc1.\2"),
            (rf"{_HF_BLOCK}output\.dense\.(.*)", r"backbone.blocks.\1.mlp.fc2.\2"),
            (r"(?:backbone\.|vit\.)?layernorm\.(.*)", r"backbone.last_norm.\1"),
            (r"head\.deconv1\.(.*)", r"head.deconv_layers.0.\1"),
            (r"head\.batchnorm1\.(.*)", r"head.deconv_layers.1.\1"),
            (r"head\.deconv2\.(.*)", r"head.deconv_layers.3.\1"),
            (r"head\.batchnorm2\.(.*)", r"head.deconv_layers.4.\1"),
            (r"head\.conv\.(.*)", r"head.final_layer.\1"),
        ),
    ),
    Layout(
        "MAE or timm ViT",
        "blocks.0.attn.qkv.weight",
        _by_rules(
            (r"(?:backbone\.)?(patch_embed\.proj|blocks|last_norm)\.(.*)", r"backbone.\1.\2"),
            (r"(?:backbone\.)?pos_embed", r"backbone.pos_embed"),
            (r"(?:backbone\.)?norm\.(.*)", r"backbone.last_norm.\1"),
        ),
    ),
)


@dataclass
class Translation:
    """A file's tensors under the model's names, and what its user is told of them."""

    layout: Layout
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """The file's key → why it is not used."""
    notes: list[str] = field(default_factory=list)


def nearest(keys: Iterable[str], own: Iterable[str]) -> tuple[Layout, int]:
    """The layout that gives most keys a name of the model, and how many keys those are.

    Args:
        keys: a file's.
        own: the model's.
    """
    own_names = set(own)
    names = list(keys)

    def count(layout: Layout) -> int:
        return sum((layout.rename(key) or "").partition(PART)[0] in own_names for key in names)

    best = max(LAYOUTS, key=count)
    return best, count(best)


_REASONS = (
    (r"(.*\.)?cls_token", "there is no class token in the sequence"),
    (r"(.*\.)?(mask_token|decoder_.*|decoder\..*)", "MAE's decoder"),
    (r"associate_keypoint_heads\..*", "a head of another data set"),
    (r"(head|fc|fc_norm|classifier)\.(weight|bias)", "a classifier"),
    (r".*\.(ls[12]\.gamma|gamma_[12]|lambda[12])", "layer scale, which ViTPose's blocks lack"),
)


def why_unknown(key: str) -> str:
    """What a tensor is that no part of the model takes, in words for the user."""
    return next((why for pattern, why in _REASONS if re.fullmatch(pattern, key)), "no such part")


def translate(
    weights: dict[str, Tensor],
    layout: Layout,
    own: dict[str, Tensor],
    grid: tuple[int, int],
) -> Translation:
    """A file's tensors under the model's names, and in its shapes where they can be resized.

    Args:
        weights: the file's tensors, without wrappers' prefixes.
        layout: the file's, as :func:`nearest` gives it.
        own: the model's state dict.
        grid: (rows, columns) of the model's patch tokens.
    """
    translation = Translation(layout)
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    experts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for key, tensor in weights.items():
        name = layout.rename(key)
        expert = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(weight|bias)", name or "")
        if name is None:
            translation.left[key] = why_unknown(key)
        elif PART in name:
            whole, _, part = name.partition(PART)
            parts.setdefault(whole, {})[int(part)] = key, tensor
        elif expert:
            target = f"{expert[1]}.fc2.{expert[3]}"
            experts.setdefault(target, {})[int(expert[2])] = key, tensor
        else:
            translation.tensors[name] = tensor
    _join(translation, parts)
    _choose_expert(translation, experts)
    _resize_positions(translation, weights, own, grid)
    _resize_patches(translation, own)
    _match_joints(translation, own)
    _spread_frames(translation, own)
    return translation


def _spread_frames(translation: Translation, own: dict[str, Tensor]) -> None:
    """Lets a model of one frame start one of several: a still clip then gives what it gave.

    Every frame gets the one frame's embedding, and the temporal fusion reads the key frame alone.
    """
    fusion, embedding = "coarse.fusion.linear.weight", "coarse.frame_embed"
    tensors = translation.tensors
    if not {fusion, embedding} <= tensors.keys() & own.keys():
        return
    one, several = tensors[fusion], own[fusion]
    width, frames = len(several), len(own[embedding])
    if one.shape != (width, width) or frames == 1:
        return
    spread = several.new_zeros(several.shape)
    key = frames // 2 * width
    spread[:, key : key + width] = one
    tensors |= {fusion: spread, embedding: tensors[embedding].expand(frames, -1, -1)}
    translation.notes.append(f"it is of 1 frame: its tokens are the key frame's of {frames}")


def _join(translation: Translation, parts: dict[str, dict[int, tuple[str, Tensor]]]) -> None:
    for whole, pieces in parts.items():
        shapes = {tuple(tensor.shape) for _, tensor in pieces.values()}
        if len(pieces) == len(QKV) and len(shapes) == 1 and shapes != {()}:
            translation.tensors[whole] = torch.cat([pieces[part][1] for part in range(len(QKV))])
            continue
        lacking = ", ".join(name for part, name in enumerate(QKV) if part not in pieces)
        why = f"its {lacking} is missing" if lacking else "query, key and value differ in shape"
        translation.left |= {key: why for key, _ in pieces.values()}
    if parts:
        translation.notes.append("query, key and value joined into qkv")


def _choose_expert(
    translation: Translation, experts: dict[str, dict[int, tuple[str, Tensor]]]
) -> None:
    """ViTPose+: the last channels of fc2 are an expert's; the first expert is COCO's."""
    for target, choices in experts.items():
        shared, own = translation.tensors.get(target), choices.get(0, ("", None))[1]
        if shared is not None and own is not None:
            if shared.dim() and shared.shape[1:] == own.shape[1:]:
                translation.tensors[target] = torch.cat([shared, own])
            else:
                translation.left[choices[0][0]] = "of another shape than the shared part"
        translation.left |= {
            key: "an expert of another data set" if 0 in choices else "expert 0 is missing"
            for expert, (key, _) in choices.items()
            if expert or 0 not in choices
        }
    if experts:
        number = max(map(len, experts.values()))
        translation.notes.append(f"expert 0 of {number} taken, COCO's (ViTPose+)")


# -- positions ------------------------------------------------------------------------------------


def grid_of(tokens: int, like: tuple[int, int]) -> tuple[int, int] | None:
    """(rows, columns) of a number of tokens: in the shape of ``like``, square, or 4:3."""
    for rows, columns in (like, (1, 1), (4, 3)):
        shared = math.gcd(rows, columns)
        unit = rows // shared * (columns // shared)
        scale = math.isqrt(tokens // unit)
        if scale and unit * scale * scale == tokens:
            return rows // shared * scale, columns // shared * scale
    return None


def resize_grid(tokens: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Embeddings of a grid, bicubic: [1, h·w, D] → [1, h'·w', D], as ViT's authors do."""
    grid = tokens.float().transpose(1, 2).unflatten(2, old)
    resized = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(tokens.dtype)


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _resize_positions(
    translation: Translation,
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    grid: tuple[int, int],
) -> None:
    """Makes ``pos_embed`` [1, 1 + N, D]: a class token's, which all patches get, then theirs."""
    stored = translation.tensors.get("backbone.pos_embed")
    if stored is None:
        return
    if stored.dim() != 3 or len(stored) != 1 or not stored.numel():
        del translation.tensors["backbone.pos_embed"]
        translation.left["pos_embed"] = f"{list(stored.shape)} is not [1, positions, width]"
        return
    if translation.layout.name in ("mmpose 1.x", "MAE or timm ViT"):
        # These have a position for each extra token (class, distillation) that the file holds.
        extra = sum(re.search(r"(^|\.)(cls|dist)_token$", key) is not None for key in weights)
    else:
        extra = 1
    old = grid_of(stored.shape[1] - extra, grid)
    if old is None:
        del translation.tensors["backbone.pos_embed"]
        translation.left["pos_embed"] = f"{stored.shape[1]} positions are no grid of patches"
        return
    patches = stored[:, extra:]
    # Zero where a file has no class token's position: mmpose has added it to the patches' already.
    class_position = stored[:, :1] if extra else torch.zeros_like(stored[:, :1])
    if old != grid:
        patches = resize_grid(patches, old, grid)
        translation.notes.append(
            f"pos_embed resized from {_size_text(old)} to {_size_text(grid)} (bicubic)"
        )
    translation.tensors["backbone.pos_embed"] = torch.cat([class_position, patches], dim=1)
    slots = translation.tensors.get("coarse.slot_embed")
    keypoints = translation.tensors.get("coarse.keypoint_tokens")
    if old != grid and slots is not None and slots.dim() == 3 and keypoints is not None:
        count = old[0] * old[1]
        if keypoints.dim() == 2 and slots.shape[1] == count + len(keypoints):
            resized = resize_grid(slots[:, :count], old, grid)
            translation.tensors["coarse.slot_embed"] = torch.cat([resized, slots[:, count:]], dim=1)
            translation.notes.append("slot_embed likewise")


def _resize_patches(translation: Translation, own: dict[str, Tensor]) -> None:
    """Resizes a patch kernel of another size (MAE's ViT-H has 14×14) to 16×16.

    It is scaled by the ratio of the areas, so that a patch of one colour gives the same token.
    """
    name = "backbone.patch_embed.proj.weight"
    kernel = translation.tensors.get(name)
    if kernel is None or name not in own or own[name].shape[1:] != (3, PATCH, PATCH):
        return
    if kernel.dim() != 4 or kernel.shape[1] != 3 or kernel.shape[-1] == PATCH or 0 in kernel.shape:
        return
    size = (PATCH, PATCH)
    resized = F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False)
    area = kernel.shape[-2] * kernel.shape[-1] / PATCH**2
    translation.tensors[name] = (resized * area).to(kernel.dtype)
    old = _size_text((kernel.shape[-2], kernel.shape[-1]))
    translation.notes.append(f"patch kernel resized from {old} to {_size_text(size)} (bicubic)")


# -- the head -------------------------------------------------------------------------------------


def _match_joints(translation: Translation, own: dict[str, Tensor]) -> None:
    """Takes rows of a head of 17 keypoints for a head of 15 joints, where the names agree.

    The others, ``head_bottom`` and ``head_top``, keep the model's initial weights.
    """
    weight, bias = (f"head.final_layer.{kind}" for kind in ("weight", "bias"))
    if weight not in own or weight not in translation.tensors or bias not in translation.tensors:
        return
    rows, own_shape = translation.tensors[weight], own[weight].shape
    if rows.shape != (len(SLOTS17), *own_shape[1:]) or own_shape[0] != len(JOINTS):
        return
    if translation.tensors[bias].shape != (len(SLOTS17),):
        return
    joints, slots = list(SHARED_SLOTS), list(SHARED_SLOTS.values())
    for name in (weight, bias):
        matched = own[name].detach().clone()
        matched[joints] = translation.tensors[name][slots].to(matched)
        translation.tensors[name] = matched
    fresh = ", ".join(name for joint, name in enumerate(JOINTS) if joint not in SHARED_SLOTS)
    translation.notes.append(
        f"final layer: {len(joints)} of {len(JOINTS)} joints by name from its {len(SLOTS17)} "
        f"keypoints; {fresh} start fresh"
    )


def parts_of(names: Iterable[str]) -> str:
    """How many names each part of the model has, such as ``backbone 150, head 12``."""
    counted = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} {number}" for part, number in counted.items()) or "none"
