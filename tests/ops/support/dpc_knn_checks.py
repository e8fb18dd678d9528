"""Two checks of dpc_knn's kernels; test_dpc_knn_checks.py plants the faults that they catch.

On a lattice (small whole numbers) every step up to the squared distances is exact in float32, in
any order of the sums. A kernel must then give the reference's bits, ties included; but for δ, which
may be off by an ulp because torch's square root is: :func:`assert_equals_reference`.

On other tokens a kernel errs a little in its squared distances, and two numbers that are closer
than that error may come in either order. :func:`assert_within_rounding` admits that and no more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import ClusterResult
from cmpose.ops.distances import squared_distances

INF = float("inf")
U = 2.0**-23
"""What one step of a float32 sum loses at most, relative: a tensor core truncates."""


def lattice(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, reach: int = 2, offset: int = 0
) -> Tensor:
    """[B, M, D] whole numbers from offset − reach to offset + reach.

    All that a kernel forms of the centred tokens stays below 2²⁴, where float32 holds every whole
    number: centring leaves at most 2 · reach, so |x|² + |y|² is at most 8 · D · reach².
    """
    assert 8 * shape[-1] * reach**2 < 2**24, "these tokens' sums do not fit float32"
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-reach, reach + 1, shape, generator=generator) + offset
    assert torch.equal(tokens.to(dtype).long(), tokens), f"{dtype} does not hold these tokens"
    return tokens.to(dtype)


def _score(result: ClusterResult) -> tuple[Tensor, Tensor]:
    """log ρ + log δ in float64, and what a kernel's float32 may be off by: a few ulp of the
    logarithm, δ's own rounding and that of the sum."""
    log_delta = result.delta.double().log()
    score = result.log_density.double() + log_delta
    slack = U * (4 * log_delta.abs() + score.abs() + 1)
    return score, slack.masked_fill(score == -INF, 0.0)


def assert_equals_reference(
    actual: ClusterResult, tokens: Tensor, k: int, num_clusters: int, **options: Any
) -> None:
    """``actual``, from tokens of :func:`lattice`, is the float32 reference's result.

    Raises:
        AssertionError: it is not; or the centres of these tokens hang on the rounding of a
            logarithm, so that another seed must be taken.
    """
    with ops.without_value_checks():
        expected = ops.dpc_knn(tokens.float(), k, num_clusters, backend="reference", **options)
    score, slack = _score(expected)
    best = score.topk(min(num_clusters + 1, score.shape[1])).values
    gap = best.diff(dim=1).abs()  # NaN between two that are −∞: a tie
    close = (gap > 0) & (gap <= 2 * slack.amax(dim=1, keepdim=True))
    assert not close.any(), "two scores of these tokens are too close: take another seed"
    for name, one, other in zip(ClusterResult._fields, actual, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=U if name == "delta" else 0, atol=0, msg=partial("{}: {}".format, name)
        )


def centred(tokens: Tensor) -> Tensor:
    """The tokens as the kernels of csrc/dpc_knn.cu shift them, in float64.

    A channel is shifted by its mean, rounded to a multiple of the power of two that is its spread
    max |x − mean| rounded up; by its one value if it has but one; and if it is of 16 bits, not at
    all where a shifted token would round.
    """
    x = tokens.double()
    mean, low, high = x.mean(1, keepdim=True), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    unit = (high - mean).maximum(mean - low).clamp(min=2.0**-126).log2().ceil().exp2()
    shift = torch.where(low == high, high, (mean / unit).round() * unit)
    if tokens.dtype != torch.float32:
        exact = (x - shift).to(tokens.dtype).double() == x - shift
        shift = shift * exact.all(dim=1, keepdim=True)
    return x - shift


