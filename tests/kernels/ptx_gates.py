"""What code says without running it: what is copied ahead, what products wait for and keep."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import triton

from bench.profile.sass import Block

_LINE = re.compile(r"^\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*([^;]*);|^\s*(\$L__BB\w+):", re.M)


class Row(NamedTuple):
    """An instruction, or a label, then without ``op``; ``guard`` is "!" or "", and a predicate."""

    op: str
    operands: list[str]
    guard: tuple[str, str] | None
    label: str


def rows(ptx: str) -> list[Row]:
    """The instructions of one kernel's PTX, and its labels."""
    instructions = []
    for match in _LINE.finditer(ptx):
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4] or "")
        guard = (match[1], match[2]) if match[2] else None
        instructions.append(Row(match[3] or "", operands, guard, match[5] or ""))
    return instructions


def ahead(ptx: str) -> float | None:
    """The share of a loop's tensor instructions behind which a whole tile's copies are under way.

    A tile's copies are those that a round of the loop asks for. The least of all loops that
    multiply matrices; None if there is none.
    """
    code = rows(ptx)
    labels = {row.label: at for at, row in enumerate(code) if row.label}
    shares = []
    for end, row in enumerate(code):
        start = labels.get(row.operands[-1], end) if row.op.startswith("bra") else end
        body = [row.op for row in code[start:end]]
        if not any("mma" in op for op in body):
            continue
        tile = sum(op == "cp.async.commit_group" for op in body)
        waiting = covered = products = 0
        for number in (0, 1):
            for at in range(start, end):
                op = code[at].op
                if op == "cp.async.commit_group":
                    waiting += 1
                elif op == "cp.async.wait_group":
                    waiting = min(waiting + (number == 0) * 99, int(code[at].operands[0]))
                elif number and "mma" in op and re.search(r"\.m\d+n\d+k", op):
                    products += 1
                    covered += waiting >= tile > 0
        shares.append(covered / products)
    return min(shares, default=None)


def warnings(ptx: str, flags: Sequence[str] = ("--regAllocOptLevel=2",)) -> list[str]:
    """ptxas's remarks on products that wait for one another (C75xx); only ``wgmma`` has them."""
    if "wgmma" not in ptx:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, *flags, "--gpu-name=sm_90a", file.name]
        done = subprocess.run(
            [*command, "-o", "/dev/null"], capture_output=True, text=True, check=True
        )
    return re.findall(r"\(C75\d\d\) [^\n]*", done.stderr + done.stdout)


def reused(blocks: Iterable[Block]) -> list[str]:
    """What writes registers of a ``wgmma``'s first matrix before the wait for it, which ptxas 12.8
    and 12.9 have let happen (triton-lang/triton#11781); in the listing's order.

    Args:
        blocks: SASS.
    """
    kept: dict[int, str] = {}
    problems = []
    for one in (one for block in blocks for one in block.instructions):
        first = re.match(r"R(\d+)(?:, R(\d+), gdesc)?", one.operands)
        if one.base == "HGMMA" and first and first[2]:
            kept |= dict.fromkeys(range(int(first[2]), int(first[2]) + 4), one.operands)
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            kept.clear()
        elif first and one.base not in ("HGMMA", "BAR", "WARPSYNC"):
            wide = 2 if "WIDE" in one.opcode else max(one.bytes // 4, one.matrices, 1)
            written = range(int(first[1]), int(first[1]) + wide)
            problems += [
                f"{one.opcode} {one.operands} over what HGMMA {kept[register]} may still read"
                for register in written
                if register in kept
            ]
    return problems
