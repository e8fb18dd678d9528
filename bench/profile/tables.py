"""Tables of bounds and estimates: what the command prints, and what the documents show."""

from __future__ import annotations

import re

from bench.harness.records import Record
from bench.harness.targets import TARGETS, best_record, workload_of
from bench.profile.cards import H200, RTX_4090
from bench.report.tables import NOT_YET, Card, origin, table

BEFORE = {
    "spatial attention forward": ("400–450", "130–160"),
    "spatial attention backward": ("880–1,000", "350–430"),
    "temporal attention forward": ("400–420", "92–105"),
    "temporal attention backward": ("700–730", "165–180"),
    "corruption forward": ("128–135", "36–40"),
    "corruption backward": ("125", "–"),
    "DPC-kNN, M = 192, to labels": ("36", "28"),
    "DPC-kNN, M = 1024": ("750", "400"),
    "DPC-kNN, M = 4096": ("10,500–11,000", "5,600"),
    "merge forward + backward": ("35", "17"),
    "token selection": ("–", "13"),
    "crops out of 720p frames": ("45–55", "–"),
    "heatmap loss forward + backward": ("10–11", "–"),
}
"""Estimates in µs of the kernels of commit 3abb682 (24 November 2026) on an RTX 4090 and an H200,
made by hand from their SASS, within 25 %."""


def _origin(held: list[Record]) -> list[str]:
    """What made the records: a line for each commit, with its commands."""
    commands: dict[str, list[str]] = {}
    for o in (record["provenance"] for record in held):
        made = (
            f"Counted with torch {o['torch']}, triton {o['triton']}, commit `{o['commit'][:9]}`"
            f"{' with uncommitted changes' if o['dirty'] else ''}, {o['utc'][:10]}"
        )
        commands.setdefault(made, []).append(f"`{o['command']}`")
    return [f"{made}, {', '.join(dict.fromkeys(of))}." for made, of in commands.items()]


_TIMES = ("floor, µs", "bound, µs, by", "estimate, µs", "target, µs")


def _times(record: Record) -> list[str]:
    us, target = record["estimate_us"], record["target_us"]
    return [
        f"{record['floor_us']:,.1f}",
        f"{record['bound_us']:,.1f} {record['bound_by']}",
        f"{us:,.1f} ± {record['band'] * us:,.1f}",
        "–" if target is None else f"{target:,g}",
    ]


def _figures(of: Record, prefix: str = "") -> dict[str, str]:
    """Of a launch, each by its name; those of a group have the group's before it."""
    figures: dict[str, str] = {}
    for name, value in of.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            figures |= _figures(value, "" if name == "counts" else f"{label} ")
        elif isinstance(value, str):
            figures[label] = value
        else:
            figures[label] = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
    return figures


def profile(record: Record) -> str:
    """One workload on one card: its times, then each launch's figures, a column a launch."""
    where = f"{workload_of(record)} on {record['card']} (sm_{record['arch']})"
    launches = [_figures(launch) for launch in record["launches"]]
    names = dict.fromkeys(name for one in launches for name in one)
    rows = [[name, *(one.get(name, "–") for one in launches)] for name in names]
    return "\n\n".join([where, table(_TIMES, [_times(record)]), table(rows[0], rows[1:]), ""])


def measured_us(record: Record, cards: list[Card]) -> float | None:
    """The time of the same kernels on a card of that name, if it has been measured."""
    for card in cards:
        of_backend = [one for one in card["records"] if one["backend"] == record["backend"]]
        measured = best_record(of_backend, workload_of(record))
        if measured and record["card"].removesuffix(" SXM") in card["card"]:
            return float(measured["us"]["p50"])
    return None


def hot_spots(held: list[Record], cards: list[Card]) -> str:
    """Floor, bound and estimate of every hot spot on each card, beside target and measurement."""
    rows = []
    for target in TARGETS:
        counted = {one["card"]: one for one in held if workload_of(one) == target.workload}
        before = dict(zip((RTX_4090.name, H200.name), BEFORE.get(target.label, "––"), strict=True))
        for card in dict.fromkeys([*before, *counted]):
            shown, measured = ["–", "–", "not counted", "–"], [NOT_YET, "–"]
            if record := counted.get(card):
                shown = _times(record)
                if us := measured_us(record, cards):
                    error = f"{100 * (record['estimate_us'] / us - 1):+.0f} %"
                    measured = [f"{us:,.1f}", error]
            rows.append([target.label, card, before.get(card, "–"), *shown, *measured])
    head = ("hot spot", "card", "before, µs", *_TIMES, "measured, µs", "error of the estimate")
    return "\n\n".join([table(head, rows), *_origin(held)])


def plain(kernel: str) -> str:
    """A kernel's name with numbers for bools, which compilers write in both ways."""
    return re.sub(r"\bfalse\b", "0", re.sub(r"\btrue\b", "1", kernel))


