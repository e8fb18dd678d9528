"""The CUDA kernel of spatial attention's gradient: sizes, options, layouts, hostile values."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import cuda, library
from cmpose.ops.spatial_attention import cuda_refusal
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_same_bits,
    hostile_gradients,
    poisoned_memory,
)
from tests.ops.support.cases import DEVICE

pytestmark = pytest.mark.skipif(
    ops.available("spatial_attention", DEVICE)["cuda"] is not None,
    reason=str(ops.available("spatial_attention", DEVICE)["cuda"]),
)

HALVES = (torch.bfloat16, torch.float16)
Arguments = tuple[Tensor | float | None, ...]


def arguments_of(
    sizes: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.bfloat16,
    *,
    options: bool = False,
    seed: int = 0,
) -> Arguments:
    """The op's arguments at sizes B, T, S, H, d, the projection packed. Options: lengths from 0 to
    S, a gradient to the log-sum-exp, and a negative scale."""
    B, T, S, H, d = sizes
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(B, T, S, 3, H, d, generator=generator).to(dtype)
    grad = torch.randn(B, T, S, H, d, generator=generator).to(dtype)
    lengths = torch.randint(0, S + 1, (B, T), generator=generator) if options else None
    grad_lse = torch.randn(B, T, H, S, generator=generator) if options else None
    unread = qkv.new_full((0,), torch.nan)
    arguments = (
        grad,
        grad_lse,
        qkv,
        None,
        None,
        lengths,
        unread,
        unread,
        -0.2 if options else d**-0.5,
    )
    return tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments)


def run(backend: str, arguments: Arguments, wide: torch.dtype | None = None) -> list[Tensor]:
    """The gradients to the operands, the arguments converted to ``wide`` first."""
    backward: Callable[..., tuple[Tensor, ...]]
    backward = library.IMPLEMENTATIONS["spatial_attention_backward"][backend]
    if wide is not None:
        arguments = tuple(
            x.to(wide) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        )
    return [x for x in backward(*arguments) if x.numel()]


def without_padding(arguments: Arguments) -> Arguments:
    """With zeros for gradients of padding, to which the reference gives a meaning."""
    grad, grad_lse, qkv, k, v, lengths, *rest = arguments
    if not isinstance(lengths, Tensor):
        return arguments
    assert isinstance(grad, Tensor)
    padding = torch.arange(grad.shape[2], device=DEVICE) >= lengths[..., None]
    grad = grad.masked_fill(padding[..., None, None], 0)
    if isinstance(grad_lse, Tensor):
        grad_lse = grad_lse.masked_fill(padding[:, :, None], 0)
    return grad, grad_lse, qkv, k, v, lengths, *rest


def apart(arguments: Arguments) -> Arguments:
    """With q, k and v separate and, as the gradient, each of strides of its own."""
    grad, grad_lse, qkv, _, _, *rest = arguments
    assert isinstance(grad, Tensor)
    assert isinstance(qkv, Tensor)
    q, k, v = qkv.unbind(3)
    heads_first = v.transpose(2, 3).contiguous().transpose(2, 3)
    frames_last = grad.transpose(1, 2).contiguous().transpose(1, 2)
    return frames_last, grad_lse, q, k.contiguous(), heads_first, *rest


def check(arguments: Arguments) -> list[Tensor]:
    actual = run("cuda", arguments)
    cleaned = without_padding(arguments)
    eager, exact = run("reference", cleaned), run("reference", cleaned, torch.float64)
    for a, b, c in zip(actual, eager, exact, strict=True):
        # P and dS are rounded before the products that follow.
        assert_as_close_as_eager(a, b, c, reduction=208, roundings=2)
    return actual


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_model_s_frame(dtype: torch.dtype, d: int) -> None:
    """192 patches and 15 keypoints: 13 tiles of 16, the last of 15."""
    check(arguments_of((1, 1, 207, 2, d), dtype))


@pytest.mark.parametrize("d", [64, 80])
@pytest.mark.parametrize("S", [1, 16, pytest.param(17, marks=pytest.mark.sanitized), 40, 113, 208])
def test_sizes_and_options(S: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tiles than warps, one a warp, two; several items a block, shared unequally."""
    monkeypatch.setattr(cuda, "MULTIPROCESSORS_ON_CPU", 1 if S == 208 else 2)
    check(arguments_of((1, 1, S, 2, d) if S > 100 else (2, 3, S, 3, d), options=True, seed=S))


