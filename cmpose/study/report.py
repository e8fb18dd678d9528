"""The report of a study: tables with confidence intervals, plots, and all numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct

from cmpose import config as configuration
from cmpose.data.formats.reader import Number, convert, parse, read
from cmpose.evaluation.intervals import Interval, interval, paired
from cmpose.evaluation.subsets import ALL, SUBSETS
from cmpose.files import write_json, write_text
from cmpose.study.grid import RATIO_FIELDS, TABLES, TITLES, Row, Setting, Study
from cmpose.study.plots import difference_plot, ratio_plot

Results = dict[str, dict[int, dict[str, Any]]]
"""Run's name → seed → result."""

CALLS, MEAN_POSE = "pieces.jsonl", "mean_pose.json"
"""Files in a study's folder: command and time of each call; what the mean pose gets."""

METRICS = {"ap": "AP", "pckh": "PCKh", "error": "median error"}


class Numbers(NamedTuple):
    """One setting on one subset by one metric.

    Attributes:
        value: mean over the seeds.
        difference: mean over the seeds of the difference to the full model with the same seed.
    """

    value: Interval | None
    difference: Interval | None


def by_name(results: Items[dict[str, Any]]) -> Results:
    """The results by name and seed."""
    named: Results = {}
    for result in results:
        named.setdefault(result["name"], {})[result["seed"]] = result
    return named


