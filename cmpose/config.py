"""Every setting of cmpose as typed fields; a YAML recipe or a ``--field value`` sets any of them.

The comments name the row of the design's table of open points, or the paper's equation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a model is built from these classes without the parser's packages
    from jsonargparse import ArgumentParser, Namespace

Backend = Literal["auto", "reference", "triton", "cuda"]


@dataclass
class ModelConfig:
    """CM-Pose. Symbols: B clips, T frames, N patch tokens a frame, K keypoints, D width.

    Attributes:
        backbone: ViT size. ``tiny`` is for CPUs and is trained from scratch.
        image_size: (height, width) of a person crop in pixels; each a multiple of 16.
        num_frames: T = 2ω+1, odd, ≥ 1; the key frame is the middle one.
        num_keypoints: K, joints predicted; it must be the annotations' number. 0 takes theirs
            when training starts.
        depth: override of the backbone's number of blocks; 0 keeps it.
        stem: ``patch`` is ViTPose's 16×16 convolution, ``conv`` four stride-2 3×3 convolutions
            with batch norm; ``auto`` takes ``conv`` for tiny and ``patch`` otherwise.
        drop_path: stochastic depth rate of the last block (linear from 0); < 0 takes ViTPose's
            rate for the backbone's size.
        pretrained: weights to start from; empty starts at random. A ``.safetensors`` or ``.pth``
            file or a model's folder: ViTPose in the original's, mmpose 1.x's or Hugging Face's
            keys, a ViT of MAE or timm, or cmpose's own. See ``docs/weights.md``.
        mask_task: token masking and its reconstruction loss (Eq. 2).
        denoise_task: token noise and its reconstruction loss (Eq. 3).
        mask_ratio: p_tm, share of a clip's T·N tokens that is masked.
        noise_ratio: p_tn, share that gets noise.
        noise_std: standard deviation of the Gaussian noise.
        corruption: ``exact`` corrupts round(p·T·N) tokens of every clip, ``bernoulli`` each token
            with probability p.
        criss_cross_depth: blocks in each of D_S and D_T.
        criss_cross_heads: attention heads in D_S and D_T; 0 takes the backbone's.
        mlp_ratio: hidden width of an MLP over D, in backbone and criss-cross blocks.
        positions_after_corruption: adds the learned frame and slot embeddings after corruption,
            so that masked tokens know where they are; False adds them before.
        share_pathways: the two criss-cross pathways share the two blocks' weights (Eq. 5).
        per_channel: divides Eqs. 2–3 by D, so that λ does not depend on the width.
        detach_target: the reconstruction target F_v takes no gradient.
        reconstruction_weight: λ of Eq. 14.
        fine: ``full`` Fine Token Enhancement; ``causal_only`` discards the non-causal tokens
            (Table 5 a); ``off`` feeds the fused tokens straight to the head (Table 5 b).
        tokens_per_keypoint: n; n·K tokens are causal.
        num_clusters: L, merged tokens that stand for the non-causal ones.
        neighbors: k of DPC-kNN.
        include_self: a token counts among its own k neighbours, as in TCFormer.
        scale_distance: divides distances by √D, as in TCFormer.
        peak_delta: the density peak's δ: its ``row_max`` (Eq. 10) or TCFormer's ``global_max``.
        importance: s_j from the keypoints' scores: their ``mean`` or ``max``.
        normalize_merge: divides Eq. 11's weights by their sum in the cluster.
        selection_weight: μ, weight of a pose loss on the scores that select causal tokens, taken
            as coarse heatmaps; 0 is Eq. 14 as it stands.
        head: ``deconv`` is ViTPose's classic head on the restored grid; ``token`` lets keypoint
            queries cross-attend the fine tokens.
        head_channels: width of the deconvolutions.
        sigma: of the target Gaussian, in heatmap pixels.
        checkpoint_activations: recomputes blocks in the backward pass to save memory.
        backend: which kernels run the ops.
    """

    backbone: Literal["tiny", "small", "base", "large", "huge"] = "base"
    image_size: tuple[int, int] = (256, 192)
    num_frames: int = 3
    num_keypoints: int = 15
    depth: int = 0
    stem: Literal["auto", "patch", "conv"] = "auto"
    drop_path: float = -1.0
    pretrained: str = ""

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
        enabled: False trains on the plain 1.25× crops.
        sampling: ``paper``: scale uniform in 1 ± scale, rotation uniform in ± rotation (degrees);
            ``dcpose``: clipped normals, rotation up to twice the factor with probability 0.6.
        scale: scale factor.
        rotation: rotation factor, degrees.
        flip: probability of mirroring.
        half_body: probability of cropping to the upper or the lower body (truncation).
        half_body_min_joints: half body only for people with more visible joints than this.
    """

    enabled: bool = True
    sampling: Literal["paper", "dcpose"] = "paper"
    scale: float = 0.35
    rotation: float = 45.0
    flip: float = 0.5
    half_body: float = 0.3
    half_body_min_joints: int = 8


