"""One page of what ``make gpu`` measured, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.harness import records
from bench.report import tables


def _stage_lines(run: dict[str, Any], now: bool) -> list[str]:
    counts = ", ".join(f"{count} {what}" for what, count in run["counts"].items())
    mark = "" if now else f" (earlier, {run['provenance']['utc']})"
    lines = [f"{run['stage']:9} {run['status']:7} {run['seconds']:6.0f} s  {counts}{mark}"]
    return lines + [f"    {text[:96]}" for text in run["details"][:8]]


def page(content: dict[str, Any], stages: Sequence[str], *, dry: bool) -> str:
    """The summary.

    Args:
        content: a results file's.
        stages: that this call ran.
        dry: whether it was a rehearsal.
    """
    lines = ["", f"{content['card']}: {' '.join(stages)}"]
    if dry:
        lines.append(f"a rehearsal; {records.NOT_A_RESULT}")
    for stage, run in content["runs"].items():
        lines += _stage_lines(run, stage in stages)
    if not dry:
        lines += ["", tables.status([content]), "", tables.targets([content])]
    if content["train_step"]:
        lines += ["", tables.train_step([content])]
    return "\n".join(lines) + "\n"
