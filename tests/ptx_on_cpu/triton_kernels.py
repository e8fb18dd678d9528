"""Triton kernels from their PTX, in place of Triton's launch.

They are compiled in a process of its own, without a card: the tests' process runs Triton's
interpreter, in which nothing can be compiled.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor

from cmpose.kernels import launch
from cmpose.ops import backends
from tests.ptx_on_cpu.launches import Code, Launch
from tests.ptx_on_cpu.machine import FOLDER

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d", "u1": "B"}

Compiled: TypeAlias = tuple[str, int, list[str | None]]
"""PTX, bytes of dynamic shared memory, types of the arguments: None for those compiled in."""

_compiled: dict[str, Compiled] = {}


def of(launched: launch.Launch) -> Launch:
    """A launch that Triton would make, as the machine runs it."""
    kept = [value for value in launched.arguments if isinstance(value, Tensor)]
    function, warps = launched.kernel.fn, launched.config.num_warps
    name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
    code = partial(_code, launched)
    return Launch(name, function.__name__, launched.grid, warps, kept, code)


def _code(launched: launch.Launch, arch: int) -> Code:
    """Triton's; what depends on the kernel and its arguments' types is sent to the compiler."""
    function = launched.kernel.fn
    arguments = tuple(
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in launched.arguments
    )
    name = function.__module__, function.__name__
    request = replace(launched, kernel=name, grid=(1,), arguments=arguments)
    key = repr((request, arch))
    if key not in _compiled:
        _compiled[key] = _process().submit(_compile, request, arch).result()
    return packed(launched, *_compiled[key])


def packed(launched: launch.Launch, ptx: str, shared: int, types: Sequence[str | None]) -> Code:
    """With the launch's arguments as they lie in the kernel's parameter space."""
    parameters = bytearray()
    # At the end is Triton's own scratch memory, which these kernels do not have.
    for kind, value in [*zip(types, launched.arguments, strict=True), ("u64", 0), ("u64", 0)]:
        if kind is not None:
            number = value.data_ptr() if isinstance(value, Tensor) else value
            packed = struct.pack(_FORMATS.get(kind, "Q"), number)
            parameters += bytes(-len(parameters) % len(packed)) + packed
    flags = ("--regAllocOptLevel=2", *(() if launched.fp_fusion else ("--fmad=false",)))
    return Code(ptx, shared, bytes(parameters), flags)


@cache
def _process() -> ProcessPoolExecutor:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, TRITON_CACHE_DIR=str(FOLDER / "triton"), OMP_NUM_THREADS="1"):
        os.environ.pop("TRITON_INTERPRET", None)
        pool.submit(_without_ptxas).result()
    return pool


def _without_ptxas() -> None:
    """It is not needed, and takes as long as the rest. The cache is this process's own."""
    from triton.backends.nvidia.compiler import CUDABackend

    CUDABackend.make_cubin = lambda *_: b""


def _compile(request: launch.Launch, arch: int) -> Compiled:
    from tests.kernels import compile_check

    module, name = request.kernel
    values = tuple(
        torch.empty(16, dtype=a[0], device="meta")[a[1] // a[0].itemsize :]
        if isinstance(a, tuple)
        else a
        for a in request.arguments
    )
    kernel = getattr(importlib.import_module(module), name)
    launched = replace(request, kernel=kernel, arguments=values)
    made = compile_check.build(launched, arch)
    return made.asm["ptx"], made.metadata.shared, compile_check.types_of(launched)


@contextmanager
def taking(taker: Callable[[Launch], Any], arch: int = 89) -> Iterator[None]:
    """Within it backend ``triton`` takes CPU tensors, and ``taker`` gets its launches."""
    with (
        patch.dict(backends._WITHOUT, triton=lambda device: None),
        patch.object(backends, "_interpreted", lambda: False),
        launch.handing_over(lambda one: taker(of(one)), arch),
    ):
        yield


@contextmanager
def running(arch: int = 89, backwards: bool = False) -> Iterator[None]:
    """Within it backend ``triton`` runs compiled kernels on CPU tensors, bfloat16 too."""
    with taking(lambda one: one.run(arch, backwards), arch):
        yield
