"""One page of what a run found, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import provenance
from bench.targets import CLIPS_PER_S, TARGETS, best_record, reached_ratio

WIDTH = 100


def column_of(card: str) -> str | None:
    """The design's column of targets for a card, or None: ``h200_us`` or ``rtx_4090_us``."""
    if "H200" in card:
        return "h200_us"
    return "rtx_4090_us" if "4090" in card else None


def target_lines(content: dict[str, Any]) -> list[str]:
    """For each target what was measured, its share of the floor, and against the best peer."""
    column = column_of(content["card"])
    lines = [
        f"{'hot spot':56} {'target µs':>10} {'µs':>10} {'floor':>7} {'best peer':>28} {'ratio':>7}"
    ]
    for target in TARGETS:
        record = best_record(content["records"], target.case)
        aim = "–" if column is None else f"{getattr(target, column):,.0f}"
        if record is None:
            lines.append(f"{target.label[:56]:56} {aim:>10} not yet measured")
            continue
        best = record["best_peer"]
        beside = "none ran" if best is None else f"{best} {record['peers'][best]:,.1f}"
        speedup = record["speedup_vs_best_peer"]
        ratio = f"({record['gate']['status']})" if speedup is None else f"{speedup:.2f}×"
        lines.append(
            f"{target.label[:56]:56} {aim:>10} {record['us']['p50']:>10,.1f} "
            f"{record['percent_of_floor']:>6.1f}% {beside:>28} {ratio:>7}"
        )
        short = [
            f"{name or 'best'} {found:.2f}× of {wanted:g}×"
            for name, wanted in target.ratios.items()
            if speedup is not None
            and (found := reached_ratio(record, name)) is not None
            and found < wanted
        ]
        if short:
            lines.append(f"    short of: {', '.join(short)}")
    return lines


def step_lines(content: dict[str, Any]) -> list[str]:
    """Variants of the train step."""
    lines = []
    for step in content["train_step"]:
        lines.append(
            f"train step, ViT {step['backbone']}, {step['batch']} clips, {step['precision']}:"
        )
        for name, found in step["variants"].items():
            if isinstance(found, str):
                lines.append(f"  {name:32} {found[:64]}")
                continue
            mfu = "" if found["mfu"] is None else f", MFU {100 * found['mfu']:.1f} %"
            lines.append(
                f"  {name:32} {found['clips_per_s']:10,.1f} clips/s, "
                f"{found['peak_bytes'] / 1e9:6.2f} GB{mfu}"
            )
    column = column_of(content["card"])
    if column:
        lines.append(
            f"  target, ViT base: ≥ {CLIPS_PER_S[column.removesuffix('_us')]:,.0f} clips/s"
        )
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
        lines.append(f"a rehearsal; {provenance.NOT_A_RESULT}")
    for stage, run in content["runs"].items():
        origin = run["provenance"]
        counts = ", ".join(f"{count} {what}" for what, count in run["counts"].items())
        mark = "" if stage in stages else f" (earlier, {origin['utc']})"
        lines.append(f"{stage:9} {run['status']:7} {run['seconds']:6.0f} s  {counts}{mark}")
        shown = 3 if run["status"] == "passed" else 8
        lines += [f"    {text[: WIDTH - 4]}" for text in run["details"][:shown]]
        if len(run["details"]) > shown:
            lines.append(f"    and {len(run['details']) - shown} more; see the results file")
    if content["records"]:
        last = content["records"][-1]
        origin, rates = last["provenance"], last["rates"]
        lines.append(
            f"torch {origin['torch']}, triton {origin['triton']}, driver {origin['driver']}, "
            f"commit {origin['commit'][:9]}{'+dirty' if origin['dirty'] else ''}"
        )
        lines.append(
            f"copy {rates['copy_bytes_per_s'] / 1e9:,.0f} GB/s, bf16 "
            f"{rates['bf16_flops_per_s'] / 1e12:,.1f} TFLOP/s, fp32 "
            f"{rates['fp32_flops_per_s'] / 1e12:,.1f} TFLOP/s; {len(content['records'])} records"
        )
    if not dry:
        lines += ["-" * WIDTH, *target_lines(content)]
    if content["train_step"]:
        lines += ["-" * WIDTH, *step_lines(content)]
    return "\n".join(lines) + "\n"
