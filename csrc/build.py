"""Builds the CUDA C++ core ``cmpose._C``: the one place for its sources, flags and architectures.

``setup.py`` builds with it, the compile check of the tests too; ``python csrc/build.py`` builds for
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent
PROJECT = CSRC.parent
FOLDER = PROJECT / "build" / "csrc"
"""Where objects are kept between builds, a folder per compiler and architectures."""

DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;12.0+PTX"
OLDEST = (8, 0)
"""What the kernels need: bfloat16 and asynchronous copies came with compute capability 8.0."""

ARCH_VARIABLES = ("CMPOSE_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
"""They choose the architectures; the first that is set wins."""

# Never --use_fast_math: the ops' errors are held against plain PyTorch's.
NVCC_FLAGS = (
    "-O3",
    "-std=c++17",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)
CXX_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Without relocatable device code there is nothing to link for a device.
LINK_FLAGS = ("-shared", "-cudart=static", "-nodlink", "-Xlinker=--exclude-libs,ALL")

_DEFAULT_CUDA = Path("/usr/local/cuda")

Arch = tuple[int, int]


class BuildError(Exception):
    """The core cannot be built; the message says why, with the compiler's own text."""


# -- the compiler ---------------------------------------------------------------------------------


class Nvcc(NamedTuple):
    """A CUDA compiler.

    Attributes:
        path: of the program.
        version: of its toolkit, as ``13.0``.
        build: the full version, as ``13.0.88``.
        archs: what it compiles for.
    """

    path: Path
    version: str
    build: str
    archs: frozenset[Arch]


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Path:
    """nvcc of ``CUDA_HOME``, else ``CUDA_PATH``, else on ``PATH``, else in ``/usr/local/cuda``.

    Raises:
        BuildError: there is none. A ``CUDA_HOME`` or ``CUDA_PATH`` without one hides the others.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            path = Path(environ[variable]) / "bin" / "nvcc"
            if path.is_file():
                return path
            raise BuildError(
                f"there is no bin/nvcc in {variable}={environ[variable]}; set it to where NVIDIA's "
                "CUDA toolkit is, or unset it"
            )
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        return Path(on_path)
    path = _DEFAULT_CUDA / "bin" / "nvcc"
    if path.is_file():
        return path
    raise BuildError(
        f"there is no nvcc on PATH nor in {_DEFAULT_CUDA}/bin; install NVIDIA's CUDA toolkit, or "
        "set CUDA_HOME to where it is"
    )


def read_nvcc(path: Path) -> Nvcc:
    """Asks a compiler what it is.

    Raises:
        BuildError: it does not answer as nvcc does.
    """
    answers = []
    for option in ("--version", "--list-gpu-arch"):
        try:
            done = subprocess.run([path, option], capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"{path} does not run: {error}") from None
        if done.returncode:
            raise BuildError(f"{path} {option} fails: {(done.stdout + done.stderr).strip()}")
        answers.append(done.stdout)
    version = re.search(r"release (\d+\.\d+), V([\d.]+)", answers[0])
    archs = re.findall(r"compute_(\d+)(\d)\b", answers[1])
    if version is None or not archs:
        raise BuildError(f"{path} does not answer as nvcc does: {' '.join(answers).strip()}")
    return Nvcc(path, version[1], version[2], frozenset((int(a), int(b)) for a, b in archs))


# -- architectures --------------------------------------------------------------------------------


class Target(NamedTuple):
    """What is compiled for.

    Attributes:
        archs: compute capabilities with machine code inside, ascending.
        ptx: those with PTX inside, which the driver compiles for later cards.
        notes: what the user should know about the choice.
    """

    archs: tuple[Arch, ...]
    ptx: tuple[Arch, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return dotted(self.archs) + (f" + PTX {dotted(self.ptx)}" if self.ptx else "")


def dotted(archs: tuple[Arch, ...]) -> str:
    """``8.0;8.6``"""
    return ";".join(f"{major}.{minor}" for major, minor in archs)


# An architecture-specific 9.0a is built as 9.0: no kernel needs more, and 9.0 runs on more cards.
_ARCH = re.compile(r"(\d+)\.(\d)[af]?(\+PTX)?", re.IGNORECASE)


def parse_archs(source: str, value: str) -> Target:
    """The architectures that a list names, in torch's syntax: ``8.9;9.0+PTX``.

    Args:
        source: the variable it comes from, for messages.
        value: separated by ``;``, ``,`` or spaces.

    Raises:
        BuildError: it is no such list.
    """
    archs, ptx = set(), set()
    for word in re.split(r"[;,\s]+", value.strip(";, \t\n")):
        match = _ARCH.fullmatch(word)
        if match is None:
            raise BuildError(
                f"{source}={value}: {word!r} is no compute capability; give a list such as "
                "8.9 or 8.6;8.9;9.0+PTX"
            )
        arch = int(match[1]), int(match[2])
        archs.add(arch)
        if match[3]:
            ptx.add(arch)
    return Target(tuple(sorted(archs)), tuple(sorted(ptx)))


def choose_target(nvcc: Nvcc, environ: Mapping[str, str] = os.environ) -> Target:
    """What to compile for: the environment's list, else :data:`DEFAULT_ARCHS`.

    Of the default list, what nvcc does not know is left out, and a note says so. Of torch's list,
    which is made for other packages too, what is too old for the kernels is left out likewise.

    Raises:
        BuildError: a list that is none, or that names what cannot be compiled for.
    """
    source = next((name for name in ARCH_VARIABLES if environ.get(name, "").strip()), None)
    if source is None:
        wanted = parse_archs("the default", DEFAULT_ARCHS)
        known = tuple(arch for arch in wanted.archs if arch in nvcc.archs)
        if not known:
            raise BuildError(
                f"nvcc {nvcc.version} compiles for none of {DEFAULT_ARCHS}; give others in "
                f"{ARCH_VARIABLES[0]}, or another nvcc in CUDA_HOME"
            )
        missing = tuple(arch for arch in wanted.archs if arch not in known)
        notes = f"nvcc {nvcc.version} does not know {dotted(missing)}, left out"
        return Target(known, known[-1:], (notes,) if missing else ())
    value = environ[source]
    asked = parse_archs(source, value)
    old = tuple(arch for arch in asked.archs if arch < OLDEST)
    kept = Target(
        tuple(arch for arch in asked.archs if arch not in old),
        tuple(arch for arch in asked.ptx if arch not in old),
    )
    if old and (source == ARCH_VARIABLES[0] or not kept.archs):
        raise BuildError(f"{source}={value}: the kernels need {dotted((OLDEST,))} or more")
    unknown = tuple(arch for arch in kept.archs if arch not in nvcc.archs)
    if unknown:
        raise BuildError(
            f"{source}={value}: nvcc {nvcc.version} ({nvcc.path}) does not compile for "
            f"{dotted(unknown)}, but for {dotted(tuple(sorted(nvcc.archs)))}; leave it out, or "
            "give another nvcc in CUDA_HOME"
        )
    note = f"{source}={value}: {dotted(old)} left out, the kernels need {dotted((OLDEST,))} or more"
    return kept._replace(notes=(note,) if old else ())


# -- what is built --------------------------------------------------------------------------------


class BuildPlan(NamedTuple):
    """A build: from where, to where, with what.

    Attributes:
        source: the folder of the sources; every ``.cu`` in it and ``bindings.cpp`` are compiled.
        folder: keeps the objects, each with ptxas's report beside it as ``<object>.log``.
        nvcc: the compiler.
        target: the architectures.
        version: of cmpose.
    """

    source: Path
    folder: Path
    nvcc: Nvcc
    target: Target
    version: str

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
    return BuildPlan(CSRC, folder / "-".join(words), nvcc, target, version())


def _escaped(text: str | Path) -> str:
    """A path of a build line, in ninja's syntax."""
    return re.sub(r"([$ :])", r"$\1", str(text))


