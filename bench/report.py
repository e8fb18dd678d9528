"""Writes the generated parts of docs/performance.md: ``make performance-docs``.

    python -m bench.report [--check]

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; the rest of the page
is written by hand and left alone. Figures come from ``bench/results/*.json`` only. ``--check``
writes nothing and fails if anything is stale or was edited.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import charts, records, roofline, traffic
from bench.cases import element_size
from bench.provenance import PROJECT
from bench.summary import column_of
from bench.targets import CLIPS_PER_S, STEP_RATIOS, TARGETS, best_record, reached_ratio
from cmpose.ops.backends import OPS

PAGE = PROJECT / "docs" / "performance.md"
IMAGES = PROJECT / "docs" / "images" / "performance"
NOT_YET = "not yet measured"

Card = dict[str, Any]


class PageError(ValueError):
    """The page's markers are not as they should be."""


# -- blocks ---------------------------------------------------------------------------------------


def _start(name: str) -> str:
    return f"<!-- generated: {name} -->"


def _end(name: str) -> str:
    return f"<!-- end: {name} -->"


def rendered(text: str, blocks: dict[str, str]) -> str:
    """The page with every generated part replaced.

    Raises:
        PageError: a part has no place, a place has no part, or a marker is alone.
    """
    found = re.findall(r"<!-- generated: ([\w-]+) -->", text)
    for name in found:
        if name not in blocks:
            raise PageError(f"no part is called {name!r}; there are {', '.join(blocks)}")
    for name, content in blocks.items():
        if found.count(name) != 1 or text.count(_end(name)) != 1:
            raise PageError(f"the page must have {_start(name)!r} and {_end(name)!r} once each")
        before, rest = text.split(_start(name))
        inside, after = rest.split(_end(name)) if _end(name) in rest else (None, "")
        if inside is None:
            raise PageError(f"{_end(name)!r} stands before {_start(name)!r}")
        text = f"{before}{_start(name)}\n\n{content.strip()}\n\n{_end(name)}{after}"
    return text


# -- parts ----------------------------------------------------------------------------------------


def _origin(origin: dict[str, Any]) -> str:
    dirty = " with uncommitted changes" if origin["dirty"] else ""
    return (
        f"torch {origin['torch']}, triton {origin['triton']}, CUDA {origin['cuda']}, driver "
        f"{origin['driver']}, Python {origin['python']}, commit `{origin['commit'][:9]}`{dirty}, "
        f"{origin['utc'][:10]}, `{origin['command']}`"
    )


def status(cards: Iterable[Card]) -> str:
    """What has been measured at all."""
    measured = [card for card in cards if card["records"]]
    if not measured:
        return (
            "**No kernel has been timed yet.** The kernels are proven on the CPU and compiled for\n"
            "every card they are meant for; none has run on a GPU, so there is nothing to claim.\n"
            "What must be reached is written down before it is measured."
        )
    lines = ["Measured, per card:", ""]
    for card in measured:
        origins = list(dict.fromkeys(_origin(r["provenance"]) for r in card["records"]))
        lines.append(f"- **{card['card']}**: {len(card['records'])} records.")
        lines += [f"  - {origin}" for origin in origins]
    return "\n".join(lines)


def _cell(record: dict[str, Any] | None, ratios: dict[str, float]) -> tuple[str, str]:
    """Time with its share of the floor, and the ratios reached against those wanted."""
    if record is None:
        return NOT_YET, NOT_YET
    time = f"{record['us']['p50']:,.1f} ({record['percent_of_floor']:.0f} % of floor)"
    if record["speedup_vs_best_peer"] is None:
        return time, f"not recorded: tests {record['gate']['status']}"
    parts = []
    for name, wanted in ratios.items():
        found = reached_ratio(record, name)
        beside = name or record["best_peer"]
        if found is None:
            parts.append(f"no {beside} ran alike")
            continue
        mark = "" if found >= wanted else ", a loss" if found < 1 else ", short"
        parts.append(f"{found:.2f}× {beside}{mark}")
    return time, "; ".join(parts)


