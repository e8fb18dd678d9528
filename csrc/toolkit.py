"""NVIDIA's CUDA toolkit on this machine: where nvcc is, what it needs, and what it compiles for.

``csrc/build.py`` builds with what is found here. Torch is never imported: the names and separators
of ``TORCH_CUDA_ARCH_LIST`` are those of ``torch.utils.cpp_extension`` and of torch's
``select_compute_arch.cmake``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

DEFAULT_ARCHS = "8.0;8.6;8.9;9.0;12.0+PTX"
OLDEST = (8, 0)
"""What the kernels need: bfloat16 and asynchronous copies came with compute capability 8.0."""

ARCH_VARIABLES = ("CMPOSE_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
"""They choose the architectures; the first that is set wins."""

OLDEST_CUDA = (11, 8)
"""The first with ``cudaLaunchKernelEx``."""

_DEFAULT_CUDA = Path("/usr/local/cuda")

# What a build takes from the toolkit beside nvcc. Packages of pip and conda have each by itself.
_HEADERS = ("cuda_runtime.h", "crt/host_config.h", "cuda_fp16.h", "nv/target")
_LIBRARIES = ("libcudart_static.a", "libcudadevrt.a")
_PARTS = (
    r"cuda_runtime\.h|crt/host_\w+\.h|cuda_fp16\.h|nv/target|cudart_static|"
    r"cudadevrt|libdevice|\b(cicc|ptxas|cudafe\+\+|fatbinary)\b"
)
_PACKAGES = (
    "pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime "
    "nvidia-cuda-cccl, all of nvcc's version; or conda install cuda-nvcc cuda-cudart-static; or "
    "NVIDIA's whole CUDA toolkit"
)

Arch = tuple[int, int]


class BuildError(Exception):
    """The core cannot be built; the message says why, with the compiler's own text."""


class NoToolkit(BuildError):
    """This machine's compilers cannot build it: cmpose is installed without, unless demanded."""


# -- the compiler ---------------------------------------------------------------------------------


class Nvcc(NamedTuple):
    """A CUDA compiler.

    Attributes:
        path: of the program.
        version: of its toolkit, as ``13.0``.
        build: the full version, as ``13.0.88``.
        archs: what it compiles for.
        options: with which it finds the toolkit's headers and libraries where it does not itself.
    """

    path: Path
    version: str
    build: str
    archs: frozenset[Arch]
    options: tuple[str, ...] = ()

    @property
    def release(self) -> tuple[int, int]:
        """The version as (13, 0)."""
        return numbers(self.version)


def numbers(version: str) -> tuple[int, int]:
    """``13.0`` → (13, 0)"""
    major, minor = version.split(".")
    return int(major), int(minor)


