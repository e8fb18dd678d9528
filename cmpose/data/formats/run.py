"""What runs leave behind, as typed structs: ``metrics.json`` and the lines of ``log.jsonl``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from cmpose.data.formats.reader import Number, Whole, read


class Ap(Struct):
    """``ap`` of an evaluation's metrics; null is what has no value."""

    joints: list[str] = []
    ap: list[Number | None] = []
    columns: dict[str, Number | None] = {}
    metric: str | None = None

    def __post_init__(self) -> None:
        if len(self.ap) != len(self.joints):
            raise ValueError(
                f"expected a number of each of the {len(self.joints)} joints, got {len(self.ap)}"
            )


class Metrics(Struct):
    """``metrics.json`` of a training, an evaluation or a prediction, as far as others read it."""

    ap: Ap | None = None
    box_source: str = "not stated"
    annotations: str | None = None
    data: str | None = None
    clips: Whole | None = None
    steps: Whole | None = None
    seconds: Number | None = None
    clips_per_second: Number | None = None
    evaluation_clips_per_second: Number | None = None
    causal_hit_rate: Number | None = None
    video: str | None = None
    frames: Whole | None = None
    people: Whole | None = None
    frames_per_second: Number | None = None
    seconds_by_part: dict[str, Number] | None = None
    keypoints: Whole | None = None
    keypoints_not_drawn: Whole | None = None
    keypoint_score: Number | None = None
    subsets: dict[str, dict[str, Number | None]] = {}
    # What follows is not shown: it is here so that a damaged file is refused.
    skipped: dict[str, Whole] = {}
    mean_pose_ap: Ap | None = None
    training_seconds: Number | None = None
    evaluation_seconds: Number | None = None
    resumed_at_frame: Whole | None = None
    frames_missing: Whole | None = None
    tracks: Whole | None = None
    frames_unreadable: Whole | None = None
    frames_without_people: Whole | None = None
    boxes_interpolated: Whole | None = None
    boxes_left_out: dict[str, Whole] = {}
    boxes_kept: dict[str, Whole] = {}
    explained: list[str] = []
    fps: Number | None = None
    notes: list[str] = []


class LogLine(Struct):
    """What the lines of a training's log have beside numbers by name."""

    kind: str
    step: Whole
    box_source: str = ""
    metric: str = ""


_KEYS = {"predict": "video", "train": "steps", "evaluate": "ap"}
"""A key that a command's metrics have, and those of the commands behind it do not."""


def writer_of(metrics: Path) -> str:
    """The command that wrote a ``metrics.json``; empty for any other file, or none."""
    try:
        content = read(metrics, dict[str, Any], ValueError)
    except (OSError, ValueError):
        return ""
    return next((command for command, key in _KEYS.items() if key in content), "")
