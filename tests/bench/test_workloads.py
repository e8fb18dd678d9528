"""Every op is measured; grids, bytes and operations are what they should be; peers compute it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from bench import dpc_knn
from bench.harness.measure import exact_outcome, outcome, relative_error
from bench.harness.shapes import BACKWARD, BF16, BOTH, FORWARD, FP32
from bench.harness.targets import bench_of
from bench.harness.workload import OpBench, Workload, total_bytes
from cmpose.ops.backends import OPS

every_op = pytest.mark.parametrize("op", OPS)


def small(op: str, dtype: str = FP32, direction: str = FORWARD) -> tuple[OpBench, Any, Any]:
    bench = bench_of(op)
    workload = Workload(op, direction, bench.small, dtype)
    return bench, workload, bench.arguments(workload, "cpu")


@every_op
def test_an_op_has_a_bench_of_its_name(op: str) -> None:
    bench = bench_of(op)
    assert bench.op == op
    shapes = bench.shapes
    assert len({tuple(s.items()) for s in shapes}) == len(shapes)
    assert all(set(s) == set(bench.small) for s in shapes)
    directions = set(bench.directions)
    assert FORWARD in directions
    assert bool(directions & {BACKWARD, BOTH}) == bool(bench.gradients)
    assert {"eager", "compile"} <= set(bench.peers)


def test_ratios_are_measured_on_one_and_two_threads() -> None:
    """At the attention ops' usual sizes; the number of threads does not change the arguments."""
    for op in ("spatial_attention", "temporal_attention"):
        workloads = list(bench_of(op).on_cpu())
        runs = {(w.direction, w.shape["threads"]) for w in workloads}
        assert runs == set(itertools.product((FORWARD, BOTH), (1, 2)))
        for workload in workloads:
            qkv = bench_of(op).arguments(workload, "meta")["qkv"]
            assert (*qkv.shape, qkv.dtype) == (8, 3, 207, 3, 12, 64, torch.float32)


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'attention'"):
        bench_of("attention")


def counted(op: str, direction: str, dtype: str) -> int:
    """Bytes of what the op is given and gives, of a real call at the small shape."""
    bench, _, made = small(op, dtype, direction)
    result = bench.call(**made, backend="auto")
    needed = {name: value for name, value in made.items() if name != "seed"}
    given, written = total_bytes(needed), total_bytes(result)
    gradients = sum(total_bytes(made[name]) for name in bench.gradients)
    element = getattr(torch, dtype).itemsize
    if "attention" in op:
        kept = 0 if op == "temporal_attention" else 4 * result[..., 0].numel()
        return given + written + (gradients if direction == BACKWARD else 0) + kept
    if op == "corrupt_tokens":
        backward = total_bytes(result.x) + result.masked.numel() + gradients
        return given + written if direction == FORWARD else backward
    if op == "reconstruction_loss":
        gradient = made["target"].numel() * element  # pred's own values, without keypoints
        rows, flags = int(made["corrupted"].sum()), made["corrupted"].numel()
        return 2 * rows * made["pred"].shape[-1] * element + flags + gradient
    if op == "heatmap_loss":
        return 2 * total_bytes(made["pred"])
    if op == "warp_clips":
        return result.numel() + written
    if direction == BOTH:
        forward = given + written
        if op == "select_tokens":
            scores, importance = result[:2]
            return forward + total_bytes([scores, scores, importance]) + gradients
        return forward + given + written + gradients if op == "merge_clusters" else 2 * forward
    return given + written + (gradients if direction == BACKWARD else 0)


RUNS = [(op, direction) for op in OPS for direction in bench_of(op).directions]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("op", "direction"), RUNS, ids=[f"{o}-{d}" for o, d in RUNS])
def test_bytes_are_those_of_the_tensors(op: str, direction: str, dtype: str) -> None:
    bench = bench_of(op)
    formula = bench.bytes_of(Workload(op, direction, bench.small, dtype))
    assert formula == counted(op, direction, dtype)


def test_operations_by_hand() -> None:
    """Attention: 2 products forward, 5 backward; clustering: one Gram matrix; others none."""
    for op, sequences, length, d in (
        ("spatial_attention", 3 * 2, 15, 16),
        ("temporal_attention", 3 * 12, 3, 32),
    ):
        product = 2 * sequences * 2 * length**2 * d
        flops = bench_of(op).flops
        small = bench_of(op).small
        assert (flops(small, FORWARD), flops(small, BACKWARD)) == (2 * product, 5 * product)
    for op in ("dpc_knn", "knn"):
        assert bench_of(op).flops(bench_of(op).small, FORWARD) == 2 * 2 * 24 * 24 * 16
    for op in set(OPS) - {"spatial_attention", "temporal_attention", "dpc_knn", "knn"}:
        assert bench_of(op).flops(bench_of(op).small, FORWARD) == 0


CHECKED = [
    (op, name)
    for op in OPS
    for name, peer in bench_of(op).peers.items()
    if peer.checked and not peer.compiled and not name.startswith("sdpa")
]


@pytest.mark.parametrize(("op", "name"), CHECKED, ids=[f"{o}-{n}" for o, n in CHECKED])
def test_peers_compute_what_the_op_does(op: str, name: str) -> None:
    """In float32: the same values and gradients, up to rounding."""
    bench, workload, made = small(op, FP32, bench_of(op).directions[0])
    found = outcome(bench.peers[name].build(False), made, bench, workload.direction)
    assert relative_error(found, exact_outcome(made, bench, workload.direction)) < 1e-5


def test_tcformer_clusters_as_published() -> None:
    """By hand: two groups on a line; a centre is in its own cluster."""
    torch.manual_seed(0)  # its noise may leave two densities alike
    line = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0])[None, :, None].repeat(1, 1, 4)
    density, delta, centers, labels = dpc_knn.tcformer(line, 2, 2)
    # Over √D: ‖·‖ of 4 equal channels is twice the step, and √4 takes it back.
    torch.testing.assert_close(density, torch.exp(torch.full((1, 5), -0.5)), rtol=0, atol=2e-6)
    assert float(delta.max()) == pytest.approx(11.0)  # the peak's: the clip's largest distance
    assert {int(c) // 3 for c in centers[0]} == {0, 1}
    assert len(set(labels[0, :3].tolist())) == len(set(labels[0, 3:].tolist())) == 1
    for cluster, center in enumerate(centers[0]):
        assert labels[0, center] == cluster