def find_nvcc(environ: Mapping[str, str] = os.environ, site: Path | None = None) -> Path:
    """nvcc of ``CUDA_HOME``, else ``CUDA_PATH``, else on ``PATH``, else where conda, pip or
    NVIDIA's installer put it.

    Args:
        environ: the environment.
        site: where pip puts packages; None asks this Python. In the environment of its own in
            which pip builds, that is still the one it installs to.

    Raises:
        NoToolkit: there is none. A ``CUDA_HOME`` or ``CUDA_PATH`` without one hides the others.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            path = Path(environ[variable]) / "bin" / "nvcc"
            if path.is_file():
                return path
            raise NoToolkit(
                f"there is no bin/nvcc in {variable}={environ[variable]}; set it to where NVIDIA's "
                "CUDA toolkit is, or unset it"
            )
    on_path = shutil.which("nvcc", path=environ.get("PATH", ""))
    if on_path:
        return Path(on_path)
    if site is None:
        site = Path(sysconfig.get_paths()["purelib"])
    # CUDA 13's packages share nvidia/cu13; those of CUDA 12 have a folder each.
    homes = [*sorted(site.glob("nvidia/cu[0-9]*"), reverse=True), site / "nvidia" / "cuda_nvcc"]
    if environ.get("CONDA_PREFIX"):
        homes.insert(0, Path(environ["CONDA_PREFIX"]))
    for home in [*homes, _DEFAULT_CUDA]:
        if (home / "bin" / "nvcc").is_file():
            return home / "bin" / "nvcc"
    raise NoToolkit(
        f"there is no nvcc on PATH nor in {_DEFAULT_CUDA}/bin; install NVIDIA's CUDA toolkit, or "
        "set CUDA_HOME to where it is"
    )


def _asked(path: Path, *options: str) -> str:
    """What nvcc prints.

    Raises:
        NoToolkit: it does not run, or fails.
    """
    try:
        done = subprocess.run([path, *options], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NoToolkit(f"{path} does not run: {error}") from None
    text = done.stdout + done.stderr
    if done.returncode:
        raise NoToolkit(f"{path} {' '.join(options)} fails: {text.strip()}")
    return text


def read_nvcc(path: Path) -> Nvcc:
    """Asks a compiler what it is, and looks for what it needs.

    Raises:
        NoToolkit: it does not answer as nvcc does, or is too old.
    """
    answer = _asked(path, "--version")
    version = re.search(r"release (\d+\.\d+), V([\d.]+)", answer)
    if version is None:
        raise NoToolkit(f"{path} does not answer as nvcc does: {answer.strip()}")
    if numbers(version[1]) < OLDEST_CUDA:
        raise NoToolkit(
            f"nvcc {version[1]} ({path}) is too old: the kernels need CUDA "
            f"{'.'.join(map(str, OLDEST_CUDA))} or newer; install one and set CUDA_HOME to it"
        )
    answer = _asked(path, "--list-gpu-arch")
    archs = re.findall(r"compute_(\d+)(\d)\b", answer)
    if not archs:
        raise NoToolkit(f"{path} does not answer as nvcc does: {answer.strip()}")
    capabilities = frozenset((int(a), int(b)) for a, b in archs)
    return Nvcc(path, version[1], version[2], capabilities, _options(path))


def _options(path: Path) -> tuple[str, ...]:
    """``-isystem`` and ``-L`` of what nvcc, whose file nvcc.profile names folders, misses."""
    try:
        profile = _asked(path, "--dryrun", "nothing.cu")
    except NoToolkit:  # without a C++ compiler, which the build will say
        return ()
    folders = _folders(path, profile)
    options = []
    for flag, option, names in (("-I", "-isystem", _HEADERS), ("-L", "-L", _LIBRARIES)):
        present = [Path(folder) for folder in re.findall(rf'"{flag}([^"]+)"', profile)]
        for name in names:
            if any((folder / name).is_file() for folder in present):
                continue
            folder = next((folder for folder in folders if (folder / name).is_file()), None)
            if folder is not None:
                present.append(folder)
                options += [option, str(folder)]
    return tuple(options)


def _folders(path: Path, profile: str) -> list[Path]:
    """Where toolkits of NVIDIA's installer, conda and pip have headers and libraries."""
    top = re.search(r"^#\$ TOP=(.*)$", profile, re.MULTILINE)
    root = Path(top[1].strip()).resolve() if top else path.resolve().parent.parent
    target = {"aarch64": "sbsa-linux"}.get(platform.machine(), f"{platform.machine()}-linux")
    roots = [root, root / "targets" / target]
    if root.name == "cuda_nvcc":  # pip's packages of CUDA 12, one beside the other
        roots += [root.with_name(name) for name in ("cuda_runtime", "cuda_cccl")]
    return [home / name for home in roots for name in ("include", "lib64", "lib")]


# -- the C++ compiler -----------------------------------------------------------------------------


