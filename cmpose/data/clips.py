"""Clips of one person each: T warped frames around a key frame, and the key frame's joints."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from cmpose.config import DataConfig
from cmpose.data.cache.store import open_cache
from cmpose.data.cache.tiles import shrink_factor
from cmpose.data.cutouts import (
    Tile,
    Window,
    moved_matrix,
    sampled_window,
    shrunk_matrix,
    shrunk_size,
)
from cmpose.data.formats.detections import Detections, load_detections
from cmpose.data.frames import (
    FrameError,
    FrameFolder,
    PictureCache,
    check_size,
    neighbor_name,
    picture_size,
    support_frames,
)
from cmpose.data.records import GROUND_TRUTH, ClipRecord
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import POSETRACK
from cmpose.data.transforms import (
    Augmentation,
    clean_box,
    clip_matrix,
    crop_matrix,
    crop_region,
    sample_augmentation,
    transform_joints,
    warp,
)


class ClipDataset(Dataset[dict[str, torch.Tensor]]):
    """One clip per person and key frame.

    Training: every person with annotated joints in a labelled frame. Evaluation with ground-truth
    boxes: the same people; with detections: every box, in every frame that has boxes.

    The item is a dict of tensors: ``clip`` uint8 [T, H, W, 3] RGB crops; ``keypoints`` float32
    [K, 2] crop pixels; ``visible`` float32 [K], 1 where annotated and inside the crop;
    ``matrix`` float64 [2, 3] image → crop; ``index`` int64, which record it is; ``valid`` bool.
    With ``data.warp = device`` (``auto`` is for the engine to settle, here it is the host) there
    is in place of ``clip``: ``frames`` uint8 [T, h, w, 3] RGB, the part of the frames that the
    crop is sampled from, and ``frames_matrix`` float64 [2, 3] frames → crop. Sizes differ from
    item to item; ``cmpose.data.cutouts.collate`` makes batches of either kind.
    With ``data.cache`` pixels come from there, and frames are not read.

    An item depends on (seed, epoch, index) only, not on the worker, the process or what was
    loaded before. With ``data.on_error = skip`` a clip with an unreadable frame is replaced by the
    next readable one in training (``index`` says which), and is black with ``valid`` False in
    evaluation, where a prediction for it must be dropped; both are counted in ``skipped``.

    Args:
        sequences: annotations.
        root: folder that ``file_name`` is relative to.
        image_size: (H, W) of the crops.
        num_frames: T, odd.
        data: thresholds, augmentation, error policy.
        train: augmentation (if enabled) and the people that training uses.
        boxes: detections for evaluation; None reads ``data.boxes`` unless it is ``gt``.
        seed: of the augmentation.
        cache_bytes: decoded pictures that each process keeps.

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
        cache_bytes: int = 64 << 20,
    ) -> None:
        if num_frames < 1 or num_frames % 2 == 0:
            raise ValueError(f"num_frames: expected an odd number of frames, got {num_frames}")
        if train and boxes is not None:
            raise ValueError("boxes: training takes ground-truth boxes; leave boxes out")
        if seed < 0:
            raise ValueError(f"seed: expected ≥ 0, got {seed}")
        if data.warp not in ("auto", "host", "device"):
            raise ValueError(f"data.warp: expected auto, host or device, got {data.warp!r}")
        if boxes is None and not train and data.boxes != "gt":
            boxes = load_detections(
                Path(root) / data.boxes,
                sequences,
                data.box_score_threshold,
                on_error=data.on_error,
            )
        self.sequences = list(sequences)
        self.skeleton = self.sequences[0].skeleton if self.sequences else POSETRACK
        self.root = Path(root)
        self.image_size = image_size
        self.num_frames = num_frames
        self.data = data
        self.train = train
        self.seed = seed
        self.box_source = GROUND_TRUTH if boxes is None else boxes.name
        self.notes: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        if boxes is not None:
            self._skipped += boxes.dropped
        self.records: list[ClipRecord] = []
        self._folders: dict[Path, FrameFolder] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}
        for sequence in sequences:
            self._skipped += sequence.skipped
            self.records.extend(self._records(sequence, boxes))
        self._folders.clear()
        if not self.records:
            raise ValueError(
                f"no clip to {'train on' if train else 'evaluate'} in {len(sequences)} sequences; "
                f"left out: {_listing(self._skipped)}"
            )
        self._pictures = PictureCache(cache_bytes)
        self._tiles = (
            open_cache(
                data.cache,
                self.records,
                self.root,
                image_size,
                num_frames,
                data,
                train=train,
                keep_bytes=cache_bytes,
            )
            if data.cache
            else None
        )
        # In shared memory, so that workers that outlive an epoch see set_epoch, and what they
        # find unreadable is counted here.
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
            joints = transform_joints(_joints(record), matrices[-1], self.image_size)
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
        stored = "" if self._tiles is None else self._tiles.stored
        return f"frames {stored}" if stored else "frames"

    def report(self) -> str:
        """Clips, box source, what was left out and what was repeated, with counts."""
        text = f"{len(self)} clips, boxes: {self.box_source}"
        if self.data.cache:
            text += f"; pixels: {'frames' if self._tiles is None else self._tiles.folder}"
        if self.skipped:
            text += f"; left out: {_listing(self.skipped)}"
        if self.notes:
            text += f"; kept: {_listing(self.notes)}"
        return text

    # --- which clips ------------------------------------------------------------------------

    def _records(self, sequence: Sequence, boxes: Detections | None) -> Iterator[ClipRecord]:
        listed = {frame.index for frame in sequence.frames}
        for frame in sequence.frames:
            people = list(self._people(sequence, frame, boxes))
            if not people:
                continue
            try:
                files, note = self._files(sequence, frame, listed)
                size = self._size(frame, files[len(files) // 2])
            except FrameError as error:
                if self.data.on_error == "raise":
                    raise
                self._skipped[error.reason] += len(people)
                continue
            for person, box, score in people:
                cleaned = clean_box(box, *size)
                if cleaned is None:
                    self._skipped["box empty or outside the image"] += 1
                    continue
                if person is not None and not self._holds_a_joint(cleaned, person):
                    self._skipped["box holds none of the person's joints"] += 1
                    continue
                if note:
                    self.notes[note] += 1
                yield ClipRecord(
                    sequence, frame, person, cleaned, score, self.box_source, files, size
                )

    def _people(
        self, sequence: Sequence, frame: Frame, boxes: Detections | None
    ) -> Iterator[tuple[Person | None, np.ndarray, float]]:
        if boxes is not None:
            for detection in boxes.boxes.get((sequence.file_stem, frame.image_id), []):
                yield None, detection.box, detection.score
            return
        for person in frame.people:
            if not frame.labeled:
                self._skipped["frame not labelled"] += 1
            elif person.num_visible == 0:
                self._skipped["person without keypoints"] += 1
            else:
                yield person, person.box, 1.0

    def _files(
        self, sequence: Sequence, frame: Frame, listed: set[int]
    ) -> tuple[tuple[str, ...], str]:
        """Paths of the clip's T frames; what to note about them, if anything."""
        relative = PurePosixPath(frame.file_name)
        folder_path = self.root / relative.parent
        if folder_path not in self._folders:
            self._folders[folder_path] = FrameFolder(folder_path)
        folder = self._folders[folder_path]
        if relative.name not in folder.names:
            raise FrameError(
                f"{folder_path / relative.name}: no such file, but {sequence.source} names it "
                f"(file_name {frame.file_name!r}); is the root {self.root} right? "
                "data.on_error=skip leaves such clips out",
                "key frame missing",
            )
        names = folder.like(relative.name)
        support = support_frames(frame.index, self.num_frames, names, listed, sequence.nframes)
        note = ""
        if support.lost:
            if self.data.on_error == "raise":
                missing = folder_path / neighbor_name(relative.name, support.lost[0])
                raise FrameError(
                    f"{missing}: no such file, but {frame.file_name} needs it as a neighbour, and "
                    f"{sequence.source} lists it or frames beyond it; data.on_error=skip lets a "
                    "nearer frame stand in",
                    "support frame missing",
                )
            note = "support frame missing, a nearer one repeated"
        elif support.short:
            note = "support frame beyond the files on disk, a nearer one repeated"
        return tuple(str(folder_path / names[number]) for number in support.numbers), note

    def _holds_a_joint(self, box: np.ndarray, person: Person) -> bool:
        """Does the crop without augmentation show any annotated joint? (Corners taken for sizes
        and the like give boxes that have nothing to do with the person.)"""
        region = crop_region(box, self.image_size, self.data.box_enlarge)
        joints = person.keypoints[person.keypoints[:, 2] > 0, :2]
        return bool((np.abs(joints - region.center) <= region.size / 2).all(axis=1).any())

    def _size(self, frame: Frame, key_file: str) -> tuple[int, int]:
        """The frames' size as the annotation or the header of the folder's first frame says."""
        if frame.width is not None and frame.height is not None:
            return frame.width, frame.height
        folder = Path(key_file).parent
        if folder not in self._sizes:
            self._sizes[folder] = picture_size(key_file)
        return self._sizes[folder]

    # --- items ------------------------------------------------------------------------------

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
            return self._item_or_none(index, epoch) or self._black(index, epoch)
        for step in range(len(self)):
            item = self._item_or_none((index + step) % len(self), epoch)
            if item is not None:
                return item
        raise FrameError("none of the clips has readable frames")

    def _item_or_none(self, index: int, epoch: int) -> dict[str, torch.Tensor] | None:
        try:
            return self._item(index, epoch)
        except FrameError as error:
            if not self._unreadable[index]:
                warnings.warn(f"clip left out: {error}", stacklevel=3)
            self._unreadable[index] = True
            return None

    def _item(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        matrix, flip = self._matrix(record, index, epoch)
        points, visible = transform_joints(
            _joints(record), matrix, self.image_size, flip=flip, skeleton=self.skeleton
        )
        return self._pixels(record, matrix) | {
            "keypoints": torch.from_numpy(points.astype(np.float32)),
            "visible": torch.from_numpy(visible.astype(np.float32)),
            "matrix": torch.from_numpy(matrix),
            "index": torch.tensor(index),
            "valid": torch.tensor(True),
        }

    def _matrix(self, record: ClipRecord, index: int, epoch: int) -> tuple[np.ndarray, bool]:
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

    def _pixels(
        self, record: ClipRecord, matrix: np.ndarray, *, black: bool = False
    ) -> dict[str, torch.Tensor]:
        """The crops, or what they are sampled from; ``black`` ones without reading a picture."""
        factor = 1
        if self._tiles is not None:
            factor = shrink_factor(record, self.image_size, self.data)
            matrix = shrunk_matrix(matrix, factor)
        picture_size = shrunk_size(record.picture_size, factor)
        window = sampled_window(matrix, self.image_size, picture_size)
        cut = self.data.warp == "device"
        shape = window.shape if cut else self.image_size
        pixels = np.zeros((self.num_frames, *shape, 3), np.uint8)
        for place, file in enumerate(() if black else record.files):
            if file in record.files[:place]:
                pixels[place] = pixels[record.files.index(file)]
                continue
            tile = self._tile(file, record, factor, window)
            if cut:
                pixels[place] = window.take(tile)
                continue
            crop = warp(tile.pixels, moved_matrix(matrix, tile.left, tile.top), self.image_size)
            pixels[place] = crop if tile.rgb else cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)
        if not cut:
            return {"clip": torch.from_numpy(pixels)}
        return {
            "frames": torch.from_numpy(pixels),
            "frames_matrix": torch.from_numpy(window.matrix(matrix)),
        }

    def _tile(self, file: str, record: ClipRecord, factor: int, window: Window) -> Tile:
        """Pixels of a frame, shrunk by ``factor`` in a cache, that hold the window."""
        if self._tiles is not None:
            width, _ = shrunk_size(record.picture_size, factor)
            return self._tiles.tile(file, factor, window, width)
        picture = self._pictures.read(file)
        check_size(file, picture, record.picture_size, record.sequence.source)
        return Tile(picture)

    def _black(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        matrix, _ = self._matrix(record, index, epoch)
        return self._pixels(record, matrix, black=True) | {
            "keypoints": torch.zeros(len(self.skeleton), 2),
            "visible": torch.zeros(len(self.skeleton)),
            "matrix": torch.from_numpy(matrix),
            "index": torch.tensor(index),
            "valid": torch.tensor(False),
        }


def _joints(record: ClipRecord) -> np.ndarray:
    if record.person is None:
        return np.zeros((len(record.sequence.skeleton), 3))
    return record.person.keypoints


def _listing(counts: Counter[str]) -> str:
    if not counts:
        return "nothing"
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(counts.items()))


def worker_init(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: one OpenCV thread a worker."""
    cv2.setNumThreads(0)
