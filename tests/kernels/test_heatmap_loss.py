from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose.kernels import configs, heatmap_loss, launch
from cmpose.ops.heatmap_loss import heatmap_loss_reference, heatmap_loss_with_gradient_reference
from tests.kernels.losses import (
    DTYPES,
    NORMALIZERS,
    assert_same,
    assert_scales_in_place,
    layouts,
    only_the_first_program,
    random,
    spread,
)
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_repeats,
    assert_same_bits,
    assert_writes_everything,
)

Inputs = tuple[Tensor, Tensor, Tensor]

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 9, 7),
    (2, 1, 32, 24),
    (1, 3, 64, 48),
    (1, 2, 96, 72),
    (1, 2, 33, 130),
    (1, 2, 70, 5),
]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> Inputs:
    """pred, centres (some outside the heatmap) and weights, every third of them 0."""
    batch, joints, height, width = shape
    size = torch.tensor([width, height])
    keypoints = (0.5 + 0.4 * random(batch, joints, 2, seed=1)) * size
    visible = 0.1 + random(batch, joints, seed=2).abs()
    visible.view(-1)[1::3] = 0
    pred = random(*shape, dtype=dtype)
    return pred.to(device), keypoints.to(device), visible.to(device)


def check(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float = 2.0,
    normalizer: Tensor | None = None,
) -> None:
    arguments = (pred, keypoints, visible, sigma, normalizer)
    loss, gradient = heatmap_loss.forward(*arguments, True)
    assert gradient.is_contiguous()
    eager_loss, eager_gradient = heatmap_loss_with_gradient_reference(*arguments, True)
    wide = pred.double().detach().requires_grad_()
    exact = heatmap_loss_reference(wide, *arguments[1:])
    (exact_gradient,) = torch.autograd.grad(exact, wide)
    assert_as_close_as_eager(loss, eager_loss, exact.detach(), reduction=pred.numel())
    assert_as_close_as_eager(gradient, eager_gradient, exact_gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    pred, keypoints, visible = inputs(shape, device, dtype)
    check(pred, keypoints, visible)
    check(pred, keypoints, visible > 0, sigma=1.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_centres_and_weights(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and launch.INTERPRETED:
        pytest.skip("Triton's interpreter cannot compute in bfloat16")
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    check(pred, keypoints.to(dtype), visible.to(dtype))


@pytest.mark.parametrize("sigma", [0.1, 1 / 3, 0.7, 2.0, 2.3])
def test_the_patch_ends_where_the_references_does(sigma: float, device: str) -> None:
    """Centres at 3σ from a pixel, in float32, and one float32 nearer and farther."""
    edge = torch.tensor(3 * sigma, dtype=torch.float32)
    there = torch.stack([edge, edge.nextafter(edge + 1), edge.nextafter(edge - 1)])
    x = torch.cat([there, 12 - there])
    keypoints = torch.stack([x, 0.3 * x], dim=-1)[None].to(device)
    keypoints = torch.cat([keypoints, keypoints.flip(-1)])
    visible = torch.ones(2, 6, device=device)
    pred = torch.zeros(2, 6, 13, 13, device=device)
    arguments = (pred, keypoints, visible, sigma, None, True)
    _, gradient = heatmap_loss.forward(*arguments)
    _, expected = heatmap_loss_with_gradient_reference(*arguments)
    assert torch.equal(gradient != 0, expected != 0)
    assert len((gradient != 0).sum(dim=(-1, -2)).unique()) > 1


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers(name: str, device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    normalizer = NORMALIZERS[name].to(device)
    check(pred, keypoints, visible, normalizer=normalizer)
    loss, gradient = heatmap_loss.forward(pred, keypoints, visible, 2.0, normalizer, True)
    assert (gradient[visible == 0] == 0).all()
    if normalizer == 0:
        assert loss == 0
        assert (gradient == 0).all()


def test_nothing_visible(device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    for weights in (torch.zeros_like(visible), torch.zeros_like(visible, dtype=torch.bool)):
        loss, gradient = heatmap_loss.forward(pred, keypoints, weights, 2.0, None, True)
        assert loss == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("weight", [0.0, -0.25])
def test_joints_without_weight_are_not_looked_at(weight: float, value: float, device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 32, 24), device)
    out = visible == 0
    visible[out] = weight
    check(pred, keypoints, visible)
    expected = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    pred[out], keypoints[out] = value, value
    actual = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    assert_same_bits(actual, expected)
    assert (actual[1][out] == 0).all()


def test_a_weight_that_is_nan(device: str) -> None:
    """It spoils the sum of the weights, but not a loss that is given another divisor."""
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    visible[0, 1] = math.nan
    check(pred, keypoints, visible)
    check(pred, keypoints, visible, normalizer=torch.tensor(2.0, device=device))
    loss, gradient = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    assert loss.isnan()
    assert (gradient[0, 1] == 0).all()


def test_a_centre_that_is_nan_is_an_empty_target(device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    keypoints[0, 0, 0] = math.nan
    keypoints[1, 1] = torch.tensor([2.0, math.inf])
    check(pred, keypoints, visible)


def test_nan_in_a_visible_heatmap_is_seen(device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    pred[0, 2, 4, 5] = math.nan
    loss, gradient = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    assert loss.isnan()
    assert gradient.isnan().nonzero().tolist() == [[0, 2, 4, 5]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradient(dtype: torch.dtype, device: str) -> None:
    arguments = (*inputs((2, 3, 9, 7), device, dtype), 2.0, None)
    actual = heatmap_loss.forward(*arguments, False)
    loss, gradient = heatmap_loss.forward(*arguments, True)
    assert gradient.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert_same(actual, (loss, gradient.new_empty(0)))


@pytest.mark.parametrize("size", [(9, 7), (16, 24)])
def test_any_strides(size: tuple[int, int], device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, *size), device)
    expected = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    centres = [*layouts(keypoints).values()]
    for index, (name, strided) in enumerate(layouts(pred).items()):
        weights = visible.t().contiguous().t()
        actual = heatmap_loss.forward(
            strided, centres[index % len(centres)], weights, 2.0, None, True
        )
        assert_same(actual, expected, f"{name}, ")


def test_expanded(device: str) -> None:
    pred, keypoints, visible = inputs((2, 3, 9, 7), device)
    check(
        pred[:1, :, :1].expand_as(pred), keypoints[:1].expand(2, 3, 2), visible[:, :1].expand(2, 3)
    )


@pytest.mark.parametrize("dim", range(4))
def test_offsets_beyond_32_bits(dim: int, device: str) -> None:
    pred, keypoints, visible = inputs((3, 3, 3, 3), device, torch.float16)
    visible[2, 2] = 1
    expected = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    far = spread(pred, dim, 2**30 + 8)
    assert_same(heatmap_loss.forward(far, keypoints, visible, 2.0, None, True), expected)


def test_offsets_of_the_gradient_beyond_32_bits(device: str) -> None:
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=device, dtype=torch.bfloat16)
    pred = rows[None, None, :, None].expand(1, 1, 5, 2**29 + 64)
    far, visible = torch.full((1, 1, 2), -1e4, device=device), torch.ones(1, 1, device=device)
    two = torch.tensor(2.0, device=device)
    with only_the_first_program(heatmap_loss):
        _, gradient = heatmap_loss.forward(pred, far, visible, 2.0, two, True)
    assert torch.equal(gradient[0, 0, :, :128], pred[0, 0, :, :128])


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 0, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    pred, visible = torch.empty(shape, device=device), torch.ones(shape[:2], device=device)
    keypoints = torch.ones(*shape[:2], 2, device=device)
    loss, gradient = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    assert loss == 0
    assert loss.dtype == torch.float32
    assert gradient.shape == shape
    heatmap_loss.scale_(gradient, visible, torch.tensor(2.0, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time_and_everything_written(dtype: torch.dtype, device: str) -> None:
    arguments = (*inputs((2, 3, 70, 26), device, dtype), 2.0, None, True)
    assert_repeats(lambda: heatmap_loss.forward(*arguments), times=3)
    assert_writes_everything(lambda: heatmap_loss.forward(*arguments))


def test_long_sums_stay_accurate(device: str) -> None:
    """All terms are positive, so that roundings add up."""
    _, keypoints, visible = inputs((4, 5, 64, 48), device)
    pred = 3 + 0.1 * random(4, 5, 64, 48).to(device)
    loss, _ = heatmap_loss.forward(pred, keypoints, visible, 2.0, None, False)
    exact = heatmap_loss_reference(pred.double(), keypoints, visible, 2.0, None)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-7)


def test_many_joints(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As with more than 2,048 joints: a launch before adds up blocks of weights."""
    pred, keypoints, visible = inputs((5, 7, 9, 7), device)
    monkeypatch.setitem(configs.CONFIGS, "block_sums", {None: {80: configs.c(1, BLOCK=16)}})
    monkeypatch.setattr(heatmap_loss, "SUMMED_BY_ALL", 34)
    check(pred, keypoints, visible)
    check(pred, keypoints, visible > 0)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_scale(device: str) -> None:
    shape = (2, 3, 70, 61)
    *_, visible = inputs(shape, device)
    visible[0, 0], visible[1, 2] = math.nan, -1.0
    for weights in (visible, visible > 0, visible.half()):
        assert_scales_in_place(
            lambda gradient, upstream, weights=weights: heatmap_loss.scale_(
                gradient, weights, upstream
            ),
            shape,
            (visible > 0)[..., None, None],
            device,
        )


def test_launches(device: str) -> None:
    """Two launches and nothing else: no copy, and no look at a value, which meta tensors lack."""
    with launch.recording(90) as launches:
        loss, gradient = heatmap_loss.forward(
            torch.empty(32, 15, 64, 48, device="meta", dtype=torch.bfloat16),
            torch.empty(32, 15, 2, device="meta"),
            torch.empty(32, 15, device="meta"),
            2.0,
            None,
            True,
        )
        heatmap_loss.scale_(
            gradient, torch.empty(32, 15, device="meta"), torch.empty(1, device="meta")
        )
    names = [launched.kernel.__name__ for launched in launches]
    assert names == ["forward_kernel", "finish_kernel", "scale_kernel"]
    assert [launched.grid for launched in launches] == [(480,), (1,), (480,)]
    assert launches[1].arguments[2] is loss
