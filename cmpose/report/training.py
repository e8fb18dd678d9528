"""The report of a training run: its log, its evaluations, its worst and best clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmpose.config import Config
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import FrameError
from cmpose.data.sequence import AnnotationError, Sequence
from cmpose.models.weights import checkpoint
from cmpose.report.clips import MEASURE, show
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
    _clips(report, run, config, count)
    report.facts = _facts(run, config, evaluations, log)
    return report


def _clips(report: Report, run: Path, config: Config, count: int) -> None:
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
        fine += f", {model.num_clusters} clusters"
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
