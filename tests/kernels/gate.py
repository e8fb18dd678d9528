"""Budgets of the compiled kernels at the reference shape, so that what makes one slower turns red.

``python -m tests.kernels.gate`` measures all and writes ``tests/kernels/budgets.json``; named ops
only: ``python -m tests.kernels.gate warp_clips``. Commit what changed with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.profile.counts import Counts

BUDGETS = Path(__file__).with_name("budgets.json")

ARCHS = (89, 90)

SAMPLES = 24
"""Blocks of a large launch that run; more change no figure by 1 %."""

CASES = {
    "spatial_attention": ("forward", "backward"),
    "temporal_attention": ("forward", "backward"),
    "corrupt_tokens": ("forward", "backward"),
    "reconstruction_loss": ("forward",),
    "heatmap_loss": ("forward",),
}
"""Op → the directions that are counted, of Triton's ops."""

Figures = dict[str, float]

LESS_IS_WORSE = ("blocks an SM", "bytes in flight")

SLACK = 1.01
"""A figure may be this much worse than its budget, for what another sample of blocks may change."""


def figures(one: Counts) -> Figures:
    """What a budget holds of a launch; instructions, conflicts and barriers are a block's."""
    from bench.profile.cards import BY_ARCH
    from bench.profile.model import occupancy

    return {
        **{
            f"{pipe} instructions": round(n / one.blocks, 1) for pipe, n in one.instructions.items()
        },
        "instructions": round(sum(one.instructions.values()) / one.blocks, 1),
        "registers": one.registers,
        "shared memory": one.shared_bytes,
        "blocks an SM": occupancy(one, BY_ARCH[one.arch]).blocks,
        "bank conflicts": round(one.shared_conflicts / one.blocks, 1),
        "barriers": round(one.barriers / one.blocks, 1),
        "bytes in flight": round(one.bytes_in_flight),
        "narrow accesses": round(_narrow(one), 4),
        "sectors asked for": round((one.sectors_read + one.sectors_written) / one.blocks, 1),
    }


def _narrow(one: Counts) -> float:
    """Of the bytes of global memory, the share that moves less than 16 a lane and access."""
    moved = {width: width * times for width, times in one.access_bytes.items()}
    return sum(size for width, size in moved.items() if width < 16) / max(sum(moved.values()), 1)


def measured(op: str, direction: str, arch: int) -> dict[str, Figures]:
    """Name of a line → its figures: each launch's, and the op's sectors over its algorithmic ones.

    The losses' forward runs without gradients, which their algorithmic bytes contain.
    """
    from bench.profile import counts

    before = counts.SAMPLES, counts.WHOLE
    counts.SAMPLES, counts.WHOLE = SAMPLES, 2 * SAMPLES
    try:
        launches = counts.counts_of_op(op, arch, direction=direction)
    finally:
        counts.SAMPLES, counts.WHOLE = before
    where = f"{op} {direction} sm_{arch}"
    lines = {f"{where} {one.kernel}": figures(one) for one in launches}
    bench = importlib.import_module(f"bench.{op}").BENCH
    must = bench.bytes(bench.shapes[0], 2, direction) / 32
    traffic = sum(one.distinct_read + one.distinct_written for one in launches) / must
    asked = sum(one.sectors_read + one.sectors_written for one in launches) / must
    return {**lines, where: {"traffic": round(traffic, 3), "asked": round(asked, 3)}}


def worse(now: dict[str, Figures], budgets: dict[str, Figures]) -> list[str]:
    """What is worse than its budget, or has none: a line each."""
    found = []
    for line, row in now.items():
        if line not in budgets:
            found.append(f"{line}: has no budget")
            continue
        for name, value in row.items():
            budget = budgets[line].get(name, 0)
            least = name in LESS_IS_WORSE
            if value * SLACK < budget if least else value > budget * SLACK:
                found.append(f"{line}: {value:g} {name}, budget {budget:g}")
    return found


def read() -> dict[str, Figures]:
    return json.loads(BUDGETS.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*")
    options = parser.parse_args()
    kept = read() if BUDGETS.is_file() and options.op else {}
    for op in options.op or CASES:
        kept = {line: row for line, row in kept.items() if not line.startswith(f"{op} ")}
        for direction in CASES[op]:
            for arch in ARCHS:
                kept |= measured(op, direction, arch)
                print(f"{op} {direction} sm_{arch}", flush=True)
    text = [f"  {json.dumps(line)}: {json.dumps(kept[line])}" for line in sorted(kept)]
    BUDGETS.write_text("{\n" + ",\n".join(text) + "\n}\n")
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # as in the tests; what is compiled is compiled elsewhere
    sys.exit(main())
