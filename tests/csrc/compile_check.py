"""Compiles the CUDA sources for every card that is supported, on a machine without one.

``python -m tests.csrc.compile_check`` prints a line for each kernel and card: registers, spills,
stack and static shared memory as ptxas reports them, and the dynamic shared memory that the
launchers ask for. The flags are those of the build (csrc/build.py). Objects are kept in
``build/csrc``, so that a second run compiles only what has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from cmpose import native
from cmpose.files import write_text
from csrc import build

ARCHS = (80, 89, 90, 120)

REQUIRE = "CMPOSE_REQUIRE_NVCC"


@dataclass(frozen=True)
class Row:
    """What one kernel needs on one card; bytes, and registers a thread.

    Attributes:
        kernel: its source file and its name with the template arguments, as
            ``dpc_knn.density_kernel<float>``.
        stack: with that of the functions it calls.
        shared: static shared memory of a block.
    """

    kernel: str
    arch: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int

    @property
    def name(self) -> str:
        """Without the file: ``density_kernel<float>``."""
        return self.kernel.partition(".")[2]


def matches(line: str, kernel: str) -> bool:
    """Whether a line of a table stands for a kernel.

    A line names all template arguments, or the first ones, or none: ``f<float, 8>``, ``f<float>``
    and ``f`` all stand for ``f<float, 8>``.
    """
    if line == kernel or kernel.startswith(f"{line}<"):
        return True
    return line.endswith(">") and kernel.startswith(f"{line[:-1]},")


def line_for(kernel: str, table: Iterable[str]) -> str | None:
    """The line of a table that stands for a kernel; of several, the longest."""
    return max((line for line in table if matches(line, kernel)), key=len, default=None)


def dynamic_of(row: Row, dynamic: dict[str, int]) -> int:
    """The bytes of dynamic shared memory that a row's kernel is launched with."""
    line = line_for(row.name, dynamic)
    return 0 if line is None else dynamic[line]


def require_nvcc() -> None:
    """Skips a test that compiles where there is no nvcc; fails it where one must be."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, but {error}")
        pytest.skip(str(error))


def asks_for(archs: tuple[int, ...]) -> dict[str, str]:
    """The variables that ask for the build for cards such as 89, with PTX of the last.

    With the sources' lines, by which tests/ptx_on_cpu tells where a fault is.
    """
    names = ";".join(f"{arch // 10}.{arch % 10}" for arch in archs)
    return {"CMPOSE_CUDA_ARCHS": f"{names}+PTX", build.LINE_INFO: "1"}


def plan_for(archs: tuple[int, ...], source: Path = build.CSRC, folder: Path = build.FOLDER):
    """The build that :func:`asks_for` describes."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_")}
    return build.plan(environ | asks_for(archs), folder)._replace(source=source)


