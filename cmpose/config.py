"""Every setting of cmpose as a typed field, which a YAML recipe or ``--field value`` sets.

The paper is CM-Pose; "Eq.", "Table" and "Figure" are its own. Where it leaves something open, the
field's default is what this project chose.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cmpose import usage

if TYPE_CHECKING:  # a model is built from these classes without the parser's packages
    from jsonargparse import ArgumentParser, Namespace

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]


@dataclass
class ModelConfig:
    """CM-Pose. Symbols: B clips, T frames, N patch tokens a frame, K keypoints, D width.

    Attributes:
        backbone: ViT size. ``tiny`` is for CPUs and is trained from scratch.
        image_size: (height, width) of a person crop in pixels; each a multiple of 16.
        num_frames: T = 2ω+1, odd, ≥ 1; the key frame is the middle one.
        num_keypoints: K, the number of joints that are predicted. It must be the annotations'
            number; 0 takes theirs when training starts.
        depth: number of the backbone's blocks; 0 takes the usual number for its size.
        stem: ``patch`` is ViTPose's 16×16 convolution; ``conv`` is four 3×3 convolutions of stride
            2 with batch norm; ``auto`` takes ``conv`` for tiny and ``patch`` otherwise.
        drop_path: stochastic depth rate of the last block, from where it falls linearly to 0 at the
            first; a negative number takes ViTPose's rate for the backbone's size.
        drop_path_selection: ``exact`` computes a block's branch for ⌊(1 − rate)·B·T⌉ of the frames
            that a process takes at once; ``bernoulli`` draws for each frame by itself and computes
            all. Both multiply what is kept so that the expectation stays.
        pretrained: weights to start from: a ``.safetensors`` or ``.pth`` file or a model's folder,
            of ViTPose (original, mmpose 1.x or Hugging Face), of a ViT (MAE or timm), or of
            cmpose; or the name of a packaged model, such as ``tiny``. Empty starts from random
            weights. See ``docs/weights.md``.
        identity_start: starts with a criss-cross network and a Fine Token Enhancement that pass
            the key frame's tokens through, so that a model with ViTPose's weights predicts what
            ViTPose does. Fine Token Enhancement then blends in by a learned gate. Needs ``head:
            deconv``.
        mask_task: token masking and its reconstruction loss (Eq. 2).
        denoise_task: token noise and its reconstruction loss (Eq. 3).
        mask_ratio: p_tm, the share of a clip's T·N tokens that are masked.
        noise_ratio: p_tn, the share of these tokens that get noise.
        noise_std: standard deviation of the Gaussian noise.
        corruption: ``exact`` corrupts round(p·T·N) tokens of every clip, ``bernoulli`` each token
            with probability p. ``exact`` takes fewer products: what nobody reads is not computed.
        criss_cross_depth: number of blocks in each of D_S and D_T.
        criss_cross_heads: attention heads in D_S and D_T; 0 takes the backbone's.
        mlp_ratio: hidden width of an MLP divided by D, in backbone and criss-cross blocks.
        positions_after_corruption: adds the learned embeddings of frame and position after
            corruption, so that masked tokens still have them; False adds them before.
        share_pathways: the two criss-cross pathways share the two blocks' weights (Eq. 5).
        per_channel: divides Eqs. 2 and 3 by D, so that λ does not depend on the width.
        detach_target: no gradient flows into the reconstruction target F_v.
        reconstruction_weight: λ of Eq. 14, the weight of both reconstruction losses.
        fine: ``full`` is Fine Token Enhancement; ``causal_only`` discards the non-causal tokens
            (Table 5 a); ``off`` feeds the fused tokens straight to the head (Table 5 b).
        tokens_per_keypoint: n; n·K tokens are causal.
        num_clusters: L, the number of clusters into which the non-causal tokens are merged.
        neighbors: k of DPC-kNN.
        include_self: counts a token among its own k neighbours, as in TCFormer.
        scale_distance: divides distances by √D, as in TCFormer.
        peak_delta: δ of the token with the highest density: the largest distance from it
            (``row_max``, Eq. 10) or the largest between any two tokens (``global_max``, TCFormer).
        importance: how a token's scores for the K keypoints become s_j: ``mean`` or ``max``.
        normalize_merge: divides Eq. 11's weights by their sum in the cluster.
        selection_weight: μ, weight of a pose loss on the scores that select causal tokens, which
            are then taught as coarse heatmaps; 0 leaves Eq. 14 as it is in the paper.
        head: ``deconv`` is ViTPose's classic head on the restored grid; ``token`` lets keypoint
            queries cross-attend the fine tokens.
        head_channels: width of the deconvolutions.
        sigma: standard deviation of the target Gaussian, in heatmap pixels.
        checkpoint_activations: recomputes blocks in the backward pass to save memory.
        backend: which kernels run the ops; ``auto`` takes the fastest that can.
    """

    backbone: Literal["tiny", "small", "base", "large", "huge"] = "base"
    image_size: tuple[int, int] = (256, 192)
    num_frames: int = 3
    num_keypoints: int = 15
    depth: int = 0
    stem: Literal["auto", "patch", "conv"] = "auto"
    drop_path: float = -1.0
    drop_path_selection: Literal["exact", "bernoulli"] = "exact"
    pretrained: str = ""
    identity_start: bool = False

    mask_task: bool = True
    denoise_task: bool = True
    mask_ratio: float = 0.45
    noise_ratio: float = 0.45
    noise_std: float = 1.0
    corruption: Literal["exact", "bernoulli"] = "exact"
    criss_cross_depth: int = 1
    criss_cross_heads: int = 0
    mlp_ratio: float = 4.0
    positions_after_corruption: bool = True
    share_pathways: bool = True
    per_channel: bool = True
    detach_target: bool = True
    reconstruction_weight: float = 0.2

    fine: Literal["full", "causal_only", "off"] = "full"
    tokens_per_keypoint: int = 4
    num_clusters: int = 32
    neighbors: int = 5
    include_self: bool = True
    scale_distance: bool = True
    peak_delta: Literal["row_max", "global_max"] = "row_max"
    importance: Literal["mean", "max"] = "mean"
    normalize_merge: bool = True
    selection_weight: float = 0.1

    head: Literal["deconv", "token"] = "deconv"
    head_channels: int = 256
    sigma: float = 2.0
    checkpoint_activations: bool = False
    backend: Backend = "auto"


@dataclass
class AugmentConfig:
    """Training-time augmentation of a person crop.

    Attributes:
        enabled: False trains on crops without augmentation.
        sampling: ``paper`` draws the scale uniformly from 1 ± ``scale`` and the rotation uniformly
            from ± ``rotation``. ``dcpose`` draws both from normal distributions that are cut off,
            the rotation at twice ``rotation`` and only with probability 0.6.
        scale: how much the scale varies, as a share.
        rotation: how much the rotation varies, in degrees.
        flip: probability of mirroring.
        half_body: probability of cropping to the upper or the lower body (truncation).
        half_body_min_joints: people with at most this many visible joints are never
            cropped to a half.
        photometric: probability of each of six changes of light, tone, colour, texture, sharpness
            and noise (``cmpose.data.photometric``); 0 leaves pixels as they are.
    """

    enabled: bool = True
    sampling: Literal["paper", "dcpose"] = "paper"
    scale: float = 0.35
    rotation: float = 45.0
    flip: float = 0.5
    half_body: float = 0.3
    half_body_min_joints: int = 8
    photometric: float = 0.0


@dataclass
class DataConfig:
    """Where clips come from.

    Attributes:
        root: folder of the frames, from which the annotations' ``file_name`` starts.
        train_annotations: a folder with one JSON file a sequence, or one JSON file of all; a
            relative path starts at ``root``.
        val_annotations: as ``train_annotations``, for evaluation.
        train_sequences: how many sequences the training annotations must have; 0 takes any
            number. PoseTrack18 has 593 in version 0.45.
        val_sequences: how many sequences the evaluation annotations must have; 0 takes any
            number. PoseTrack18 has 170 in version 0.45.
        format: the annotations' format; ``auto`` recognises PoseTrack17's annolist and
            COCO-style files by their keys.
        boxes: ``gt`` evaluates in ground-truth boxes; otherwise a file of detections with DCPose's
            or mmpose's keys, whose relative path starts at ``root``.
        box_score_threshold: detections with a lower score are dropped.
        box_enlarge: factor by which a box is enlarged before cropping.
        unannotated: what a joint that nobody annotated teaches: ``ignore`` nothing, as in DCPose;
            ``background`` that its heatmap is empty.
        on_error: ``raise`` stops at an unreadable frame or a broken annotation; ``skip`` leaves
            the clip out and counts it.
        udp: crops and heatmaps follow unbiased data processing, as ViTPose's weights need, instead
            of DCPose's affine map.
        decode: how a joint's position is refined from its heatmap's maximum: ``quarter`` (a quarter
            pixel towards the higher neighbour) or ``dark``.
        flip_test: averages the heatmaps with those of the mirrored clip.
        score: what a joint's score is: ``heatmap_box`` the heatmap's maximum times the box's score
            (DCPose), ``heatmap`` the maximum alone (mmpose).
        num_workers: number of loader processes; 0 loads in the main process.
        frame_cache_mb: memory for decoded frames in each loader process, in MB.
        warp: where crops are made: on the ``host`` by OpenCV, rounded to whole grey levels, or on
            the ``device``, from cut-outs of the frames; ``auto`` takes the device if it is a GPU.
        reduced_decode: decodes JPEG frames of people who are larger than the crop at a half, a
            quarter or an eighth of their size, never below the crop's: faster, and crops are
            smoother than plain ones, which skip pixels. Without effect on a cache's pixels.
        cache: folder that ``cmpose cache`` has filled; clips are made from it and not from the
            frames. Empty reads the frames. See ``docs/data.md``.
        cache_format: how a cache stores pixels: ``raw`` as they were decoded, or ``jpeg``, which is
            smaller and slower and changes them a little.
        cache_quality: quality of ``jpeg`` in a cache, 1 to 100.
        cache_detail: 0 stores people at the frames' resolution. A positive number d shrinks people
            larger than d times the crop by a whole factor, to no less than d times the crop.
        augment: training-time augmentation, see ``AugmentConfig``.
    """

    root: str = "."
    train_annotations: str = "annotations/train"
    val_annotations: str = "annotations/val"
    train_sequences: int = 0
    val_sequences: int = 0
    format: Literal["auto", "posetrack17", "coco"] = "auto"
    boxes: str = "gt"
    box_score_threshold: float = 0.2
    box_enlarge: float = 1.25
    unannotated: Literal["ignore", "background"] = "ignore"
    on_error: Literal["raise", "skip"] = "raise"
    udp: bool = False
    decode: Literal["quarter", "dark"] = "quarter"
    flip_test: bool = False
    score: Literal["heatmap_box", "heatmap"] = "heatmap_box"
    num_workers: int = 2
    frame_cache_mb: int = 64
    warp: Literal["auto", "host", "device"] = "auto"
    reduced_decode: bool = False
    cache: str = ""
    cache_format: Literal["raw", "jpeg"] = "raw"
    cache_quality: int = 95
    cache_detail: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """How a model is trained. The defaults are the paper's recipe where it gives one.

    Attributes:
        epochs: number of passes over the clips; a pass leaves out what does not fill a batch.
        batch_size: clips in a step, in all processes and micro-batches together.
        accumulate: number of micro-batches that a step is cut into, to save memory.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's; biases, norms and embeddings have none.
        layer_decay: factor between the learning rates of a backbone block and the next one; 1 gives
            all the same rate.
        schedule: ``steps`` multiplies the rate by ``step_factor`` after each epoch in
            ``step_epochs``; ``one_cycle`` lets it rise for 30 % of the steps and then fall along a
            cosine.
        step_epochs: epochs after which the rate drops.
        step_factor: factor of each drop.
        warmup_steps: steps in which the rate of the ``steps`` schedule rises linearly.
        clip_norm: limit of the gradient norm; 0 is no limit.
        precision: what the model computes in; weights, gradients and the optimiser's state are
            float32 in any case.
        products: how the matrix products of the backbone's and the criss-cross network's linear
            maps are taken while training: ``plain`` in ``precision``, summed in float32; ``fp8``
            of 8-bit numbers, on cards that have them (RTX 40 and 50, Hopper, Blackwell);
            ``fp8_emulated`` the same in float32 on any device, slowly. ``fp16_accumulate`` sums
            all products of ``precision: fp16`` in float16, on GeForce RTX 30 to 50;
            ``fp16_accumulate_emulated`` rounds the sums likewise on any device, slowly.
        speed: ``eager`` runs the step operator by operator; ``compile`` puts the model and its
            losses through ``torch.compile``; ``graph`` replays the whole compiled step as a CUDA
            graph; ``auto`` is ``graph`` on one card, ``compile`` on several or with ``fp16``,
            ``eager`` on a CPU, with ``fsdp`` and with ``fp16_accumulate_emulated``.
        distributed: what each of several processes holds: ``ddp`` the whole model; ``fsdp`` a part
            of every weight, gradient and moment, for models that are too large otherwise. Without
            effect in one process.
        gradient_compression: how several processes exchange gradients: ``none`` in float32,
            ``bf16`` rounded to half the bytes. Without effect in one process.
        seed: what weights, order, augmentation and corruption are drawn from.
        device: ``cpu``, ``cuda`` or ``auto``, which takes a GPU when there is one.
        log_every: steps between log lines.
        pictures_every: steps between pictures in TensorBoard; 0 makes none.
        checkpoint_every: steps between checkpoints; 0 writes one at the end of every epoch.
        keep_checkpoints: how many of the newest checkpoints are kept.
        evaluate_every: epochs between evaluations; 0 evaluates at the end only.
    """

    epochs: int = 20
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 2e-4
    weight_decay: float = 0.1
    layer_decay: float = 1.0
    schedule: Literal["steps", "one_cycle"] = "steps"
    step_epochs: tuple[int, ...] = (5, 12, 18)
    step_factor: float = 0.1
    warmup_steps: int = 500
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    products: Literal[
        "plain", "fp8", "fp8_emulated", "fp16_accumulate", "fp16_accumulate_emulated"
    ] = "plain"
    speed: Literal["auto", "eager", "compile", "graph"] = "auto"
    distributed: Literal["ddp", "fsdp"] = "ddp"
    gradient_compression: Literal["none", "bf16"] = "none"
    seed: int = 0
    device: str = "auto"
    log_every: int = 10
    pictures_every: int = 200
    checkpoint_every: int = 0
    keep_checkpoints: int = 3
    evaluate_every: int = 1


@dataclass
class Config:
    """A recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}


