"""The evaluations of a training run, as tables of AP and as a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmpose.data.formats.run import Ap, Metrics
from cmpose.evaluation.posetrack_ap import COLUMNS
from cmpose.models.weights.checkpoint import CHECKPOINTS, EVALUATIONS, MODEL
from cmpose.report.inputs import METRICS, read_metrics
from cmpose.report.page import Report, Table

_MEAN_ONLY = "The Mean is over all joints, not over the columns."
_OFFICIAL = "PoseTrack AP in per cent: a joint counts within half a head size."
_DASH = "–: nobody has this joint in the evaluated clips."
_ABSENT = (
    "This run has not been evaluated: a run is when it ends, or every train.evaluate_every "
    "epochs, or by cmpose evaluate --checkpoint."
)
_ONCE = (
    "It was evaluated once while training, so that there is no curve of AP by step; "
    "train.evaluate_every asks for more."
)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a run.

    Attributes:
        folder: where it lies below the run's; ``.`` for the one at the end of training.
        metrics: what its ``metrics.json`` holds.
    """

    folder: str
    metrics: Metrics

    @property
    def ap(self) -> Ap:
        """Of the joints, and of the columns of the published tables."""
        return self.metrics.ap or Ap()

    @property
    def box_source(self) -> str:
        """Where its boxes are from."""
        return self.metrics.box_source

    @property
    def predictions(self) -> str:
        """The folder of its poses, below the run's."""
        return str(Path(self.folder) / "predictions")

    def weights(self, run: Path) -> Path:
        """What it was made with: a checkpoint of the run, else its newest weights."""
        folder = Path(self.folder)
        if folder.parent.name == CHECKPOINTS:  # where evaluations lay once
            return run / folder
        if folder.parent.name == EVALUATIONS and folder.name != MODEL:
            return run / CHECKPOINTS / folder.name
        return run

    @property
    def joints(self) -> dict[str, float | None]:
        """AP by joint."""
        return dict(zip(self.ap.joints, self.ap.ap, strict=False))

    def heading(self) -> str:
        """Of its column in the tables."""
        return self.box_source if self.folder == "." else f"{self.box_source} ({self.folder})"

    def note(self, data_set: str) -> str:
        """What a reader of its column should know; ``data_set`` is the recipe's."""
        where = "At the end of training" if self.folder == "." else f"In {self.folder}"
        clips = "" if self.metrics.clips is None else f", {self.metrics.clips} clips"
        data_set = self.metrics.annotations or data_set
        return f"{where}: boxes: {self.box_source}{clips}, data set {data_set}."


def find_evaluations(run: Path) -> list[Evaluation]:
    """Every evaluation below a run's folder: training's own first, then later ones."""
    paths = [run / METRICS, *sorted(run.glob(f"*/{METRICS}"))]
    paths += sorted(run.glob(f"{EVALUATIONS}/*/{METRICS}"))
    # Where evaluations lay before there was a folder for them.
    paths += sorted(run.glob(f"*/evaluation/{METRICS}"))
    paths += sorted(run.glob(f"*/*/evaluation/{METRICS}"))
    evaluations = []
    for path in paths:
        metrics = read_metrics(path)
        if metrics is not None and metrics.ap is not None:
            evaluations.append(Evaluation(str(path.parent.relative_to(run)), metrics))
    return evaluations


def add_tables(
    report: Report, evaluations: list[Evaluation], log: list[dict[str, Any]], data_set: str
) -> None:
    """Puts tables of AP into a report: from evaluations, or without any from the log.

    Several evaluations are compared in one table, and each becomes a source with its own.

    Args:
        report: gets ``tables`` and ``table_notes``, or says in ``absent`` why it has none.
        evaluations: of the run.
        log: its lines.
        data_set: the recipe's.
    """
    logged = [line for line in log if line["kind"] == "evaluate"]
    if len(evaluations) == 1:
        _add_evaluation(report, evaluations[0], data_set)
    elif evaluations:
        report.sources_are = "Evaluation"
        columns = dict.fromkeys(["Mean", *(c for e in evaluations for c in e.ap.columns)])
        rows = [(e.heading(), [e.ap.columns.get(c) for c in columns]) for e in evaluations]
        report.tables = [Table("All evaluations, in per cent", list(columns), rows)]
        for evaluation in evaluations:
            part = Report(report.kind, evaluation.heading(), "")
            _add_evaluation(part, evaluation, data_set)
            report.sources.append(part)
    elif logged:
        _add_logged(report, logged[-1], data_set)
    else:
        report.absent["ap"] = _ABSENT
    if evaluations and len(logged) == 1:
        report.table_notes.append(_ONCE)


def _add_evaluation(report: Report, evaluation: Evaluation, data_set: str) -> None:
    """Tables by joint, by column of the published tables, and by kind of frame."""
    ap, subsets = evaluation.ap, evaluation.metrics.subsets
    columns, mean = ["AP"], frozenset({"Mean"})
    by_joint = [(joint.replace("_", " "), [value]) for joint, value in evaluation.joints.items()]
    by_column = [(name, [value]) for name, value in ap.columns.items()]
    by_kind = [(kind, [values.get("ap")]) for kind, values in subsets.items()]
    published = len(by_column) > 1
    if published:
        report.tables = [
            Table("By joint", columns, by_joint),
            Table("By column of the published tables", columns, by_column, mean),
        ]
    else:  # other keypoints have no columns but the Mean
        report.tables = [Table("By keypoint", columns, by_joint + by_column, mean)]
    if len(by_kind) > 1:
        report.tables.append(Table("Mean by kind of frame", columns, by_kind))
    rules = [_OFFICIAL if ap.metric is None else f"In per cent: {ap.metric}."]
    rules += [_MEAN_ONLY] if published else []
    rules += [_DASH] if None in evaluation.joints.values() else []
    report.table_notes = [" ".join(rules), evaluation.note(data_set)]


def _add_logged(report: Report, line: dict[str, Any], data_set: str) -> None:
    """The last evaluation that a run which has not ended has logged."""
    source = str(line.get("box_source") or "not stated")
    columns = [name for name in COLUMNS if name in line]
    rows = [(name, [line.get(name)]) for name in (*columns, "Mean")]
    report.tables = [Table(f"After step {line['step']}", [source], rows, frozenset({"Mean"}))]
    metric = f"In per cent: {line['metric']}." if line.get("metric") else _OFFICIAL
    if not columns:  # a log from before it named its metric
        metric = metric if line.get("metric") else "Keypoint AP in per cent, not PoseTrack's AP."
    report.table_notes = [
        f"{metric} {_MEAN_ONLY}" if columns else metric,
        f"Boxes: {source}. Data set: {data_set}. From the log, which has no single joints: "
        "the run has not ended.",
    ]


def evaluation_lead(evaluations: list[Evaluation], log: list[dict[str, Any]]) -> str:
    """The run's AP, or how far it has come without one."""
    steps = max((line["step"] for line in log), default=0)
    if not evaluations:
        return f"{steps} steps logged, not evaluated at the end."
    first = evaluations[0]
    mean = first.ap.columns.get("Mean")
    of = "" if first.folder == "." else f", from {first.folder}"
    ended = steps if first.metrics.steps is None else first.metrics.steps
    name = "PoseTrack AP" if first.ap.metric is None else "Keypoint AP (not PoseTrack's)"
    return (
        f"{name} {'unknown' if mean is None else f'{mean:.1f} %'} after {ended} steps "
        f"(boxes: {first.box_source}{of})."
    )
