"""Charts of a card's records: the roofline, speed-ups, times against M and T."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.harness.records import slug
from bench.harness.shapes import BF16, FORWARD
from bench.harness.targets import TARGETS, best_record
from cmpose.study.plots import new_figure

Records = list[dict[str, Any]]
WIN, LOSS = "#2c7a51", "#b3402e"


def _target_records(records: Records) -> list[tuple[str, dict[str, Any]]]:
    best = [(t.label, best_record(records, t.workload)) for t in TARGETS]
    return [(label, record) for label, record in best if record is not None]


def roofline(card: str, records: Records) -> Any:
    """Reached rate against operations a byte, under the roof that was measured in the same run."""
    rows = [(label, r) for label, r in _target_records(records) if r["flops"]]
    if not rows:
        return None
    figure, axes = new_figure(7.5, 4.5)
    rates = rows[-1][1]["rates"]
    knee = rates["bf16_flops_per_s"] / rates["copy_bytes_per_s"]
    spots = [0.5, knee, 4 * knee]
    roof = [min(x * rates["copy_bytes_per_s"], rates["bf16_flops_per_s"]) / 1e12 for x in spots]
    axes.plot(spots, roof, color="#444444", label="copy and bf16 matrix rate, measured in the run")
    for label, record in rows:
        x = record["flops"] / record["bytes"]
        y = record["flops"] / record["us"]["p50"] / 1e6
        axes.scatter([x], [y], s=28)
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TFLOP/s", title=card)
    axes.legend(fontsize=7)
    return figure


def speedups(card: str, records: Records) -> Any:
    """Against the fastest peer of each target's workload; what is slower than a peer is red."""
    rows = [(label, r) for label, r in _target_records(records) if r["speedup_vs_best_peer"]]
    if not rows:
        return None
    figure, axes = new_figure(7.5, 0.8 + 0.36 * len(rows))
    names = [f"{label}\n(against {r['best_peer']})" for label, r in rows]
    values = [r["speedup_vs_best_peer"] for _, r in rows]
    bars = axes.barh(names, values, color=[WIN if v >= 1 else LOSS for v in values])
    axes.bar_label(bars, [f"{v:.2f}×" for v in values], padding=3, fontsize=7)
    axes.axvline(1.0, color="#444444", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set(xlabel="times faster than the fastest peer that ran", title=card)
    return figure


def _against(op: str, size: str, others: dict[str, int], card: str, records: Records) -> Any:
    """Median forward time of one op and of its peers against one size; ``others`` stay the same."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        same = (record["op"], record["direction"], record["dtype"]) == (op, FORWARD, BF16)
        if not same or not others.items() <= record["shape"].items():
            continue
        entrants = {f"cmpose {record['backend']}": record["us"]["p50"], **record["peers"]}
        for name, time in entrants.items():
            if not isinstance(time, str):
                lines.setdefault(name, []).append((record["shape"][size], time))
    if not any(len({x for x, _ in points}) > 1 for points in lines.values()):
        return None
    figure, axes = new_figure(7.5, 4.5)
    for name, points in lines.items():
        width = 2.2 if name.startswith("cmpose") else 1.0
        xs, ys = zip(*sorted(set(points)), strict=True)
        axes.plot(xs, ys, marker="o", markersize=3, label=name, linewidth=width)
    axes.set(xscale="log", yscale="log", xlabel=size, ylabel="µs")
    sizes = ", ".join(f"{name} = {value}" for name, value in others.items())
    axes.set_title(f"{op} forward, {sizes}, bf16, {card}")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:,}" for x in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=7)
    return figure


CHARTS: dict[str, Callable[[str, Records], Any]] = {
    "roofline": roofline,
    "speedups": speedups,
    "time-against-M": partial(_against, "dpc_knn", "M", {"B": 32, "D": 768}),
    "time-against-T": partial(_against, "temporal_attention", "T", {"B": 32, "H": 12, "d": 64}),
}


def _note(name: str, content: dict[str, Any]) -> str:
    """What a chart's file says of itself: a digest of what it shows, and what drew it."""
    import matplotlib

    shown = json.dumps([name, content["card"], content["records"]], sort_keys=True)
    digest = hashlib.sha256(shown.encode()).hexdigest()[:16]
    return f"cmpose {name} of {digest}, drawn by matplotlib {matplotlib.__version__}"


def draw(content: dict[str, Any]) -> dict[str, bytes]:
    """A card's charts, as SVG by file name; those that its records suffice for."""
    drawn = {}
    for name, make in CHARTS.items():
        figure = make(content["card"], content["records"])
        if figure is None:
            continue
        file = io.BytesIO()
        metadata = {"Date": None, "Description": _note(name, content)}
        figure.savefig(file, format="svg", metadata=metadata)
        lines = file.getvalue().decode().splitlines()
        text = "\n".join(line.rstrip() for line in lines) + "\n"
        drawn[f"{slug(content['card'])}-{name}.svg"] = text.encode()
    return drawn


def stale(path: Path, drawn: bytes) -> str | None:
    """Why a chart's file is not what the records give, or None; ``drawn`` is what they give now."""
    if not path.is_file():
        return f"{path.name} is missing"
    held, note = path.read_bytes(), re.compile(rb"cmpose [\w-]+ of \w+, drawn by matplotlib [^<]+")
    [now], before = note.findall(drawn), note.findall(held)
    if [said.split(b",")[0] for said in before] != [now.split(b",")[0]]:
        return f"{path.name} shows other records"
    # Another matplotlib draws other bytes; by the same one they must be the same.
    if before == [now] and held != drawn:
        return f"{path.name} is not what matplotlib drew"
    return None
