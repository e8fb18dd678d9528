"""Which evaluation clips a model does worst and best on, and what it does there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from cmpose.config import Config
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.detections import Detections, ScoredBox
from cmpose.data.transforms import apply_matrix, normalize_clips
from cmpose.distributed import pick_device
from cmpose.evaluation.decode import decode_heatmaps, to_crop
from cmpose.evaluation.inference import clip_tokens, compute_dtype, predict_heatmaps
from cmpose.models.cmpose import CMPose
from cmpose.report.page import Clip, ClipFrame, Thumbnail
from cmpose.report.samples import Sample, Samples, pick
from cmpose.viz.draw import draw_skeleton
from cmpose.viz.record import jpeg_uri, make_record

FRAMES = 7
"""The slider goes over at most so many frames of a clip."""

TILE_HEIGHT = 384
"""In pixels. Lines on a small crop look fine at this height, and the JPEG stays small."""


def measure(samples: Samples) -> str:
    """How clips are ranked, or why they are not, in words."""
    if not samples.predicted:
        return (
            "This run has no predictions yet, so that nothing is ranked: these are the first "
            "people of the evaluation set."
        )
    if not samples.ranked:
        return (
            "Nothing is ranked, because no pose can be measured: these are the first people of the "
            f"evaluation set.{samples.left_out()}"
        )
    unit = samples.unit
    return (
        "By the mean distance of the predicted joints from the annotated ones, in "
        f"{unit.name} ({unit.definition}). Every person counts once, with the worst or the best "
        f"frame; {samples.measured} poses were measured. In colour what was predicted, in white "
        f"what is true.{samples.left_out()}"
    )


@dataclass
class ShownClips:
    """What a page shows.

    Attributes:
        worst: pictures, the worst first.
        best: pictures, the best first.
        clips: to look into; empty without a model.
        frames: of all clips.
    """

    worst: list[Thumbnail] = field(default_factory=list)
    best: list[Thumbnail] = field(default_factory=list)
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
        for rank, sample in enumerate(group, start=1):
            around = _around(tracks[id(sample)], sample)
            person = _CroppedPerson(around, config, root, samples.unit.name)
            if sample.frame.image_id not in person.index:
                continue  # its box leaves the picture
            clip = None
            if model is not None:
                clip = len(shown.clips)
                label = f"{word} {rank}" if samples.ranked else f"{rank}"
                shown.clips.append(person.clip(model, sample, label))
                shown.frames += len(shown.clips[-1].frames)
            tiles.append(person.tile(sample, clip))
    return shown


def _around(track: list[Sample], sample: Sample) -> list[Sample]:
    """At most ``FRAMES`` of a track, the sample among them, in its middle if it can be."""
    middle = next(i for i, other in enumerate(track) if other is sample)
    first = min(max(middle - FRAMES // 2, 0), max(len(track) - FRAMES, 0))
    return track[first : first + FRAMES]


class _CroppedPerson:
    """A person in some frames, cropped as evaluation cropped them.

    Attributes:
        unit: what errors are measured in, for people.
        samples: image id → the person in that frame.
        clips: the crops, None where no box lies in its picture.
        index: image id → index into ``clips``.
    """

    def __init__(self, samples: list[Sample], config: Config, root: Path, unit: str) -> None:
        self.config, self.unit = config, unit
        self.samples = {sample.frame.image_id: sample for sample in samples}
        sequence = samples[0].sequence
        boxes = {
            (sequence.file_stem, sample.frame.image_id): [
                ScoredBox(sample.person.box if sample.pose is None else sample.pose.box, 1.0)
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

    def tile(self, sample: Sample, clip: int | None) -> Thumbnail:
        """The person in one frame, true and predicted; a click on it opens ``clip``."""
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
            heading, error = "not measured", "not measured"
        else:
            heading = f"{sample.error:.2f} {self.unit}"
            error = f"{heading} off"
        detail = f"{who}, {sample.person.num_visible} joints"
        return Thumbnail(
            jpeg_uri(picture), f"{who}: predicted and true pose, {error}", heading, detail, clip
        )

    @torch.no_grad()
    def clip(self, model: CMPose, key: Sample, label: str) -> Clip:
        """What the model does in all frames; the one of ``key`` is shown first."""
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
            drawn = make_record(
                pixels[row, c.model.num_frames // 2].numpy(),
                heatmaps[row].numpy(),
                keypoints[row].numpy(),
                scores[row].numpy(),
                clip_tokens(model, output, row),
                title=_who(sample),
                truth=_truth(sample, matrix),
                skeleton=model.skeleton,
            )
            zoom = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
            size = None if sample.unit is None else sample.unit * zoom
            note = "" if sample.error is None else f"This pose: {sample.error:.2f} {self.unit}"
            frame = f"frame {record.frame.index}"
            frames.append(ClipFrame(frame, drawn, note, size, self.unit))
        name = f"{label}: {key.sequence.name}, person {key.person.track_id}"
        return Clip(name, frames, self.index[key.frame.image_id])


def _who(sample: Sample) -> str:
    """The sequence, frame and person of a sample, for people."""
    person = f", person {sample.person.track_id}" if sample.person.track_id >= 0 else ""
    return f"{sample.sequence.name}, frame {sample.frame.index}{person}"


def _truth(sample: Sample, matrix: np.ndarray) -> np.ndarray:
    """The annotated joints [K, 2] in crop pixels, NaN where there is none."""
    points = apply_matrix(matrix, sample.person.keypoints[:, :2])
    return np.where(sample.person.keypoints[:, 2:] > 0, points, np.nan)
