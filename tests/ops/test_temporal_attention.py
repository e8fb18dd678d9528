from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cmpose import ops


def random_qkv(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("frames", [2, 3, 5, 16, 19])
def test_is_torch_attention_along_time(frames: int) -> None:
    qkv = random_qkv(2, frames, 4, 3, 2, 8)
    found = ops.temporal_attention(qkv)
    assert found.is_contiguous()
    for s in range(4):
        q, k, v = (qkv[:, :, s, i].transpose(1, 2) for i in range(3))
        truth = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        torch.testing.assert_close(found[:, :, s], truth)


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
    with pytest.raises(ValueError, match=r"qkv must have at least one frame \(dimension 1\)"):
        ops.temporal_attention(random_qkv(2, 0, 4, 3, 2, 8))
