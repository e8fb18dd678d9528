"""``cmpose predict``: the people of a video, frame by frame, in constant memory.

Frames pass through a line of steps, each a generator that holds a few of them: decoding,
detection, ``steady_boxes``, windows of T frames, groups whose people fill a batch. A group's poses
go to the journal before the next group is begun; the result files are written from the journal.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cmpose.data.transforms import clean_box
from cmpose.data.video import Shot, Video, open_video
from cmpose.data.video_writer import VideoWriter, part_of
from cmpose.distributed import pick_device
from cmpose.files import Interrupted, stop_requests, write_metrics
from cmpose.models.weights import checkpoint
from cmpose.predict.clock import Clock
from cmpose.predict.detect import Detection, VideoDetections, detect_people
from cmpose.predict.journal import Journal, open_journal
from cmpose.predict.options import Options, settings_of, settle
from cmpose.predict.predictor import Poses, Predictor, windows
from cmpose.predict.results import Tally, summary, write_results
from cmpose.predict.track import steady_boxes
from cmpose.viz.draw import draw_key, draw_skeleton

HOG = "OpenCV HOG people detector"

_GROUP_FRAMES, _GROUP_BYTES = 64, 128 << 20  # that wait at most for a batch to fill


def predict_video(
    video: str | Path,
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Poses of the people in a video.

    A run that was interrupted goes on where it stopped when it is called with the same arguments,
    and gives the same poses as one that was not. A camera or stream cannot be read again: its
    results are then written from what there is.

    Args:
        video: whatever ``open_video`` opens.
        checkpoint_path: a run's folder or a checkpoint.
        out: gets ``poses/NAME.json`` (PoseTrack18's format), ``coco/NAME.json`` (COCO's results),
            ``NAME_poses.mp4`` with skeletons, ``metrics.json``, with ``explain``
            ``explain/NAME_FRAME_TRACK.png``; and ``journal/NAME/`` with what was done so far.
        overwrite: throws away what an earlier run left for this video, finished or not.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: shows a progress bar, and prints a summary.
        options: the fields of ``Options``.

    Returns:
        What ``metrics.json`` holds: frames, people, tracks, box_source, seconds, rates, and the
        seconds that each part took.

    Raises:
        VideoError: a video that cannot be read or written.
        ValueError: a bad option or detection file, or frames to explain that are not there.
        CheckpointError: no usable checkpoint.
        JournalError: ``out`` holds a run of this video with other settings.
        Interrupted: on SIGINT or SIGTERM; what was done is kept. A camera just ends.
        OSError: a full disk and the like; what was done is kept.
    """
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    chosen = Options(**named)
    chosen.check()
    out = Path(out)
    model, config = checkpoint.load_model(checkpoint_path)
    predictor = Predictor(model, config, pick_device(device))
    if (chosen.explain or chosen.explain_frames) and model.fine is None:
        raise ValueError(
            "--explain needs a model with Fine Token Enhancement; this one has model.fine=off"
        )
    with ExitStack() as stack:
        source = stack.enter_context(open_video(video, fps=chosen.fps, on_error=chosen.on_error))
        info = source.info
        given, chosen = settle(chosen, info)
        weights = checkpoint.find(checkpoint_path)
        settings = settings_of(source, config, predictor.device.type, chosen, weights)
        folder = out / "journal" / info.name
        journal = stack.enter_context(open_journal(folder, settings, overwrite=overwrite))
        if journal.finished is not None:
            if progress:
                print(f"{info.source} is done already, in {out}; --overwrite does it anew")
            return journal.finished
        stop = stack.enter_context(stop_requests())
        job = _Job(predictor, source, journal, out, chosen, given, stop, progress=progress)
        try:
            job.run()
            return job.finish()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
            remedy = "make room there" if full else "see to that"
            raise OSError(
                f"{error.filename or journal.path}: {error.strerror or error}; the poses of "
                f"{journal.done} frames are kept in {folder}: {remedy} and run the same command "
                "again, it goes on from them"
            ) from error


