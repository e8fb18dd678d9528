from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cmpose import ops


def random_qkv(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_by_hand() -> None:
    """Two tokens, one head of one channel: weights are the logistic function of q (k₁ − k₀)."""
    q, k, v = (1.0, 2.0), (0.5, -0.5), (10.0, 20.0)
    qkv = torch.tensor([q, k, v]).T.reshape(1, 1, 2, 3, 1, 1)
    actual = ops.spatial_attention(qkv).flatten()
    for token in range(2):
        second = 1 / (1 + math.exp(-q[token] * (k[1] - k[0])))
        assert actual[token].item() == pytest.approx((1 - second) * 10 + second * 20, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 7, 3, 2, 8), (1, 1, 1, 3, 1, 1), (2, 2, 13, 3, 3, 80)])
def test_is_torch_attention_within_a_frame(shape: tuple[int, ...]) -> None:
    qkv = random_qkv(*shape)
    actual = ops.spatial_attention(qkv)
    assert actual.is_contiguous()
    for t in range(shape[1]):
        q, k, v = (qkv[:, t, :, i].transpose(1, 2) for i in range(3))
        expected = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(actual[:, t], expected)


def test_reads_a_linear_layers_output_as_it_is() -> None:
    """The packed projection of all tokens, seen as [B, T, S, 3, H, d], and back to tokens."""
    linear = torch.nn.Linear(12, 36)
    tokens = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    out = ops.spatial_attention(linear(tokens).unflatten(-1, (3, 4, 3))).flatten(-2)
    assert out.shape == tokens.shape


def test_large_logits_stay_finite() -> None:
    """fp16 products of 60 · 60 · 64 exceed 65504 unless q is scaled first."""
    qkv = torch.full((1, 1, 4, 3, 1, 64), 60.0, dtype=torch.float16)
    assert (ops.spatial_attention(qkv) == 60).all()
    qkv = random_qkv(1, 1, 9, 3, 1, 16).float() * 1e4
    assert ops.spatial_attention(qkv).isfinite().all()


def test_nan_stays_in_its_frame_and_head() -> None:
    qkv = random_qkv(2, 2, 5, 3, 2, 4)
    qkv[1, 0, 2, 1, 1, 3] = math.nan
    bad = ops.spatial_attention(qkv).isnan()
    assert bad[1, 0, :, 1].all()
    assert bad.sum() == bad[1, 0, :, 1].numel()


@pytest.mark.parametrize("shape", [(2, 3, 5, 2, 2, 8), (2, 3, 5, 3, 16), (2, 3, 5, 3, 2, 8, 1)])
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"qkv must have shape \[B, T, S, 3, H, d\], got \[2, 3"):
        ops.spatial_attention(random_qkv(*shape))


BOTH = pytest.mark.parametrize("backend", ["reference", "cpu"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_of_thousands_are_right_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    """Logits of 3,000 to 4,600 rounded to float16 were off by 1, and results by 6 to 11."""
    qkv = (random_qkv(1, 2, 9, 3, 2, 64) * 42).to(dtype)
    actual = ops.spatial_attention(qkv, backend=backend)
    exact = ops.spatial_attention(qkv.double(), backend="reference")
    q, k, v = qkv.double().unbind(3)
    logits = torch.einsum("btshd,bthud->btshu", q, k.permute(0, 1, 3, 2, 4)) / 8
    assert 3000 < logits.abs().max() < 9000
    allowed = torch.finfo(dtype).eps / 2 + 4 * logits.abs().max() * torch.finfo(torch.float32).eps
    assert (actual - exact).abs().max() <= allowed * v.abs().max()


@BOTH
def test_lengths_are_frames_cut_short(backend: str) -> None:
    """Whatever the padding holds; a frame of length 0 gives zeros and no gradient."""
    qkv = random_qkv(2, 3, 5, 3, 2, 8)
    lengths = torch.tensor([[5, 3, 0], [1, 4, 5]])
    padded = qkv.masked_fill(
        (torch.arange(5) >= lengths[..., None])[..., None, None, None], math.nan
    ).requires_grad_()
    out, lse = ops.spatial_attention(padded, lengths=lengths, return_lse=True, backend=backend)
    out.square().sum().backward()
    for b, t in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        n = int(lengths[b, t])
        assert (out[b, t, n:] == 0).all()
        assert (lse[b, t, :, n:] == -math.inf).all()
        assert (padded.grad[b, t, n:] == 0).all()
        if n:
            short = qkv[b : b + 1, t : t + 1, :n].requires_grad_()
            expected = ops.spatial_attention(short, backend="reference")
            torch.testing.assert_close(out[b, t, :n], expected[0, 0])
            expected.square().sum().backward()
            torch.testing.assert_close(padded.grad[b, t, :n], short.grad[0, 0])
            short.grad = None
    flat = ops.spatial_attention(padded, lengths=lengths.flatten(), backend=backend)
    assert torch.equal(flat, out)


@BOTH
def test_separate_projections_are_the_packed_one(backend: str) -> None:
    """Of any strides, clips that are no multiple of a frame apart among them."""
    qkv = random_qkv(2, 3, 5, 3, 2, 8)
    packed = ops.spatial_attention(qkv, backend=backend)
    scattered = tuple(x.transpose(0, 4).contiguous().transpose(0, 4) for x in qkv.unbind(3))
    for projections in (qkv.unbind(3), scattered, list(scattered)):
        torch.testing.assert_close(ops.spatial_attention(projections, backend=backend), packed)


@BOTH
def test_scale_and_log_sum_exp(backend: str) -> None:
    qkv = random_qkv(2, 1, 6, 3, 2, 8)
    out, lse = ops.spatial_attention(qkv, scale=-0.7, return_lse=True, backend=backend)
    q, k, v = (x.transpose(2, 3) for x in qkv.unbind(3))
    logits = q @ k.transpose(-1, -2) * -0.7
    torch.testing.assert_close(lse, logits.logsumexp(-1))
    torch.testing.assert_close(out, (logits.softmax(-1) @ v).transpose(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": torch.tensor([[6]])}, r"^lengths must lie in 0\.\.5 \(S tokens .*got 6\.\.6"),
        ({"lengths": torch.tensor([1, 2])}, r"^lengths must have shape \[B·T\] with B·T=1 .*\[2\]"),
        ({"lengths": torch.tensor([[1.0]])}, "^lengths must be of dtype int64, got float32"),
        ({"lengths": 3}, r"^lengths must be a torch\.Tensor, got int"),
        ({"scale": math.nan}, "^scale must be finite in float64, got nan"),
        ({"scale": 10**400}, "^scale must be finite in float64, got "),
        ({"scale": "1"}, "^scale must be a number, got '1'"),
        ({"return_lse": 1}, "^return_lse must be True or False, got 1"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        ops.spatial_attention(random_qkv(1, 1, 5, 3, 1, 8), **options)


def test_wrong_projections() -> None:
    q, k, v = random_qkv(1, 2, 5, 3, 2, 8).unbind(3)
    for projections, message in (
        ((q, k), r"^qkv must be one tensor or three \(q, k and v\), got 2"),
        ((q, k[:, :1], v), r"^k must have shape \[B, T, S, H, d\] with T=2"),
        ((q, k, v.float()), "^v must have q's dtype float64, got float32"),
        ((q, k, v.to("meta")), "^v must be on q's device cpu, got meta"),
        ((q, 3, v), r"^k must be a torch\.Tensor, got int"),
        ("qkv", r"^qkv must be a torch\.Tensor, got str"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.spatial_attention(projections)
