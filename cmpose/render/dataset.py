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

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
from tqdm import tqdm

from cmpose.data.formats.posetrack18 import posetrack18_image_id, write_posetrack18
from cmpose.data.sequence import Sequence
from cmpose.files import (
    Interrupted,
    OutputError,
    claim_file,
    end_with_parent,
    recover,
    stop_requests,
    whole_folder,
    writing,
)
from cmpose.render.folder import SplitFolder
from cmpose.render.plan import plan_video
from cmpose.render.settings import SPLITS, VIDEOS, Difficulty, RenderSettings, check_number

__all__ = ["Difficulty", "RenderSettings", "RenderSummary", "render_dataset"]

_GO_ON = "run the same command again: complete sequences are kept"


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
    first_video: int = 0,
    workers: int = 0,
    progress: bool = True,
    **settings: Any,
) -> RenderSummary:
    """Renders a split of a data set, or finishes one that was interrupted.

    Sequences that are complete are kept, so a second call with the same settings only renders
    what is missing; more ``videos`` extend the split. The two splits of one folder never share a
    sequence, whatever their seeds, and may be rendered at the same time.

    Args:
        out: folder of the data set; made if absent.
        videos: number of sequences, at least 1.
        first_video: index of the first sequence, so that several calls can share the work: one
            after the other in one folder, or at the same time in folders of their own.
        workers: processes; 0 and 1 render in this one.
        progress: shows a progress bar.
        settings: the fields of :class:`RenderSettings`, e.g. ``seed=0, frames=30``.

    Raises:
        InUse: another process is rendering this split there.
        Interrupted: asked to stop; complete sequences are kept.
        OutputError: the disk is full, and the like; complete sequences are kept.
        ValueError: a bad argument; or ``out`` holds something else, or the split with other
            settings.
    """
    check_number("videos", videos, 1, VIDEOS)
    check_number("first_video", first_video, 0, VIDEOS - videos)
    check_number("workers", workers, 0, 1024)
    started, cpu = time.perf_counter(), _cpu_seconds()
    split = SplitFolder(Path(out), RenderSettings(**settings))
    frames, name = split.settings.frames, split.settings.split
    split.check_ours()
    # The lock of a split: the other one's files lie in other folders.
    with claim_file(split.manifest, "render", "folder"):
        with writing(split.root):
            recover(split.images)
            recover(split.annotations)
        split.mark()
        todo = [i for i in range(first_video, first_video + videos) if not split.is_done(i)]
        bar = tqdm(
            total=len(todo) * frames,
            unit="frame",
            desc=f"render {name}",
            disable=None if progress else True,
        )
        with stop_requests() as stop, bar, closing(_render(split, todo, workers)) as rendered:
            number = 0
            for ended in rendered:
                number += ended
                bar.update(frames * ended)
                if stop.is_set() and number < len(todo):
                    raise Interrupted(
                        f"{split.root}: stopped after {number} of {len(todo)} {name} sequences; "
                        f"{_GO_ON}"
                    )
                if not ended:
                    raise RuntimeError(
                        f"{split.root}: a worker process was killed, by the system if memory ran "
                        f"out: free some, or give fewer --workers; {_GO_ON}"
                    )
    return RenderSummary(
        root=split.root,
        split=name,
        rendered=len(todo),
        kept=videos - len(todo),
        frames=len(todo) * frames,
        seconds=time.perf_counter() - started,
        cpu_seconds=_cpu_seconds() - cpu,
    )


def _render(split: SplitFolder, videos: list[int], workers: int) -> Generator[bool]:
    """Renders sequences in this process or in others.

    Yields True after each sequence, and False at the end if a worker was killed. A request to stop
    may have done it: ``timeout``, systemd and Slurm send theirs to all processes of a command.
    """
    if workers <= 1 or len(videos) <= 1:
        for video in videos:
            _render_sequence(split, video)
            yield True
        return
    # Spawned, because forking a process whose OpenCV has threads can hang.
    context = multiprocessing.get_context("spawn")
    processes = min(workers, len(videos))
    with ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent) as pool:
        try:
            with _ignored_interrupts():
                jobs = [pool.submit(_render_sequence, split, video) for video in videos]
            for job in as_completed(jobs):
                job.result()
                yield True
        except BrokenProcessPool:
            yield False
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Processes that are started here ignore Ctrl-C, from their first moment on.

    It reaches every process of the terminal, but only the one that started them acts on it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _render_sequence(split: SplitFolder, video: int) -> None:
    """Renders one sequence: all its frames appear at once, and then its annotation file.

    Other files in the folder of its frames stay.
    """
    settings, annotation = split.settings, split.annotation(video)
    name = settings.sequence_name(video)
    split.check_there()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        plan = plan_video(
            [settings.seed, list(SPLITS).index(settings.split), video],
            frames=settings.frames,
            size=settings.size,
            fps=settings.fps,
            max_people=settings.max_people,
            difficulty=settings.difficulty,
        )
        sequence = Sequence(name=name, file_stem=name, frames=[])
        frames = split.frames(video)
        if frames.is_symlink():
            raise OutputError(f"{frames}: is a link, which is not followed: move it; {_GO_ON}")
        with writing(annotation, _GO_ON):
            annotation.unlink(missing_ok=True)
        with whole_folder(frames, _GO_ON, is_ours=split.is_frame) as folder:
            first_id = posetrack18_image_id(name, 0)
            for picture, frame in plan.draw(name, first_id, f"images/{settings.split}"):
                quality = [cv2.IMWRITE_JPEG_QUALITY, settings.quality]
                _, data = cv2.imencode(".jpg", picture, quality)
                (folder / Path(frame.file_name).name).write_bytes(data.tobytes())
                sequence.frames.append(frame)
        write_posetrack18(annotation, sequence)
    finally:
        cv2.setNumThreads(threads)


def _cpu_seconds() -> float:
    """Processor time of this process and its finished children."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
