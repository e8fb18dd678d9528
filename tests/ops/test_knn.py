from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops.cpu import distances as blocks

INF = math.inf


@pytest.fixture(params=["reference", "few", "many"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, and both ways of the CPU path: with all d² of a clip, and in blocks."""
    if request.param == "reference":
        return "reference"
    if request.param == "many":
        monkeypatch.setattr(blocks, "MATRIX_TOKENS", 0)
        monkeypatch.setattr(blocks, "BLOCK", 7)
    return "cpu"


def line(*values: float) -> Tensor:
    """One clip of tokens with one channel."""
    return torch.tensor(values, dtype=torch.float64)[None, :, None]


def by_sorting(tokens: Tensor, k: int, include_self: bool, valid: Tensor | None) -> Any:
    """Distances and indices by Python's sort of (d², index)."""
    rows_of_clips = []
    for clip, x in enumerate(tokens.tolist()):
        rows = []
        for i, one in enumerate(x):
            near = sorted(
                (sum((a - b) ** 2 for a, b in zip(one, other, strict=True)), j)
                for j, other in enumerate(x)
                if (valid is None or valid[clip, j]) and (include_self or i != j)
            )[:k]
            rows.append([(math.sqrt(d), j) for d, j in near] + [(INF, i)] * (k - len(near)))
        rows_of_clips.append(rows)
    whole = torch.tensor(rows_of_clips, dtype=torch.float64)
    return whole[..., 0], whole[..., 1].long()


def test_by_hand(backend: str) -> None:
    neighbors = ops.knn(line(0, 1, 3, 3, 9), 3, radius=2, backend=backend)
    assert neighbors.distances.tolist() == [[[0, 1, 3], [0, 1, 2], [0, 0, 2], [0, 0, 2], [0, 6, 6]]]
    assert neighbors.indices.tolist() == [[[0, 1, 2], [1, 0, 2], [2, 3, 1], [2, 3, 1], [4, 2, 3]]]
    assert neighbors.counts is not None
    assert neighbors.counts.tolist() == [[2, 4, 3, 3, 1]]
    others = ops.knn(line(0, 1, 3, 3, 9), 1, include_self=False, radius=2, backend=backend)
    assert others.indices.tolist() == [[[1], [0], [3], [2], [2]]]
    assert others.counts is not None
    assert others.counts.tolist() == [[1, 3, 2, 2, 0]]


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 5), (23, 4), (67, 64)])
def test_ties_go_by_index(
    backend: str, size: int, k: int, masked: bool, include_self: bool
) -> None:
    """Whole numbers in three channels: most distances tie, among duplicates and others."""
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(-2, 3, (2, size, 3), generator=generator).double()
    valid = torch.rand(2, size, generator=generator) < 0.7 if masked else None
    k = min(k, size - (not include_self))
    if k == 0:
        with pytest.raises(ValueError, match=r"^k must be between 1 and 0 .*itself"):
            ops.knn(tokens, 1, include_self=False, backend=backend)
        return
    neighbors = ops.knn(
        tokens, k, include_self=include_self, valid=valid, radius=2.0, backend=backend
    )
    distances, indices = by_sorting(tokens, k, include_self, valid)
    assert torch.equal(neighbors.indices, indices)
    torch.testing.assert_close(neighbors.distances, distances)
    every, _ = by_sorting(tokens, size, include_self, valid)
    assert neighbors.counts is not None
    assert torch.equal(neighbors.counts, (every <= 2.0).sum(2))


def test_cosine(backend: str) -> None:
    """Against 1 − cos; the lengths do not matter, zeros have no direction."""
    tokens = torch.randn(2, 30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens *= 10.0 ** torch.arange(-20, 10, dtype=torch.float64)[:, None]
    cosine = torch.nn.functional.cosine_similarity(
        tokens[:, :, None], tokens[:, None], dim=-1, eps=0
    )
    expected = (1 - cosine).sort(dim=-1)
    neighbors = ops.knn(tokens, 6, metric="cosine", radius=0.5, backend=backend)
    assert torch.equal(neighbors.indices, expected.indices[..., :6])
    torch.testing.assert_close(
        neighbors.distances, expected.values[..., :6], atol=1e-15, rtol=1e-12
    )
    assert neighbors.counts is not None
    assert torch.equal(neighbors.counts, (expected.values <= 0.5).sum(-1))
    tokens[:, 3] = 0
    neighbors = ops.knn(tokens, 2, metric="cosine", include_self=False, backend=backend)
    torch.testing.assert_close(neighbors.distances[:, 3], torch.full((2, 2), 0.5).double())


def test_tokens_that_are_no_numbers(backend: str) -> None:
    tokens = line(0, math.nan, 2, INF, 5)
    with pytest.raises(ValueError, match=r"^tokens must be finite, got 2 NaN or inf"):
        ops.knn(tokens, 2, backend=backend)
    for metric in ("euclidean", "cosine"):
        with ops.without_value_checks():
            neighbors = ops.knn(tokens, 4, radius=INF, metric=metric, backend=backend)
        own = torch.arange(5)[:, None].expand(-1, 4)
        assert torch.equal(neighbors.indices[0, [1, 3]], own[[1, 3]])
        assert (neighbors.distances[0, [1, 3]] == INF).all()
        assert neighbors.distances[0, [0, 2, 4], 2].isfinite().all()
        assert torch.equal(neighbors.indices[0, :, 3], own[:, 0])  # three tokens are left
        assert (neighbors.distances[..., 3] == INF).all()
        assert neighbors.counts is not None
        assert neighbors.counts.tolist() == [[3, 0, 3, 0, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_near_ties_within_rounding(backend: str, dtype: torch.dtype) -> None:
    """Each distance is the exact one of its index, and no token outside is nearer."""
    generator = torch.Generator().manual_seed(4)
    tokens = (torch.randn(2, 90, 96, generator=generator) + 3).to(dtype)
    neighbors = ops.knn(tokens, 7, backend=backend)
    exact = torch.cdist(
        tokens.double(), tokens.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    slack = 4e-6 * exact.amax()
    mine = exact.gather(2, neighbors.indices)
    assert (neighbors.distances - mine).abs().max() <= slack
    rest = exact.scatter(2, neighbors.indices, INF).amin(2)
    assert (mine.amax(2) <= rest + slack).all()
    assert neighbors.indices.sort(2).values.diff(dim=2).min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"^k must be between 1 and 6 \(M tokens\), got 0"),
        ({"k": 7}, r"^k must be between 1 and 6 \(M tokens\), got 7"),
        ({"metric": "dot"}, r"^metric must be one of euclidean, cosine, got 'dot'"),
        ({"radius": -1.0}, r"^radius must be between 0.0 and inf, got -1.0"),
        ({"radius": math.nan}, r"^radius must be between 0.0 and inf, got nan"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.knn(torch.randn(1, 6, 3), **{"k": 2, **options})


def test_no_gradient_and_no_counts() -> None:
    neighbors = ops.knn(torch.randn(1, 6, 3, requires_grad=True), 2)
    assert not neighbors.distances.requires_grad
    assert neighbors.counts is None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_are_not_there_yet(name: str) -> None:
    with pytest.raises(ops.BackendUnavailable, match=f"it has no {name} kernel in this version"):
        ops.knn(torch.randn(1, 6, 3), 2, backend=name)
    if name == "cuda" and ops.available("dpc_knn")["cuda"] is None:
        with pytest.raises(ops.BackendUnavailable, match="the kernels do not return neighbours"):
            ops.dpc_knn(torch.randn(1, 6, 3), 2, 2, return_neighbors=True, backend=name)
