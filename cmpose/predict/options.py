"""What ``cmpose predict`` can be told, checked, and what of it a journal must not mix."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from cmpose.config import Config, to_dict
from cmpose.data.video import Video, VideoInfo
from cmpose.models.weights import checkpoint
from cmpose.predict.detect import VideoDetections, load_video_detections

Output = Literal["video", "poses", "coco"]

_KEPT = (
    *("min_score", "outputs", "explain", "explain_frames", "detect_every", "bridge", "smooth"),
    *("batch_size", "max_frames", "on_error"),
)
_BRIDGE, _SMOOTH = 10, 2  # frames, for boxes that come without track ids


@dataclass(frozen=True)
class Options:
    """What a prediction's results depend on beside video, model and device; all is checked.

    Attributes:
        detections: a file with people's boxes; None detects them with OpenCV's HOG detector.
        min_score: boxes with a lower score are left out.
        outputs: which of video, poses (PoseTrack18's format) and coco (COCO's results) to write.
        explain: draws heatmaps, causal tokens and clusters of the people in three frames: the
            first with people at or after each of three spread over the video.
        explain_frames: draws them in these frames instead, from 0.
        detect_every: frames from one run of the detector to the next.
        bridge: frames that a person may be missing for, and gets interpolated boxes in; None is
            10, and 0 for boxes with track ids.
        smooth: frames on either side that boxes are averaged over; None is 2, and 0 likewise.
        batch_size: people that go through the model together, of one frame or of several.
        max_frames: ends the video after so many; None does not.
        fps: frames a second of the drawn video; None is the video's own.
        on_error: ``skip`` goes on without unreadable pictures of a folder.
    """

    detections: str | Path | None = None
    min_score: float = 0.2
    outputs: tuple[Output, ...] = get_args(Output)
    explain: bool = False
    explain_frames: tuple[int, ...] = ()
    detect_every: int = 3
    bridge: int | None = None
    smooth: int | None = None
    batch_size: int = 16
    max_frames: int | None = None
    fps: float | None = None
    on_error: Literal["raise", "skip"] = "raise"

    def check(self) -> None:
        """Raises ValueError naming the first option that cannot be."""
        for name, low in (("detect_every", 1), ("batch_size", 1), ("max_frames", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name} {value}: must be at least {low}")
        for name in ("bridge", "smooth"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 250:
                raise ValueError(f"--{name} {value}: must be 0 to 250 frames, which are kept")
        unknown = [o for o in self.outputs if o not in get_args(Output)]
        if unknown or not self.outputs:
            raise ValueError(f"--outputs {list(self.outputs)}: some of {list(get_args(Output))}")
        if self.detections is None and self.bridge is not None:
            least = self.detect_every - 1
            if self.bridge < least:
                raise ValueError(
                    f"--bridge {self.bridge}: the detector runs every {self.detect_every} frames, "
                    f"so {least} frames must be bridged at least; or set --detect_every"
                )


def default_explain_frames(frames: int) -> list[int]:
    """Three frames spread over a video; the first one where its length is not known."""
    return sorted({frames // 6, frames // 2, frames * 5 // 6})


def settle(o: Options, info: VideoInfo) -> tuple[VideoDetections | None, Options]:
    """The boxes of the detection file, and the options without open defaults.

    Raises:
        FileNotFoundError: no such detection file.
        ValueError: a broken one, one of another video, or frames to explain that are not there.
    """
    last = min(info.frames or o.max_frames or 0, o.max_frames or info.frames) - 1
    beyond = [i for i in o.explain_frames if i < 0 or 0 <= last < i]
    if beyond:
        raise ValueError(f"--explain_frames {beyond}: {info.source} has frames 0 to {last}")
    given = None
    if o.detections is not None:
        if info.live:
            raise ValueError(
                f"--detections {o.detections}: {info.source} is live, a file cannot know its "
                "frames; leave the option out"
            )
        given = load_video_detections(
            o.detections,
            info.frames or None,
            size=(info.width, info.height),
            min_score=o.min_score,
        )
    tracked = given is not None and given.tracked
    bridge = max(_BRIDGE, o.detect_every - 1) if o.bridge is None else o.bridge
    smooth = _SMOOTH if o.smooth is None else o.smooth
    if tracked:
        bridge, smooth = o.bridge or 0, o.smooth or 0
    wanted = tuple(sorted(o.explain_frames))
    if o.explain and not wanted:
        wanted = tuple(default_explain_frames(last + 1))
        return given, replace(o, bridge=bridge, smooth=smooth, explain_frames=wanted)
    return given, replace(o, bridge=bridge, smooth=smooth, explain=False, explain_frames=wanted)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()[:16]


def settings_of(
    source: Video, config: Config, device: str, o: Options, weights: Path
) -> dict[str, Any]:
    """All that the poses depend on, by the names that messages use."""
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
    for name in _KEPT:
        settings[f"--{name}"] = getattr(o, name)
    settings["--detections"] = None if o.detections is None else _digest(Path(o.detections))
    return settings
