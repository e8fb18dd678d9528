"""The tables of docs/performance.md, from the results of GPUs, and where they stand in a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench.harness import targets as goals
from bench.harness.targets import TARGETS, bench_of, best_record
from cmpose.ops.backends import OPS

NOT_YET = "not yet measured"

Card = dict[str, Any]
"""A results file's content."""
NOTHING: Card = {"card": "measured", "records": [], "train_step": [], "runs": {}}
"""In place of cards where there are none."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def origin(source: dict[str, Any], *more: str) -> str:
    """Where a figure is from: command, commit, day; machine, versions, and what else is to say."""
    dirty = " with uncommitted changes" if source["dirty"] else ""
    run = f"`{source['command']}`, commit `{source['commit'][:9]}`{dirty}, {source['utc'][:10]}"
    names = ("torch", "triton", "CUDA", "driver", "Python")
    versions = [f"{name} {source[name.lower()]}" for name in names if source[name.lower()]]
    return f"{run}; {', '.join([source['gpu'] or source['cpu'], *versions, *more])}"


def status(cards: list[Card]) -> str:
    """What has been measured at all."""
    if not any(card["records"] for card in cards):
        return (
            "**No kernel has been timed yet.** The kernels are proven on the CPU and compiled for\n"
            "every card they are meant for; none has run on a GPU, so there is nothing to claim.\n"
            "What must be reached is written down before it is measured."
        )
    lines = ["Measured, per card:", ""]
    for card in (card for card in cards if card["records"]):
        lines.append(f"- **{card['card']}**: {len(card['records'])} records.")
        lines += dict.fromkeys(f"  - {origin(r['provenance'])}" for r in card["records"])
    return "\n".join(lines)


def _reached(record: dict[str, Any] | None, ratios: dict[str, float]) -> tuple[str, str]:
    """Time with the bound as a share of it, and the ratios reached against those wanted."""
    if record is None:
        return NOT_YET, NOT_YET
    time = f"{record['us']['p50']:,.1f} ({record['percent_of_bound']:.0f} % of bound)"
    if record["speedup_vs_best_peer"] is None:
        return time, f"not recorded: tests {record['op_tests']['status']}"
    parts = []
    for name, least in ratios.items():
        ratio = goals.reached_ratio(record, name)
        beside = name or record["best_peer"]
        if ratio is None:
            parts.append(f"no {beside} to compare with")
        else:
            mark = "" if ratio >= least else ", a loss" if ratio < 1 else ", short"
            parts.append(f"{ratio:.2f}× {beside}{mark}")
    return time, "; ".join(parts)


def _ran(step: dict[str, Any]) -> dict[str, Any]:
    """The variants that did not fail."""
    return {name: v for name, v in step["variants"].items() if not isinstance(v, str)}


def _step_reached(card: Card) -> tuple[str, str]:
    steps = [step for step in card["train_step"] if step["backbone"] == "base"]
    ran = _ran(steps[-1]) if steps else {}
    ours = {name: v for name, v in ran.items() if "reference" not in name}
    if not ours:
        return NOT_YET, NOT_YET
    best = max(ours, key=lambda name: ours[name]["clips_per_s"])
    speed = ours[best]["clips_per_s"]
    tests = card["runs"].get("tests")
    same = tests and tests["provenance"]["commit"] == steps[-1]["provenance"]["commit"]
    if not same or tests["status"] != "passed":
        return f"{speed:,.0f} clips/s ({best})", "not recorded: no passed tests of the same commit"
    beside = [name for name in goals.STEP_RATIOS if name in ran]
    ratios = [f"{speed / ran[name]['clips_per_s']:.2f}× {name}" for name in beside]
    return f"{speed:,.0f} clips/s ({best})", "; ".join(ratios) or "no reference ran"


def targets(cards: list[Card]) -> str:
    """Target and measurement of every hot spot."""
    measured = [card for card in cards if card["records"]] or [NOTHING]
    head = ["hot spot", "bound on RTX 4090, µs", "target on H200 / RTX 4090, µs", "over the peers"]
    for card in measured:
        head += [f"{card['card']}, µs", "ratio to the best peer"]
    rows = []
    for t in TARGETS:
        wish = f"{t.h200_us:,g} / {t.rtx_4090_us:,g}"
        over = ", ".join(f"≥ {ratio:g}× {name}".rstrip() for name, ratio in t.ratios.items())
        row = [t.label, f"{t.rtx_4090_bound_us:,.1f}", wish, over]
        for card in measured:
            row += _reached(best_record(card["records"], t.workload), t.ratios)
        rows.append(row)
    step = [
        "full train step, ViT-B",
        "–",
        f"≥ {' / ≥ '.join(map(str, goals.CLIPS_PER_S.values()))} clips/s; in fp8 on an RTX 4090 "
        f"≥ {goals.FP8_CLIPS_PER_S}",
        ", ".join(f"≥ {ratio:g}× {name}" for name, ratio in goals.STEP_RATIOS.items()),
    ]
    for card in measured:
        step += _step_reached(card)
    return table(head, [*rows, step])


def charts(cards: list[Card]) -> str:
    """Of each card, how many times faster each target's workload is than its fastest peer."""
    parts = []
    for card in cards:
        rows = []
        for target in TARGETS:
            record = best_record(card["records"], target.workload) or {}
            if times := record.get("speedup_vs_best_peer"):
                bar = "█" * min(round(4 * times), 60)
                rows.append([target.label, f"{bar} {times:.2f}× {record['best_peer']}"])
        if rows:
            parts.append(table([card["card"], "times faster than the fastest peer that ran"], rows))
    return "\n\n".join(parts) or f"Charts: none; {NOT_YET}."


