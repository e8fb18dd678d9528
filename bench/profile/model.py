"""From the counts of a launch to times: what each resource alone needs, the bound, and an estimate.

docs/profile.md has the resources, the equations, and how far the estimates are from published
times. All times are in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from bench.harness.shapes import FP32
from bench.profile.cards import BY_ARCH, SHARED_BYTES_A_CLOCK, Card
from bench.profile.counts import Counts, count
from cmpose.kernels import launch as triton_launch
from tests.ptx_on_cpu import triton_kernels

SECTOR = 32
WARP = 32

COPY_SHARE = 0.9
"""Of the data sheet's rate of a card's memory, what a copy reaches (L40, H200)."""

SERIAL = 0.7
"""Of a pipe's time, what the pipes beside the busiest one add: a warp's softmax waits for its
product, and the product for the softmax."""

NORM = 4
"""Memory's time m and the SMs' time s overlap to (mⁿ + sⁿ)^(1/n): 19 % over either if they are
equal, 2 % if one is twice the other."""

APART = 6.7
"""Clocks from one instruction of a warp to its next: it waits for the one before, for shared memory
or at a barrier. Waits for global memory are not among them."""

LOADED = 2.5
"""How much longer than alone a trip to memory takes while others are under way."""

BAND = 0.3
"""Estimates are within this share of the times that are published, or were measured."""


class Occupancy(NamedTuple):
    """How a launch's blocks lie on a card.

    Attributes:
        blocks: that an SM holds at a time.
        limit: what holds no more of them.
        waves: blocks of the launch over those that the card holds.
        tail: share of all places for blocks that stays empty until the last one has ended.
    """

    blocks: int
    limit: str
    waves: float
    tail: float


def fitting(card: Card, warps: int, registers: int, shared_bytes: int) -> dict[str, int]:
    """Blocks that each resource of an SM has room for.

    Registers are given to warps in portions of 256, and warps are counted in fours, one for each
    quarter of an SM. Of shared memory the system keeps 1 KB a block, and gives it in portions of
    128 bytes.

    Args:
        warps, registers, shared_bytes: of a block, a thread, a block.
    """
    portion = 256 * math.ceil(max(registers, 1) * WARP / 256)
    shared = 128 * math.ceil((shared_bytes + 1024) / 128)
    fits = shared_bytes <= card.block_shared_bytes
    return {
        "blocks": card.blocks,
        "warps": card.warps // warps,
        "registers": card.registers // portion // 4 * 4 // warps,
        "shared memory": card.shared_bytes // shared * fits,
    }


def occupancy(counts: Counts, card: Card) -> Occupancy:
    """Blocks an SM and waves.

    Raises:
        ValueError: not even one block fits.
    """
    held = fitting(card, counts.warps, counts.registers, counts.shared_bytes)
    limit = min(held, key=held.__getitem__)
    blocks = held[limit]
    if not blocks:
        raise ValueError(
            f"{counts.kernel}: no block fits an SM of {card.name}: {limit} "
            f"({counts.warps} warps, {counts.registers} registers a thread, "
            f"{counts.shared_bytes:,} bytes of shared memory)"
        )
    waves = counts.blocks / (blocks * card.sms)
    return Occupancy(blocks, limit, waves, 1 - waves / math.ceil(waves))


def resources(
    counts: Counts, card: Card, dtype: str, in_l2: float | None = None
) -> dict[str, float]:
    """The time that each resource alone needs.

    An SM's resources count for the SM that has the most blocks.

    Args:
        counts: of one launch.
        card: whose rates are taken.
        dtype: of the tensor instructions' operands.
        in_l2: where the second-level cache holds all that the workload moves, the sectors that are
            there already; then no sector need be written to memory. None: it does not hold them.

    Returns:
        Resource → µs, as docs/profile.md lists them.
    """
    clock = card.clock_ghz * 1e3  # clocks a µs
    held = occupancy(counts, card)
    busiest = math.ceil(counts.blocks / card.sms)
    # A warp stays in its quarter of the SM.
    quarters = min(1.0, counts.warps * min(busiest, held.blocks) / 4)

    def on_sm(work: float, per_clock: float) -> float:
        return work * busiest / counts.blocks / per_clock / clock

    asked = counts.sectors_read + counts.sectors_written
    distinct = counts.distinct_read + counts.distinct_written
    fresh = max(0.0, counts.distinct_read - (in_l2 or 0.0))
    carried = sum(
        number * max(1.0, size * WARP / SHARED_BYTES_A_CLOCK)
        for size, number in counts.access_bytes.items()
    )
    by_resource = {
        "DRAM": (distinct if in_l2 is None else fresh) * SECTOR / (card.dram_gb_s * 1e3),
        "L2": on_sm(asked * SECTOR, card.l2_bytes),
        "shared": on_sm(counts.shared_wavefronts + carried, 1),
        "tensor": on_sm(counts.tensor_flops, card.tensor.get(dtype, math.inf) * quarters),
        "latency": _latency(counts, card, held, fresh) / clock,
    }
    every = {**counts.instructions, "issue": sum(counts.instructions.values())}
    for pipe, lanes in card.lanes.items():
        by_resource[pipe] = on_sm(every.get(pipe, 0) * WARP, lanes * quarters)
    return by_resource


def _latency(counts: Counts, card: Card, held: Occupancy, fresh: float) -> float:
    """Clocks of the trips to memory that a block makes one after another, in all waves."""
    if not counts.sectors_read or not counts.bytes_in_flight:
        return 0.0
    from_dram = min(1.0, fresh / counts.sectors_read)
    trip = from_dram * card.dram_cycles + (1 - from_dram) * card.l2_cycles
    read = counts.sectors_read * SECTOR / counts.blocks
    trips = max(1.0, read / counts.bytes_in_flight)
    return math.ceil(held.waves) * trips * trip


def of_warps(counts: Counts, card: Card, latency: float) -> float:
    """The time, in µs, that a launch's warps need if none of them waits for a pipe's turn.

    A warp that waits for one instruction, or for memory, issues no other: only the warps that lie
    beside it on the SM do.

    Args:
        latency: the resource's time.
    """
    busiest = math.ceil(counts.blocks / card.sms)
    beside = counts.warps * min(busiest, occupancy(counts, card).blocks)
    instructions = sum(counts.instructions.values()) * busiest / counts.blocks
    return APART * instructions / beside / (card.clock_ghz * 1e3) + LOADED * latency


def estimated(times: dict[str, float], warps_us: float, card: Card) -> float:
    """The estimate of a launch from its resources' times and that of its warps, in µs."""
    pipes = [
        times["tensor"] / card.sustained,
        times["mufu"],
        max(times[name] for name in ("issue", "fma", "alu", "fp64")),
    ]
    inside = max(pipes) + SERIAL * (sum(pipes) - max(pipes))
    memory = max(times["DRAM"] / COPY_SHARE, times["L2"], times["latency"])
    inside = max(inside, times["shared"], warps_us)
    return card.launch_us + (memory**NORM + inside**NORM) ** (1 / NORM)


