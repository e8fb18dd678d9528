"""The report of a training run: its log, its evaluations, its worst and best clips."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cmpose.config import Config
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.frames import FrameError
from cmpose.data.sequence import AnnotationError, Sequence
from cmpose.evaluation.posetrack_ap import COLUMNS
from cmpose.models.weights import checkpoint
from cmpose.report.clips import MEASURE, Samples, rank, show
from cmpose.report.inputs import ReportError, read_json
from cmpose.report.page import Chart, Line, Report, Table
from cmpose.train.step import LOSS_TERMS

AP_BY_STEP = "AP by step"
LOG, METRICS = "log.jsonl", "metrics.json"


def is_training(run: Path) -> bool:
    """Whether a folder is a training run's."""
    return (run / checkpoint.CONFIG).is_file() and (run / LOG).is_file()


def training_report(run: Path, count: int) -> Report:
    """What the page of a training run says; see ``cmpose.report.report.gather``."""
    try:
        config = checkpoint.load_config(run)
    except checkpoint.CheckpointError as error:
        raise ReportError(str(error)) from error
    log = read_log(run / LOG)
    report = Report("Training run", run.resolve().name, "")
    report.charts = _charts(log)
    if not report.charts:
        report.absent["curves"] = (
            f"{LOG} holds no step yet: the first line comes after train.log_every = "
            f"{config.train.log_every} steps."
        )
    evaluations = _evaluations(run)
    _tables(report, evaluations, log, config)
    report.lead = _lead(evaluations, log)
    _clips(report, run, config, count)
    report.facts = _facts(run, config, evaluations, log)
    return report


# -- the log -------------------------------------------------------------------------------------


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, in order of steps; of a step that was run again, the last.

    A killed run may leave half a line, and after ``--resume`` steps come twice.
    """
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            line = json.loads(text)
            lines[str(line["kind"]), int(line["step"])] = line
    return sorted(lines.values(), key=lambda line: line["step"])


def _curve(log: Iterable[dict[str, Any]], kind: str, name: str) -> list[tuple[float, float]]:
    return [
        (line["step"], float(line[name]))
        for line in log
        if line["kind"] == kind and isinstance(line.get(name), int | float)
    ]


def _charts(log: list[dict[str, Any]]) -> list[Chart]:
    def lines(kind: str, names: Iterable[str]) -> list[Line]:
        found = [Line(name, _curve(log, kind, name)) for name in names]
        return [line for line in found if line.points]

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
            AP_BY_STEP,
            "step",
            lines("evaluate", ["Mean", *COLUMNS]),
            note="Official PoseTrack AP in percent, evaluated while training.",
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
        if chart.lines and (chart.title != AP_BY_STEP or len(chart.lines[0].points) > 1)
    ]


# -- evaluations ---------------------------------------------------------------------------------


def _evaluations(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """(place below the run, metrics) of every evaluation: training's own first, then later ones."""
    places = [run / METRICS, *sorted(run.glob(f"*/{METRICS}"))]
    places += sorted(run.glob(f"*/evaluation/{METRICS}"))
    places += sorted(run.glob(f"*/*/evaluation/{METRICS}"))
    found = []
    for path in places:
        metrics = read_json(path)
        if isinstance(metrics, dict) and isinstance(metrics.get("ap"), dict):
            found.append((str(path.parent.relative_to(run)), metrics))
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _tables(
    report: Report,
    evaluations: list[tuple[str, dict[str, Any]]],
    log: list[dict[str, Any]],
    config: Config,
) -> None:
    """By joint and by column of the published tables, a column for each evaluation."""
    own = f"{config.data.root}: {config.data.val_annotations}"
    logged = [line for line in log if line["kind"] == "evaluate"]
    if not evaluations and not logged:
        report.absent["ap"] = (
            "This run has not been evaluated: a run is when it ends, or every "
            "train.evaluate_every epochs, or by cmpose evaluate --checkpoint."
        )
        return
    rule = (
        "Official PoseTrack AP in percent: a joint counts within half a head size. The Mean is "
        "over all joints, not over the columns."
    )
    if not evaluations:
        last = logged[-1]
        source = str(last.get("box_source", "not stated"))
        report.tables = [
            Table(
                f"By column, after step {last['step']}",
                [source],
                [(name, [_number(last.get(name))]) for name in (*COLUMNS, "Mean")],
                frozenset({"Mean"}),
            )
        ]
        report.table_notes = [
            rule,
            f"Boxes: {source}. Data set: {own}. From the log, which has no single joints: "
            "the run has not ended.",
        ]
        return
    if len(logged) == 1:
        rule += (
            " It was evaluated once while training, so that there is no curve of AP by step; "
            "train.evaluate_every asks for more."
        )
    if all("metric" in metrics["ap"] for _, metrics in evaluations):
        rule = rule[rule.index("The Mean") :]
    heads = []
    report.table_notes = [rule]
    for place, metrics in evaluations:
        source = str(metrics.get("box_source", "not stated"))
        heads.append(source if place == "." else f"{source} ({place})")
        where = "At the end of training" if place == "." else f"In {place}"
        clips = f", {metrics['clips']} clips" if "clips" in metrics else ""
        if "metric" in metrics["ap"]:  # these keypoints have no official AP
            clips += f", {metrics['ap']['metric']}"
        report.table_notes.append(
            f"{where}: boxes: {source}{clips}, data set {metrics.get('annotations', own)}."
        )
    joints = list(dict.fromkeys(j for _, m in evaluations for j in m["ap"].get("joints", ())))
    by_joint = [
        dict(zip(m["ap"].get("joints", ()), m["ap"].get("ap", ()), strict=False))
        for _, m in evaluations
    ]
    columns = list(dict.fromkeys(c for _, m in evaluations for c in m["ap"].get("columns", ())))
    report.tables = [
        Table(
            "By joint",
            heads,
            [
                (joint.replace("_", " "), [_number(v.get(joint)) for v in by_joint])
                for joint in joints
            ],
        ),
        Table(
            "By column of the published tables",
            heads,
            [
                (c, [_number(m["ap"].get("columns", {}).get(c)) for _, m in evaluations])
                for c in columns
            ],
            frozenset({"Mean"}),
        ),
    ]


