"""Compiles Triton kernels to PTX in a process of its own, without a card.

The tests' process runs Triton's interpreter, in which nothing can be compiled.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor

from cmpose.kernels import launch
from tests.ptx_on_cpu.machine import FOLDER


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a launch.

    Attributes:
        ptx: its code.
        shared: bytes of dynamic shared memory.
        types: of the launch's arguments, None for those that were compiled in.
    """

    ptx: str
    shared: int
    types: list[str | None]


_known: dict[str, Compiled] = {}


def compiled(launched: launch.Launch, arch: int) -> Compiled:
    """Triton's PTX for a launch; what depends on the kernel and its arguments' types is sent.

    Raises:
        Exception: whatever the compiler says.
    """
    function = launched.kernel.fn
    arguments = tuple(
        (a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a for a in launched.arguments
    )
    name = function.__module__, function.__name__
    request = replace(launched, kernel=name, grid=(1,), arguments=arguments)
    key = repr((request, arch))
    if key not in _known:
        _known[key] = _process().submit(_compile, request, arch).result()
    return _known[key]


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
    signature = compile_check._signature(launched)[0]
    made = compile_check.build(launched, arch)
    positional = [p.name for p in kernel.params if p.name not in request.constants]
    types = [None if signature[n] == "constexpr" else signature[n] for n in positional]
    return Compiled(made.asm["ptx"], made.metadata.shared, types)