def targets(cards: list[Card]) -> str:
    """Target and measurement of every hot spot."""
    measured: list[Card | None] = [card for card in cards if card["records"]] or [None]
    head = ["hot spot", "target on H200 / RTX 4090, µs", "over the peers"]
    for card in measured:
        name = card["card"] if card else "measured"
        head += [f"{name}, µs" if card else name, "ratio to the best peer"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for target in TARGETS:
        row = [target.label, f"{target.h200_us:,g} / {target.rtx_4090_us:,g}", target.over]
        for card in measured:
            record = best_record(card["records"], target.case) if card else None
            row += _cell(record, target.ratios)
        lines.append(f"| {' | '.join(row)} |")
    row = [
        "full train step, ViT-B",
        f"≥ {CLIPS_PER_S['h200']:g} / ≥ {CLIPS_PER_S['rtx_4090']:g} clips/s",
        ", ".join(f"≥ {ratio:g}× {name}" for name, ratio in STEP_RATIOS.items()),
    ]
    for card in measured:
        row += _step_cell(card)
    lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _ran(step: dict[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in step["variants"].items() if not isinstance(v, str)}


def _step_cell(card: Card | None) -> tuple[str, str]:
    steps = [s for s in card["train_step"] if s["backbone"] == "base"] if card else []
    ran = _ran(steps[-1]) if steps else {}
    ours = {name: v for name, v in ran.items() if "reference" not in name}
    if card is None or not ours:
        return NOT_YET, NOT_YET
    best = max(ours, key=lambda name: ours[name]["clips_per_s"])
    speed = ours[best]["clips_per_s"]
    tests = card["runs"].get("tests")
    same = tests and tests["provenance"]["commit"] == steps[-1]["provenance"]["commit"]
    if not same or tests["status"] != "passed":
        return f"{speed:,.0f} clips/s ({best})", "not recorded: no passed tests of the same commit"
    ratios = [
        f"{speed / ran[name]['clips_per_s']:.2f}× {name}" for name in STEP_RATIOS if name in ran
    ]
    return f"{speed:,.0f} clips/s ({best})", "; ".join(ratios) or "no reference ran"


def predictions(cards: list[Card]) -> str:
    """The 4090's from its datasheet, and from what was reached on the first other card."""
    reached = next(
        (c for c in cards if c["records"] and column_of(c["card"]) != "rtx_4090_us"), None
    )
    rows = []
    for target in TARGETS:
        case = target.case
        bench = target.bench
        record = best_record(reached["records"], case) if reached else None
        rows.append(
            (
                target.label,
                roofline.predict_4090(
                    bench.bytes(case.shape, element_size(case.dtype), case.direction),
                    bench.flops(case.shape, case.direction),
                    case.dtype,
                    measured_bytes=record["measured_bytes"] if record else None,
                    percent_of_floor=record["percent_of_floor"] if record else None,
                ),
            )
        )
    beside = (
        f"The times are at the share of the floor that was reached on {reached['card']}."
        if reached
        else "There is no time before a card has been measured."
    )
    return f"{roofline.table(rows)}\n\n{beside}"


def _row(record: dict[str, Any]) -> str:
    us, best = record["us"], record["best_peer"]
    sizes = " ".join(f"{name}={size}" for name, size in record["shape"].items())
    speedup = record["speedup_vs_best_peer"]
    others = "; ".join(
        f"{name} {time:,.1f}" if not isinstance(time, str) else f"{name}: {time[:60]}"
        for name, time in record["peers"].items()
    )
    error = record["error_vs_fp64"]
    cells = [
        f"{record['direction'].replace('_', ' + ')}, {sizes}, {record['dtype']}",
        record["backend"],
        f"{us['p50']:,.1f} [{us['p20']:,.1f}, {us['p80']:,.1f}]",
        f"{record['bytes'] / us['p50'] / 1e3:,.0f}",
        f"{record['percent_of_copy']:.0f}",
        f"{record['percent_of_floor']:.0f}",
        f"{record['peak_bytes'] / 1e6:,.1f}",
        "–" if error is None else f"{error:.1e}",
        "–" if speedup is None else f"{speedup:.2f}× {best}",
        others.replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def results(cards: list[Card]) -> str:
    """Every record, losses too."""
    measured = [card for card in cards if card["records"]]
    if not measured:
        return f"Records: none; {NOT_YET}."
    head = "| case | backend | µs [p20, p80] | GB/s | % of copy | % of floor | peak MB | error | "
    head += "ratio | peers, µs |"
    lines = []
    for card in measured:
        lines += [f"### {card['card']}", ""]
        for op in OPS:
            rows = [_row(r) for r in card["records"] if r["op"] == op]
            if not rows:
                lines += [f"`{op}`: {NOT_YET}.", ""]
                continue
            lines += ["<details>", f"<summary>{op}: {len(rows)} records</summary>", "", head]
            lines += [f"|{'---|' * 10}", *rows, "", "</details>", ""]
    return "\n".join(lines)


def train_step(cards: list[Card]) -> str:
    """Variants and parts of the train step."""
    lines = []
    for card in cards:
        for step in card["train_step"]:
            lines += [
                f"**{card['card']}**, ViT-{step['backbone']}, {step['batch']} clips, "
                f"{step['precision']}; {_origin(step['provenance'])}",
                "",
                "| variant | clips/s | ms a step | peak GB | MFU |",
                "|---|---|---|---|---|",
            ]
            for name, v in step["variants"].items():
                if isinstance(v, str):
                    lines.append(f"| {name} | {v[:80]} | – | – | – |")
                    continue
                mfu = "–" if v["mfu"] is None else f"{100 * v['mfu']:.1f} %"
                lines.append(
                    f"| {name} | {v['clips_per_s']:,.1f} | {v['ms']['p50']:,.1f} | "
                    f"{v['peak_bytes'] / 1e9:,.1f} | {mfu} |"
                )
            split = {name: v["parts_ms"] for name, v in _ran(step).items() if v["parts_ms"]}
            if split:
                parts = list(next(iter(split.values())))
                lines += [
                    "",
                    f"| part, ms | {' | '.join(split)} |",
                    f"|{'---|' * (1 + len(split))}",
                ]
                lines += [
                    f"| {part} | {' | '.join(f'{ms[part]:,.2f}' for ms in split.values())} |"
                    for part in parts
                ]
            lines.append("")
    return "\n".join(lines) if lines else f"The train step on a GPU: {NOT_YET}."


def pictures(drawn: dict[str, bytes]) -> str:
    """Links to the charts."""
    if not drawn:
        return f"Charts: none; {NOT_YET}."
    return "\n\n".join(f"![{name}](images/performance/{name})" for name in drawn)


def blocks(cards: list[Card], drawn: dict[str, bytes]) -> dict[str, str]:
    """All generated parts of the page."""
    return {
        "status": status(cards),
        "targets": targets(cards),
        "charts": pictures(drawn),
        "results": results(cards),
        "train-step": train_step(cards),
        "predictions": predictions(cards),
        "bytes": traffic.table(traffic.count()),
    }


# -- the program ----------------------------------------------------------------------------------


def problems(page: Path, images: Path, cards: list[Card]) -> list[str]:
    """What on the page or among its charts is stale or was edited."""
    drawn: dict[str, bytes] = {}
    found = []
    for card in cards:
        own = charts.draw(card)
        drawn |= own
        for name, content in own.items():
            kind = next(kind for kind in charts.CHARTS if name.endswith(f"-{kind}.svg"))
            why = charts.stale(images / name, kind, card, content)
            found += [why] if why else []
    text = page.read_text()
    if rendered(text, blocks(cards, drawn)) != text:
        found.append(f"{page.name}: a generated part is stale or was edited")
    extra = {path.name for path in images.glob("*.svg")} - set(drawn) if images.is_dir() else set()
    return found + [f"{name} belongs to no records" for name in sorted(extra)]


def write(page: Path, images: Path, cards: list[Card]) -> None:
    """Renews the page and its charts."""
    drawn = {name: content for card in cards for name, content in charts.draw(card).items()}
    page.write_text(rendered(page.read_text(), blocks(cards, drawn)))
    for path in images.glob("*.svg") if images.is_dir() else ():
        if path.name not in drawn:
            path.unlink()
    for name, content in drawn.items():
        images.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)


def gpu_cards(folder: Path = records.RESULTS) -> list[Card]:
    """Committed results of GPUs; a CPU's are no performance results."""
    cards = records.all_cards(folder)
    return [c for c in cards if all(r["provenance"]["gpu"] for r in c["records"])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--check", action="store_true", help="writes nothing; fails if stale")
    options = parser.parse_args(arguments)
    cards = gpu_cards()
    if options.check:
        found = problems(PAGE, IMAGES, cards)
        print("\n".join([*found, "run make performance-docs"] if found else ["up to date"]))
        return int(bool(found))
    write(PAGE, IMAGES, cards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