def _shell(*words: str | Path) -> str:
    """A command's words, quoted for the shell and for ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


def _compiler() -> list[str]:
    """The C++ compiler: the words of ``CXX``, without a cache before it, else g++."""
    words = shlex.split(os.environ.get("CXX", ""))
    return [word for word in words if Path(word).name not in ("ccache", "sccache")] or ["g++"]


def _ninja_file(plan: BuildPlan) -> str:
    """The text of build.ninja."""
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"{sys.executable} has no pybind11 (pip install pybind11 ninja)") from None
    gencode = [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in plan.target.archs]
    gencode += [f"-gencode=arch=compute_{a}{b},code=compute_{a}{b}" for a, b in plan.target.ptx]
    nvcc = [str(plan.nvcc.path), f"-ccbin={_compiler()[0]}"]
    # The number of threads comes from the environment: a change of it recompiles nothing.
    compile_kernel = (
        f"{_shell(*nvcc, *NVCC_FLAGS, *gencode)} --threads $${{CMPOSE_NVCC_THREADS:-1}} "
        f"{_shell('-I', plan.source)} -MD -MF $out.d -c $in -o $out"
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
        *[*_compiler(), *CXX_FLAGS, "-I", str(plan.source)],
        *[word for path in sorted(includes) for word in ("-isystem", path)],
        *[f'-D{name}="{value}"' for name, value in facts.items()],
    )
    kernels = zip(plan.kernels, plan.objects, strict=True)
    bindings = plan.folder / "bindings.cpp.o"
    lines = [
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
            f"build {_escaped(out)} | {_escaped(out)}.log: nvcc {_escaped(path)}\n"
            f"  name = {path.name}"
            for path, out in kernels
        ),
        f"build {_escaped(bindings)}: cxx {_escaped(plan.source / 'bindings.cpp')}",
        "  name = bindings.cpp",
        f"build {_escaped(plan.module)}: link "
        + " ".join(map(_escaped, [*plan.objects, bindings])),
        f"  name = {plan.module.name}",
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
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
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked and not (asked.isdecimal() and int(asked)):
        raise BuildError(f"MAX_JOBS={asked}: must be a number of commands from 1 on")
    return int(asked) if asked else len(os.sched_getaffinity(0))


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
    if shutil.which(_compiler()[0]) is None:
        raise BuildError(f"there is no C++ compiler {_compiler()[0]}; install it or set CXX")
    jobs = _jobs()
    if threads is None:
        threads = max(1, min(jobs // len(plan.kernels), sum(map(len, plan.target[:2]))))
    plan.folder.mkdir(parents=True, exist_ok=True)
    with _locked(plan.folder):
        (plan.folder / "build.ninja").write_text(_ninja_file(plan))
        command = [_ninja(), "-C", str(plan.folder), "-j", str(jobs), *map(str, outputs)]
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
            elif not line.startswith("ninja: "):
                text.append(line)
    if process.wait():
        raise BuildError("the CUDA core does not compile:\n" + "".join(text))
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
        print(f"csrc/build.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
