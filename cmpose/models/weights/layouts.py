"""Key layouts of published ViT and ViTPose checkpoints, mapped to the names of :class:`CMPose`.

A layout renames keys one by one. What is not one to one is settled in :func:`translate`: three
projections joined into one, an expert of ViTPose+ chosen, position embeddings and patch kernels
resized, COCO's keypoints matched with PoseTrack's joints by name.
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
"""Marks one of several tensors that are joined: ``blocks.0.attn.qkv.weight#0`` is the query's."""

SHARED_SLOTS = {
    joint: SLOTS17.index(name)
    for joint, name in enumerate(JOINTS)
    if name not in ("head_bottom", "head_top")
}
"""Joint → row of a head of 17 keypoints. COCO's order and PoseTrack18's slots agree but for the
slots of eyes and ears, where they have other points; those are nobody's."""


class Layout(NamedTuple):
    """A way to name the tensors of a ViT with or without ViTPose's head."""

    name: str
    example: str
    """A key that every file of it has."""
    rename: Callable[[str], str | None]
    """Its key → ours, None for what we have no name for."""


Rules = list[tuple[re.Pattern[str], str]]


def _by_rules(*rules: tuple[str, str]) -> Callable[[str], str | None]:
    compiled: Rules = [(re.compile(pattern), new) for pattern, new in rules]

    def rename(key: str) -> str | None:
        for pattern, new in compiled:
            found = pattern.fullmatch(key)
            if found:
                return found.expand(new)
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
                    rf"backbone.blocks.\1.attn.qkv.\2{PART}{place}",
                )
                for place, name in enumerate(QKV)
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
            (r"(patch_embed\.proj|blocks|last_norm)\.(.*)", r"backbone.\1.\2"),
            (r"pos_embed", r"backbone.pos_embed"),
            (r"norm\.(.*)", r"backbone.last_norm.\1"),
        ),
    ),
)


@dataclass
class Translation:
    """A file's tensors under our names, and what is to be said of them."""

    layout: Layout
    tensors: dict[str, Tensor] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """The file's key → why it is not used."""
    notes: list[str] = field(default_factory=list)


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Key → key without what DataParallel and ``torch.compile`` put before it."""
    return {key: re.sub(r"^(?:module\.|_orig_mod\.)+", "", key) for key in keys}


def nearest(keys: Iterable[str], own: Iterable[str]) -> tuple[Layout, int]:
    """The layout that finds most of our names among the keys, and how many."""
    wanted = set(own)
    names = list(keys)

    def found(layout: Layout) -> int:
        return sum((layout.rename(key) or "").partition(PART)[0] in wanted for key in names)

    best = max(LAYOUTS, key=found)
    return best, found(best)


_REASONS = (
    (r"(.*\.)?cls_token", "there is no class token in the sequence"),
    (r"(.*\.)?(mask_token|decoder_.*|decoder\..*)", "MAE's decoder"),
    (r"associate_keypoint_heads\..*", "a head of another data set"),
    (r"(head|fc|fc_norm|classifier)\.(weight|bias)", "a classifier"),
    (r".*\.(ls[12]\.gamma|gamma_[12]|lambda[12])", "layer scale, which ViTPose's blocks lack"),
)


def why_unknown(key: str) -> str:
    """What a tensor is that no part of the model takes."""
    return next((why for pattern, why in _REASONS if re.fullmatch(pattern, key)), "no such part")


def translate(
    weights: dict[str, Tensor],
    layout: Layout,
    own: dict[str, Tensor],
    grid: tuple[int, int],
) -> Translation:
    """The tensors of a file in ``layout`` under our names, in our shapes as far as that goes.

    Args:
        weights: the file's tensors, without wrappers' prefixes.
        layout: as :func:`nearest` found it.
        own: the model's state dict.
        grid: (rows, columns) of its patch tokens.
    """
    found = Translation(layout)
    parts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    experts: dict[str, dict[int, tuple[str, Tensor]]] = {}
    for key, tensor in weights.items():
        name = layout.rename(key)
        expert = re.fullmatch(r"(.*\.mlp)\.experts\.(\d+)\.(weight|bias)", name or "")
        if name is None:
            found.left[key] = why_unknown(key)
        elif PART in name:
            whole, _, place = name.partition(PART)
            parts.setdefault(whole, {})[int(place)] = key, tensor
        elif expert:
            target = f"{expert[1]}.fc2.{expert[3]}"
            experts.setdefault(target, {})[int(expert[2])] = key, tensor
        else:
            found.tensors[name] = tensor
    _join(found, parts)
    _choose_expert(found, experts)
    _resize_positions(found, weights, own, grid)
    _resize_patches(found, own)
    _match_joints(found, own)
    return found


def _join(found: Translation, parts: dict[str, dict[int, tuple[str, Tensor]]]) -> None:
    for whole, pieces in parts.items():
        if len(pieces) == len(QKV):
            found.tensors[whole] = torch.cat([pieces[place][1] for place in range(len(QKV))])
            continue
        lacking = ", ".join(name for place, name in enumerate(QKV) if place not in pieces)
        found.left |= {key: f"its {lacking} is missing" for key, _ in pieces.values()}
    if parts:
        found.notes.append("query, key and value joined into qkv")


def _choose_expert(found: Translation, experts: dict[str, dict[int, tuple[str, Tensor]]]) -> None:
    """ViTPose+: the last channels of fc2 are an expert's, of which the first is COCO's."""
    for target, choices in experts.items():
        if 0 in choices and target in found.tensors:
            found.tensors[target] = torch.cat([found.tensors[target], choices[0][1]])
        found.left |= {
            key: "an expert of another data set" if 0 in choices else "expert 0 is missing"
            for place, (key, _) in choices.items()
            if place or 0 not in choices
        }
    if experts:
        number = max(map(len, experts.values()))
        found.notes.append(f"expert 0 of {number} taken, COCO's (ViTPose+)")


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


def _of_grid(size: tuple[int, int]) -> str:
    return f"{size[0]}×{size[1]}"


def _resize_positions(
    found: Translation,
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    grid: tuple[int, int],
) -> None:
    """``pos_embed`` as [1, 1 + N, D]: the class slot, which is added to all, then the patches'."""
    stored = found.tensors.get("backbone.pos_embed")
    if stored is None or stored.dim() != 3:
        return
    if found.layout.name in ("mmpose 1.x", "MAE or timm ViT"):
        # Theirs have slots for the extra tokens that their files hold, or none.
        extra = sum(re.search(r"(^|\.)(cls|dist)_token$", key) is not None for key in weights)
    else:
        extra = 1
    old = grid_of(stored.shape[1] - extra, grid)
    if old is None:
        del found.tensors["backbone.pos_embed"]
        found.left["pos_embed"] = f"{stored.shape[1]} positions are no grid of patches"
        return
    patches = stored[:, extra:]
    # Without one the class slot is zero: mmpose's files have added it to the patches already.
    slot = stored[:, :1] if extra else torch.zeros_like(stored[:, :1])
    if old != grid:
        patches = resize_grid(patches, old, grid)
        found.notes.append(f"pos_embed resized from {_of_grid(old)} to {_of_grid(grid)} (bicubic)")
    found.tensors["backbone.pos_embed"] = torch.cat([slot, patches], dim=1)
    slots = found.tensors.get("coarse.slot_embed")
    keypoints = found.tensors.get("coarse.keypoint_tokens")
    if old != grid and slots is not None and keypoints is not None:
        count = old[0] * old[1]
        if slots.shape[1] == count + len(keypoints):
            resized = resize_grid(slots[:, :count], old, grid)
            found.tensors["coarse.slot_embed"] = torch.cat([resized, slots[:, count:]], dim=1)
            found.notes.append("slot_embed likewise")