def values_of(runs: dict[int, dict[str, Any]], subset: str, metric: str) -> dict[int, float]:
    """Seed → value of a metric on a subset, of the seeds that have one."""
    values = {seed: run["subsets"].get(subset, {}).get(metric) for seed, run in runs.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def numbers(results: Results, name: str, subset: str, metric: str) -> Numbers:
    """A setting's mean over its seeds, and its difference to the full model."""
    own = values_of(results.get(name, {}), subset, metric)
    full = values_of(results.get("full", {}), subset, metric)
    difference = None if name == "full" else paired(own, full)
    return Numbers(interval(list(own.values())), difference)


def verdict(difference: Interval | None, *, lower_is_better: bool = False) -> str:
    """What a difference to the full model says, from its interval alone."""
    if difference is None:
        return "–"
    if difference.half is None:
        return "one seed: no interval"
    if difference.covers_zero:
        return "within noise"
    better = (difference.mean > 0) != lower_is_better
    return "better than the full model" if better else "worse than the full model"


def _cell(value: Interval | None, *, sign: bool = False, digits: int = 1) -> str:
    return "–" if value is None else value.text(sign=sign, digits=digits)


def present_subsets(results: Results) -> list[str]:
    """Subsets that some run has."""
    names = {name for runs in results.values() for run in runs.values() for name in run["subsets"]}
    return [name for name in SUBSETS if name in names]


def table(study: Study, results: Results, name: str) -> list[str]:
    """A table of the paper beside what came out here, on all frames."""
    full_paper = max(row.paper for row in TABLES[name])
    lines = [
        f"| {TITLES[name].partition(': ')[0]} | seeds | AP | AP − full model | reads as | PCKh | "
        "paper: mAP | paper: − full |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in study.rows(name):
        run = study.name(row.setting)
        ap = numbers(results, run, ALL, "ap")
        pckh = numbers(results, run, ALL, "pckh").value
        delta = "–" if run == "full" else f"{row.paper - full_paper:+.1f}"
        lines.append(
            f"| {row.label} | {len(results.get(run, {}))} | {_cell(ap.value)} | "
            f"{_cell(ap.difference, sign=True)} | {verdict(ap.difference)} | "
            f"{_cell(pckh)} | {row.paper} | {delta} |"
        )
    return lines


def figure_table(study: Study, results: Results) -> list[str]:
    """Figure 3's points on all frames."""
    lines = [
        "| ratio | value | seeds | AP | AP − full model | reads as |",
        "|---|---|---|---|---|---|",
    ]
    for field, label in RATIO_FIELDS.items():
        for ratio, setting in study.points(field):
            run = study.name(setting)
            ap = numbers(results, run, ALL, "ap")
            mark = " (the recipe's)" if run == "full" else ""
            lines.append(
                f"| {label} | {ratio:g}{mark} | {len(results.get(run, {}))} | "
                f"{_cell(ap.value)} | {_cell(ap.difference, sign=True)} | "
                f"{verdict(ap.difference)} |"
            )
    return lines


def subset_table(
    labelled: Items[tuple[str, str]], results: Results, subsets: Items[str], metric: str
) -> list[str]:
    """Every setting's value on each subset, and its difference to the full model.

    Args:
        labelled: (label, run's name).
        results: of all runs.
        subsets: the columns.
        metric: of ``METRICS``.
    """
    digits = 2 if metric == "error" else 1
    lines = [
        f"| {METRICS[metric]} | " + " | ".join(f"{subset} | − full" for subset in subsets) + " |",
        "|---|" + "---|---|" * len(subsets),
    ]
    for label, run in labelled:
        cells = []
        for subset in subsets:
            shown = numbers(results, run, subset, metric)
            cells += [
                _cell(shown.value, digits=digits),
                _cell(shown.difference, sign=True, digits=digits),
            ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def labelled_runs(study: Study) -> list[tuple[str, str]]:
    """(label, run's name) of every different setting, the full model first."""
    labels = {"full": "full model"}
    for part in study.parts:
        rows: list[Row] = study.rows(part) if part in TABLES else []
        points: list[tuple[str, Setting]] = [(row.label, row.setting) for row in rows]
        if part == "figure3":
            for field, label in RATIO_FIELDS.items():
                points += [(f"{label} = {r:g}", setting) for r, setting in study.points(field)]
        for label, setting in points:
            labels.setdefault(study.name(setting), label)
    return [(label, name) for name, label in labels.items()]


def sentences(labelled: Items[tuple[str, str]], results: Results) -> list[str]:
    """A sentence a setting: what its difference to the full model says, by its interval."""
    lines = []
    for label, run in labelled:
        ap = numbers(results, run, ALL, "ap").difference
        if ap is None:
            continue
        if ap.half is None:
            lines.append(
                f"- {label}: AP {ap.mean:+.1f} against the full model with one seed, which says "
                "nothing about noise."
            )
            continue
        low, high = ap.mean - ap.half, ap.mean + ap.half
        parts = [
            f"{subset} {verdict(numbers(results, run, subset, 'ap').difference)}"
            for subset in present_subsets(results)
            if subset != ALL
        ]
        lines.append(
            f"- {label}: AP {ap.mean:+.1f} against the full model "
            f"(95 % interval {low:+.1f} to {high:+.1f}, {ap.seeds} seeds): {verdict(ap)}"
            + (f". By subset: {'; '.join(parts)}." if parts else ".")
        )
    return lines


def origin(results: Items[dict[str, Any]], calls: Items[dict[str, Any]]) -> list[str]:
    """Where the numbers come from: command, machine, versions, commits, time, boxes."""

    def distinct(key: str) -> list[str]:
        return sorted({str(run["provenance"][key]) for run in results})

    commits = sorted(
        {
            run["provenance"]["commit"][:9]
            + (" with changes" if run["provenance"]["dirty"] else "")
            for run in results
        }
    )
    cards = sorted({str(run["provenance"]["gpu"] or run["provenance"]["cpu"]) for run in results})
    run_seconds = [run["training_seconds"] + run["evaluation_seconds"] for run in results]
    commands = list(dict.fromkeys(call["command"] for call in calls))
    spent = sum(call["seconds"] for call in calls)
    threads = sorted({run["threads"] for run in results})
    return [
        f"- Command: {', '.join(f'`{command}`' for command in commands) or 'not recorded'}",
        f"- Machine: {', '.join(cards)}; {', '.join(map(str, threads))} thread(s) a run; Python "
        f"{', '.join(distinct('python'))}, torch {', '.join(distinct('torch'))}; commit "
        f"{', '.join(commits)}; {results[-1]['provenance']['utc'][:10]}",
        f"- Time: {spent / 60:.1f} minutes in {len(calls)} call(s), rendering and evaluation "
        f"included; {sum(run_seconds) / len(run_seconds):.0f} s a run",
        f"- Boxes: {', '.join(sorted({run['box_source'] for run in results}))}; "
        f"{results[-1]['clips']} clips evaluated, {results[-1]['steps']} training steps a run",
    ]


_HOW = (
    "AP is the official PoseTrack AP, mean of 15 joints, in percent; on a subset it is that of the "
    "data set of these frames alone. PCKh is the share of annotated joints within half a head "
    "size, the error a median in head sizes (lower is better). ± is half the 95 % interval of the "
    "mean over seeds (Student's t). Differences to the full model are taken seed by seed, so "
    'what a seed does to both drops out; "within noise" says that their interval covers 0. '
    "No correction is made for the number of comparisons."
)


class Call(Struct):
    """A line of the calls."""

    seconds: Number
    command: str


class MeanPose(Struct):
    """What the mean pose gets on a subset, in percent."""

    ap: Number | None
    pckh: Number | None


def read_calls(folder: Path) -> list[dict[str, Any]]:
    """Command and time of each call; a line that was cut when the call was killed is left out."""
    calls = []
    path = folder / CALLS
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        source = f"{path}: line {number}"
        try:
            call = parse(line, source, ValueError)
        except ValueError:
            continue
        convert(call, Call, source, ValueError, remedy="delete that line")
        calls.append(call)
    return calls


def write_report(study: Study, folder: Path, output: Path, finished: Items[dict[str, Any]]) -> Path:
    """Writes ``ablation.md``, ``ablation.json`` and the plots.

    Args:
        study: what was asked for.
        folder: the study's, which says how long calls took and what the mean pose gets.
        output: folder of the report.
        finished: results of the finished runs, at least one.

    Returns:
        The page's path.

    Raises:
        OutputError: when something cannot be written.
    """
    results, calls = by_name(finished), read_calls(folder)
    missing = len(study.runs()) - len(finished)
    text = ["# Ablations, as they came out", ""]
    if missing:
        text += [f"**Unfinished: {missing} of {len(study.runs())} runs are missing.**", ""]
    text += [*origin(finished, calls), "", _HOW, "", *_mean_pose(folder / MEAN_POSE)]
    text += [*_evaluated(finished[0]), *_sections(study, results)]
    _write_plots(study, results, output)
    page = output / "ablation.md"
    write_text(page, "\n".join(text).rstrip() + "\n")
    content = {
        "calls": calls,
        "missing": missing,
        "recipe": configuration.to_dict(study.recipe),
        "settings": study.settings(),
        # Each run's recipe is the above with its setting and seed.
        "runs": [{k: v for k, v in run.items() if k != "recipe"} for run in finished],
    }
    write_json(output / "ablation.json", content)
    return page


def _present_runs(study: Study, results: Results) -> list[tuple[str, str]]:
    return [(label, run) for label, run in labelled_runs(study) if run in results]


def _mean_pose(path: Path) -> list[str]:
    if not path.exists():
        return []
    subsets = read(path, dict[str, MeanPose], ValueError, "delete it and run again")
    shown = [
        f"{name} AP {values.ap:.1f}, PCKh {values.pckh:.1f}"
        for name, values in subsets.items()
        if values.ap is not None and values.pckh is not None
    ]
    return [f"Always answering the mean pose, in the same boxes: {'; '.join(shown)}.", ""]


def _evaluated(run: dict[str, Any]) -> list[str]:
    counts = [
        f"{name} {values['frames']} frames"
        for name, values in run["subsets"].items()
        if name in SUBSETS
    ]
    return [f"Evaluated: {', '.join(counts)} with people.", ""]


def _sections(study: Study, results: Results) -> list[str]:
    """The page below its head: sentences, the paper's tables, then every metric by subset."""
    labelled, subsets = _present_runs(study, results), present_subsets(results)
    text = ["## In words", ""]
    text += [*(sentences(labelled, results) or ["- Nothing to compare yet."]), ""]
    for part in study.parts:
        lines = figure_table(study, results) if part == "figure3" else table(study, results, part)
        text += [f"## {TITLES[part]}", "", *lines, ""]
        if part == "figure3":
            text += ["![AP against the ratios](ratios.svg)", ""]
    if len(labelled) > 1:
        text += ["![Differences to the full model](differences.svg)", ""]
    text += ["## On clean, occluded and defocused frames" if len(subsets) > 1 else "## Metrics", ""]
    for metric in METRICS:
        text += [*subset_table(labelled, results, subsets, metric), ""]
    return text


def _write_plots(study: Study, results: Results, output: Path) -> None:
    labelled, subsets = _present_runs(study, results), present_subsets(results)
    if len(labelled) > 1:
        rows = [
            (label, {s: numbers(results, run, s, "ap").difference for s in subsets})
            for label, run in labelled
            if run != "full"
        ]
        difference_plot(rows, subsets, output / "differences.svg")
    if "figure3" in study.parts:
        panels = {
            label: {
                subset: [
                    (ratio, values_of(results.get(study.name(setting), {}), subset, "ap"))
                    for ratio, setting in study.points(field)
                ]
                for subset in subsets
            }
            for field, label in RATIO_FIELDS.items()
        }
        ratio_plot(panels, output / "ratios.svg")
