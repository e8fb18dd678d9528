"""A kernel's main loop, read off its SASS alone: for cards whose code does not run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from bench.profile.executed import loops
from bench.profile.sass import PIPES, Block, Instruction


def main_loop(blocks: list[Block]) -> dict[str, float]:
    """Of a kernel's main loop the instructions by pipe, for each unit of its work.

    That is the innermost loop with the most matrix products; if none has any, with the most bytes
    loaded from global memory, else from shared memory; else the longest. Of a kernel without loops
    it is all of it. The unit is a product of 4,096 operations, 16 bytes a lane, or an instruction.
    So an unrolled loop has the same figures.
    """
    found = loops([block.next for block in blocks])
    bodies = [
        [one for at in body for one in blocks[at].instructions]
        for head, body in found.items()
        if not any(other != head and other in body for other in found)
    ] or [[one for block in blocks for one in block.instructions]]
    measures: tuple[Callable[[Instruction], float], ...] = (
        lambda one: one.flops / 4096,
        lambda one: one.bytes / 16 if one.base in ("LDG", "LDGSTS") else 0.0,
        lambda one: one.bytes / 16 if one.base == "LDS" else 0.0,
        lambda one: 1.0,
    )
    for measure in measures:
        work, body = max(
            ((sum(map(measure, body)), body) for body in bodies),
            key=lambda of: of[0],
            default=(0, []),
        )
        if work:
            pipes = Counter(one.pipe for one in body)
            return {pipe: pipes[pipe] / work for pipe in PIPES if pipes[pipe]}
    return {}
