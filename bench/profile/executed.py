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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.machine import Counting
from tests.ptx_on_cpu.parse import SPACES, Kernel

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

_SASS = {
    "LD": "load",
    "ST": "store",
    "LDG": "load",
    "LDGSTS": "load",
    "STG": "store",
    "LDS": "shared load",
    "STS": "shared store",
}
_GUESSES = {"MUFU.RCP": "division", "MUFU.RSQ": "root", "MUFU.SQRT": "root"}
_COUNTED = {"BAR": "barrier", "SHFL": "shuffle", "REDUX": "reduction", "ATOMS": "atomic"}
_COUNTED |= {"ATOMG": "atomic", "ATOM": "atomic", "RED": "atomic", "REDG": "atomic"}
_SPACE = {SPACES["global"]: "", SPACES["shared"]: "shared "}


def _of_sass(one: Instruction) -> tuple[str, float] | None:
    if one.base in _SASS:
        return _SASS[one.base], one.bytes / 16
    if one.base == "BAR" and "SYNC" not in one.opcode:
        return None
    if one.base in _COUNTED:
        return _COUNTED[one.base], 1.0
    if one.flops:
        return "tensor", one.flops / 4096
    if one.matrices:
        return "matrices", one.matrices / 4
    if one.opcode in ("MUFU.EX2", "MUFU.LG2"):
        return one.opcode, 1.0
    if one.opcode in _GUESSES:
        return _GUESSES[one.opcode], 1.0
    if one.base in ("FFMA", "FADD", "FMUL"):
        return "float32", 1.0
    return None


def _of_ptx(kernel: Kernel) -> Iterator[tuple[str, float]]:
    """Of each row its anchor ('' if none), and how much of that it is."""
    for row in kernel.rows:
        what, amount = "", 0.0
        numbers, name = row.numbers, row.name
        if name in ("ld", "st") and numbers[0] & 3 in _SPACE:
            what = _SPACE[numbers[0] & 3] + {"ld": "load", "st": "store"}[name]
            amount = numbers[2] * numbers[3] / 16
        elif name == "cp.async":
            what, amount = "load", numbers[2] / 16
        elif name.startswith("mma."):
            what, amount = "tensor", 1.0
        elif name.startswith(("ldmatrix", "stmatrix")):
            what, amount = "matrices", int(re.search(r"x(\d)", name)[1]) / 4  # type: ignore[index]
        elif name == "bar.sync":
            what, amount = "barrier", 1.0
        elif name.startswith(("ex2.", "lg2.")):
            what, amount = f"MUFU.{name[:3].upper()}", 1.0
        elif re.match(r"(fma|add|sub|mul)\b.*\.f32$", name):
            what, amount = "float32", 1.0
        elif match := re.match(r"(div|rcp|r?sqrt)\b.*\.f32$", name):
            what, amount = "root" if "sqrt" in match[1] else "division", 1.0
        else:
            kinds = {"shfl": "shuffle", "redux": "reduction", "atom": "atomic"}
            what = kinds.get(name.partition(".")[0], "")
            amount = float(bool(what))
        yield what, amount


def wanted(kernel: Kernel, counting: Counting, warps: int, across: bool = False) -> Wanted:
    """What the machine counted, in ``warps`` warps; ``across``: of another card's code."""
    places: list[Place] = [one.source if across else one.number for one in kernel.statements]
    visits = counting.rows["visits"] / warps
    anchors: dict[tuple[str, str, Place], float] = defaultdict(float)
    for one, (what, amount), times, place in zip(
        kernel.statements, _of_ptx(kernel), visits, places, strict=True
    ):
        if what:
            anchors["" if across else one.source, what, place] += amount * times
    partings = counting.rows["partings"].sum() / warps
    visited = {} if across else dict(zip(places, map(float, visits), strict=True))
    loops_ = list(_loops(kernel, counting, places))
    return Wanted(dict(anchors), loops_, visited, float(partings), across)


def _stayed(counting: Counting) -> np.ndarray:
    """Of each row, how often a warp went on behind it; one whose lanes part goes both ways."""
    rows = counting.rows
    return rows["visits"] - rows["jumps"] + rows["partings"]