def _own(workload: Record) -> dict[str, Record]:
    """A workload's kernels but torch's, by their names."""
    return {one["kernel"]: one for one in workload["kernels"] if "at::" not in one["kernel"]}


def _profile_of(workload: Record, held: list[Record], source: Record) -> Record | None:
    """What was counted of the kernels that ran: if they are Triton's, of the same version's; nvcc's
    are the toolkit's."""
    triton = source["triton"] if workload["backend"] == "triton" else None
    for profile in held:
        kernels = {plain(launch["counts"]["kernel"]) for launch in profile["launches"]}
        if (
            workload_of(profile) == workload_of(workload)
            and profile["card"].removesuffix(" SXM") in source["gpu"]
            and kernels == set(_own(workload))
            and triton in (None, profile["provenance"]["triton"])
        ):
            return profile
    return None


def _counters_row(workload: Record, profile: Record | None) -> list[str]:
    kernels, launches = _own(workload), profile["launches"] if profile else []
    counted = [one["counts"] for one in launches]
    counted = [one | {"instructions": sum(one["instructions"].values())} for one in counted]

    def beside(field: str) -> list[str]:
        """A count, the counter, and the one over the other."""
        figures = [one[field] for one in kernels.values()]
        read = None if None in figures else sum(figures)
        count = sum(one[field] for one in counted) if counted else None
        shown = ["–" if figure is None else f"{figure:,.0f}" for figure in (count, read)]
        return [*shown, f"{count / read:.3f}" if count is not None and read else "–"]

    own = {plain(one["kernel"]): one["registers"] for one in counted}
    registers = dict.fromkeys(
        f"{own.get(name, '–')} / {one['registers']}" for name, one in kernels.items()
    )
    us = sum(one["us"] for one in kernels.values())
    issued = sum(one["us"] * (one["issue_percent"] or 0) for one in kernels.values()) / us
    return [
        str(workload_of(workload)).removesuffix(f" {workload['dtype']}"),
        workload["backend"],
        *beside("instructions"),
        *beside("sectors_read"),
        *beside("sectors_written"),
        ", ".join(registers),
        f"{issued:.0f}",
    ]


def counters(held: list[Record], cards: list[Record]) -> str:
    """What the card's counters say of every target's workload, beside what was counted."""
    parts = []
    head = ["workload", "backend"]
    for what in ("warp instructions", "L2 sectors read", "L2 sectors written"):
        head += [f"{what}, counted", "counter", "ratio"]
    head += ["registers, counted / there", "issue slots used, %"]
    for card in cards:
        profiles = [_profile_of(one, held, card["provenance"]) for one in card["workloads"]]
        rows = list(map(_counters_row, card["workloads"], profiles))
        used = [profile for profile in profiles if profile]
        parts += [table(head, rows), f"{origin(card['provenance'])}.", *_origin(used)]
    return "\n\n".join(parts) or f"The card's counters: {NOT_YET}."


def published(held: list[Record]) -> str:
    """The model beside published times, and the error of each estimate."""
    rows = [
        [
            record["card"],
            record["kernel"],
            f"{record['figure']:,g} {record['unit']}",
            f"{record['published_us']:,.1f}",
            f"{record['bound_us']:,.1f} {record['bound_by']}",
            f"{record['estimate_us']:,.1f}",
            f"{100 * record['error']:+.0f} %",
            record["source"],
        ]
        for record in held
    ]
    head = ("card", "kernel", "published", "that is, µs", "bound, µs, by", "estimate, µs",
            "error", "source")  # fmt: skip
    return "\n\n".join([table(head, rows), *_origin(held)])


def peers(held: list[Record]) -> str:
    """Each workload's estimate beside those of its peers, and the ratio to the best of them."""
    rows: list[list[str]] = []
    refused: dict[str, list[str]] = {}
    for record in held:
        known: list[tuple[float, str]] = []
        for name, one in record["peers"].items():
            if isinstance(one, dict):
                known.append((one["estimate_us"], name))
            elif name not in refused.setdefault(one, []):
                refused[one].append(name)
        ratio = min(known)[0] / record["estimate_us"] if known else None
        shown = "none" if ratio is None else f"{ratio:.2f}×{', a loss' if ratio < 1 else ''}"
        workload = str(workload_of(record)).removesuffix(f" {record['dtype']}")
        beside = ", ".join(f"{name} {us:,.1f}" for us, name in sorted(known))
        rows.append([workload, record["card"], f"{record['estimate_us']:,.1f}", beside, shown])
    head = ("workload", "card", "ours, µs", "peers, µs", "best peer over ours")
    why = [f"Not profiled: {', '.join(of)}: {reason[7:]}." for reason, of in refused.items()]
    return "\n\n".join([table(head, rows), *why, *_origin(held)])