COMMON = (
    *("model.backbone", "model.pretrained", "data.root", "data.cache", "data.boxes"),
    *("train.epochs", "train.batch_size", "train.accumulate", "train.lr", "train.precision"),
    "train.device",
)
"""Fields that a command's short help shows."""


def add_fields(parser: ArgumentParser) -> None:
    """Adds ``--config FILE`` and ``--model.x``, ``--data.x``, ``--train.x`` to a parser."""
    parser.add_argument("--config", action="config", help="a recipe in YAML, such as in configs/")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)


def add_some_fields(parser: ArgumentParser, acting: Mapping[str, Collection[str]]) -> None:
    """Adds ``--config FILE`` and those fields that a command acts on: any other is refused.

    The file may hold all fields. The command's ``default_recipe`` reads it.

    Args:
        parser: of the command.
        acting: section → names of its fields.
    """
    parser.add_argument(
        "--config",
        default="",
        help="a recipe in YAML, such as in configs/; the options below change fields of it",
    )
    for name, chosen in acting.items():
        skip = {each.name for each in fields(SECTIONS[name])} - set(chosen)
        parser.add_class_arguments(SECTIONS[name], name, skip=skip)


def all_fields(section: str, *but: str) -> list[str]:
    """The names of a section's fields, but those."""
    return [each.name for each in fields(SECTIONS[section]) if each.name not in but]


