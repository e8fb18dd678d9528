"""Builds the CUDA C++ core ``cmpose._C``: the one place for its sources, flags and architectures.

``setup.py`` builds with it, the compile check of the tests too; ``python -m csrc.build`` builds for
every architecture and prints the time. It needs nvcc, a C++ compiler, and the packages ninja and
pybind11; torch never.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from csrc.toolkit import (
    Arch,
    BuildError,
    CompileTarget,
    NoToolkit,
    Nvcc,
    choose_target,
    cxx,
    dotted,
    find_nvcc,
    read_nvcc,
    refusal,
)

CSRC = Path(__file__).resolve().parent
PROJECT = CSRC.parent
FOLDER = PROJECT / "build" / "csrc"
"""Where objects are kept between builds, a folder per compiler and architectures."""

# Never --use_fast_math: the ops' errors are held against plain PyTorch's.
NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
CXX_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Without relocatable device code there is nothing to link for a device.
LINK_FLAGS = ("-shared", "-cudart=static", "-nodlink", "-Xlinker=--exclude-libs,ALL")

NO_CORE = "_C.txt"
"""The file of a package without its core that says why; ``cmpose/native.py`` reads it."""

LINE_INFO = "CMPOSE_CUDA_LINEINFO"
"""1 keeps the sources' lines in the machine code, for profilers; it is twice as large with them."""

# -- what is built --------------------------------------------------------------------------------


class BuildPlan(NamedTuple):
    """A build: from where, to where, with what.

    Attributes:
        source: the folder of the sources; every ``.cu`` in it and ``bindings.cpp`` are compiled.
        folder: keeps the objects, each with ptxas's report beside it as ``<object>.log``.
        nvcc: the compiler.
        target: the architectures.
        version: of cmpose.
        line_info: whether machine code keeps the sources' lines.
    """

    source: Path
    folder: Path
    nvcc: Nvcc
    target: CompileTarget
    version: str
    line_info: bool = False

    @property
    def kernels(self) -> list[Path]:
        """The CUDA sources."""
        return sorted(self.source.glob("*.cu"))

    @property
    def objects(self) -> list[Path]:
        """What the CUDA sources are compiled to."""
        return [self.folder / f"{path.name}.o" for path in self.kernels]

    @property
    def module(self) -> Path:
        """The extension module."""
        return self.folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def version() -> str:
    """cmpose's, read without importing it."""
    return runpy.run_path(str(PROJECT / "cmpose" / "_version.py"))["__version__"]


def plan(environ: Mapping[str, str] = os.environ, folder: Path = FOLDER) -> BuildPlan:
    """The build that the environment asks for, with objects in a folder of their own.

    Raises:
        BuildError: no nvcc, or architectures that it has not.
    """
    nvcc = read_nvcc(find_nvcc(environ))
    target = choose_target(nvcc, environ)
    words = [f"cuda{nvcc.build}", *(f"{a}{b}" for a, b in target.archs)]
    words += [f"ptx{a}{b}" for a, b in target.ptx]
    line_info = environ.get(LINE_INFO) == "1"
    words += ["lineinfo"] if line_info else []
    return BuildPlan(CSRC, folder / "-".join(words), nvcc, target, version(), line_info)


def front_ends(archs: Iterable[Arch]) -> dict[Arch, list[Arch]]:
    """Architecture that the sources are compiled to PTX for → those that this PTX is assembled for.

    Up to 9.0 nvcc's front end, half of its time, makes the same PTX of the sources for each: no
    source asks for ``__CUDA_ARCH__``. From 10.0 on it optimizes differently.
    """
    assembled_from: dict[Arch, list[Arch]] = {}
    for arch in sorted(archs):
        first = next(iter(assembled_from), arch) if arch < (10, 0) else arch
        assembled_from.setdefault(first, []).append(arch)
    return assembled_from


def _escaped(text: str | Path) -> str:
    """A path of a build line, in ninja's syntax."""
    return re.sub(r"([$ :])", r"$\1", str(text))