def _sizes(shape: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in shape.items() if name != "threads")


def _ratio(ours: float, peers: dict[str, float]) -> str:
    """Of our time to the fastest of some peers'."""
    if not peers:
        return "none ran"
    best = min(peers, key=peers.__getitem__)
    ratio = ours / peers[best]
    return f"{ratio:.2f} {best}{', a loss' if ratio > 1 else ''}"


def cpu_ratios(records: list[dict[str, Any]]) -> str:
    """Times of a CPU's path over those of the fastest peers in the same run, losses too."""
    rows = []
    for record in sorted(records, key=lambda r: OPS.index(r["op"])):
        ours, peers = record["us"]["p50"], bench_of(record["op"]).peers
        ran = {n: t for n, t in record["peers"].items() if not isinstance(t, str)}
        kinds = [{n: t for n, t in ran.items() if peers[n].compiled == kind} for kind in (0, 1)]
        rows.append([
            f"`{record['op']}`", _sizes(record["shape"]), record["direction"].replace("_", " + "),
            str(record["shape"]["threads"]), f"{ours / 1e3:,.2f}",
            ", ".join(f"{n} {ran[n] / 1e3:,.2f}" for n in sorted(ran, key=ran.__getitem__)),
            *(_ratio(ours, of_kind) for of_kind in kinds),
        ])  # fmt: skip
    origins = dict.fromkeys(origin(record["provenance"]) for record in records)
    head = ("op", "sizes", "direction", "threads", "ours, ms", "peers, ms",
            "ours / fastest plain peer", "ours / fastest compiled peer")  # fmt: skip
    return "\n".join([table(head, rows), "", *(f"{origin}." for origin in origins)])


def cpu_gain(gains: dict[str, Any]) -> str:
    """What whole steps and predictions take by the ops' path for a CPU and by their references."""
    rows = []
    for row in gains["rows"]:
        ms = (f"{row[name]:,.0f}" for name in ("reference", "auto"))
        rows.append([row["case"], str(row["threads"]), *ms, f"{row['gain']:.2f}×"])
    head = ("what", "threads", "by the references, ms", "by the CPU's path, ms", "gain")
    source = origin(gains["provenance"], f"medians of {gains['pairs']} pairs and of their ratios")
    return f"{table(head, rows)}\n\n{source}."


