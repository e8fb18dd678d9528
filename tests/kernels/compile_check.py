"""Compiles what the launchers would launch, for any card, on a machine without one.

Run as a program, without TRITON_INTERPRET: ``python -m tests.kernels.compile_check OP [--arch 89]``
prints registers, spills and shared memory of each kernel. ``--json`` writes them, and the lines of
the configuration table that were looked up, to a file. Equal launches are compiled once.

Every case is compiled for sm_89 and one other card, by turns; an entry of the configuration table
that was made for a later card for that card too; the cases of ``LOOPS`` and the widest for every
card. With ``--every`` every case is, for every card.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.profile import main_loop, sass
from cmpose.kernels import configs, launch
from tests.kernels import ptx_gates
from tests.ptx_on_cpu import machine, triton_kernels
from tests.ptx_on_cpu.launches import Code, Counting, Fault, untouched_zeros

ARCHS = (80, 89, 90, 120)

OPS = sorted(
    path.stem for path in (Path(__file__).parent / "cases").glob("*.py") if path.stem != "__init__"
)
"""The ops that have Triton kernels, each with its cases in ``tests/kernels/cases``."""

LOOPS = {
    "spatial_attention": ("S 207 d 64 bfloat16",),
    "temporal_attention": ("forward T 3 d 64 bfloat16", "backward T 3 d 64 bfloat16"),
    "corrupt_tokens": ("forward bfloat16", "backward bfloat16"),
    "reconstruction_loss": ("forward 768 bfloat16", "scale 768 bfloat16"),
    "heatmap_loss": ("forward 64x48 bfloat16", "scale bfloat16"),
    "warp_clips": ("bfloat16 by float64",),
}
"""Op → its cases of the reference shape, whose main loops have budgets (tests/kernels/gate.py)."""

LOOP_ARCHS = (120,)
"""Cards whose loops have them: those of sm_89 and sm_90 are counted whole."""

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.bool: "*u1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs on one card; bytes, and registers a thread.

    Attributes:
        kernel: its module and function.
        half: whether it takes tensors of float16 or bfloat16.
        ahead: see :func:`ptx_gates.ahead`.
        wrong: ptxas's warnings; of what has ``wgmma``, registers that are reused too early, and
            what its first block does that it must not.
        loop: of :data:`LOOPS`, see :func:`bench.profile.main_loop.main_loop`.
        error: why it does not compile; then the rest is 0.
    """

    kernel: str
    case: str
    arch: int
    warps: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    mma: bool = False
    half: bool = False
    ahead: float | None = None
    wrong: tuple[str, ...] = ()
    loop: dict[str, float] = field(default_factory=dict)
    error: str = ""


def kernel_name(kernel: Any) -> str:
    """``temporal_attention.forward_kernel``, for a ``@triton.jit`` function."""
    return f"{kernel.__module__.removeprefix('cmpose.kernels.')}.{kernel.__name__}"


def _signature(launched: launch.Launch) -> tuple[dict[str, str], dict[str, Any], dict]:
    """Types, constants and divisibility of a launch, as Triton's own launcher derives them."""
    constants = dict(launched.constants)
    parameters = launched.kernel.params
    positional = [parameter.name for parameter in parameters if parameter.name not in constants]
    assert len(positional) == len(launched.arguments), (launched.kernel, positional)
    values = dict(zip(positional, launched.arguments, strict=True))
    signature: dict[str, str] = {}
    attributes = {}
    for index, parameter in enumerate(parameters):
        name = parameter.name
        value = values.get(name)
        specialized = not parameter.do_not_specialize
        aligned = specialized and not parameter.do_not_specialize_on_alignment
        if name in constants:
            signature[name], aligned = "constexpr", False
        elif isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            # torch's allocations are aligned; so is a view if its offset is.
            aligned &= value.storage_offset() * value.element_size() % 16 == 0
        elif value is None or (specialized and type(value) is int and value == 1):
            signature[name], constants[name], aligned = "constexpr", value, False
        elif isinstance(value, bool):
            signature[name], aligned = "u1", False
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned &= value % 16 == 0
        else:
            assert isinstance(value, float), (name, value)
            signature[name], aligned = "fp32", False
        if parameter.annotation_type and signature[name] != "constexpr":
            signature[name] = parameter.annotation_type
        if aligned:
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
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    return int(match[1]), int(match[2])


