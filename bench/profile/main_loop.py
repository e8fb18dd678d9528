"""A kernel's main loop, read off its SASS alone: for cards whose code does not run here."""

from __future__ import annotations

from collections import Counter
from functools import partial

from bench.profile.executed import anchor_of, loops
from bench.profile.sass import PIPES, Block, Instruction


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