def square_error(tokens: Tensor, pieces: int = 3) -> Tensor:
    """The bound of a kernel's error in d² before the scale: [B, M, D] → [B, M, M] float64.

        e_ij = (u · (n + 8) + p) · (|x_i| + |x_j|)²        of the centred tokens

    d² is |x_i|² + |x_j|² − 2 x_i·x_j. A product of two 16-bit numbers is exact; a dot product is a
    float32 sum of n steps, each of which loses at most u = 2⁻²³ of a partial sum, and a partial sum
    is at most |x_i| |x_j|. 8 more stand for the float32 operations around it. Tensor cores take 8
    channels a step (those that take the fewest), of D filled up to a multiple of 64: n = D_pad/8.
    Float32 tokens are split into three bfloat16 pieces, from which a second product goes into the
    same sum (n = D_pad/4, p = 0), or with TF32 allowed into two (p = 2⁻¹⁵, what those leave out).
    """
    steps, lost = -(-max(tokens.shape[2], 1) // 64) * 8, 0.0
    if tokens.dtype == torch.float32:
        steps, lost = (2 * steps, 0.0) if pieces == 3 else (steps, 2.0**-15)
    norm = centred(tokens).norm(dim=2)
    return (U * (steps + 8) + lost) * (norm[:, :, None] + norm[:, None]).square()


def _within(name: str, actual: Tensor, low: Tensor, high: Tensor) -> None:
    wrong = (~((actual >= low) & (actual <= high))).nonzero().tolist()
    if wrong:
        at = tuple(wrong[0])
        raise AssertionError(
            f"{name} is beyond rounding in {len(wrong)} of {actual.numel()}, first at {at}: "
            f"{actual[at]}, not from {low[at]} to {high[at]}"
        )


def assert_within_rounding(
    clusters: ClusterResult,
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    pieces: int = 3,
) -> None:
    """``clusters`` is dpc_knn's result for some d² within :func:`square_error` of the exact ones.

    Each number must lie between its values for the smallest and the largest such d². Each decision
    (the order of densities, the centres, a token's cluster) must be the one that ``clusters``'s own
    numbers ask for, unless the two that compete are within that bound of each other. Equal tokens
    are at d² = 0 exactly, and ties between them go by index.

    Raises:
        AssertionError: a number or decision is wrong.
    """
    size, width = tokens.shape[1:]
    unit = float(width) if scale else 1.0
    square = squared_distances(tokens.double())
    error = square_error(tokens, pieces).masked_fill(square == 0, 0.0)
    low, high = (square - error).clamp(min=0), square + error

    def mean_of_nearest(square: Tensor) -> Tensor:
        itself = torch.eye(size, dtype=torch.bool) & (not include_self)
        return square.masked_fill(itself, INF).topk(k, largest=False).values.mean(dim=2) / unit

    slack = (k + 3) * U / 2
    ends = -mean_of_nearest(high) * (1 + slack), -mean_of_nearest(low) * (1 - slack)
    _within("log_density", clusters.log_density, *ends)

    rank = clusters.log_density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    later = rank[:, None, :] >= rank[:, :, None]

    def nearest_earlier(square: Tensor) -> Tensor:
        peak = square.amax(dim=2)
        if peak_delta == "global_max":
            peak = peak.amax(dim=1, keepdim=True)
        nearest = square.masked_fill(later, INF).amin(dim=2)
        return (torch.where(rank == 0, peak, nearest) / unit).sqrt()

    ends = nearest_earlier(low) * (1 - 2 * U), nearest_earlier(high) * (1 + 2 * U)
    _within("delta", clusters.delta, *ends)

    # A centre's score is at least that of the centres behind it and of all tokens that are none.
    centers = clusters.centers
    apart = centers.sort(dim=1).values.diff(dim=1) > 0
    assert apart.all(), "centers: a token is one twice"
    score, slack = _score(clusters)
    rest = (score - slack).scatter(1, centers, -INF).amax(dim=1, keepdim=True)
    behind = torch.cat(((score - slack).gather(1, centers)[:, 1:], rest), dim=1)
    behind = behind.flip(1).cummax(dim=1).values.flip(1)
    best = (score + slack).gather(1, centers)
    _within("the score of centers", best, behind, torch.full_like(best, INF))

    own = clusters.assignment.gather(1, centers)
    assert (own == torch.arange(num_clusters)).all(), "assignment: a centre is in another's cluster"
    low, high = (s.gather(2, centers[:, None].expand(-1, size, -1)) for s in (low, high))
    mine = low.gather(2, clusters.assignment[..., None])[..., 0]
    mine = mine.scatter(1, centers, -1.0)  # a centre stays, equal tokens or not
    _within("d² to the centre of assignment", mine, torch.full_like(mine, -1), high.amin(dim=2))
