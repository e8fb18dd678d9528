from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose import ops
from tests.ops.support import dpc_knn_oracle as oracle


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TOKENS, WEIGHTS = random(3, 13, 6), random(3, 13, seed=1).abs()
ASSIGNMENT = torch.randint(0, 4, (3, 13), generator=torch.Generator().manual_seed(2))


def test_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [5.0, 5.0]]])
    weights = torch.tensor([[1.0, 3.0, 2.0]])
    assignment = torch.tensor([[2, 2, 0]])
    mean = ops.merge_clusters(tokens, weights, assignment, 3)
    assert mean.tolist() == [[[5, 5], [0, 0], [2.5, 3]]]
    plain = ops.merge_clusters(tokens, weights, assignment, 3, normalize=False)
    assert plain.tolist() == [[[10, 10], [0, 0], [10, 12]]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("num_clusters", [4, 7])
def test_oracle(normalize: bool, num_clusters: int) -> None:
    actual = ops.merge_clusters(TOKENS, WEIGHTS, ASSIGNMENT, num_clusters, normalize=normalize)
    for b in range(3):
        expected = oracle.merge(
            TOKENS[b].tolist(),
            WEIGHTS[b].tolist(),
            ASSIGNMENT[b].tolist(),
            num_clusters,
            normalize=normalize,
        )
        torch.testing.assert_close(actual[b], torch.tensor(expected, dtype=torch.float64))


def test_one_cluster_and_every_token_its_own() -> None:
    ones = torch.ones_like(WEIGHTS)
    together = ops.merge_clusters(TOKENS, ones, torch.zeros_like(ASSIGNMENT), 1)
    torch.testing.assert_close(together, TOKENS.mean(dim=1, keepdim=True))
    apart = torch.arange(13).flip(0).expand(3, 13)
    torch.testing.assert_close(ops.merge_clusters(TOKENS, WEIGHTS, apart, 13), TOKENS.flip(1))


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_mean_does_not_depend_on_the_weights_scale(factor: float) -> None:
    a = ops.merge_clusters(TOKENS.float(), WEIGHTS.float(), ASSIGNMENT, 4)
    b = ops.merge_clusters(TOKENS.float(), WEIGHTS.float() * factor, ASSIGNMENT, 4)
    torch.testing.assert_close(a, b)


def test_clusters_that_are_empty_or_weigh_nothing() -> None:
    """Zero, with gradients that are zero and not NaN."""
    tokens, weights = TOKENS.clone().requires_grad_(), WEIGHTS.clone()
    weights[ASSIGNMENT == 1] = 0
    weights.requires_grad_()
    merged = ops.merge_clusters(tokens, weights, ASSIGNMENT, 6)
    assert (merged[:, [1, 4, 5]] == 0).all()
    merged.sum().backward()
    assert tokens.grad is not None
    assert weights.grad is not None
    assert tokens.grad.isfinite().all()
    assert weights.grad.isfinite().all()
    assert (tokens.grad[ASSIGNMENT == 1] == 0).all()
    assert (weights.grad[ASSIGNMENT == 1] == 0).all()


def test_weights_whose_sum_has_no_reciprocal_in_float32() -> None:
    """The tokens' gradient is still that of a mean, although 1 / 2e-39 is infinite in float32."""
    tokens = torch.tensor([[[1.0], [3.0]]], requires_grad=True)
    weights = torch.full((1, 2), 1e-39)
    merged = ops.merge_clusters(tokens, weights, torch.zeros(1, 2, dtype=torch.int64), 1)
    assert merged.item() == 2.0
    merged.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[[0.5], [0.5]]]


def test_gradient() -> None:
    tokens, weights = TOKENS.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
    merged = ops.merge_clusters(tokens, weights, ASSIGNMENT, 4)
    grad = random(*merged.shape, seed=3)
    d_tokens, d_weights = torch.autograd.grad(merged, (tokens, weights), grad)
    onehot = torch.nn.functional.one_hot(ASSIGNMENT, 4).double()
    total = (onehot * WEIGHTS[..., None]).sum(1).gather(1, ASSIGNMENT)
    back = (onehot @ grad) / total[..., None]
    torch.testing.assert_close(d_tokens, WEIGHTS[..., None] * back)
    own = onehot @ merged.detach()
    torch.testing.assert_close(d_weights, ((TOKENS - own) * back).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    """3,000 ones stop growing at 2,048 in float16 and at 256 in bfloat16."""
    ones = torch.ones(1, 3000, 1, dtype=dtype)
    weights, cluster = torch.ones(1, 3000), torch.zeros(1, 3000, dtype=torch.int64)
    merged = ops.merge_clusters(ones, weights, cluster, 1, normalize=False)
    assert merged.dtype == dtype
    assert merged.item() == torch.tensor(3000.0).to(dtype).item()


def test_nan_stays_in_its_cluster() -> None:
    tokens = TOKENS.clone()
    tokens[0, 5] = math.nan
    bad = ops.merge_clusters(tokens, WEIGHTS, ASSIGNMENT, 4).isnan()
    assert bad[0, ASSIGNMENT[0, 5]].all()
    assert bad.sum() == 6


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"num_clusters must be between 1 and 2147483647, got 0"):
        ops.merge_clusters(TOKENS, WEIGHTS, ASSIGNMENT, 0)
    with pytest.raises(ValueError, match=r"assignment must lie in 0..2 \(num_clusters\), got 0..3"):
        ops.merge_clusters(TOKENS, WEIGHTS, ASSIGNMENT, 3)
    with pytest.raises(ValueError, match=r"assignment must lie in 0..3 .* got -1..2"):
        ops.merge_clusters(TOKENS, WEIGHTS, ASSIGNMENT - 1, 4)
    with pytest.raises(ValueError, match=r"weights must have shape \[B, M\] with M=13"):
        ops.merge_clusters(TOKENS, WEIGHTS[:, :12], ASSIGNMENT, 4)
