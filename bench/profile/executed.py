"""How often each block of SASS is executed, from what the PTX machine counted.

ptxas moves, unrolls, folds and predicates; but each instruction of SASS names the one of the PTX
that it is from (``parse.numbered``), and a product, an access, a shuffle or a barrier is one in
both codes. So the blocks' counts are the numbers that fit these three facts:

- *flow*: warps that enter a block leave it. They part only where lanes do (BSSY), and those come
  together again (BSYNC);
- *anchors*: of each PTX instruction, the bytes loaded, stored and copied, the tensor operations,
  shuffles, barriers and exponentials come out as often as the machine counted them;
- *visits*: where a PTX instruction is a single one of SASS, its block is executed as often as it.

That is a linear program: the least number of instructions, plus a high price for each anchor
that does not come out. An unrolled loop and its remainder come out right by it: they share their
anchors, and the unrolled one needs fewer instructions. What a guard turns off may be executed less
often than its block. An unrolled loop without any anchor would be counted once. Its float32
arithmetic, which ptxas may fuse in pairs but not leave out, keeps that from happening, at a low
price, as do its divisions and roots; a loop that has none of these goes round as often as its PTX.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import highspy
import networkx as nx  # type: ignore[import-untyped]

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.launches import Counting
from tests.ptx_on_cpu.parse import Kernel, Row


@dataclass(frozen=True)
class Loop:
    """Of the PTX: its instructions' numbers, its rounds for each time that it is reached, its
    rows."""

    numbers: frozenset[int]
    rounds: float
    length: int


@dataclass(frozen=True)
class Wanted:
    """What the machine counted, a warp.

    Attributes:
        anchors: (source line, what, number of the instruction) → how much of it. To a ``wgmma``
            ptxas gives neither.
        loops: of the PTX.
        visits: of each of its instructions.
        partings: of lanes.
    """

    anchors: dict[tuple[str, str, int], float]
    loops: list[Loop]
    visits: dict[int, float]
    partings: float


PRICE, VISIT_PRICE, LOW_PRICE, PARTING = 1000.0, 400.0, 100.0, 100.0
"""Of an anchor, a visit, float32 arithmetic, and lanes that part; an instruction has price 1. A
visit costs more than a round of the project's longest loop without anchors (Philox, 291)."""

PLACED = ("division", "root")
"""Float32's, which have a guess by the same instruction as integers' elsewhere."""

LOW = ("float32", *PLACED)
"""Anchors of a low price, which may be executed more often: ptxas fuses arithmetic in pairs,
and may divide integers by the same guess."""

_ANCHORS = {
    "load": (r"(ld\.global|cp\.async\.c[ag])\..*", r"(LDG?|LDGSTS)\b.*"),
    "store": (r"st\.global\..*", r"STG?\b.*"),
    "shared load": (r"ld\.shared\..*", r"LDS\b.*"),
    "shared store": (r"st\.shared\..*", r"STS\b.*"),
    "matrices": (r"(ld|st)matrix\..*", r"(LD|ST)SM\b.*"),
    "tensor": (r"(mma|wgmma\.(registers|shared))\..*", r"\w+MMA\b.*"),
    "barrier": (r"bar", r"BAR\..*SYNC.*"),
    "shuffle": (r"shfl\..*", r"SHFL\b.*"),
    "reduction": (r"redux\..*", r"REDUX\b.*"),
    "atomic": (r"atom\..*", r"(ATOM[GS]?|REDG?)\b.*"),
    "MUFU.EX2": (r"ex2\..*", r"MUFU\.EX2"),
    "MUFU.LG2": (r"lg2\..*", r"MUFU\.LG2"),
    "float32": (r"(fma|add|sub|mul)\b.*\.f32", r"F(FMA|ADD|MUL)\b.*"),
    "division": (r"(div|rcp)\b.*\.f32", r"MUFU\.RCP"),
    "root": (r"r?sqrt\b.*\.f32", r"MUFU\.(RSQ|SQRT)"),
}
"""In PTX and in SASS."""


@cache
def _named(name: str, sass: bool) -> str:
    return next((what for what, one in _ANCHORS.items() if re.fullmatch(one[sass], name)), "")


def anchor_of(one: Row | Instruction) -> tuple[str, float]:
    """An instruction's anchor ('' if none), and how much of that it is: in 16 bytes a lane, four
    matrices, products of 4,096 operations; else 1."""
    if isinstance(one, Instruction):
        what, products = _named(one.opcode, True), one.flops / 4096
    else:
        what, products = _named(one.name, False), 1.0
    if what.endswith(("load", "store")):
        return what, one.bytes / 16
    if what == "matrices":
        return what, one.matrices / 4
    return what, products if what == "tensor" else 1.0


