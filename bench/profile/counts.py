"""What a launch of a compiled kernel does on a card, counted without one; see docs/profile.md.

The kernel's PTX runs on the CPU (``tests/ptx_on_cpu``), where accesses are counted, and how often
each row is executed; ptxas's SASS says what a card executes for it (:mod:`bench.profile.executed`).
"""

from __future__ import annotations

import math
import os
from collections import ChainMap, Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.harness.shapes import BACKWARD, BF16, BOTH, FORWARD, Shape
from bench.harness.targets import bench_of
from bench.harness.workload import Draw, tensors
from bench.profile import executed, flight, sass
from bench.profile.cards import BY_ARCH
from cmpose.ops import cuda as cuda_core
from cmpose.provenance import PROJECT
from csrc import build
from tests import cuda_on_cpu
from tests.ptx_on_cpu import cuda_kernels, parse, triton_kernels
from tests.ptx_on_cpu.launches import Counting, Launch, untouched_zeros

SAMPLES, FEW_SAMPLES = 144, 24
"""Blocks that run of a large launch, and of one whose blocks are alike; of twice as many all do."""

PERSISTENT, PERSISTENT_SAMPLES = ("spatial_attention",), 4
"""Ops whose blocks in csrc/, one an SM, share items that are all alike; how many of these run."""

MOST_TOKENS = 16_384
"""Of a clip whose dpc_knn is counted. Its kernels run whole and pairs grow as the square: 4,096
tokens take about a minute, 65,536 would take hours."""


class Unmatched(RuntimeError):
    """The counts of PTX and SASS do not agree; the message says by how much."""


@dataclass(frozen=True)
class Counts:
    """Of one launch of one compiled kernel, for one architecture.

    Attributes:
        arch: 80, 86, 89, 90 or 120.
        blocks: of the launch.
        warps: of a block.
        registers: a thread.
        shared_bytes: a block, static and dynamic.
        instructions: warp instructions executed by the whole launch, by pipe (SASS): "fma", "alu",
            "mufu", "tensor", "memory", "fp64", "control". What only takes a slot of issue
            (branches, barriers, the uniform path) is control.
        tensor_flops: multiplications and additions of the tensor instructions, both counted.
        sectors_read: 32-byte sectors asked for, summed over warp accesses.
        sectors_written: the same of stores and atomics.
        distinct_read: of the sectors read, the different ones in the launch.
        distinct_written: of the sectors written, the different ones.
        access_bytes: bytes a lane moves at once in global memory → number of warp accesses.
        shared_wavefronts: passes over shared memory.
        shared_conflicts: those beyond the fewest possible.
        barriers: executed, summed over blocks.
        bytes_in_flight: the most bytes, in whole sectors, that loads and asynchronous copies of a
            block have under way, if it comes to them at all.
    """

    kernel: str
    arch: int
    blocks: int
    warps: int
    registers: int
    shared_bytes: int
    instructions: dict[str, float]
    tensor_flops: float
    sectors_read: int
    sectors_written: int
    distinct_read: int
    distinct_written: int
    access_bytes: dict[int, int]
    shared_wavefronts: int
    shared_conflicts: int
    barriers: int
    bytes_in_flight: float


