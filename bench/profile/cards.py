"""What a card does in a clock and a second, each figure with its source.

Rates are the data sheet's at its boost clock. What a card sustains is less where a share says so,
and more where its clock goes above boost, as GeForce cards' does.

A source that says "not opened" is named for figures that were not compared with it; all others were
read for the figures beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        fma, alu, fp64: lanes of these pipes.
        half: operations of the tensor cores, dense, with operands of 16 bits and float32 sums.
        dram_cycles, l2_cycles: from a load to its data.
        shared_bytes, warps, blocks, registers: what an SM holds.
        launch_us: from one small kernel to the next inside a CUDA graph.
        sustained: share of the tensor rate that a large product keeps within the card's power.
        sources: where the figures are from.
    """

    name: str
    arch: int
    sms: int
    clock_ghz: float
    dram_gb_s: float
    l2_mb: float
    l2_bytes: float
    fma: int
    alu: int
    fp64: int
    half: int
    dram_cycles: int
    l2_cycles: int
    shared_bytes: int
    warps: int
    blocks: int
    launch_us: float
    sustained: float
    sources: tuple[str, ...]
    registers: int = 65_536

    @property
    def lanes(self) -> dict[str, int]:
        """Of each pipe; ``issue`` is in lanes too, 4 warp instructions of 32."""
        return {"issue": 128, "fma": self.fma, "alu": self.alu, "mufu": 16, "fp64": self.fp64}

    @property
    def tensor(self) -> dict[str, int]:
        """Operations of the tensor cores by dtype; float32 is TF32."""
        return {BF16: self.half, FP16: self.half, FP32: self.half // 2}

    @property
    def block_shared_bytes(self) -> int:
        """What one block may have: the system keeps 1 KB."""
        return self.shared_bytes - 1024


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
_LAUNCH = (
    "launch to launch: the L40's, te42kyfo/gpu-benches, gpu-small-kernels/l40_graph.txt, 65 kB"
    " in 0.94 µs"
)


# name, arch, SMs, GHz, GB/s; L2: MB, bytes; lanes: fma, alu, fp64; half; cycles: DRAM, L2; an SM's
# shared bytes, warps, blocks; launch µs, sustained
RTX_4090 = Card(
    "RTX 4090", 89, 128, 2.52, 1008, 72, 14.7, 128, 64, 2, 512, 542, 273, 102_400, 48, 24, 1.0, 1.0,
    ("SMs, clock and 1,008 GB/s: thefpsreview.com, RTX 4090 specifications",
     "165.2 TFLOP/s: Ada GPU architecture white paper, not opened", _SIZES, _GUIDE, _DISSECTED,
     _NO_L2, _LAUNCH),
)  # fmt: skip
L40 = Card(
    "L40", 89, 142, 2.49, 864, 96, 14.7, 128, 64, 2, 512, 542, 273, 102_400, 48, 24, 1.0, 1.0,
    ("SMs and L2 size: abstract of arXiv 2606.22588",
     "clock, 181 TFLOP/s and 864 GB/s: L40 data sheet, not opened", _GUIDE, _LAUNCH,
     "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/l40.txt, 5.2 TB/s to 92 MB",
     "latencies: the RTX 4090's, the same die"),
)  # fmt: skip
RTX_A5000 = Card(
    "RTX A5000", 86, 64, 1.695, 768, 6, 14.7, 128, 64, 2, 1024, 466, 262, 102_400, 48, 16, 1.0, 1.0,
    ("SMs, clock, L2 size, 222 TFLOP/s sparse, 768 GB/s: RTX A5000 data sheet, not opened", _GUIDE,
     _NO_L2, _LAUNCH, "latencies: none published; the A100's"),
)  # fmt: skip
RTX_5090 = Card(
    "RTX 5090", 120, 170, 2.407, 1792, 96, 14.7, 128, 128, 2, 512, 936, 360, 102_400, 48, 24,
    1.0, 1.0,
    ("SMs, clock, L2 size, 1,792 GB/s and 838 TFLOP/s, which is four times 209.5: Linux Format, May"
     " 2025, RTX 5090",
     "twice the integer lanes of the RTX 4090: itc.ua, overview of Blackwell", _GUIDE,
     "latencies: markdewing/AI_kernels, latency/README.md", _NO_L2, _LAUNCH),
)  # fmt: skip
A100 = Card(
    "A100 SXM 80 GB", 80, 108, 1.41, 2039, 40, 35.5, 64, 64, 32, 2048, 466, 262, 167_936, 64, 32,
    1.4, 1.0,
    ("SMs and 312 TFLOP/s: forums.developer.nvidia.com, 244727",
     "clock: chipsandcheese.com, Nvidia's H100", "2,039 GB/s: A100 data sheet, not opened", _SIZES,
     _GUIDE, _DISSECTED,
     "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/a100_80.txt, 5.4 TB/s to 25 MB",
     "launch to launch: the same, gpu-small-kernels/a100_80_graph.txt, 65 kB in 1.3 µs"),
)  # fmt: skip
H200 = Card(
    "H200 SXM", 90, 132, 1.83, 4800, 50, 40.2, 128, 64, 64, 4096, 479, 263, 233_472, 64, 32,
    1.4, 0.8,
    ("4,800 GB/s: stas00/ml-engineering, compute/accelerator/README.md", _GUIDE,
     "all else is the H100's, the same die: SMs, clock and 989 TFLOP/s: glennklockwood.com, peak"
     " FLOPS", _SIZES, _DISSECTED,
     "L2 rate: te42kyfo/gpu-benches, gpu-l2-cache/h200.txt, 9.7 TB/s from 12 to 40 MB",
     "launch to launch: the same, gpu-small-kernels/h200_graph.txt, 65 kB in 1.3 µs",
     "sustained: 794.5 of 989 TFLOP/s, stas00/ml-engineering, maximum achievable FLOPS"),
)  # fmt: skip

BY_ARCH = {80: A100, 86: RTX_A5000, 89: RTX_4090, 90: H200, 120: RTX_5090}
"""The card that stands for a compute capability."""
