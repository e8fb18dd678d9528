"""Calls of the CUDA C++ kernels: tensors become addresses, dtypes codes; torch gives workspace.

With ``CMPOSE_CUDA_ON_CPU`` set the same kernels, compiled for the CPU, take CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose import native

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""dtype → its code in csrc/ops.h."""


def address(tensor: Tensor | None) -> int:
    """The address of a tensor's first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: Tensor) -> int:
    """The current stream of the tensor's device."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def workspace(size: int, like: Tensor) -> Tensor:
    """``size`` bytes of scratch memory on the device of ``like``.

    It may be freed while the kernel still runs: torch's allocator gives it to later work of the
    same stream only.
    """
    return like.new_empty(size, dtype=torch.uint8)


MULTIPROCESSORS_ON_CPU = 2
"""How many the sources find when they run on the CPU: few, so that a block has several items."""

SHARED_ON_CPU = 102_400
"""Bytes of shared memory that one of these has: an RTX 4090's."""


def multiprocessors(tensor: Tensor) -> int:
    """How many the tensor's card has."""
    if not tensor.is_cuda:
        return MULTIPROCESSORS_ON_CPU
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count


def shared_bytes(tensor: Tensor) -> int:
    """How much shared memory each multiprocessor of the tensor's card has."""
    if not tensor.is_cuda:
        return SHARED_ON_CPU
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_multiprocessor


def call(function: str, first: Tensor, *arguments: Any) -> None:
    """Runs ``_C.<function>`` on contiguous tensors, on the current stream of ``first``'s device.

    Args:
        function: the function's name.
        first: any of its tensors; says the stream and is not passed on.
        arguments: numbers are passed as they are, tensors and None as addresses.

    Raises:
        RuntimeError: a launch failed; the message is CUDA's.
    """
    values = [address(a) if a is None or isinstance(a, Tensor) else a for a in arguments]
    getattr(native.module(), function)(*values, stream(first))
