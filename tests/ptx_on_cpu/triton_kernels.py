"""Triton kernels from their PTX, in place of Triton's launch."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cmpose.kernels import launch
from cmpose.kernels.launch import Launch
from cmpose.ops import backends
from tests.ptx_on_cpu import machine, parse
from tests.ptx_on_cpu.compiler import compiled

__all__ = ["Launch", "compiled", "run", "running", "taking"]

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d", "u1": "B"}

programs: dict[str, machine.Program] = {}
"""What has run here, by its PTX."""

launched: Counter[str] = Counter()
"""Kernel → launches that ran here."""


def run(
    launch_: Launch,
    arch: int = 89,
    backwards: bool = False,
    counting: machine.Counting | None = None,
    limits: int | None = None,
) -> machine.Program:
    """Compiles a launch for ``arch`` and runs it on its tensors, which lie on the CPU.

    Args:
        counting: gets the counts.
        limits: the card whose shared memory it may have, if that is not ``arch``.

    Raises:
        Fault: the kernel did what it must not do.
        Unknown: its PTX has something that the machine does not have.
    """
    made = compiled(launch_, arch)
    if made.ptx not in programs:
        (kernel,) = parse.kernels(made.ptx).values()
        programs[made.ptx] = machine.Program(kernel)
    program = programs[made.ptx]
    values: list[bytes] = []
    for kind, value in zip(made.types, launch_.arguments, strict=True):
        if kind is None:
            continue
        if isinstance(value, Tensor):
            values.append(struct.pack("Q", value.data_ptr()))
        else:
            values.append(struct.pack(_FORMATS[kind], value))
    values += [bytes(8)] * 2  # Triton's own scratch memory, which these kernels do not have
    parameters = bytearray()
    for (size, offset), packed in zip(program.kernel.parameters, values, strict=True):
        assert len(packed) == size
        parameters += bytes(offset - len(parameters)) + packed
    tensors = [value for value in launch_.arguments if isinstance(value, Tensor)]
    launched[f"{launch_.kernel.fn.__module__.rpartition('.')[2]}.{program.kernel.name}"] += 1
    program.launch(
        launch_.grid,
        launch_.config.num_warps,
        made.shared,
        bytes(parameters),
        tensors,
        arch=limits or arch,
        backwards=backwards,
        counting=counting,
    )
    return program


@contextmanager
def taking(taker: Callable[[Launch], Any], arch: int = 89) -> Iterator[None]:
    """Within it backend ``triton`` takes CPU tensors, and ``taker`` gets its launches."""
    without = backends._WITHOUT["triton"]
    interpreted = backends._interpreted
    backends._WITHOUT["triton"] = lambda device: None
    backends._interpreted = lambda: False
    try:
        with launch.handing_over(taker, arch):
            yield
    finally:
        backends._WITHOUT["triton"] = without
        backends._interpreted = interpreted


@contextmanager
def running(arch: int = 89, backwards: bool = False) -> Iterator[None]:
    """Within it backend ``triton`` runs compiled kernels on CPU tensors, bfloat16 too."""
    with taking(lambda one: run(one, arch, backwards), arch):
        yield
