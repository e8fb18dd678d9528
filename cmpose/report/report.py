"""``cmpose report``: one HTML page for a training run or a prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cmpose.files import claim_file, write_text
from cmpose.report.inputs import ReportError
from cmpose.report.page import Clip, Report, render
from cmpose.report.prediction import is_prediction, prediction_report
from cmpose.report.training import is_training, training_report

CLIPS = 4
"""Worst ones, and best ones, by default."""

BUDGET = 8_000_000
"""Characters that all clips' records may have; a page is about a megabyte larger."""


def within_budget(clips: list[Clip], budget: int = BUDGET) -> bool:
    """Drops frames, farthest from those shown first, until the records fit.

    Every clip keeps its first shown frame, so that very many clips can still exceed it.

    Returns:
        Whether any was dropped.
    """
    sizes = {id(f): len(json.dumps(f.record)) for clip in clips for f in clip.frames}
    total, dropped = sum(sizes.values()), False
    while total > budget:
        longest = max(clips, key=lambda clip: len(clip.frames))
        if len(longest.frames) == 1:
            break
        ends = 0, len(longest.frames) - 1
        end = max(ends, key=lambda i: abs(i - longest.start))
        total -= sizes[id(longest.frames.pop(end))]
        longest.start -= end == 0
        dropped = True
    return dropped


def gather(run: str | Path, clips: int = CLIPS) -> Report:
    """What a page says of a run.

    Args:
        run: the folder of a training run or of a prediction.
        clips: worst ones, and best ones, to show.

    Raises:
        ReportError: neither is there, a file in it is broken, or ``clips`` is less than 1.
    """
    run = Path(run)
    report = _maker(run, clips)(run, clips)
    parts = report.parts()
    if within_budget([clip for part in parts for clip in part.clips]):
        for part in parts:
            part.clips_intro += " Frames were left out to keep this page small."
    return report


def _maker(run: Path, clips: int) -> Callable[[Path, int], Report]:
    """What makes the report of a folder, by what the folder holds."""
    if clips < 1:
        raise ReportError(f"--clips {clips}: must be at least 1")
    if not run.is_dir():
        raise ReportError(f"{run}: no such folder; give {_EXPECTED}")
    if is_training(run):
        return training_report
    if is_prediction(run):
        return prediction_report
    raise ReportError(f"{run}: nothing to report on; give {_EXPECTED}")


_EXPECTED = (
    "the folder of a training run (it holds config.json and log.jsonl) or the output folder of "
    "cmpose predict (it holds metrics.json and poses/*.json)"
)


def report(run: str | Path, out: str | Path = "", clips: int = CLIPS) -> Path:
    """``cmpose report``: writes the page of a run and returns its path.

    Args:
        run: the folder of a training run or of a prediction.
        out: the page; default ``RUN/report.html``.
        clips: worst ones, and best ones, to show.

    Raises:
        ReportError: see ``gather``; or ``out`` is a folder, or a file that is no such page.
        InUse: another process writes this page.
        OutputError: the page cannot be written.
    """
    path = Path(out) if out else Path(run) / "report.html"
    if path.is_dir():
        raise ReportError(f"--out {path}: is a folder; name a file, such as {path / 'report.html'}")
    if path.is_file() and not _may_be_replaced(path):
        raise ReportError(
            f"--out {path}: is there already and is no page of cmpose report: move it, or give "
            "another --out"
        )
    _maker(Path(run), clips)  # refuses a folder before anything is made for the page
    with claim_file(path, "report", "--out"):
        write_text(path, render(gather(run, clips)))
    return path


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is a page of ``cmpose report``, or empty."""
    with open(path, "rb") as file:
        head = file.read(4096)
    return not head or b'<meta name="generator" content="cmpose ' in head
