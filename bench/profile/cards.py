"""What a card does in a clock and a second, each figure with its source.

Rates are the data sheet's at its boost clock. What a card sustains is less where a share says so,
and more where its clock goes above boost, as GeForce cards' does.

A source that says "not opened" is named for figures that were not compared with it; all others were
read for the figures beside them.
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

_GUIDE = (
    "lanes and what an SM holds: CUDA C++ Programming Guide, technical specifications and"
    " throughput by compute capability; float32, float64 and special functions of 8.0 and 8.6 were"
    " read in a copy of its table, the rest not opened"
)
_DISSECTED = (
    "latencies: arXiv 2402.13499, tables of memory latency, not opened; markdewing/AI_kernels,"
    " latency/README.md, measures 636 and 296 cycles (RTX 4090), 550 and 210 (A100), 700 and 291"
    " (H100)"
)
_SIZES = "L2 size: markdewing/AI_kernels, latency/README.md"
_NO_L2 = "L2 rate: none published; the L40's bytes a clock and SM"
_L40_L2 = "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/l40.txt, 5.2 TB/s to 92 MB"
_H200_L2 = "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/h200.txt, 9.7 TB/s from 12 to 40 MB"
_LAUNCH = (
    "launch to launch: the L40's, te42kyfo/gpu-benches, gpu-small-kernels/l40_graph.txt, 65 kB"
    " in 0.94 µs"
)
_H200_LAUNCH = (
    "launch to launch: te42kyfo/gpu-benches, gpu-small-kernels/h200_graph.txt, 65 kB in 1.3 µs"
)
_MORE = "stas00/ml-engineering, compute/accelerator/README.md"


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
    sources=("SMs, clock and 1,008 GB/s: thefpsreview.com, RTX 4090 specifications",
             "165.2 TFLOP/s: Ada GPU architecture white paper, not opened", _SIZES, _GUIDE,
             _DISSECTED, _NO_L2, _LAUNCH),
)  # fmt: skip

L40 = replace(
    RTX_4090,
    name="L40",
    sms=142,
    clock_ghz=2.49,
    dram_gb_s=864,
    l2_mb=96,
    sources=("SMs and L2 size: abstract of arXiv 2606.22588",
             "clock, 181 TFLOP/s and 864 GB/s: L40 data sheet, not opened", _GUIDE, _L40_L2,
             _LAUNCH, "latencies: the RTX 4090's, the same die"),
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
    sources=("SMs, clock, L2 size, 222 TFLOP/s sparse, 768 GB/s: RTX A5000 data sheet, not opened",
             _GUIDE, _NO_L2, _LAUNCH,
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
    sources=("SMs, clock, L2 size, 1,792 GB/s and 838 TFLOP/s, which is four times 209.5:"
             " Linux Format, May 2025, RTX 5090",
             "twice the integer lanes of the RTX 4090: itc.ua, overview of Blackwell", _GUIDE,
             "latencies: markdewing/AI_kernels, latency/README.md", _NO_L2, _LAUNCH),
)  # fmt: skip

A100 = Card(
    "A100 SXM 80 GB",
    80,
    sms=108,
    clock_ghz=1.41,
    dram_gb_s=2039,
    l2_mb=40,
    l2_bytes=35.5,
    lanes=_lanes(64, 32),
    tensor=_tensor(2048),
    dram_cycles=466,
    l2_cycles=262,
    shared_bytes=167_936,
    block_shared_bytes=166_912,
    warps=64,
    blocks=32,
    launch_us=1.4,
    sources=("SMs and 312 TFLOP/s: forums.developer.nvidia.com, 244727",
             "clock: chipsandcheese.com, Nvidia's H100", "2,039 GB/s: A100 data sheet, not opened",
             _SIZES, _GUIDE, _DISSECTED,
             "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/a100_80.txt, 5.4 TB/s to 25 MB",
             "launch to launch: the same, gpu-small-kernels/a100_80_graph.txt, 65 kB in 1.3 µs"),
)  # fmt: skip

H100 = Card(
    "H100 SXM",
    90,
    sms=132,
    clock_ghz=1.83,
    dram_gb_s=3350,
    l2_mb=50,
    l2_bytes=40.2,
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
    sources=("SMs, clock and 989 TFLOP/s: glennklockwood.com, peak FLOPS", f"3,350 GB/s: {_MORE}",
             _SIZES, _GUIDE, _DISSECTED, f"{_H200_L2}, the same die", _H200_LAUNCH,
             "sustained: 794.5 of 989 TFLOP/s, stas00/ml-engineering, maximum achievable FLOPS"),
)  # fmt: skip

H200 = replace(
    H100,
    name="H200 SXM",
    dram_gb_s=4800,
    sources=(f"4,800 GB/s: {_MORE}", "SMs, clock, 989 TFLOP/s, sustained share, latencies and L2"
             " size: the H100's", _GUIDE, _H200_L2, _H200_LAUNCH),
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
