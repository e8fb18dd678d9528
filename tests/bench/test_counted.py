"""Bytes that plain PyTorch moves, counted without a card."""

from __future__ import annotations

import torch

from bench import traffic
from bench.harness.workload import size_in_memory


def test_reads_inputs_and_writes_outputs_once() -> None:
    a, b = (torch.empty(4, 5, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with traffic.Traffic() as counted:
        a + b
        a + a  # one input
        a.t().contiguous().view(20)  # views, and a copy between them
    assert counted.bytes == 2 * 20 * (3 + 2 + 2)
    assert counted.calls == 3


def test_an_expanded_dimension_counts_once() -> None:
    row = torch.empty(1, 8, device="meta").expand(16, 8)
    assert size_in_memory(row) == 8 * 4
    assert size_in_memory(torch.empty(0, 3, device="meta")) == 0
    with traffic.Traffic() as counted:
        row * 2
    assert counted.bytes == 4 * (8 + 16 * 8)
