"""merge_clusters on a CPU: what its sums need not be computed for."""

from __future__ import annotations

import math

import pytest
import torch

from cmpose import ops


@pytest.mark.parametrize("normalize", [True, False])
def test_clusters_without_weight(normalize: bool) -> None:
    """Cluster 0 has weights of 0 and a NaN, 1 weights that cancel, 3 no token."""
    tokens = torch.tensor([[[math.nan, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 8.0]]])
    weights = torch.tensor([[0.0, 0.5, -0.5, 2.0]])
    assignment = torch.tensor([[9, 9, 0, 9, 1, 9, 1, 9, 2]])[:, 2::2]  # of other strides
    actual, expected = (
        ops.merge_clusters(tokens, weights, assignment, 4, normalize=normalize, backend=backend)
        for backend in ("cpu", "reference")
    )
    assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert actual[0, 3].tolist() == [0.0, 0.0]
    assert normalize == (actual[0, 0].tolist() == [0.0, 0.0])
