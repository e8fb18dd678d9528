"""Peers as Inductor makes them for a card that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import temporal_attention
from bench.harness.shapes import FORWARD, FP32
from bench.harness.workload import Draw, Workload
from bench.profile import inductor
from tests.ptx_on_cpu import triton_kernels

SMALL = {"branches": 1, "B": 2, "T": 3, "N": 5, "K": 0, "H": 2, "d": 16}


def test_generated_kernels_run_and_a_refusal_is_named():
    asked = [
        (Workload("temporal_attention", FORWARD, SMALL, FP32), peer)
        for peer in ("compile_broadcast", "sdpa_cudnn")
    ]
    made, refused = inductor.plans(asked, 89)
    assert isinstance(made, inductor.Plan)
    qkv = temporal_attention.BENCH.make(SMALL, Draw(torch.float32, "cpu"))["qkv"]
    ran = []

    def launched(kernel: inductor.Kernel, arguments: Sequence[Any]) -> None:
        ran.append(kernel.name)
        triton_kernels.run(inductor.launch_of(kernel, arguments))

    out, *_ = inductor.run(made, qkv, launched)
    assert ran
    assert all(name.startswith("triton_") for name in ran)
    torch.testing.assert_close(out, temporal_attention.broadcast_formulation(qkv))
    assert isinstance(refused, str)
    assert "sdpa_cudnn" in refused


def test_a_card_that_nothing_is_known_of_is_refused():
    with pytest.raises(ValueError, match=r"arch must be one of 80, .*, got 75"):
        inductor.plans([], 75)
