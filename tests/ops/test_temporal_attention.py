from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cmpose import ops
from cmpose.ops.cpu import temporal_attention as cpu


def random_qkv(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("frames", [2, 3, 5, 16, 19])
def test_is_torch_attention_along_time(frames: int) -> None:
    qkv = random_qkv(2, frames, 4, 3, 2, 8)
    actual = ops.temporal_attention(qkv)
    assert actual.is_contiguous()
    for s in range(4):
        q, k, v = (qkv[:, :, s, i].transpose(1, 2) for i in range(3))
        expected = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(actual[:, :, s], expected)


def test_is_spatial_attention_with_time_and_space_swapped() -> None:
    qkv = random_qkv(2, 3, 4, 3, 2, 8)
    swapped = ops.spatial_attention(qkv.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ops.temporal_attention(qkv), swapped)


def test_one_frame_is_its_own_value() -> None:
    qkv = random_qkv(2, 1, 4, 3, 2, 8)
    torch.testing.assert_close(ops.temporal_attention(qkv), qkv[:, :, :, 2])


def test_equal_frames_average() -> None:
    """Equal keys get equal weights."""
    qkv = random_qkv(1, 4, 3, 3, 1, 8)
    qkv[:, :, :, 1] = qkv[:, :1, :, 1]
    mean = qkv[:, :, :, 2].mean(dim=1, keepdim=True).expand(-1, 4, -1, -1, -1)
    torch.testing.assert_close(ops.temporal_attention(qkv), mean)


def test_nan_stays_at_its_position_and_head() -> None:
    qkv = random_qkv(2, 3, 5, 3, 2, 4)
    qkv[1, 0, 2, 2, 1, 3] = math.nan
    bad = ops.temporal_attention(qkv).isnan()
    assert bad[1, :, 2, 1, 3].all()
    assert bad.sum() == 3


def test_no_frames() -> None:
    with pytest.raises(ValueError, match=r"qkv must have T ≥ 1 in .*got \[2, 0, 4"):
        ops.temporal_attention(random_qkv(2, 0, 4, 3, 2, 8))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("frames", [1, 3, 4, 5, 32])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_are_clips_cut_short(backend: str, frames: int, causal: bool) -> None:
    """Whatever the padding holds; causal or not, over few frames and over many."""
    qkv = random_qkv(3, frames, 2, 3, 2, 16)
    lengths = torch.tensor([frames, frames // 2, 0])
    padded = qkv.clone()
    for clip, n in zip(padded, lengths, strict=True):
        clip[n:] = math.nan
    padded.requires_grad_()
    out = ops.temporal_attention(padded, lengths=lengths, causal=causal, backend=backend)
    out.square().sum().backward()
    for b, n in enumerate(lengths.tolist()):
        assert (out[b, n:] == 0).all()
        assert (padded.grad[b, n:] == 0).all()
        if n:
            q, k, v = (qkv[b, :n, :, i].permute(1, 2, 0, 3) for i in range(3))
            expected = scaled_dot_product_attention(q, k, v, is_causal=causal).permute(2, 0, 1, 3)
            torch.testing.assert_close(out[b, :n], expected)
            assert (padded.grad[b, :n, :, 2] != 0).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("frames", [3, 7])
def test_separate_projections_and_scale(backend: str, frames: int) -> None:
    qkv = random_qkv(2, frames, 5, 3, 2, 16)
    packed = ops.temporal_attention(qkv, backend=backend)
    q, k, v = (x.transpose(0, 4).contiguous().transpose(0, 4) for x in qkv.unbind(3))
    torch.testing.assert_close(ops.temporal_attention((q, k, v), backend=backend), packed)
    double = ops.temporal_attention((q / 2, k, v), scale=2 * 16**-0.5, backend=backend)
    torch.testing.assert_close(double, packed)


@pytest.mark.parametrize("scale", [-0.2, 0.0, -0.0, 1e-300, 0.3])
@pytest.mark.parametrize("frames", [4, 5, 33])
def test_causal_whatever_the_scale(frames: int, scale: float) -> None:
    """A kernel that masks before it scales would let later frames in, or give NaN."""
    qkv = random_qkv(2, frames, 3, 3, 2, 8)
    for dtype, lengths in ((torch.float64, None), (torch.float32, torch.tensor([frames, 2]))):
        results = []
        for backend in ("reference", "cpu"):
            leaf = qkv.to(dtype).requires_grad_()
            out = ops.temporal_attention(
                leaf, causal=True, scale=scale, lengths=lengths, backend=backend
            )
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("d", range(16, 129, 16))
def test_every_head_dimension(d: int) -> None:
    qkv = random_qkv(1, 3, 2, 3, 1, d)
    exact = ops.temporal_attention(qkv, backend="reference")
    torch.testing.assert_close(ops.temporal_attention(qkv, backend="cpu"), exact)


def test_many_positions_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole clips, several at a time, and positions of one clip give the same."""
    qkv, grad = random_qkv(5, 3, 7, 3, 2, 8), random_qkv(5, 3, 7, 1, 2, 8)[:, :, :, 0]
    lengths, whole = torch.tensor([3, 1, 2, 0, 3]), None
    for elements in (1 << 18, 7 * 16 * 2, 16 * 3):
        monkeypatch.setattr(cpu, "_PART", elements)
        leaf = qkv.clone().requires_grad_()
        out = ops.temporal_attention(leaf, lengths=lengths, causal=True, backend="cpu")
        actual = out.detach(), torch.autograd.grad(out, leaf, grad)[0]
        whole = whole or actual
        torch.testing.assert_close(actual, whole)


def test_wrong_options() -> None:
    qkv = random_qkv(2, 3, 4, 3, 2, 8)
    for options, message in (
        ({"lengths": torch.tensor([3])}, r"^lengths must have shape \[B\] with B=2"),
        ({"lengths": torch.tensor([3, 4])}, r"^lengths must lie in 0\.\.3 \(T frames a clip\)"),
        ({"causal": 1}, "^causal must be True or False, got 1"),
        ({"scale": None, "causal": None}, "^causal must be True or False, got None"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ops.temporal_attention(qkv, **options)
