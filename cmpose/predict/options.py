"""The options of ``cmpose predict``, their checks, and the settings that a journal is of."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cmpose.config import Config, to_dict
from cmpose.data.video import Video, VideoInfo
from cmpose.models.weights import checkpoint
from cmpose.predict.detectors.box_arrays import BoxArrays, Detector
from cmpose.predict.detectors.detect import HOG, VideoDetections, load_video_detections

Output = Literal["video", "poses", "coco", "csv"]

_SETTINGS = (
    *("min_score", "outputs", "explain", "explain_frames", "detect_every", "bridge", "smooth"),
    *("batch_size", "max_frames", "on_error"),
)
"""Options that results depend on: a journal must not mix two values of them."""

_LATER = ("smooth_keypoints", "keypoint_score")
"""The same, of a later version: a journal has them where they are not as in versions before."""

_OUTPUTS: tuple[Output, ...] = ("video", "poses", "coco")
_DETECT_EVERY = 3
_BRIDGE, _SMOOTH = 10, 2
"""In frames; the defaults for boxes that come without track ids."""


@dataclass(frozen=True)
class Options:
    """What the results of a prediction depend on, besides video, model and device.

    Attributes:
        detections: a file with people's boxes, or arrays of them; None runs the detector.
        detector: finds people; None is OpenCV's HOG detector.
        min_score: boxes with a lower score are ignored.
        outputs: which of video, poses (PoseTrack18's format), coco (COCO's results) and csv (a
            table) to write.
        explain: also draw heatmaps, causal tokens and clusters of everybody in three frames, which
            are spread over the video. If one of them is empty, the next with people is taken.
        explain_frames: draw them in exactly these frames instead; frames count from 0, those of a
            folder of pictures have the numbers of their names.
        detect_every: the detector is run in every Nth frame; None is 3. Without ``detections``
            alone.
        bridge: how many frames in a row a person may be missing and still gets boxes there, which
            are interpolated. None is 10, or 0 for boxes with track ids.
        smooth: boxes are averaged over so many frames before and after. None is 2, or 0 for boxes
            with track ids.
        smooth_keypoints: the strength of the One-Euro filter on keypoints; 0 leaves them.
        keypoint_score: keypoints of a lower score are not drawn, and have no angles.
        batch_size: how many people, of one frame or of several, go through the model at once.
        max_frames: stop after so many frames; None does not stop.
        fps: frames a second of the drawn video, if there is one; None takes the input's.
        on_error: ``skip`` goes on past unreadable pictures of a folder, ``raise`` stops.
    """

    detections: str | Path | BoxArrays | None = None
    detector: Detector | None = None
    min_score: float = 0.2
    outputs: tuple[Output, ...] = _OUTPUTS
    explain: bool = False
    explain_frames: tuple[int, ...] = ()
    detect_every: int | None = None
    bridge: int | None = None
    smooth: int | None = None
    smooth_keypoints: float = 0.0
    keypoint_score: float = 0.1
    batch_size: int = 16
    max_frames: int | None = None
    fps: float | None = None
    on_error: Literal["raise", "skip"] = "raise"

    @property
    def box_source(self) -> str:
        """Where the boxes come from, for people."""
        if isinstance(self.detections, BoxArrays):
            return "boxes in memory"
        if self.detections is not None:
            return Path(self.detections).name
        if self.detector is None:
            return HOG
        named = getattr(self.detector, "box_source", "")
        return named or getattr(self.detector, "__qualname__", type(self.detector).__qualname__)

    def check(self) -> None:
        """Raises ValueError naming the first option that cannot be."""
        if self.detections is not None and self.detector is not None:
            raise ValueError(
                f"detector {self.box_source}: boxes are given too; leave one of the two out"
            )
        for name, low in (("detect_every", 1), ("batch_size", 1), ("max_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} {value}: must be at least {low}")
        for name in ("bridge", "smooth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 250:
                raise ValueError(f"--{name} {value}: must be 0 to 250 frames, which are kept")
        if not 0 <= self.smooth_keypoints <= 100:
            raise ValueError(
                f"--smooth_keypoints {self.smooth_keypoints}: must be 0, which leaves keypoints as "
                "they are, to 100; 1 is usual"
            )
        if not -1 <= self.keypoint_score <= 1:
            raise ValueError(
                f"--keypoint_score {self.keypoint_score}: must be -1, which draws all, to 1"
            )
        unknown = [o for o in self.outputs if o not in get_args(Output)]
        if unknown or not self.outputs:
            raise ValueError(f"--outputs {list(self.outputs)}: some of {list(get_args(Output))}")
        if self.detections is not None and self.detect_every is not None:
            raise ValueError(
                f"--detect_every {self.detect_every}: no detector runs beside --detections "
                f"{self.detections}; leave one of the two out"
            )
        if self.fps is not None and "video" not in self.outputs:
            raise ValueError(
                f"--fps {self.fps}: is the drawn video's, which --outputs {list(self.outputs)} "
                "leaves out; add video, or leave --fps out"
            )
        if self.detections is None and self.bridge is not None:
            every = self.detect_every or _DETECT_EVERY
            least = every - 1
            if self.bridge < least:
                raise ValueError(
                    f"--bridge {self.bridge}: the detector runs every {every} frames, "
                    f"so {least} frames must be bridged at least; or set --detect_every"
                )


def default_explain_frames(frames: int) -> list[int]:
    """Three frames spread over a video; of a video of unknown length (0), the first one."""
    return sorted({frames // 6, frames // 2, frames * 5 // 6})


def settle(o: Options, info: VideoInfo) -> tuple[VideoDetections | None, Options]:
    """Reads the detection file, and fills in the defaults that depend on it and on the video.

    Args:
        o: as the user gave them, checked.
        info: the video's.

    Returns:
        The file's boxes, or None without a file; and the options, of which ``bridge`` and
        ``smooth`` are numbers now. ``explain`` stays True only if no frames were named.

    Raises:
        FileNotFoundError: no such detection file.
        ValueError: a broken one, one of another video, or frames to explain that are not there.
    """
    frames = info.frames if info.counted else 0
    last = min(frames or o.max_frames or 0, o.max_frames or frames) - 1
    explain_frames = _positions(o.explain_frames, last, info)
    detections = None
    if o.detections is not None:
        if info.live:
            raise ValueError(
                f"--detections {o.box_source}: {info.source} is live, a file cannot know its "
                "frames; leave the option out"
            )
        num_frames, size = frames + info.missing or None, (info.width, info.height)
        if isinstance(o.detections, BoxArrays):
            detections = o.detections.detections(
                num_frames, numbers=info.numbers, size=size, min_score=o.min_score
            )
        else:
            detections = load_video_detections(
                o.detections, num_frames, numbers=info.numbers, size=size, min_score=o.min_score
            )
    tracked = detections is not None and detections.tracked
    o = replace(o, detect_every=o.detect_every or _DETECT_EVERY)
    assert o.detect_every is not None
    bridge = max(_BRIDGE, o.detect_every - 1) if o.bridge is None else o.bridge
    smooth = _SMOOTH if o.smooth is None else o.smooth
    if tracked:
        bridge, smooth = o.bridge or 0, o.smooth or 0
    if o.explain and not explain_frames:
        explain_frames = tuple(default_explain_frames(last + 1))
        return detections, replace(o, bridge=bridge, smooth=smooth, explain_frames=explain_frames)
    settled = replace(o, bridge=bridge, smooth=smooth, explain=False, explain_frames=explain_frames)
    return detections, settled


def _positions(frames: tuple[int, ...], last: int, info: VideoInfo) -> tuple[int, ...]:
    """Frames to explain by their position in the video, sorted; ``last`` is -1 if not known."""
    names = {number: i for i, number in enumerate(info.numbers)}
    places = {frame: names.get(frame, -1) if names else frame for frame in frames}
    beyond = [frame for frame, i in places.items() if i < 0 or 0 <= last < i]
    if beyond:
        raise ValueError(
            f"--explain_frames {beyond}: {info.source} has frames {info.number(0)} to "
            f"{info.number(last)}" + (", numbered as their names are" if names else "")
        )
    return tuple(sorted(places.values()))


def _digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def settings_of(
    source: Video, config: Config, device: str, o: Options, weights: Path
) -> dict[str, Any]:
    """Everything that the results depend on, by the names that messages use.

    Args:
        source: the video.
        config: of the model.
        device: ``cpu`` or ``cuda``.
        o: settled.
        weights: the model's folder.
    """
    recipe = json.dumps(to_dict(config), sort_keys=True).encode()
    info = source.info
    settings = {
        "video": str(Path(info.source).absolute()) if Path(info.source).exists() else info.source,
        **source.signature(),
        "frame size": [info.width, info.height],
        "fps": info.fps,
        "checkpoint's weights": _digest(weights / checkpoint.WEIGHTS),
        "checkpoint's recipe": hashlib.sha256(recipe).hexdigest()[:16],
        "device": device,
    }
    for name in _SETTINGS:
        settings[f"--{name}"] = getattr(o, name)
    for name in _LATER:
        if getattr(o, name) != getattr(Options, name):
            settings[f"--{name}"] = getattr(o, name)
    if isinstance(o.detections, BoxArrays):
        settings["--detections"] = o.detections.digest()
    else:
        settings["--detections"] = None if o.detections is None else _digest(Path(o.detections))
    if o.detector is not None:
        settings["detector"] = f"{o.box_source} {getattr(o.detector, 'signature', '')}".rstrip()
    return settings
