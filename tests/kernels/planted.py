"""Kernels that the compile check must refuse: they spill, ask for too much, or do not compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from cmpose.kernels.launch import Config, launch


@triton.jit
def spilling_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    """SIZE / 32 values a thread, of which none can be let go before the end."""
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)
    for _ in range(4):
        x = x / tl.sum(x * x)
    tl.store(y_ptr + index, x)


@triton.jit
def product_kernel(x_ptr, y_ptr, steps, SIZE: tl.constexpr):
    """x x ... x, SIZE × SIZE, by tensor cores."""
    index = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    total = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(steps):
        left = tl.load(x_ptr + step * SIZE * SIZE + index)
        right = tl.load(x_ptr + (step + 1) * SIZE * SIZE + index)
        total = tl.dot(left, right, total)
    tl.store(y_ptr + index, total.to(y_ptr.dtype.element_ty))


@triton.jit
def broken_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    """Blocks of Triton are powers of two."""
    tl.store(y_ptr + tl.arange(0, SIZE), tl.load(x_ptr))


@triton.jit
def harmless_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, tl.load(x_ptr + index))


def _run(kernel: Any, config: Config, dtype: torch.dtype, *arguments: Any) -> None:
    tensors = [torch.empty(16, dtype=dtype, device="meta") for _ in range(2)]
    launch(kernel, (1,), *tensors, *arguments, config=config)


CASES: dict[str, Callable[[], Any]] = {
    "harmless": partial(_run, harmless_kernel, Config({"SIZE": 128}), torch.float16),
    "spills": partial(_run, spilling_kernel, Config({"SIZE": 16384}, 1), torch.float32),
    "shared": partial(_run, product_kernel, Config({"SIZE": 128}, 8, 4), torch.float16, 8),
    "tensor cores round": partial(_run, product_kernel, Config({"SIZE": 16}), torch.float32, 8),
    "does not compile": partial(_run, broken_kernel, Config({"SIZE": 100}), torch.float32),
}
