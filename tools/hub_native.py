"""In place of the CUDA C++ core, of which this folder holds nothing."""

from types import ModuleType


def unavailable() -> str:
    """Why no CUDA C++ kernel runs."""
    return "this folder has the Triton kernels only; the CUDA C++ kernels are in the package cmpose"


def module() -> ModuleType:
    """Raises ImportError."""
    raise ImportError(unavailable())
