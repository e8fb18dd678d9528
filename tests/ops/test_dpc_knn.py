from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops.distances import squared_distances
from tests.ops.support import dpc_knn_oracle as oracle
from tests.ops.support import tcformer


def line(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    """One clip of tokens with one channel."""
    return torch.tensor(values, dtype=dtype)[None, :, None]


def random_tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_matches_oracle(tokens: Tensor, k: int, num_clusters: int, **options: Any) -> None:
    clusters = ops.dpc_knn(tokens, k, num_clusters, **options)
    for b in range(tokens.shape[0]):
        expected = oracle.cluster(tokens[b].tolist(), k, num_clusters, **options)
        torch.testing.assert_close(
            clusters.log_density[b].exp(), torch.tensor(expected.density).double()
        )
        torch.testing.assert_close(clusters.delta[b], torch.tensor(expected.delta).double())
        assert clusters.centers[b].tolist() == expected.centers
        assert clusters.assignment[b].tolist() == expected.assignment


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("peak_delta", ["row_max", "global_max"])
@pytest.mark.parametrize(("size", "width", "k", "num_clusters"), [(17, 4, 5, 6), (23, 7, 3, 1)])
def test_oracle(
    size: int,
    width: int,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
) -> None:
    options = {"scale": scale, "include_self": include_self, "peak_delta": peak_delta}
    assert_matches_oracle(random_tokens(3, size, width), k, num_clusters, **options)


@pytest.mark.parametrize("seed", range(6))
def test_oracle_on_a_lattice_full_of_ties(seed: int) -> None:
    """Whole numbers and four channels: equal distances and densities are exactly equal."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, 2, (4, 21, 4), generator=generator).double()
    assert_matches_oracle(tokens, 5, 9)
    assert_matches_oracle(tokens, 1, 21)
    assert_matches_oracle(tokens, 4, 5, scale=False, include_self=False)


def test_ties_fall_the_same_way_in_every_dtype() -> None:
    tokens = torch.randint(-1, 2, (8, 40, 16), generator=torch.Generator().manual_seed(3))
    expected = ops.dpc_knn(tokens.double(), 5, 12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        clusters = ops.dpc_knn(tokens.to(dtype), 5, 12)
        assert torch.equal(clusters.centers, expected.centers)
        assert torch.equal(clusters.assignment, expected.assignment)


@pytest.mark.parametrize(
    ("size", "width", "k", "num_clusters"), [(48, 64, 5, 12), (132, 384, 5, 32)]
)
def test_agrees_with_tcformer(size: int, width: int, k: int, num_clusters: int) -> None:
    tokens = random_tokens(4, size, width)
    density, delta, centers, assignment = tcformer.cluster(tokens, k, num_clusters)
    clusters = ops.dpc_knn(tokens, k, num_clusters, peak_delta="global_max")
    torch.testing.assert_close(clusters.log_density.exp(), density)
    torch.testing.assert_close(clusters.delta, delta)
    assert torch.equal(clusters.centers, centers)
    assert torch.equal(clusters.assignment, assignment)


def test_by_hand() -> None:
    """0, 1, 2 and 10, 11 on a line, k = 2 with the token itself: two clusters."""
    clusters = ops.dpc_knn(line(0, 1, 2, 10, 11), 2, 2)
    # Everyone's nearest other token is at distance 1: log ρ = −(0 + 1) / 2 throughout, so the
    # order is the index and token 0 is the peak. δ is the way back to a token before.
    assert clusters.log_density.tolist() == [[-0.5] * 5]
    assert clusters.delta.tolist() == [[11, 1, 1, 8, 1]]
    assert clusters.centers.tolist() == [[0, 3]]
    assert clusters.assignment.tolist() == [[0, 0, 0, 1, 1]]


def test_peak_delta() -> None:
    """The peak (1, the middle of 0, 1, 2) is 9 from the farthest token, the clip is 10 wide."""
    tokens = line(0, 1, 2, 10)
    row = ops.dpc_knn(tokens, 3, 1)
    whole = ops.dpc_knn(tokens, 3, 1, peak_delta="global_max")
    assert row.centers.tolist() == whole.centers.tolist() == [[1]]
    assert row.delta[0, 1] == 9
    assert whole.delta[0, 1] == 10
    assert torch.equal(row.delta[0, [0, 2, 3]], whole.delta[0, [0, 2, 3]])


def test_include_self() -> None:
    tokens = line(0, 1, 3)
    assert ops.dpc_knn(tokens, 1, 1).log_density.tolist() == [[0, 0, 0]]
    clusters = ops.dpc_knn(tokens, 1, 1, include_self=False)
    assert clusters.log_density.tolist() == [[-1, -1, -4]]


def test_scale_is_the_square_root_of_the_width() -> None:
    tokens = random_tokens(2, 9, 16)
    scaled, plain = ops.dpc_knn(tokens, 3, 2), ops.dpc_knn(tokens, 3, 2, scale=False)
    torch.testing.assert_close(scaled.log_density * 16, plain.log_density)
    torch.testing.assert_close(scaled.delta * 4, plain.delta)


def test_duplicates() -> None:
    """All tokens alike: every distance, δ included, is exactly 0 and the index decides."""
    tokens = random_tokens(1, 1, 50, dtype=torch.float32).expand(2, 7, 50) * 1000
    clusters = ops.dpc_knn(tokens, 3, 4)
    assert (clusters.log_density == 0).all()
    assert (clusters.delta == 0).all()
    assert clusters.centers.tolist() == [[0, 1, 2, 3]] * 2
    # Those that are no centre are as near to all: the first one takes them.
    assert clusters.assignment.tolist() == [[0, 1, 2, 3, 0, 0, 0]] * 2


def test_duplicates_among_others_come_last_in_index_order() -> None:
    clusters = ops.dpc_knn(line(5, 0, 5, 0, 5, 9), 1, 6)
    # k = 1 is the token itself: all densities tie. δ is 0 for the second and later copies.
    assert clusters.delta.tolist() == [[5, 5, 0, 0, 0, 4]]
    assert clusters.centers.tolist() == [[0, 1, 5, 2, 3, 4]]
    assert clusters.assignment.tolist() == [[0, 1, 3, 4, 5, 2]]


@pytest.mark.parametrize("width", [1, 3, 64, 767])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distances_do_not_cancel(width: int, offset: float) -> None:
    tokens = random_tokens(2, 33, width, dtype=torch.float32) + offset
    tokens[:, 20] = tokens[:, 3]
    square = squared_distances(tokens)
    assert (square.diagonal(dim1=1, dim2=2) == 0).all()
    assert (square[:, 20, 3] == 0).all()
    assert torch.equal(square, square.transpose(1, 2))
    exact = squared_distances(tokens.double())
    # Each difference and product rounds once, and a sum of n terms log2 n times, because torch
    # adds in pairs. 32 ulp are enough for any of these widths.
    assert ((square - exact).abs() <= 32 * torch.finfo(torch.float32).eps * exact).all()


def test_far_tokens_do_not_underflow() -> None:
    """exp(−mean d²) is 0 here in float32, but its logarithm still ranks the tokens."""
    tokens = random_tokens(1, 20, 8) * 100
    clusters = ops.dpc_knn(tokens.float(), 5, 6)
    assert (clusters.log_density.exp() == 0).all()
    expected = ops.dpc_knn(tokens, 5, 6)
    assert torch.equal(clusters.centers, expected.centers)
    assert torch.equal(clusters.assignment, expected.assignment)


def test_one_cluster_and_every_token_a_cluster() -> None:
    tokens = random_tokens(2, 11, 5)
    one = ops.dpc_knn(tokens, 11, 1)
    assert (one.assignment == 0).all()
    all_of_them = ops.dpc_knn(tokens, 11, 11)
    assert torch.equal(all_of_them.centers.sort(dim=1).values, torch.arange(11).expand(2, 11))
    own = all_of_them.centers.gather(1, all_of_them.assignment)
    assert torch.equal(own, torch.arange(11).expand(2, 11))
    assert torch.equal(all_of_them.centers[:, :1], one.centers)


def test_one_token() -> None:
    clusters = ops.dpc_knn(line(3.0), 1, 1)
    assert [t.tolist() for t in clusters] == [[[0.0]], [[0.0]], [[0]], [[0]]]


def test_centers_are_in_descending_order_of_score() -> None:
    clusters = ops.dpc_knn(random_tokens(3, 30, 6), 4, 30)
    score = (clusters.log_density + clusters.delta.log()).gather(1, clusters.centers)
    assert (score[:, 1:] <= score[:, :-1]).all()


@pytest.mark.parametrize("include_self", [True, False])
def test_invalid_tokens_might_as_well_not_be_there(include_self: bool) -> None:
    tokens = random_tokens(3, 16, 4)
    valid = torch.ones(3, 16, dtype=torch.bool)
    valid[:, [0, 5, 15]] = False
    valid_indices = [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    clusters = ops.dpc_knn(tokens, 4, 5, valid=valid, include_self=include_self)
    alone = ops.dpc_knn(tokens[:, valid_indices], 4, 5, include_self=include_self)
    torch.testing.assert_close(clusters.log_density[:, valid_indices], alone.log_density)
    torch.testing.assert_close(clusters.delta[:, valid_indices], alone.delta)
    assert torch.equal(clusters.centers, torch.tensor(valid_indices)[alone.centers])
    assert torch.equal(clusters.assignment[:, valid_indices], alone.assignment)
    assert (clusters.log_density[~valid] == -math.inf).all()
    assert (clusters.delta[~valid] == 0).all()
    to_centers = torch.cdist(
        tokens, tokens.gather(1, clusters.centers[..., None].expand(-1, -1, 4))
    )
    assert torch.equal(clusters.assignment[~valid], to_centers.argmin(dim=-1)[~valid])


def test_fewer_valid_tokens_than_clusters() -> None:
    tokens = line(9, 4, 4, 0, 5)
    valid = torch.tensor([[False, True, True, False, False]])
    clusters = ops.dpc_knn(tokens, 3, 4, valid=valid)
    # Both are at distance 0 from each other, and each has these two neighbours only.
    assert clusters.log_density.tolist() == [[-math.inf, 0, 0, -math.inf, -math.inf]]
    assert clusters.delta.tolist() == [[0] * 5]
    assert clusters.centers.tolist() == [[1, 2, 0, 3]]
    assert clusters.assignment.tolist() == [[0, 0, 1, 0, 0]]


def test_fewer_valid_neighbours_than_k_make_a_smaller_mean() -> None:
    """Two valid tokens 2 apart: with k = 3 each has itself and the other, or the other alone."""
    tokens, valid = line(0, 2, 2, 2, 9), torch.tensor([[True, True, False, False, False]])
    clusters = ops.dpc_knn(tokens, 3, 1, valid=valid)
    assert clusters.log_density[0, :2].tolist() == [-(0 + 4) / 2] * 2
    clusters = ops.dpc_knn(tokens, 3, 1, valid=valid, include_self=False)
    assert clusters.log_density[0, :2].tolist() == [-4.0] * 2


def test_no_valid_token() -> None:
    clusters = ops.dpc_knn(line(1, 2, 3), 2, 2, valid=torch.zeros(1, 3, dtype=torch.bool))
    assert (clusters.log_density == -math.inf).all()
    assert clusters.delta.tolist() == [[0, 0, 0]]
    assert clusters.centers.tolist() == [[0, 1]]
    assert clusters.assignment.tolist() == [[0, 0, 0]]


def test_all_valid_is_no_mask() -> None:
    tokens = random_tokens(2, 12, 3)
    masked = ops.dpc_knn(tokens, 4, 5, valid=torch.ones(2, 12, dtype=torch.bool))
    for a, b in zip(masked, ops.dpc_knn(tokens, 4, 5), strict=True):
        assert torch.equal(a, b)


def test_no_gradient() -> None:
    clusters = ops.dpc_knn(random_tokens(1, 6, 3).requires_grad_(), 2, 2)
    assert not any(t.requires_grad for t in clusters)


def test_chunks_do_not_change_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_tokens(2, 13, 6)
    whole = squared_distances(tokens)
    for elements in (1, 2 * 13 * 6 * 5):
        monkeypatch.setitem(squared_distances.__globals__["_CHUNK"], "cpu", elements)
        assert torch.equal(squared_distances(tokens), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must be between 1 and 6 \(M tokens\), got 0"),
        ({"k": 7}, r"k must be between 1 and 6 \(M tokens\), got 7"),
        ({"k": 6, "include_self": False}, r"k must be between 1 and 5 .*itself.*, got 6"),
        ({"num_clusters": 0}, r"num_clusters must be between 1 and 6"),
        ({"num_clusters": 7}, r"num_clusters must be between 1 and 6 \(M tokens\), got 7"),
        ({"peak_delta": "max"}, r"peak_delta must be one of row_max, global_max, got 'max'"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.dpc_knn(random_tokens(1, 6, 3), **{"k": 2, "num_clusters": 2, **options})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tokens_that_are_no_numbers(bad: float) -> None:
    tokens = random_tokens(2, 6, 3)
    tokens[1, 2, 0] = bad
    for valid in (None, tokens.isfinite().all(dim=-1)):
        with pytest.raises(ValueError, match=r"tokens must be finite, got 1 NaN or inf"):
            ops.dpc_knn(tokens, 2, 2, valid=valid)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_no_number_is_an_invalid_one_in_cluster_0(bad: float) -> None:
    """0, 1, 2 and 10, 11 on a line with two others between: test_by_hand's clusters."""
    tokens = line(0, bad, 1, 2, 10, 11, bad)
    with ops.without_value_checks():
        clusters = ops.dpc_knn(tokens, 2, 2)
        more = ops.dpc_knn(tokens, 2, 6)
    assert clusters.log_density.tolist() == [[-0.5, -math.inf, -0.5, -0.5, -0.5, -0.5, -math.inf]]
    assert clusters.delta.tolist() == [[11, 0, 1, 1, 8, 1, 0]]
    assert clusters.centers.tolist() == [[0, 4]]
    assert clusters.assignment.tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    # A sixth centre is the first of them, of a cluster that stays empty.
    assert more.centers.tolist() == [[0, 4, 2, 3, 5, 1]]
    assert more.assignment.tolist() == [[0, 0, 2, 3, 1, 4, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("peak_delta", ["row_max", "global_max"])
def test_tokens_that_are_no_numbers_as_if_marked(dtype: torch.dtype, peak_delta: str) -> None:
    """The same bits as for tokens marked by ``valid``, with and without other invalid ones."""
    tokens = random_tokens(4, 30, 9, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    bad = torch.rand(4, 30, generator=generator) < 0.3
    bad[3] = torch.arange(30) > 3  # fewer left than clusters
    broken = tokens.clone()
    broken[..., 4][bad] = math.nan
    broken[..., 7][bad & (torch.arange(30) % 2 == 0)] = math.inf
    mask = torch.rand(4, 30, generator=generator) < 0.8
    for valid in (None, mask, mask & ~bad):
        marked = ~bad if valid is None else valid & ~bad
        with ops.without_value_checks():
            result = ops.dpc_knn(broken, 4, 7, peak_delta=peak_delta, valid=valid)
        expected = ops.dpc_knn(tokens, 4, 7, peak_delta=peak_delta, valid=marked)
        for name in ("log_density", "delta", "centers"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), name
        assert torch.equal(result.assignment[~bad], expected.assignment[~bad])
        assert (result.assignment[bad] == 0).all()
        # With weight 0 it does not matter to the merged tokens where they go.
        merged = [
            ops.merge_clusters(tokens, marked.to(dtype), clusters.assignment, 7)
            for clusters in (result, expected)
        ]
        assert torch.equal(*merged)


@pytest.mark.parametrize("include_self", [True, False])
def test_a_clip_of_no_numbers(include_self: bool) -> None:
    tokens = torch.full((2, 5, 3), math.nan)
    tokens[1] = random_tokens(5, 3)
    with ops.without_value_checks():
        clusters = ops.dpc_knn(tokens, 2, 3, include_self=include_self)
    assert (clusters.log_density[0] == -math.inf).all()
    assert (clusters.delta[0] == 0).all()
    assert clusters.centers[0].tolist() == [0, 1, 2]
    assert clusters.assignment[0].tolist() == [0] * 5
    alone = ops.dpc_knn(tokens[1:], 2, 3, include_self=include_self)
    for one, other in zip(clusters, alone, strict=True):
        assert torch.equal(one[1:], other)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_process_grows_by_the_distances_only() -> None:
    """Counts the whole heap, fragments included: 768 tokens once took 1.8 GB of fragments."""
    program = """
import re, torch
from cmpose import ops
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
tokens = torch.randn(1, 768, 768)
ops.dpc_knn(tokens[:, :64], 5, 32)
before = peak()
ops.dpc_knn(tokens, 5, 32)
print(peak() - before)
"""
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    # 16 bytes a distance, a row's differences and their squares, and room for the allocator.
    assert 768**2 * 4 < int(process.stdout) < 16 * 768**2 + 2 * 4 * 768**2 + 32e6
