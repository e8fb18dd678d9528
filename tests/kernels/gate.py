"""Budgets of the compiled kernels at the reference shape, so that what makes one slower turns red.

``python -m tests.kernels.gate`` measures all and writes their files of budgets; named ops only:
``python -m tests.kernels.gate warp_clips``. Commit what changed with the reason.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from bench.profile.counts import Counts
    from tests.csrc.compile_check import Row
    from tests.kernels.compile_check import Compiled

HERE = Path(__file__).resolve().parent

MADE_WITH = "3.7"
"""The Triton whose code the budgets and limits are of."""


def has_their_triton() -> bool:
    """Whether budgets and limits hold here: whether this is the Triton that they are of."""
    return version("triton").startswith(f"{MADE_WITH}.")


@dataclass(frozen=True)
class Gated:
    """The kernels of a backend that have budgets.

    Attributes:
        backend: ``triton`` or ``cuda``.
        budgets: their file.
        archs: compute capabilities that are counted.
        directions: op → those that are counted, at the reference shape.
        shapes: op → sizes in place of the reference shape's; then all blocks run.
    """

    backend: str
    budgets: Path
    archs: tuple[int, ...]
    directions: dict[str, tuple[str, ...]]
    shapes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def cases(self) -> list[tuple[str, str, int]]:
        """Op, direction and compute capability."""
        ways = [(op, way) for op, ways in self.directions.items() for way in ways]
        return [(op, way, arch) for op, way in ways for arch in self.archs]

    def read(self) -> dict[str, Figures]:
        return read(self.budgets)


TRITON = Gated(
    "triton",
    HERE / "budgets.json",
    (89, 90),
    {
        "spatial_attention": ("forward", "backward"),
        "temporal_attention": ("forward", "backward"),
        "corrupt_tokens": ("forward", "backward"),
        "reconstruction_loss": ("forward",),
        "heatmap_loss": ("forward",),
        "warp_clips": ("forward",),
    },
    {"warp_clips": {"B": 1, "T": 1}},
)

CUDA = Gated(
    "cuda",
    HERE.parent / "csrc" / "budgets.json",
    (89,),
    {
        "dpc_knn": ("forward",),
        "merge_clusters": ("forward", "backward"),
        "select_tokens": ("forward", "backward"),
        "unmerge_tokens": ("forward", "backward"),
        "spatial_attention": ("forward", "backward"),
    },
)

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


def must_move(bench: Any, shape: dict[str, int], direction: str) -> int:
    """The bytes of bfloat16 that an op must move."""
    if direction in bench.directions:
        return bench.bytes(shape, 2, direction)
    return bench.bytes(shape, 2, "forward_backward") - bench.bytes(shape, 2, "forward")


def measured(kernels: Gated, op: str, direction: str, arch: int) -> dict[str, Figures]:
    """Counts an op's launches; see :func:`lines`.

    The losses' forward runs without gradients, which their algorithmic bytes contain.
    """
    from bench.profile import counts

    shape = kernels.shapes.get(op)
    launches = counts.counts_of_op(op, arch, shape, direction, bool(shape), kernels.backend)
    bench = importlib.import_module(f"bench.{op}").BENCH
    must = must_move(bench, {**bench.shapes[0], **(shape or {})}, direction)
    return lines(f"{op} {direction} sm_{arch}", launches, must)


def lines(where: str, launches: Sequence[Counts], must: int) -> dict[str, Figures]:
    """Name of a line → figures: of each launch, and of all: sectors over bytes that must move."""
    traffic = sum(one.distinct_read + one.distinct_written for one in launches) * 32 / must
    requested = sum(one.sectors_read + one.sectors_written for one in launches) * 32 / must
    return {
        where: {"traffic": round(traffic, 3), "asked": round(requested, 3)},
        **{f"{where} {one.kernel}": figures(one) for one in launches},
    }


def worse(now: dict[str, Figures], budgets: dict[str, Figures]) -> list[str]:
    """What is worse than its budget and by how much, or has none: a line each."""
    problems = []
    for line, row in now.items():
        if line not in budgets:
            problems.append(f"{line}: has no budget")
            continue
        problems += [f"{line}: {name} was not counted" for name in budgets[line] if name not in row]
        for name, value in row.items():
            budget = budgets[line].get(name, 0)
            least = name in LESS_IS_WORSE
            if value * SLACK < budget if least else value > budget * SLACK:
                by = f", {100 * (value / budget - 1):+.1f} %" if budget else ""
                problems.append(f"{line}: {value:g} {name}, budget {budget:g}{by}")
    return problems


def check(op: str, now: dict[str, Figures], budgets: dict[str, Figures]) -> None:
    """Raises AssertionError with what is worse, and how budgets are renewed."""
    wrong = worse(now, budgets)
    renew = f"if that is meant: python -m tests.kernels.gate {op}"
    assert not wrong, "\n".join([*wrong, renew])


def strangers(kernels: Gated) -> list[str]:
    """Lines of the budgets that no case has, and cases without a line."""
    cases = {f"{op} {direction} sm_{arch}" for op, direction, arch in kernels.cases}
    return sorted({" ".join(line.split()[:3]) for line in kernels.read()} ^ cases)


# -- read off the code alone ----------------------------------------------------------------------

LOOPS = HERE / "loops.json"
"""Budgets of blocks an SM, and of main loops where ``compile_check.LOOP_ARCHS`` says so."""


def static_lines(op: str, rows: Iterable[Compiled]) -> dict[str, Figures]:
    """Of an op's compiled cases of the reference shape."""
    from bench.profile.cards import BY_ARCH
    from bench.profile.model import fitting
    from tests.kernels.compile_check import LOOPS as CASES

    lines = {}
    for row in rows:
        if row.case in CASES[op]:
            blocks = fitting(BY_ARCH[row.arch], row.warps, row.registers, row.shared)
            lines[f"{op} {row.case} sm_{row.arch} {row.kernel}"] = {
                "blocks an SM": min(blocks.values()),
                **{f"{pipe} in the loop": round(n, 2) for pipe, n in row.loop.items()},
            }
    return lines


