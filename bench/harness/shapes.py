"""Directions, dtypes and the shapes at which ops are measured."""

from __future__ import annotations

import itertools
from collections import ChainMap
from collections.abc import Iterable

Shape = dict[str, int]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"
BF16, FP32 = "bfloat16", "float32"
THREADS = (1, 2)
"""Of torch, where ratios are measured on a CPU."""

BRANCHES = 3
"""Clean, masked and noised copies, which the model runs as one batch."""

REFERENCE: Shape = {"B": 32, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64}
"""The documents' reference shape; the width is D = H·d."""

PERCENT = 45
"""So many of a hundred tokens of a clip are masked, and as many noised."""

BATCHES: list[Shape] = [{"B": 32}, {"B": 16}, {"B": 64}]
FRAMES: list[Shape] = [{"T": 3}, {"T": 2}, {"T": 8}, {"T": 16}]
HEADS: list[Shape] = [{"H": 12, "d": 64}, {"H": 16, "d": 64}, {"H": 16, "d": 80}]
"""Heads and head dimension of ViT-B, L and H."""


def grid(reference: Shape, *axes: Iterable[Shape]) -> list[Shape]:
    """All combinations, ordered by how many sizes differ from the reference shape's.

    Args:
        reference: it comes first.
        axes: each a list of alternatives that set one or several sizes.
    """
    shapes = [reference]
    for parts in itertools.product(*axes):
        shape = reference | dict(ChainMap(*parts))
        if shape not in shapes:
            shapes.append(shape)

    def distance(shape: Shape) -> int:
        # d differs only where H does, or with it.
        return sum(shape[name] != size for name, size in reference.items() if name != "d")

    return sorted(shapes, key=distance)


def model_grid(reference: Shape) -> list[Shape]:
    """Every batch with every number of frames and every backbone's heads."""
    return grid(reference, BATCHES, FRAMES, HEADS)
