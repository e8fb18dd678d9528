"""The kernels of ``spatial_attention`` against the reference in float64."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.kernels import launch, spatial_attention
from cmpose.ops.spatial_attention import spatial_attention_backward_reference
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_layout,
    assert_repeats,
    assert_same_bits,
    assert_writes_everything,
)

spatial_attention_reference = partial(ops.spatial_attention, backend="reference")

# bfloat16 is wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def both(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = spatial_attention.forward(qkv)
    return out, lse, spatial_attention.backward(grad, qkv, out, lse)[0]


def exact_lse(qkv: Tensor) -> Tensor:
    q, k, _ = qkv.double().permute(3, 0, 1, 4, 2, 5)
    return torch.logsumexp(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)


def check(qkv: Tensor, grad: Tensor) -> None:
    """All results against the reference."""
    out, lse, dqkv = both(qkv, grad)
    S, d = qkv.shape[2], qkv.shape[5]
    assert_layout(out, grad.shape, qkv.dtype)
    assert_layout(dqkv, qkv.shape, qkv.dtype)
    exact = spatial_attention_reference(qkv.double())
    eager = spatial_attention_reference(qkv)
    # P (and dS in the gradient) is rounded before the product that follows.
    size = max(S, d)
    assert_as_close_as_eager(out, eager, exact, reduction=size, roundings=2)
    exact = spatial_attention_backward_reference(grad.double(), qkv.double())
    eager = spatial_attention_backward_reference(grad, qkv)
    for part in range(3):  # each on its own scale
        a, b, c = (t[:, :, :, part] for t in (dqkv, eager, exact))
        # The gradient of the softmax over one key cancels to 0.
        terms = float(exact.abs().max())
        assert_as_close_as_eager(a, b, c, reduction=size, roundings=2, terms=terms)
    expected = exact_lse(qkv)
    scale = max(1.0, float(qkv.double().square().sum(-1).max()) * d**-0.5)
    assert_layout(lse, expected.shape, torch.float32)
    assert (lse - expected).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


# B, T, S, H, d. Backward in float16, one program takes up to 256 tokens of 64 or 80 channels.
SHAPES = [
    (1, 1, 1, 1, 16),
    (2, 1, 1, 2, 64),
    (1, 1, 2, 2, 64),
    (2, 2, 15, 2, 64),
    (1, 1, 64, 2, 64),
    (1, 1, 65, 1, 64),
    (1, 1, 64, 1, 16),
    (1, 3, 19, 2, 32),
    (1, 1, 33, 1, 48),
    (2, 1, 15, 1, 80),
    (1, 1, 65, 1, 80),
    (1, 1, 37, 1, 96),
    (1, 1, 31, 1, 112),
    (1, 1, 2, 1, 128),
    (1, 1, 65, 1, 128),
]
# Many small blocks make float32 slow in the interpreter.
LARGE = [
    ((1, 1, 207, 1, 64), torch.float32),
    ((1, 2, 207, 1, 64), torch.float16),
    ((1, 1, 300, 1, 64), torch.float16),
    ((1, 1, 100, 2, 64), torch.float16),
    ((1, 1, 300, 1, 16), torch.float16),
    ((1, 1, 207, 1, 80), torch.float16),
    ((1, 1, 257, 1, 80), torch.float16),
    ((1, 1, 140, 1, 112), torch.float16),
    ((1, 1, 207, 1, 128), torch.float16),
]
REFERENCE = [(shape, dtype) for shape in SHAPES for dtype in DTYPES] + LARGE
REFERENCE += [(shape, torch.bfloat16) for shape, _ in LARGE] * torch.cuda.is_available()


@pytest.mark.parametrize(("shape", "dtype"), REFERENCE, ids=str)
def test_is_the_reference(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, S, H, d = shape
    qkv = random(B, T, S, 3, H, d, dtype=dtype, device=device)
    check(qkv, random(B, T, S, H, d, dtype=dtype, device=device, seed=1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs what its own card is given")
@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("shape", [(1, 1, 70, 1, 64), (1, 1, 35, 1, 80), (1, 1, 140, 1, 96)])
def test_what_other_cards_run(
    device: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], arch: int
) -> None:
    """With their block sizes, and on 9.0 with dQ computed transposed."""
    monkeypatch.setattr(launch, "INTERPRETER_ARCH", arch)
    B, T, S, H, d = shape
    qkv = random(B, T, S, 3, H, d, dtype=torch.float16, device=device)
    check(qkv, random(B, T, S, H, d, dtype=torch.float16, device=device, seed=1))


KERNELS = [(9, 48, torch.float32), (9, 48, torch.float16), (130, 112, torch.float16)]
"""Tokens, head dimension and dtype. Backward, the first and the last take two kernels (one for dQ,
one for dK and dV) and the second takes one."""


@pytest.mark.parametrize(("S", "d", "dtype"), KERNELS, ids=str)
def test_any_strides(device: str, S: int, d: int, dtype: torch.dtype) -> None:
    """Dimensions in another order, a part of a larger tensor, a gradient that is expanded."""
    B, T, H = (2, 2, 2) if S < 130 else (1, 1, 2)
    turned = random(d, H, 3, S, T, B, dtype=dtype, device=device).permute(5, 4, 3, 2, 1, 0)
    part = random(B, T, S, 3, H + 1, d + 5, dtype=dtype, device=device)[..., 1:, 2 : d + 2]
    grads = [
        random(1, 1, 1, 1, d, dtype=dtype, device=device).expand(B, T, S, H, d),
        random(H, d, S, B, T, dtype=dtype, device=device).permute(3, 4, 2, 0, 1),
    ]
    for qkv, grad in zip((turned, part), grads, strict=True):
        actual = both(qkv, grad)
        assert_same_bits(actual, both(qkv.contiguous(), grad.contiguous()))


@pytest.mark.parametrize(("S", "d", "dtype"), KERNELS, ids=str)
def test_nothing_around_is_read(device: str, S: int, d: int, dtype: torch.dtype) -> None:
    """NaN lies behind the last token and the last channel of each head, and behind the tensor."""
    B, T, H = (1, 2, 2) if S < 130 else (1, 1, 2)
    shape, grad_shape = (B, T, S, 3, H, d), (B, T, S, H, d)
    qkv, grad = (
        random(*sizes, dtype=dtype, device=device, seed=seed)
        for seed, sizes in enumerate((shape, grad_shape))
    )
    inside = []
    for tensor in (qkv, grad):
        wide = [n + 1 for n in tensor.shape]
        around = torch.full(wide, math.nan, dtype=dtype, device=device)
        view = around[tuple(slice(0, n) for n in tensor.shape)]
        view.copy_(tensor)
        inside.append(view)
    assert_same_bits(both(*inside), both(qkv, grad))


@pytest.mark.parametrize(("S", "d", "dtype"), KERNELS, ids=str)
def test_nan_stays_in_its_frame_and_head(device: str, S: int, d: int, dtype: torch.dtype) -> None:
    """There it spreads as in the reference: from a key to all rows, from a query to one."""
    B, T, H = (2, 1, 2) if S < 130 else (2, 1, 1)
    grad = random(B, T, S, H, d, dtype=dtype, device=device, seed=1)
    for part in range(3):
        qkv = random(B, T, S, 3, H, d, dtype=dtype, device=device)
        qkv[1, 0, 2, part, H - 1, 3] = math.nan
        out, lse, dqkv = both(qkv, grad)
        expected = spatial_attention_reference(qkv)
        assert torch.equal(out.isnan(), expected.isnan())
        if part < 2:
            assert torch.equal(lse.isnan(), exact_lse(qkv).isnan())
        gradient = spatial_attention_backward_reference(grad, qkv)
        assert torch.equal(dqkv.isnan(), gradient.isnan())
        assert gradient[1].isnan().any()
        assert not gradient[0].isnan().any()


@pytest.mark.parametrize(
    ("S", "dtype"), [(9, torch.float32), (9, torch.float16), (260, torch.float16)], ids=str
)
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits(device: str, S: int, dtype: torch.dtype, sign: int) -> None:
    """60 · 60 · 64 is too large for float16, and its exp, for missing keys, for float32."""
    qkv = random(1, 1, S, 3, 1, 64, dtype=dtype, device=device)
    qkv[:, :, :, 0] = 60.0 * sign
    qkv[:, :, :, 1] = 60.0
    grad = random(1, 1, S, 1, 64, dtype=dtype, device=device, seed=1)
    out, lse, dqkv = both(qkv, grad)
    logit = sign * 60 * 60 * 64 / 8
    torch.testing.assert_close(lse, torch.full_like(lse, logit + math.log(S)), rtol=1e-6, atol=0)
    mean = qkv[:, :, :, 2].double().mean(2, keepdim=True)
    assert (out - mean).abs().max() <= 4 * torch.finfo(dtype).eps
    # P's and dS's relative error: their rounding, and that of lse in float32.
    error = 2 * torch.finfo(dtype).eps + 2 * abs(logit) * torch.finfo(torch.float32).eps
    dp = grad.double()[0, :, :, 0] @ qkv.double()[0, :, :, 2, 0].transpose(-1, -2)
    bounds = [60 / 8 * 2 * float(dp.abs().max())] * 2 + [float(grad.abs().max())]
    exact = spatial_attention_backward_reference(grad.double(), qkv.double())
    for part, bound in enumerate(bounds):
        assert (dqkv - exact)[:, :, :, part].abs().max() <= error * bound


@pytest.mark.parametrize(("S", "d", "dtype"), KERNELS, ids=str)
def test_same_bits_and_every_element(device: str, S: int, d: int, dtype: torch.dtype) -> None:
    qkv = random(1, 1, S, 3, 1, d, dtype=dtype, device=device)
    grad = random(1, 1, S, 1, d, dtype=dtype, device=device, seed=1)
    assert_repeats(lambda: both(qkv, grad), times=2)
    assert_writes_everything(lambda: both(qkv, grad))


@pytest.mark.parametrize("shape", [(0, 2, 5, 2), (2, 0, 5, 2), (2, 2, 0, 2), (2, 2, 5, 0)])
def test_empty(device: str, shape: tuple[int, ...]) -> None:
    B, T, S, H = shape
    qkv = torch.empty(B, T, S, 3, H, 32, device=device)
    out, lse, dqkv = both(qkv, torch.empty(B, T, S, H, 32, device=device))
    assert_layout(out, (B, T, S, H, 32), torch.float32)
    assert_layout(lse, (B, T, H, S), torch.float32)
    assert_layout(dqkv, qkv.shape, torch.float32)


OPTIONS = {
    "lengths": (89, (2, 37, 1, 64), torch.float16, {"lengths"}),
    "lengths, 64 keys at a time": (90, (4, 70, 1, 64), torch.float16, {"lengths"}),
    "no tail": (89, (2, 64, 1, 48), torch.float16, {"lengths", "scale"}),
    "lengths, two kernels": (89, (4, 41, 1, 32), torch.float32, {"lengths", "separate"}),
    "two heads of a frame": (89, (2, 20, 2, 16), torch.float32, {"lengths", "scale", "strides"}),
    "all": (89, (4, 55, 1, 80), torch.float16, {"lengths", "scale", "strides"}),
    "separate": (90, (1, 9, 1, 112), torch.float16, {"scale", "separate"}),
}
"""Card, sizes T S H d, dtype and what is given; separate q, k and v have strides of their own, or
those of one projection."""


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths from 0 to S; whatever the padding holds, it reaches nothing, and gets 0."""
    arch, (T, S, H, d), dtype, chosen = OPTIONS[case]
    if not torch.cuda.is_available():
        monkeypatch.setattr(launch, "INTERPRETER_ARCH", arch)
    qkv = random(1, T, S, 3, H, d, dtype=dtype, device=device)
    grads = [random(1, T, S, H, d, dtype=dtype, device=device, seed=1)]
    grads.append(random(1, T, H, S, dtype=torch.float32, device=device, seed=2))
    lengths = torch.tensor([[S, S - 17, S // 3, 0]], device=device)[:, :T]
    padding = torch.arange(S, device=device) >= lengths[..., None]  # [1, T, S]
    if "lengths" not in chosen:
        padding = torch.zeros_like(padding)
    marks = [padding[..., None, None], padding[:, :, None]]

    def run(backend: str, qkv: Tensor, grads: list[Tensor]) -> list[Tensor]:
        parts = qkv.unbind(3)
        if "strides" in chosen:
            parts = parts[0], parts[1].contiguous(), parts[2].transpose(2, 4).contiguous()
            parts = *parts[:2], parts[2].transpose(2, 4)
        packed = chosen.isdisjoint(("separate", "strides"))
        leaves = [x.detach().requires_grad_() for x in ([qkv] if packed else parts)]
        out, lse = ops.spatial_attention(
            leaves[0] if packed else leaves,
            lengths=lengths if "lengths" in chosen else None,
            scale=-0.3 if "scale" in chosen else None,
            return_lse=True,
            backend=backend,
        )
        assert torch.equal(lse.isneginf(), marks[1].expand_as(lse))
        gradients = torch.autograd.grad([out, lse], leaves, grads)
        for x, mark in zip((out, *gradients), (marks[0], *[padding] * 3), strict=False):
            assert not x[mark.expand_as(x) if mark.ndim == x.ndim else mark].any()
        return [out.detach(), lse.detach().masked_fill(marks[1], 0.0), *gradients]

    poisoned = [x.masked_fill(m, math.nan) for x, m in zip(grads, marks, strict=True)]
    actual = run("triton", qkv.masked_fill(marks[0][..., None], math.nan), poisoned)
    exact = run("reference", qkv.double(), [g.double() for g in grads])
    eager = run("reference", qkv, grads)
    for a, b, c in zip(actual, eager, exact, strict=True):
        assert_as_close_as_eager(a, b, c, reduction=max(S, d), roundings=2)


@pytest.mark.parametrize("scale", [0.0, 3e38, -3e38])
def test_scales_at_their_limits(device: str, scale: float) -> None:
    """Logits of a scale of 0 are all the same; of a large one only the largest counts."""
    qkv = random(1, 1, 21, 3, 1, 16, dtype=torch.float32, device=device)
    if scale:
        qkv[:, :, :, :2] = 0.0
    leaf = qkv.requires_grad_()
    out = ops.spatial_attention(leaf, scale=scale, backend="triton")
    expected = qkv[:, :, :, 2].detach().mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    torch.testing.assert_close(grad[:, :, :, 2], torch.ones_like(out), rtol=1e-5, atol=1e-5)
    assert (grad[:, :, :, :2] == 0).all()


def test_lengths_outside_the_frame_count_as_the_nearer(device: str) -> None:
    """Also those beyond 32 bits; on a GPU nothing looks at them before."""
    qkv = random(1, 4, 19, 3, 1, 16, dtype=torch.float32, device=device)
    far = torch.tensor([[-1, 20, 2**32 + 1, -(2**32) + 1]], device=device)
    near = torch.tensor([[0, 19, 19, 0]], device=device)
    actual = spatial_attention.forward(qkv, lengths=far)
    assert_same_bits(actual, spatial_attention.forward(qkv, lengths=near))


def test_separate_operands_are_not_copied() -> None:
    """Neither those of one projection, of whose strides only one is passed, nor others."""
    qkv = torch.empty(2, 3, 50, 3, 4, 64, dtype=torch.float16, device="meta")
    turned = torch.empty(2, 64, 50, 4, 3, dtype=torch.float16, device="meta").permute(0, 4, 2, 3, 1)
    for parts in (qkv.unbind(3), (qkv[:, :, :, 0], turned, turned)):
        with launch.recording(89) as launches:
            out, lse = spatial_attention.forward(*parts)
            spatial_attention.backward(out, parts[0], out, lse, *parts[1:])
        for one in launches:
            assert all(any(a is part for a in one.arguments) for part in parts)


def far(
    sizes: list[int], strides: list[int], dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """Random numbers at these strides, in memory that is not touched in between; and contiguous."""
    compact = random(*sizes, dtype=dtype, device=device)
    needed = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True)) + 1
    spread = torch.empty(needed, dtype=dtype, device=device).as_strided(sizes, strides)
    return spread.copy_(compact), compact


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes 20 GB; the host commits it lazily")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", range(6))
def test_offsets_beyond_32_bits(device: str, dim: int, dtype: torch.dtype) -> None:
    """Along each dimension in turn; along tokens, even from one block of keys to the next."""
    block = 64 if dtype == torch.float16 else 32
    sizes = [1, 1, 3, 3, 1, 16]
    if dim in (0, 1, 4):
        sizes[dim] = 3
    if dim == 2:
        sizes[dim] = block + 2
    strides = [0] * 6
    step = 1
    for other in reversed(range(6)):
        if other != dim:
            strides[other] = step
            step *= sizes[other]
    strides[dim] = 2**31 // (block if dim == 2 else sizes[dim] - 1) // 16 * 16 + 16
    assert (sizes[dim] - 1) * strides[dim] >= 2**31
    qkv, compact = far(sizes, strides, dtype, device)
    del sizes[3], strides[3]
    grad, compact_grad = far(sizes, strides, dtype, device)
    assert_same_bits(both(qkv, grad), both(compact, compact_grad))


def launched(S: int, d: int, dtype: torch.dtype, arch: int = 89) -> list[launch.Launch]:
    """What the backward launches."""
    qkv = torch.empty(1, 1, S, 3, 1, d, dtype=dtype, device="meta")
    out, lse = qkv[:, :, :, 0], torch.empty(1, 1, 1, S, device="meta")
    with launch.recording(arch) as launches:
        spatial_attention.backward(out, qkv, out, lse)
    return launches


@pytest.mark.parametrize(
    ("S", "d", "dtype", "kernels"),
    [
        (207, 64, torch.bfloat16, 1),
        (256, 64, torch.float16, 1),
        (257, 64, torch.float16, 2),
        (256, 80, torch.float16, 1),
        (256, 96, torch.float16, 2),
        (128, 128, torch.float16, 1),
        (129, 128, torch.float16, 2),
        (16, 16, torch.float32, 2),
    ],
)
def test_short_sequences_take_one_kernel(S: int, d: int, dtype: torch.dtype, kernels: int) -> None:
    assert len(launched(S, d, dtype)) == kernels


def test_float32_is_tf32_only_where_torch_is_told_so() -> None:
    def precisions(dtype: torch.dtype) -> set[str]:
        return {one.constants["PRECISION"] for one in launched(300, 64, dtype)}

    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert precisions(torch.float32) == {"ieee"}
        matmul.fp32_precision = "tf32"
        assert precisions(torch.float32) == {"tf32"}
        assert precisions(torch.float16) == {"ieee"}
    finally:
        matmul.fp32_precision = before
