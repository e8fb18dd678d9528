"""What PTX says without running it: what is copied ahead, what groups of warps overwrite."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
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


# -- groups of warps ------------------------------------------------------------------------------


class _Read(NamedTuple):
    """Shared memory that a ``wgmma`` of one group reads, from ``begin`` to before ``end``."""

    group: int
    begin: int
    end: int


_MASKS = {"16": 0xFFFF, "32": 0xFFFF_FFFF, "64": 0xFFFF_FFFF_FFFF_FFFF}


class _Block:
    """One block's integer registers, a value a thread; what is not computed with is not kept."""

    def __init__(self, threads: int, parameters: Sequence[int]) -> None:
        self.tid = np.arange(threads, dtype=np.int64)
        self.parameters = parameters
        self.values: dict[str, Any] = {}

    def get(self, text: str) -> Any:
        if text.startswith("%tid.x"):
            return self.tid
        if text.startswith("%"):
            return self.values.get(text, np.int64(0))
        try:
            return np.int64(int(text, 0))
        except ValueError:  # a symbol, the start of shared memory among them, or a float
            return np.int64(0)

    def address(self, text: str) -> Any:
        parts = [part.strip() for part in text.strip("[] ").split("+")]
        return sum((self.get(part) for part in parts), np.int64(0)) + 0 * self.tid

    def run(self, op: str, operands: list[str]) -> None:
        """Computes what addresses, loops and descriptors are made of."""
        name, _, kind = op.partition(".")
        suffix = op.rpartition(".")[2]
        if not suffix or suffix[0] not in "busp" or name in ("st", "red", "atom"):
            return
        if op.startswith("ld.param"):
            number = int(operands[1].strip("[]").rpartition("_")[2])
            self.values[operands[0]] = np.int64(self.parameters[number])
            return
        if op.startswith("shfl.sync.idx"):
            lane = self.get(operands[2])
            value = self.get(operands[1]) + 0 * self.tid
            self.values[operands[0].partition("|")[0]] = value[self.tid // 32 * 32 + lane]
            return
        a, b, c = ([self.get(one) for one in operands[1:4]] + [np.int64(0)] * 3)[:3]
        with np.errstate(over="ignore"):
            value = self._value(name, kind, a, b, c)
        if value is None:
            return
        bits = suffix[1:] if ".wide" not in op else "64"
        if bits in ("16", "32"):  # as two's complement of that width
            value = (value & _MASKS[bits]).astype(np.int64) if hasattr(value, "astype") else value
            half = 1 << (int(bits) - 1)
            value = np.where(value >= half, value - 2 * half, value)
        self.values[operands[0]] = value

    @staticmethod
    def _value(name: str, kind: str, a: Any, b: Any, c: Any) -> Any:
        unsigned = kind.rpartition(".")[2].startswith("u") or name in ("bfe", "shr")
        if name == "cvt" and kind.endswith(".u32"):
            return a & _MASKS["32"]
        if name == "bfe":
            taken = (a >> b) & ((1 << int(c)) - 1)
            signed = kind.startswith("s")
            return (
                np.where(taken >> (int(c) - 1) & 1, taken - (1 << int(c)), taken)
                if signed
                else taken
            )
        if name == "shr" and unsigned and not kind.startswith("s"):
            return (a.astype(np.uint64) & np.uint64(_MASKS[kind[1:]])).astype(np.int64) >> b
        compare = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}
        simple = {
            "mov": lambda: a,
            "cvt": lambda: a,
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "mul": lambda: a * b,
            "mad": lambda: a * b + c,
            "shl": lambda: a << b,
            "shr": lambda: a >> b,
            "and": lambda: a & b,
            "or": lambda: a | b,
            "xor": lambda: a ^ b,
            "neg": lambda: -a,
            "min": lambda: np.minimum(a, b),
            "max": lambda: np.maximum(a, b),
            "div": lambda: a // np.where(b == 0, 1, b),
            "rem": lambda: a % np.where(b == 0, 1, b),
            "selp": lambda: np.where(c, a, b),
            "setp": lambda: compare[kind.partition(".")[0]],
        }
        return simple[name]() if name in simple else None


def _region(descriptor: int, count: int, transposed: bool) -> tuple[int, int]:
    """Bytes that a matrix descriptor stands for: ``count`` rows, or columns, by 16 of 2 bytes.

    Rounded up to whole groups of 8 rows, as the swizzle permutes within them.
    """
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    width = {1: 128, 2: 64, 3: 32}[descriptor >> 62 & 3]
    begin = start // (8 * width) * (8 * width)
    if not transposed:
        return begin, begin + (max(count // 8, 1) - 1) * stride + 8 * width
    chunks = max(2 * count // width, 1)
    return begin, begin + (chunks - 1) * max(leading, stride) + 16 * width


def overwritten(ptx: str, warps: int, parameters: Sequence[int]) -> list[str]:
    """What writes over shared memory that another group's ``wgmma`` may still read.

    A group of four warps waits for its own products only (triton-lang/triton#11047). So from the
    issue of a ``wgmma`` to the first barrier behind its wait nothing may write what it reads, but
    its own group behind the wait. Addresses are computed, for the first block and these parameters
    (0 for pointers).
    """
    code = rows(ptx)
    labels = {row.label: at for at, row in enumerate(code) if row.label}
    block = _Block(32 * warps, [*parameters, 0, 0])
    reads: list[tuple[_Read, list[bool]]] = []  # and whether it was waited for
    problems: dict[str, None] = {}
    at = 0
    while at < len(code):
        row, at = code[at], at + 1
        if row.guard and row.op.startswith("bra"):
            taken = bool(np.asarray(block.get(row.guard[1])).flat[0]) != (row.guard[0] == "!")
            at = labels[row.operands[-1]] if taken else at
        elif row.op.startswith("bra"):
            at = labels[row.operands[-1]]
        elif row.op.startswith("wgmma.mma"):
            m, n = map(int, re.search(r"m(\d+)n(\d+)", row.op).groups())  # type: ignore[union-attr]
            flags = [one for one in row.operands[3:] if one in ("0", "1")][-2:]
            for place, count in ((1, m), (2, n)):
                if row.operands[place].startswith("{"):
                    continue
                each = block.get(row.operands[place]) + 0 * block.tid
                for group in range(warps // 4):
                    whole = int(each[128 * group]) & _MASKS["64"]
                    region = _region(whole, count, flags[place - 1] == "1")
                    reads.append((_Read(group, *region), [False]))
        elif row.op.startswith("wgmma.wait"):
            for _, waited in reads:
                waited[0] |= row.operands[0] == "0"
        elif row.op.startswith("bar"):
            reads = [one for one in reads if not one[1][0]]
        elif re.match(r"st\.shared|stmatrix|cp\.async\.c[ag]", row.op):
            size = int(row.operands[2], 0) if row.op.startswith("cp") else 16
            if row.op.startswith("st.shared"):
                parts = re.search(r"(?:v(\d)\.)?b(\d+)$", row.op)
                size = int(parts[1] or 1) * int(parts[2]) // 8 if parts else 16
            to = block.address(row.operands[0])
            for read, waited in reads:
                own = block.tid // 128 == read.group
                hit = (to < read.end) & (to + size > read.begin) & ~(own & waited[0])
                if hit.any():
                    problems[f"{row.op} over what group {read.group} reads"] = None
        else:
            block.run(row.op, row.operands)
    return list(problems)
