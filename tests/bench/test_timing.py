"""Timing with injected clocks: order, cold inputs, memory, rates; bounds by hand."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.harness import timing
from bench.harness.shapes import BF16, FP32
from bench.harness.timing import RTX_4090, Rates
from tests.bench.samples import RATES


class FakeClock(timing.Clock):
    """A pass of four calls takes what its setup says; nothing else takes time."""

    time = 0.0

    def now(self):
        return self.time

    def prepare(self, setup):
        return timing.Pass(setup, 4, "graph")

    def seconds(self, ready):
        self.time += ready.run()
        return ready.run()


def test_samples_are_of_a_call_and_fill_the_time():
    """20 seconds; but at least five samples, and no more than two hundred."""
    for cost, samples in ((2.0, 10), (8.0, 5), (0.01, 200)):
        actual = timing.passes(FakeClock(), lambda cost=cost: cost, 20.0)
        assert actual == ([cost / 4] * samples, "graph")


def test_input_sets_do_not_fit_the_cache():
    MB = 1 << 20
    for one, cache, free, expected in (
        (10, 50, 1000, (15, True)),  # three times the cache
        (400, 50, 80_000, (1, True)),
        (10, 50, 80, (2, False)),  # a quarter of what is free
        (1e-3, 50, 1000, (timing.MOST_SETS, False)),
        (10, 0, 1000, (1, False)),  # a CPU
    ):
        assert timing.input_sets(int(one * MB), cache * MB, free * MB) == expected


def test_peak_memory_of_a_call():
    x = torch.zeros(1000, 1000)
    assert timing.peak_bytes(lambda: x + 1, "cpu") in range(4_000_000, 4_001_000)
    assert timing.peak_bytes(lambda: (x + 1).exp().sum(), "cpu") in range(8_000_000, 8_001_000)
    assert timing.peak_bytes(lambda: x.view(-1), "cpu") == 0


H200 = Rates(4.3e12, 788e12, 50e12, 386e12)


def test_a_bound_is_the_larger_of_two_times():
    assert H200.bound_us(4.3e12, 0, BF16) == 1e6
    assert H200.bound_us(4.3e12, 2 * 788e12, BF16) == 2e6
    # float32 may take its own units or three TF32 products.
    assert H200.bound_us(0, 386e12 / 3, FP32) == 1e6
    assert RTX_4090.bound_us(0, 82.6e12, FP32) == 1e6


def test_rates_count_both_sides_of_a_copy_and_two_operations_a_product(monkeypatch):
    monkeypatch.setattr(timing.Clock, "seconds", lambda clock, ready: 0.5)
    assert set(RATES) == set(asdict(Rates(**RATES)))  # as records hold them
    before = torch.get_float32_matmul_precision()
    result = timing.measure_rates("cpu", side=64, copied=4096)
    assert result.copy_bytes_per_s == 2 * 4096 / 0.5
    assert result.bf16_flops_per_s == result.fp32_flops_per_s == 2 * 64**3 / 0.5
    assert torch.get_float32_matmul_precision() == before
