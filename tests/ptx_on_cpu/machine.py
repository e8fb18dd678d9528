"""The machine: compiled once, given programs, and run; see docs/profile.md."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.ptx_on_cpu.parse import Kernel, Unknown
from tests.shared_data import PROJECT

HERE = Path(__file__).resolve().parent
FOLDER = PROJECT / "build" / "ptx_on_cpu"

FLAGS = ["-std=c++20", "-O1", "-march=native", "-fno-strict-aliasing"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-fPIC", "-shared"]

SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have, by compute capability."""


class Fault(RuntimeError):
    """What a kernel did that it must not do: where, and the instruction."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def built(target: Path, command: Sequence[str], sources: Sequence[Path], more: str = "") -> Path:
    """The file that a compiler makes of sources, unless that was done before.

    Args:
        target: its name; a key of all that it depends on is added.
        command: what makes it, but for ``-o``.
        sources: all files that it depends on.
        more: what else it depends on.

    Raises:
        RuntimeError: what the compiler printed.
    """
    key = hashlib.sha256(repr((command, more)).encode())
    for file in sources:
        key.update(file.read_bytes())
    path = target.with_stem(f"{target.stem}_{key.hexdigest()[:16]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of two test processes compiles
        if not path.is_file():
            made = path.with_suffix(f".{os.getpid()}")
            output(*command, "-o", str(made))
            made.rename(path)
    return path


def output(*command: str, given: str | None = None) -> str:
    """What a program prints; raises RuntimeError, with all that it said, if it fails."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]}: no such program; install what has it")
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def _library() -> ctypes.CDLL:
    path = compiler()
    if path is None:
        raise RuntimeError("there is no g++ to compile the machine with")
    sources = sorted(HERE.glob("*.cpp"))
    command = [path, *FLAGS, *map(str, sources)]
    loaded = ctypes.CDLL(str(built(FOLDER / "machine.so", command, [*sources, HERE / "machine.h"])))
    loaded.ptx_program.restype = ctypes.c_void_p
    return loaded


class Counting:
    """Asks a launch to count what it does, and holds the counts then.

    Attributes:
        blocks: those to run, numbered along x, then y, then z; None: all.
        rows: by name, a number a row of the kernel. ``visits`` of warps, with no lane on as well;
            ``warps`` that were there, summed over blocks; ``accesses`` to global memory, their
            ``bytes`` (summed over lanes) and 32-byte ``sectors`` (distinct in an access);
            ``wavefronts`` over shared memory, and ``conflicts``: those beyond one for every 128
            bytes of lanes; ``jumps`` taken, of which ``partings``, where some lanes stay.
        distinct: [tensors, 2], different sectors read and written.
    """

    NAMES = (
        *("visits", "warps", "accesses", "bytes", "sectors"),
        *("wavefronts", "conflicts", "jumps", "partings"),
    )

    def __init__(self, blocks: Sequence[int] | None = None) -> None:
        self.blocks = None if blocks is None else np.asarray(blocks, dtype=np.uint64)
        self.counts = np.zeros((0, len(self.NAMES)), dtype=np.uint64)
        self.distinct = np.zeros((0, 2), dtype=np.uint64)

    def _passed(self, rows: int, tensors: int) -> ctypes.Array:
        """What ``ptx_launch`` fills in, as ``Counting`` of machine.h."""
        self.counts = np.zeros((rows, len(self.NAMES)), dtype=np.uint64)
        self.distinct = np.zeros((tensors, 2), dtype=np.uint64)
        chosen = (0, 0) if self.blocks is None else (self.blocks.ctypes.data, len(self.blocks))
        return (ctypes.c_uint64 * 4)(self.counts.ctypes.data, self.distinct.ctypes.data, *chosen)

    @property
    def rows(self) -> dict[str, np.ndarray]:
        return dict(zip(self.NAMES, self.counts.T.astype(np.int64), strict=True))


class Program:
    """A kernel on the machine."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        names = "".join(f"{row.name}\n" for row in kernel.rows).encode()
        numbers = [number for row in kernel.rows for number in row.packed()]
        unknown = ctypes.c_int(-1)
        self._handle = _library().ptx_program(
            names,
            (ctypes.c_int64 * len(numbers))(*numbers),
            len(kernel.rows),
            bytes(kernel.frame),
            len(kernel.frame),
            ctypes.byref(unknown),
        )
        if not self._handle:
            text = kernel.statements[unknown.value].text
            raise Unknown(f"the machine does not have {text!r} of {kernel.name}")

    # Many parameters: they are what a launch is.
    def launch(
        self,
        grid: Sequence[int],
        warps: int,
        shared: int,
        parameters: bytes,
        tensors: Sequence[Tensor],
        *,
        arch: int = 89,
        backwards: bool = False,
        counting: Counting | None = None,
    ) -> None:
        """Runs all blocks, or those that ``counting`` asks for.

        Args:
            grid: blocks along x, y and z.
            warps: a block's.
            shared: bytes of dynamic shared memory.
            parameters: as they lie in the kernel's parameter space.
            tensors: which the kernel may access, and nothing else.
            arch: the card's compute capability.
            backwards: the last warp of a block runs first.
            counting: gets the counts.

        Raises:
            Fault: the kernel did what it must not do.
        """
        shared += self.kernel.shared
        if shared > SHARED[arch]:
            raise Fault(
                f"{self.kernel.name} asks for {shared} bytes of shared memory; sm_{arch} has "
                f"{SHARED[arch]} a block"
            )
        known: list[int] = []
        kept = []
        for tensor in tensors:
            begin, end, holes = _extent(tensor)
            known += [begin, end, 0 if holes is None else holes.data_ptr()]
            kept.append(holes)
        size = [*grid, 1, 1][:3]
        message = ctypes.create_string_buffer(1000)
        row = _library().ptx_launch(
            ctypes.c_void_p(self._handle),
            (ctypes.c_uint * 3)(*size),
            warps,
            shared,
            parameters,
            len(parameters),
            (ctypes.c_uint64 * len(known))(*known),
            len(tensors),
            int(backwards),
            counting._passed(len(self.kernel.rows), len(tensors)) if counting else None,
            message,
            len(message),
        )
        if row >= 0:
            statement = self.kernel.statements[row]
            raise Fault(
                f"{self.kernel.name}, {statement.source or f'row {row}'}: {statement.text!r}: "
                f"{message.value.decode()}"
            )


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