@pytest.mark.parametrize("d", [64, 80])
def test_no_order_of_threads_or_copies_changes_a_bit(
    d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_of((1, 1, 135, 3, d), options=True)
    expected = run("cuda", arguments)
    for order, copies in (("backward", "late"), ("7", "early")):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        monkeypatch.setenv("CUDA_ON_CPU_COPIES", copies)
        with poisoned_memory():
            assert_same_bits(run("cuda", arguments), expected)


@pytest.mark.sanitized
def test_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views in which rows are not aligned, or lie far apart, and separate q, k and v, of which
    none is copied."""
    grad, _, qkv, _, _, _, unread, _, scale = arguments_of((2, 2, 19, 2, 64))
    assert isinstance(grad, Tensor)
    assert isinstance(qkv, Tensor)
    rest = None, unread, unread, scale
    expected = run("cuda", (grad, None, qkv, None, None, *rest))
    shifted = torch.zeros(*qkv.shape[:-1], 65, dtype=qkv.dtype, device=DEVICE)[..., 1:]
    frames_last = torch.zeros(19, 2, 2, 3, 2, 64, dtype=qkv.dtype, device=DEVICE).permute(
        2, 1, 0, 3, 4, 5
    )
    for view in (shifted, frames_last):
        view.copy_(qkv)
        assert_same_bits(run("cuda", (grad, None, view, None, None, *rest)), expected)
    q, k, v = qkv.unbind(3)
    separate = [x.contiguous() for x in expected[0].unbind(3)]
    with monkeypatch.context() as patch:
        patch.delattr(sys.modules[cuda_refusal.__module__], "_copied")
        for arguments in (
            (grad, None, q, k, v, *rest),
            apart((grad, None, qkv, None, None, *rest)),
        ):
            assert_same_bits(run("cuda", arguments), separate)
    for name, hostile in hostile_gradients(grad.shape, grad):
        actual = run("cuda", (hostile, None, qkv, None, None, *rest))
        plain = run("cuda", (hostile.contiguous(), None, qkv, None, None, *rest))
        assert torch.equal(actual[0], plain[0]), name


@pytest.mark.sanitized
@pytest.mark.parametrize("d", [64, 80])
def test_one_token_of_any_stride(d: int) -> None:
    """The stride of a single token says nothing, but it counts in addresses of rows behind it,
    of which nothing is read."""
    generator = torch.Generator().manual_seed(d)
    grad, q, k, v = (
        torch.randn(1, 1, 1, 1, d, generator=generator).to(DEVICE, torch.bfloat16) for _ in "gqkv"
    )
    unread = q.new_empty(0)
    rest = None, unread, unread, d**-0.5
    expected = run("cuda", (grad, None, q, k, v, *rest))
    far = [x.as_strided(x.shape, (d, d, 2**31 - 16, d, 1)) for x in (grad, q, k, v)]
    assert_same_bits(run("cuda", (far[0], None, *far[1:], *rest)), expected)
    forward = library.IMPLEMENTATIONS["spatial_attention"]["cuda"]
    assert_same_bits(forward(*far[1:], None, d**-0.5, True), forward(q, k, v, None, d**-0.5, True))


@pytest.mark.parametrize("scale", [0.0, 3.0, -3.0])
def test_scales(scale: float) -> None:
    """Weights that are all alike, and sharp ones, beside warps whose keys are all padding."""
    *given, _ = arguments_of((1, 1, 119, 1, 64))
    given[5] = torch.tensor([[37]], device=DEVICE)
    check((*given, scale))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 300.0])
def test_hostile_values(value: float) -> None:
    """What is not finite stays in its frame and head, and is where it is in the reference; weights
    of 0 and 1, of logits of tens of thousands, are as in the reference."""
    arguments = arguments_of((1, 1, 37, 2, 64))
    qkv = arguments[2]
    assert isinstance(qkv, Tensor)
    clean = run("cuda", arguments)[0]
    qkv[0, 0, 5, 1, 0, 3] = value
    qkv[0, 0, 6, 0, 0, :8] = 300.0
    actual = check(arguments)[0]
    assert torch.equal(actual[:, :, :, :, 1], clean[:, :, :, :, 1])


def test_padding_adds_nothing_whatever_it_holds() -> None:
    """NaN beyond a frame's length, in operands and gradients, packed and separate."""
    grad, grad_lse, qkv, *_, scale = arguments_of((1, 2, 30, 1, 64), options=True)
    assert isinstance(grad, Tensor)
    assert isinstance(grad_lse, Tensor)
    assert isinstance(qkv, Tensor)
    lengths = torch.tensor([[21, 0]], device=DEVICE)
    rest = lengths, qkv.new_empty(0), qkv.new_empty(0), scale
    expected = run("cuda", (grad, grad_lse, qkv, None, None, *rest))[0]
    assert expected[0, 0, :21].all()
    assert not expected[0, 0, 21:].any()
    assert not expected[0, 1].any()
    grad, grad_lse, qkv = grad.clone(), grad_lse.clone(), qkv.clone()
    for frame, length in enumerate((21, 0)):
        grad[0, frame, length:] = qkv[0, frame, length:] = torch.nan
        grad_lse[0, frame, :, length:] = torch.nan
    assert_same_bits(run("cuda", (grad, grad_lse, qkv, None, None, *rest))[0], expected)
    separate = run("cuda", apart((grad, grad_lse, qkv, None, None, *rest)))
    assert_same_bits(separate, [x.contiguous() for x in expected.unbind(3)])


def test_nothing_is_launched_for_an_empty_batch() -> None:
    arguments = arguments_of((0, 2, 30, 1, 64))
    assert run("cuda", arguments) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 9, 3, 1, 64), torch.float32, "qkv is float32; .* take bfloat16 and float16"),
        ((1, 1, 9, 3, 1, 48), torch.float16, "the head dimension is 48; .* take 64 and 80"),
        ((1, 1, 209, 3, 1, 64), torch.float16, "a frame has 209 tokens; .* up to 208"),
        ((1, 1, 208, 3, 1, 80), torch.float16, None),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], dtype: torch.dtype, reason: str | None) -> None:
    actual = cuda_refusal(torch.empty(shape, dtype=dtype))
    assert actual is None if reason is None else re.fullmatch(rf".*{reason}", actual or "")
