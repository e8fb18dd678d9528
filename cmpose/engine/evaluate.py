"""Evaluation: predict every box of a data set, write PoseTrack18 files, score them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cmpose import ops
from cmpose.config import Config, DataConfig, ModelConfig, TrainConfig
from cmpose.data.clips import GROUND_TRUTH, ClipDataset, ClipRecord, worker_init
from cmpose.data.cutouts import collate
from cmpose.data.posetrack import listed, load_annotations, validate, write_posetrack18
from cmpose.data.skeleton import POSETRACK
from cmpose.data.transforms import normalize_clips
from cmpose.engine import checkpoint
from cmpose.engine.distributed import World, world
from cmpose.engine.runlog import write_metrics
from cmpose.evaluation.decode import decode_heatmaps, flip_heatmaps, to_image
from cmpose.evaluation.mean_pose import mean_pose, place_mean_pose
from cmpose.evaluation.posetrack_ap import APResult, score_folders
from cmpose.evaluation.predictions import write_predictions
from cmpose.evaluation.subsets import subset_results
from cmpose.models.card import data_name
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.models.vit import PATCH

_CPU = torch.device("cpu")


def compute_dtype(precision: str) -> torch.dtype:
    """The dtype of the clips, and with it of the whole model (``cmpose/models/layers.py``)."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


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


_PIXELS = ("clip", "frames", "frames_matrix")


