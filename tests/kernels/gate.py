"""Compiles what the launchers would launch, for any card, on a machine without one.

Run as a program, without TRITON_INTERPRET: ``python -m tests.kernels.gate OP [--arch 89]`` prints
registers, spills and shared memory per kernel; ``--json`` writes a line a kernel.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cmpose.kernels import launch

ARCHS = (80, 89, 90, 120)

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one card; bytes, and registers a thread."""

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    mma: bool


def _signature(launched: launch.Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Types, constants and divisibility of a launch, as Triton's own launcher derives them."""
    names = launched.kernel.arg_names
    constants = dict(launched.constants)
    positional = [name for name in names if name not in constants]
    assert len(positional) == len(launched.arguments), (launched.kernel, positional)
    values = dict(zip(positional, launched.arguments, strict=True))
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(names):
        value = constants.get(name) if name in constants else values[name]
        divisible = False
        if name in constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            divisible = True  # torch's allocations are; a view's offset is the caller's
        elif value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0
        else:
            assert isinstance(value, float), (name, value)
            signature[name] = "fp32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, from cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def build(launched: launch.Launch, arch: int) -> Any:
    """Triton's compiled kernel for ``arch``, with ``asm`` (ttir, ptx, cubin, ...) in it."""
    signature, constants, attributes = _signature(launched)
    source = ASTSource(launched.kernel, signature, constants, attributes)
    options = {
        "num_warps": launched.config.num_warps,
        "num_stages": launched.config.num_stages,
        "enable_fp_fusion": launched.fp_fusion,
    }
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_launch(launched: launch.Launch, arch: int, case: str) -> Compiled:
    """Compiles a recorded launch for ``arch`` and reads what it needs."""
    kernel = build(launched, arch)
    registers, stack = _resources(kernel.asm["cubin"])
    return Compiled(
        kernel=launched.kernel.__name__,
        case=case,
        arch=arch,
        warps=launched.config.num_warps,
        registers=registers,
        stack=stack,
        shared=kernel.metadata.shared,
        mma="mma" in kernel.asm["ptx"],
    )


def compile_cases(
    cases: Iterable[tuple[str, Callable[[], Any]]], arch: int
) -> Iterable[tuple[Compiled, launch.Launch]]:
    """Runs each case's launcher on meta tensors and compiles what it launches."""
    for name, call in cases:
        with launch.recording(arch) as launches:
            call()
        assert launches, f"{name} launches nothing"
        for launched in launches:
            yield compile_launch(launched, arch, name), launched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="+")
    parser.add_argument("--arch", type=int, action="append")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    options = parser.parse_args()
    rows = []
    for op in options.op:
        cases = importlib.import_module(f"tests.kernels.{op}_cases").CASES
        chosen = [(name, call) for name, call in cases.items() if options.only in name]
        for arch in options.arch or ARCHS:
            for row, _ in compile_cases(chosen, arch):
                rows.append(asdict(row))
                print(
                    f"sm_{row.arch:<4} {row.kernel:36} {row.case:40} warps {row.warps:2} "
                    f"registers {row.registers:3} stack {row.stack:5} shared {row.shared:6} "
                    f"{'mma' if row.mma else ''}",
                    flush=True,
                )
    if options.json:
        options.json.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


if __name__ == "__main__":
    main()