def from_namespace(values: Namespace, recipe: Config | None = None) -> Config:
    """The typed configuration from parsed values (sections beside other arguments).

    Args:
        values: of the parser.
        recipe: has the fields that the parser lacks, see :func:`add_some_fields`.
    """
    if recipe is None:
        sections = {
            name: section(**_plain(name, values[name])) for name, section in SECTIONS.items()
        }
        return Config(**sections)
    changes = {name: _plain(name, values[name]) for name in SECTIONS if name in values}
    return Config(
        **{name: replace(getattr(recipe, name), **changes.get(name, {})) for name in SECTIONS}
    )


def _plain(name: str, section: Namespace) -> dict:
    """A section's fields. The parser takes null and infinity, of which a field has no use."""
    fields = dict(section.as_dict())
    for field_name, value in flatten({name: fields}).items():
        if value is None:
            raise ValueError(
                f"bad configuration: {field_name}: null is no value; leave the field out for its "
                "default, or give '' for no text"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"bad configuration: {field_name}: {value} is no finite number")
    if "augment" in fields:
        if not isinstance(fields["augment"], dict):
            raise ValueError(
                "bad configuration: data.augment: expected a mapping of its fields, got "
                f"{fields['augment']!r:.60}"
            )
        fields["augment"] = AugmentConfig(**fields["augment"])
    return fields


