"""Calls of the CUDA C++ kernels: tensors as addresses, dtypes as codes, workspace from torch.

With ``CMPOSE_CUDA_ON_CPU`` the same kernels, compiled for the CPU, take CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose import native

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The codes of csrc/ops.h."""


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def workspace(size: int, like: Tensor) -> Tensor:
    """Scratch memory of ``size`` bytes where ``like`` is; torch's allocator keeps it in order."""
    return like.new_empty(size, dtype=torch.uint8)


def call(function: str, first: Tensor, *arguments: Any) -> None:
    """Runs ``_C.<function>`` on contiguous tensors, on the current stream of ``first``'s device.

    Args:
        function: its name.
        first: any of its tensors, for the stream; not passed on.
        arguments: numbers as they are, tensors or None as addresses.

    Raises:
        RuntimeError: a launch failed; with CUDA's message.
    """
    values = [address(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
    getattr(native.module(), function)(*values, stream(first))


def float64_refused(**tensors: Tensor) -> str | None:
    """Why the kernels do not take these tensors' dtypes, or None."""
    for name, value in tensors.items():
        if value.dtype not in DTYPES:
            kind = str(value.dtype).removeprefix("torch.")
            return f"{name} is {kind}; the kernels take float32, float16 and bfloat16"
    return None