def wanted(kernel: Kernel, counting: Counting, warps: int) -> Wanted:
    """What the machine counted, in ``warps`` warps."""
    visits = counting.rows["visits"] / warps
    anchors: dict[tuple[str, str, int], float] = defaultdict(float)
    for one, times in zip(kernel.rows, visits, strict=True):
        what, amount = anchor_of(one)
        place = ("", what, 0) if one.name.startswith("wgmma") else (one.source, what, one.number)
        if what:
            anchors[place] += amount * times
    partings = counting.rows["partings"].sum() / warps
    visited = {one.number: float(times) for one, times in zip(kernel.rows, visits, strict=True)}
    return Wanted(dict(anchors), list(_loops(kernel, counting)), visited, float(partings))


def _loops(kernel: Kernel, counting: Counting) -> Iterator[Loop]:
    visits, jumps = counting.rows["visits"], counting.rows["jumps"]
    # How often a warp went on behind a row; one whose lanes part goes both ways.
    stayed = visits - jumps + counting.rows["partings"]
    following: list[list[int]] = []
    for at, row in enumerate(kernel.rows):
        to = [at + 1] if row.name not in ("bra", "ret") or row.guard else []
        following.append([*to, row.numbers[0]] if row.name == "bra" else to)
    for head, body in loops(following).items():
        back = 0
        for at in body:
            if head in following[at]:
                row = kernel.rows[at]
                jumped = row.name == "bra" and row.numbers[0] == head
                back += jumps[at] if jumped else stayed[at]
        if visits[head]:
            own = frozenset(kernel.rows[at].number for at in body)
            yield Loop(own, float(visits[head] / max(visits[head] - back, 1)), len(body))


def graph(following: Sequence[Sequence[int]]) -> nx.DiGraph:
    """What is reached from 0."""
    whole = nx.DiGraph((at, to) for at, each in enumerate(following) for to in each)
    whole.add_node(0)
    return whole.subgraph([0, *nx.descendants(whole, 0)]).copy()


