"""A rendered data set in PoseTrack18's own layout: no download, no licence, exact joints.

``render_dataset`` writes what PoseTrack18 looks like on disk, so that the same loader, evaluator
and tools run on it::

    OUT/images/<split>/000001_mpii_train/000000.jpg ...
    OUT/annotations/<split>/000001_mpii_train.json
    OUT/rendered_<split>.json        the settings the split was rendered with

Every pixel follows from (seed, split, video index, settings): the number of worker processes
changes nothing. ``docs/rendered.md`` says what is drawn and which joints are annotated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from cmpose.data.formats.posetrack18 import posetrack18_image_id, write_posetrack18
from cmpose.data.sequence import Sequence
from cmpose.render.difficulty import Difficulty
from cmpose.render.plan import plan_video

__all__ = ["Difficulty", "RenderSummary", "render_dataset", "write_montage"]

_VERSION = 1  # raised when the same settings give other pictures
_SPLITS = {"train": "train", "val": "test"}  # PoseTrack's validation sequences are called _test


@dataclass(frozen=True)
class _Settings:
    """All that determines a sequence besides its index."""

    seed: int
    frames: int
    size: tuple[int, int]
    split: str
    fps: float
    max_people: int
    quality: int
    difficulty: Difficulty
    version: int = _VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"size": list(self.size)}


@dataclass(frozen=True)
class RenderSummary:
    """What a call of ``render_dataset`` did.

    Attributes:
        root: the data set's folder.
        split: train or val.
        rendered: sequences rendered now.
        kept: sequences that were there already.
        frames: frames rendered now.
        seconds: wall-clock time.
        cpu_seconds: processor time of this process and its workers.
    """

    root: Path
    split: str
    rendered: int
    kept: int
    frames: int
    seconds: float
    cpu_seconds: float = field(compare=False)

    def __str__(self) -> str:
        speed = self.frames / self.seconds if self.seconds > 0 else 0.0
        cpu = 1000 * self.cpu_seconds / max(self.frames, 1)
        return (
            f"{self.root}: {self.rendered} {self.split} sequences rendered, {self.kept} kept; "
            f"{self.frames} frames in {self.seconds:.1f} s = {speed:.0f} frames/s "
            f"({cpu:.1f} ms of processor time a frame)"
        )


def render_dataset(
    out: str | os.PathLike[str],
    *,
    videos: int,
    frames: int,
    seed: int,
    size: tuple[int, int] = (360, 640),
    split: str = "val",
    first_video: int = 0,
    max_people: int = 4,
    fps: float = 25.0,
    quality: int = 90,
    difficulty: Difficulty | None = None,
    workers: int = 0,
    progress: bool = True,
) -> RenderSummary:
    """Renders a split of a data set, or finishes one that was interrupted.

    Sequences that are complete are kept, so a second call with the same settings only renders
    what is missing; more ``videos`` extend the split. The two splits of one folder never share a
    sequence, whatever their seeds.

    Args:
        out: folder of the data set; made if absent.
        videos: number of sequences, at least 1.
        frames: frames in each, 1 to 9999.
        seed: non-negative.
        size: (height, width) of a frame in pixels, even, at least 96.
        split: ``train`` or ``val``.
        first_video: index of the first sequence, so that several calls can share the work.
        max_people: a sequence shows 1 to this many people, at most 20.
        fps: frames a second that the motion is sampled at.
        quality: of the JPEG files, 1 to 100.
        difficulty: how often things get in the way; see ``Difficulty``.
        workers: processes; 0 and 1 render in this one.
        progress: shows a progress bar.

    Raises:
        ValueError: a bad argument; or ``out`` holds something else, or the split with other
            settings.
    """
    _check(videos, frames, seed, size, split, first_video, max_people, fps, quality, workers)
    started, cpu = time.perf_counter(), _cpu_seconds()
    root = Path(out)
    height, width = size
    settings = _Settings(
        seed, frames, (height, width), split, fps, max_people, quality, difficulty or Difficulty()
    )
    _claim(root, settings)
    todo = [i for i in range(first_video, first_video + videos) if not _done(root, settings, i)]
    with tqdm(
        total=len(todo) * frames, unit="frame", desc=f"render {split}", disable=not progress
    ) as bar:
        if workers > 1 and len(todo) > 1:
            # Spawned, because forking a process whose OpenCV has threads can hang.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(min(workers, len(todo)), mp_context=context) as pool:
                jobs = [pool.submit(_render_sequence, root, settings, i) for i in todo]
                try:
                    for job in as_completed(jobs):
                        job.result()
                        bar.update(frames)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
        else:
            for i in todo:
                _render_sequence(root, settings, i)
                bar.update(frames)
    return RenderSummary(
        root=root,
        split=split,
        rendered=len(todo),
        kept=videos - len(todo),
        frames=len(todo) * frames,
        seconds=time.perf_counter() - started,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def _check(
    videos: int,
    frames: int,
    seed: int,
    size: tuple[int, int],
    split: str,
    first_video: int,
    max_people: int,
    fps: float,
    quality: int,
    workers: int,
) -> None:
    bounds = {
        "videos": (videos, 1, 500_000),
        "frames": (frames, 1, 9999),
        "seed": (seed, 0, 2**63 - 1),
        "first_video": (first_video, 0, 500_000 - videos),
        "max_people": (max_people, 1, 20),
        "quality": (quality, 1, 100),
        "workers": (workers, 0, 1024),
    }
    for name, (value, low, high) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{name}: {value} is not between {low} and {high}")
    if split not in _SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(_SPLITS)}")
    if not 1 <= fps <= 1000:
        raise ValueError(f"fps: {fps} is not between 1 and 1000")
    if len(size) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in size):
        raise TypeError(f"size: expected (height, width) as two integers, got {size!r}")
    for name, value in zip(("height", "width"), size, strict=True):
        if value < 96 or value > 4320 * 2 or value % 2:
            raise ValueError(f"size: {name} {value} is not an even number from 96 to 8640")


def _claim(root: Path, settings: _Settings) -> None:
    """Makes the folder ours, or checks that it is."""
    manifest = root / f"rendered_{settings.split}.json"
    wanted = settings.to_json()
    if root.exists() and not root.is_dir():
        raise ValueError(f"out: {root} is a file; name a new folder")
    if manifest.exists():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"out: {manifest} is no JSON ({error}); name a new folder") from None
        differing = [
            f"{name} {found.get(name)!r} there, {wanted.get(name)!r} asked"
            for name in sorted({*found, *wanted})
            if found.get(name) != wanted.get(name)
        ]
        if differing:
            raise ValueError(
                f"out: {root} holds the {settings.split} split with other settings "
                f"({'; '.join(differing)}); name a new folder"
            )
        return
    ours = any((root / f"rendered_{split}.json").exists() for split in _SPLITS)
    taken = [root / kind / settings.split for kind in ("images", "annotations")]
    if root.exists() and any(root.iterdir()) and (not ours or any(p.exists() for p in taken)):
        raise ValueError(f"out: {root} is not empty and was not rendered here; name a new folder")
    root.mkdir(parents=True, exist_ok=True)
    _write(manifest, json.dumps(wanted, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _name(settings: _Settings, video: int) -> str:
    # Different numbers in the two splits keep image ids apart when both are merged.
    number = video + 1 + (500_000 if settings.split == "val" else 0)
    return f"{number:06d}_mpii_{_SPLITS[settings.split]}"


def _paths(root: Path, settings: _Settings, video: int) -> tuple[Path, Path]:
    """A sequence's folder of frames and its annotation file."""
    name = _name(settings, video)
    return (
        root / "images" / settings.split / name,
        root / "annotations" / settings.split / f"{name}.json",
    )


