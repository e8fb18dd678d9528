"""The nearest of a row of d², which are found one after another, against a stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops.cpu import distances
from cmpose.ops.distances import INF


def rows(kind: str, dtype: torch.dtype, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    square = torch.rand(2, size, size, generator=generator, dtype=dtype)
    if kind == "few values":
        square = (square * 4).round()
    if kind == "one tie":
        square[1, 0, :2] = 0.0
    if kind == "far and near":
        square = (square * 200 - 100).exp2()  # a float's bits from one end to the other
    if kind == "few are finite":
        square = square.masked_fill(square > 0.2, INF)
    if kind == "one row is infinite":
        square[0, size // 2] = INF
    return square


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        *("any", "few values", "one tie", "far and near"),
        *("few are finite", "one row is infinite"),
    ],
)
def test_against_a_stable_sort(kind: str, dtype: torch.dtype) -> None:
    for size in (1, 2, 9, 40, 131):
        square = rows(kind, dtype, size)
        values, order = square.sort(dim=2, stable=True)
        own = torch.arange(size)[:, None]
        for k in [k for k in (1, 2, 5, 8, 9, size) if k <= size]:
            expected = torch.where(values == INF, own, order)[..., :k]
            squares, indices = distances.nearest_of_few(square, k)
            assert torch.equal(squares, values[..., :k])
            assert torch.equal(indices, expected)
            assert torch.equal(distances.smallest_values(square, k), values[..., :k])


def test_what_is_found_one_after_another_is_found_so() -> None:
    """The path that the test above is for is taken where it can be, and only there."""
    assert distances._distinct(rows("far and near", torch.float32, 131), 5) is not None
    assert distances._distinct(rows("one tie", torch.float32, 131), 5) is None
    assert distances._distinct(rows("few are finite", torch.float32, 9), 8) is None
    assert distances._distinct(rows("any", torch.float64, 131), 5) is None


@pytest.mark.parametrize("tokens", [torch.empty(0, 7, 3), torch.empty(0, 2100, 3)])
def test_no_clips(tokens: Tensor) -> None:
    assert ops.knn(tokens, 5).indices.shape == (0, tokens.shape[1], 5)
    assert ops.dpc_knn(tokens, 5, 6).centers.shape == (0, 6)
