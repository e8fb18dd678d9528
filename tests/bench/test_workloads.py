"""Every op is measured; grids, bytes and operations are what they should be; peers compute it."""

from __future__ import annotations

import itertools

import pytest
import torch

from bench import dpc_knn
from bench.harness.measure import exact_outcome, outcome, relative_error
from bench.harness.shapes import BACKWARD, BF16, BOTH, FORWARD, FP32
from bench.harness.targets import bench_of
from bench.harness.workload import Workload, total_bytes
from cmpose.ops.backends import OPS

every_op = pytest.mark.parametrize("op", OPS)


def small(op, dtype=FP32, direction=FORWARD):
    bench = bench_of(op)
    workload = Workload(op, direction, bench.small, dtype)
    return bench, workload, bench.arguments(workload, "cpu")


@every_op
def test_an_op_has_a_bench_of_its_name(op):
    bench = bench_of(op)
    shapes, directions = bench.shapes, set(bench.directions)
    assert bench.op == op
    assert len({tuple(s.items()) for s in shapes}) == len(shapes)
    assert all(set(s) == set(bench.small) for s in shapes)
    assert FORWARD in directions
    assert bool(directions & {BACKWARD, BOTH}) == bool(bench.gradients)
    assert {"eager", "compile"} <= set(bench.peers)


def test_ratios_are_measured_on_one_and_two_threads():
    """At the attention ops' usual sizes; the number of threads does not change the arguments."""
    for op in ("spatial_attention", "temporal_attention"):
        workloads = list(bench_of(op).on_cpu())
        runs = {(w.direction, w.shape["threads"]) for w in workloads}
        assert runs == set(itertools.product((FORWARD, BOTH), (1, 2)))
        for workload in workloads:
            qkv = bench_of(op).arguments(workload, "meta")["qkv"]
            assert (*qkv.shape, qkv.dtype) == (8, 3, 207, 3, 12, 64, torch.float32)


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match=r"op must be one of .*, got 'attention'"):
        bench_of("attention")


def counted(op, direction, dtype):
    """Bytes of what the op is given and gives, of a real call at the small shape."""
    bench, _, arguments = small(op, dtype, direction)
    result = bench.call(**arguments, backend="auto")
    input_bytes = total_bytes({name: value for name, value in arguments.items() if name != "seed"})
    written, gradients = total_bytes(result), total_bytes([arguments[n] for n in bench.gradients])
    forward, backward = input_bytes + written, input_bytes + written + gradients
    if op == "spatial_attention":
        log_sum_exps = 4 * result[..., 0].numel()
        forward, backward = forward + log_sum_exps, backward + log_sum_exps
    elif op == "corrupt_tokens":
        backward = total_bytes(result.x) + result.masked.numel() + gradients
    elif op == "reconstruction_loss":  # forward writes the gradient, of pred without keypoints
        target, corrupted = arguments["target"], arguments["corrupted"]
        read = 2 * int(corrupted.sum()) * target.shape[-1] * target.itemsize + corrupted.numel()
        forward, backward = read + total_bytes(target), 0
    elif op == "heatmap_loss":
        forward, backward = 2 * total_bytes(arguments["pred"]), 0
    elif op == "warp_clips":
        forward = result.numel() + written
    elif op == "select_tokens":
        backward = total_bytes([result[0], *result[:2]]) + gradients
    elif op == "unmerge_tokens":  # backward reads no tokens
        backward = input_bytes + written
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[direction]


RUNS = [(op, direction) for op in OPS for direction in bench_of(op).directions]


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("op", "direction"), RUNS, ids=[f"{o}-{d}" for o, d in RUNS])
def test_bytes_are_those_of_the_tensors(op, direction, dtype):
    bench = bench_of(op)
    formula = bench.bytes_of(Workload(op, direction, bench.small, dtype))
    assert formula == counted(op, direction, dtype)


def test_operations_by_hand():
    """Attention: 2 products forward, 5 backward; clustering: one Gram matrix; others none."""
    spatial, temporal = 2 * 6 * 2 * 15**2 * 16, 2 * 36 * 2 * 3**2 * 32
    gram = 2 * 2 * 24 * 24 * 16
    products = {"dpc_knn": (gram, gram), "knn": (gram, gram),
                "spatial_attention": (2 * spatial, 5 * spatial),
                "temporal_attention": (2 * temporal, 5 * temporal)}  # fmt: skip
    for op in OPS:
        bench = bench_of(op)
        counted = tuple(bench.flops(bench.small, direction) for direction in (FORWARD, BACKWARD))
        assert counted == products.get(op, (0, 0))


CHECKED = [
    (op, name)
    for op in OPS
    for name, peer in bench_of(op).peers.items()
    if peer.checked and not peer.compiled and not name.startswith("sdpa")
]


@pytest.mark.parametrize(("op", "name"), CHECKED, ids=[f"{o}-{n}" for o, n in CHECKED])
def test_peers_compute_what_the_op_does(op, name):
    """In float32: the same values and gradients, up to rounding."""
    bench, workload, arguments = small(op, FP32, bench_of(op).directions[0])
    actual = outcome(bench.peers[name].build(False), arguments, bench, workload.direction)
    assert relative_error(actual, exact_outcome(arguments, bench, workload.direction)) < 1e-5


def test_tcformer_clusters_as_published():
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
