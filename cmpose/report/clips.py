"""Which evaluation clips a model does worst and best on, and what it does there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from cmpose.config import Config
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.detections import Detection, Detections
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.transforms import apply_matrix, normalize_clips
from cmpose.distributed import pick_device
from cmpose.evaluation.decode import decode_heatmaps, to_crop
from cmpose.evaluation.inference import clip_tokens, compute_dtype, predict_heatmaps
from cmpose.models.cmpose import CMPose
from cmpose.report.page import Clip, Shown, Tile
from cmpose.viz.draw import draw_skeleton
from cmpose.viz.record import jpeg_uri, make_record

FRAMES = 7
"""Of a clip, at most, that the slider goes over."""

TILE_HEIGHT = 384
"""Pixels: fine enough for lines on a small crop, small as a JPEG."""

HEAD = 0.6
"""The head's size is this share of its box's diagonal, as in the AP."""

MEASURE = (
    "By the mean distance of the predicted joints from the annotated ones, in head sizes "
    "(0.6 × the diagonal of the head box; the AP lets half a head size pass). Every person counts "
    "once, with the worst or the best frame; {count} poses were measured. In colour what was "
    "predicted, in white what is true."
)


@dataclass(eq=False)
class Sample:
    """An annotated person in a frame, the pose predicted for them, and how far off it is.

    ``error`` is the mean distance in head sizes over the annotated joints, None where it cannot
    be told; ``head`` the head's size in image pixels.
    """

    sequence: Sequence
    frame: Frame
    person: Person
    pose: Person | None
    error: float | None
    head: float | None


@dataclass
class Samples:
    """All samples; ``tracks`` has those of one person together, in order of frames."""

    tracks: list[list[Sample]] = field(default_factory=list)
    unpredicted: int = 0
    headless: int = 0

    @property
    def ranked(self) -> bool:
        """Whether any error is known."""
        return self.measured > 0

    @property
    def measured(self) -> int:
        """Poses whose error is known."""
        return sum(sample.error is not None for track in self.tracks for sample in track)

    def left_out(self) -> str:
        """What could not be measured, in words."""
        parts = [
            (self.unpredicted, "without a predicted pose"),
            (self.headless, "without a head box"),
        ]
        said = [f"{count} people {what}" for count, what in parts if count]
        return f" Not measured: {', '.join(said)}." if said else ""


def head_size(person: Person) -> float | None:
    """In image pixels; None without a head box."""
    if person.head_box is None:
        return None
    size = HEAD * float(np.hypot(*person.head_box[2:]))
    return size if size > 0 else None


def _distances(person: Person, pose: Person) -> np.ndarray:
    """Of the annotated joints, in pixels."""
    known = person.keypoints[:, 2] > 0
    return np.linalg.norm(person.keypoints[known, :2] - pose.keypoints[known, :2], axis=1)


def rank(truth: list[Sequence], predicted: list[Sequence], *, own_boxes: bool) -> Samples:
    """Finds each annotated person's predicted pose and measures it.

    Args:
        truth: annotated sequences.
        predicted: with the same ``file_stem`` and image ids; those not there are not measured.
        own_boxes: poses were predicted in annotated boxes, so they are told by track id. Else,
            and where no id fits, a person's pose is the closest one in the frame.
    """
    poses = {
        (sequence.file_stem, frame.image_id): frame.people
        for sequence in predicted
        for frame in sequence.frames
    }
    samples = Samples()
    for sequence in truth:
        tracks: defaultdict[object, list[Sample]] = defaultdict(list)
        for frame in sequence.frames:
            candidates = poses.get((sequence.file_stem, frame.image_id), [])
            for place, person in enumerate(frame.people):
                if not frame.labeled or person.num_visible == 0:
                    continue
                pose = _pose_of(person, candidates, own_boxes)
                head = head_size(person)
                error = None
                if pose is None:
                    samples.unpredicted += bool(predicted)
                elif head is None:
                    samples.headless += 1
                else:
                    error = float(_distances(person, pose).mean()) / head
                nobody = (frame.image_id, place)
                key = person.track_id if person.track_id >= 0 else nobody
                tracks[key].append(Sample(sequence, frame, person, pose, error, head))
        for track in tracks.values():
            samples.tracks.append(sorted(track, key=lambda sample: sample.frame.index))
    return samples


def _pose_of(person: Person, candidates: list[Person], own_boxes: bool) -> Person | None:
    if own_boxes and person.track_id >= 0:
        for pose in candidates:
            if pose.track_id == person.track_id:
                return pose
    return min(candidates, key=lambda pose: _distances(person, pose).mean(), default=None)


def pick(samples: Samples, count: int) -> tuple[list[Sample], list[Sample]]:
    """The worst and the best samples, the extreme ones first, a person in one of them only.

    Without errors: the first people's middle frames, and none.
    """
    if not samples.ranked:
        return [track[len(track) // 2] for track in samples.tracks[:count]], []
    known = [
        [(sample.error, sample) for sample in track if sample.error is not None]
        for track in samples.tracks
    ]
    tracks = [track for track in known if track]
    by_worst = sorted(tracks, key=lambda t: -max(error for error, _ in t))
    worst = by_worst[: min(count, -(-len(tracks) // 2))]
    rest = by_worst[len(worst) :]
    best = sorted(rest, key=lambda t: min(error for error, _ in t))[:count]

    def extreme(track: list[tuple[float, Sample]], sign: int) -> Sample:
        return max(track, key=lambda pair: sign * pair[0])[1]

    return [extreme(track, 1) for track in worst], [extreme(track, -1) for track in best]


@dataclass
class ShownClips:
    """What a page shows: tiles, clips to look into (none without a model), their frames."""

    worst: list[Tile] = field(default_factory=list)
    best: list[Tile] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    frames: int = 0


def show(
    samples: Samples, config: Config, root: Path, model: CMPose | None, count: int
) -> ShownClips:
    """Reads the chosen clips' frames, and runs the model on them if there is one.

    Raises:
        FrameError: naming a frame that is not there or cannot be read.
    """
    shown = ShownClips()
    tracks = {id(sample): track for track in samples.tracks for sample in track}
    worst, best = pick(samples, count)
    for group, tiles, word in ((worst, shown.worst, "worst"), (best, shown.best, "best")):
        for place, sample in enumerate(group, start=1):
            frames = _around(tracks[id(sample)], sample)
            seen = _Seen(frames, config, root)
            if sample.frame.image_id not in seen.index:
                continue  # its box leaves the picture
            index = None
            if model is not None:
                index = len(shown.clips)
                label = f"{word} {place}" if samples.ranked else f"{place}"
                shown.clips.append(seen.clip(model, sample, label))
                shown.frames += len(shown.clips[-1].frames)
            tiles.append(seen.tile(sample, index))
    return shown


def _around(track: list[Sample], sample: Sample) -> list[Sample]:
    """At most ``FRAMES`` of a track, the sample among them, in its middle if it can be."""
    place = next(i for i, other in enumerate(track) if other is sample)
    first = min(max(place - FRAMES // 2, 0), max(len(track) - FRAMES, 0))
    return track[first : first + FRAMES]


class _Seen:
    """A person in some frames, cropped as evaluation cropped them."""

    def __init__(self, samples: list[Sample], config: Config, root: Path) -> None:
        self.config = config
        self.samples = {sample.frame.image_id: sample for sample in samples}
        sequence = samples[0].sequence
        boxes = {
            (sequence.file_stem, sample.frame.image_id): [
                Detection(sample.person.box if sample.pose is None else sample.pose.box, 1.0)
            ]
            for sample in samples
        }
        # The host warps, from the frames: a cache of crops may be gone or hold other boxes.
        data = replace(config.data, warp="host", cache="", on_error="raise")
        try:
            self.clips: ClipDataset | None = ClipDataset(
                [sequence],
                root,
                config.model.image_size,
                config.model.num_frames,
                data,
                boxes=Detections("report", boxes),
                train=False,
            )
        except ValueError:  # no box of these is inside its picture
            self.clips = None
        self.index = {
            record.frame.image_id: i
            for i, record in enumerate(self.clips.records if self.clips is not None else ())
        }

    def tile(self, sample: Sample, clip: int | None) -> Tile:
        assert self.clips is not None
        item = self.clips[self.index[sample.frame.image_id]]
        picture = item["clip"][self.config.model.num_frames // 2].numpy()
        matrix = item["matrix"].numpy()
        scale = TILE_HEIGHT / picture.shape[0]
        size = round(picture.shape[1] * scale), TILE_HEIGHT
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)

        def draw(points: np.ndarray, color: tuple[int, int, int] | None = None) -> None:
            # Pixel centres, as cv2.resize has them.
            draw_skeleton(
                picture,
                (points + 0.5) * scale - 0.5,
                width=2,
                color=color,
                skeleton=sample.sequence.skeleton,
            )

        draw(_truth(sample, matrix), (255, 255, 255))
        if sample.pose is not None:
            draw(apply_matrix(matrix, sample.pose.keypoints[:, :2]))
        who = _who(sample)
        if sample.error is None:
            heading, said = "not measured", "not measured"
        else:
            heading, said = f"{sample.error:.2f} head sizes", f"{sample.error:.2f} head sizes off"
        detail = f"{who}, {sample.person.num_visible} joints"
        return Tile(
            jpeg_uri(picture), f"{who}: predicted and true pose, {said}", heading, detail, clip
        )

    @torch.no_grad()
    def clip(self, model: CMPose, key: Sample, label: str) -> Clip:
        assert self.clips is not None
        c = self.config
        device = pick_device("auto")
        model = model.to(device).eval()
        items = [self.clips[i] for i in range(len(self.clips))]
        pixels = torch.stack([item["clip"] for item in items])
        images = normalize_clips(pixels.to(device), compute_dtype(c.train.precision))
        output = predict_heatmaps(model, images, c.data)
        heatmaps = output.heatmaps.float().cpu()
        xy, scores = decode_heatmaps(heatmaps, c.data.decode, sigma=c.model.sigma)
        keypoints = to_crop(xy, model.heatmap_size, c.model.image_size, udp=c.data.udp)
        frames = []
        for row, (record, item) in enumerate(zip(self.clips.records, items, strict=True)):
            sample = self.samples[record.frame.image_id]
            matrix = item["matrix"].numpy()
            zoom = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
            frames.append(
                Shown(
                    label=f"frame {record.frame.index}",
                    record=make_record(
                        pixels[row, c.model.num_frames // 2].numpy(),
                        heatmaps[row].numpy(),
                        keypoints[row].numpy(),
                        scores[row].numpy(),
                        clip_tokens(model, output, row),
                        title=_who(sample),
                        truth=_truth(sample, matrix),
                        skeleton=model.skeleton,
                    ),
                    note=(
                        "" if sample.error is None else f"This pose: {sample.error:.2f} head sizes"
                    ),
                    head=None if sample.head is None else sample.head * zoom,
                )
            )
        name = f"{label}: {key.sequence.name}, person {key.person.track_id}"
        return Clip(name, frames, self.index[key.frame.image_id])


def _who(sample: Sample) -> str:
    person = f", person {sample.person.track_id}" if sample.person.track_id >= 0 else ""
    return f"{sample.sequence.name}, frame {sample.frame.index}{person}"


def _truth(sample: Sample, matrix: np.ndarray) -> np.ndarray:
    """The annotated joints [K, 2] in crop pixels, NaN where there is none."""
    points = apply_matrix(matrix, sample.person.keypoints[:, :2])
    return np.where(sample.person.keypoints[:, 2:] > 0, points, np.nan)