def cxx(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The C++ compiler: the words of ``CXX``, without a cache before it, else g++."""
    words = shlex.split(environ.get("CXX", ""))
    return [word for word in words if Path(word).name not in ("ccache", "sccache")] or ["g++"]


def refusal(nvcc: Nvcc, text: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """What to do about a build that failed because of this machine's compilers.

    Args:
        nvcc: the compiler.
        text: what the build printed.
        environ: the environment.

    Returns:
        A sentence, or None if something else failed.
    """
    match = re.search(r"unsupported (GNU|clang) version! (.*)", text)
    if match is not None:
        newest = re.search(r"(?:later than|less than) (\d+)", match[2])
        if match[1] == "clang" or newest is None:
            return f"nvcc {nvcc.version} refuses {cxx(environ)[0]} ({match[2]}); set CXX=g++"
        limit = int(newest[1])
        candidates = (f"g++-{n}" for n in range(limit, 7, -1))
        older = next(
            (name for name in candidates if shutil.which(name, path=environ.get("PATH"))), None
        )
        remedy = f"set CXX={older}" if older else f"install g++-{limit} and set CXX=g++-{limit}"
        return f"nvcc {nvcc.version} takes g++ up to {limit}, {cxx(environ)[0]} is newer; {remedy}"
    for line in text.splitlines():
        missing = re.search(_PARTS, line)
        if missing and re.search(r"No such file|not found|cannot find|unable to find", line):
            return f"nvcc {nvcc.version} ({nvcc.path}) is there without {missing[0]}; {_PACKAGES}"
    return None


# -- architectures --------------------------------------------------------------------------------


class CompileTarget(NamedTuple):
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


def dotted(archs: Iterable[Arch]) -> str:
    """``8.0;8.6``"""
    return ";".join(f"{major}.{minor}" for major, minor in archs)


# An architecture-specific 9.0a is built as 9.0: no kernel needs more, and 9.0 runs on more cards.
# 8.6(8.0), by way of PTX of 8.0, is built as 8.6.
_ARCH = re.compile(r"(\d+)\.(\d)[af]?(?:\(\d+\.\d\))?(\+PTX)?", re.IGNORECASE)

NAMES = {
    "kepler+tesla": "3.7",
    "kepler": "3.5+PTX",
    "maxwell+tegra": "5.3",
    "maxwell": "5.0;5.2+PTX",
    "pascal": "6.0;6.1+PTX",
    "volta+tegra": "7.2",
    "volta": "7.0+PTX",
    "turing": "7.5+PTX",
    "ampere+tegra": "8.7",
    "ampere": "8.0;8.6+PTX",
    "ada": "8.9+PTX",
    "hopper": "9.0+PTX",
    "blackwell+tegra": "11.0",
    "blackwell": "10.0;10.3;12.0;12.1+PTX",
    "common": DEFAULT_ARCHS,
}
"""Torch's names; ``All``, ``native`` and ``Auto`` depend on the machine."""


def _words(value: str) -> list[str]:
    """A list's words, which ``;``, ``,`` or spaces part."""
    return re.split(r"[;,\s]+", value.strip(";, \t\n"))


def parse_archs(source: str, value: str, nvcc: Nvcc | None = None) -> CompileTarget:
    """The architectures that a list names, in torch's syntax: ``8.9;Hopper;12.0+PTX``.

    Args:
        source: the variable it comes from, for messages.
        value: separated by ``;``, ``,`` or spaces.
        nvcc: the compiler, which tells what ``All`` is.

    Raises:
        BuildError: it is no such list.
    """
    archs: set[Arch] = set()
    ptx: set[Arch] = set()
    notes = []
    for word in _words(value):
        name, plus = re.subn(r"\+ptx$", "", word.lower())
        if name in NAMES:
            target = parse_archs(source, NAMES[name])
        elif name == "all" and nvcc is not None:
            every = tuple(sorted(arch for arch in nvcc.archs if arch >= OLDEST))
            target = CompileTarget(every, every[-1:])
        elif name in ("native", "auto"):
            cards = tuple(sorted(set(native_archs())))
            target = (
                CompileTarget(cards, cards[-1:]) if cards else parse_archs(source, DEFAULT_ARCHS)
            )
            if not cards:
                notes.append(f"{source}={value}: no card is seen here, so that {word} is Common")
        else:
            match = _ARCH.fullmatch(word)
            if match is None:
                raise BuildError(
                    f"{source}={value}: {word!r} is no compute capability; give a list such as "
                    "8.9 or 8.6;8.9;9.0+PTX, or names such as Ada;Hopper, All, Common, native"
                )
            one = (int(match[1]), int(match[2]))
            target = CompileTarget((one,), (one,) if match[3] else ())
        archs.update(target.archs)
        ptx.update(target.archs[-1:] if plus else (), target.ptx)
    return CompileTarget(tuple(sorted(archs)), tuple(sorted(ptx)), tuple(notes))


def native_archs() -> list[Arch]:
    """The compute capabilities of the cards that the driver shows; none without a driver."""
    capabilities = []
    count, card, part = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return []
        for i in range(count.value):
            driver.cuDeviceGet(ctypes.byref(card), i)
            pair = []
            for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
                driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, card)
                pair.append(part.value)
            capabilities.append((pair[0], pair[1]))
    except (OSError, AttributeError):
        return []
    return capabilities