def demangled(symbols: list[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    assert tool, "neither c++filt (of binutils, as g++ needs) nor cu++filt is on PATH"
    text = "\n".join(symbols)
    done = subprocess.run([tool, "-p"], input=text, capture_output=True, text=True, check=True)
    return [re.sub(r"\(anonymous namespace\)::|\bcmpose::", "", n) for n in done.stdout.split("\n")]


_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\w+)' for 'sm_(\d+)'")
_PROPERTIES = re.compile(r"ptxas info\s*: Function properties for (\w+)")
_SPILLS = re.compile(
    r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes cumulative stack size")
_SHARED = re.compile(r"(\d+) bytes smem")


def parse(file: str, report: str) -> list[Row]:
    """ptxas's report on a source as rows. A function that is called, not inlined, has one too.

    Args:
        file: the source's name without its ending.
        report: what nvcc printed under ``-Xptxas=-v``.
    """
    values_of: dict[tuple[str, int], dict[str, int]] = {}
    symbol, arch, entries = "", 0, 0
    for line in report.splitlines():
        if match := _ENTRY.match(line):
            symbol, arch = match[1], int(match[2])
            entries += 1
        elif match := _PROPERTIES.match(line):
            symbol = match[1]
        elif match := _SPILLS.match(line):
            stack, stores, loads = map(int, match.groups())
            values = {"stack": stack, "spill_stores": stores, "spill_loads": loads}
            values_of[symbol, arch] = {"registers": 0, "shared": 0} | values
        elif match := _USED.match(line):
            row = values_of[symbol, arch]
            row["registers"] = int(match[1])
            if match := _STACK.search(line):
                row["stack"] = max(row["stack"], int(match[1]))
            if match := _SHARED.search(line):
                row["shared"] = int(match[1])
    read = sum(row["registers"] > 0 for row in values_of.values())
    assert read == entries > 0, f"{file}: of {entries} kernels {read} could be read:\n{report}"
    names = demangled([symbol for symbol, _ in values_of])
    rows = [
        Row(f"{file}.{name}", arch, **values)
        for name, ((_, arch), values) in zip(names, values_of.items(), strict=True)
    ]
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


@dataclass(frozen=True)
class Report:
    """The findings: a row a kernel and card, and what the compilers warn of."""

    rows: list[Row]
    warnings: list[str]


def _digest(source: Path) -> str:
    """Of a source and of all headers beside it."""
    files = [source, *sorted(source.parent.glob("*.*h"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def compile_all(plan: build.BuildPlan) -> Report:
    """Compiles what has changed of a plan's kernels, and reads the reports on all of them."""
    ptx_folder = plan.folder / "ptx"
    ptx_folder.mkdir(parents=True, exist_ok=True)
    before = {path: _digest(path) for path in plan.kernels}
    # A second process waits until the PTX is there, too.
    locked = build.locked(ptx_folder)
    with locked, tempfile.TemporaryDirectory(dir=plan.folder) as folder:
        flags = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --keep --keep-dir {shlex.quote(folder)}"
        with mock.patch.dict(os.environ, NVCC_APPEND_FLAGS=flags):
            ran = build.run(plan, plan.objects, threads=1)
        for path in plan.kernels:
            if f"nvcc {path.name}" in ran and _digest(path) == before[path]:
                for (major, minor), archs in build.front_ends(plan.target.archs).items():
                    ptx_file = Path(folder) / f"{path.stem}.compute_{major}{minor}.ptx"
                    if not ptx_file.is_file():  # of one architecture alone nvcc names it otherwise
                        continue
                    first, rest = re.split(r"^\.target .*\n", ptx_file.read_text(), flags=re.M)
                    for a, b in archs:  # what nvcc would make for that card alone
                        name = f"{before[path]}.{path.stem}.compute_{a}{b}.ptx"
                        write_text(ptx_folder / name, f"{first}.target sm_{a}{b}\n{rest}")
    report = Report([], [])
    for path, out in zip(plan.kernels, plan.objects, strict=True):
        text = out.with_name(f"{out.name}.log").read_text()
        report.rows.extend(parse(path.stem, text))
        warned = (line for line in text.splitlines() if re.search(r"\bwarning(:| #)", line))
        report.warnings.extend(dict.fromkeys(warned))  # each architecture repeats it
    return report


def kept_ptx(plan: build.BuildPlan, source: Path, arch: int) -> Path | None:
    """PTX of a source of a plan as it is now, if :func:`compile_all` has made it on its way."""
    if source.parent != plan.source:
        return None
    path = plan.folder / "ptx" / f"{_digest(source)}.{source.stem}.compute_{arch}.ptx"
    return path if path.is_file() else None


def dynamic_shared_memory(plan: build.BuildPlan) -> dict[str, int]:
    """Kernel (see :func:`matches`) → the most dynamic shared memory it is launched with, in bytes.

    The core itself tells, by ``_C.shared_memory()``: the one in which the sources were compiled
    for the CPU if ``CMPOSE_CUDA_ON_CPU`` names it, else the plan's, which loads without a driver.
    """
    if os.environ.get(native.ON_CPU):
        return dict(native.module().shared_memory())
    build.run(plan, [plan.module], threads=1)
    code = (
        "import importlib.util, json, sys\n"
        f"spec = importlib.util.spec_from_file_location('{native.NAME}', sys.argv[1])\n"
        "core = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(core)\n"
        "print(json.dumps(core.shared_memory()))\n"
    )
    command = [sys.executable, "-c", code, str(plan.module)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(rows: list[Row], dynamic: dict[str, int]) -> list[str]:
    """The rows as lines of text."""
    width = max(len(row.kernel) for row in rows)
    titles = ("registers", "spill stores", "spill loads", "stack", "shared", "dynamic shared")
    lines = [f"{'kernel':{width}} card    {'  '.join(titles)}"]
    for row in rows:
        extra = dynamic_of(row, dynamic)
        values = (row.registers, row.spill_stores, row.spill_loads, row.stack, row.shared, extra)
        cells = [f"{value:{len(title)}}" for title, value in zip(titles, values, strict=True)]
        lines.append(f"{row.kernel:{width}} sm_{row.arch:<3}  {'  '.join(cells)}")
    return lines


def summary(rows: list[Row]) -> list[str]:
    """A line a kernel: registers and static shared memory on each card."""
    kernels: dict[str, list[Row]] = {}
    for row in rows:
        kernels.setdefault(row.kernel, []).append(row)
    cards = "/".join(str(arch) for arch in ARCHS)
    return [
        f"csrc/{kernel} on sm_{cards}: registers {'/'.join(str(row.registers) for row in of)}, "
        f"static shared memory {max(row.shared for row in of)}"
        for kernel, of in kernels.items()
    ]


def main() -> int:
    try:
        plan = plan_for(ARCHS)
        report = compile_all(plan)
        print("\n".join([*table(report.rows, dynamic_shared_memory(plan)), *report.warnings]))
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
