"""Reads the files that reports of training runs and of predictions are made from."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from cmpose.data.formats.reader import Number, Whole, read

METRICS = "metrics.json"


class ReportError(ValueError):
    """A folder that no report can be written of; the message names it and what is expected."""


class Ap(Struct):
    """``ap`` of an evaluation's metrics; null is what has no value."""

    joints: list[str] = []
    ap: list[Number | None] = []
    columns: dict[str, Number | None] = {}
    metric: str | None = None


class Metrics(Struct):
    """``metrics.json`` of a training, an evaluation or a prediction, as far as pages show it."""

    ap: Ap | None = None
    box_source: str = "not stated"
    annotations: str | None = None
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


def read_metrics(path: Path) -> Metrics | None:
    """The metrics in a file, None when there is no such file.

    Raises:
        ReportError: the file cannot be read, or a value is of another type.
    """
    remedy = "mend it, or delete it to have the page without it"
    try:
        return read(path, Metrics, ReportError, remedy)
    except FileNotFoundError:
        return None