def sampled(blocks: int, samples: int) -> list[int] | None:
    """Those of a launch's blocks that run; None: all.

    The step between them has no factor in common with 12, so that each of the tiles, heads or
    frames that alternate from block to block has its share.
    """
    if blocks <= 2 * samples:
        return None
    step = blocks // samples
    while math.gcd(step, 12) > 1:
        step -= 1
    return [(blocks - 1 - (samples - 1) * step) // 2 + k * step for k in range(samples)]


@cache
def _code(ptx: str, arch: int, flags: tuple[str, ...] = (), ptxas: str | None = None) -> sass.Code:
    return sass.disassembled(sass.assembled(parse.numbered(ptx), arch, *flags, ptxas=ptxas))


def count(
    launches: Iterable[Launch],
    arch: int,
    whole: bool = False,
    samples: int | None = None,
    unmatched: float = 0.02,
) -> list[Counts]:
    """Runs launches in their order, on their tensors, and counts what a card would do.

    Args:
        launches: as ``triton_kernels.taking`` and ``cuda_kernels.taking`` hand them over.
        arch: the card's compute capability.
        whole: all blocks run, however many: what a later launch reads is right then.
        samples: blocks that run of a large launch, :data:`SAMPLES` if None; few will do where all
            are alike.
        unmatched: share of the PTX's accesses, products and barriers that may miss in the SASS.

    Raises:
        Unknown: the PTX has something that the machine does not have.
        UnknownOpcode: the SASS has something whose pipe is not known.
        Unmatched: the SASS cannot have done what the PTX did.
        Fault: a kernel did what it must not do.
    """
    return [_counted(one, arch, whole, samples or SAMPLES, unmatched) for one in launches]


def _counted(one: Launch, arch: int, whole: bool, samples: int, unmatched: float) -> Counts:
    name, blocks, warps, made = one.name, one.blocks, one.warps, one.code(arch)
    code = _code(made.ptx, arch, made.flags, made.ptxas)
    chosen = None if whole else sampled(blocks, samples)
    ran = len(chosen or range(blocks))
    scale = blocks / ran
    counting = Counting(chosen)
    kernel = one.run(arch, counting=counting)
    wanted = executed.wanted(kernel, counting, ran * warps)
    solution = executed.executed(code.blocks, wanted)
    if solution.unmatched > unmatched:
        raise Unmatched(
            f"{name} for sm_{arch}: {solution.unmatched:.1%} of what its PTX loads, stores, "
            "multiplies and waits for was not found in its SASS"
        )
    in_flight = flight.most(code.blocks, solution.times, flight.shares(kernel, counting, warps))
    pipes = dict.fromkeys(sass.PIPES, 0.0)
    flops = barriers = 0.0
    for block, times in zip(code.blocks, solution.times, strict=True):
        for instruction in block.instructions:
            pipes[instruction.pipe] += times
            flops += times * instruction.flops
            barriers += times * (instruction.base == "BAR")
    all_warps = warps * blocks
    rows = {name: values * scale for name, values in counting.rows.items()}
    widths: Counter[int] = Counter()
    asked = [0.0, 0.0]  # read, written
    for row, accesses, sectors in zip(kernel.rows, rows["accesses"], rows["sectors"], strict=True):
        if accesses:
            widths[row.bytes] += accesses
            asked[row.stores] += sectors
    sizes = [tensor.numel() * tensor.element_size() for tensor in one.tensors]
    most = np.inf if chosen is None else -(-np.array(sizes)[:, None] // 32)
    distinct = np.minimum(counting.distinct * scale, most).sum(0)
    return Counts(
        kernel=name,
        arch=arch,
        blocks=blocks,
        warps=warps,
        registers=code.registers,
        shared_bytes=code.shared + made.shared,
        instructions={pipe: times * all_warps for pipe, times in pipes.items()},
        tensor_flops=flops * all_warps,
        sectors_read=round(asked[0]),
        sectors_written=round(asked[1]),
        distinct_read=round(distinct[0]),
        distinct_written=round(distinct[1]),
        access_bytes={width: round(times) for width, times in sorted(widths.items())},
        shared_wavefronts=round(rows["wavefronts"].sum()),
        shared_conflicts=round(rows["conflicts"].sum()),
        barriers=round(barriers * blocks),
        bytes_in_flight=warps * float(in_flight),
    )


class Cheap(Draw):
    """Large tensors are zeros that take no memory until they are touched."""

    def normal(self, *sizes: int) -> Tensor:
        if math.prod(sizes) > 1 << 22:
            return untouched_zeros(*sizes, dtype=self.dtype)
        return super().normal(*sizes)


def backends_of(op: str) -> list[str]:
    """Those that have kernels of the op."""
    sources = {"triton": PROJECT / "kernels" / f"{op}.py", "cuda": build.CSRC / f"{op}.cu"}
    return [backend for backend, source in sources.items() if source.is_file()]


def backend_of(op: str, asked: str | None) -> str:
    """That whose kernels of an op are counted; None: CUDA C++, if it has some."""
    return asked or backends_of(op)[-1]


def launches_of_op(
    op: str,
    arch: int,
    shape: Shape | None,
    direction: str,
    backend: str | None = None,
    dtype: str = BF16,
    options: Sequence[str] = (),
) -> list[Launch]:
    """What an op launches on cheap tensors; arguments as :func:`counts_of_op` has them."""
    bench = bench_of(op)
    sizes = {**bench.shapes[0], **(shape or {})}
    if op == "dpc_knn" and sizes["M"] > MOST_TOKENS:
        raise RuntimeError(
            f"a clip of M={sizes['M']} runs for hours on a CPU; give at most M={MOST_TOKENS}"
        )
    if direction != FORWARD and (direction not in (BACKWARD, BOTH) or not bench.gradients):
        raise ValueError(
            f"{op}: direction {direction!r}: give forward, or backward or forward_backward if it "
            "has gradients"
        )
    arguments = bench.make(sizes, Cheap(getattr(torch, dtype), "cpu"))
    arguments |= dict(ChainMap(*[bench.options[name](arguments) for name in options]))
    taken: list[Launch] = []
    backend = backend_of(op, backend)
    if backend == "cuda":
        build.find_nvcc()
        os.environ.setdefault("CMPOSE_CUDA_ON_CPU", str(cuda_on_cpu.build()))
        taking = partial(cuda_kernels.taking, taken.append)
    else:
        taking = partial(triton_kernels.taking, taken.append, arch)
    call: Callable[..., Any] = partial(bench.call, backend=backend)
    if direction == FORWARD:
        with taking(), torch.no_grad():
            call(**arguments)
        return taken
    # What a backward pass of csrc/ does depends on what the forward pass wrote: of one clip, which
    # is what runs, that runs too. Of a batch nothing does.
    one_clip = backend == "cuda" and op not in PERSISTENT and sizes["B"] == 1
    runs = one_clip and direction == BACKWARD
    given = [one for name in bench.gradients for one in tensors(arguments[name])]
    inputs = [one.requires_grad_() for one in given]
    with nullcontext() if runs else taking():
        made = tensors(call(**arguments))
    outputs = [one for one in made if one.requires_grad]
    upstream = [untouched_zeros(*one.shape, dtype=one.dtype) for one in outputs]
    if direction == BACKWARD:
        taken.clear()
    else:  # a loss gets 1, as from .backward()
        upstream = [one + 1 if one.ndim == 0 else one for one in upstream]
    with taking():
        torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return taken


def counts_of_op(
    op: str,
    arch: int,
    shape: Shape | None = None,
    direction: str = FORWARD,
    whole: bool = False,
    backend: str | None = None,
    dtype: str = BF16,
    options: Sequence[str] = (),
) -> list[Counts]:
    """Every launch of an op at a shape of its benchmark, in their order.

    Args:
        op: its name, as ``spatial_attention``.
        arch: the card's compute capability.
        shape: sizes that differ from the reference shape's (:data:`BENCH` of ``bench/OP.py``).
        direction: ``forward``, without gradients; ``backward``; ``forward_backward``, where a loss
            gets an upstream gradient of 1.
        whole: all blocks run, however many.
        backend: ``triton`` or ``cuda``; None: ``cuda`` if there is ``csrc/OP.cu``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        options: in use, of the op's benchmark.

    Raises:
        ValueError: the op has no such direction, or launches other kernels for one clip.
        Unknown, UnknownOpcode, Unmatched, Fault: see :func:`count`.
    """
    card = BY_ARCH[arch]
    with (
        mock.patch.object(cuda_core, "MULTIPROCESSORS_ON_CPU", card.sms),
        mock.patch.object(cuda_core, "SHARED_ON_CPU", card.shared_bytes),
    ):
        launches = launches_of_op(op, arch, shape, direction, backend, dtype, options)
        if backend_of(op, backend) == "triton":
            return count(launches, arch, whole)
        if op in PERSISTENT:
            return count(launches, arch, whole, PERSISTENT_SAMPLES)
        one_clip = {**(shape or {}), "B": 1}
        clip = launches_of_op(op, arch, one_clip, direction, backend, dtype, options)
    batch, one = ([launch.kernel for launch in of] for of in (launches, clip))
    if batch != one:
        raise ValueError(f"{op}: launches {batch} for the batch, {one} for one clip")
    clips = {**bench_of(op).shapes[0], **(shape or {})}["B"]
    counted = zip(count(clip, arch, whole=True), launches, strict=True)
    return [scaled(ran, clips, launched.blocks) for ran, launched in counted]


def counts_of_call(call: Callable[[], Any], arch: int) -> list[Counts]:
    """Of what a call launches through ``cmpose.kernels.launch``, from a few blocks."""
    taken: list[Launch] = []
    with triton_kernels.taking(taken.append, arch):
        call()
    return count(taken, arch, samples=FEW_SAMPLES)


def scaled(one: Counts, by: int, blocks: int) -> Counts:
    """The counts of a launch with ``by`` times the work, by so many blocks: a batch of clips may
    have fewer than ``by`` times as many, where a block goes on with another clip."""
    same = ("kernel", "arch", "blocks", "warps", "registers", "shared_bytes", "bytes_in_flight")

    def grown(value: Any) -> Any:
        return {key: n * by for key, n in value.items()} if isinstance(value, dict) else value * by

    more = {name: grown(value) for name, value in vars(one).items() if name not in same}
    return replace(one, blocks=blocks, **more)