def _keys(value: object) -> Iterator[object]:
    """All keys of a mapping and of the mappings in it."""
    if isinstance(value, dict):
        yield from value
        for inner in value.values():
            yield from _keys(inner)


@cache
def _fields_parser() -> ArgumentParser:
    """Made once: it takes longer to make than a recipe to read."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_fields(parser)
    return parser


def from_dict(values: dict) -> Config:
    """The typed configuration from plain data, checked field by field.

    Raises:
        ValueError: naming an unknown field or a value of the wrong type.
    """
    from jsonargparse import ArgumentError

    unknown = [key for key in values if key not in SECTIONS]
    if unknown:
        raise ValueError(
            f"bad configuration: no section {unknown[0]!r:.60}; there are {', '.join(SECTIONS)}"
        )
    for section, section_fields in values.items():
        if not isinstance(section_fields, dict):
            raise ValueError(
                f"bad configuration: {section}: expected a mapping of its fields, got "
                f"{section_fields!r:.60}"
            )
    others = [key for key in _keys(values) if not isinstance(key, str)]
    if others:
        raise ValueError(f"bad configuration: {others[0]!r:.60}: expected the name of a field")
    for name, value in flatten(values).items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(
                f"bad configuration: {name:.200}: a whole number too large for 64 bits"
            )
    try:
        return from_namespace(_fields_parser().parse_object(values))
    except ArgumentError as error:
        names = flatten(to_dict(Config()))
        message = usage.one_line(str(error), names, prefix="")
        raise ValueError(f"bad configuration: {message:.500}") from error


def load(path: str | Path, **overrides: object) -> Config:
    """Reads a YAML recipe.

    Args:
        path: of the file.
        overrides: fields that differ from it, such as ``{"train.epochs": 3}``.

    Raises:
        ValueError: the file is not YAML, or not a recipe; the message names it.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such recipe; configs/ has some") from error
    # PyYAML passes on what Python says of dates and numbers that there cannot be.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{line} is not YAML: {problem}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a YAML mapping with {', '.join(SECTIONS)}")
    for dotted, value in overrides.items():
        *sections, name = dotted.split(".")
        section = values
        for each in sections:
            inner = section.setdefault(each, {})
            section = inner if isinstance(inner, dict) else {}  # which from_dict refuses
        section[name] = value
    try:
        return from_dict(values)
    except ValueError as error:
        line = _line_of(path, str(error), overrides)
        raise ValueError(f"{path}{line}: {error}") from error


