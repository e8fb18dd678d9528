"""Evaluation: predict every box of a data set, write PoseTrack18 files, score them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from cmpose.config import Config, DataConfig, TrainConfig
from cmpose.data.clips import ClipDataset, open_clips, worker_init
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import listed, write_posetrack18
from cmpose.data.formats.run import writer_of
from cmpose.data.records import GROUND_TRUTH, ClipRecord
from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.distributed import World, claim_together, join_world
from cmpose.evaluation.decode import decode_heatmaps, to_image
from cmpose.evaluation.inference import clip_images, move_pixels, predict_heatmaps
from cmpose.evaluation.mean_pose import mean_pose, mean_pose_in_images
from cmpose.evaluation.posetrack_ap import APResult, score_folders
from cmpose.evaluation.predictions import write_predictions
from cmpose.evaluation.subsets import subset_results
from cmpose.files import write_metrics, write_text
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.models.vit import PATCH
from cmpose.models.weights import checkpoint, packaged
from cmpose.models.weights.card import data_name

OUTPUT_FOLDERS = ("predictions", "ground_truth")
"""Folders that an evaluation writes below its output; the second only for a merged file."""

_MARK = ".cmpose-evaluate"
"""A file that tells an evaluation's output, also where the evaluation was killed."""


def causal_hits(
    output: CMPoseOutput, batch: dict[str, Tensor], n: int, image_size: tuple[int, int]
) -> Tensor:
    """Counts visible joints that have one of their own top-n tokens within a cell of them.

    Args:
        output: of the model, with Fine Token Enhancement.
        batch: from the loader; ``keypoints`` [B, K, 2] in crop pixels, ``visible`` [B, K].
        n: tokens a keypoint.
        image_size: (H, W) of the crops.

    Returns:
        [hits, visible joints], float64.
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
    """A predicted pose: whose it is, keypoints [K, 2] in image pixels, heatmap maxima [K]."""

    record: ClipRecord
    keypoints: np.ndarray
    scores: np.ndarray


@torch.no_grad()
def predict_clips(
    model: CMPose, clips: ClipDataset, config: Config, world: World, *, progress: bool
) -> tuple[list[Pose], np.ndarray]:
    """Predicts the poses of all boxes; each process takes some, and every one gets all.

    Returns:
        The poses, in the clips' order, and the sums of ``causal_hits``, [hits, visible joints]
        (zeros when boxes are detections or Fine Token Enhancement is off).
    """
    mine = range(world.rank, len(clips), world.size)
    loader = DataLoader(
        Subset(clips, list(mine)),
        batch_size=max(1, config.train.batch_size // world.size),
        num_workers=config.data.num_workers,
        worker_init_fn=worker_init,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
    )
    predicted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    hits = torch.zeros(2, dtype=torch.float64)
    count_hits = clips.box_source == GROUND_TRUTH and config.model.fine != "off"
    for batch in tqdm(
        loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True
    ):
        images = clip_images(move_pixels(batch, world.device), config)
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
                predicted[index] = (image_xy[row].numpy(), scores[row].numpy())
    for others in world.gather(predicted):
        predicted |= others
    poses = [Pose(clips.records[i], *predicted[i]) for i in sorted(predicted)]
    return poses, world.sum(hits.to(world.device)).cpu().numpy()


def score_predictions(
    config: Config, clips: ClipDataset, poses: list[Pose], folder: Path
) -> tuple[APResult, dict[str, dict[str, Any]]]:
    """Writes predictions into ``folder`` and scores them by the official AP.

    Where keypoints are not PoseTrack's, or no person has a head box, distances are measured in
    boxes, and the result says so.

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
    if not truth.is_dir():  # one merged file, but the evaluator wants a file a sequence
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
    """Scores the baseline that answers every box with the training people's mean pose.

    Args:
        config: the recipe.
        folder: gets the predictions.

    Returns:
        As ``score_predictions``.
    """
    people = open_clips(config, train=True, quiet=True)
    _, keypoints, visible = people.plain_joints()
    mean = mean_pose(keypoints, visible, config.model.image_size)
    held_out = open_clips(config, train=False, quiet=True)
    matrices, _, _ = held_out.plain_joints()
    in_images = mean_pose_in_images(mean, matrices, config.model.image_size)
    poses = [
        Pose(record, xy, np.ones(len(xy), np.float32))
        for record, xy in zip(held_out.records, in_images, strict=True)
    ]
    return score_predictions(config, held_out, poses, folder)


