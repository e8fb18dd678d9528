"""The machine that runs PTX, compiled once: what it has, and what its instructions look like."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from tests.shared_data import PROJECT

HERE = Path(__file__).resolve().parent
FOLDER = PROJECT / "build" / "ptx_on_cpu"

FLAGS = ["-std=c++20", "-O1", "-march=native", "-fno-strict-aliasing"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra", "-fPIC", "-shared"]

SPACES = ("param", "global", "shared", "local")
LANES = 32
INSTRUCTION = np.dtype(
    [("run", "u8"), *((name, "i4") for name in ("guard", "negated", "stores", "multiplies")),
     ("operand", "i4", 17), ("number", "i8", 7)], align=True,
)  # fmt: skip
"""Of machine.h."""


class Unknown(RuntimeError):
    """An instruction, operand or directive that the machine does not have."""


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which("g++")


def built(target: Path, command: Sequence[str], sources: Sequence[Path], more: str = "") -> Path:
    """The file that a compiler makes of sources, unless that was done before.

    Args:
        target: its name; a key of all that it depends on is added.
        command: what makes it, but for ``-o``.
        sources: all files that it depends on.
        more: what else it depends on.

    Raises:
        RuntimeError: what the compiler printed.
    """
    key = hashlib.sha256(repr((command, more)).encode())
    for file in sources:
        key.update(file.read_bytes())
    path = target.with_stem(f"{target.stem}_{key.hexdigest()[:16]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of two test processes compiles
        if not path.is_file():
            made = path.with_suffix(f".{os.getpid()}")
            output(*command, "-o", str(made))
            made.rename(path)
    return path


def output(*command: str, given: str | None = None) -> str:
    """What a program prints; raises RuntimeError, with all that it said, if it fails."""
    if shutil.which(command[0]) is None:
        raise RuntimeError(f"{command[0]}: no such program; install what has it")
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def library() -> ctypes.CDLL:
    path = compiler()
    if path is None:
        raise RuntimeError("there is no g++ to compile the machine with")
    sources = sorted(HERE.glob("*.cpp"))
    command = [path, *FLAGS, *map(str, sources)]
    loaded = ctypes.CDLL(str(built(FOLDER / "machine.so", command, [*sources, HERE / "machine.h"])))
    loaded.ptx_handlers.restype = ctypes.c_char_p
    return loaded


@cache
def handlers() -> dict[str, tuple[int, list[str], list[int]]]:
    """By name: the handler's address, its operands' codes, numbers of its own.

    A code is a register's bytes, 0 for a predicate; ``w`` and a number for one that may have more
    bytes; ``a`` for an address; ``n`` for a number or label. A row's numbers are, in this order, of
    each address the offset and whether its register has 64 bits, and each ``n``; the bytes of the
    ``w`` registers, if there are any; the handler's own.
    """
    by_name: dict[str, tuple[int, list[str], list[int]]] = {}
    for line in library().ptx_handlers().decode().splitlines():
        name, address, *codes = line.split()
        operands = [code for code in codes if not code.startswith("#")]
        numbers = [int(code[1:]) for code in codes if code.startswith("#")]
        by_name[name] = int(address), operands, numbers
    return by_name
