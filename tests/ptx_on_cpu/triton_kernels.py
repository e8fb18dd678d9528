"""Triton kernels from their PTX, in place of Triton's launch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from cmpose.kernels import launch
from cmpose.ops import backends
from tests.ptx_on_cpu.compiler import compiled
from tests.ptx_on_cpu.launches import Code, Launch

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d", "u1": "B"}


def of(launched: launch.Launch) -> Launch:
    """A launch that Triton would make, as the machine runs it."""
    kept = [value for value in launched.arguments if isinstance(value, Tensor)]
    function, warps = launched.kernel.fn, launched.config.num_warps
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    code = partial(_code, launched)
    return Launch(name, function.__name__, launched.grid, warps, kept, code)


def _code(launched: launch.Launch, arch: int) -> Code:
    made, parameters = compiled(launched, arch), bytearray()
    # At the end is Triton's own scratch memory, which these kernels do not have.
    for kind, value in [*zip(made.types, launched.arguments, strict=True), ("u64", 0), ("u64", 0)]:
        if kind is not None:
            number = value.data_ptr() if isinstance(value, Tensor) else value
            packed = struct.pack(_FORMATS.get(kind, "Q"), number)
            parameters += bytes(-len(parameters) % len(packed)) + packed
    flags = ("--regAllocOptLevel=2", *(() if launched.fp_fusion else ("--fmad=false",)))
    return Code(made.ptx, made.shared, bytes(parameters), flags)


@contextmanager
def taking(taker: Callable[[Launch], Any], arch: int = 89) -> Iterator[None]:
    """Within it backend ``triton`` takes CPU tensors, and ``taker`` gets its launches."""
    without = backends._WITHOUT["triton"]
    interpreted = backends._interpreted
    backends._WITHOUT["triton"] = lambda device: None
    backends._interpreted = lambda: False
    try:
        with launch.handing_over(lambda one: taker(of(one)), arch):
            yield
    finally:
        backends._WITHOUT["triton"] = without
        backends._interpreted = interpreted


@contextmanager
def running(arch: int = 89, backwards: bool = False) -> Iterator[None]:
    """Within it backend ``triton`` runs compiled kernels on CPU tensors, bfloat16 too."""
    with taking(lambda one: one.run(arch, backwards), arch):
        yield
