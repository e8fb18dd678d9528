"""What a card does in a clock and a second, each figure with its source.

Rates are the data sheet's at its boost clock. What a card sustains is less where a share says so,
and more where its clock goes above boost, as GeForce cards' does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bench.harness.shapes import BF16, FP32

FP16 = "float16"


@dataclass(frozen=True)
class Card:
    """One card. Bytes, lanes and operations are those of one SM in one clock.

    Attributes:
        arch: its compute capability; 89 is 8.9.
        clock_ghz: boost.
        dram_gb_s: of its memory.
        l2_mb: size of the second-level cache.
        l2_bytes: that cache gives one SM.
        lanes: of each pipe; ``issue`` is in lanes too, 4 warp instructions of 32.
        tensor: operations by dtype, dense, float32 accumulation; float32 is TF32.
        sustained: share of the tensor rate that a large product keeps within the card's power.
        dram_cycles, l2_cycles: from a load to its data.
        registers, shared_bytes, warps, blocks: what an SM holds.
        block_shared_bytes: what one block may have.
        launch_us: from one small kernel to the next inside a CUDA graph.
        sources: where the figures are from.
    """

    name: str
    arch: int
    sms: int
    clock_ghz: float
    dram_gb_s: float
    l2_mb: float
    l2_bytes: float
    lanes: dict[str, int]
    tensor: dict[str, int]
    dram_cycles: int
    l2_cycles: int
    shared_bytes: int
    block_shared_bytes: int
    warps: int
    blocks: int
    launch_us: float
    sources: tuple[str, ...]
    sustained: float = 1.0
    registers: int = 65_536


SHARED_BYTES_A_CLOCK = 128
"""Of an SM's shared memory and first-level cache, on all of these (CUDA C++ Programming Guide)."""

_GUIDE = "CUDA C++ Programming Guide: technical specifications and throughput by compute capability"
_DISSECTED = "latencies: arXiv 2402.13499, tables of memory latency"
_BENCHES = "L2 rate and launch to launch: te42kyfo/gpu-benches, L40 and H200 charts"
_NO_L2 = "L2 rate: none published; the L40's bytes a clock and SM"
_LAUNCH = "launch to launch: as the L40's, te42kyfo/gpu-benches"


def _lanes(fma: int, fp64: int, alu: int = 64) -> dict[str, int]:
    return {"issue": 128, "fma": fma, "alu": alu, "mufu": 16, "fp64": fp64}


def _tensor(half: int) -> dict[str, int]:
    return {BF16: half, FP16: half, FP32: half // 2}


RTX_4090 = Card(
    "RTX 4090",
    89,
    sms=128,
    clock_ghz=2.52,
    dram_gb_s=1008,
    l2_mb=72,
    l2_bytes=14.7,
    lanes=_lanes(128, 2),
    tensor=_tensor(512),
    dram_cycles=542,
    l2_cycles=273,
    shared_bytes=102_400,
    block_shared_bytes=101_376,
    warps=48,
    blocks=24,
    launch_us=1.0,
    sources=("Ada GPU architecture white paper (165.2 TFLOP/s, 1,008 GB/s)", _GUIDE, _DISSECTED,
             _NO_L2, _LAUNCH),
)  # fmt: skip

L40 = replace(
    RTX_4090,
    name="L40",
    sms=142,
    clock_ghz=2.49,
    dram_gb_s=864,
    l2_mb=96,
    sources=("L40 data sheet (181 TFLOP/s, 864 GB/s)", _GUIDE, _BENCHES,
             "latencies: the RTX 4090's, the same die"),
)  # fmt: skip

RTX_A5000 = replace(
    RTX_4090,
    name="RTX A5000",
    arch=86,
    sms=64,
    clock_ghz=1.695,
    dram_gb_s=768,
    l2_mb=6,
    tensor=_tensor(1024),
    dram_cycles=466,
    l2_cycles=262,
    blocks=16,
    sources=("RTX A5000 data sheet (222 TFLOP/s sparse, 768 GB/s)", _GUIDE, _NO_L2, _LAUNCH,
             "latencies: none published; the A100's"),
)  # fmt: skip

RTX_5090 = replace(
    RTX_4090,
    name="RTX 5090",
    arch=120,
    sms=170,
    clock_ghz=2.407,
    dram_gb_s=1792,
    l2_mb=96,
    lanes=_lanes(128, 2, alu=128),
    dram_cycles=936,
    l2_cycles=360,
    sources=("RTX Blackwell GPU architecture white paper (209.5 TFLOP/s, 1,792 GB/s)", _GUIDE,
             "latencies: markdewing/AI_kernels, latency/README.md", _NO_L2, _LAUNCH),
)  # fmt: skip

A100 = Card(
    "A100 SXM 80 GB",
    80,
    sms=108,
    clock_ghz=1.41,
    dram_gb_s=2039,
    l2_mb=40,
    l2_bytes=47.4,
    lanes=_lanes(64, 32),
    tensor=_tensor(2048),
    dram_cycles=466,
    l2_cycles=262,
    shared_bytes=167_936,
    block_shared_bytes=166_912,
    warps=64,
    blocks=32,
    launch_us=1.4,
    sources=("A100 data sheet (312 TFLOP/s, 2,039 GB/s)",
             "A100 architecture white paper (L2 reads 5,120 bytes a clock)", _GUIDE, _DISSECTED,
             "launch to launch: as the H200's, te42kyfo/gpu-benches"),
)  # fmt: skip

H100 = Card(
    "H100 SXM",
    90,
    sms=132,
    clock_ghz=1.83,
    dram_gb_s=3350,
    l2_mb=50,
    l2_bytes=38.3,
    lanes=_lanes(128, 64),
    tensor=_tensor(4096),
    dram_cycles=479,
    l2_cycles=263,
    shared_bytes=233_472,
    block_shared_bytes=232_448,
    warps=64,
    blocks=32,
    launch_us=1.4,
    sustained=0.8,
    sources=("H100 data sheet (989 TFLOP/s, 3,350 GB/s)", _GUIDE, _DISSECTED, _BENCHES,
             "sustained: 794.5 of 989 TFLOP/s, stas00/ml-engineering, achievable matrix products"),
)  # fmt: skip

H200 = replace(
    H100,
    name="H200 SXM",
    dram_gb_s=4800,
    sources=("H200 data sheet (989 TFLOP/s, 4,800 GB/s)", _GUIDE, _BENCHES,
             "latencies and the sustained share: the H100's"),
)  # fmt: skip

CARDS = {
    "rtx-4090": RTX_4090,
    "h200": H200,
    "a100": A100,
    "rtx-a5000": RTX_A5000,
    "rtx-5090": RTX_5090,
    "l40": L40,
    "h100": H100,
}

BY_ARCH = {80: A100, 86: RTX_A5000, 89: RTX_4090, 90: H200, 120: RTX_5090}
"""The card that stands for a compute capability."""
