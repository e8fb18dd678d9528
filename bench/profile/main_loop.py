"""A kernel's main loop, read off its SASS alone, which takes less time than counting all of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import networkx as nx  # type: ignore[import-untyped]

from bench.profile.executed import anchor_of, graph
from bench.profile.sass import PIPES, Block, Instruction


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


def main_loop(blocks: list[Block]) -> dict[str, float]:
    """Of a kernel's main loop the instructions by pipe, for each unit of its work.

    That is the innermost loop with the most matrix products; if none has any, with the most bytes
    loaded from global memory, else from shared memory; else the longest. Of a kernel without loops
    it is all of it. The unit is a product of 4,096 operations, 16 bytes a lane, or an instruction.
    So an unrolled loop has the same figures.
    """
    by_head = loops([block.next for block in blocks])
    bodies = [
        [one for at in body for one in blocks[at].instructions]
        for head, body in by_head.items()
        if not any(other != head and other in body for other in by_head)
    ] or [[one for block in blocks for one in block.instructions]]

    def work(what: str, body: list[Instruction]) -> float:
        amounts = (amount for name, amount in map(anchor_of, body) if name == what)
        return sum(amounts) if what else len(body)

    for what in ("tensor", "load", "shared load", ""):
        body = max(bodies, key=partial(work, what))
        if done := work(what, body):
            pipes = Counter(one.pipe for one in body)
            return {pipe: pipes[pipe] / done for pipe in PIPES if pipes[pipe]}
    return {}
