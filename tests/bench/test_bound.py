"""Bounds by hand, rates by an injected clock."""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.harness import bound, timing
from bench.harness.bound import RTX_4090, Rates
from bench.harness.shapes import BF16, FP32
from tests.bench.samples import RATES

H200 = Rates(4.3e12, 788e12, 50e12, 386e12)


def test_a_bound_is_the_larger_of_two_times() -> None:
    assert H200.bound_us(4.3e12, 0, BF16) == 1e6
    assert H200.bound_us(4.3e12, 2 * 788e12, BF16) == 2e6
    # float32 may take its own units or three TF32 products.
    assert H200.bound_us(0, 386e12 / 3, FP32) == 1e6
    assert RTX_4090.bound_us(0, 82.6e12, FP32) == 1e6


class Counting(timing.Clock):
    """Each pass takes half a second."""

    def seconds(self, ready: timing.Pass) -> float:
        return 0.5


def test_rates_count_both_sides_of_a_copy_and_two_operations_a_product() -> None:
    assert set(RATES) == set(asdict(Rates(**RATES)))  # as records hold them
    before = torch.get_float32_matmul_precision()
    result = bound.measure_rates("cpu", Counting(), side=64, copied=4096)
    assert result.copy_bytes_per_s == 2 * 4096 / 0.5
    assert result.bf16_flops_per_s == result.fp32_flops_per_s == 2 * 64**3 / 0.5
    assert torch.get_float32_matmul_precision() == before
