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
from typing import Any, TypeAlias

import highspy
import networkx as nx  # type: ignore[import-untyped]

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.launches import Counting
from tests.ptx_on_cpu.parse import Kernel, Row

Place: TypeAlias = int | str
"""The number of an instruction in the PTX; across cards, whose PTX differs, a source line."""


@dataclass(frozen=True)
class Loop:
    """Of the PTX: its places, its rounds for each time that it is reached, its instructions."""

    places: frozenset[Place]
    rounds: float
    length: int


@dataclass(frozen=True)
class Wanted:
    """What the machine counted, a warp.

    Attributes:
        anchors: (source line, what, place) → how much of it.
        loops: of the PTX.
        visits: of each of its instructions; none across cards.
        partings: of lanes.
        across: another card's PTX ran: only anchors that both have are kept to, wherever they are.
    """

    anchors: dict[tuple[str, str, Place], float]
    loops: list[Loop]
    visits: dict[Place, float]
    partings: float
    across: bool

    def place(self, one: Instruction) -> Place:
        """Of an instruction of SASS."""
        return one.source if self.across else one.number


PRICE, VISIT_PRICE, LOW_PRICE, PARTING = 1000.0, 400.0, 100.0, 100.0
"""Of an anchor, a visit, float32 arithmetic, and lanes that part; an instruction has price 1. A
visit costs more than a round of the project's longest loop without anchors (Philox, 291)."""

ACROSS = ("tensor", "load", "store", "MUFU.EX2", "MUFU.LG2")
"""Anchors that the same kernel has on another card, where its layouts and barriers differ."""

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
    "tensor": (r"mma\..*", r"\w+MMA\b.*"),
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


def wanted(kernel: Kernel, counting: Counting, warps: int, across: bool = False) -> Wanted:
    """What the machine counted, in ``warps`` warps; ``across``: of another card's code."""
    places: list[Place] = [one.source if across else one.number for one in kernel.rows]
    visits = counting.rows["visits"] / warps
    anchors: dict[tuple[str, str, Place], float] = defaultdict(float)
    for one, times, place in zip(kernel.rows, visits, places, strict=True):
        what, amount = anchor_of(one)
        if what:
            anchors["" if across else one.source, what, place] += amount * times
    partings = counting.rows["partings"].sum() / warps
    visited = {} if across else dict(zip(places, map(float, visits), strict=True))
    loops_ = list(_loops(kernel, counting, places))
    return Wanted(dict(anchors), loops_, visited, float(partings), across)


def _loops(kernel: Kernel, counting: Counting, places: list[Place]) -> Iterator[Loop]:
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
            own = frozenset(places[at] for at in body)
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
    problem, across = _Problem(blocks, wanted), wanted.across
    anchors: dict[tuple[str, str], _Anchor] = defaultdict(_Anchor)
    for at in problem.count:
        for one in blocks[at].instructions:
            what, amount = anchor_of(one)
            if what:
                key = ("" if across else one.source, what)
                anchors[key].held.append((at, amount, one.guarded))
    # What ptxas left none of was done at once with something else, or not at all.
    kept = {wanted.place(one) for at in problem.count for one in blocks[at].instructions}
    for (source, what, place), amount in wanted.anchors.items():
        if amount:
            anchors[source, what].wanted += amount
            anchors[source, what].gone += amount * (not across and place not in kept)
    # What only one of the two has in a place may be in another in the other: ptxas makes one of two
    # branches' same instructions, and names one of them.
    for key in [key for key, one in anchors.items() if bool(one.held) != bool(one.wanted)]:
        orphan, what = anchors.pop(key), key[1]
        if what not in PLACED:
            anchors["", what].held += orphan.held
            anchors["", what].wanted += orphan.wanted
            anchors["", what].gone += orphan.gone
    asked = [(what, one) for (_, what), one in anchors.items() if not across or what in ACROSS]
    for what, one in asked:
        if one.held:
            problem.hold(what, one)
    problem.visit()
    times = problem.solved()
    missed = total = 0.0
    for one in (one for what, one in asked if what not in LOW):
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
            own = set(map(wanted.place, held))
            # Of equally alike loops, as an unrolled one and its remainder, the one that goes on.
            like = max(
                wanted.loops,
                key=lambda of: (len(own & of.places) / len(own | of.places), of.rounds),
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
        wanted = self.wanted
        blocks = {at: list(map(wanted.place, self.blocks[at].instructions)) for at in self.count}
        copies = Counter(place for places in blocks.values() for place in places)
        for at, places in blocks.items():
            visits = [wanted.visits[place] for place in places if place in wanted.visits]
            lone = [wanted.visits[p] for p in places if p in wanted.visits and copies[p] == 1]
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
