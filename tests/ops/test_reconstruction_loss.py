from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose import ops


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


PRED, TARGET = random(2, 3, 5, 4), random(2, 3, 5, 4, seed=1)
CORRUPTED = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.5


def test_by_hand() -> None:
    pred = torch.tensor([[[[1.0, 2.0], [9.0, 9.0], [0.0, 0.0]]]])
    target = torch.tensor([[[[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]]])
    corrupted = torch.tensor([[[True, False, True]]])
    assert ops.reconstruction_loss(pred, target, corrupted, per_channel=False) == (5 + 25) / 2
    assert ops.reconstruction_loss(pred, target, corrupted) == (5 + 25) / 4


def test_is_the_mean_over_corrupted_tokens() -> None:
    norms = (PRED - TARGET)[CORRUPTED].square().sum(-1)
    actual = ops.reconstruction_loss(PRED, TARGET, CORRUPTED, per_channel=False)
    torch.testing.assert_close(actual, norms.mean())
    torch.testing.assert_close(ops.reconstruction_loss(PRED, TARGET, CORRUPTED) * 4, actual)


def test_gradient() -> None:
    pred, target = PRED.clone().requires_grad_(), TARGET.clone().requires_grad_()
    ops.reconstruction_loss(pred, target, CORRUPTED, detach_target=False).backward()
    expected = torch.where(CORRUPTED[..., None], (PRED - TARGET) / (2 * CORRUPTED.sum()), 0.0)
    torch.testing.assert_close(pred.grad, expected)
    torch.testing.assert_close(target.grad, -expected)


def test_the_target_is_detached_by_default() -> None:
    pred, target = PRED.clone().requires_grad_(), TARGET.clone().requires_grad_()
    ops.reconstruction_loss(pred, target, CORRUPTED).backward()
    assert pred.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("normalizer", [None, torch.tensor(0.0), torch.tensor([0])])
def test_nothing_corrupted(normalizer: Tensor | None) -> None:
    pred = PRED.clone().requires_grad_()
    nothing = torch.zeros(2, 3, 5, dtype=torch.bool)
    loss = ops.reconstruction_loss(pred, TARGET, nothing, normalizer=normalizer)
    loss.backward()
    assert loss == 0
    assert pred.grad is not None
    assert (pred.grad == 0).all()


def test_everything_corrupted_is_mse() -> None:
    everything = torch.ones(2, 3, 5, dtype=torch.bool)
    actual = ops.reconstruction_loss(PRED, TARGET, everything)
    torch.testing.assert_close(actual, torch.nn.functional.mse_loss(PRED, TARGET))


def test_normalizer_makes_processes_add_up() -> None:
    """Two processes with unequal counts: the mean of their losses is the loss of both."""
    whole = ops.reconstruction_loss(PRED, TARGET, CORRUPTED)
    normalizer = CORRUPTED.sum() / 2
    parts = [
        ops.reconstruction_loss(
            PRED[i : i + 1], TARGET[i : i + 1], CORRUPTED[i : i + 1], normalizer=normalizer
        )
        for i in range(2)
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_tokens_outside_are_not_looked_at() -> None:
    pred = PRED.clone()
    pred[~CORRUPTED] = math.nan
    pred.requires_grad_()
    loss = ops.reconstruction_loss(pred, TARGET, CORRUPTED)
    loss.backward()
    assert pred.grad is not None
    assert pred.grad.isfinite().all()
    torch.testing.assert_close(loss, ops.reconstruction_loss(PRED, TARGET, CORRUPTED))


def test_nan_inside_is_seen() -> None:
    pred = PRED.clone()
    pred[CORRUPTED] = math.nan
    assert ops.reconstruction_loss(pred, TARGET, CORRUPTED).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    """70,000 squares of 4 overflow float16 and are lost in bfloat16's 8 bits."""
    pred = torch.full((1, 7, 100, 100), 2.0, dtype=dtype)
    target, corrupted = torch.zeros_like(pred), torch.ones(1, 7, 100, dtype=torch.bool)
    loss = ops.reconstruction_loss(pred, target, corrupted, per_channel=False)
    assert loss.dtype == torch.float32
    assert loss == 400


def test_pred_and_target_of_different_dtypes() -> None:
    loss = ops.reconstruction_loss(PRED.bfloat16(), TARGET.float(), CORRUPTED)
    assert loss.dtype == torch.float32
    exact = ops.reconstruction_loss(PRED.bfloat16().double(), TARGET.float().double(), CORRUPTED)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_normalizer_errors() -> None:
    with pytest.raises(TypeError, match=r"normalizer must be a tensor .* got float"):
        ops.reconstruction_loss(PRED, TARGET, CORRUPTED, normalizer=3.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"normalizer must hold one element, got shape \[2\]"):
        ops.reconstruction_loss(PRED, TARGET, CORRUPTED, normalizer=torch.ones(2))
    with pytest.raises(ValueError, match=r"normalizer must be on pred's device cpu, got meta"):
        ops.reconstruction_loss(PRED, TARGET, CORRUPTED, normalizer=torch.ones(1, device="meta"))
