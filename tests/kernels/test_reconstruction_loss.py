from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose.kernels import configs, launch, reconstruction_loss, reduce
from cmpose.ops.reconstruction_loss import (
    reconstruction_loss_reference,
    reconstruction_loss_with_gradients_reference,
)
from tests.kernels.losses import (
    DTYPES,
    HALVES,
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
    (2, 3, 5, 7),
    (1, 2, 67, 64),
    (3, 1, 2, 80),
    (1, 3, 37, 128),
    (2, 1, 19, 300),
    (1, 2, 17, 768),
]


def inputs(shape: tuple[int, ...], device: str, *dtypes: torch.dtype) -> Inputs:
    """pred, target and corrupted; the first token is corrupted and the last is not."""
    pred, target = (
        random(*shape, seed=seed, dtype=dtypes[seed % len(dtypes)]) for seed in range(2)
    )
    corrupted = random(*shape[:-1], seed=2) < 0.2
    corrupted.view(-1)[-1:] = False
    corrupted.view(-1)[:1] = True
    return pred.to(device), target.to(device), corrupted.to(device)


def exact(
    pred: Tensor, target: Tensor, corrupted: Tensor, normalizer: Tensor | None, per_channel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients by autograd in float64."""
    pred, target = (t.double().detach().requires_grad_() for t in (pred, target))
    loss = reconstruction_loss_reference(pred, target, corrupted, per_channel, False, normalizer)
    return loss.detach(), *torch.autograd.grad(loss, (pred, target))


def check(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    normalizer: Tensor | None = None,
    per_channel: bool = True,
) -> None:
    arguments = (pred, target, corrupted, normalizer, per_channel)
    actual = reconstruction_loss.forward(*arguments, True, True)
    eager = reconstruction_loss_with_gradients_reference(*arguments, True, True)
    names = ("loss", "pred", "target")
    for name, a, b, c in zip(names, actual, eager, exact(*arguments), strict=True):
        assert a.is_contiguous(), name
        assert_as_close_as_eager(a, b, c, reduction=pred.numel() if name == "loss" else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    pred, target, corrupted = inputs(shape, device, dtype)
    check(pred, target, corrupted)
    check(pred, target, ~corrupted, per_channel=False)


@pytest.mark.parametrize("half", HALVES)
def test_mixed_dtypes(half: torch.dtype, device: str) -> None:
    check(*inputs((2, 2, 5, 80), device, half, torch.float32))
    check(*inputs((2, 2, 5, 80), device, torch.float32, half))


@pytest.mark.parametrize("name", NORMALIZERS)
def test_normalizers(name: str, device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 5, 7), device, torch.float32)
    normalizer = NORMALIZERS[name].to(device)
    check(pred, target, corrupted, normalizer)
    loss, *gradients = reconstruction_loss.forward(
        pred, target, corrupted, normalizer, True, True, True
    )
    for gradient in gradients:
        assert (gradient[~corrupted] == 0).all()
    if normalizer == 0:
        assert loss == 0
        assert all((gradient == 0).all() for gradient in gradients)


def test_nothing_corrupted(device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 5, 7), device, torch.float32)
    nothing = torch.zeros_like(corrupted)
    loss, *gradients = reconstruction_loss.forward(pred, target, nothing, None, True, True, True)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tokens_outside_are_not_looked_at(value: float, device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 5, 80), device, torch.float32)
    expected = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    for tensor in (pred, target):
        tensor[~corrupted] = value
    actual = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    assert_same_bits(actual, expected)
    for gradient in actual[1:]:
        assert (gradient[~corrupted] == 0).all()


def test_nan_inside_is_seen(device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 5, 7), device, torch.float32)
    pred[0, 0, 0, 3] = math.nan
    loss, gradient, _ = reconstruction_loss.forward(
        pred, target, corrupted, None, True, True, False
    )
    assert loss.isnan()
    assert gradient.isnan().nonzero().tolist() == [[0, 0, 0, 3]]


@pytest.mark.parametrize("want_pred", [True, False])
@pytest.mark.parametrize("want_target", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_what_is_wanted(
    want_pred: bool, want_target: bool, dtype: torch.dtype, device: str
) -> None:
    arguments = (*inputs((2, 3, 5, 7), device, dtype), None, True)
    both = reconstruction_loss.forward(*arguments, True, True)
    actual = reconstruction_loss.forward(*arguments, want_pred, want_target)
    gradient_dtype = torch.float32 if dtype == torch.float16 else dtype
    expected = [
        g if w else g.new_empty(0) for g, w in zip(both[1:], (want_pred, want_target), strict=True)
    ]
    assert_same(actual, (both[0], *expected))
    assert all(gradient.dtype == gradient_dtype for gradient in actual[1:])


def test_any_strides(device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 18, 80), device, torch.float32)
    expected = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    views = zip(layouts(pred).items(), reversed(layouts(target).values()), strict=True)
    for (name, strided_pred), strided_target in views:
        flags = corrupted.transpose(0, 2).contiguous().transpose(0, 2)
        actual = reconstruction_loss.forward(
            strided_pred, strided_target, flags, None, True, True, True
        )
        assert_same(actual, expected, f"{name}, ")


def test_as_the_model_calls_it(device: str) -> None:
    """Reconstructed tokens are a view of the branches without keypoints; the target is packed."""
    _, target, corrupted = inputs((2, 3, 12, 64), device, torch.float32)
    branches = random(3, 2, 3, 12 + 5, 64, seed=7).to(device)
    check(branches[1][:, :, :12], target, corrupted)


def test_expanded(device: str) -> None:
    pred, target, corrupted = inputs((2, 3, 5, 7), device, torch.float32)
    check(pred[:1, :, :1].expand_as(pred), target[..., :1].expand_as(target), corrupted)


@pytest.mark.parametrize("dim", range(4))
def test_offsets_beyond_32_bits(dim: int, device: str) -> None:
    pred, target, corrupted = inputs((3, 3, 3, 3), device, torch.float16)
    corrupted[2, 2, 2] = True
    expected = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    far = spread(pred, dim, 2**30 + 8)
    actual = reconstruction_loss.forward(far, target, corrupted, None, True, True, True)
    assert_same(actual, expected)
    actual = reconstruction_loss.forward(target, far, corrupted, None, True, True, True)
    assert_same_bits(actual[2], expected[1])


def test_offsets_of_gradients_beyond_32_bits(device: str) -> None:
    rows = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=device, dtype=torch.bfloat16)
    pred = rows[None, None, :, None].expand(1, 1, 5, 2**29 + 64)
    corrupted = torch.ones(1, 1, 5, device=device, dtype=torch.bool)
    target, two = torch.zeros_like(rows)[:1].expand_as(pred), torch.tensor(2.0, device=device)
    with only_the_first_program(reconstruction_loss):
        _, *gradients = reconstruction_loss.forward(pred, target, corrupted, two, False, True, True)
    for gradient, sign in zip(gradients, (1, -1), strict=True):
        assert torch.equal(gradient[0, 0, :, :64], sign * pred[0, 0, :, :64])


@pytest.mark.parametrize("shape", [(0, 3, 5, 7), (2, 3, 0, 7), (2, 3, 5, 0)])
def test_empty(shape: tuple[int, ...], device: str) -> None:
    pred, target = torch.empty(shape, device=device), torch.empty(shape, device=device)
    corrupted = torch.ones(shape[:-1], device=device, dtype=torch.bool)
    loss, *gradients = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    assert loss == 0
    assert loss.dtype == torch.float32
    assert all(gradient.shape == shape for gradient in gradients)
    reconstruction_loss.scale_(gradients[0], corrupted, torch.tensor(2.0, device=device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_every_time_and_everything_written(dtype: torch.dtype, device: str) -> None:
    arguments = (*inputs((2, 2, 19, 80), device, dtype), None, True, True, True)
    assert_repeats(lambda: reconstruction_loss.forward(*arguments), times=3)
    assert_writes_everything(lambda: reconstruction_loss.forward(*arguments))


def test_long_sums_stay_accurate(device: str) -> None:
    """All terms are positive, so that roundings add up."""
    pred = 3 + 0.1 * random(1, 2, 64, 768).to(device)
    target, corrupted = torch.zeros_like(pred), torch.ones(1, 2, 64, device=device).bool()
    loss, *_ = reconstruction_loss.forward(pred, target, corrupted, None, True, False, False)
    assert loss.item() == pytest.approx(pred.double().square().mean().item(), rel=2e-7)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_scale(device: str) -> None:
    shape = (2, 3, 11, 300)
    *_, corrupted = inputs(shape, device, torch.float32)
    assert_scales_in_place(
        lambda gradient, upstream: reconstruction_loss.scale_(gradient, corrupted, upstream),
        shape,
        corrupted[..., None],
        device,
    )


def test_counts_of_several_programs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As with more than 32,768 tokens: each program of the loss adds up the counts of blocks."""
    pred, target, corrupted = inputs((2, 3, 18, 80), device, torch.float32)
    expected = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    monkeypatch.setitem(configs.CONFIGS, "block_sums", {None: {80: configs.c(1, BLOCK=16)}})
    actual = reconstruction_loss.forward(pred, target, corrupted, None, True, True, True)
    assert_same(actual, expected)
    assert reduce.block_sums(reduce.numbers(corrupted), torch.int32).shape == (7,)


def test_sums(device: str) -> None:
    flags = (random(70001) < 0.3).to(device)
    counts = reduce.block_sums(reduce.numbers(flags), torch.int32)
    assert counts.tolist() == [int(part.sum()) for part in flags.split(32768)]
    partial = random(10001, seed=1).abs().to(device)
    loss = reduce.finish(partial, counts, 3)
    expected = partial.double().sum() / 3 / flags.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-7, atol=0)
    partial = torch.zeros(3 * 4096, device=device)
    partial[0], partial[4096], partial[8192] = 2**24, 1, 1  # 2^24 + 1 is no float32
    assert reduce.finish(partial, counts[:1] * 0 + 1, 1) == 2**24 + 2


def test_launches(device: str) -> None:
    """Three launches and nothing else: no copy, and no look at a value, which meta tensors lack."""
    with launch.recording(90) as launches:
        branches = torch.empty(3, 32, 3, 207, 768, device="meta", dtype=torch.bfloat16)
        loss, *_ = reconstruction_loss.forward(
            branches[1, :, :, :192],
            torch.empty(32, 3, 192, 768, device="meta", dtype=torch.bfloat16),
            torch.empty(32, 3, 192, device="meta", dtype=torch.bool),
            None,
            True,
            True,
            False,
        )
    assert [launched.kernel.__name__ for launched in launches] == [
        "block_sums_kernel",
        "forward_kernel",
        "finish_kernel",
    ]
    assert launches[1].grid == (32 * 3 * 12 * 3,)
    assert launches[1].arguments[0].data_ptr() == branches[1].data_ptr()
    assert launches[-1].arguments[2] is loss
