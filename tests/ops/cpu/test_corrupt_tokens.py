"""corrupt_tokens on a CPU: the reference's bits, whatever is worked on at once."""

from __future__ import annotations

import math

import pytest
import torch

from cmpose import ops
from cmpose.ops.cpu import corrupt_tokens as cpu

SHAPES = [
    # B, T, N, K, D
    (2, 3, 7, 2, 10),
    (1, 1, 1, 1, 1),
    (0, 2, 4, 1, 8),
    (3, 2, 48, 15, 36),
]


@pytest.mark.parametrize("counters", [1, 1 << 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_references_bits(
    shape: tuple[int, ...], dtype: torch.dtype, counters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "_COUNTERS", counters)
    B, T, N, K, D = shape
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(B, T, N + 1, D, generator=generator).to(dtype)[:, :, :N]
    tokens[..., 0, :] = math.nan
    keypoints, position = torch.randn(K, D), torch.randn(T, N + K, D)
    for seed, selection, after in ((3, "exact", True), (-5, "bernoulli", False)):
        for embedding in (None, position):
            expected, actual = (
                ops.corrupt_tokens(
                    tokens, keypoints, embedding, seed=seed, noise_std=0.7, selection=selection,
                    position_after=after, first_clip=4, backend=backend,
                )
                for backend in ("reference", "cpu")
            )  # fmt: skip
            for name, a, b in zip(expected._fields, expected, actual, strict=True):
                assert b.is_contiguous()
                torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True, msg=name)