class _Seen(NamedTuple):
    """A frame, and what the detector found in it: None where it was not run."""

    shot: Shot
    found: list[Detection] | None


class _Waiting(NamedTuple):
    """A frame whose people wait for their batch."""

    seen: _Seen
    people: list[Detection]
    boxes: list[np.ndarray]
    clips: Tensor | None
    matrices: np.ndarray


class _Job:
    """The prediction of one video."""

    def __init__(
        self,
        predictor: Predictor,
        video: Video,
        journal: Journal,
        out: Path,
        options: Options,
        given: VideoDetections | None,
        stop: Event,
        *,
        progress: bool,
    ) -> None:
        self.predictor, self.video, self.info = predictor, video, video.info
        self.skeleton = predictor.model.skeleton
        self.journal, self.out, self.options, self.given = journal, out, options, given
        self.stop, self.progress = stop, progress
        self.start = journal.done
        self.wanted, self.exact = list(options.explain_frames), not options.explain
        self.tally = Tally()
        self.clock, self.started = Clock(), time.perf_counter()
        self.path = out / f"{self.info.name}_poses.mp4"
        self.writer: VideoWriter | None = None
        self.bar = tqdm(disable=True)

    def run(self) -> None:
        """All frames that have no line in the journal yet; draws those that have."""
        drawn = "video" not in self.options.outputs or (self.journal.ended and self.path.exists())
        if (self.journal.ended and drawn) or (self.info.live and self.start):
            for line in self.journal.lines():
                self._count(line)
        else:
            with ExitStack() as stack:
                if not drawn:
                    if not self.journal.ended:
                        self.path.unlink(missing_ok=True)  # of a run that was thrown away
                    size = self.info.width, self.info.height
                    self.writer = VideoWriter(self.path, size, self.info.fps)
                    stack.callback(self.writer.stop)
                self._frames()
                if self.writer is not None:
                    self.writer.close()
        if not self.journal.ended:
            self.journal.end()

    def _frames(self) -> None:
        T, o = self.predictor.config.model.num_frames, self.options
        assert o.bridge is not None
        assert o.smooth is not None
        limit = min(_GROUP_FRAMES, max(1, _GROUP_BYTES // (3 * self.info.width * self.info.height)))
        lines = self.journal.lines()
        group: list[_Waiting] = []
        self._show(self.start or None)
        with ExitStack() as stack:
            stack.callback(lambda: self.bar.close())
            steady = steady_boxes(self._look(), bridge=o.bridge, smooth=o.smooth)
            for window in windows(steady, T):
                seen, people = window[T // 2]
                if seen.shot.number < self.start:
                    self._again(seen.shot, next(lines))
                    continue
                if seen.shot.number == self.start > 0:
                    self._show(None)
                waiting = self._prepare([item.shot for item, _ in window], seen, people)
                count = sum(len(w.boxes) for w in group)
                if group and (count + len(waiting.boxes) > o.batch_size or len(group) >= limit):
                    self._finish_group(group)
                    group = []
                group.append(waiting)
            self._finish_group(group)

    def _show(self, total: int | None) -> None:
        """A progress bar of frames that are done again, or of those to do."""
        self.bar.close()
        known = min(
            self.info.frames or self.options.max_frames or 0,
            self.options.max_frames or self.info.frames,
        )
        self.bar = tqdm(
            total=total or known or None,
            initial=0 if total else self.start,
            unit="frame",
            desc="go on" if total else "predict",
            disable=not self.progress,
        )

    def _look(self) -> Iterator[tuple[_Seen, list[Detection] | None]]:
        """Frames and who is in them, by the file, the journal or the detector."""
        reach = self.predictor.config.model.num_frames // 2
        skip = 0 if self.writer is not None else max(0, self.start - reach)
        shots = self.clock.each("decode", islice(self.video.shots(skip), self.options.max_frames))
        if self.given is not None:
            for shot in shots:
                yield _Seen(shot, None), self.given.get(shot.number, [])
            return
        lines = self.journal.lines()
        held: Shot | None = None  # the last frame is looked at, so that nobody is lost before it
        for shot in shots:
            if held is not None:
                yield self._detect(held, lines, last=False)
            if self.stop.is_set() and self.info.live:
                held = shot
                break
            held = shot
        if held is not None:
            yield self._detect(held, lines, last=True)

    def _detect(
        self, shot: Shot, lines: Iterator[dict[str, Any]], *, last: bool
    ) -> tuple[_Seen, list[Detection] | None]:
        found: list[Detection] | None = None
        if shot.number < self.start:
            stored = next(lines).get("found")
            if stored is not None:
                found = [Detection(np.array(v[:4]), v[4]) for v in stored]
        elif shot.readable and (last or shot.number % self.options.detect_every == 0):
            with self.clock("detect"):
                everybody = detect_people(shot.picture)
            found = [d for d in everybody if d.score >= self.options.min_score]
        return _Seen(shot, found), found

    def _prepare(self, window: list[Shot], seen: _Seen, people: list[Detection]) -> _Waiting:
        kept, boxes = [], []
        for detection in people if seen.shot.readable else ():
            box = clean_box(detection.box, self.info.width, self.info.height)
            if box is not None:
                kept.append(detection)
                boxes.append(box)
        if not boxes:
            return _Waiting(seen, [], [], None, np.zeros((0, 2, 3)))
        with self.clock("crop"):
            clips, matrices = self.predictor.crops(window, boxes)
        return _Waiting(seen, kept, boxes, clips, matrices)

    def _finish_group(self, group: list[_Waiting]) -> None:
        """Predicts, explains, notes and draws a group of frames."""
        poses = iter(list(self._poses(group)))  # all of them now: the clock's parts are apart
        lines = []
        with self.clock("explain"):
            for waiting in group:
                mine = [next(poses) for _ in waiting.boxes]
                line = self._line(waiting, mine)
                explained = self._explain(waiting.seen.shot, waiting.people, mine)
                lines.append(line | ({"explained": explained} if explained else {}))
        with self.clock("journal"):
            self.journal.append(lines)
        for waiting, line in zip(group, lines, strict=True):
            self._count(line)
            self._draw(waiting.seen.shot, line)
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        if self.stop.is_set() and not self.info.live:
            part = f"; what is drawn of the video is in {part_of(self.path)}" if self.writer else ""
            raise Interrupted(
                f"stopped after {self.journal.done} of {self.info.frames or '?'} frames; their "
                f"poses are kept in {self.journal.folder}, the same command goes on from them{part}"
            )

    def _poses(self, group: list[_Waiting]) -> Iterator[tuple[Poses, int]]:
        """Everybody's poses and their place in them, batch by batch."""
        there = [w.clips for w in group if w.clips is not None]
        if not there:
            return
        # A frame with more people than a batch is alone in its group.
        clips, matrices = torch.cat(there), np.concatenate([w.matrices for w in group])
        count = -(-len(clips) // self.options.batch_size)
        for part in np.array_split(np.arange(len(clips)), count):
            rows = slice(int(part[0]), int(part[-1]) + 1)
            with self.clock("model"):
                poses = self.predictor.poses(clips[rows], matrices[rows])
            for i in range(len(part)):
                yield poses, i

    def _line(self, waiting: _Waiting, poses: list[tuple[Poses, int]]) -> dict[str, Any]:
        """A frame's line in the journal; ten-thousandths of a pixel, millionths of a score."""
        number = waiting.seen.shot.number
        people = []
        for detection, box, (found, i) in zip(waiting.people, waiting.boxes, poses, strict=True):
            keypoints, scores = found.keypoints[i], found.scores[i]
            if not (np.isfinite(keypoints).all() and np.isfinite(scores).all()):
                raise ValueError(
                    f"frame {number}, person {detection.track_id}: the pose is not finite; look "
                    "for NaN in the model's heatmaps"
                )
            person = {
                "track_id": detection.track_id,
                "score": round(float(detection.score), 6),
                "box": np.round(box, 4).tolist(),
                "keypoints": np.round(np.asarray(keypoints, np.float64), 4).tolist(),
                "scores": np.round(np.asarray(scores, np.float64), 6).tolist(),
            }
            people.append(person | ({"interpolated": True} if detection.interpolated else {}))
        line: dict[str, Any] = {"frame": number, "people": people}
        if waiting.seen.found is not None:
            line["found"] = [[*d.box.tolist(), d.score] for d in waiting.seen.found]
        if not waiting.seen.shot.readable:
            line["unreadable"] = True
        return line

    def _again(self, shot: Shot, line: dict[str, Any]) -> None:
        """A frame whose line an earlier run wrote."""
        self._count(line)
        self._draw(shot, line)
        self._ask_to_stop()

    def _count(self, line: dict[str, Any]) -> None:
        self.tally.add(line)
        self._due(line["frame"], bool(line["people"]))
        self.bar.update()

    def _draw(self, shot: Shot, line: dict[str, Any]) -> None:
        if self.writer is None:
            return
        with self.clock("draw"):
            picture = shot.picture.copy()
            for person in line["people"]:
                draw_skeleton(
                    picture,
                    np.array(person["keypoints"]),
                    np.array(person["scores"]),
                    box=np.array(person["box"]),
                    track_id=person["track_id"],
                    order="bgr",
                    skeleton=self.skeleton,
                )
            draw_key(picture, order="bgr", skeleton=self.skeleton)
        with self.clock("encode"):
            self.writer.write(picture)

    def _due(self, number: int, anybody: bool) -> bool:
        """Whether a frame is to be explained; if it is, it no longer is afterwards."""
        due = [i for i in self.wanted if i == number or (i < number and not self.exact)]
        if due and anybody:
            self.wanted = [i for i in self.wanted if i not in due]
            return True
        return False

    def _explain(
        self, shot: Shot, people: list[Detection], poses: list[tuple[Poses, int]]
    ) -> list[str]:
        written: list[str] = []
        if not self._due(shot.number, bool(people)):
            return written
        name = self.info.name
        for detection, (found, i) in zip(people, poses, strict=True):
            title = f"{name}, frame {shot.number}, person {detection.track_id}"
            path = self.out / "explain" / f"{name}_{shot.number:06d}_{detection.track_id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            self.predictor.explain(shot, found, i, title, path)
            written.append(str(path.relative_to(self.out)))
        return written

    def finish(self) -> dict[str, Any]:
        """Writes the results and the metrics from the journal."""
        frames, config = self.journal.done, self.predictor.config
        with self.clock("write results"):
            outputs = self.options.outputs
            write_results(self.out, self.video, self.journal, outputs, config, self.skeleton)
        seconds = time.perf_counter() - self.started
        new = frames - self.start
        box_source = HOG if self.options.detections is None else Path(self.options.detections).name
        expected = min(self.info.frames, self.options.max_frames or self.info.frames)
        parts = self.clock.seconds
        metrics = {
            "video": Path(self.info.source).name,
            "box_source": box_source,
            "frames": frames,
            "frames_missing": max(0, expected - frames),
            **self.tally.counts,
            "resumed_at_frame": self.start,
            "seconds": seconds,
            "frames_per_second": new / seconds,
            "seconds_by_part": dict(parts) | {"rest": seconds - sum(parts.values())},
            "explained": self.tally.pictures,
        }
        write_metrics(self.out, metrics)
        self.journal.finish(metrics)
        if self.progress:
            lost = 0
            if self.given is not None and frames != self.options.max_frames:
                lost = int((self.given.frames >= frames).sum())
            print(summary(metrics, self.out, lost, self.wanted))
        return metrics