def choose_target(nvcc: Nvcc, environ: Mapping[str, str] = os.environ) -> CompileTarget:
    """What to compile for: the environment's list, else :data:`DEFAULT_ARCHS`.

    What is too old for the kernels, or too new for nvcc, is left out, and a note says so. In place
    of what is too new the newest before it is built, as PTX too if it is of another major version.
    Numbers in our own variable are never left out.

    Raises:
        BuildError: our own list is none, or names what cannot be compiled for.
        NoToolkit: the same of torch's list, which other packages use too.
    """
    source = next((name for name in ARCH_VARIABLES if environ.get(name, "").strip()), None)
    value = environ[source] if source else DEFAULT_ARCHS
    setting = f"{source}={value}" if source else "the default"
    fail = BuildError if source == ARCH_VARIABLES[0] else NoToolkit
    try:
        requested = parse_archs(source or setting, value, nvcc)
    except BuildError as error:
        raise fail(str(error)) from None
    exact = {word[:-4] if word.endswith("+ptx") else word for word in _words(value.lower())}
    strict = exact if source == ARCH_VARIABLES[0] else set()

    old = [arch for arch in requested.archs if arch < OLDEST]
    if old and (len(old) == len(requested.archs) or strict & {dotted([arch]) for arch in old}):
        raise fail(f"{setting}: the kernels need {dotted([OLDEST])} or more")
    new = [arch for arch in requested.archs if arch not in old and arch not in nvcc.archs]
    archs = {*requested.archs} - {*old, *new}
    ptx = {*requested.ptx} & archs
    for arch in new:
        before = max((a for a in nvcc.archs if OLDEST <= a < arch), default=None)
        if before is not None:
            archs.add(before)
            ptx |= {before} if before[0] != arch[0] or arch in requested.ptx else set()
    if not archs or strict & {dotted([arch]) for arch in new}:
        raise fail(
            f"{setting}: nvcc {nvcc.version} ({nvcc.path}) does not compile for "
            f"{dotted(new)}, but for {dotted(sorted(nvcc.archs))}; leave it out, or "
            "give another nvcc in CUDA_HOME"
        )
    notes = list(requested.notes)
    if old:
        notes.append(
            f"{setting}: {dotted(old)} left out, the kernels need {dotted([OLDEST])} or more"
        )
    if new:
        notes.append(f"{setting}: {dotted(new)} left out, nvcc {nvcc.version} does not know it")
    return CompileTarget(tuple(sorted(archs)), tuple(sorted(ptx)), tuple(notes))
