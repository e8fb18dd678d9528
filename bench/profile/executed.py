"""How often each block of SASS is executed, from what the PTX machine counted.

ptxas moves, unrolls, folds and predicates; but each instruction of SASS names the one of the PTX
that it is from (``parse.numbered``), and how often warps came to that is known. So the blocks'
counts are the numbers that fit these two facts:

- *flow*: warps that enter a block leave it. They part where lanes do, and those come together again
  (BSYNC);
- *visits*: an instruction of the PTX was executed as often as it was visited: by the one block that
  has it, or by those that unrolling gave copies of it, together.

The second does not hold everywhere: ptxas computes again what is cheap, names one instruction for
what it made of two, and counts rounds once for several of them. So this is a linear program: the
least sum of differences from the visits, and of equal ones the fewest instructions.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from typing import Any

import highspy
import networkx as nx  # type: ignore[import-untyped]

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.launches import Counting
from tests.ptx_on_cpu.parse import Kernel, Row

DIFFERENCE, NEVER_REPEATED, TURNED_OFF, PARTING, INSTRUCTION = 1.0, 3.0, 0.7, 0.1, 1e-3
"""Prices: of a difference from the visits, shared out over the blocks that have the instruction; of
one of memory, products and barriers, which ptxas does not do again elsewhere; of an instruction
that a guard turns off; of a difference from the partings; of any instruction."""

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
        partings: of lanes, at each branch where they part.
    """

    visits: dict[int, float]
    anchors: dict[tuple[str, int], float]
    partings: dict[int, float]


