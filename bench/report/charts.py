"""The chart of a card: how many times faster each target's workload is than its fastest peer."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib

from bench.harness.records import slug
from bench.harness.targets import TARGETS, best_record
from cmpose.study.plots import new_figure

WIN, LOSS = "#2c7a51", "#b3402e"


def _note(content: dict[str, Any]) -> str:
    """What the file says of itself: a digest of what it shows, and what drew it."""
    shown = json.dumps([content["card"], content["records"]], sort_keys=True)
    digest = hashlib.sha256(shown.encode()).hexdigest()[:16]
    return f"speed-ups of {digest}, drawn by matplotlib {matplotlib.__version__}"


def draw(content: dict[str, Any]) -> dict[str, bytes]:
    """A card's chart, as SVG by file name; nothing where no speed-up is recorded."""
    best = [(target.label, best_record(content["records"], target.workload)) for target in TARGETS]
    rows = [(label, r) for label, r in best if r and r["speedup_vs_best_peer"]]
    if not rows:
        return {}
    figure, axes = new_figure(7.5, 0.8 + 0.36 * len(rows))
    names = [f"{label}\n(against {r['best_peer']})" for label, r in rows]
    values = [r["speedup_vs_best_peer"] for _, r in rows]
    bars = axes.barh(names, values, color=[WIN if v >= 1 else LOSS for v in values])
    axes.bar_label(bars, [f"{v:.2f}×" for v in values], padding=3, fontsize=7)
    axes.axvline(1.0, color="#444444", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="times faster than the fastest peer that ran", title=content["card"])
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Description": _note(content)})
    lines = [line.rstrip() for line in file.getvalue().decode().splitlines()]
    return {f"{slug(content['card'])}-speedups.svg": ("\n".join(lines) + "\n").encode()}


def stale(path: Path, drawn: bytes) -> str | None:
    """Why a chart's file is not what the records give, or None; ``drawn`` is what they give now."""
    if not path.is_file():
        return f"{path.name} is missing"
    held, note = path.read_bytes(), re.compile(rb"speed-ups of \w+, drawn by matplotlib [^<]+")
    [now], before = note.findall(drawn), note.findall(held)
    if [said.split(b",")[0] for said in before] != [now.split(b",")[0]]:
        return f"{path.name} shows other records"
    # Another matplotlib draws other bytes; by the same one they must be the same.
    if before == [now] and held != drawn:
        return f"{path.name} is not what matplotlib drew"
    return None
