"""What the log of a training run holds: its lines, and the curves drawn from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmpose.data.formats.reader import Number, convert, read_lines
from cmpose.data.formats.run import LogLine
from cmpose.evaluation.posetrack_ap import COLUMNS
from cmpose.report.inputs import ReportError
from cmpose.report.page import Chart, Line
from cmpose.train.step import LOSS_TERMS

LOG = "log.jsonl"
_AP_BY_STEP = "AP by step"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, in order of steps; of a step that was run again, the last.

    A killed run may leave half a line at the end, and after ``--resume`` steps come twice.

    Raises:
        ReportError: a line is damaged; the message names it.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    remedy = "delete that line to have the page without it"
    for source, line in read_lines(path, dict[str, Any], ReportError, remedy):
        head = convert(line, LogLine, source, ReportError, remedy=remedy)
        rest = {name: line[name] for name in line if name not in LogLine.__struct_fields__}
        values = convert(rest, dict[str, Number | None], source, ReportError, remedy=remedy)
        labels = {"box_source": head.box_source, "metric": head.metric}
        lines[head.kind, head.step] = {"kind": head.kind, "step": head.step, **labels, **values}
    return sorted(lines.values(), key=lambda line: line["step"])


def _curve(log: Iterable[dict[str, Any]], kind: str, name: str) -> list[tuple[float, float]]:
    return [
        (line["step"], line[name])
        for line in log
        if line["kind"] == kind and line.get(name) is not None
    ]


def log_charts(log: list[dict[str, Any]]) -> list[Chart]:
    """Curves of the losses, the AP, the learning rate and the gradient norm, those there are."""

    def lines(kind: str, names: Iterable[str]) -> list[Line]:
        curves = [Line(name, _curve(log, kind, name)) for name in names]
        return [line for line in curves if line.points]

    evaluated = [line for line in log if line["kind"] == "evaluate"]
    official = any(name in line for line in evaluated for name in COLUMNS)
    metric = next((line["metric"] for line in evaluated if line.get("metric")), "")
    metric = metric or ("PoseTrack AP" if official else "Keypoint AP, not PoseTrack's AP")
    charts = [
        Chart(
            "Loss",
            "step",
            # A task that is switched off has no loss.
            [line for line in lines("train", LOSS_TERMS) if any(y for _, y in line.points)],
            note="The sum and its terms before their weights, logarithmic.",
            log=True,
        ),
        Chart(
            _AP_BY_STEP,
            "step",
            lines("evaluate", ["Mean", *COLUMNS]),
            note=f"{metric}, in per cent, evaluated while training.",
        ),
        Chart("Learning rate", "step", lines("train", ["lr"])),
        Chart(
            "Gradient norm",
            "step",
            lines("train", ["gradient_norm"]),
            note="Before clipping, logarithmic.",
            log=True,
        ),
    ]
    # One evaluation is a row of the table, not a curve.
    return [
        chart
        for chart in charts
        if chart.lines and (chart.title != _AP_BY_STEP or len(chart.lines[0].points) > 1)
    ]
