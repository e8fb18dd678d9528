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
    found = ops.spatial_attention(qkv).flatten()
    for token in range(2):
        second = 1 / (1 + math.exp(-q[token] * (k[1] - k[0])))
        assert found[token].item() == pytest.approx((1 - second) * 10 + second * 20, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 7, 3, 2, 8), (1, 1, 1, 3, 1, 1), (2, 2, 13, 3, 3, 80)])
def test_is_torch_attention_within_a_frame(shape: tuple[int, ...]) -> None:
    qkv = random_qkv(*shape)
    found = ops.spatial_attention(qkv)
    assert found.is_contiguous()
    for t in range(shape[1]):
        q, k, v = (qkv[:, t, :, i].transpose(1, 2) for i in range(3))
        truth = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(found[:, t], truth)


def test_reads_a_linear_layers_output_as_it_is() -> None:
    """The packed projection of all tokens, seen as [B, T, S, 3, H, d], and back to tokens."""
    linear = torch.nn.Linear(12, 36)
    tokens = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(0))
    found = ops.spatial_attention(linear(tokens).unflatten(-1, (3, 4, 3))).flatten(-2)
    assert found.shape == tokens.shape


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