def _line_of(path: str | Path, error: str, overrides: Collection[str]) -> str:
    """``, line 3``: of the field of a recipe that an error of ``from_dict`` names."""
    import yaml

    match = re.match(r"bad configuration: (?:no section )?'?([\w.]+)", error)
    if match is None or match[1] in overrides:
        return ""
    node, line = yaml.compose(Path(path).read_text(encoding="utf-8-sig")), 0
    for name in match[1].split("."):
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value == name:
                line, node = key.start_mark.line + 1, value
                break
        else:
            return ""
    return f", line {line}" if line else ""


def to_dict(config: Config) -> dict:
    """Plain data (tuples as lists) that ``from_dict`` reads back and JSON or YAML can hold."""
    return json.loads(json.dumps(asdict(config)))


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Dotted name → value of the fields in a ``to_dict`` result."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def in_words(changed: dict[str, tuple[object, object]]) -> str:
    """What :func:`differences` found, for an error message: at most ten of them."""
    texts = [f"{name:.60} was {old!r:.40}, is {new!r:.40}" for name, (old, new) in changed.items()]
    more = [f"and {len(texts) - 10} more"] if len(texts) > 10 else []
    return "; ".join(texts[:10] + more)


def differences(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Dotted names of the fields in which two ``to_dict`` results differ, with both values."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
