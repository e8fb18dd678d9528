"""Where a figure comes from: machine, versions, commit, command, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROJECT = Path(__file__).resolve().parents[1]


def device() -> str:
    """The kind of device that figures are measured on: ``cuda`` or ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def machine() -> str:
    """The GPU's name; without one the processor's."""
    if device() == "cuda":
        return torch.cuda.get_device_properties(0).name
    return _cpu()


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=PROJECT, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str, bool]:
    """The commit, and whether the working tree differs from it.

    Without git the environment variable ``CMPOSE_COMMIT`` names it, as ``<sha>`` or
    ``<sha>+dirty``. Without that too it is ``unknown``, and the tree counts as different.
    """
    sha = _run("git", "rev-parse", "HEAD")
    if sha:
        # What a benchmark writes does not change the source that it measures.
        changes = _run("git", "status", "--porcelain", "--", ".", ":!bench/results")
        return sha, bool(changes)
    value = os.environ.get("CMPOSE_COMMIT", "")
    return (value.removesuffix("+dirty"), value.endswith("+dirty")) if value else ("unknown", True)


def driver() -> str | None:
    """The graphics driver's version, or None without a card."""
    if device() != "cuda":
        return None
    versions = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0].strip() if versions else "unknown"


def version(package: str) -> str | None:
    """An installed package's version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def provenance(command: str | None = None) -> dict[str, Any]:
    """Where a figure comes from that this process measures.

    Args:
        command: what was run; None is this process's command line.
    """
    sha, dirty = commit()
    on_card = device() == "cuda"
    return {
        "gpu": machine() if on_card else None,
        "cpu": _cpu(),
        "driver": driver(),
        "cuda": torch.version.cuda if on_card else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": sha,
        "dirty": dirty,
        "command": command or command_line(),
        "utc": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def command_line() -> str:
    """This process's command as one would type it: ``python -m bench dpc_knn --quick``.

    A script without ``.py``, such as the installed ``cmpose``, needs no ``python`` before it.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        name = "-m " + spec.name.removesuffix(".__main__")
    else:
        name = Path(sys.argv[0]).name
    python = ["python"] if name.startswith("-m ") or name.endswith(".py") else []
    return " ".join([*python, name, *sys.argv[1:]])
