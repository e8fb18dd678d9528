"""The checks of dpc_knn's kernels take what is right and refuse every planted fault."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import ClusterResult
from cmpose.ops.distances import squared_distances
from tests.ops.support.dpc_knn_checks import (
    U,
    assert_equals_reference,
    assert_within_rounding,
    centred,
    lattice,
    square_error,
)

K, L = 5, 10


def random_tokens(
    size: int = 60, width: int = 32, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Two clips of Gaussian tokens, each of its own scale, so that densities differ."""
    generator = torch.Generator().manual_seed(seed)
    scale = 1 + torch.rand(2, size, 1, generator=generator)
    return (torch.randn(2, size, width, generator=generator) * scale).to(dtype)


def reference(tokens: Tensor, k: int = K, **options: Any) -> ClusterResult:
    return ops.dpc_knn(tokens, k, L, backend="reference", **options)


def from_squares(square: Tensor, tokens: Tensor) -> ClusterResult:
    """The reference's result for these d² [B, M, M]."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            squared_distances.__globals__, "squared_distances", lambda x: square.to(x.dtype)
        )
        return reference(tokens)


def ties_by_the_larger_index(tokens: Tensor) -> ClusterResult:
    density, delta, centers, assignment = reference(tokens.flip(1))
    return ClusterResult(
        density.flip(1), delta.flip(1), tokens.shape[1] - 1 - centers, assignment.flip(1)
    )


def changed(name: str, change: Callable[[Tensor, ClusterResult], Any], tokens: Tensor) -> Any:
    """The right result but for ``change`` to the first clip of one of its tensors."""
    right = reference(tokens)
    value = getattr(right, name).clone()
    change(value[0], right)
    return right._replace(**{name: value})


def swap(value: Tensor, right: ClusterResult) -> None:
    value[:2] = value[[1, 0]]


def swap_two_labels(value: Tensor, right: ClusterResult) -> None:
    value.copy_(torch.where(value < 2, 1 - value, value))


def move_one_token(value: Tensor, right: ClusterResult) -> None:
    free = next(i for i in range(len(value)) if i not in right.centers[0].tolist())
    value[free] = (value[free] + 1) % L


def take_the_next_best(value: Tensor, right: ClusterResult) -> None:
    value[-1] = (right.log_density + right.delta.log())[0].argsort(descending=True, stable=True)[L]


FAULTS: dict[str, Callable[[Tensor], ClusterResult]] = {
    "k + 1": lambda x: reference(x, K + 1),
    "k - 1": lambda x: reference(x, K - 1),
    "the token itself is left out": partial(reference, include_self=False),
    "the peak's δ is the clip's largest distance": partial(reference, peak_delta="global_max"),
    "no division by √D": partial(reference, scale=False),
    "division by D": lambda x: reference(x / x.shape[2] ** 0.5),
    "ties by the larger index": ties_by_the_larger_index,
    "two centres swapped": partial(changed, "centers", swap),
    "a centre twice": partial(changed, "centers", lambda v, right: v[-1:].copy_(v[:1])),
    "the best is left out for the next": partial(changed, "centers", take_the_next_best),
    "two labels swapped": partial(changed, "assignment", swap_two_labels),
    "one token in another cluster": partial(changed, "assignment", move_one_token),
    "one log ρ": partial(changed, "log_density", lambda v, right: v[7].mul_(1 + 1e-3)),
    "one log ρ is no number": partial(changed, "log_density", lambda v, right: v[7].log_()),
    "one δ": partial(changed, "delta", lambda v, right: v[7].add_(1e-3)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_on_a_lattice(fault: str) -> None:
    tokens = lattice(2, 60, 6, seed=1)
    assert_equals_reference(reference(tokens), tokens, K, L)
    with pytest.raises(AssertionError, match=r"not equal|not close"):
        assert_equals_reference(FAULTS[fault](tokens), tokens, K, L)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_refused_beyond_rounding(fault: str) -> None:
    """Of random tokens too, a quarter of which are there twice."""
    tokens = random_tokens()[:, torch.arange(75) % 60]
    assert_within_rounding(reference(tokens), tokens, K, L)
    with pytest.raises(AssertionError, match=r"is beyond rounding in \d|^centers|^assignment"):
        assert_within_rounding(FAULTS[fault](tokens), tokens, K, L)


def test_one_bit_on_a_lattice() -> None:
    tokens = lattice(2, 60, 6, seed=1)
    for name, ulps in (("log_density", 1), ("delta", 2)):
        off = changed(name, lambda v, right, ulps=ulps: v[9].mul_(1 + ulps * U), tokens)
        with pytest.raises(AssertionError, match=rf"(?s){name}: .*elements: 1 / 120"):
            assert_equals_reference(off, tokens, K, L)
    with pytest.raises(AssertionError, match=r"delta: .*dtype"):
        assert_equals_reference(reference(tokens)._replace(delta=off.delta.double()), tokens, K, L)


def test_tokens_that_are_not_fit() -> None:
    with pytest.raises(AssertionError, match="do not fit float32"):
        lattice(1, 4, 64, reach=300)
    with pytest.raises(AssertionError, match="bfloat16 does not hold these tokens"):
        lattice(1, 40, 3, dtype=torch.bfloat16, offset=1000)
    close = torch.tensor([[0.0], [1], [2 + 2**-22], [3], [9]])[None]
    with pytest.raises(AssertionError, match="too close: take another seed"):
        assert_equals_reference(ops.dpc_knn(close, 2, 3), close, 2, 3)


# -- the bound ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_the_limit(seed: int) -> None:
    """Any error within the bound is admitted, 30 times as much is not.

    That the kernels stay within it is shown by tests/csrc/test_dpc_knn.py, where tests/cuda_on_cpu
    truncates sums as tensor cores do.
    """
    tokens = random_tokens(192, 256, seed, torch.bfloat16)
    exact = squared_distances(tokens.double())
    sign = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed)).sign().triu(1)
    error = square_error(tokens) * (sign + sign.mT)
    assert_within_rounding(from_squares(exact + 0.99 * error, tokens), tokens, K, L)
    right, wrong = reference(tokens), from_squares(exact + 30 * error, tokens)
    for part, name in ((wrong, "log_density"), (right._replace(delta=wrong.delta), "delta")):
        with pytest.raises(AssertionError, match=f"^{name} is beyond rounding"):
            assert_within_rounding(part, tokens, K, L)


def test_the_bound_is_the_formula() -> None:
    # Spreads 3 and 5: multiples of 4 and 8, to which the means 0 and 1 are rounded: 0 and 0.
    x = torch.tensor([[[3.0, 1.0], [-3.0, 1.0], [0.0, 6.0], [0.0, -4.0]]])
    square = (10**0.5 + 6) ** 2
    for dtype, pieces, factor in (
        (torch.float32, 3, U * (16 + 8)),
        (torch.float32, 2, U * (8 + 8) + 2**-15),
        (torch.bfloat16, 1, U * (8 + 8)),
    ):
        error = square_error(x.to(dtype), pieces)[0, 0, 2]
        assert float(error) == pytest.approx(factor * square, rel=1e-12)
    # Mean 102.25 and spread 2.75: 104. One value: itself. Mean 107.9 and spread 104.4: 128, but
    # for bfloat16 nothing, because 8 bits do not hold 3.515625 − 128.
    x = torch.tensor([[[100.0, 7, 128], [102, 7, 200], [102, 7, 3.515625], [105, 7, 100]]])
    for dtype, third in ((torch.float32, 128.0), (torch.bfloat16, 0.0)):
        assert torch.equal(centred(x.to(dtype)), x.double() - torch.tensor([104, 7, third]))