def _relative(plan: BuildPlan, path: Path) -> str:
    """A path as commands have it, which run in the folder that holds the sources' folder.

    So nothing is compiled again in a copy of all of it that keeps the files' times.
    """
    return os.path.relpath(path, plan.source.parent)


def _shell(*words: str | Path) -> str:
    """A command's words, quoted for the shell and for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _size_flags(plan: BuildPlan) -> list[str]:
    """What makes the machine code small.

    Before CUDA 13, whose drivers all read it, the smaller form would need a driver of CUDA 12.4.
    """
    lines = ["-lineinfo"] if plan.line_info else []
    small = "--compress-mode=size" if plan.nvcc.release >= (13, 0) else "-Xfatbin=-compress-all"
    return [*lines, small]


def _ninja_file(plan: BuildPlan) -> str:
    """The text of build.ninja."""
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"{sys.executable} has no pybind11 (pip install pybind11 ninja)") from None
    gencode = [
        f"-gencode=arch=compute_{a}{b},code=[{','.join(f'sm_{c}{d}' for c, d in archs)}]"
        for (a, b), archs in front_ends(plan.target.archs).items()
    ]
    gencode += [f"-gencode=arch=compute_{a}{b},code=compute_{a}{b}" for a, b in plan.target.ptx]
    nvcc = [str(plan.nvcc.path), f"-ccbin={cxx()[0]}", *plan.nvcc.options]
    # The number of threads comes from the environment: a change of it recompiles nothing.
    flags = [*NVCC_FLAGS, *_size_flags(plan), *gencode]
    compile_kernel = (
        f"{_shell(*nvcc, *flags)} --threads $${{CMPOSE_NVCC_THREADS:-1}} "
        f"{_shell('-I', _relative(plan, plan.source))} -MD -MF $out.d -c $in -o $out"
    )
    python = sysconfig.get_paths()
    includes = {pybind11.get_include(), python["include"], python["platinclude"]}
    facts = {
        "CMPOSE_VERSION": plan.version,
        "CMPOSE_CUDA_ARCHS_BUILT": dotted(plan.target.archs),
        "CMPOSE_CUDA_PTX_BUILT": dotted(plan.target.ptx),
        "CMPOSE_NVCC_VERSION": plan.nvcc.version,
    }
    compile_bindings = _shell(
        *[*cxx(), *CXX_FLAGS, "-I", _relative(plan, plan.source)],
        *[word for path in sorted(includes) for word in ("-isystem", path)],
        *[f'-D{name}="{value}"' for name, value in facts.items()],
    )

    def named(path: Path) -> str:
        return _escaped(_relative(plan, path))

    kernels = zip(plan.kernels, plan.objects, strict=True)
    bindings = named(plan.folder / "bindings.cpp.o")
    lines = [
        f"builddir = {named(plan.folder)}",
        # What nvcc says goes to a file: an object that is up to date keeps its report.
        "rule nvcc",
        f"  command = {{ {compile_kernel} > $out.log 2>&1; }} || {{ cat $out.log; exit 1; }}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = nvcc $name",
        "rule cxx",
        f"  command = {compile_bindings} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = c++ $name",
        "rule link",
        f"  command = {_shell(*nvcc, *LINK_FLAGS)} $in -o $out",
        "  description = link $name",
        *(
            f"build {named(out)} | {named(out)}.log: nvcc {named(path)}\n  name = {path.name}"
            for path, out in kernels
        ),
        f"build {bindings}: cxx {named(plan.source / 'bindings.cpp')}",
        "  name = bindings.cpp",
        f"build {named(plan.module)}: link {' '.join([*map(named, plan.objects), bindings])}",
        f"  name = {plan.module.name}",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two builds into one folder wait for each other."""
    import fcntl  # not on Windows, where setup.py imports this module too

    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _ninja() -> str:
    """ninja's program: the package's, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        on_path = shutil.which("ninja")
        if on_path is None:
            raise BuildError(f"{sys.executable} has no ninja (pip install ninja)") from None
        return on_path
    return str(Path(ninja.BIN_DIR) / "ninja")


def _jobs() -> int:
    """How many commands run at a time."""
    requested = os.environ.get("MAX_JOBS", "").strip()
    if requested and not (requested.isdecimal() and int(requested)):
        raise BuildError(f"MAX_JOBS={requested}: must be a number of commands from 1 on")
    return int(requested) if requested else len(os.sched_getaffinity(0))


def run(plan: BuildPlan, outputs: list[Path], threads: int | None = None) -> list[str]:
    """Brings outputs of a plan up to date, and prints each command's name when it is done.

    Args:
        plan: the build.
        outputs: which of its objects, or its module.
        threads: architectures that one nvcc compiles at a time; None takes the cores that the
            files leave. ``MAX_JOBS`` limits the commands that run at a time.

    Returns:
        The names of the commands that ran: ``nvcc dpc_knn.cu``, ``c++ bindings.cpp``, ...

    Raises:
        BuildError: a command failed; the message holds all that it printed.
    """
    if not plan.kernels:
        raise BuildError(f"the CUDA sources are not in {plan.source}")
    if shutil.which(cxx()[0]) is None:
        raise NoToolkit(f"there is no C++ compiler {cxx()[0]}; install it or set CXX")
    jobs = _jobs()
    if threads is None:
        threads = max(1, min(jobs // len(plan.kernels), sum(map(len, plan.target[:2]))))
    plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder):
        (plan.folder / "build.ninja").write_text(_ninja_file(plan))
        command = [_ninja(), "-C", str(plan.source.parent), "-j", str(jobs)]
        command += ["-f", _relative(plan, plan.folder / "build.ninja")]
        command += [_relative(plan, path) for path in outputs]
        environ = os.environ | {"CMPOSE_NVCC_THREADS": str(threads), "NINJA_STATUS": "[%f/%t] "}
        process = subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        ran, text = [], []
        for line in process.stdout:
            status = re.match(r"\[\d+/\d+\] (.*)", line)
            if status:
                ran.append(status[1])
                print(line, end="", flush=True)
            elif not re.match("ninja: (Entering|no work|build stopped)", line):
                text.append(line)
    if process.wait():
        printed = "".join(text)
        advice = refusal(plan.nvcc, printed)
        if advice:
            raise NoToolkit(f"{advice}. The compiler says:\n{printed}")
        raise BuildError(f"the CUDA core does not compile:\n{printed}")
    print("".join(text), end="")  # warnings
    return ran


def build(plan: BuildPlan) -> Path:
    """Builds the extension module, says for what, and returns its path.

    Raises:
        BuildError: see :func:`run`.
    """
    for note in plan.target.notes:
        print(f"cmpose._C: {note}", flush=True)
    print(f"cmpose._C: {plan.target}, nvcc {plan.nvcc.build} ({plan.nvcc.path})", flush=True)
    start = time.monotonic()
    ran = run(plan, [plan.module])
    print(
        f"cmpose._C: {len(ran)} commands in {time.monotonic() - start:.0f} s on "
        f"{len(os.sched_getaffinity(0))} cores",
        flush=True,
    )
    return plan.module


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds cmpose._C and prints the time.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps the objects")
    parser.add_argument("--in-place", action="store_true", help="also copy it to cmpose/")
    parser.add_argument("--nvcc", action="store_true", help="only print which nvcc there is")
    options = parser.parse_args()
    try:
        if options.nvcc:
            print(find_nvcc())
        else:
            built = build(plan(folder=options.folder))
            print(built)
            if options.in_place:
                package = PROJECT / "cmpose"
                for stale in package.glob("_C.*.so"):
                    stale.unlink()
                shutil.copy2(built, package / built.name)
                print(f"copied to cmpose/{built.name}")
    except BuildError as error:
        print(f"csrc.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
