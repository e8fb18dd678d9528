"""The report of a training run: its log, its evaluations, its worst and best clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmpose.config import Config
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import FrameError
from cmpose.data.records import GROUND_TRUTH
from cmpose.data.sequence import AnnotationError, Sequence
from cmpose.models.weights import checkpoint
from cmpose.report.clips import measure, show
from cmpose.report.evaluations import (
    Evaluation,
    add_tables,
    evaluation_lead,
    find_evaluations,
)
from cmpose.report.inputs import ReportError
from cmpose.report.log import LOG, log_charts, read_log
from cmpose.report.page import Report
from cmpose.report.samples import Samples, rank


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
    report.charts = log_charts(log)
    if not report.charts:
        report.absent["curves"] = (
            f"{LOG} holds no step yet: the first line comes after train.log_every = "
            f"{config.train.log_every} steps."
        )
    evaluations = find_evaluations(run)
    data_set = f"{config.data.root}: {config.data.val_annotations}"
    add_tables(report, evaluations, log, data_set)
    report.lead = evaluation_lead(evaluations, log)
    _clips(report, run, config, count, evaluations, data_set)
    report.facts = _facts(run, config, evaluations, log)
    return report


# Many parameters: what a run's folder holds.
def _clips(
    report: Report,
    run: Path,
    config: Config,
    count: int,
    evaluations: list[Evaluation],
    data_set: str,
) -> None:
    """Puts worst and best clips into a report; of several evaluations, into one of each."""
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
    parts = list(zip(report.sources, evaluations, strict=True)) if report.sources else []
    if not parts:
        # What training evaluated last, by the recipe's own boxes, unless all there is is another.
        own, folder, weights = config.data.boxes == "gt", "predictions", run
        if evaluations and evaluations[0].folder != ".":
            [evaluation] = evaluations
            own = evaluation.box_source == GROUND_TRUTH
            folder, weights = evaluation.predictions, evaluation.weights(run)
        samples = rank(truth, _predictions(run / folder), own_boxes=own)
        _ranked(report, weights, config, root, samples, count)
    for part, evaluation in parts:
        if evaluation.metrics.annotations not in (None, data_set):
            part.absent["clips"] = (
                f"Its poses are of {evaluation.metrics.annotations}; clips are shown of "
                f"{data_set}, the data set of the recipe."
            )
            continue
        own = evaluation.box_source == GROUND_TRUTH
        samples = rank(truth, _predictions(run / evaluation.predictions), own_boxes=own)
        _ranked(part, evaluation.weights(run), config, root, samples, count)


def _predictions(folder: Path) -> list[Sequence]:
    try:
        return load_annotations(folder, on_error="skip")
    except FileNotFoundError:
        return []
    except AnnotationError as error:
        raise ReportError(f"{error}; evaluate again, or delete {folder}") from error


# Many parameters: a report, a model, its recipe and data, and how much to show.
def _ranked(
    report: Report, weights: Path, config: Config, root: Path, samples: Samples, count: int
) -> None:
    """Shows the worst and the best of the samples, and the model run again on them."""
    try:
        _show(report, weights, config, samples, count, root)
    except (FrameError, OSError) as error:
        report.worst, report.best, report.clips = [], [], []
        report.absent["clips"] = report.absent["tokens"] = (
            f"No clip can be shown, because its frames cannot be read: {error}"
        )


# Many parameters: as above.
def _show(
    report: Report, weights: Path, config: Config, samples: Samples, count: int, root: Path
) -> None:
    model, reason = None, ""
    try:
        model, _ = checkpoint.load_model(weights)
    except checkpoint.CheckpointError as error:
        reason = str(error)
    shown = show(samples, config, root, model, count)
    report.worst, report.best, report.clips = shown.worst, shown.best, shown.clips
    if not report.worst:
        report.absent["clips"] = (
            "Nobody in the evaluation annotations has a joint and a box inside the picture."
        )
        report.absent["tokens"] = "There is no clip to look into."
        return
    report.measure = measure(samples)
    if not samples.ranked:
        report.groups = ("Clips", "")
    if model is None:
        report.absent["tokens"] = f"The model cannot be run again: {reason}"
        return
    report.clips_intro = (
        f"The checkpoint {checkpoint.find(weights)} was run again on these clips, {shown.frames} "
        "frames in all. Choose a keypoint, by its name or by a click on a picture, and move over "
        "the frames."
    )


def _facts(
    run: Path, config: Config, evaluations: list[Evaluation], log: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    facts = [("Folder", str(run)), *_recipe_facts(config)]
    last = next((line for line in reversed(log) if line["kind"] == "train"), None)
    if last is not None:
        speed = last.get("clips_per_second")
        at = f"step {last['step']}" + (f", {speed:.1f} clips/s" if speed else "")
        facts.append(("Last logged", at))
    if evaluations and evaluations[0].folder == ".":
        metrics = evaluations[0].metrics
        for name, key, form in (
            ("Seconds of training", "seconds", "{:.0f}"),
            ("Clips a second, training", "clips_per_second", "{:.1f}"),
            ("Clips a second, evaluation", "evaluation_clips_per_second", "{:.1f}"),
            ("Causal hit rate", "causal_hit_rate", "{:.2f} of visible joints"),
        ):
            value = getattr(metrics, key)
            if value is not None:
                facts.append((name, form.format(value)))
    return facts


def _recipe_facts(config: Config) -> list[tuple[str, str]]:
    model, data, train = config.model, config.data, config.train
    height, width = model.image_size
    fine = f"model.fine={model.fine}"
    if model.fine != "off":
        fine += f", {model.tokens_per_keypoint} a keypoint"
    if model.fine == "full":
        fine += f", {model.num_clusters} cluster{'s' if model.num_clusters > 1 else ''}"
    training = (
        f"{train.epochs} epochs, batch {train.batch_size}, lr {train.lr:g}, {train.precision}"
    )
    return [
        ("Data set", data.root),
        ("Training annotations", data.train_annotations),
        ("Evaluation annotations", data.val_annotations),
        ("Boxes", "ground truth" if data.boxes == "gt" else data.boxes),
        ("Backbone", f"{model.backbone}, crops of {height} × {width}, {model.num_frames} frames"),
        ("Fine Token Enhancement", fine),
        ("Training", training),
    ]
