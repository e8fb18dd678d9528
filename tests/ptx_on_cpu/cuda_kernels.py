"""The CUDA C++ kernels from nvcc's PTX, in place of their sources' run on the CPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from cmpose import native
from cmpose.ops import cuda
from tests import cuda_on_cpu
from tests.csrc import compile_check
from tests.csrc.compile_check import build
from tests.ptx_on_cpu import machine
from tests.ptx_on_cpu.launches import Code, Launch

ARCH = 89
FLAGS = ("-ptx", "-O3", "-std=c++17", "-lineinfo")


def _readable(names: list[str]) -> list[str]:
    """C++ names; those in a namespace without one are then called alike by both compilers."""
    return machine.output("c++filt", given="\n".join(names)).splitlines()


@cache
def _entries(source: Path, arch: int) -> dict[str, str]:
    """Readable name → PTX of that kernel alone, for all kernels of a source of csrc/."""
    command = [str(build.find_nvcc()), *FLAGS, f"-arch=sm_{arch}", str(source)]
    headers = sorted(cuda_on_cpu.CSRC.glob("*.*h"))
    plan = compile_check.plan_for(compile_check.ARCHS)
    made = compile_check.kept_ptx(plan, source, arch) or machine.built(
        machine.FOLDER / f"{source.stem}.ptx", command, [source, *headers]
    )
    head, *entries = re.split(
        r"^(?=\.visible \.entry|\.entry|\.weak \.entry)", made.read_text(), flags=re.M
    )
    files = "".join(re.findall(r"^\s*\.file[^\n]*\n", entries[-1], re.M))
    names = [re.search(r"\.entry\s+([\w$]+)", entry)[1] for entry in entries]  # type: ignore[index]
    return {
        name: f"{head}{entry[: entry.index(chr(10) + '}') + 2]}\n{files}"
        for name, entry in zip(_readable(names), entries, strict=True)
    }


def entry(name: str, arch: int = ARCH) -> str:
    """PTX of the kernel of this readable name; sources that speak of it are compiled first."""
    spoken_of = re.compile(rf"\b{families([name]).pop()}\b")
    sources = sorted(cuda_on_cpu.CSRC.glob("*.cu"))
    for source in sorted(sources, key=lambda one: not spoken_of.search(one.read_text())):
        if (entry := _entries(source, arch).get(name)) is not None:
            return entry
    raise KeyError(name)


def families(names: Iterable[str] | None = None) -> set[str]:
    """Kernels' names without namespace and template arguments; None: all kernels of csrc/."""
    if names is None:
        names = chain(*(_entries(one, ARCH) for one in sorted(cuda_on_cpu.CSRC.glob("*.cu"))))
    matches = [re.search(r"(\w+)[<(]", name.replace("(anonymous namespace)", "")) for name in names]
    return {match[1] for match in matches if match}


@cache
def _addresses() -> dict[int, str]:
    """Offset in the module of the sources' run → the kernel's readable name."""
    symbols = machine.output("nm", str(native.module().__file__))
    rows = [line.split() for line in symbols.splitlines()]
    functions = [row for row in rows if len(row) == 3 and row[1] in "tTwW"]
    readable = _readable([row[2] for row in functions])
    return {int(row[0], 16): name for row, name in zip(functions, readable, strict=True)}


# Many parameters: they are what a launch is.
def launch(
    kernel: str, blocks: int, warps: int, shared: int, parameters: bytes, tensors: list[Tensor]
) -> Launch:
    """A launch of the sources' run, to be run from PTX.

    Args:
        kernel: its readable name, template arguments included.
        shared: bytes of dynamic shared memory.
        parameters: as they lie in the kernel's parameter space.
        tensors: those that any op was given so far.
    """

    def code(arch: int) -> Code:
        ptxas = str(build.find_nvcc().with_name("ptxas"))
        return Code(entry(kernel, arch), shared, parameters, ptxas=ptxas)

    name = re.sub(r"\(anonymous namespace\)::|\bcmpose::|^void |\([\w:]+\)(?=\d)", "", kernel)
    return Launch(kernel, name.partition("(")[0], (blocks,), warps, tensors, code)


_TAKER = ctypes.CFUNCTYPE(
    ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 3, ctypes.c_void_p, ctypes.c_uint
)


@contextmanager
def taking(taker: Callable[[Launch], Any]) -> Iterator[None]:
    """Within it backend ``cuda`` takes CPU tensors, and ``taker`` gets its launches."""
    library = ctypes.CDLL(native.module().__file__)
    own = ctypes.cast(library.cuda_on_cpu_hand_over, ctypes.c_void_p).value or 0
    [offset] = [at for at, name in _addresses().items() if name == "cuda_on_cpu_hand_over"]
    known: list[Tensor] = []
    original = cuda.address
    message = ctypes.create_string_buffer(1000)

    def noted(tensor: Tensor | None) -> int:
        if tensor is not None:
            known.append(tensor)
        return original(tensor)

    def take(
        kernel: int, blocks: int, threads: int, shared: int, parameters: int, size: int
    ) -> int | None:
        try:
            name = _addresses()[kernel - own + offset]
            given = ctypes.string_at(parameters, size)
            taker(launch(name, blocks, threads // 32, shared, given, known))
        except Exception as error:
            message.value = f"{type(error).__name__}: {error}".encode()[:999]
            return ctypes.addressof(message)
        return None

    callback = _TAKER(take)
    library.cuda_on_cpu_hand_over(callback)
    try:
        with patch.object(cuda, "address", noted):
            yield
    finally:
        library.cuda_on_cpu_hand_over(_TAKER())


@contextmanager
def running(backwards: bool = False) -> Iterator[None]:
    """Within it backend ``cuda`` runs nvcc's PTX on CPU tensors.

    A kernel may access the tensors that were given to any op within it.
    """
    with taking(lambda one: one.run(backwards=backwards)):
        yield