def compiled_lines(op: str) -> dict[str, Figures]:
    """Compiles an op's cases of the reference shape anew, in processes of their own."""
    from tests.kernels.compile_check import LOOPS as CASES
    from tests.kernels.compile_check import Compiled

    environment = {name: n for name, n in os.environ.items() if name != "TRITON_INTERPRET"}
    rows: list[Compiled] = []
    for case in CASES[op]:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "tests.kernels.compile_check", op, "--only", case]
            command += ["--json", folder]
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            read = json.loads((Path(folder) / f"{op}.json").read_text())
            rows += [Compiled(**row) for row in read["compiled"]]
    return static_lines(op, rows)


BLOCKS = HERE.parent / "csrc" / "blocks.json"
"""Budgets of CUDA C++ kernels' blocks an SM."""


def cuda_lines(rows: Sequence[Row]) -> dict[str, Figures]:
    """Blocks an SM of what the CUDA C++ ops launch at the reference shape, on every card.

    Args:
        rows: of ``tests.csrc.compile_check``.
    """
    from bench.profile import counts
    from bench.profile.cards import BY_ARCH
    from bench.profile.model import fitting
    from cmpose.ops import cuda

    # Demangled, an enumerator has its type before it: (Stage)1.
    compiled = [(re.sub(r"\([\w:]+\)(?=\d)", "", row.name), row) for row in rows]
    lines = {}
    for arch, (op, direction, _) in itertools.product({row.arch for row in rows}, CUDA.cases):
        card = BY_ARCH[arch]
        # By what a multiprocessor holds some choose between kernels.
        with mock.patch.object(cuda, "SHARED_ON_CPU", card.shared_bytes):
            launches = counts.launches_of_op(op, 89, None, direction, "cuda")
        for one in launches:
            name, dynamic = one.name, one.code(89).shared
            ours = [row for other, row in compiled if (other, row.arch) == (name, arch)]
            assert ours, f"{name} is not compiled for sm_{arch}"
            for row in ours:
                blocks = fitting(card, one.warps, row.registers, row.shared + dynamic)
                lines[f"{op} {direction} sm_{arch} {name}"] = {
                    "blocks an SM": min(blocks.values()),
                    "registers": row.registers,
                }
    return lines


# -- renewal --------------------------------------------------------------------------------------


def write(path: Path, budgets: dict[str, Figures]) -> None:
    text = [f"  {json.dumps(line)}: {json.dumps(budgets[line])}" for line in sorted(budgets)]
    path.write_text("{\n" + ",\n".join(text) + "\n}\n")


def read(path: Path) -> dict[str, Figures]:
    return json.loads(path.read_text()) if path.is_file() else {}


def renewed(kernels: Gated, ops: list[str]) -> dict[str, Figures]:
    """Measures ops anew; the lines of the others stay."""
    budgets = {
        line: row for line, row in kernels.read().items() if line.split()[0] in kernels.directions
    }
    for op, direction, arch in kernels.cases:
        if op in ops:
            where = f"{op} {direction} sm_{arch}"
            budgets = {
                line: row for line, row in budgets.items() if not f"{line} ".startswith(f"{where} ")
            }
            budgets |= measured(kernels, op, direction, arch)
            print(where, flush=True)
    return budgets


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    ops = sorted({*TRITON.directions, *CUDA.directions})
    parser.add_argument("op", nargs="*", help=f"of {', '.join(ops)}; default: all")
    options = parser.parse_args()
    for op in options.op:
        if op not in ops:
            parser.error(f"op {op}: has no budgets; give one of {', '.join(ops)}")
    for kernels in (TRITON, CUDA):
        write(kernels.budgets, renewed(kernels, options.op or ops))
    for op in set(options.op or ops) & set(TRITON.directions):
        budgets = {line: row for line, row in read(LOOPS).items() if line.split()[0] != op}
        write(LOOPS, budgets | compiled_lines(op))
    if set(options.op or ops) & set(CUDA.directions):
        from tests.csrc import compile_check

        report = compile_check.compile_all(compile_check.plan_for(compile_check.ARCHS))
        write(BLOCKS, cuda_lines(report.rows))
    return 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # as in the tests; what is compiled is compiled elsewhere
    sys.exit(main())
