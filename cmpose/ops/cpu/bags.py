"""Weighted sums and products of rows, as torch has them for bags of embeddings: in one pass.

A bag is summed in the order of its indices, whatever the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

_dots = torch.ops.aten._embedding_bag_per_sample_weights_backward.default


def sums(rows: Tensor, order: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows [n, D], which ``order`` [m] lists bag by bag from ``starts`` on.

    ``weights`` [m] are in that order.
    """
    options = False, 0, False  # no scaling by frequency, a sum, dense gradients
    return torch.embedding_bag(rows, order, starts, *options, weights)[0]


def dots(x: Tensor, y: Tensor, of: Tensor | None = None) -> Tensor:
    """x_of(i) · y_i for each row of y [n, D]; without ``of`` x_i · y_i."""
    each = torch.arange(len(y))
    return _dots(x, y, each, each, each if of is None else of, 0)