def _options(launched: launch.Launch) -> dict[str, Any]:
    return {
        "num_warps": launched.config.num_warps,
        "num_stages": launched.config.num_stages,
        "enable_fp_fusion": launched.fp_fusion,
    }


def build(launched: launch.Launch, arch: int) -> Any:
    """Triton's compiled kernel for ``arch``, with ``asm`` (ttir, ptx, cubin, ...) in it."""
    signature, constants, attributes = _signature(launched)
    source = ASTSource(launched.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=_options(launched))


def types_of(launched: launch.Launch) -> list[str | None]:
    """A launch's arguments' types; None for those compiled in."""
    signature, constants, _ = _signature(launched)
    names = [p.name for p in launched.kernel.params if p.name not in launched.constants]
    return [None if name in constants else signature[name] for name in names]


def first_block(
    launched: launch.Launch, arch: int, code_of: Callable[[launch.Launch], Code]
) -> list[str]:
    """What the machine catches in a launch's first block, on zeros; nothing without a g++."""
    if machine.compiler() is None:
        return []
    memory: list[Tensor] = []

    def zeros(of: Tensor) -> Tensor:
        memory.append(untouched_zeros(of.untyped_storage().nbytes() // of.itemsize, dtype=of.dtype))
        return memory[-1].as_strided(of.shape, of.stride(), of.storage_offset())

    arguments = tuple(zeros(a) if isinstance(a, Tensor) else a for a in launched.arguments)
    launched = replace(launched, arguments=arguments)
    code = code_of(launched)
    one = replace(triton_kernels.of(launched), tensors=memory, code=lambda _: code)
    try:
        one.run(arch, counting=Counting([0]))
    except Fault as fault:
        return [str(fault)]
    return []


_LOOP_CASES = {case for cases in LOOPS.values() for case in cases}
_WIDEST_CASES = {"backward T 5 d 80 float16"}
"""What needs more registers than any other case, on one card."""


def with_loop(row: Compiled, launched: launch.Launch) -> Compiled:
    """The row with its main loop, if that has a budget."""
    if row.arch not in LOOP_ARCHS or row.case not in _LOOP_CASES or row.error:
        return row
    cubin = build(launched, row.arch).asm["cubin"]  # from Triton's cache
    return replace(row, loop=main_loop.main_loop(sass.disassembled(cubin).blocks))


_compiled: dict[str, Compiled] = {}


def compile_launch(launched: launch.Launch, arch: int, case: str) -> Compiled:
    """Compiles a recorded launch for ``arch`` and reads what it needs."""
    name = kernel_name(launched.kernel)
    signature, constants, attributes = _signature(launched)
    key = repr((name, signature, constants, attributes, _options(launched), arch))
    if key in _compiled:
        return replace(_compiled[key], case=case)
    row = Compiled(name, case, arch, launched.config.num_warps)
    try:
        kernel = build(launched, arch)
    except Exception as error:  # whatever the compiler raises is a finding
        lines = str(error).strip().splitlines() or [""]
        _compiled[key] = replace(row, error=f"{type(error).__name__}: {lines[-1]}")
        return _compiled[key]
    registers, stack = _resources(kernel.asm["cubin"])
    ptx, shared = kernel.asm["ptx"], kernel.metadata.shared
    wrong = ptx_gates.warnings(ptx)
    if "wgmma" in ptx:
        wrong += ptx_gates.reused(sass.disassembled(kernel.asm["cubin"]).blocks)
        types = types_of(launched)
        wrong += first_block(
            launched, arch, lambda one: triton_kernels.packed(one, ptx, shared, types)
        )
    _compiled[key] = replace(
        row,
        registers=registers,
        stack=stack,
        shared=shared,
        mma="mma" in ptx,
        half=not {"*fp16", "*bf16"}.isdisjoint(signature.values()),
        ahead=ptx_gates.ahead(ptx) if "mma" in ptx else None,
        wrong=tuple(wrong),
    )
    return _compiled[key]


def compile_cases(
    cases: Iterable[tuple[str, Callable[[], Any]]],
    arch: int,
    lookups: Sequence[configs.Lookup],
    every: bool,
) -> Iterable[tuple[Compiled, launch.Launch]]:
    """Runs each case's launcher on meta tensors and compiles what it launches.

    ``lookups`` are being noted. Not ``every``: what has no configuration of the card's own, or that
    of an earlier case, is compiled for sm_89, and by turns for one other card.
    """
    turns = [card for card in ARCHS if card != 89]
    configured: set[tuple[str, str]] = set()
    for number, (name, call) in enumerate(cases):
        with launch.recording(arch) as launches:
            call()
        assert launches, f"{name} launches nothing"
        here = every or arch in (89, turns[number % len(turns)])
        here |= name in _LOOP_CASES | _WIDEST_CASES
        for launched in launches:
            own = {
                (note.kernel, repr(note.variant))
                for note in lookups
                if note.config is launched.config and 89 < note.arch == arch
            }
            if here or not own <= configured:
                yield with_loop(compile_launch(launched, arch, name), launched), launched
            configured |= own


def cases_of(op: str) -> dict[str, Callable[[], Any]]:
    """The cases of an op, or of a module if the name has a dot."""
    return importlib.import_module(op if "." in op else f"tests.kernels.cases.{op}").CASES


def _report(row: Compiled) -> str:
    if row.error:
        return f"sm_{row.arch:<4} {row.kernel:44} {row.case:40} {row.error}"
    return (
        f"sm_{row.arch:<4} {row.kernel:44} {row.case:40} warps {row.warps:2} "
        f"registers {row.registers:3} stack {row.stack:5} shared {row.shared:6} "
        f"{'mma' if row.mma else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="+")
    parser.add_argument("--arch", type=int, action="append")
    parser.add_argument("--json", type=Path, help="folder for a file of findings an op")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--every", action="store_true", help="every case for every card")
    options = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    archs = options.arch or ARCHS
    failed = False
    for op in options.op:
        start, before = time.monotonic(), len(_compiled)
        rows: list[Compiled] = []
        reached: set[tuple[str, str, int]] = set()
        unpinned: set[str] = set()
        chosen = [(name, call) for name, call in cases_of(op).items() if options.only in name]
        for arch in archs:
            with configs.noting() as lookups:
                for row, launched in compile_cases(chosen, arch, lookups, options.every):
                    rows.append(row)
                    print(_report(row), flush=True)
                    if all(note.config is not launched.config for note in lookups):
                        unpinned.add(row.kernel)
            reached |= {(note.kernel, repr(note.variant), note.arch) for note in lookups}
        summary = (
            f"{op} for {', '.join(f'sm_{arch}' for arch in archs)}: {len(chosen)} cases, "
            f"{len(rows)} launches, {len(_compiled) - before} kernels compiled in "
            f"{time.monotonic() - start:.0f} s"
        )
        print(summary, flush=True)
        failed |= any(row.error for row in rows)
        if options.json:
            report = {
                "compiled": [asdict(row) for row in rows],
                "reached": sorted(reached),
                "unpinned": sorted(unpinned),
                "summary": summary,
            }
            part = options.json / f"{op}.part"
            part.write_text(json.dumps(report))
            part.replace(options.json / f"{op}.json")  # who waits for it reads it whole
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