def loops(following: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """The natural loops of a graph that starts at 0: head → all that is in the loop."""
    reached, path = graph(following), set()
    bodies: dict[int, set[int]] = {}
    for tail, head, kind in nx.dfs_labeled_edges(reached, 0):
        if kind == "forward":
            path.add(head)
        elif kind == "reverse":
            path.discard(head)
        elif head in path:
            others = nx.restricted_view(reached, [head] if tail != head else [], [])
            inside = nx.ancestors(others, tail) if tail != head else set()
            bodies.setdefault(head, {head}).update(inside, [tail])
    return bodies


@dataclass(frozen=True)
class Executed:
    """How often a warp executes each block, and the share of the anchors that did not come out."""

    times: list[float]
    unmatched: float


@dataclass
class _Anchor:
    """Of a source line: what the PTX had, how much of that may be missing, and what of it each
    block has; whether a guard is before that."""

    wanted: float = 0.0
    gone: float = 0.0
    held: list[tuple[int, float, bool]] = field(default_factory=list)


def executed(blocks: list[Block], wanted: Wanted) -> Executed:
    """Solves for the counts."""
    problem = _Problem(blocks, wanted)
    anchors: dict[tuple[str, str], _Anchor] = defaultdict(_Anchor)
    for at in problem.count:
        for one in blocks[at].instructions:
            what, amount = anchor_of(one)
            if what:
                anchors[one.source, what].held.append((at, amount, one.guarded))
    # What ptxas left none of was done at once with something else, or not at all.
    kept = {one.number for at in problem.count for one in blocks[at].instructions}
    for (source, what, number), amount in wanted.anchors.items():
        if amount:
            anchors[source, what].wanted += amount
            anchors[source, what].gone += amount * (number not in kept)
    # What only one of the two has in a place may be in another in the other: ptxas makes one of two
    # branches' same instructions, and names one of them.
    for key in [key for key, one in anchors.items() if bool(one.held) != bool(one.wanted)]:
        orphan, what = anchors.pop(key), key[1]
        if what not in PLACED:
            anchors["", what].held += orphan.held
            anchors["", what].wanted += orphan.wanted
            anchors["", what].gone += orphan.gone
    for (_, what), one in anchors.items():
        if one.held:
            problem.hold(what, one)
    problem.visit()
    times = problem.solved()
    missed = total = 0.0
    for one in (one for (_, what), one in anchors.items() if what not in LOW):
        least = sum(n * times[at] for at, n, guarded in one.held if not guarded)
        most = sum(n * times[at] for at, n, _ in one.held)
        total += one.wanted
        missed += max(one.wanted - one.gone - most, least - one.wanted, 0.0)
    return Executed(times, missed / total if total else 0.0)


class _Problem:
    """The linear program.

    Attributes:
        count: how often each block is executed that can be reached.
        edges: how often one block follows another.
    """

    def __init__(self, blocks: list[Block], wanted: Wanted) -> None:
        self.blocks, self.wanted = blocks, wanted
        self.program = highspy.Highs()
        self.program.silent()
        following = [
            [*block.next, *([] if block.call is None else [block.call])] for block in blocks
        ]
        reached = sorted(graph(following))
        self.count = {at: self._any(len(blocks[at].instructions)) for at in reached}
        self.edges = {(at, to): self._any() for at in reached for to in blocks[at].next}
        self._flow()
        self._enter()

    def _any(self, price: float = 0.0) -> Any:
        """A number from 0 on, at a price."""
        return self.program.addVariable(obj=price)

    def _off(self, price: float) -> Any:
        """A number of either sign."""
        return self._any(price) - self._any(price)

    def _sum(self, *terms: Any) -> Any:
        return self.program.qsum(terms) + 0.0

    def _flow(self) -> None:
        """Warps that enter a block leave it, but where lanes part or join."""
        may_part, holds = self.wanted.partings > 0, self.program.addConstr
        into: dict[int, list[Any]] = defaultdict(list)
        parted, joined = list[Any](), list[Any]()
        for (_, to), edge in self.edges.items():
            into[to].append(edge)
        for at, count in self.count.items():
            block = self.blocks[at]
            if block.call is not None:
                into[block.call].append(count)
            if may_part and block.joins:
                joined.append(self._any(PARTING))
                into[at].append(-1.0 * joined[-1])
            leaving = [self.edges[at, to] for to in block.next]
            if may_part and len(leaving) > 1:
                parted.append(self._any(PARTING))
                for edge in leaving:  # a warp that parts takes both ways
                    holds(edge >= parted[-1])
                leaving.append(-1.0 * parted[-1])
            if block.exits or block.returns:
                leaving.append(self._any())
            holds(self._sum(*leaving) == count)
        for at, count in self.count.items():
            holds(self._sum(*into[at]) + float(at == 0) == count)
        if may_part:
            holds(self._sum(*parted) == self._sum(*joined))
            holds(self._sum(*parted) <= self.wanted.partings)

    def _enter(self) -> None:
        """A loop is entered at least as often as the PTX's rounds ask for.

        Without this a loop's blocks could be counted with nobody entering it. One without anchors
        that is not unrolled goes round as often, too.
        """
        wanted = self.wanted
        for head, body in loops([block.next for block in self.blocks]).items():
            if not wanted.loops:
                return
            held = [one for at in body for one in self.blocks[at].instructions]
            own = {one.number for one in held}
            # Of equally alike loops, as an unrolled one and its remainder, the one that goes on.
            like = max(
                wanted.loops,
                key=lambda of: (len(own & of.numbers) / len(own | of.numbers), of.rounds),
            )
            unknown = not any(anchor_of(one)[0] for one in held) and len(held) < 2 * like.length
            into = [(at in body, edge) for (at, to), edge in self.edges.items() if to == head]
            rounds = [edge * (1.0 if again else 1.0 - like.rounds) for again, edge in into]
            at_start = (1.0 - like.rounds) * (head == 0)
            self.program.addConstr(
                self._sum(*rounds, self._any(VISIT_PRICE * unknown)) + at_start == 0
            )

    def hold(self, what: str, anchor: _Anchor) -> None:
        """Adds an anchor; how often a guard lets its instruction run is free."""
        terms = [amount * self.count[at] for at, amount, guard in anchor.held if not guard]
        guarded: dict[int, float] = defaultdict(float)
        for at, amount, guard in anchor.held:
            guarded[at] += amount * guard
        for at, amount in guarded.items():
            if amount:
                terms.append(self._any())
                self.program.addConstr(terms[-1] <= amount * self.count[at])
        if anchor.gone:
            terms.append(self.program.addVariable(ub=anchor.gone))
        if what in LOW:
            least = anchor.wanted / (2 if what == "float32" else 1)
            self.program.addConstr(self._sum(*terms, self._any(LOW_PRICE)) >= least)
        else:
            self.program.addConstr(self._sum(*terms, self._off(PRICE)) == anchor.wanted)

    def visit(self) -> None:
        """Adds the blocks' visits, at a low price, as ptxas may move a single instruction.

        A block has those of its instructions that are the only ones of theirs in the PTX. A block
        none of whose instructions were visited is not executed.
        """
        known = self.wanted.visits
        blocks = {at: [one.number for one in self.blocks[at].instructions] for at in self.count}
        copies = Counter(number for numbers in blocks.values() for number in numbers)
        for at, numbers in blocks.items():
            visits = [known[number] for number in numbers if number in known]
            lone = [known[n] for n in numbers if n in known and copies[n] == 1]
            if lone or (visits and not any(visits)):
                times = statistics.median(lone or [0.0])
                self.program.addConstr(self.count[at] + self._off(VISIT_PRICE) == times)

    def solved(self) -> list[float]:
        """How often each block is executed.

        Raises:
            ArithmeticError: no solution was found.
        """
        self.program.minimize()
        if self.program.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise ArithmeticError("the executed blocks' linear program has no solution")
        times = self.program.vals(self.count)
        return [max(float(times.get(at, 0.0)), 0.0) for at in range(len(self.blocks))]
