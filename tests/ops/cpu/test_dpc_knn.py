"""dpc_knn by matrix products: the reference's bits on lattices, and what the error bound of the
CUDA kernels admits on other tokens (tests/ops/support/dpc_knn_checks.py).

Clips of more than MATRIX_TOKENS tokens go another way; here that way also takes short ones.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness.timing import peak_bytes
from cmpose import ops
from cmpose.ops.cpu import distances as blocks
from cmpose.ops.distances import squared_distances
from tests.ops.support.dpc_knn_checks import (
    assert_equals_reference,
    assert_within_rounding,
    lattice,
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=["few", "many"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``few`` keeps all d² of a clip; ``many`` keeps none, and works in blocks of 40 tokens."""
    if request.param == "many":
        monkeypatch.setattr(blocks, "MATRIX_TOKENS", 0)
        monkeypatch.setattr(blocks, "BLOCK", 40)
    monkeypatch.setattr(blocks, "_PANEL", 50)  # so that short clips have several
    return request.param


def random_tokens(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def clustered_tokens(batch: int, size: int, width: int, dtype: torch.dtype) -> Tensor:
    """Tokens around M / 7 centres, as tokens of the same body part are close to each other."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(batch, size // 7 + 1, width, generator=generator)
    index = torch.randint(0, size // 7 + 1, (batch, size), generator=generator)
    around = centres[torch.arange(batch)[:, None], index]
    return (around + 0.3 * torch.randn(batch, size, width, generator=generator)).to(dtype)


def clusters_of(tokens: Tensor, k: int, num_clusters: int, **options: Any) -> Any:
    with ops.without_value_checks():
        return ops.dpc_knn(tokens, k, num_clusters, backend="cpu", **options)


SIZES = [
    # M, D, k, L
    (1, 8, 1, 1),
    (2, 8, 2, 1),
    (3, 1, 2, 3),
    (13, 17, 5, 4),
    (65, 129, 3, 65),
    (101, 8, 5, 11),
    (132, 768, 5, 32),
    (193, 72, 16, 49),
    (257, 40, 1, 64),
]


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("size", "width", "k", "num_clusters"), SIZES)
def test_every_size(
    way: str, size: int, width: int, k: int, num_clusters: int, dtype: torch.dtype
) -> None:
    tokens = lattice(2, size, width, dtype=dtype, offset=5)
    result = clusters_of(tokens, k, num_clusters)
    assert_equals_reference(result, tokens, k, num_clusters)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [clustered_tokens, random_tokens])
def test_tokens_off_the_lattice(way: str, make: Any, dtype: torch.dtype) -> None:
    for size, width, k, num_clusters in ((65, 129, 3, 65), (132, 768, 5, 32), (211, 24, 16, 64)):
        tokens = make(1, size, width, dtype=dtype)
        assert_within_rounding(clusters_of(tokens, k, num_clusters), tokens, k, num_clusters)


@pytest.mark.parametrize(
    "options",
    [
        {"scale": False},
        {"include_self": False},
        {"peak_delta": "global_max"},
        {"scale": False, "include_self": False, "peak_delta": "global_max"},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_options(way: str, options: dict[str, Any], masked: bool) -> None:
    tokens = lattice(2, 97, 40)
    if masked:
        valid = torch.rand(2, 97, generator=torch.Generator().manual_seed(1)) < 0.6
        options = options | {"valid": valid}
    assert_equals_reference(clusters_of(tokens, 5, 17, **options), tokens, 5, 17, **options)


@pytest.mark.parametrize("few_left", [False, True])
def test_tokens_that_are_no_numbers(way: str, few_left: bool) -> None:
    tokens, options = lattice(3, 97, 40), {}
    tokens[:, 5:60:7, 3] = math.nan
    tokens[1, 9, 0] = math.inf
    if few_left:
        tokens[2, 4:, 1] = -math.inf
        tokens[0] = math.nan
    options = {"valid": torch.arange(97).expand(3, -1) % 11 != 3}
    assert_equals_reference(clusters_of(tokens, 5, 17, **options), tokens, 5, 17, **options)


def test_tokens_too_far_apart_for_float32_are_the_references(way: str) -> None:
    tokens = random_tokens(2, 50, 8) * 1e19
    with ops.without_value_checks():
        expected = ops.dpc_knn(tokens, 3, 5, backend="reference")
    for a, b in zip(clusters_of(tokens, 3, 5), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("width", [1, 3, 64, 767])
@pytest.mark.parametrize("dtype", [FP32, torch.float64])
def test_distances_lose_no_digits(
    monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype
) -> None:
    """Of equal and nearly equal tokens, far from 0, in two clumps far from each other."""
    monkeypatch.setattr(blocks, "_PANEL", 20)
    tokens = random_tokens(2, 53, width, dtype=dtype)
    tokens[:, ::2] += 1e3
    tokens += 1e4
    tokens[:, 20] = tokens[:, 40] = tokens[:, 4]
    distances = blocks.Distances(blocks.centred(tokens, None))
    square = distances.matrix()
    assert (square.diagonal(dim1=1, dim2=2) == 0).all()
    assert (square[:, 20, 4] == 0).all()
    assert (square[:, 40, 20] == 0).all()
    assert torch.equal(square, square.mT)
    exact = squared_distances(tokens.double())
    norm = (tokens.double() - tokens.double().mean(1, keepdim=True)).norm(dim=2)
    far = torch.finfo(dtype).eps * (width / 2 + 8) * (norm[:, :, None] + norm[:, None]).square()
    assert ((square - exact).abs() <= far).all()
    # What is below that error is computed again; the shift has rounded tokens of about 10⁴.
    again = exact < distances.loss * (distances.norms[:, :, None] + distances.norms[:, None])
    assert again[:, 4].sum() >= (50 if dtype == FP32 and width == 767 else 6)
    near = torch.finfo(dtype).eps * (32 * exact + 2e4 * math.sqrt(width) * exact.sqrt())
    assert ((square - exact).abs() <= near)[again].all()


def test_all_alike(way: str) -> None:
    tokens = random_tokens(1, 1, 50).expand(2, 97, 50) * 1000
    result = clusters_of(tokens, 3, 4)
    assert (result.log_density == 0).all()
    assert (result.delta == 0).all()
    assert result.centers.tolist() == [[0, 1, 2, 3]] * 2
    assert result.assignment[0].tolist() == [0, 1, 2, 3, *[0] * 93]


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_products_are_float32s(way: str, setting: str) -> None:
    tokens = clustered_tokens(1, 90, 256, FP32)
    expected = clusters_of(tokens, 5, 9)
    torch.set_float32_matmul_precision(setting)
    try:
        result = clusters_of(tokens, 5, 9)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(result, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_neighbors(way: str, backend: str, metric: str) -> None:
    """They are knn's, over √D where distances are scaled, and the clusters stay what they are."""
    tokens = lattice(2, 97, 12, seed=3)
    clusters, near = ops.dpc_knn(
        tokens, 6, 9, metric=metric, return_neighbors=True, include_self=False, backend=backend
    )
    alone = ops.dpc_knn(tokens, 6, 9, metric=metric, include_self=False, backend=backend)
    expected = ops.knn(tokens, 6, metric=metric, include_self=False, backend=backend)
    for a, b in zip(clusters, alone, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(near.indices, expected.indices)
    scale = 1.0 if metric == "cosine" else math.sqrt(12)
    torch.testing.assert_close(near.distances, expected.distances / scale)
    assert near.counts is None


def test_cosine_is_the_distance_of_directions() -> None:
    tokens = random_tokens(2, 40, 6, dtype=torch.float64)
    lengths = torch.rand(2, 40, 1, generator=torch.Generator().manual_seed(2)) * 1e3 + 1e-3
    units = tokens / tokens.norm(dim=2, keepdim=True)
    expected = ops.dpc_knn(units, 4, 7, scale=False)
    for a, b in zip(ops.dpc_knn(tokens * lengths, 4, 7, metric="cosine"), expected, strict=True):
        torch.testing.assert_close(a, b)
    clusters, merged = ops.dpc_knn_merge(tokens, lengths[..., 0], 4, 7, metric="cosine")
    assert torch.equal(clusters.centers, expected.centers)
    again = ops.merge_clusters(tokens, lengths[..., 0], clusters.assignment, 7)
    assert torch.equal(merged, again)


def test_memory_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few blocks, whatever the number of tokens; not all their distances."""
    monkeypatch.setattr(blocks, "MATRIX_TOKENS", 512)
    monkeypatch.setattr(blocks, "BLOCK", 128)
    tokens = random_tokens(1, 1024, 16)
    assert peak_bytes(lambda: clusters_of(tokens[:, :512], 5, 32), "cpu") > 512**2 * 4
    assert peak_bytes(lambda: clusters_of(tokens, 5, 32), "cpu") < 1024**2 * 4 / 2


def test_equal_tokens_are_at_no_distance_without_being_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One by one, the pairs of very many would take long."""
    tokens = torch.randn(2, 40, 9, generator=torch.Generator().manual_seed(0)) * 100
    tokens[:, ::2] = tokens[:, :1]
    tokens[0, 3], tokens[0, 5] = 0.0, -0.0
    distances = blocks.Distances(tokens)
    equal = (tokens[:, :, None] == tokens[:, None]).all(dim=-1)
    assert torch.equal(distances.numbers()[:, :, None] == distances.numbers()[:, None], equal)
    computed: list[int] = []
    split = Tensor.split

    def counted(values: Tensor, size: int) -> Any:
        computed.append(len(values))
        return split(values, size)

    monkeypatch.setattr(Tensor, "split", counted)
    square = distances.block(slice(None), slice(None), torch.arange(40))
    assert (square[equal] == 0).all()
    assert (square[~equal] > 0).all()
    assert computed[1:] == [0, 0, 0]  # after the suspects: no pair of them is computed
