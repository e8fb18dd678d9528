"""How often each block of SASS is executed, from what the PTX machine counted.

ptxas moves, unrolls, folds and predicates; but each instruction of SASS names the one of the PTX
that it is from (``parse.numbered``), and how often warps came to that is known. So the blocks'
counts are the numbers that fit these two facts:

- *flow*: warps that enter a block leave it. They part only where lanes do (BSSY), and those come
  together again (BSYNC);
- *visits*: an instruction of the PTX was executed as often as it was visited: by the one block that
  has it, or by those that unrolling gave copies of it, together.

The second does not hold everywhere: ptxas computes again what is cheap, names one instruction for
what it made of two, and counts rounds once for several of them. So this is a linear program: the
least sum of differences from the visits, and of equal ones the fewest instructions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import highspy
import networkx as nx  # type: ignore[import-untyped]

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.launches import Counting
from tests.ptx_on_cpu.parse import Kernel, Row

DIFFERENCE, NEVER_REPEATED, TURNED_OFF, PARTING, INSTRUCTION = 1.0, 3.0, 0.7, 0.1, 1e-3
"""Prices: of a difference from the visits, shared out over the blocks that have the instruction; of
one of memory, products and barriers, which ptxas does not do again elsewhere; of an instruction
that a guard turns off; of lanes that part; of any instruction."""

_ANCHORS = {
    "load": (r"(ld\.global|cp\.async\.c[ag])\..*", r"(LDG?|LDGSTS)\b.*"),
    "store": (r"st\.global\..*", r"STG?\b.*"),
    "shared load": (r"ld\.shared\..*", r"LDS\b.*"),
    "tensor": (r"(mma|wgmma\.(registers|shared))\..*", r"\w+MMA\b.*"),
    "barrier": (r"bar", r"BAR\..*SYNC.*"),
    "atomic": (r"atom\..*", r"(ATOM[GS]?|REDG?)\b.*"),
    "float32": (r"(fma|add|sub|mul)\b.*\.f32", r"F(FMA|ADD|MUL)\b.*"),
}
"""In PTX and in SASS."""


@cache
def _named(name: str, sass: bool) -> str:
    return next((what for what, one in _ANCHORS.items() if re.fullmatch(one[sass], name)), "")


def anchor_of(one: Row | Instruction) -> tuple[str, float]:
    """What an instruction is that both codes have alike ('' if it is not), and how much of that: in
    16 bytes a lane, products of 4,096 operations; else 1."""
    if isinstance(one, Instruction):
        what, products = _named(one.opcode, True), one.flops / 4096
    else:
        what, products = _named(one.name, False), 1.0
    if what.endswith(("load", "store")):
        return what, one.bytes / 16
    return what, products if what == "tensor" else 1.0


@dataclass(frozen=True)
class Wanted:
    """What the machine counted, a warp.

    Attributes:
        visits: of each instruction of the PTX, by its number.
        anchors: (what, number) → how much of it.
        partings: of lanes.
    """

    visits: dict[int, float]
    anchors: dict[tuple[str, int], float]
    partings: float


def wanted(kernel: Kernel, counting: Counting, warps: int) -> Wanted:
    """What the machine counted, in ``warps`` warps."""
    visits: dict[int, float] = {}
    anchors: dict[tuple[str, int], float] = defaultdict(float)
    for one, times in zip(kernel.rows, counting.rows["visits"] / warps, strict=True):
        visits[one.number] = float(times)
        what, amount = anchor_of(one)
        if what:
            # To a wgmma ptxas gives no number.
            anchors[what, one.number * (not one.name.startswith("wgmma"))] += amount * times
    return Wanted(visits, dict(anchors), float(counting.rows["partings"].sum() / warps))


def graph(following: Sequence[Sequence[int]]) -> nx.DiGraph:
    """What is reached from 0."""
    whole = nx.DiGraph((at, to) for at, each in enumerate(following) for to in each)
    whole.add_node(0)
    return whole.subgraph([0, *nx.descendants(whole, 0)]).copy()


@dataclass(frozen=True)
class Executed:
    """How often a warp executes each block, and the share of the anchors that did not come out."""

    times: list[float]
    unmatched: float


def executed(blocks: list[Block], wanted: Wanted) -> Executed:
    """Solves for the counts.

    What the first block of a number does not have is another way through its instruction, as the
    slow one of a division, and is left out unless both codes have it alike.

    How many instructions of SASS one of the PTX is at a time follows from their amounts, where both
    codes have them alike. Elsewhere it is the fewest that a block has, in which a loop may be
    unrolled, as those with amounts tell.

    Raises:
        ArithmeticError: no solution was found.
    """
    problem = _Problem(blocks, wanted.partings)
    kept = {0, *(one.number for at in problem.count for one in blocks[at].instructions)}
    merged = {what for what, number in wanted.anchors if number not in kept}
    unrolled: dict[int, float] = defaultdict(lambda: 1.0)  # block → rounds of a loop that it has
    anchors_first = sorted(_copies(blocks, problem.count), key=lambda of: not anchor_of(of[0])[0])
    for one, copies, in_first in anchors_first:
        what, amount = anchor_of(one)
        visits, had = wanted.visits.get(one.number), wanted.anchors.get((what, one.number))
        if visits is None or not (had or in_first):
            continue
        once = min(max(1.0, number / unrolled[at]) for (at, _), number in copies.items())
        if had:
            once = max(1.0, had / visits / amount)
            for (at, _), number in copies.items():
                unrolled[at] = max(unrolled[at], number / once)
        never_repeated = one.pipe in ("memory", "tensor") or one.base == "BAR"
        price = NEVER_REPEATED if never_repeated else DIFFERENCE / len(copies) / once
        problem.fit(copies, once, visits, price, 0.0 if what in merged else price)
    times = problem.solved()
    asked: dict[str, float] = defaultdict(float)
    for (what, number), amount in wanted.anchors.items():
        if what != "float32":  # which ptxas fuses
            asked[what] += amount * (number in kept)
    most: dict[str, float] = defaultdict(float)
    least: dict[str, float] = defaultdict(float)
    for block, count in zip(blocks, times, strict=True):
        for one in block.instructions:
            what, amount = anchor_of(one)
            most[what] += amount * count
            least[what] += amount * count * (not one.guarded and what not in merged)
    missed = sum(
        max(amount - most[what], least[what] - amount, 0.0) for what, amount in asked.items()
    )
    return Executed(times, missed / sum(asked.values()) if missed else 0.0)


def _copies(
    blocks: list[Block], reached: Iterable[int]
) -> Iterator[tuple[Instruction, Counter[tuple[int, bool]], bool]]:
    """Instructions of SASS; how many of the same name and number stand in which block, behind a
    guard or not; whether the first block of their number has one."""
    copies: dict[tuple[int, str], Counter[tuple[int, bool]]] = defaultdict(Counter)
    examples: dict[tuple[int, str], Instruction] = {}
    first: dict[int, int] = {}
    for at in reached:
        for one in blocks[at].instructions:
            copies[one.number, one.opcode][at, one.guarded] += 1
            examples[one.number, one.opcode] = one
            first.setdefault(one.number, at)
    for key, held in copies.items():
        yield examples[key], held, first[key[0]] in (at for at, _ in held)


class _Problem:
    """The linear program.

    Attributes:
        count: how often each block is executed that can be reached.
    """

    def __init__(self, blocks: list[Block], partings: float) -> None:
        self.blocks = blocks
        self.program = highspy.Highs()
        self.program.silent()
        following = [
            [*block.next, *([] if block.call is None else [block.call])] for block in blocks
        ]
        reached = sorted(graph(following))
        self.count = {at: self._any(INSTRUCTION * len(blocks[at].instructions)) for at in reached}
        self._flow(partings)

    def _any(self, price: float = 0.0) -> Any:
        """A number from 0 on, at a price."""
        return self.program.addVariable(obj=price)

    def _sum(self, *terms: Any) -> Any:
        return self.program.qsum(terms) + 0.0

    def _flow(self, partings: float) -> None:
        """Warps that enter a block leave it, but where lanes part or join."""
        holds = self.program.addConstr
        into: dict[int, list[Any]] = defaultdict(list)
        parted, joined = list[Any](), list[Any]()
        edges = {(at, to): self._any() for at in self.count for to in self.blocks[at].next}
        for (_, to), edge in edges.items():
            into[to].append(edge)
        for at, count in self.count.items():
            block = self.blocks[at]
            if block.call is not None:
                into[block.call].append(count)
            if partings and block.joins:
                joined.append(self._any(PARTING))
                into[at].append(-1.0 * joined[-1])
            leaving = [edges[at, to] for to in block.next]
            if partings and len(leaving) > 1:
                parted.append(self._any(PARTING))
                for edge in leaving:  # a warp that parts takes both ways
                    holds(edge >= parted[-1])
                leaving.append(-1.0 * parted[-1])
            if block.exits:
                leaving.append(self._any())
            holds(self._sum(*leaving) == count)
        for at, count in self.count.items():
            holds(self._sum(*into[at]) + float(at == 0) == count)
        if partings:
            holds(self._sum(*parted) == self._sum(*joined))
            holds(self._sum(*parted) <= partings)

    def fit(
        self,
        copies: Counter[tuple[int, bool]],
        once: float,
        visits: float,
        missing: float,
        too_many: float,
    ) -> None:
        """Asks for the visits of an instruction, ``once`` of whose copies are one of it, at prices
        of each that is missing or too many."""
        terms = [self._any(missing), -1.0 * self._any(too_many)]
        for (at, guarded), number in copies.items():
            terms.append(number / once * self.count[at])
            if guarded:
                off = self._any(TURNED_OFF)
                self.program.addConstr(off <= terms[-1])
                terms.append(-1.0 * off)
        self.program.addConstr(self._sum(*terms) == visits)

    def solved(self) -> list[float]:
        """How often each block is executed."""
        self.program.minimize()
        if self.program.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise ArithmeticError("the executed blocks' linear program has no solution")
        times = self.program.vals(self.count)
        return [max(float(times.get(at, 0.0)), 0.0) for at in range(len(self.blocks))]
