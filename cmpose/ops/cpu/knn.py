"""Nearest neighbours by matrix products; see ``distances``."""

from __future__ import annotations

from torch import Tensor

from cmpose.ops.cpu.distances import Clips, clips_at_once, full_precision, joined, neighbors


def forward(
    tokens: Tensor, valid: Tensor | None, k: int, include_self: bool, within: float
) -> tuple[Tensor, ...] | None:
    """d² and indices of the nearest [B, M, k], and how many have d² ≤ ``within`` [B, M]; None where
    finite tokens are too far apart for d²."""
    results = []
    with full_precision():
        for some in clips_at_once(tokens):
            clips = Clips.of(tokens[some], None if valid is None else valid[some])
            if clips is None:
                return None
            results.append(neighbors(clips, k, include_self, within))
    return joined(results)
