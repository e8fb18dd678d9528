"""The evaluations of a training run, as tables of AP and as a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmpose.data.formats.run import Ap, Metrics
from cmpose.evaluation.posetrack_ap import COLUMNS
from cmpose.models.weights.checkpoint import EVALUATIONS
from cmpose.report.inputs import METRICS, read_metrics
from cmpose.report.page import Report, Table

_MEAN_ONLY = "The Mean is over all joints, not over the columns."
_OFFICIAL = (
    "Official PoseTrack AP in percent: a joint counts within half a head size. " + _MEAN_ONLY
)
_ABSENT = (
    "This run has not been evaluated: a run is when it ends, or every train.evaluate_every "
    "epochs, or by cmpose evaluate --checkpoint."
)
_ONCE = (
    " It was evaluated once while training, so that there is no curve of AP by step; "
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
        if self.ap.metric is not None:  # these keypoints have no official AP
            clips += f", {self.ap.metric}"
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

    Args:
        report: gets ``tables`` and ``table_notes``, or says in ``absent`` why it has none.
        evaluations: of the run.
        log: its lines.
        data_set: the recipe's.
    """
    logged = [line for line in log if line["kind"] == "evaluate"]
    if evaluations:
        official = any(evaluation.ap.metric is None for evaluation in evaluations)
        rule = (_OFFICIAL if official else _MEAN_ONLY) + (_ONCE if len(logged) == 1 else "")
        report.tables = _tables(evaluations)
        report.table_notes = [rule, *(evaluation.note(data_set) for evaluation in evaluations)]
    elif logged:
        _add_logged(report, logged[-1], data_set)
    else:
        report.absent["ap"] = _ABSENT


def _add_logged(report: Report, line: dict[str, Any], data_set: str) -> None:
    """The last evaluation that a run which has not ended has logged."""
    source = str(line.get("box_source", "not stated"))
    report.tables = [
        Table(
            f"By column, after step {line['step']}",
            [source],
            [(name, [line.get(name)]) for name in (*COLUMNS, "Mean")],
            frozenset({"Mean"}),
        )
    ]
    report.table_notes = [
        _OFFICIAL,
        f"Boxes: {source}. Data set: {data_set}. From the log, which has no single joints: "
        "the run has not ended.",
    ]


def _tables(evaluations: list[Evaluation]) -> list[Table]:
    """By joint, and by column of the published tables; a column for each evaluation."""
    headings = [evaluation.heading() for evaluation in evaluations]
    joints = dict.fromkeys(joint for e in evaluations for joint in e.ap.joints)
    columns = dict.fromkeys(column for e in evaluations for column in e.ap.columns)
    by_joint = [
        (joint.replace("_", " "), [e.joints.get(joint) for e in evaluations]) for joint in joints
    ]
    by_column = [(c, [e.ap.columns.get(c) for e in evaluations]) for c in columns]
    return [
        Table("By joint", headings, by_joint),
        Table("By column of the published tables", headings, by_column, frozenset({"Mean"})),
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
    return (
        f"AP {'unknown' if mean is None else f'{mean:.1f}'} after {ended} steps "
        f"(boxes: {first.box_source}{of})."
    )
