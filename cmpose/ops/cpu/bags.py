"""Weighted sums and products of rows, as torch has them for bags of embeddings: in one pass.

A bag is summed in the order of its indices, whatever the number of threads.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

_HAS_NUMPY = importlib.util.find_spec("numpy") is not None  # torch does without

_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward.default


def flat(index: Tensor, size: int) -> Tensor:
    """Indices of 0 .. size−1 in each clip as those of all clips in one list: [B, M] → [B·M]."""
    if len(index) == 1:
        return index[0].contiguous()
    return (index + torch.arange(0, len(index) * size, size)[:, None]).flatten()


def sorted_bags(bag: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each clip's bags, 0 .. count−1 [B, M]: all B·M members bag by bag, those of one in the
    order of their indices, and where each of the B·count bags starts in that list."""
    bags, number = flat(bag, count), len(bag) * count
    if number <= 2**15 and _HAS_NUMPY:
        # numpy sorts 16 bits by their digits, which is faster than comparing numbers.
        order = torch.from_numpy(bags.to(torch.int16).numpy().argsort(kind="stable"))
    else:
        order = bags.argsort(stable=True)
    return order, torch.searchsorted(bags, torch.arange(number), sorter=order)


def sums(rows: Tensor, order: Tensor, starts: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sums of rows [n, D], which ``order`` [m] lists bag by bag from ``starts`` on.

    ``weights`` [m] are in that order; without them all are 1.
    """
    options = False, 0, False  # no scaling by frequency, a sum, dense gradients
    return torch.embedding_bag(rows, order, starts, *options, weights)[0]


def dots(x: Tensor, y: Tensor, each: Tensor, of: Tensor) -> Tensor:
    """x_of(i) · y_i for each row of y [n, D]; ``each`` is 0 .. n−1."""
    return _dots(x, y, each, each, of, 0)
