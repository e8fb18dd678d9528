"""How many bytes of loads and asynchronous copies a warp has under way, read off its SASS."""

from __future__ import annotations

import re
from collections import defaultdict

from bench.profile.sass import Block, Instruction
from tests.ptx_on_cpu.launches import Counting
from tests.ptx_on_cpu.parse import Kernel

Shares = dict[int, float]
"""By a load's or copy's number: the bytes of the sectors that it asks for, over those of 32 lanes;
on average over all warps of the blocks that come there."""


def shares(kernel: Kernel, counting: Counting, warps: int) -> Shares:
    """Of the loads and copies that ran in blocks of ``warps`` warps."""
    moved: dict[int, float] = defaultdict(float)  # in whole sectors
    asked: dict[int, float] = defaultdict(float)  # by 32 lanes
    counts = (counting.rows[name] for name in ("visits", "blocks", "warps", "sectors"))
    for row, visits, blocks, warps_there, sectors in zip(kernel.rows, *counts, strict=True):
        if visits and row.loads:
            # Of the warps of the blocks that came there, some may not have.
            moved[row.number] += 32 * sectors * warps_there / (blocks * warps)
            asked[row.number] += 32 * visits * row.bytes
    return {number: moved[number] / asked[number] for number in asked}


def _path(blocks: list[Block], times: list[float]) -> list[Instruction]:
    """The executed blocks in the listing's order; a loop of one block as often as it goes round
    (loops that issue copies are such), every other loop twice."""
    path: list[Instruction] = []
    entries = [0.0] * len(blocks)
    for at, block in enumerate(blocks):
        for to in block.next:
            entries[to] += times[at] * (to != at)
    for at, block in enumerate(blocks):
        if times[at] < 0.01:
            continue
        path += block.instructions
        for to in block.next:
            if to == at:
                rounds = round(times[at] / entries[at]) if entries[at] > 0.01 else 1
                path += block.instructions * (min(rounds, 64) - 1)
            elif to < at:
                for again in range(to, at + 1):
                    if times[again] >= 0.01:
                        path += blocks[again].instructions
    return path


def _registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", text)}


def most(blocks: list[Block], times: list[float], share: Shares) -> float:
    """The most bytes of sectors under way at once in a warp, on average over those of a block.

    A load is under way from its issue to the first instruction that needs its registers; by then
    all issued before it have come, too. An asynchronous copy is under way until the wait for its
    group.
    """
    loads: list[tuple[set[int], float]] = []
    groups: list[float] = [0.0]  # of asynchronous copies; the last is open
    peak = 0.0
    for one in _path(blocks, times):
        used = _registers(one.operands)
        for at in range(len(loads) - 1, -1, -1):
            if loads[at][0] & used:
                del loads[: at + 1]
                break
        size = 32 * one.bytes * share.get(one.number, 1.0)
        if one.base == "LDG":
            first = re.search(r"\bR(\d+)\b", one.operands)
            if first:
                start = int(first[1])
                loads.append((set(range(start, start + max(one.bytes // 4, 1))), size))
        elif one.base == "LDGSTS":
            groups[-1] += size
        elif one.base == "LDGDEPBAR":
            groups.append(0.0)
        elif one.base == "DEPBAR" and (left := re.search(r",\s*0x([0-9a-f]+)", one.operands)):
            keep = int(left[1], 16) + 1
            groups = groups[-keep:]
        peak = max(peak, sum(groups) + sum(size for _, size in loads))
    return peak