def _done(root: Path, settings: _Settings, video: int) -> bool:
    """The annotation file is written last; frames may have been deleted since."""
    folder, annotation = _paths(root, settings, video)
    return annotation.is_file() and all(
        (folder / f"{f:06d}.jpg").is_file() for f in range(settings.frames)
    )


def _render_sequence(root: Path, settings: _Settings, video: int) -> None:
    """Renders one sequence: frames in a folder beside, rename, then the annotation file."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        folder, annotation = _paths(root, settings, video)
        annotation.unlink(missing_ok=True)
        beside = folder.with_name(f".{folder.name}.part")
        for stale in (beside, folder):
            if stale.exists():
                shutil.rmtree(stale)
        beside.mkdir(parents=True)
        video_plan = plan_video(
            [settings.seed, list(_SPLITS).index(settings.split), video],
            frames=settings.frames,
            size=settings.size,
            fps=settings.fps,
            max_people=settings.max_people,
            difficulty=settings.difficulty,
        )
        name = _name(settings, video)
        sequence = Sequence(name=name, file_stem=name, frames=[])
        first_id = posetrack18_image_id(name, 0)
        for picture, frame in video_plan.draw(name, first_id, f"images/{settings.split}"):
            _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])
            (beside / Path(frame.file_name).name).write_bytes(data.tobytes())
            sequence.frames.append(frame)
        os.replace(beside, folder)
        write_posetrack18(annotation, sequence)
    finally:
        cv2.setNumThreads(threads)


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def write_montage(
    root: str | os.PathLike[str], path: str | os.PathLike[str], *, split: str = "val"
) -> None:
    """Writes a small picture of a rendered split: the middle frame of its first nine sequences.

    Args:
        root: the data set's folder.
        path: PNG file to write; colours are coarsened to keep it small.
        split: ``train`` or ``val``.

    Raises:
        ValueError: if the split has fewer than nine sequences, or a frame cannot be read.
    """
    folders = sorted(p for p in (Path(root) / "images" / split).glob("[0-9]*") if p.is_dir())
    if len(folders) < 9:
        raise ValueError(f"root: {root} has {len(folders)} {split} sequences, a montage needs 9")
    cells = []
    for folder in folders[:9]:
        files = sorted(folder.glob("*.jpg"))
        cell = cv2.imread(str(files[len(files) // 2])) if files else None
        if cell is None:
            raise ValueError(f"root: no readable frame in {folder}")
        cells.append(cv2.resize(cell, (224, 126), interpolation=cv2.INTER_AREA))
    rows = [cv2.hconcat(cells[i : i + 3]) for i in (0, 3, 6)]
    coarse = np.asarray(cv2.vconcat(rows), np.uint8) & 0xF0 | 0x08
    _, data = cv2.imencode(".png", coarse, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    _write(Path(path), data.tobytes())


def main(arguments: list[str] | None = None) -> None:
    """``python -m cmpose.render.dataset OUT``: renders and prints the speed."""
    parser = argparse.ArgumentParser(
        prog="python -m cmpose.render.dataset", description=main.__doc__
    )
    parser.add_argument("out")
    for name, default in (("videos", 8), ("frames", 50), ("seed", 0), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--split", default="val", choices=list(_SPLITS))
    parser.add_argument("--montage", help="also write a small PNG of nine sequences to this file")
    for each in fields(Difficulty):
        parser.add_argument(f"--{each.name}", type=float, default=each.default)
    given = vars(parser.parse_args(arguments))
    difficulty = Difficulty(**{each.name: given.pop(each.name) for each in fields(Difficulty)})
    montage = given.pop("montage")
    summary = render_dataset(given.pop("out"), difficulty=difficulty, **given)
    print(summary)
    if montage:
        write_montage(summary.root, montage, split=summary.split)


if __name__ == "__main__":
    main()
