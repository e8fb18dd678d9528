"""``cmpose doctor``: what is installed, on what device, and which backend runs each op."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from cmpose import __version__, native
from cmpose.ops import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """What ``cmpose doctor`` prints."""
    lines = [
        f"cmpose  {__version__}",
        f"python  {platform.python_version()} on {platform.platform()}",
        f"torch   {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        f"triton  {_version('triton')}",
        f"opencv  {_version('opencv-python-headless')}",
        f"av      {_version('av')}",
        f"_C      {_core()}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            lines.append(f"GPU {i}   {card.name}, sm_{card.major}{card.minor}")
    else:
        lines.append("GPU     none that torch sees; the ops run on the CPU")
    lines += ["", *_ops()]
    return "\n".join(lines)


def _core() -> str:
    """What the CUDA C++ core was built for, or why it cannot be used."""
    reason = native.unavailable()
    if reason is not None:
        return reason
    facts = native.info()
    if facts["on_cpu"]:
        return f"compiled for the CPU, for tests ({native.ON_CPU})"
    ptx = f" + PTX {facts['ptx']}" if facts["ptx"] else ""
    return f"for {facts['archs']}{ptx}, built with nvcc {facts['nvcc']}"


def _ops() -> list[str]:
    """A table of which backends run each op on this machine, and below it why the others do not."""
    reasons: list[str] = []
    lines = [f"{'op':22} {'auto runs':11} {'cpu':8} {'triton':8} cuda"]
    for op in backends.OPS:
        why_not = backends.available(op)
        cells = {}
        for name in ("cpu", "triton", "cuda"):
            reason = why_not[name]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells[name] = "yes" if reason is None else f"no [{reasons.index(reason) + 1}]"
        row = f"{cells['cpu']:8} {cells['triton']:8} {cells['cuda']}"
        lines.append(f"{op:22} {backends.preferred(op):11} {row}")
    lines += [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)]
    asked = {name: value for name, value in sorted(os.environ.items()) if _chooses(name)}
    lines += [f"{name}={value} is set" for name, value in asked.items()]
    return lines


def _chooses(variable: str) -> bool:
    """Whether an environment variable picks backends or how kernels run."""
    picks = variable.startswith("CMPOSE_") and variable.endswith("BACKEND")
    return picks or variable in ("CMPOSE_CONFIGS", native.ON_CPU, "TRITON_INTERPRET")
