"""``cmpose predict``: the people of a video, frame by frame, in constant memory."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from tqdm import tqdm

from cmpose import ops
from cmpose.config import Config
from cmpose.data.posetrack import write_posetrack18
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.transforms import apply_matrix, clean_box, crop_matrix, crop_region, warp
from cmpose.engine import checkpoint
from cmpose.engine.detect import BoxTracker, Detection, detect_people, load_video_detections
from cmpose.engine.distributed import pick_device
from cmpose.engine.evaluate import compute_dtype, predict_heatmaps
from cmpose.engine.explained import clip_tokens
from cmpose.engine.runlog import write_metrics
from cmpose.evaluation.decode import decode_heatmaps, to_image
from cmpose.evaluation.predictions import predicted_sequences
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.viz.draw import draw_key, draw_skeleton
from cmpose.viz.explain import explain_figure

HOG = "OpenCV HOG people detector"


class VideoError(RuntimeError):
    """A video that cannot be read or written; the message names it and what to do."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says; ``frames`` is 0 where it does not say how many."""

    path: Path
    width: int
    height: int
    fps: float
    frames: int


class Shot(NamedTuple):
    """A frame (BGR) and its number."""

    number: int
    picture: np.ndarray


class _Record(NamedTuple):
    """Whose pose it is, for ``predicted_sequences``."""

    sequence: Sequence
    frame: Frame
    person: Person | None
    box: np.ndarray
    score: float


@contextmanager
def open_video(path: Path) -> Iterator[tuple[VideoInfo, Iterator[Shot]]]:
    """A video's header and its frames, decoded one by one.

    Raises:
        VideoError: when there is no such file, OpenCV cannot read it, or it holds no frame.
    """
    if not path.is_file():
        raise VideoError(f"{path}: no such video")
    capture = cv2.VideoCapture(str(path))
    try:
        decoded, first = capture.read()
        if not decoded:
            raise VideoError(
                f"{path}: OpenCV finds no frame in it; is it a video, and whole? "
                "(re-encoding it, e.g. as H.264 in MP4, often helps)"
            )
        fps = capture.get(cv2.CAP_PROP_FPS)
        info = VideoInfo(
            path,
            width=first.shape[1],
            height=first.shape[0],
            fps=fps if fps and np.isfinite(fps) and fps > 0 else 25.0,
            frames=max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0),
        )

        def shots() -> Iterator[Shot]:
            index, picture = 0, first
            while True:
                yield Shot(index, picture)
                more, picture = capture.read()
                if not more:
                    return
                index += 1

        yield info, shots()
    finally:
        capture.release()


def windows(shots: Iterator[Shot], num_frames: int) -> Iterator[list[Shot]]:
    """Every frame with its neighbours: T shots around it, the ends repeated at the borders."""
    reach = num_frames // 2
    recent: deque[Shot] = deque(maxlen=num_frames)
    for shot in shots:
        if not recent:
            recent.extend([shot] * (reach + 1))
        else:
            recent.append(shot)
        if len(recent) == num_frames:
            yield list(recent)
    for _ in range(reach):
        if recent:
            recent.append(recent[-1])
            if len(recent) == num_frames:
                yield list(recent)


class Poses(NamedTuple):
    """The poses of P boxes in a frame: keypoints [P, K, 2] in image pixels, heatmap maxima
    [P, K], the model's output and the image → crop matrices [P, 2, 3]."""

    keypoints: np.ndarray
    scores: np.ndarray
    output: CMPoseOutput
    matrices: np.ndarray


class Predictor:
    """A model that answers with the poses of given boxes in a window of T frames."""

    def __init__(self, model: CMPose, config: Config, device: torch.device) -> None:
        self.model, self.config, self.device = model.to(device).eval(), config, device

    @torch.no_grad()
    def __call__(self, window: list[Shot], boxes: list[np.ndarray]) -> Poses:
        """Poses of the boxes [4] (x, y, width, height) in the middle frame of the window."""
        c = self.config
        size, udp = c.model.image_size, c.data.udp
        matrices = np.stack(
            [crop_matrix(crop_region(b, size, c.data.box_enlarge), size, udp=udp) for b in boxes]
        )
        # One copy of the frames serves everybody: the op reads them through a stride of zero.
        frames = torch.from_numpy(np.stack([shot.picture[..., ::-1] for shot in window]))
        frames = frames.to(self.device).expand(len(boxes), *frames.shape)
        on_device = torch.from_numpy(matrices).to(self.device, torch.float32)
        dtype = compute_dtype(c.train.precision)
        clips = ops.warp_clips(frames, on_device, size, dtype=dtype, backend=c.model.backend)
        output = predict_heatmaps(self.model, clips, c.data)
        xy, scores = decode_heatmaps(
            output.heatmaps.float().cpu(), c.data.decode, sigma=c.model.sigma
        )
        image_xy = to_image(
            xy,
            torch.from_numpy(matrices),
            heatmap_size=self.model.heatmap_size,
            image_size=size,
            udp=udp,
        )
        return Poses(image_xy.numpy(), scores.numpy(), output, matrices)

    def explain(self, shot: Shot, poses: Poses, person: int, title: str, path: Path) -> None:
        """Writes the picture of what one person's pose was read from."""
        c = self.config
        crop = warp(shot.picture, poses.matrices[person], c.model.image_size)[..., ::-1]
        keypoints = apply_matrix(poses.matrices[person], poses.keypoints[person])
        heatmaps = poses.output.heatmaps[person].float().cpu().numpy()
        explain_figure(
            np.ascontiguousarray(crop),
            heatmaps,
            keypoints,
            poses.scores[person],
            clip_tokens(self.model, poses.output, person),
            title=title,
            path=path,
        )


