"""Clips of one person each: T warped frames around a key frame, and the key frame's joints."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from cmpose.config import Config, DataConfig
from cmpose.data.cache.reader import open_cache
from cmpose.data.formats.detections import Detections, load_detections
from cmpose.data.formats.messages import counted
from cmpose.data.formats.posetrack import listed, load_annotations, validate
from cmpose.data.photometric import change_look
from cmpose.data.pictures import FrameError
from cmpose.data.pixels import ClipPixels
from cmpose.data.records import GROUND_TRUTH, ClipRecord, choose_records
from cmpose.data.sequence import Sequence
from cmpose.data.skeleton import POSETRACK
from cmpose.data.transforms import (
    Augmentation,
    clip_matrix,
    crop_matrix,
    crop_region,
    sample_augmentation,
    transform_joints,
)
from cmpose.files import end_with_parent

_CPU = torch.device("cpu")


class ClipDataset(Dataset[dict[str, torch.Tensor]]):
    """One clip per person and key frame.

    Training: every person with annotated joints in a labelled frame. Evaluation with ground-truth
    boxes: the same people; with detections: every box, in every frame that has boxes.

    The item is a dict of tensors: ``clip`` uint8 [T, H, W, 3] RGB crops; ``keypoints`` float32
    [K, 2] crop pixels; ``visible`` float32 [K], 1 where annotated and inside the crop;
    ``matrix`` float64 [2, 3] image → crop; ``index`` int64, which record it is; ``valid`` bool.
    With ``data.warp = device`` an item has, in place of ``clip``: ``frames`` uint8 [T, h, w, 3]
    RGB, the part of the frames that the crop is sampled from, and ``frames_matrix`` float64
    [2, 3] frames → crop. Sizes differ from item to item; ``cmpose.data.cutouts.collate`` makes
    batches of either kind. (``data.warp = auto`` is settled by :func:`open_clips`; here it means
    the host.) With ``data.cache`` pixels come from there, and frames are not read.

    An item depends on (seed, epoch, index) only, not on the worker, the process or what was
    loaded before. With ``data.on_error = skip`` a clip with an unreadable frame is replaced by the
    next readable one in training (``index`` says which), and is black with ``valid`` False in
    evaluation, where a prediction for it must be dropped; both are counted in ``skipped``.

    Args:
        sequences: annotations.
        root: folder that ``file_name`` is relative to.
        image_size: (H, W) of the crops.
        num_frames: T, odd.
        data: thresholds, augmentation, error policy, cache.
        train: True augments (if enabled) and takes the people that training uses.
        boxes: detections for evaluation; None reads ``data.boxes`` unless it is ``gt``.
        seed: of the augmentation.

    Attributes:
        sequences: the annotations.
        skeleton: theirs, with K keypoints.
        records: what the items are made of.
        box_source: ``ground truth`` or the detection file's name.
        notes: reason → number of clips that were kept although a support frame is not on disk.

    Raises:
        CacheError: ``data.cache`` is not the finished cache of these clips.
        FrameError: a frame that must be there is not, unless ``data.on_error`` is ``skip``.
        ValueError: an argument out of range, or nothing to train on or to evaluate.
    """

    def __init__(
        self,
        sequences: Items[Sequence],
        root: str | os.PathLike[str],
        image_size: tuple[int, int],
        num_frames: int,
        data: DataConfig,
        *,
        train: bool,
        boxes: Detections | None = None,
        seed: int = 0,
    ) -> None:
        _check_arguments(num_frames, data, train, boxes, seed)
        self.root = Path(root)
        if boxes is None and not train and data.boxes != "gt":
            boxes = load_detections(
                self.root / data.boxes,
                sequences,
                data.box_score_threshold,
                on_error=data.on_error,
            )
        self.sequences = list(sequences)
        self.skeleton = self.sequences[0].skeleton if self.sequences else POSETRACK
        self.image_size = image_size
        self.num_frames = num_frames
        self.data = data
        self.train = train
        self.seed = seed
        self.box_source = GROUND_TRUTH if boxes is None else boxes.name
        self.records, self._skipped, self.notes = choose_records(
            self.sequences, boxes, self.root, image_size, num_frames, data
        )
        if not self.records:
            raise ValueError(
                f"no clip to {'train on' if train else 'evaluate'} in {len(sequences)} sequences; "
                f"left out: {counted(self._skipped)}"
            )
        self.cache = (
            open_cache(self.records, self.root, image_size, num_frames, data, train=train)
            if data.cache
            else None
        )
        self._pixels = ClipPixels(image_size, num_frames, data, self.cache)
        # Both lie in shared memory: workers that outlive an epoch see set_epoch, and the clips
        # that they cannot read are counted here.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self.records), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.records)

    def set_epoch(self, epoch: int) -> None:
        """Other augmentation from here on; also in workers that are already running."""
        self._epoch.fill_(epoch)

    def plain_joints(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the crops without augmentation hold, without reading a picture.

        Returns:
            matrices [R, 2, 3] image → crop, keypoints [R, K, 2] in crop pixels and visibility
            [R, K], float64.
        """
        matrices, points, visible = [], [], []
        for record in self.records:
            region = crop_region(record.box, self.image_size, self.data.box_enlarge)
            matrices.append(crop_matrix(region, self.image_size, udp=self.data.udp))
            joints = transform_joints(record.keypoints, matrices[-1], self.image_size)
            points.append(joints[0])
            visible.append(joints[1])
        return np.stack(matrices), np.stack(points), np.stack(visible)

    @property
    def skipped(self) -> Counter[str]:
        """Reason → number of annotations, detections and clips that were left out so far."""
        unreadable = int(self._unreadable.sum())
        return self._skipped + Counter({"frame unreadable": unreadable})

    @property
    def pixels(self) -> str:
        """What crops are made of: ``frames``, also from a cache that holds them as they are."""
        if self.cache is not None:
            stored = self.cache.stored
        else:
            stored = "decoded at reduced scale" if self.data.reduced_decode else ""
        return f"frames {stored}" if stored else "frames"

    def report(self) -> str:
        """Clips, box source, what was left out and what was repeated, with counts."""
        text = f"{len(self)} clips, boxes: {self.box_source}"
        if self.data.cache:
            text += f"; pixels: {'frames' if self.cache is None else self.cache.folder}"
        if self.skipped:
            text += f"; left out: {counted(self.skipped)}"
        if self.notes:
            text += f"; kept: {counted(self.notes)}"
        return text

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, torch.Tensor]:
        """Item ``index`` of the current epoch, or, for a key (epoch, index), of that one.

        A sampler that yields (epoch, index) lets one loader serve several epochs, whose items
        its workers may prepare at the same time.
        """
        epoch, index = key if isinstance(key, tuple) else (int(self._epoch), key)
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: {index} is outside the {len(self)} clips")
        index %= len(self)
        if self.data.on_error == "raise":
            return self._item(index, epoch)
        if not self.train:
            return self._item_or_none(index, epoch) or self._item(index, epoch, black=True)
        for step in range(len(self)):
            item = self._item_or_none((index + step) % len(self), epoch)
            if item is not None:
                return item
        raise FrameError("none of the clips has readable frames")

    def _item_or_none(self, index: int, epoch: int) -> dict[str, torch.Tensor] | None:
        """The item; None, with a warning the first time, if one of its frames is unreadable."""
        try:
            return self._item(index, epoch)
        except FrameError as error:
            if not self._unreadable[index]:
                warnings.warn(f"clip left out: {error}", stacklevel=3)
            self._unreadable[index] = True
            return None

    def _item(self, index: int, epoch: int, *, black: bool = False) -> dict[str, torch.Tensor]:
        """The item; a ``black`` one stands in for a clip whose frames cannot be read."""
        record = self.records[index]
        matrix, flip = self._matrix(record, index, epoch)
        points, visible = transform_joints(
            record.keypoints, matrix, self.image_size, flip=flip, skeleton=self.skeleton
        )
        if black:
            points, visible = np.zeros_like(points), np.zeros_like(visible)
        pixels = self._pixels.of(record, matrix, black=black)
        if self.train and self.data.augment.enabled and self.data.augment.photometric:
            name = "frames" if "frames" in pixels else "clip"
            # A generator of its own: geometry is the same with and without it.
            rng = np.random.default_rng((self.seed, epoch, index, 1))
            look = change_look(pixels[name].numpy(), self.data.augment.photometric, rng)
            pixels[name] = torch.from_numpy(look)
        return pixels | {
            "keypoints": torch.from_numpy(points.astype(np.float32)),
            "visible": torch.from_numpy(visible.astype(np.float32)),
            "matrix": torch.from_numpy(matrix),
            "index": torch.tensor(index),
            "valid": torch.tensor(not black),
        }

    def _matrix(self, record: ClipRecord, index: int, epoch: int) -> tuple[np.ndarray, bool]:
        """The augmented map image → crop, and whether it mirrors."""
        region = crop_region(record.box, self.image_size, self.data.box_enlarge)
        augmentation = Augmentation(region)
        if self.train and self.data.augment.enabled and record.person is not None:
            entropy = (self.seed, epoch, index)
            augmentation = sample_augmentation(
                region,
                record.person.keypoints,
                self.image_size,
                self.data.augment,
                np.random.default_rng(np.random.SeedSequence(entropy)),
                self.skeleton,
            )
        return clip_matrix(augmentation, self.image_size, udp=self.data.udp), augmentation.flip


