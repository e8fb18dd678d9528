"""Times calls: on a card by CUDA events around CUDA graphs, on a CPU by the host's clock.

What is timed is a pass: one call for each of several input sets, so many that together they do not
fit the L2 cache. On a card a CUDA graph holds the whole pass, so that no launch and no work of the
host is in the time. A pass that cannot be captured runs behind a delay long enough for the host to
get ahead (the timer is then ``events``); such a time is shown, and not compared with a graph's.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from bench.harness.shapes import FP32
from cmpose.train import cards

Call = Callable[[], Any]

COLD = 3
"""Input sets together are this many times the L2 cache."""
MOST_SETS = 64
SAMPLES = (5, 200)
"""Of an entrant in a turn, at least and at most."""


class Pass(NamedTuple):
    """One pass over the input sets, ready to be timed."""

    run: Call
    calls: int
    timer: str  # graph, events or host
    keep: Any = None  # what must live as long


def one_after_another(calls: Sequence[Call]) -> None:
    """Keeps none of their results."""
    for call in calls:
        call()


class Clock:
    """Prepares passes and times them, by perf_counter: for a CPU."""

    def context(self) -> AbstractContextManager[Any]:
        """Within it everything that is timed must be made."""
        return nullcontext()

    def prepare(self, setup: Callable[[], Sequence[Call]]) -> Pass:
        calls = setup()
        one_after_another(calls)
        return Pass(partial(one_after_another, calls), len(calls), "host")

    def seconds(self, ready: Pass) -> float:
        return self.wall(ready.run)

    def wall(self, call: Call) -> float:
        """Seconds of a call as a program sees it, host included: between two synchronisations."""
        start = self.now()
        call()
        return self.now() - start

    def now(self) -> float:
        return time.perf_counter()


class CudaClock(Clock):
    """By CUDA events."""

    warm_ups = 3

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def context(self) -> AbstractContextManager[Any]:
        # A backward pass runs on its forward's stream, and waits for the stream on which its
        # inputs were first used: both must be the one that is captured.
        return torch.cuda.stream(self.stream)

    def prepare(self, setup: Callable[[], Sequence[Call]]) -> Pass:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            calls = setup()
            for _ in range(self.warm_ups):
                one_after_another(calls)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                outputs = [call() for call in calls]
        except Exception as error:
            torch.cuda.synchronize()  # raises if the card is lost
            return Pass(partial(one_after_another, calls), len(calls), "events", str(error))
        graph.replay()
        torch.cuda.synchronize()
        return Pass(graph.replay, len(calls), "graph", (graph, outputs))

    def seconds(self, ready: Pass) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            if ready.timer == "events":
                # About 20 µs a call at 2 GHz: the host enqueues the pass while the card waits.
                torch.cuda._sleep(100_000 + 40_000 * ready.calls)
            start.record()
            ready.run()
            end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def now(self) -> float:
        torch.cuda.synchronize()
        return super().now()


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else Clock()


def input_sets(bytes_of_one: int, l2_bytes: int, free_bytes: int) -> tuple[int, bool]:
    """How many input sets to rotate, so that a call finds none of its inputs in the L2 cache.

    At most a quarter of the free bytes is filled; a cache of 0 bytes is a CPU's.

    Returns:
        Their number, and whether they really are cold: together at least twice the cache.
    """
    if not l2_bytes or not bytes_of_one:
        return 1, False
    room = max(1, free_bytes // (4 * bytes_of_one))
    count = min(math.ceil(COLD * l2_bytes / bytes_of_one), room, MOST_SETS)
    return count, count * bytes_of_one >= 2 * l2_bytes


def free_bytes(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else 1 << 30


def sampled(sample: Callable[[], float], clock: Clock, seconds: float) -> list[float]:
    """Samples until the time is used, within :data:`SAMPLES`."""
    samples: list[float] = []
    start, (least, most) = clock.now(), SAMPLES
    while len(samples) < least or (len(samples) < most and clock.now() - start < seconds):
        samples.append(sample())
    return samples


def passes(
    clock: Clock, setup: Callable[[], Sequence[Call]], seconds: float
) -> tuple[list[float], str]:
    """Seconds of a call, a sample a pass until the time is used; and the timer."""
    ready = clock.prepare(setup)
    samples = sampled(partial(clock.seconds, ready), clock, seconds)
    return [sample / ready.calls for sample in samples], ready.timer


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds of samples in seconds."""
    values = torch.tensor(samples, dtype=torch.float64) * 1e6
    q = torch.quantile(values, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return {name: round(float(v), 3) for name, v in zip(("p20", "p50", "p80"), q, strict=True)}


def profile(call: Call, device: str, **options: Any) -> torch.profiler.profile:
    """``call`` under torch's profiler, with the card's activity on a card."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, **options) as profiled:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    return profiled


def peak_bytes(call: Call, device: str) -> int:
    """The most memory that a call holds at once beside what was there before it."""
    results: list[Any] = []  # live as long as the measurement
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append(call())
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before)
    # On a CPU: the highest running sum of what the profiler notes of torch's allocator.
    profiled = profile(lambda: results.append(call()), "cpu", profile_memory=True)
    events: list[Any] = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    noted = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(itertools.accumulate((e.nbytes() for e in noted), initial=0))


@dataclass(frozen=True)
class Rates:
    """What a card does in a second.

    Attributes:
        copy_bytes_per_s: read and written bytes of a kernel that negates a large tensor.
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

    def bound_us(self, moved: float, flops: float, dtype: str) -> float:
        """No time is below it: the larger of algorithmic bytes over the copy rate and matrix
        products' operations over the matrix rate, in µs."""
        rate = self.bf16_flops_per_s
        if dtype == FP32:
            # Its own units or three TF32 products: kernels may do either, and what a kernel can
            # be faster than is no bound.
            rate = max(self.fp32_flops_per_s, self.tf32_flops_per_s / 3)
        return 1e6 * max(moved / self.copy_bytes_per_s, flops / rate)


_AD102 = cards.RTX_4090
RTX_4090 = Rates(_AD102.bandwidth, _AD102.flops_16, _AD102.flops_32, _AD102.flops_32)
"""By its datasheet."""


def measure_rates(device: str, *, side: int = 0, copied: int = 0) -> Rates:
    """The rates of the card, or of the CPU, in this process and now.

    Args:
        device: ``cuda`` or ``cpu``.
        side: of the square matrices; 0 takes 8192 on a card.
        copied: bytes of the tensor that is copied; 0 takes 2 GiB on a card.
    """
    clock, on_card = clock_for(device), device == "cuda"
    side = side or (8192 if on_card else 512)
    copied = copied or (min(1 << 31, free_bytes(device) // 4) if on_card else 1 << 26)

    def seconds(call: Call) -> float:
        ready = clock.prepare(lambda: [call])
        return statistics.median(clock.seconds(ready) for _ in range(10 if on_card else 3))

    source = torch.empty(copied // 4, dtype=torch.float32, device=device).normal_()
    # By a kernel: a copy in a CUDA graph is not one, and is slower than some kernels on an H200.
    copy = 2 * source.nbytes / seconds(partial(torch.neg, source, out=torch.empty_like(source)))
    products, before = [], torch.get_float32_matmul_precision()
    bf16, fp32 = torch.bfloat16, torch.float32
    for dtype, precision in ((bf16, "highest"), (fp32, "highest"), (fp32, "high")):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        products.append(2 * side**3 / seconds(partial(torch.mm, a, b, out=torch.empty_like(a))))
    torch.set_float32_matmul_precision(before)
    return Rates(copy, *products)