@contextmanager
def video_writer(path: Path, info: VideoInfo) -> Iterator[cv2.VideoWriter]:
    """An MP4 of the same size and rate, written beside and renamed when whole.

    Raises:
        VideoError: when OpenCV cannot write there.
    """
    partial = path.with_name(f".{path.stem}.tmp{path.suffix}")
    size = (info.width, info.height)
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), info.fps, size)
    if not writer.isOpened():
        raise VideoError(f"{path}: OpenCV cannot write an MP4 video there")
    try:
        yield writer
        writer.release()
        os.replace(partial, path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)


def _boxes_of(
    info: VideoInfo, detections: str | Path | None, min_score: float
) -> Callable[[Shot], list[Detection]]:
    """Frame → people's boxes with track ids, from a file or from the detector."""
    if detections is None:
        tracker = BoxTracker(hold=2)
        return lambda shot: tracker.update(
            [d for d in detect_people(shot.picture) if d.score >= min_score]
        )
    given = load_video_detections(detections, info.frames or None, min_score=min_score)
    tracker = BoxTracker()
    return lambda shot: tracker.update(given.get(shot.number, []))


def default_explain_frames(frames: int) -> list[int]:
    """Three frames spread over a video."""
    return sorted({frames // 6, frames // 2, frames * 5 // 6})


def predict_video(
    video: str | Path,
    checkpoint_path: str | Path,
    out: str | Path,
    *,
    detections: str | Path | None = None,
    explain: bool = False,
    explain_frames: Items[int] = (),
    min_score: float = 0.2,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Poses of the people in a video.

    Args:
        video: any file that OpenCV reads.
        checkpoint_path: a run's folder or a checkpoint.
        out: gets ``poses/NAME.json`` (PoseTrack18's format), ``NAME_poses.mp4`` with skeletons,
            ``metrics.json``, and with ``explain`` ``explain/NAME_FRAME_TRACK.png``.
        detections: a file with people's boxes; None detects them with OpenCV's HOG detector.
        explain: draws heatmaps, causal tokens and clusters of the people in some frames.
        explain_frames: which frames, from 0; empty takes the first with people at or after each
            of three spread over the video.
        min_score: boxes with a lower score are left out.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: shows a progress bar.

    Returns:
        What ``metrics.json`` holds: frames, people, box_source, seconds, clips_per_second, and
        seconds for decoding, detection, model and drawing apart.

    Raises:
        VideoError: a video that cannot be read or written.
        ValueError: a broken detection file, or frames to explain that the video does not have.
        CheckpointError: no usable checkpoint.
    """
    video, out = Path(video), Path(out)
    model, config = checkpoint.load_model(checkpoint_path)
    predictor = Predictor(model, config, pick_device(device))
    if explain and model.fine is None:
        raise ValueError(
            "--explain needs a model with Fine Token Enhancement; this one has model.fine=off"
        )
    with open_video(video) as (info, shots):
        beyond = [i for i in explain_frames if i < 0 or (info.frames and i >= info.frames)]
        if beyond:
            raise ValueError(
                f"--explain_frames {beyond}: {video} has frames 0 to {info.frames - 1}"
            )
        boxes_of = _boxes_of(info, detections, min_score)
        wanted = sorted(explain_frames) or (default_explain_frames(info.frames) if explain else [])
        job = _Job(predictor, info, out, wanted, exact=bool(explain_frames))
        out.mkdir(parents=True, exist_ok=True)
        with video_writer(out / f"{video.stem}_poses.mp4", info) as writer:
            bar = tqdm(
                windows(shots, config.model.num_frames),
                total=info.frames or None,
                unit="frame",
                desc="predict",
                disable=not progress,
            )
            for window in bar:
                job.frame(window, boxes_of, writer)
    source = HOG if detections is None else Path(detections).name
    metrics = job.finish(source)
    if progress:
        print(job.summary(source))
    return metrics


class _Job:
    """What a prediction gathers over the frames of a video."""

    def __init__(
        self, predictor: Predictor, info: VideoInfo, out: Path, wanted: list[int], *, exact: bool
    ) -> None:
        self.predictor, self.info, self.out = predictor, info, out
        self.wanted, self.exact = list(wanted), exact
        name = info.path.stem
        self.sequence = Sequence(name=name, file_stem=name, frames=[])
        self.records: list[_Record] = []
        self.keypoints: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []
        self.pictures: list[Path] = []
        self.seconds = dict.fromkeys(("detect", "model", "draw"), 0.0)
        self.started = time.perf_counter()

    def frame(
        self,
        window: list[Shot],
        boxes_of: Callable[[Shot], list[Detection]],
        writer: cv2.VideoWriter,
    ) -> None:
        """Detects, predicts, draws and keeps one frame."""
        marks = [time.perf_counter()]
        shot = window[len(window) // 2]
        people, boxes = [], []
        for detection in boxes_of(shot):
            box = clean_box(detection.box, self.info.width, self.info.height)
            if box is not None:
                people.append(detection)
                boxes.append(box)
        marks.append(time.perf_counter())
        poses = self.predictor(window, boxes) if boxes else None
        marks.append(time.perf_counter())
        frame = Frame(
            image_id=shot.number,
            file_name=f"{self.sequence.name}/{shot.number:06d}.jpg",
            index=shot.number,
            width=self.info.width,
            height=self.info.height,
        )
        self.sequence.frames.append(frame)
        picture = shot.picture.copy()
        if poses is not None:
            for i, detection in enumerate(people):
                person = Person(box=boxes[i], track_id=detection.track_id)
                self.records.append(
                    _Record(self.sequence, frame, person, boxes[i], detection.score)
                )
                self.keypoints.append(poses.keypoints[i])
                self.scores.append(poses.scores[i])
            self._draw(picture, people, poses)
            self._explain(shot, people, poses)
        draw_key(picture, order="bgr")
        writer.write(picture)
        marks.append(time.perf_counter())
        for name, start, end in zip(self.seconds, marks[:-1], marks[1:], strict=True):
            self.seconds[name] += end - start

    def _draw(self, picture: np.ndarray, people: list[Detection], poses: Poses) -> None:
        for i, detection in enumerate(people):
            draw_skeleton(
                picture,
                poses.keypoints[i],
                poses.scores[i],
                box=detection.box,
                track_id=detection.track_id,
                order="bgr",
            )

    def _explain(self, shot: Shot, people: list[Detection], poses: Poses) -> None:
        due = [i for i in self.wanted if i == shot.number or (i < shot.number and not self.exact)]
        if not due:
            return
        self.wanted = [i for i in self.wanted if i not in due]
        for i, detection in enumerate(people):
            title = f"{self.sequence.name}, frame {shot.number}, person {detection.track_id}"
            path = (
                self.out
                / "explain"
                / (f"{self.sequence.name}_{shot.number:06d}_{detection.track_id}.png")
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            self.predictor.explain(shot, poses, i, title, path)
            self.pictures.append(path)

    def finish(self, box_source: str) -> dict[str, Any]:
        """Writes the poses and the metrics."""
        seconds = time.perf_counter() - self.started
        K = self.predictor.config.model.num_keypoints
        [predicted] = predicted_sequences(
            [self.sequence],
            self.records,
            np.stack(self.keypoints) if self.keypoints else np.zeros((0, K, 2)),
            np.stack(self.scores) if self.scores else np.zeros((0, K)),
            self.predictor.config.data.score,
        )
        write_posetrack18(self.out / "poses" / f"{self.sequence.file_stem}.json", predicted)
        metrics = {
            "video": self.info.path.name,
            "box_source": box_source,
            "frames": len(self.sequence.frames),
            "people": len(self.records),
            "seconds": seconds,
            "frames_per_second": len(self.sequence.frames) / seconds,
            "clips_per_second": len(self.records) / seconds,
            "seconds_by_part": self.seconds
            | {"decode and encode": seconds - sum(self.seconds.values())},
            "explained": [str(p.relative_to(self.out)) for p in self.pictures],
        }
        write_metrics(self.out, metrics)
        return metrics

    def summary(self, box_source: str) -> str:
        """What was found and where it lies, for people."""
        lines = [
            f"{len(self.records)} poses in {len(self.sequence.frames)} frames, "
            f"boxes: {box_source}; written to {self.out}"
        ]
        if not self.records:
            lines.append("nobody was found: give --detections FILE, or lower --min_score")
        if self.wanted:
            lines.append(f"not explained, for want of people: frames {self.wanted}")
        return "\n".join(lines)