def _lead(evaluations: list[tuple[str, dict[str, Any]]], log: list[dict[str, Any]]) -> str:
    steps = max((line["step"] for line in log), default=0)
    if not evaluations:
        return f"{steps} steps logged, not evaluated at the end."
    place, metrics = evaluations[0]
    mean = _number(metrics["ap"].get("columns", {}).get("Mean"))
    of = "" if place == "." else f", from {place}"
    return (
        f"AP {'unknown' if mean is None else f'{mean:.1f}'} after {metrics.get('steps', steps)} "
        f"steps (boxes: {metrics.get('box_source', 'not stated')}{of})."
    )


# -- clips ---------------------------------------------------------------------------------------


def _clips(
    report: Report,
    run: Path,
    config: Config,
    count: int,
) -> None:
    root = Path(config.data.root).expanduser()
    try:
        truth = load_annotations(
            config.data.val_annotations, root, config.data.format, on_error=config.data.on_error
        )
    except (OSError, AnnotationError) as error:
        report.absent["clips"] = report.absent["tokens"] = (
            f"No clip can be shown, because the annotations cannot be read: {error}. A report is "
            "written where the data set of the recipe (data.root) lies."
        )
        return
    # predictions/ is what training evaluated, by the recipe's own boxes.
    samples = rank(truth, _predictions(run), own_boxes=config.data.boxes == "gt")
    try:
        _show(report, run, config, samples, count, root)
    except (FrameError, OSError) as error:
        report.worst, report.best, report.clips = [], [], []
        report.absent["clips"] = report.absent["tokens"] = (
            f"No clip can be shown, because its frames cannot be read: {error}"
        )


def _predictions(run: Path) -> list[Sequence]:
    try:
        return load_annotations(run / "predictions", on_error="skip")
    except FileNotFoundError:
        return []
    except AnnotationError as error:
        raise ReportError(f"{error}; evaluate again, or delete {run / 'predictions'}") from error


def _show(
    report: Report, run: Path, config: Config, samples: Samples, count: int, root: Path
) -> None:
    model, reason = None, ""
    try:
        model, _ = checkpoint.load_model(run)
    except checkpoint.CheckpointError as error:
        reason = str(error)
    shown = show(samples, config, root, model, count)
    report.worst, report.best, report.clips = shown.worst, shown.best, shown.clips
    if not report.worst:
        report.absent["clips"] = (
            "The evaluation clips hold nobody with an annotated head box and a joint, so that no "
            "error can be measured."
        )
        report.absent["tokens"] = "There is no clip to look into."
        return
    if samples.ranked:
        report.measure = MEASURE.format(count=samples.measured) + samples.left_out()
    else:
        report.groups = ("Clips", "")
        report.measure = (
            "This run has no predictions yet, so nothing is ranked: these are the first people of "
            "the evaluation set."
        )
    if model is None:
        report.absent["tokens"] = f"The model cannot be run again: {reason}"
    report.clips_intro = (
        f"The checkpoint {checkpoint.find(run)} was run again on these clips, {shown.frames} "
        "frames in all. Choose a keypoint, by its name or by a click on a picture, and move over "
        "the frames."
        if model is not None
        else ""
    )


# -- facts ---------------------------------------------------------------------------------------


def _facts(
    run: Path,
    config: Config,
    evaluations: list[tuple[str, dict[str, Any]]],
    log: list[dict[str, Any]],
) -> list[tuple[str, str]]:
    model, data, train = config.model, config.data, config.train
    height, width = model.image_size
    facts = [
        ("Folder", str(run)),
        ("Data set", data.root),
        ("Training annotations", data.train_annotations),
        ("Evaluation annotations", data.val_annotations),
        ("Boxes", "ground truth" if data.boxes == "gt" else data.boxes),
        ("Backbone", f"{model.backbone}, crops of {height} × {width}, {model.num_frames} frames"),
        (
            "Fine Token Enhancement",
            f"model.fine={model.fine}"
            + (f", {model.tokens_per_keypoint} a keypoint" if model.fine != "off" else "")
            + (f", {model.num_clusters} clusters" if model.fine == "full" else ""),
        ),
        (
            "Training",
            f"{train.epochs} epochs, batch {train.batch_size}, lr {train.lr:g}, {train.precision}",
        ),
    ]
    last = next((line for line in reversed(log) if line["kind"] == "train"), None)
    if last is not None:
        speed = _number(last.get("clips_per_second"))
        at = f"step {last['step']}" + (f", {speed:.1f} clips/s" if speed else "")
        facts.append(("Last logged", at))
    if evaluations and evaluations[0][0] == ".":
        metrics = evaluations[0][1]
        for name, key, form in (
            ("Seconds of training", "seconds", "{:.0f}"),
            ("Clips a second, training", "clips_per_second", "{:.1f}"),
            ("Clips a second, evaluation", "evaluation_clips_per_second", "{:.1f}"),
            ("Causal hit rate", "causal_hit_rate", "{:.2f} of visible joints"),
        ):
            value = _number(metrics.get(key))
            if value is not None:
                facts.append((name, form.format(value)))
    return facts
