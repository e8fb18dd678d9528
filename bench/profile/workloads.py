"""The launches of a workload, or of a call, counted; what is missing for that is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.harness.shapes import BACKWARD, BOTH, FORWARD
from bench.harness.workload import Workload
from bench.profile import sass
from bench.profile.counts import Counts, Unmatched, count, counts_of_op
from csrc import build
from tests import cuda_on_cpu
from tests.ptx_on_cpu import triton_kernels
from tests.ptx_on_cpu.machine import Fault
from tests.ptx_on_cpu.parse import Unknown

MOST_TOKENS = 2048
"""A clip of more runs for hours: the kernels of dpc_knn run whole, and pairs grow as the square."""


_REASONS = (
    *(Unmatched, Unknown, sass.UnknownOpcode, Fault, build.BuildError),
    *(RuntimeError, ArithmeticError),  # a compiler's text, or an op's reason
)


class Uncountable(RuntimeError):
    """A workload cannot be counted here; the message says why, and what to do."""


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what counting raises into :class:`Uncountable`, which names what was counted."""
    try:
        yield
    except _REASONS as error:
        raise Uncountable(f"{what}: {error}") from error


def _require(op: str | None = None) -> None:
    """Looks for the programs that counting needs.

    Raises:
        Uncountable: one is missing.
    """
    for name in ("ptxas", "nvdisasm", "cuobjdump"):
        if shutil.which(sass.tool(name)) is None:
            raise Uncountable(f"{sass.tool(name)}: no such program; install triton, which has it")
    if cuda_on_cpu.compiler() is None:
        raise Uncountable("g++: not on PATH; install it, it compiles the machine that counts")
    if op and (build.CSRC / f"{op}.cu").is_file():
        with _told(op):
            build.find_nvcc()
            os.environ.setdefault("CMPOSE_CUDA_ON_CPU", str(cuda_on_cpu.build()))


def counts_of(workload: Workload, arch: int) -> list[Counts]:
    """The counts of what a workload launches, in order; it is in bfloat16.

    Raises:
        ValueError: the op refuses the shape.
        Uncountable: a program is missing, the compiled code has something unknown, or the clip is
            too large to run.
    """
    if workload.op == "dpc_knn" and workload.shape["M"] > MOST_TOKENS:
        raise Uncountable(
            f"{workload}: a clip of M={workload.shape['M']} runs for hours on a CPU; give at most "
            f"M={MOST_TOKENS}"
        )
    _require(workload.op)
    ways = (FORWARD, BACKWARD) if workload.direction == BOTH else (workload.direction,)
    with _told(f"{workload} for sm_{arch}"):
        return [one for way in ways for one in counts_of_op(workload.op, arch, workload.shape, way)]


def counts_of_call(call: Callable[[], None], arch: int) -> list[Counts]:
    """The counts of what a call launches through ``cmpose.kernels.launch``, from a few blocks.

    Raises:
        Uncountable: as :func:`counts_of`.
    """
    _require()
    taken: list[triton_kernels.Launch] = []
    with triton_kernels.taking(taken.append, arch), _told(f"sm_{arch}"):
        call()
        return count(taken, arch, samples=24)