def _check_arguments(
    num_frames: int, data: DataConfig, train: bool, boxes: Detections | None, seed: int
) -> None:
    if num_frames < 1 or num_frames % 2 == 0:
        raise ValueError(f"num_frames: expected an odd number of frames, got {num_frames}")
    if train and boxes is not None:
        raise ValueError("boxes: training takes ground-truth boxes; leave boxes out")
    if seed < 0:
        raise ValueError(f"seed: expected ≥ 0, got {seed}")
    if not 0 <= data.augment.photometric <= 1:
        raise ValueError(
            f"data.augment.photometric: {data.augment.photometric} is no probability from 0 to 1"
        )
    if data.warp not in ("auto", "host", "device"):
        raise ValueError(f"data.warp: expected auto, host or device, got {data.warp!r}")


def worker_init(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: one OpenCV thread, and no life after the main process."""
    end_with_parent()
    cv2.setNumThreads(0)


def resolve_warp(data: DataConfig, device: torch.device) -> Literal["host", "device"]:
    """Where crops are made for a model on ``device``: what ``data.warp = auto`` means there."""
    if data.warp == "auto":
        return "device" if device.type == "cuda" else "host"
    return data.warp


def open_clips(
    config: Config, *, train: bool, device: torch.device = _CPU, quiet: bool = False
) -> ClipDataset:
    """The training or the evaluation clips of a recipe; prints what was left out and why.

    Args:
        config: the recipe.
        train: True gives the training clips, False those of the evaluation.
        device: the model's; decides what ``data.warp = auto`` means.
        quiet: prints nothing.

    Raises:
        AnnotationError: a broken annotation file, or another number of sequences than
            ``data.train_sequences`` or ``data.val_sequences``.
        CacheError, FrameError, ValueError: as :class:`ClipDataset`.
    """
    data = replace(config.data, warp=resolve_warp(config.data, device))
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
    )
    if not quiet:
        print(clips.report())
    return clips


def fit_keypoints(config: Config, clips: ClipDataset) -> Config:
    """The recipe with ``model.num_keypoints`` of the annotations where it is 0.

    Raises:
        ValueError: it is another number than the annotations'.
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
