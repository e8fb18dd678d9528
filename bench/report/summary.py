"""One page of what ``make gpu`` measured, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness import records
from bench.harness.bound import Rates
from bench.report import tables

WIDTH = 100


def _stage_lines(run: dict[str, Any], now: bool) -> list[str]:
    counts = ", ".join(f"{count} {what}" for what, count in run["counts"].items())
    mark = "" if now else f" (earlier, {run['provenance']['utc']})"
    lines = [f"{run['stage']:9} {run['status']:7} {run['seconds']:6.0f} s  {counts}{mark}"]
    shown = 3 if run["status"] == "passed" else 8
    lines += [f"    {text[: WIDTH - 4]}" for text in run["details"][:shown]]
    if len(run["details"]) > shown:
        lines.append(f"    and {len(run['details']) - shown} more; see the results file")
    return lines


def page(content: dict[str, Any], stages: Sequence[str], *, dry: bool) -> str:
    """The summary.

    Args:
        content: a results file's.
        stages: that this call ran.
        dry: whether it was a rehearsal.
    """
    lines = ["", "=" * WIDTH, f"{content['card']}: {' '.join(stages)}"]
    if dry:
        lines.append(f"a rehearsal; {records.NOT_A_RESULT}")
    for stage, run in content["runs"].items():
        lines += _stage_lines(run, stage in stages)
    if content["records"]:
        origin, rates = (content["records"][-1][name] for name in ("provenance", "rates"))
        lines.append(
            f"torch {origin['torch']}, triton {origin['triton']}, driver {origin['driver']}, "
            f"commit {origin['commit'][:9]}{'+dirty' if origin['dirty'] else ''}; "
            f"{Rates(**rates)}; {len(content['records'])} records"
        )
    if not dry:
        lines += ["-" * WIDTH, tables.targets([content])]
    if content["train_step"]:
        lines += ["-" * WIDTH, tables.train_step([content])]
    return "\n".join(lines) + "\n"