@dataclass(frozen=True)
class Launch:
    """One launch on one card, as records have it: its counts and what follows from them.

    Attributes:
        blocks_an_sm, limit, waves, tail: its occupancy.
        us: the time that each resource alone needs.
        warps_us: the time that its warps need, see :func:`of_warps`.
        bound_us: the largest of ``us``, which is that of ``bound_by``.
    """

    counts: Counts
    blocks_an_sm: int
    limit: str
    waves: float
    tail: float
    us: dict[str, float]
    warps_us: float
    bound_us: float
    bound_by: str
    estimate_us: float


def timed(counts: Counts, card: Card, dtype: str, in_l2: float | None = None) -> Launch:
    """Bounds and estimate of one launch; for the arguments see :func:`resources`."""
    us = resources(counts, card, dtype, in_l2)
    warps_us = of_warps(counts, card, us["latency"])
    by = max(us, key=us.__getitem__)
    estimate = estimated(us, warps_us, card)
    return Launch(counts, *occupancy(counts, card), us, warps_us, us[by], by, estimate)


@dataclass(frozen=True)
class Profile:
    """All launches of a workload on a card, as records have it.

    Attributes:
        card: its name.
        arch: its compute capability.
        floor_us: the workload's algorithmic bytes at the data sheet's rate.
        bound_by: what bounds the launch whose bound is the longest; the floor, if that is longer
            than all of them together.
        band: share of the estimate by which the time may differ.
    """

    card: str
    arch: int
    floor_us: float
    bound_us: float
    bound_by: str
    estimate_us: float
    launches: list[Launch]
    band: float = BAND


def profile(launches: Sequence[Counts], card: Card, dtype: str, moved: int) -> Profile:
    """Bound and estimate of a workload on a card.

    Args:
        launches: the counts of each, in order, for the card's compute capability.
        card: whose rates are taken.
        dtype: of the tensor instructions' operands.
        moved: bytes that the workload must move.

    Raises:
        ValueError: there are no launches, they were counted for another compute capability, or a
            block does not fit.
    """
    if not launches:
        raise ValueError("launches: expected at least one, got none")
    for counts in launches:
        if counts.arch != card.arch:
            raise ValueError(
                f"{counts.kernel}: counted for sm_{counts.arch}; {card.name} is sm_{card.arch}"
            )
    moves = [one.distinct_read + one.distinct_written for one in launches]
    fits = sum(moves) * SECTOR <= card.l2_mb * 1e6
    result = [
        timed(counts, card, dtype, sum(moves[:index]) if fits else None)
        for index, counts in enumerate(launches)
    ]
    floor = moved / (card.dram_gb_s * 1e3)
    bound = sum(launch.bound_us for launch in result)
    estimate = sum(launch.estimate_us for launch in result)
    longest = max(result, key=lambda launch: launch.bound_us)
    return Profile(
        card.name,
        card.arch,
        floor,
        max(floor, bound),
        "floor" if floor > bound else longest.bound_by,
        max(floor / COPY_SHARE, estimate),
        result,
    )


def milliseconds(launches: list[triton_launch.Launch], arch: int) -> float:
    """The estimate of some launches together, on the card that stands for a capability.

    ``python -m cmpose.kernels.tune`` ranks configurations by it where there is no card.

    Raises:
        KeyError: no card of that capability is known.
        ValueError: a block does not fit.
    """
    card = BY_ARCH[arch]
    us = 0.0
    for launched in launches:
        half = {str(t.dtype)[6:] for t in launched.arguments if isinstance(t, Tensor)}
        [dtype] = half & {"bfloat16", "float16"} or {FP32}
        [counts] = count([triton_kernels.of(launched)], arch)
        us += timed(counts, card, dtype).estimate_us
    return us / 1e3