def move_pixels(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """What of a batch images are made of, on its way to ``device``."""
    moved = {key: batch[key] for key in _PIXELS if key in batch}
    return {key: value.to(device, non_blocking=True) for key, value in moved.items()}


def clip_images(
    pixels: dict[str, Tensor],
    config: Config,
    part: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The model's input: normalised RGB crops, made where the pixels are.

    Args:
        pixels: from ``move_pixels``.
        config: the recipe.
        part: of the batch's clips.
        dtype: of the result, and of what the model computes from it; None is the recipe's.

    Returns:
        [B, T, 3, H, W].
    """
    dtype = dtype or compute_dtype(config.train.precision)
    if "clip" in pixels:
        return normalize_clips(pixels["clip"][part], dtype)
    matrices = pixels["frames_matrix"][part]
    return ops.warp_clips(
        pixels["frames"].expand(len(matrices), -1, -1, -1, -1),  # one strip for all
        matrices,
        config.model.image_size,
        dtype=dtype,
        backend=config.model.backend,
    )


def key_crops(batch: dict[str, Tensor], model: ModelConfig, count: int) -> np.ndarray:
    """The crops of the key frame of a batch's last ``count`` clips, uint8 RGB [count, H, W, 3]."""
    key = model.num_frames // 2
    if "clip" in batch:
        return batch["clip"][-count:, key].numpy()
    crops = ops.warp_clips(
        batch["frames"][key : key + 1].expand(count, -1, -1, -1, -1),
        batch["frames_matrix"][-count:],
        model.image_size,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        backend="reference",  # the batch is on the host
    )
    return crops[:, 0].round().to(torch.uint8).movedim(1, -1).contiguous().numpy()


def predict_heatmaps(model: CMPose, images: Tensor, data: DataConfig) -> CMPoseOutput:
    """The model's output; with ``flip_test`` its heatmaps are averaged with the mirrored clip's."""
    output = model(images)
    if not data.flip_test:
        return output
    heatmaps = model(images.flip(-1)).heatmaps
    mirrored = flip_heatmaps(heatmaps, udp=data.udp, skeleton=model.skeleton)
    return output._replace(heatmaps=0.5 * (output.heatmaps + mirrored))


def causal_hits(
    output: CMPoseOutput, batch: dict[str, Tensor], n: int, image_size: tuple[int, int]
) -> Tensor:
    """Of the visible joints: how many have one of their own top-n tokens within a cell of them.

    Returns [hits, joints], float64.
    """
    assert output.fine is not None
    rows, columns = (side // PATCH for side in image_size)
    top = output.fine.selection.scores.topk(n, dim=-1).indices.cpu()  # [B, K, n]
    cell = torch.floor(batch["keypoints"] / PATCH).long()  # [B, K, (x, y)]
    near = ((top % columns - cell[..., :1].clamp(0, columns - 1)).abs() <= 1) & (
        (top // columns - cell[..., 1:].clamp(0, rows - 1)).abs() <= 1
    )
    visible = batch["visible"] > 0
    hits = (near.any(-1) & visible).sum()
    return torch.stack([hits, visible.sum()]).double()


class Pose(NamedTuple):
    """A predicted pose: whose, keypoints [K, 2] in image pixels, heatmap maxima [K]."""

    record: ClipRecord
    keypoints: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def predict_clips(
    model: CMPose, clips: ClipDataset, config: Config, place: World, *, progress: bool
) -> tuple[list[Pose], np.ndarray]:
    """Poses of all boxes, shared among the processes.

    Returns:
        The poses, in the clips' order, and [hits, joints] of ``causal_hits`` (zeros when boxes
        are detections or Fine Token Enhancement is off).
    """
    mine = range(place.rank, len(clips), place.size)
    loader = DataLoader(
        Subset(clips, list(mine)),
        batch_size=max(1, config.train.batch_size // place.size),
        num_workers=config.data.num_workers,
        worker_init_fn=worker_init,
        collate_fn=collate,
        pin_memory=place.device.type == "cuda",
    )
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    hits = torch.zeros(2, dtype=torch.float64)
    count_hits = clips.box_source == GROUND_TRUTH and config.model.fine != "off"
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=not progress):
        images = clip_images(move_pixels(batch, place.device), config)
        output = predict_heatmaps(model, images, config.data)
        if count_hits:
            n, size = config.model.tokens_per_keypoint, config.model.image_size
            hits += causal_hits(output, batch, n, size)
        xy, scores = decode_heatmaps(
            output.heatmaps.float().cpu(), config.data.decode, sigma=config.model.sigma
        )
        image_xy = to_image(
            xy,
            batch["matrix"],
            image_size=config.model.image_size,
            heatmap_size=model.heatmap_size,
            udp=config.data.udp,
        )
        for row, index in enumerate(batch["index"].tolist()):
            if batch["valid"][row]:  # a clip with unreadable frames gets no prediction
                found[index] = (image_xy[row].numpy(), scores[row].numpy())
    everyone: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in place.gather(found):
        everyone |= part
    poses = [Pose(clips.records[i], *everyone[i]) for i in sorted(everyone)]
    return poses, place.sum(hits.to(place.device)).cpu().numpy()


def score_predictions(
    config: Config, clips: ClipDataset, poses: list[Pose], folder: Path
) -> tuple[APResult, dict[str, dict[str, Any]]]:
    """Writes predictions into ``folder`` and scores them.

    With the official AP; for keypoints that are not PoseTrack's, or where no person has a head
    box, with distances in boxes, and under that name.

    Returns:
        The AP, and ``subset_results``, empty where there are no head boxes.
    """
    if not poses:
        raise ValueError(
            f"no pose to score: the frames of all {len(clips)} clips are unreadable "
            "(data.on_error=raise tells which and why)"
        )
    people = [pose.record for pose in poses]
    keypoints = np.stack([pose.keypoints for pose in poses])
    write_predictions(
        folder,
        clips.sequences,
        people,
        keypoints,
        np.stack([pose.scores for pose in poses]),
        config.data.score,
    )
    truth = Path(config.data.root).expanduser() / config.data.val_annotations
    if not truth.is_dir():  # one merged file: the evaluator matches a file a sequence
        truth = folder.with_name("ground_truth")
        for sequence in clips.sequences:
            write_posetrack18(truth / f"{sequence.file_stem}.json", sequence)
    everybody = (p for s in clips.sequences for frame in s.frames for p in frame.people)
    heads = clips.skeleton == POSETRACK and any(p.head_box is not None for p in everybody)
    result = score_folders(truth, folder, reference="head" if heads else "box")
    if not heads:
        return result, {}
    return result, subset_results(clips.sequences, people, keypoints, truth, folder, ap=result.mean)


def score_mean_pose(config: Config, folder: Path) -> tuple[APResult, dict[str, dict[str, Any]]]:
    """What always answering the training people's mean pose gets in the same boxes.

    Returns:
        As ``score_predictions``, whose predictions ``folder`` gets.
    """
    people = open_clips(config, train=True, quiet=True)
    _, keypoints, visible = people.plain_joints()
    mean = mean_pose(keypoints, visible, config.model.image_size)
    held_out = open_clips(config, train=False, quiet=True)
    matrices, _, _ = held_out.plain_joints()
    placed = place_mean_pose(mean, matrices, config.model.image_size)
    poses = [
        Pose(record, xy, np.ones(len(xy), np.float32))
        for record, xy in zip(held_out.records, placed, strict=True)
    ]
    return score_predictions(config, held_out, poses, folder)


def evaluate_model(
    model: CMPose, config: Config, output: Path, place: World, *, progress: bool = True
) -> dict[str, Any]:
    """Evaluates a model on ``data.val_annotations`` with ``data.boxes``.

    Writes predictions to ``output/predictions`` and returns the metrics (on every process):
    ``ap`` as ``cmpose score --json`` writes it, ``subsets`` (clean, occluded and defocused frames
    apart, where the data says which are), ``data``, ``box_source``, ``annotations``, ``seconds``,
    ``clips_per_second``, ``causal_hit_rate``.
    """
    clips = open_clips(config, train=False, device=place.device, quiet=not place.main)
    if model.skeleton.keypoints != clips.skeleton.keypoints:
        raise ValueError(
            f"the model predicts {listed(model.skeleton)}, the annotations "
            f"{config.data.val_annotations} have {listed(clips.skeleton)}: give those that the "
            "model was trained for, in the same order"
        )
    started = time.perf_counter()
    poses, (hits, joints) = predict_clips(model, clips, config, place, progress=progress)
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {}
    if place.main:
        result, subsets = score_predictions(config, clips, poses, output / "predictions")
        if progress:
            print(result.table(box_source=clips.box_source))
        metrics = {
            "ap": result.to_json(),
            "data": data_name(config.data.root, config.data.val_annotations),
            "subsets": subsets,
            "box_source": clips.box_source,
            "annotations": f"{config.data.root}: {config.data.val_annotations}",
            "seconds": seconds,
            "clips_per_second": len(clips) / max(seconds, 1e-9),
            "clips": len(clips),
            "skipped": dict(clips.skipped),
            "causal_hit_rate": hits / joints if joints else None,
        }
    return place.gather(metrics)[0]


def evaluate_checkpoint(
    path: str | Path, data: DataConfig, train: TrainConfig, output: str | Path = ""
) -> dict[str, Any]:
    """``cmpose evaluate``: a checkpoint's model on the evaluation clips of ``data``.

    Args:
        path: a run's folder or a checkpoint.
        data: which annotations and boxes.
        train: batch size, precision and device.
        output: gets ``predictions/`` and ``metrics.json``; default ``CHECKPOINT/evaluation``.
    """
    with world(train.device) as place:
        model, config = checkpoint.load_model(path)
        config.data, config.train = data, train
        folder = Path(output) if output else checkpoint.find(path) / "evaluation"
        metrics = evaluate_model(model.to(place.device), config, folder, place)
        if place.main:
            written = write_metrics(folder, metrics)
            print(f"predictions and {written.name} are in {folder}")
    return metrics
