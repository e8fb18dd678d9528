"""``cmpose doctor``: what is installed, on what device, and which backend runs each op."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from cmpose import __version__
from cmpose.ops import backends


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text."""
    lines = [
        f"cmpose  {__version__}",
        f"python  {platform.python_version()} on {platform.platform()}",
        f"torch   {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})",
        f"triton  {_version('triton')}",
        f"opencv  {_version('opencv-python-headless')}",
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            lines.append(f"GPU {i}   {card.name}, sm_{card.major}{card.minor}")
    else:
        lines.append("GPU     none that torch sees; the reference ops run on the CPU")
    lines.append("")
    for op in backends.OPS:
        reasons = backends.available(op)
        runs = next(name for name, reason in reasons.items() if reason is None)
        off = "; ".join(f"{name}: {why}" for name, why in reasons.items() if why is not None)
        lines.append(f"{op:22} {runs:10} {off}")
    return "\n".join(lines)
