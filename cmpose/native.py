"""The CUDA C++ core ``cmpose._C``: loaded at first use, and why there is none.

``CMPOSE_CUDA_ON_CPU`` names an extension module in which the same CUDA sources were compiled for
the CPU; it is then loaded instead, and the ops' backend ``cuda`` runs on CPU tensors, for tests.
What is found is kept: the file and the variable are looked at once a process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.machinery
import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import cmpose
from cmpose import __version__

NAME = "cmpose._C"
ON_CPU = "CMPOSE_CUDA_ON_CPU"
NOT_BUILT = "_C.txt"
"""The file in which the installation says why there is no core; setup.py writes it."""


def _load() -> ModuleType:
    """Raises ImportError with the reason if there is none."""
    path = os.environ.get(ON_CPU)
    if path:
        return _load_on_cpu(path)
    # In this package's own folder: an editable install of another copy would offer its core too.
    if importlib.machinery.PathFinder.find_spec(NAME, cmpose.__path__) is None:
        raise ImportError(f"{NAME} is not built: {_why_not_built()}")
    try:
        loaded = importlib.import_module(NAME)
    except ImportError as error:
        raise ImportError(f"{NAME} does not load: {error}") from error
    _check_version(loaded, f"{NAME} ({loaded.__file__})", "install cmpose again")
    return loaded


def _why_not_built() -> str:
    """What the installation said (setup.py), else what an installation with the core needs."""
    for folder in cmpose.__path__:
        if (Path(folder) / NOT_BUILT).is_file():
            return (Path(folder) / NOT_BUILT).read_text()
    return (
        "install cmpose where nvcc is on PATH or CUDA_HOME is set (CMPOSE_BUILD_CUDA=1 demands it)"
    )


def _load_on_cpu(path: str) -> ModuleType:
    source = f"{ON_CPU}={path}"
    if not Path(path).is_file():
        raise ImportError(f"{source}: there is no such file")
    try:
        spec = importlib.util.spec_from_file_location(NAME, path)
        if spec is None or spec.loader is None:
            raise ImportError("its name does not end as an extension module's")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except ImportError as error:
        raise ImportError(f"{source} is no extension module: {error}") from error
    facts = loaded.build_info() if hasattr(loaded, "build_info") else {}
    if not facts.get("on_cpu"):
        raise ImportError(f"{source} is not the CUDA sources compiled for the CPU")
    _check_version(loaded, source, "compile it again")
    return loaded


def _check_version(loaded: ModuleType, name: str, remedy: str) -> None:
    built = loaded.build_info()["version"]
    if built != __version__:
        raise ImportError(f"{name} was built for cmpose {built}, this is {__version__}: {remedy}")


@functools.cache
def _module_or_reason() -> ModuleType | str:
    """The module, or why there is none."""
    try:
        return _load()
    except ImportError as error:
        return str(error)


def module() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: there is none; the message says why.
    """
    loaded = _module_or_reason()
    if isinstance(loaded, str):
        raise ImportError(loaded)
    return loaded


def unavailable() -> str | None:
    """Why the core cannot be used on this machine at all, or None if it loads."""
    loaded = _module_or_reason()
    return loaded if isinstance(loaded, str) else None


@functools.cache
def info() -> dict[str, Any]:
    """What the core was built as.

    Returns:
        ``archs``: the compute capabilities with machine code inside, as ``8.9;9.0``; ``ptx``:
        those with PTX inside; ``nvcc``: its version; ``version``: of cmpose; ``on_cpu``: whether
        the sources were compiled for the CPU.

    Raises:
        ImportError: see :func:`module`.
    """
    return dict(module().build_info())


@functools.cache
def on_cpu() -> bool:
    """Whether the core is the one of ``CMPOSE_CUDA_ON_CPU``, whose kernels take CPU tensors."""
    return unavailable() is None and bool(info()["on_cpu"])


@functools.cache
def driver() -> tuple[int, int] | None:
    """The newest CUDA that NVIDIA's driver serves, as (12, 4); None without a driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def version_of(text: str) -> tuple[int, int]:
    """``13.0`` or ``13.0rc1`` → (13, 0)"""
    major, minor, *_ = *re.findall(r"\d+", text), "0", "0"
    return int(major), int(minor)


def _versions(text: str) -> list[tuple[int, int]]:
    """``8.9;9.0`` → [(8, 9), (9, 0)]"""
    return [version_of(version) for version in text.split(";") if version]


@functools.cache
def card_unavailable(major: int, minor: int, name: str) -> str | None:
    """Why the core does not serve a card with this machine's driver, or None if it does.

    Machine code serves cards of its major version from its minor version on; PTX serves every
    later card, for which the driver compiles it. A driver runs machine code of every CUDA of its
    own major version, and of older ones; PTX must not be of a newer CUDA than the driver's.

    Args:
        major: of the card's compute capability.
        minor: likewise.
        name: of the card.

    Raises:
        ImportError: see :func:`module`.
    """
    archs, ptx, nvcc = info()["archs"], info()["ptx"], info()["nvcc"]
    code = any(a == major and b <= minor for a, b in _versions(archs))
    if not code and not any(version <= (major, minor) for version in _versions(ptx)):
        return (
            f"{name} has compute capability {major}.{minor}; {NAME} was built for {archs}"
            f"{f' and PTX of {ptx}' if ptx else ''}; build it with "
            f"CMPOSE_CUDA_ARCHS={major}.{minor}"
        )
    served, built = driver(), version_of(nvcc)
    if served is None or served >= built or (code and served[0] == built[0]):
        return None
    which = "" if code else f", and has only PTX for {name}"
    own = "" if code else f" and CMPOSE_CUDA_ARCHS={major}.{minor}"
    return (
        f"NVIDIA's driver serves CUDA {served[0]}.{served[1]}, {NAME} was built with nvcc {nvcc}"
        f"{which}: install a newer driver, or build it with nvcc {served[0]}.{served[1]}{own}"
    )


def forget() -> None:
    """Looks for the core again at the next use; for tests that change what is there."""
    for function in (_module_or_reason, info, on_cpu, driver, card_unavailable):
        function.cache_clear()
