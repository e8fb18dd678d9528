"""The CUDA C++ ops compiled for the CPU, from the very sources of csrc/; see cuda_runtime.h.

``python -m tests.cuda_on_cpu [--sanitize]`` compiles them and prints the extension module's path,
for ``CMPOSE_CUDA_ON_CPU``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

from tests.shared_data import PROJECT

HERE = Path(__file__).resolve().parent
CSRC = PROJECT / "csrc"
FOLDER = PROJECT / "build" / "cuda_on_cpu"

FLAGS = (
    "-std=c++17",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-DCUDA_ON_CPU",
)
SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-Og",  # at -O1 the compiler takes twice as long, more than the tests then save
)
OF_BINDINGS = ("-O0",)
"""Nothing is computed in them, and to optimize them is a quarter of the compiler's time."""


def compiler() -> str | None:
    """The C++ compiler, if there is one and Python's headers are there too."""
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return shutil.which("g++") if headers.is_file() else None


def build(*, sanitize: bool = False, source: Path = CSRC, includes: tuple[Path, ...] = ()) -> Path:
    """Compiles the sources, unless that was done before, and returns the module's path.

    Args:
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer; a process that loads it
            needs :func:`sanitizer_settings`.
        source: the folder of the ``.cu`` files and ``bindings.cpp``.
        includes: further folders of headers.

    Raises:
        RuntimeError: no g++, or it fails; the message holds what it printed.
    """
    from cmpose import __version__

    path = compiler()
    if path is None:
        raise RuntimeError(
            "there is no g++, or Python.h, to compile the CUDA sources for the CPU with"
        )
    facts = {
        "CMPOSE_VERSION": __version__,
        "CMPOSE_CUDA_ARCHS_BUILT": "",
        "CMPOSE_CUDA_PTX_BUILT": "",
        "CMPOSE_NVCC_VERSION": "",
    }
    command = [path, *FLAGS, *(SANITIZERS if sanitize else ())]
    command += [f'-D{name}="{value}"' for name, value in facts.items()]
    for include in (HERE, source, *includes):
        command += ["-I", str(include)]
    for headers in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        command += ["-isystem", headers]
    files = sorted(
        p
        for folder in (HERE, source, *includes)
        for p in folder.iterdir()
        if p.is_file() and p.suffix != ".py"
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = hashlib.sha256(repr((command, OF_BINDINGS, suffix)).encode())
    for file in files:
        key.update(file.name.encode() + b"\0" + file.read_bytes())
    folder = FOLDER / key.hexdigest()[:16]
    module = folder / f"_C{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of two test processes compiles
        if not module.is_file():
            sources = [*sorted(source.glob("*.cu")), source / "bindings.cpp", HERE / "runtime.cpp"]
            _compile(command, sources, module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")


def _compile(command: list[str], sources: list[Path], module: Path) -> None:
    objects = [module.parent / f"{path.name}.o" for path in sources]
    commands = [
        [
            *(*command, *(OF_BINDINGS if path.stem == "bindings" else ())),
            *("-x", "c++", "-c", str(path), "-o", str(out)),
        ]
        for path, out in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(_run, commands))
    built = module.with_suffix(".new")
    _run([*command, "-shared", *map(str, objects), "-o", str(built)])
    built.replace(module)
    for out in objects:
        out.unlink()


def sanitizer_settings() -> dict[str, str]:
    """The environment of a Python that loads a sanitized module.

    Raises:
        RuntimeError: no g++.
    """
    path = compiler()
    if path is None:
        raise RuntimeError("there is no g++ to ask for its sanitizers' libraries")
    libraries = [
        subprocess.run(
            [path, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        # Python itself leaks memory, and torch's libraries define the same type descriptors twice.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
