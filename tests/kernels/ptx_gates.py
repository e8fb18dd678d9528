"""What PTX says without running it: what is copied ahead, which products wait for one another."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import triton

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
