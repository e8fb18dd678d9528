"""Published times of kernels that can be compiled here, to hold the model against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.profile import kernels
from bench.profile.cards import A100, L40, RTX_4090, RTX_5090, RTX_A5000, Card


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        kernel: what was timed.
        call: launches the kernel that stands for it.
        work: bytes or operations of the call, as the source counts them.
        figure, unit: as published; ``GB/s``, ``TFLOP/s`` or ``cycles`` at the card's clock.
    """

    kernel: str
    card: Card
    call: Callable[[], None]
    work: float
    figure: float
    unit: str
    source: str

    @property
    def us(self) -> float:
        if self.unit == "cycles":
            return self.figure / self.card.clock_ghz / 1e3
        return self.work / self.figure / (1e3 if self.unit == "GB/s" else 1e6)


def _attention(items: int, tokens: int, **options: Any) -> tuple[Callable[[], None], float]:
    """The call, and the operations of its two products."""
    work = 4 * items * tokens**2 * 64 / (2 if options.get("causal") else 1)
    return partial(kernels.attention, items, tokens, **options), work


_COPY = partial(kernels.copy, 512), 2 * 512e6
_PRODUCT = partial(kernels.product, 8192), 2 * 8192**3

ROWS = (
    Published("copy, device to device", RTX_4090, *_COPY, 921, "GB/s",
              "tinygrad/open-gpu-kernel-modules#6, 918–924"),
    Published("read and write (scale)", L40, *_COPY, 770, "GB/s", "te42kyfo/gpu-benches"),
    Published("product 8192³, float16", RTX_4090, *_PRODUCT, 163.5, "TFLOP/s", "xytpai/gpuk"),
    Published("attention forward, 512 tokens (FlashAttention-2)", RTX_A5000,
              *_attention(32 * 32, 512), 84.1, "TFLOP/s", "gpu-mode/ring-attention#10"),
    Published("attention forward, 2,048 tokens (FlashAttention-2)", RTX_A5000,
              *_attention(8 * 32, 2048), 81.3, "TFLOP/s", "gpu-mode/ring-attention#10"),
    Published("attention forward, 512 tokens (FlashAttention-2)", RTX_4090,
              *_attention(32 * 32, 512), 155.6, "TFLOP/s", "apache/tvm, tl_doc/flash_perf.md"),
    Published("attention forward, 2,048 tokens (FlashAttention-2)", RTX_4090,
              *_attention(8 * 32, 2048), 168.1, "TFLOP/s", "apache/tvm, tl_doc/flash_perf.md"),
    Published("attention forward, 1,024 tokens (Triton's tutorial)", A100,
              *_attention(4 * 48, 1024), 122.5, "TFLOP/s", "triton-lang/triton#1917"),
    Published("attention forward, 4,096 tokens (Triton's tutorial)", A100,
              *_attention(4 * 48, 4096), 143.0, "TFLOP/s", "triton-lang/triton#1917"),
    Published("causal attention forward, 512 tokens, tiles of 64 (Triton)", RTX_5090,
              *_attention(32 * 32, 512, rows=64, causal=True), 797_247, "cycles",
              "FlashGPU-Sim/FlashGPU-Sim, README"),
)  # fmt: skip
"""#1917 does not name its card; the tutorial's figures of that time are an A100's. Where the batch
is not published, 16,384 tokens of 32 heads are taken, as FlashAttention's own benchmark has it."""