def wanted(kernel: Kernel, counting: Counting, warps: int) -> Wanted:
    """What the machine counted, in ``warps`` warps."""
    visits: dict[int, float] = {}
    anchors: dict[tuple[str, int], float] = defaultdict(float)
    partings: dict[int, float] = {}
    counted = (counting.rows[name] / warps for name in ("visits", "partings"))
    for one, times, parted in zip(kernel.rows, *counted, strict=True):
        visits[one.number] = float(times)
        if parted:
            partings[one.number] = float(parted)
        what, amount = anchor_of(one)
        if what:
            number = 0 if one.name.startswith("wgmma") else one.number  # ptxas gives those none
            anchors[what, number] += amount * times
    return Wanted(visits, dict(anchors), partings)


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

    For example, a loop of 25 rounds has the PTX's instructions 7, a load of 8 bytes, and 8, a sum.
    ptxas makes two loops of it: block 1 has four rounds (4 LDG.64 of number 7, 8 IADD3 of number 8,
    a branch), block 2 one round (1, 2, a branch) for what remains. Both codes say what a load
    moves, so a visit is one LDG.64, and block 1 has 4 / 1 rounds. Nothing says how many IADD3 a
    visit of the sum is: the fewest for a round in any block, min(8 / 4, 2 / 1) = 2. The equations

        4/1 · times₁ + 1/1 · times₂ + missing - too many = 25   (number 7)
        8/2 · times₁ + 2/2 · times₂ + missing - too many = 25   (number 8)

    have many solutions; times₁ = 6, times₂ = 1 executes the fewest instructions. The counter, to
    which block 1 adds once, is visited in each of its rounds all the same: it counts four times.

    Raises:
        ArithmeticError: no solution was found.
    """
    problem = _Problem(blocks, wanted.partings)
    groups = _groups(blocks, problem.count)
    numbers = {0, *(group.one.number for group in groups)}
    # Of these ptxas made one of several. Whose number that has says not how often it is executed.
    merged = {what for what, number in wanted.anchors if number not in numbers}
    # Of a loop whose instructions have so many visits, that a block has.
    rounds: dict[tuple[int, float], float] = defaultdict(lambda: 1.0)
    for group in sorted(groups, key=lambda group: not anchor_of(group.one)[0]):
        one, copies = group.one, group.copies
        what, amount = anchor_of(one)
        visits, asked = wanted.visits.get(one.number), wanted.anchors.get((what, one.number))
        if visits is None or not (asked or group.in_first_block):
            continue
        if asked:
            a_visit = max(1.0, asked / visits / amount)
            for (at, _), number in copies.items():
                rounds[at, visits] = max(rounds[at, visits], number / a_visit)
        else:
            a_visit = min(max(1.0, n / rounds[at, visits]) for (at, _), n in copies.items())
        never_repeated = one.pipe in ("memory", "tensor") or one.base == "BAR"
        price = NEVER_REPEATED if never_repeated else DIFFERENCE / len(copies) / a_visit
        each = {
            # A warp that comes less often than the block has rounds was not there.
            (at, guarded): max(
                number / a_visit, rounds[at, visits] * (rounds[at, visits] <= visits)
            )
            for (at, guarded), number in copies.items()
        }
        problem.fit(each, visits, price, 0.0 if what in merged else price)
    times = problem.solved()
    asked_of: dict[str, float] = defaultdict(float)
    for (what, number), amount in wanted.anchors.items():
        if number in numbers and what != "float32":  # which ptxas fuses
            asked_of[what] += amount
    most: dict[str, float] = defaultdict(float)  # were every guard on
    least: dict[str, float] = defaultdict(float)  # were every guard off
    for block, count in zip(blocks, times, strict=True):
        for one in block.instructions:
            what, amount = anchor_of(one)
            most[what] += amount * count
            least[what] += amount * count * (not one.guarded and what not in merged)
    missed = sum(
        max(amount - most[what], least[what] - amount, 0.0) for what, amount in asked_of.items()
    )
    return Executed(times, missed / sum(asked_of.values()) if missed else 0.0)


@dataclass
class _Group:
    """Instructions of SASS that are alike: of one number and one name.

    Attributes:
        one: any of them.
        in_first_block: whether the first block of their number has one. If not they are another way
            through its instruction, as the slow one of a division.
        copies: (block, whether behind a guard) → how many.
    """

    one: Instruction
    in_first_block: bool
    copies: Counter[tuple[int, bool]] = field(default_factory=Counter)


def _groups(blocks: list[Block], reached: Iterable[int]) -> list[_Group]:
    groups: dict[tuple[int, str], _Group] = {}
    first: dict[int, int] = {}  # number → the first block that has it
    for at in reached:
        for one in blocks[at].instructions:
            if one.base not in ("LDC", "ULDC"):  # which may stand far ahead of their use
                first.setdefault(one.number, at)
            in_first = first.get(one.number) == at
            group = groups.setdefault((one.number, one.opcode), _Group(one, in_first))
            group.copies[at, one.guarded] += 1
    return list(groups.values())


class _Problem:
    """The linear program.

    Attributes:
        count: how often each block is executed that can be reached.
    """

    def __init__(self, blocks: list[Block], partings: dict[int, float]) -> None:
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

    def _flow(self, partings: dict[int, float]) -> None:
        """Warps that enter a block leave it. One whose lanes part goes both ways, as two, until
        they join; so of each block

            entering = count = leaving - parted + joined + ended

        They part as often as at that branch of the PTX. Each lot then comes to the BSYNC by itself,
        and behind it they are as many as came to the BSSY that names it.
        """
        holds = self.program.addConstr
        entering: dict[int, list[Any]] = defaultdict(list)
        parted, joined = defaultdict[int, list[Any]](list), list[Any]()
        edges = {(at, to): self._any() for at in self.count for to in self.blocks[at].next}
        for (_, to), edge in edges.items():
            entering[to].append(edge)
        for at, count in self.count.items():
            block = self.blocks[at]
            if block.call is not None:
                entering[block.call].append(count)
            leaving = [edges[at, to] for to in block.next]
            if partings and len(leaving) > 1:
                both = self._any()
                for edge in leaving:
                    holds(edge >= both)
                parted[block.instructions[-1].number].append(both)
                leaving.append(-1.0 * both)
            elif partings and block.joins:
                begun = [self.count[one] for one in block.joins if one in self.count]
                holds(leaving[0] <= self._sum(*begun))
                joined.append(self._any())
                leaving.append(joined[-1])
            if block.exits:
                leaving.append(self._any())
            holds(self._sum(*leaving) == count)
        for at, count in self.count.items():
            holds(self._sum(*entering[at]) + float(at == 0) == count)
        if partings:
            holds(self._sum(*chain(*parted.values())) == self._sum(*joined))
        for number, each in parted.items():
            terms = [*each, self._any(PARTING), -1.0 * self._any(PARTING)]
            holds(self._sum(*terms) == partings.get(number, 0.0))

    def fit(
        self,
        each: dict[tuple[int, bool], float],
        visits: float,
        missing: float,
        too_many: float,
    ) -> None:
        """Asks for the visits of an instruction, of which each of the blocks makes so many, behind
        a guard or not, at prices of one that is missing or too many."""
        terms = [self._any(missing), -1.0 * self._any(too_many)]
        for (at, guarded), number in each.items():
            terms.append(number * self.count[at])
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
