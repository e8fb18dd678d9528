"""Published times of kernels that can be compiled here, to hold the model against.

The kernels are written as Triton's tutorials have them; they are no part of the package. Each
function launches its kernel by ``cmpose.kernels.launch``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from bench.profile.cards import A100, L40, RTX_4090, RTX_5090, RTX_A5000, Card
from cmpose.kernels import launch


@triton.jit
def copy_kernel(source, target, number, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < number
    tl.store(target + at, tl.load(source + at, mask=inside), mask=inside)


def copy(megabytes: int) -> None:
    """A plain copy of a float32 tensor."""
    source = torch.zeros(megabytes * 250_000)
    config = launch.Config({"BLOCK": 1024}, num_warps=4)
    grid = (triton.cdiv(source.numel(), 1024),)
    launch.launch(
        copy_kernel, grid, source, torch.empty_like(source), source.numel(), config=config
    )


@triton.jit
def product_kernel(
    a, b, c, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Blocks that run together share rows of a and columns of b in the second-level cache.
    program, columns = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    group = program // (GROUP * columns)
    height = min(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    row = group * GROUP + program % (GROUP * columns) % height
    column = program % (GROUP * columns) // height
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a += rows[:, None] * K + inner[None, :]
    b += inner[:, None] * N + cols[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += BLOCK_K
        b += BLOCK_K * N
    tl.store(c + rows[:, None] * N + cols[None, :], total.to(c.dtype.element_ty))


def product(size: int) -> None:
    """A product of two square float16 matrices; ``size`` is a multiple of 128."""
    a, b, c = (torch.zeros(size, size, dtype=torch.float16) for _ in range(3))
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 8}
    config = launch.Config(blocks, num_warps=4, num_stages=4)
    launch.launch(product_kernel, ((size // 128) ** 2,), a, b, c, size, size, size, config=config)


@triton.jit
def attention_kernel(
    q, k, v, out, norm, scale, S,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    first, item = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows, keys, channels = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, D)
    start = item.to(tl.int64) * S * D
    query = tl.load(q + start + rows[:, None] * D + channels[None, :])
    k += start + keys[None, :] * D + channels[:, None]
    v += start + keys[:, None] * D + channels[None, :]
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, D], tl.float32)
    end = first + BLOCK_M if CAUSAL else S
    for at in range(0, end, BLOCK_N):
        logits = tl.dot(query, tl.load(k + at * D)) * scale
        if CAUSAL:
            logits = tl.where(rows[:, None] >= at + keys[None, :], logits, float("-inf"))
        now = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - now[:, None])
        shrink = tl.exp2(largest - now)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(weights.to(v.dtype.element_ty), tl.load(v + at * D), mixed)
        largest = now
    tl.store(norm + item * S + rows, largest + tl.log2(total))
    place = out + start + rows[:, None] * D + channels[None, :]
    tl.store(place, (mixed / total[:, None]).to(out.dtype.element_ty))


def attention(items: int, tokens: int, rows: int = 128, causal: bool = False) -> None:
    """softmax(q kᵀ / √d) v in float16 with d = 64, by tiles of ``rows`` queries and 64 keys.

    Args:
        items: sequences times heads.
        tokens: of a sequence, a multiple of ``rows``.
        rows: of a tile.
        causal: whether a query sees no later key; the tile on the diagonal and those before it
            are masked alike.
    """
    d = 64
    matrices = [torch.zeros(items, tokens, d, dtype=torch.float16) for _ in range(4)]
    config = launch.Config({"BLOCK_M": rows, "BLOCK_N": 64}, num_warps=4, num_stages=3)
    scale = math.log2(math.e) / math.sqrt(d)
    grid = (tokens // rows, items)
    constants = {"D": d, "CAUSAL": causal}
    norm = torch.empty(items, tokens)
    launch.launch(
        attention_kernel, grid, *matrices, norm, scale, tokens, config=config, **constants
    )


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
    return partial(attention, items, tokens, **options), work


_COPY = partial(copy, 512), 2 * 512e6
_PRODUCT = partial(product, 8192), 2 * 8192**3

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