@dataclass
class DataConfig:
    """Where clips come from.

    Attributes:
        root: folder that the annotations' ``file_name`` is relative to.
        train_annotations: a folder with one JSON a sequence, or one merged JSON file; relative
            paths start at ``root``.
        val_annotations: likewise, for evaluation.
        train_sequences: how many sequences the training annotations must have; 0 takes any
            number. PoseTrack18 has 593 in version 0.45.
        val_sequences: likewise for the evaluation annotations; PoseTrack18 has 170 in 0.45.
        format: ``auto`` tells PoseTrack17's annolist from COCO-style files by their keys.
        boxes: ``gt`` takes ground-truth boxes at evaluation; otherwise a detection file
            (DCPose's or mmpose's keys), relative to ``root``.
        box_score_threshold: detections below it are dropped.
        box_enlarge: a box is enlarged by it before cropping.
        unannotated: what a joint nobody annotated does in training: ``ignore`` gives it no loss,
            as DCPose does; ``background`` trains its heatmap towards empty.
        on_error: ``raise`` stops at an unreadable frame or a broken annotation; ``skip`` leaves
            the clip out and counts it.
        udp: unbiased data processing (for ViTPose weights) instead of DCPose's affine.
        decode: ``quarter`` offset or ``dark``.
        flip_test: averages the heatmaps with those of the mirrored clip.
        score: a joint's score: heatmap maximum × box score (DCPose), or the maximum ``heatmap``
            alone (mmpose).
        num_workers: loader processes; 0 loads in the main process.
        frame_cache_mb: decoded frames that each loader process keeps, in MB.
        warp: where crops are made: on the ``host`` by OpenCV, in whole grey levels, or on the
            ``device``, from cut-outs of the frames; ``auto`` is the device if that is a GPU.
        cache: folder that ``cmpose cache`` has filled, which clips are then made from in place of
            the frames; empty reads the frames. See ``docs/data.md``.
        cache_format: of its pixels: ``raw`` as decoded, or ``jpeg``, smaller, slower and no
            longer exactly the frames'.
        cache_quality: of ``jpeg``, 1 to 100.
        cache_detail: 0 keeps the frames' own pixels. Above, people larger than this × the crop
            are stored shrunk by a whole factor, not below this × the crop.
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
    cache: str = ""
    cache_format: Literal["raw", "jpeg"] = "raw"
    cache_quality: int = 95
    cache_detail: float = 0.0
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class TrainConfig:
    """How a model is trained. The defaults are the paper's recipe where it gives one.

    Attributes:
        epochs: passes over the clips; a pass is cut to whole batches.
        batch_size: clips in a step, over all processes and accumulation.
        accumulate: micro-batches a step is cut into, to save memory.
        lr: peak learning rate of AdamW.
        weight_decay: AdamW's; not applied to biases, norms and embeddings.
        layer_decay: learning-rate factor from one backbone block to the one before; 1 is off.
        schedule: ``steps`` multiplies by ``step_factor`` after each epoch in ``step_epochs``;
            ``one_cycle`` rises for 30 % of the steps and then falls along a cosine.
        step_epochs: epochs after which the rate drops.
        step_factor: what it is multiplied by.
        warmup_steps: linear warm-up of the ``steps`` schedule.
        clip_norm: gradient norm limit; 0 is off.
        precision: what the model computes in; its weights, their gradients and the optimiser's
            state are fp32 in any case.
        speed: ``eager`` runs the step operator by operator, ``compile`` the model and its losses
            through ``torch.compile``, ``graph`` replays the whole compiled step as a CUDA graph.
        distributed: what several processes hold: ``ddp`` the whole model each, ``fsdp`` a part
            of every weight, gradient and moment, for models that are too large otherwise.
        gradient_compression: what gradients are averaged in: ``none`` is float32, ``bf16`` half
            the bytes, rounded. Without effect in one process, as ``distributed`` is.
        seed: of weights, order, augmentation and corruption.
        device: ``auto`` takes a GPU when there is one.
        log_every: steps between log lines.
        pictures_every: steps between TensorBoard pictures; 0 is off.
        checkpoint_every: steps between checkpoints; 0 writes one at the end of every epoch.
        keep_checkpoints: newest checkpoints kept.
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
    speed: Literal["eager", "compile", "graph"] = "eager"
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


def add_fields(parser: ArgumentParser) -> None:
    """Gives a parser ``--config FILE`` and ``--model.x``, ``--data.x``, ``--train.x``."""
    parser.add_argument("--config", action="config", help="a YAML recipe, see configs/")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)


def from_namespace(values: Namespace) -> Config:
    """The typed configuration from parsed values (sections beside other arguments)."""
    return Config(**{name: section(**_plain(values[name])) for name, section in SECTIONS.items()})


def _plain(section: Namespace) -> dict:
    fields = dict(section.as_dict())
    if "augment" in fields:
        fields["augment"] = AugmentConfig(**fields["augment"])
    return fields


def from_dict(values: dict) -> Config:
    """The typed configuration from plain data, checked field by field.

    Raises:
        ValueError: naming an unknown field or a value of the wrong type.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    unknown = [key for key in values if key not in SECTIONS]
    if unknown:
        raise ValueError(
            f"bad configuration: no section {unknown[0]!r}; there are {', '.join(SECTIONS)}"
        )
    parser = ArgumentParser(exit_on_error=False)
    add_fields(parser)
    try:
        return from_namespace(parser.parse_object(values))
    except ArgumentError as error:
        raise ValueError(f"bad configuration: {error}") from error


def load(path: str | Path, **overrides: object) -> Config:
    """Reads a YAML recipe; ``overrides`` such as ``{"train.epochs": 3}`` come on top."""
    import yaml

    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a YAML mapping with {', '.join(SECTIONS)}")
    for dotted, value in overrides.items():
        *sections, name = dotted.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return from_dict(values)


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


def differences(old: dict, new: dict) -> dict[str, tuple[object, object]]:
    """Dotted names of the fields in which two ``to_dict`` results differ, with both values."""
    a, b = flatten(old), flatten(new)
    return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