def evaluation_clips(
    config: Config, skeleton: Skeleton, device: torch.device, *, quiet: bool
) -> ClipDataset:
    """The evaluation clips of a recipe, for a model of these keypoints.

    Raises:
        ValueError: they have other keypoints; else as :func:`open_clips`.
    """
    clips = open_clips(config, train=False, device=device, quiet=quiet)
    if skeleton.keypoints != clips.skeleton.keypoints:
        raise ValueError(
            f"the model predicts {listed(skeleton)}, the annotations "
            f"{config.data.val_annotations} have {listed(clips.skeleton)}: give those that the "
            "model was trained for, in the same order"
        )
    return clips


def evaluate_model(
    model: CMPose, config: Config, output: Path, world: World, *, progress: bool = True
) -> dict[str, Any]:
    """Evaluates a model on ``data.val_annotations`` with ``data.boxes``.

    Writes predictions to ``output/predictions`` and returns the metrics (on every process):
    ``ap`` as ``cmpose score --json`` writes it, ``subsets`` (clean, occluded and defocused frames
    apart, where the data says which are), ``data``, ``box_source``, ``annotations``, ``seconds``,
    ``clips_per_second``, ``causal_hit_rate``.
    """
    clips = evaluation_clips(config, model.skeleton, world.device, quiet=not world.main)
    started = time.perf_counter()
    poses, (hits, joints) = predict_clips(model, clips, config, world, progress=progress)
    seconds = time.perf_counter() - started
    metrics: dict[str, Any] = {}
    if world.main:
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
    return world.gather(metrics)[0]


def evaluate_checkpoint(
    path: str | Path, data: DataConfig, train: TrainConfig, output: str | Path = ""
) -> dict[str, Any]:
    """``cmpose evaluate``: a checkpoint's model on the evaluation clips of ``data``.

    Args:
        path: a run's folder or a checkpoint.
        data: which annotations and boxes.
        train: batch size, precision and device.
        output: gets ``predictions/`` and ``metrics.json``; default
            ``RUN/evaluations/step-N``, or ``evaluations/NAME`` beside another model's folder.

    Raises:
        CheckpointError: there is no usable checkpoint.
        ValueError: for annotations that do not fit the model, or a packaged model without
            ``output``.
        FileExistsError: ``output`` holds predictions or metrics that are of no evaluation.
        InUse: another process evaluates into ``output``.
        OutputError: when something cannot be written.
    """
    with join_world(train.device) as world:
        model, config = checkpoint.load_model(path)
        config.data, config.train = data, train
        folder = Path(output) if output else _beside(checkpoint.find(path))
        _refuse_others(folder)
        with claim_together(world, folder, "evaluate", "--output", OUTPUT_FOLDERS):
            if world.main:
                write_text(folder / _MARK, "")
            metrics = evaluate_model(model.to(world.device), config, folder, world)
            if world.main:
                written = write_metrics(folder, metrics)
                print(f"predictions and {written.name} are in {folder}")
    return metrics


def _beside(model: Path) -> Path:
    """Where an evaluation goes for which no folder is named."""
    if packaged.is_packaged(model):
        raise ValueError(
            f"--output: {model.name} is a packaged model, beside which nothing is written: give a "
            "folder"
        )
    return checkpoint.evaluation_folder(model)


def _refuse_others(folder: Path) -> None:
    """Raises FileExistsError if an evaluation into ``folder`` would replace what none wrote."""
    metrics = folder / "metrics.json"
    outputs = [folder / name for name in OUTPUT_FOLDERS]
    for path in outputs:
        if path.is_symlink():
            raise FileExistsError(
                f"{path}: is a link, and predictions would be written where it leads: move it, or "
                "give another --output"
            )
    if (folder / _MARK).exists() or writer_of(metrics) == "evaluate":
        return
    for path in (metrics, *outputs):
        if any(path.glob("*.json")) if path.is_dir() else os.path.lexists(path):
            raise FileExistsError(
                f"{path}: is there already and is not of cmpose evaluate: move it, or give another "
                "--output"
            )