def _resize_patches(found: Translation, own: dict[str, Tensor]) -> None:
    """A patch kernel of another size (MAE's ViT-H has 14×14) becomes one of 16×16.

    Scaled by the areas, so that an even patch still makes the same token.
    """
    name = "backbone.patch_embed.proj.weight"
    kernel = found.tensors.get(name)
    if kernel is None or name not in own or own[name].shape[1:] != (3, PATCH, PATCH):
        return
    if kernel.dim() != 4 or kernel.shape[1] != 3 or kernel.shape[-1] == PATCH:
        return
    size = (PATCH, PATCH)
    resized = F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False)
    area = kernel.shape[-2] * kernel.shape[-1] / PATCH**2
    found.tensors[name] = (resized * area).to(kernel.dtype)
    old = _of_grid((kernel.shape[-2], kernel.shape[-1]))
    found.notes.append(f"patch kernel resized from {old} to {_of_grid(size)} (bicubic)")


# -- the head -------------------------------------------------------------------------------------


def _match_joints(found: Translation, own: dict[str, Tensor]) -> None:
    """Rows of a head of 17 keypoints for those of 15 joints; the neck and the head stay fresh."""
    weight, bias = (f"head.final_layer.{kind}" for kind in ("weight", "bias"))
    if weight not in own or weight not in found.tensors or bias not in found.tensors:
        return
    rows = found.tensors[weight]
    if len(rows) != len(SLOTS17) or len(own[weight]) != len(JOINTS):
        return
    if rows.shape[1:] != own[weight].shape[1:]:
        return
    mine, theirs = list(SHARED_SLOTS), list(SHARED_SLOTS.values())
    for name in (weight, bias):
        matched = own[name].detach().clone()
        matched[mine] = found.tensors[name][theirs].to(matched)
        found.tensors[name] = matched
    fresh = ", ".join(name for joint, name in enumerate(JOINTS) if joint not in SHARED_SLOTS)
    found.notes.append(
        f"final layer: {len(mine)} of {len(JOINTS)} joints by name from its {len(SLOTS17)} "
        f"keypoints; {fresh} start fresh"
    )


def parts_of(names: Iterable[str]) -> str:
    """Names counted by part, such as ``backbone 150, head 12``."""
    counted = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} {number}" for part, number in counted.items()) or "none"
