"""Compiles Triton kernels to PTX in a process of its own, without a card.

The tests' process runs Triton's interpreter, in which nothing can be compiled. ``python -m
tests.ptx_on_cpu.compiler`` answers requests on its standard input; :func:`compiled` asks.
"""

from __future__ import annotations

import atexit
import importlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import launch
from tests.ptx_on_cpu.machine import FOLDER
from tests.shared_data import PROJECT


@dataclass(frozen=True)
class Compiled:
    """What Triton made of a launch.

    Attributes:
        key: equal for launches of the same compiled kernel.
        ptx: its code; empty if the key was answered before.
        shared: bytes of dynamic shared memory.
        types: of the launch's arguments, None for those that were compiled in.
    """

    key: str
    ptx: str
    shared: int
    types: list[str | None]


def described(launched: launch.Launch) -> dict[str, Any]:
    """A launch as it can be sent: of a tensor, its dtype and its address modulo 16."""
    kernel = launched.kernel.fn
    return {
        "kernel": (kernel.__module__, kernel.__name__),
        "arguments": [
            ("tensor", a.dtype, a.data_ptr() % 16) if isinstance(a, Tensor) else a
            for a in launched.arguments
        ],
        "constants": launched.constants,
        "config": tuple(launched.config),
        "fp_fusion": launched.fp_fusion,
    }


class _Server:
    def __init__(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": str(FOLDER / "triton"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=PROJECT,
            env=environment,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Ends it; its time counts as this process's then."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def ask(self, request: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


_server: _Server | None = None


def compiled(launched: launch.Launch, arch: int) -> Compiled:
    """Triton's PTX for a launch.

    Raises:
        RuntimeError: it does not compile; the message says why.
    """
    global _server
    if _server is None or _server.process.poll() is not None:
        _server = _Server()
    answer = _server.ask((described(launched), arch))
    assert isinstance(answer, Compiled)
    return answer


def _answer(request: dict[str, Any], arch: int, known: dict[str, Compiled]) -> Compiled:
    from tests.kernels import compile_check

    module, name = request["kernel"]
    arguments = tuple(
        torch.empty(16, dtype=a[1], device="meta")[a[2] // a[1].itemsize :]
        if isinstance(a, tuple)
        else a
        for a in request["arguments"]
    )
    launched = launch.Launch(
        getattr(importlib.import_module(module), name),
        (1,),
        arguments,
        request["constants"],
        launch.Config(*request["config"]),
        request["fp_fusion"],
    )
    signature, constants, attributes = compile_check._signature(launched)
    key = repr((module, name, signature, constants, attributes, request["config"], arch))
    key += str(launched.fp_fusion)
    if key in known:
        return known[key]
    kernel = compile_check.build(launched, arch)
    positional = [p.name for p in launched.kernel.params if p.name not in request["constants"]]
    types = [None if signature[n] == "constexpr" else signature[n] for n in positional]
    made = Compiled(key, kernel.asm["ptx"], kernel.metadata.shared, types)
    known[key] = Compiled(key, "", made.shared, types)
    return made


def _serve() -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    # ptxas is not needed, and takes as long as the rest. The cache is this server's own.
    CUDABackend.make_cubin = lambda *_: b""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what Triton prints must not be taken for an answer
    known: dict[str, Compiled] = {}
    while True:
        try:
            request, arch = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Any = _answer(request, arch, known)
        except Exception as error:
            answer = f"{request['kernel']}: {type(error).__name__}: {error}"
        pickle.dump(answer, out)
        out.flush()


if __name__ == "__main__":
    # Classes are pickled by their module's name.
    importlib.import_module("tests.ptx_on_cpu.compiler")._serve()