def _row(record: dict[str, Any]) -> list[str]:
    us, best = record["us"], record["best_peer"]
    speedup, error = record["speedup_vs_best_peer"], record["error_vs_fp64"]
    others = "; ".join(
        f"{name}: {time[:60]}" if isinstance(time, str) else f"{name} {time:,.1f}"
        for name, time in record["peers"].items()
    )
    return [
        f"{record['direction'].replace('_', ' + ')}, {_sizes(record['shape'])}, {record['dtype']}",
        record["backend"],
        f"{us['p50']:,.1f} [{us['p20']:,.1f}, {us['p80']:,.1f}]",
        f"{record['bytes'] / us['p50'] / 1e3:,.0f}",
        f"{record['percent_of_copy']:.0f}",
        f"{record['percent_of_bound']:.0f}",
        f"{record['peak_bytes'] / 1e6:,.1f}",
        "–" if error is None else f"{error:.1e}",
        "–" if speedup is None else f"{speedup:.2f}× {best}",
        others.replace("|", "\\|"),
    ]


_RESULTS_HEAD = ("workload", "backend", "µs [p20, p80]", "GB/s", "% of copy", "% of bound",
                 "peak MB", "error", "ratio", "peers, µs")  # fmt: skip


def results(cards: list[Card]) -> str:
    """Every record, losses too."""
    parts = []
    for card in (card for card in cards if card["records"]):
        parts.append(f"### {card['card']}")
        for op in OPS:
            rows = [_row(r) for r in card["records"] if r["op"] == op]
            if rows:
                summary = f"<details>\n<summary>{op}: {len(rows)} records</summary>"
                parts += [summary, table(_RESULTS_HEAD, rows), "</details>"]
            else:
                parts.append(f"`{op}`: {NOT_YET}.")
    return "\n\n".join(parts) or f"Records: none; {NOT_YET}."


def train_step(cards: list[Card]) -> str:
    """Variants and parts of the train step."""
    paragraphs = []
    for name, step in ((card["card"], step) for card in cards for step in card["train_step"]):
        paragraphs.append(
            f"**{name}**, ViT-{step['backbone']}, {step['batch']} clips, "
            f"{step['precision']}; {origin(step['provenance'])}"
        )
        rows = []
        for variant, v in step["variants"].items():
            if isinstance(v, str):
                rows.append([variant, v[:80], "–", "–", "–"])
                continue
            mfu = "–" if v["mfu"] is None else f"{100 * v['mfu']:.1f} %"
            figures = v["clips_per_s"], v["ms"]["p50"], v["peak_bytes"] / 1e9
            rows.append([variant, *(f"{figure:,.1f}" for figure in figures), mfu])
        paragraphs.append(table(["variant", "clips/s", "ms a step", "peak GB", "MFU"], rows))
        split = {name: v["parts_ms"] for name, v in _ran(step).items() if v["parts_ms"]}
        if split:
            parts = next(iter(split.values()))
            rows = [[part, *(f"{ms[part]:,.2f}" for ms in split.values())] for part in parts]
            paragraphs.append(table(["part, ms", *split], rows))
    return "\n\n".join(paragraphs) or f"The train step on a GPU: {NOT_YET}."


class PageError(ValueError):
    """A page's markers are not as they should be."""


def rendered(text: str, parts: dict[str, str]) -> str:
    """The page with every generated part replaced; the rest is written by hand and left alone.

    A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.

    Raises:
        PageError: a part has no place, a place has no part, or a marker is alone.
    """
    for name in re.findall(r"<!-- generated: ([\w-]+) -->", text):
        if name not in parts:
            raise PageError(f"no part is called {name!r}; there are {', '.join(parts)}")
    for name, content in parts.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        before, _, rest = text.partition(start)
        _, end_marker, after = rest.partition(end)
        if not end_marker or text.count(start) > 1 or text.count(end) > 1:
            raise PageError(f"the page must have {start!r} and {end!r} once each, in this order")
        text = f"{before}{start}\n\n{content.strip()}\n\n{end}{after}"
    return text
