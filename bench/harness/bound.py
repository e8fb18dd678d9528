"""The bound of a workload: no time is shorter, by the rates that the card has in the same run.

It is the larger of the workload's bytes over the card's copy rate and its matrix products'
operations over the card's matrix rate in that dtype. Bytes are algorithmic: each input element that
is needed read once, each output written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.harness import timing
from bench.harness.shapes import FP32
from cmpose.train import cards


@dataclass(frozen=True)
class Rates:
    """What a card does in a second.

    Attributes:
        copy_bytes_per_s: read and written bytes of a large device-to-device copy.
        bf16_flops_per_s, fp32_flops_per_s, tf32_flops_per_s: of a large square matrix product.
    """

    copy_bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    tf32_flops_per_s: float

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes_per_s / 1e9:,.0f} GB/s, "
            f"bf16 {self.bf16_flops_per_s / 1e12:,.2f} TFLOP/s, "
            f"fp32 {self.fp32_flops_per_s / 1e12:,.2f} TFLOP/s"
        )

    def matrix(self, dtype: str) -> float:
        """Products of a dtype at its full precision."""
        if dtype == FP32:
            # Its own units or three TF32 products: kernels may do either, and what a kernel can
            # be faster than is no bound.
            return max(self.fp32_flops_per_s, self.tf32_flops_per_s / 3)
        return self.bf16_flops_per_s

    def bound_us(self, moved: float, flops: float, dtype: str) -> float:
        """The larger of bytes over the copy rate and operations over the matrix rate, in µs."""
        return 1e6 * max(moved / self.copy_bytes_per_s, flops / self.matrix(dtype))


_AD102 = cards.RTX_4090
RTX_4090 = Rates(_AD102.bandwidth, _AD102.flops_16, _AD102.flops_32, _AD102.flops_32)
"""By its datasheet."""


def _median_seconds(call: Callable[[], Any], clock: timing.Clock, samples: int) -> float:
    ready = clock.prepare(lambda: [call])
    return sorted(clock.seconds(ready) for _ in range(samples))[samples // 2]


def measure_rates(device: str, *, side: int = 0, copied: int = 0) -> Rates:
    """The rates of the card, or of the CPU, in this process and now.

    Args:
        device: ``cuda`` or ``cpu``.
        side: of the square matrices; 0 takes 8192 on a card.
        copied: bytes of the tensor that is copied; 0 takes 2 GiB on a card.
    """
    clock, on_card = timing.clock_for(device), device == "cuda"
    side = side or (8192 if on_card else 512)
    copied = copied or (min(1 << 31, timing.free_bytes(device) // 4) if on_card else 1 << 26)
    samples = 10 if on_card else 3
    source = torch.empty(copied // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), clock, samples)
    products = []
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, precision in ((bf16, "highest"), (fp32, "highest"), (fp32, "high")):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            seconds = _median_seconds(partial(torch.mm, a, b, out=out), clock, samples)
        finally:
            torch.set_float32_matmul_precision(before)
        products.append(2 * side**3 / seconds)
    return Rates(copy, *products)
