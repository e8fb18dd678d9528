from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose import ops
from tests.ops.support.cases import Split


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


SPLIT = Split(torch.tensor([[1, 4]]), torch.tensor([[0, 2, 3]]))
ASSIGNMENT = torch.tensor([[1, 0, 1]])
CAUSAL = torch.tensor([[[10.0], [20.0]]], dtype=torch.float64)
MERGED = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)


def test_by_hand() -> None:
    tokens = ops.unmerge_tokens(CAUSAL, MERGED, SPLIT, ASSIGNMENT)
    assert tokens.tolist() == [[[2], [10], [1], [2], [20]]]


def test_gradient_sums_over_a_clusters_cells() -> None:
    causal, merged = CAUSAL.clone().requires_grad_(), MERGED.clone().requires_grad_()
    out = ops.unmerge_tokens(causal, merged, SPLIT, ASSIGNMENT)
    out.backward(torch.tensor([[[1.0], [2.0], [4.0], [8.0], [16.0]]], dtype=torch.float64))
    assert causal.grad is not None
    assert merged.grad is not None
    assert causal.grad.tolist() == [[[2], [16]]]
    assert merged.grad.tolist() == [[[4], [9], [0]]]


def test_undoes_select_and_merge_when_every_token_is_a_cluster() -> None:
    tokens = random(3, 20, 8)
    selection = ops.select_tokens(random(3, 4, 20, seed=1), 2)
    clip = torch.arange(3)[:, None]
    causal, rest = tokens[clip, selection.causal], tokens[clip, selection.noncausal]
    clusters = ops.dpc_knn(rest, 5, 12)
    merged = ops.merge_clusters(rest, random(3, 12, seed=2).abs(), clusters.assignment, 12)
    actual = ops.unmerge_tokens(causal, merged, selection, clusters.assignment)
    torch.testing.assert_close(actual, tokens)


def test_nothing_causal_and_nothing_else() -> None:
    none = torch.zeros(1, 0, dtype=torch.int64)
    cells = torch.arange(3)[None]
    merged_only = ops.unmerge_tokens(CAUSAL[:, :0], MERGED, Split(none, cells), ASSIGNMENT)
    assert merged_only.tolist() == [[[2], [1], [2]]]
    causal_only = ops.unmerge_tokens(CAUSAL, MERGED, Split(cells[:, :2], none), none)
    assert torch.equal(causal_only, CAUSAL)


def test_nan_stays_in_its_cells() -> None:
    merged = MERGED.clone()
    merged[0, 1] = math.nan
    bad = ops.unmerge_tokens(CAUSAL, merged, SPLIT, ASSIGNMENT).isnan().flatten()
    assert bad.tolist() == [True, False, False, True, False]


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"merged must have causal's dtype float64, got float32"):
        ops.unmerge_tokens(CAUSAL, MERGED.float(), SPLIT, ASSIGNMENT)
    with pytest.raises(
        ValueError, match=r"assignment must lie in 0..1 \(merged tokens\), got 0..2"
    ):
        ops.unmerge_tokens(CAUSAL, MERGED[:, :2], SPLIT, ASSIGNMENT * 2)
    twice = Split(torch.tensor([[1, 4]]), torch.tensor([[0, 1, 3]]))
    with pytest.raises(ValueError, match=r"selection must hold each of 0..4 once in every clip"):
        ops.unmerge_tokens(CAUSAL, MERGED, twice, ASSIGNMENT)
    with pytest.raises(ValueError, match=r"assignment must have shape \[B, M\] with M=3"):
        ops.unmerge_tokens(CAUSAL, MERGED, SPLIT, ASSIGNMENT[:, :2])
