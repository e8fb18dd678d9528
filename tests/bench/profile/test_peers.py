"""Peers as Inductor makes them for a card that is not there."""

from __future__ import annotations

import torch

from bench import temporal_attention
from bench.harness.shapes import FORWARD, FP32
from bench.harness.workload import Draw, Workload
from bench.profile import peers, results, tables
from bench.profile.cards import RTX_4090

SMALL = {"branches": 1, "B": 2, "T": 3, "N": 5, "K": 0, "H": 2, "d": 16}


def test_generated_kernels_run_and_a_refusal_is_named():
    workload = Workload("temporal_attention", FORWARD, SMALL, FP32)
    names = ["compile_broadcast", "sdpa_cudnn"]
    (made, [out, *_]), (refused, _) = peers.compiled(workload, names, RTX_4090)
    assert isinstance(made, dict)
    assert all(name.startswith("triton_") and us > 0 for name, us in made["kernels"])
    assert made["bound_us"] < made["estimate_us"]
    qkv = temporal_attention.BENCH.make(SMALL, Draw(torch.float32, "cpu"))["qkv"]
    torch.testing.assert_close(out, temporal_attention.broadcast_formulation(qkv))
    assert isinstance(refused, str)
    assert refused.startswith("error: ")
    assert "cudnn" in refused.lower()  # a torch built for CUDA refuses it by itself


def test_losses_are_shown():
    """Of the committed records each says so where the best peer's estimate is below ours."""
    held = results.load(results.PEERS, "peers")
    assert held
    for record in held:
        known = [one["estimate_us"] for one in record["peers"].values() if isinstance(one, dict)]
        lost = bool(known) and min(known) < record["estimate_us"]
        assert (", a loss |" in tables.peers([record])) == lost
    assert any(", a loss |" in tables.peers([record]) for record in held)