def _loops(kernel: Kernel, counting: Counting, places: list[Place]) -> Iterator[Loop]:
    visits, jumps, stayed = counting.rows["visits"], counting.rows["jumps"], _stayed(counting)
    following: list[list[int]] = []
    for at, row in enumerate(kernel.rows):
        to = [at + 1] if row.name not in ("bra", "ret") or row.guard >= 0 else []
        following.append([*to, row.numbers[0]] if row.name == "bra" else to)
    for head, body in loops(following).items():
        back = 0
        for at in body:
            for way, then in enumerate(following[at]):
                if then == head:
                    jumped = way == len(following[at]) - 1 and kernel.rows[at].name == "bra"
                    back += jumps[at] if jumped else stayed[at]
        if visits[head]:
            own = frozenset(places[at] for at in body)
            yield Loop(own, float(visits[head] / max(visits[head] - back, 1)), len(body))


def loops(following: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """The natural loops of a graph that starts at 0: head → all that is in the loop."""
    before: dict[int, list[int]] = defaultdict(list)
    backs: list[tuple[int, int]] = []
    state = {0: "open"}
    stack = [(0, iter(following[0]))]
    while stack:
        at, left = stack[-1]
        to = next(left, None)
        if to is None:
            state[at] = "done"
            stack.pop()
            continue
        before[to].append(at)
        if state.get(to) == "open":
            backs.append((at, to))
        elif to not in state:
            state[to] = "open"
            stack.append((to, iter(following[to])))
    found: dict[int, set[int]] = {}
    for tail, head in backs:
        body, todo = found.setdefault(head, {head}), [tail]
        while todo:
            at = todo.pop()
            if at not in body:
                body.add(at)
                todo += before[at]
    return found


@dataclass(frozen=True)
class Executed:
    """How often a warp executes each block, and the share of the anchors that did not come out."""

    times: list[float]
    unmatched: float


def executed(blocks: list[Block], wanted: Wanted) -> Executed:
    """Solves for the counts."""
    problem, across = _Problem(blocks, wanted), wanted.across
    held: dict[tuple[str, str], list[tuple[int, float, bool]]] = defaultdict(list)
    for at in problem.reached:
        for one in blocks[at].instructions:
            anchor = _of_sass(one)
            if anchor:
                key = ("" if across else one.source, anchor[0])
                held[key].append((at, anchor[1], one.guarded))
    # What ptxas left none of was done at once with something else, or not at all.
    kept = {wanted.place(one) for at in problem.reached for one in blocks[at].instructions}
    goals: dict[tuple[str, str], float] = defaultdict(float)
    gone: dict[tuple[str, str], float] = defaultdict(float)
    for (source, what, place), amount in wanted.anchors.items():
        if amount:
            goals[source, what] += amount
            gone[source, what] += amount * (not across and place not in kept)
    # What only one of the two has in a place may be in another in the other: ptxas makes one of two
    # branches' same instructions, and names one of them.
    for key in set(held) ^ set(goals):
        orphans = held.pop(key, []), goals.pop(key, 0.0), gone.pop(key, 0.0)
        if key[1] not in PLACED:
            held["", key[1]] += orphans[0]
            goals["", key[1]] += orphans[1]
            gone["", key[1]] += orphans[2]
    keys = [k for k in {**goals, **held} if not across or k[1] in ACROSS]
    for key in keys:
        if held[key]:
            problem.hold(key[1], goals.get(key, 0.0), gone.get(key, 0.0), held[key])
    problem.visit(wanted)
    times = problem.solved()
    missed = total = 0.0
    for key in keys:
        if key[1] in LOW:
            continue
        least = sum(n * times[at] for at, n, guarded in held[key] if not guarded)
        most = sum(n * times[at] for at, n, _ in held[key])
        want = goals.get(key, 0.0)
        total += want
        missed += max(want - gone.get(key, 0.0) - most, least - want, 0.0)
    return Executed(times, missed / total if total else 0.0)


class _Problem:
    """The linear program: columns are edges, partings, joins and what the anchors lack."""

    def __init__(self, blocks: list[Block], wanted: Wanted) -> None:
        self.blocks = blocks
        self.prices: list[float] = []
        self.rows: list[tuple[dict[int, float], float]] = []
        self.reached = self._reached()
        # A block's count: constant and columns.
        self.edges: dict[tuple[int, int], int] = {}
        self.count: dict[int, dict[int, float]] = {at: {} for at in self.reached}
        leaving: dict[int, dict[int, float]] = {at: {} for at in self.reached}
        parting: dict[int, float] = {}
        for at in self.reached:
            block = blocks[at]
            for to in block.next:
                edge = self._column(0.0)
                self.edges[at, to] = edge
                leaving[at][edge] = 1.0
                self.count[to][edge] = 1.0
            if block.exits or block.returns:
                leaving[at][self._column(0.0)] = 1.0
            if wanted.partings and len(block.next) > 1:
                column = self._column(PARTING)
                leaving[at][column] = -1.0
                parting[column] = 1.0
                for to in block.next:  # a warp that parts takes both ways
                    row = {self.edges[at, to]: 1.0, column: -1.0, self._column(0.0): -1.0}
                    self.rows.append((row, 0.0))
            if wanted.partings and block.joins:
                column = self._column(PARTING)
                self.count[at][column] = -1.0
                parting[column] = -1.0
        for at in self.reached:
            callee = blocks[at].call
            if callee is not None:
                for column, amount in self.count[at].items():
                    self.count[callee][column] = self.count[callee].get(column, 0.0) + amount
        for at in self.reached:
            row = dict(leaving[at])
            for column, amount in self.count[at].items():
                row[column] = row.get(column, 0.0) - amount
                self.prices[column] += amount * len(blocks[at].instructions)
            self.rows.append((row, 1.0 if at == 0 else 0.0))
        if parting:
            self.rows.append((parting, 0.0))
            parts = {column: 1.0 for column, way in parting.items() if way > 0}
            self.rows.append(({**parts, self._column(0.0): 1.0}, wanted.partings))
        self._enter(wanted)

    def _reached(self) -> list[int]:
        seen, todo = {0}, [0]
        while todo:
            block = self.blocks[todo.pop()]
            for to in [*block.next, *([] if block.call is None else [block.call])]:
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        return sorted(seen)

    def _enter(self, wanted: Wanted) -> None:
        """A loop is entered at least as often as the PTX's rounds ask for.

        Without this a loop's blocks could be counted with nobody entering it. One without anchors
        that is not unrolled goes round as often, too.
        """
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
            unknown = not any(map(_of_sass, held)) and len(held) < 2 * like.length
            row = {self._column(VISIT_PRICE * unknown): 1.0}
            for (at, to), edge in self.edges.items():
                if to == head:
                    row[edge] = 1.0 if at in body else 1.0 - like.rounds
            self.rows.append((row, like.rounds - 1.0 if head == 0 else 0.0))

    def _column(self, price: float) -> int:
        self.prices.append(price)
        return len(self.prices) - 1

    def hold(
        self, what: str, wanted: float, gone: float, held: list[tuple[int, float, bool]]
    ) -> None:
        """Adds an anchor: blocks, how much of it each has, and whether a guard is before that.

        ``gone`` of what is wanted may be missing.
        """
        always: dict[int, float] = defaultdict(float)
        guarded: dict[int, float] = defaultdict(float)
        for at, amount, guard in held:
            (guarded if guard else always)[at] += amount
        row: dict[int, float] = defaultdict(float)
        constant = always.get(0, 0.0)
        for at, amount in always.items():
            for column, times in self.count[at].items():
                row[column] += amount * times
        for at, amount in guarded.items():
            part, rest = self._column(0.0), self._column(0.0)
            row[part] = 1.0
            limit = {column: -amount * times for column, times in self.count[at].items()}
            self.rows.append(({**limit, part: 1.0, rest: 1.0}, amount if at == 0 else 0.0))
        if gone:
            missing = self._column(0.0)
            row[missing] = 1.0
            self.rows.append(({missing: 1.0, self._column(0.0): 1.0}, gone))
        if what in LOW:
            wanted /= 2 if what == "float32" else 1
            row[self._column(LOW_PRICE)] = 1.0
            row[self._column(0.0)] = -1.0
        else:
            row[self._column(PRICE)] = 1.0
            row[self._column(PRICE)] = -1.0
        self.rows.append((row, wanted - constant))

    def visit(self, wanted: Wanted) -> None:
        """Adds the blocks' visits, at a low price, as ptxas may move a single instruction.

        A block has those of its instructions that are the only ones of theirs in the PTX. A block
        none of whose instructions were visited is not executed.
        """
        blocks = {at: list(map(wanted.place, self.blocks[at].instructions)) for at in self.reached}
        copies = Counter(place for places in blocks.values() for place in places)
        for at, places in blocks.items():
            visits = [wanted.visits[place] for place in places if place in wanted.visits]
            lone = [wanted.visits[p] for p in places if p in wanted.visits and copies[p] == 1]
            if lone or (visits and not any(visits)):
                row = dict(self.count[at])
                row |= {self._column(VISIT_PRICE): 1.0, self._column(VISIT_PRICE): -1.0}
                self.rows.append((row, statistics.median(lone or [0.0]) - (at == 0)))

    def solved(self) -> list[float]:
        matrix = np.zeros((len(self.rows), len(self.prices)))
        for number, (row, _) in enumerate(self.rows):
            for column, amount in row.items():
                matrix[number, column] += amount
        right = np.array([constant for _, constant in self.rows])
        values = least(np.array(self.prices), matrix, right)
        times = [0.0] * len(self.blocks)
        for at in self.reached:
            count = sum(amount * values[column] for column, amount in self.count[at].items())
            times[at] = max(float(count) + (at == 0), 0.0)
        return times


def least(c: np.ndarray, a: np.ndarray, b: np.ndarray, steps: int = 100) -> np.ndarray:
    """x ≥ 0 with A x = b that makes c · x least, by Mehrotra's predictor-corrector method.

    Raises:
        ArithmeticError: no solution was found.
    """
    rows, columns = a.shape

    def solve(scale: np.ndarray, right: np.ndarray) -> np.ndarray:
        normal = (a * scale) @ a.T
        normal[np.diag_indices(rows)] += 1e-12 * (1.0 + normal.diagonal())
        return np.linalg.solve(normal, right)

    ones = np.ones(columns)
    x = a.T @ solve(ones, b)
    y = solve(ones, a @ c)
    s = c - a.T @ y
    x += max(-1.5 * x.min(), 0.0) + 1.0
    s += max(-1.5 * s.min(), 0.0) + 1.0
    for _ in range(steps):
        gap = x @ s / columns
        primal, dual = b - a @ x, c - a.T @ y - s
        near = np.abs(primal).max() < 1e-7 * (1 + np.abs(b).max())
        if near and gap * columns < 1e-7 * (1 + abs(c @ x)):
            return x
        dx, dy, ds = _step(solve, a, x, s, primal, dual, -x * s)
        after = (x + _length(x, dx) * dx) @ (s + _length(s, ds) * ds) / columns
        aim = gap * (after / gap) ** 3 - x * s - dx * ds
        dx, dy, ds = _step(solve, a, x, s, primal, dual, aim)
        x = x + 0.995 * _length(x, dx) * dx
        way = 0.995 * _length(s, ds)
        y, s = y + way * dy, s + way * ds
    raise ArithmeticError("the executed blocks' linear program has no solution that was found")


# Many parameters: they are the state of the method.
def _step(
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray],
    a: np.ndarray,
    x: np.ndarray,
    s: np.ndarray,
    primal: np.ndarray,
    dual: np.ndarray,
    aim: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Newton's step for A x, Aᵀ y + s and, by ``aim``, x · s."""
    dy = solve(x / s, primal + a @ (x / s * dual - aim / s))
    ds = dual - a.T @ dy
    return (aim - x * ds) / s, dy, ds


def _length(value: np.ndarray, change: np.ndarray) -> float:
    """The longest step that keeps all values positive, 1 at most."""
    falls = change < 0
    return min(1.0, float((-value[falls] / change[falls]).min(initial=np.inf)))
