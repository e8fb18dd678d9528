"""What Fine Token Enhancement did with a clip, as plain arrays that are drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tokens:
    """What Fine Token Enhancement did with a clip's N tokens.

    Attributes:
        grid: (rows, columns) of the tokens over the key frame; they count row by row.
        scores: [K, N], each keypoint's scores over the tokens.
        top: [K, n], each keypoint's causal tokens.
        causal: [nK], all causal tokens.
        noncausal: [N - nK], the other tokens.
        assignment: [N - nK], the cluster of each other token; None if they are discarded.
        centers: [L], the clusters' centres as indices into ``noncausal``; None if discarded.
    """

    grid: tuple[int, int]
    scores: np.ndarray
    top: np.ndarray
    causal: np.ndarray
    noncausal: np.ndarray
    assignment: np.ndarray | None = None
    centers: np.ndarray | None = None

    def check(self, num_keypoints: int) -> None:
        """Raises ValueError where shapes do not fit together or an index is out of range."""
        count = self.grid[0] * self.grid[1]
        if self.scores.shape != (num_keypoints, count):
            raise ValueError(
                f"tokens.scores must be [{num_keypoints}, {count}] for grid {self.grid}, got "
                f"{self.scores.shape}"
            )
        if self.top.ndim != 2 or len(self.top) != num_keypoints:
            raise ValueError(f"tokens.top must be [{num_keypoints}, n], got {self.top.shape}")
        indices = [("top", self.top, count), ("causal", self.causal, count)]
        indices.append(("noncausal", self.noncausal, count))
        if (self.assignment is None) != (self.centers is None):
            raise ValueError("tokens.assignment and .centers come together, give both or neither")
        if self.assignment is not None and self.centers is not None:
            if self.assignment.shape != self.noncausal.shape:
                raise ValueError(
                    f"tokens.assignment must have noncausal's shape {self.noncausal.shape}, "
                    f"got {self.assignment.shape}"
                )
            indices.append(("assignment", self.assignment, len(self.centers)))
            indices.append(("centers", self.centers, len(self.noncausal)))
        for name, index, limit in indices:
            if index.size and not (index.min() >= 0 and index.max() < limit):
                raise ValueError(
                    f"tokens.{name} must be in 0..{limit - 1}, got {index.min()}..{index.max()}"
                )
