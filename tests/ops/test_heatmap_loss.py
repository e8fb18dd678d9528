from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose import ops


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def gaussian(height: int, width: int, x: float, y: float, sigma: float) -> Tensor:
    """The target, pixel by pixel."""
    target = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            if abs(column - x) <= 3 * sigma and abs(row - y) <= 3 * sigma:
                square = (column - x) ** 2 + (row - y) ** 2
                target[row, column] = math.exp(-square / (2 * sigma**2))
    return target


CENTRES = torch.tensor(
    [[[3.0, 4.0], [6.5, 0.25], [-2.0, 5.0]], [[11.0, 15.0], [40.0, 3.0], [5.0, -90.0]]],
    dtype=torch.float64,
)
VISIBLE = torch.tensor([[1.0, 0.5, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
PRED = random(2, 3, 16, 12)


@pytest.mark.parametrize("sigma", [1.0, 2.0, 3.0])
def test_pixel_by_pixel(sigma: float) -> None:
    total = 0.0
    for b in range(2):
        for k in range(3):
            x, y = CENTRES[b, k].tolist()
            target = gaussian(16, 12, x, y, sigma)
            total += float(VISIBLE[b, k] * (PRED[b, k] - target).square().sum())
    actual = ops.heatmap_loss(PRED, CENTRES, VISIBLE, sigma)
    assert actual.item() == pytest.approx(total / float(VISIBLE.sum()), rel=1e-12)


def test_gradient() -> None:
    pred = PRED.clone().requires_grad_()
    ops.heatmap_loss(pred, CENTRES, VISIBLE).backward()
    target = torch.stack(
        [torch.stack([gaussian(16, 12, x, y, 2.0) for x, y in clip]) for clip in CENTRES.tolist()]
    )
    expected = 2 * VISIBLE[..., None, None] * (PRED - target) / VISIBLE.sum()
    torch.testing.assert_close(pred.grad, expected)


def test_the_right_heatmap_costs_nothing_and_an_empty_one_about_pi_sigma_squared() -> None:
    centres = torch.tensor([[[24.0, 32.0]]], dtype=torch.float64)
    visible = torch.ones(1, 1)
    perfect = gaussian(64, 48, 24, 32, 2.0)[None, None]
    assert ops.heatmap_loss(perfect, centres, visible) < 1e-30
    empty = ops.heatmap_loss(torch.zeros_like(perfect), centres, visible)
    assert empty.item() == pytest.approx(math.pi * 4, rel=1e-3)


def test_a_far_centre_trains_towards_background() -> None:
    far = torch.tensor([[[-1000.0, -1000.0]]])
    pred = random(1, 1, 8, 6).float()
    assert ops.heatmap_loss(pred, far, torch.ones(1, 1)) == pred.square().sum()


def test_the_patch_ends_at_three_sigma() -> None:
    pred, visible = torch.zeros(1, 1, 1, 30), torch.ones(1, 1)
    loss = ops.heatmap_loss(pred, torch.tensor([[[14.0, 0.0]]]), visible, 2.0)
    inside = sum(math.exp(-(d**2) / 4) for d in range(-6, 7))
    assert loss.item() == pytest.approx(inside, rel=1e-6)


@pytest.mark.parametrize("normalizer", [None, torch.tensor(0.0)])
def test_all_joints_invisible(normalizer: Tensor | None) -> None:
    pred = PRED.clone().requires_grad_()
    loss = ops.heatmap_loss(pred, CENTRES, torch.zeros(2, 3), normalizer=normalizer)
    loss.backward()
    assert loss == 0
    assert pred.grad is not None
    assert (pred.grad == 0).all()


def test_invisible_joints_are_not_looked_at() -> None:
    pred, centres = PRED.clone(), CENTRES.clone()
    pred[1, 2], centres[1, 2] = math.nan, math.nan
    pred.requires_grad_()
    loss = ops.heatmap_loss(pred, centres, VISIBLE)
    loss.backward()
    torch.testing.assert_close(loss, ops.heatmap_loss(PRED, CENTRES, VISIBLE))
    assert pred.grad is not None
    assert (pred.grad[1, 2] == 0).all()
    assert pred.grad.isfinite().all()


def test_bool_and_float_weights_agree() -> None:
    visible = VISIBLE > 0.7
    a = ops.heatmap_loss(PRED, CENTRES, visible)
    assert torch.equal(a, ops.heatmap_loss(PRED, CENTRES, visible.double()))


def test_normalizer_makes_processes_add_up() -> None:
    whole = ops.heatmap_loss(PRED, CENTRES, VISIBLE)
    half = VISIBLE.sum() / 2
    parts = [
        ops.heatmap_loss(PRED[i : i + 1], CENTRES[i : i + 1], VISIBLE[i : i + 1], normalizer=half)
        for i in range(2)
    ]
    torch.testing.assert_close((parts[0] + parts[1]) / 2, whole)


def test_only_pred_takes_a_gradient() -> None:
    centres, visible = CENTRES.clone().requires_grad_(), VISIBLE.clone().requires_grad_()
    assert not ops.heatmap_loss(PRED, centres, visible).requires_grad


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1e-200, 1e300, 2**70, math.nan, math.inf])
def test_sigma(sigma: float) -> None:
    """Its square is a number of float32."""
    with pytest.raises(
        ValueError, match=r"^sigma must be between 1e-15 and 1000000000000000.0, got"
    ):
        ops.heatmap_loss(PRED, CENTRES, VISIBLE, sigma)


def test_bad_values() -> None:
    for bad in (-1.0, math.nan):
        visible = VISIBLE.clone()
        visible[0, 0] = bad
        with pytest.raises(ValueError, match=r"visible must be ≥ 0 everywhere"):
            ops.heatmap_loss(PRED, CENTRES, visible)
    centres = CENTRES.clone()
    centres[0, 0, 1] = math.nan
    with pytest.raises(ValueError, match=r"keypoints must not be NaN where visible > 0"):
        ops.heatmap_loss(PRED, centres, VISIBLE)
    with pytest.raises(TypeError, match=r"normalizer must be a tensor"):
        ops.heatmap_loss(PRED, CENTRES, VISIBLE, normalizer=2)  # type: ignore[arg-type]
