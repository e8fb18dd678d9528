"""A launch of a compiled kernel, run on the machine; see docs/profile.md."""

from __future__ import annotations

import ctypes
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from bench.profile.cards import BY_ARCH
from tests.ptx_on_cpu import machine, parse

FENCED = tuple(map(int, re.findall(r"\d+", version("triton"))[:3])) >= (3, 7, 1)
"""Whether this Triton fences wgmma off from the copies before it, as PTX asks; see triton#9610."""

programs: dict[str, parse.Kernel] = {}
"""What has run here, by its PTX."""

launched: Counter[str] = Counter()
"""Kernel → launches that ran here."""


class Fault(RuntimeError):
    """What a kernel did that it must not do: where, and the instruction."""


class Counting:
    """Asks a launch to count what it does, and holds the counts then.

    Attributes:
        blocks: those to run, numbered along x, then y, then z; None: all.
        rows: by name, a number a row of the kernel. ``visits`` of warps, with no lane on as well;
            ``blocks`` and their ``warps`` that were there; ``accesses`` to global memory and their
            32-byte ``sectors`` (distinct in an access); ``wavefronts`` over shared memory, and
            ``conflicts``: those beyond one for every 128 bytes of lanes; ``partings``, where some
            lanes jump and some stay.
        distinct: [tensors, 2], different sectors read and written.
    """

    NAMES = (
        "visits", "blocks", "warps", "accesses", "sectors", "wavefronts", "conflicts", "partings",
    )  # fmt: skip

    def __init__(self, blocks: Sequence[int] | None = None) -> None:
        self.blocks = blocks
        self.counts = np.zeros((0, len(self.NAMES)), dtype=np.uint64)
        self.distinct = np.zeros((0, 2), dtype=np.uint64)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return dict(zip(self.NAMES, self.counts.T.astype(np.int64), strict=True))


@dataclass(frozen=True)
class Code:
    """What a compiler made of a launch's kernel.

    Attributes:
        shared: bytes of dynamic shared memory.
        parameters: as they lie in the kernel's parameter space.
        flags: of ptxas, as that compiler gives them.
        ptxas: the program; None: Triton's.
    """

    ptx: str
    shared: int
    parameters: bytes
    flags: tuple[str, ...] = ()
    ptxas: str | None = None


@dataclass(frozen=True)
class Launch:
    """A launch, whichever compiler its kernel is from.

    Attributes:
        kernel: its name with module, or namespace and template arguments.
        name: that for readers.
        grid: blocks along x, y and z.
        warps: a block's.
        tensors: which the kernel may access, and nothing else; they lie on the CPU.
        code: compute capability → the code.
    """

    kernel: str
    name: str
    grid: Sequence[int]
    warps: int
    tensors: Sequence[Tensor]
    code: Callable[[int], Code]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    def run(
        self,
        arch: int = 89,
        backwards: bool = False,
        counting: Counting | None = None,
    ) -> parse.Kernel:
        """Runs all blocks, or those that ``counting`` asks for.

        Args:
            arch: the card's compute capability.
            backwards: the last warp of a block runs first.
            counting: gets the counts.

        Raises:
            Fault: the kernel did what it must not do.
            Unknown: its PTX has something that the machine does not have.
        """
        made = self.code(arch)
        kernel = programs.get(made.ptx) or programs.setdefault(made.ptx, parse.Kernel(made.ptx))
        launched[self.kernel] += 1
        shared = made.shared + kernel.shared
        most = BY_ARCH[arch].block_shared_bytes
        if shared > most:
            raise Fault(
                f"{kernel.name} asks for {shared} bytes of shared memory; sm_{arch} has {most} a "
                "block"
            )
        extents = [_extent(tensor) for tensor in (*self.tensors, *kernel.tables)]
        known = [(begin, end, 0 if own is None else own.data_ptr()) for begin, end, own in extents]
        ranges, frame = np.array(known, np.uint64), np.frombuffer(kernel.frame, np.uint8)
        blocks, counts, distinct = np.arange(self.blocks, dtype=np.uint64), 0, 0
        if counting:
            blocks = blocks if counting.blocks is None else np.array(counting.blocks, np.uint64)
            counting.counts = np.zeros((len(kernel.rows), len(Counting.NAMES)), np.uint64)
            counting.distinct = np.zeros((len(known), 2), np.uint64)[: len(self.tensors)]
            counts, distinct = counting.counts.ctypes.data, counting.distinct.ctypes.data
        parameters = np.frombuffer(made.parameters, np.uint8)
        asked = (  # Launch of machine.cpp
            *(kernel.code.ctypes.data, len(kernel.rows), frame.ctypes.data, len(frame)),
            *(parameters.ctypes.data, len(parameters), ranges.ctypes.data, len(known)),
            *(blocks.ctypes.data, len(blocks), counts, distinct),
            *(*self.grid, 1, 1)[:3], *(self.warps, shared, kernel.local, backwards, FENCED),
        )  # fmt: skip
        message = ctypes.create_string_buffer(1000)
        given = (ctypes.c_uint64 * len(asked))(*asked)
        row = machine.library().ptx_launch(given, message, len(message))
        if row >= 0:
            one, said = kernel.rows[row], message.value.decode()
            said = re.sub("outside the tensors, at (0x[0-9a-f]+)", partial(_near, known), said)
            raise Fault(f"{kernel.name}, {one.source or f'row {row}'}: {one.text!r}: {said}")
        return kernel


def untouched_zeros(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which the system gives only the pages that are touched, aligned as on a card."""
    number = math.prod(sizes) * dtype.itemsize
    pages = np.zeros(number + 256, np.uint8)
    start = -pages.ctypes.data % 256
    return torch.from_numpy(pages[start : start + number]).view(dtype).view(sizes)


def _near(known: list[tuple[int, int, int]], said: re.Match[str]) -> str:
    """Where an address is that is in no tensor."""
    address, distances = int(said[1], 0), []
    for number, (begin, end, _) in enumerate(known):
        if begin <= address < end:
            return f"outside the tensors: between the elements of tensor {number}"
        distances.append((begin - address, f"before tensor {number}"))
        distances.append((address - end, f"behind tensor {number}"))
    away, which = min((one for one in distances if one[0] >= 0), default=(1 << 20, ""))
    near = f"{away} bytes {which}" if away < 1 << 20 else "nowhere near one"
    return f"outside the tensors: {near}"


def _extent(tensor: Tensor) -> tuple[int, int, Tensor | None]:
    """Its first byte, the one after its last, and which of those are its own if not all are."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return begin, begin, None
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if span <= tensor.numel():
        return begin, begin + span * size, None
    holes = torch.zeros(span, size, dtype=torch.uint8)
    holes.as_strided((*tensor.shape, size), (*(s * size for s in tensor.stride()), 1)).fill_(1)
    return begin, begin + span * size, holes
