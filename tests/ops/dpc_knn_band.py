"""Whether a dpc_knn that errs a little in its squared distances is right otherwise.

A kernel forms d²_ij = |x_i−c'|² + |x_j−c'|² − 2 (x_i−c')·(x_j−c') from products that are exact and
a float32 sum that is not. Rankings then differ from the float64 ones where two numbers are closer
than that error, and may differ nowhere else. :func:`assert_clusters_within_band` holds a result to
that; test_dpc_knn_band.py plants what it catches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import ClusterResult

INF = float("inf")
U = 2.0**-23
"""What one step of a float32 sum loses, relative: a tensor core truncates."""

PIECES = {"exact": 0.0, "two": 2.0**-15}
"""What is lost before the sums: nothing (bfloat16, float16, and float32 as three bfloat16 pieces),
or what two bfloat16 pieces leave of a float32 token."""


class NearTies(NamedTuple):
    """How many decisions the error bound leaves open, over all clips."""

    order: int
    """Tokens whose δ depends on the order of two tokens with log ρ as good as equal."""
    centers: int
    """Centres whose score is as good as another token's."""
    assignment: int
    """Tokens with two centres as good as equally near."""
    certain: int
    """Clips of which no decision is open; their clusters are the float64 reference's."""


class _Band(NamedTuple):
    """One clip's squared distances before the scale, and between what they may lie."""

    same: Tensor  # [M, M] bool: equal tokens
    low: Tensor  # [M, M] float64
    high: Tensor


def usable_tokens(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """[B, M, D] → [B, M] bool: valid, and numbers throughout."""
    finite = tokens.isfinite().all(dim=-1)
    return finite if valid is None else finite & valid


def exact_squares(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, D] float64 → which tokens are equal, and d² [M, M].

    Equal tokens have equal rows, bit for bit, and are at exactly 0 from each other.
    """
    one, index = x.unique(dim=0, return_inverse=True)
    one = one - one.mean(dim=0)
    norm = one.square().sum(dim=-1)
    gram = one @ one.T
    square = (norm[:, None] + norm - (gram + gram.T)).clamp(min=0)
    square.fill_diagonal_(0)
    return index[:, None] == index, square[index][:, index]


def square_error(
    x: Tensor, usable: Tensor, *, pieces: str = "exact", center: Tensor | None = None
) -> Tensor:
    """e_ij, the error bound of d²_ij before the scale: [M, D] float64, [M] → [M, M].

    A dot product of D channels is D_pad/16 steps (D_pad: D rounded up to 64, 16 channels a step),
    each of which loses at most u = 2⁻²³ of a partial sum; 8 more stand for the float32 operations
    around it. A partial sum of x·y is at most |x| |y| (Cauchy-Schwarz), so that with c' the centre
    that is subtracted

        e_ij = (u · (D_pad/16 + 8) + p) · (|x_i−c'| + |x_j−c'|)²,  p = 0, or 2⁻¹⁵ for two pieces.

    Without ``center`` all that is known of c' is that it is no farther from the usable tokens' mean
    c than a token, |c'−c| ≤ R = max |x_j−c|, or that it is c with 0 in channels whose mean is
    smaller than their spread, |c_d| ≤ s_d = max_j |x_jd−c_d|. Then

        e_ij = (u · (D_pad/16 + 8) + p) · (A_i + A_j),
        A_i = max((|x_i−c| + R)², Σ_d (|x_id−c_d| + |c_d| where |c_d| ≤ s_d)²).

    That suffices, although (|x_i−c'| + |x_j−c'|)² may be twice the sum of the squares: where the
    product is positive, truncation loses on both sides of the difference, and the sum of squares
    bounds it; where it is negative, c' lies in the ball on the diameter from x_i to x_j, and the
    sum of squares is at most d²_ij ≤ (A_i + A_j)/2. For tokens of equal norm it is 4 times the
    bound for c' = c. Equal tokens have e_ij = 0 throughout.

    Args:
        x: the tokens, as the kernel gets them, finite.
        usable: which of them count for the centre.
        pieces: one of :data:`PIECES`.
        center: [D], c', where it is known.
    """
    padded = -(-x.shape[1] // 64) * 64
    factor = U * (padded / 16 + 8) + PIECES[pieces]
    if center is not None:
        norm = (x - center.to(x)).norm(dim=-1)
        return factor * (norm[:, None] + norm).square()
    if not usable.any():
        return torch.zeros(len(x), len(x), dtype=x.dtype)
    mean = x[usable].mean(dim=0)
    away = (x - mean).abs()
    norm = away.norm(dim=-1)
    shift = torch.where(mean.abs() <= away[usable].amax(dim=0), mean.abs(), 0.0)
    reach = torch.maximum(norm + norm[usable].max(), (away + shift).norm(dim=-1)).square()
    return factor * (reach[:, None] + reach)


def _band(x: Tensor, usable: Tensor, pieces: str, center: Tensor | None) -> _Band:
    same, square = exact_squares(x)
    error = square_error(x, usable, pieces=pieces, center=center).masked_fill(same, 0.0)
    return _Band(same, (square - error).clamp(min=0), square + error)


def _hold(right: Tensor, what: str, **numbers: Tensor) -> None:
    """Raises for the first element of ``right`` that is False, with its numbers."""
    if not bool(right.all()):
        wrong = (~right).nonzero()
        at = tuple(wrong[0].tolist())
        told = ", ".join(f"{name} {value.expand_as(right)[at]}" for name, value in numbers.items())
        raise AssertionError(f"{what}: {len(wrong)} of {right.numel()}, the first {at}: {told}")


def _between(found: Tensor, low: Tensor, high: Tensor, what: str) -> None:
    _hold((found >= low) & (found <= high), what, found=found, low=low, high=high)


class _Clip:
    """One clip's result and band; a method a rule."""

    def __init__(
        self,
        found: ClusterResult,
        band: _Band,
        usable: Tensor,
        finite: Tensor,
        k: int,
        unit: float,
        include_self: bool,
        peak_delta: str,
    ) -> None:
        self.log_density, self.delta = found.log_density.double(), found.delta.double()
        self.centers, self.assignment = found.centers, found.assignment
        self.eps = torch.finfo(found.log_density.dtype).eps
        self.band, self.usable, self.finite = band, usable, finite
        self.k, self.unit = k, unit
        self.include_self, self.peak_delta = include_self, peak_delta
        self.index = torch.arange(len(usable))

    # -- log ρ and δ -----------------------------------------------------------------------------

    def density_range(self) -> tuple[Tensor, Tensor]:
        """Eq. 9 is monotone in every distance: its ends are those of the smallest and largest."""

        def negative(square: Tensor) -> Tensor:
            near = square.masked_fill(~self.usable, INF)
            if not self.include_self:
                near = near.masked_fill(torch.eye(len(near), dtype=torch.bool), INF)
            near = near.topk(self.k, dim=-1, largest=False).values
            count = (near < INF).sum(dim=-1).clamp(min=1)
            return near.masked_fill(near == INF, 0.0).sum(dim=-1) / (count * self.unit)

        rounding = (self.k + 3) * self.eps / 2
        low = -negative(self.band.high) * (1 + rounding)
        high = -negative(self.band.low) * (1 - rounding)
        return low.masked_fill(~self.usable, -INF), high.masked_fill(~self.usable, -INF)

    def _nearest(self, among: Tensor, square: Tensor) -> Tensor:
        return square.masked_fill(~among, INF).amin(dim=-1)

    def _peak(self, square: Tensor) -> Tensor:
        far = square.masked_fill(~(self.usable[:, None] & self.usable), 0.0).amax(dim=-1)
        return far if self.peak_delta == "row_max" else far.max().expand_as(far)

    def _distance(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Squares before the scale to the δ they may round to."""
        low, high = ((s.masked_fill(~self.usable, 0.0) / self.unit).sqrt() for s in (low, high))
        return low * (1 - 2 * self.eps), high * (1 + 2 * self.eps)

    def check_density(self) -> None:
        _between(self.log_density, *self.density_range(), "log ρ is out of its band")
        twins = self.band.same & self.usable[:, None] & self.usable
        _hold(
            ~twins | (self.log_density[:, None] == self.log_density),
            "equal tokens have different log ρ",
            one=self.log_density[:, None],
            other=self.log_density,
        )

    def check_delta(self) -> None:
        """Eq. 10 along the result's own order of log ρ, ties by index."""
        order = self.log_density.argsort(descending=True, stable=True)
        rank = order.argsort()
        earlier = (rank[None, :] < rank[:, None]) & self.usable
        first = self.usable & ~earlier.any(dim=-1)
        ends = (
            torch.where(first, self._peak(square), self._nearest(earlier, square))
            for square in (self.band.low, self.band.high)
        )
        _between(self.delta, *self._distance(*ends), "δ does not follow from the order of log ρ")

    # -- centres ---------------------------------------------------------------------------------

    def _rounding(self, log_delta: Tensor, score: Tensor) -> Tensor:
        """What a score may lose: a few ulp of the logarithm, δ's own rounding, and the sum's."""
        allowed = self.eps * (4 * log_delta.abs() + score.abs() + 1)
        return allowed.masked_fill(score == -INF, 0.0)

    def check_centers(self) -> None:
        """The largest log ρ + log δ of the result's own numbers, exact ties by index."""
        log_delta = self.delta.log()
        score = self.log_density + log_delta
        rounding = self._rounding(log_delta, score)
        place = torch.full_like(self.index, len(self.centers))
        place[self.centers] = torch.arange(len(self.centers))
        _hold(
            place[self.centers] == torch.arange(len(self.centers)),
            "a token is a centre twice",
            token=self.centers,
        )
        c = self.centers[:, None]
        behind = place[None, :] > place[c]
        tie = (score[c] == -INF) & (score == -INF)
        tie |= (self.log_density[c] == self.log_density) & (self.delta[c] == self.delta)
        better = torch.where(tie, self.index < c, score - rounding > score[c] + rounding[c])
        better = (self.usable & ~self.usable[c]) | ((self.usable == self.usable[c]) & better)
        _hold(
            ~(behind & better),
            "a centre is before a token with a larger score, or a tie with a smaller index",
            center=c,
            score=score[c],
            token=self.index,
            its_score=score,
        )

    # -- assignment ------------------------------------------------------------------------------

    def check_assignment(self) -> None:
        real = self.usable[self.centers]
        count = len(self.centers)
        place = torch.arange(count)
        own = self.assignment[self.centers]
        _hold(~real | (own == place), "a centre is not in its own cluster", cluster=own)
        cannot = ~self.finite | ~real.any()
        _hold(
            ~cannot | (self.assignment == 0),
            "a token that is at no distance from any centre is not in cluster 0",
            cluster=self.assignment,
        )
        free = ~cannot
        free[self.centers[real]] = False
        if not bool(free.any()):
            return
        at = self.assignment[free]
        _hold(real[at], "a token is in an invalid centre's cluster", cluster=at)
        low = self.band.low[free].gather(1, self.centers[at][:, None])
        high = self.band.high[free][:, self.centers]
        before = place < at[:, None]
        # A tie goes to the centre that comes first: behind one, a token must be nearer.
        twin = self.band.same[self.centers[at]][:, self.centers]
        lost = torch.where(before, (high <= low) | twin, high < low) & real
        lost &= place != at[:, None]
        _hold(
            ~lost,
            "a token is not with its nearest centre (token's place among those free, cluster)",
            token=self.index[free][:, None],
            cluster=at[:, None],
            its_square_at_least=low,
            other=place,
            other_square_at_most=high,
        )

    # -- what is open ----------------------------------------------------------------------------

    def near_ties(self) -> NearTies:
        """The decisions that another result within the band could take otherwise."""
        low, high = self.density_range()
        fixed = (low == high)[:, None] & (low[:, None] == high) & (low == high)
        tie = self.band.same | fixed
        # [i, j]: j comes before i, certainly or possibly.
        certainly = torch.where(tie, self.index < self.index[:, None], low > high[:, None])
        certainly &= self.usable
        possibly = ~certainly.T & self.usable
        possibly.fill_diagonal_(False)
        nearest = self._nearest(certainly, self.band.high)
        open_order = possibly & ~certainly & (self.band.low <= nearest[:, None])
        order = open_order.any(dim=-1) & self.usable

        none, any_ = ~certainly.any(dim=-1), possibly.any(dim=-1)
        least = self._nearest(possibly, self.band.low)
        peak = self._peak(self.band.low), self._peak(self.band.high)
        least = torch.where(none, torch.where(any_, least.minimum(peak[0]), peak[0]), least)
        most = torch.where(none, peak[1], nearest)
        scores = []
        for density, delta, sign in zip(
            (low, high), self._distance(least, most), (-1, 1), strict=True
        ):
            score = density + delta.log()
            scores.append(score + sign * self._rounding(delta.log(), score))
        low, high = scores
        c = self.centers[self.usable[self.centers], None]
        overlap = (low <= high[c]) & (low[c] <= high) & self.usable
        overlap &= ~((high == -INF) & (high[c] == -INF)) & (self.index != c)

        real = self.centers[self.usable[self.centers]]
        to_low, to_high = self.band.low[:, real], self.band.high[:, real]
        # Of equal centres the first takes all: only it competes.
        twins = self.band.same[real][:, real].tril(-1).any(dim=-1)
        to_low = to_low.masked_fill(twins, INF)
        rivals = to_low <= to_high.cummin(dim=-1).values[:, -1:]  # none without a centre
        open_assignment = (rivals.sum(dim=-1) > 1) & self.finite
        open_assignment[real] = False
        found = int(order.sum()), int(overlap.any(dim=-1).sum()), int(open_assignment.sum())
        return NearTies(*found, certain=int(not any(found)))


def assert_clusters_within_band(
    found: ClusterResult,
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    valid: Tensor | None = None,
    pieces: str = "exact",
    center: Tensor | None = None,
) -> NearTies:
    """``found`` is dpc_knn's result up to near-ties within the error bound of d².

    Everything is computed in float64 from the tokens as they are. Held are

    - log ρ: between its values for the smallest and the largest distances within the bound
      (:func:`square_error`), with k + 3 roundings; bitwise equal for equal tokens;
    - δ: the same of Eq. 10, along the order of the log ρ found (ties by index); exactly 0 behind an
      equal token;
    - ``centers``: the largest log ρ + log δ of the numbers found, up to a few ulp of a logarithm;
      exact ties by index; invalid tokens last;
    - ``assignment``: a valid centre in its own cluster; every other token with a valid centre that
      is nearest within the bound, the first of equal ones; in cluster 0 if it holds a NaN or
      infinity or no centre is valid;
    - for a clip in which no decision is within the bound: centers and assignment exactly those of
      the float64 reference.

    Args:
        found: the result under test, on the CPU.
        tokens: [B, M, D], what it was computed from, and so
        k, num_clusters, scale, include_self, peak_delta, valid: as dpc_knn takes them.
        pieces: what the kernel's products lose, one of :data:`PIECES`.
        center: [B, D], what the kernel subtracts from tokens, where that is known: a tighter bound.

    Raises:
        AssertionError: with the clip, the rule that is broken, and the numbers.
    """
    batch, size, width = tokens.shape
    kind = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    forms = {
        "log_density": ((batch, size), kind),
        "delta": ((batch, size), kind),
        "centers": ((batch, num_clusters), torch.int64),
        "assignment": ((batch, size), torch.int64),
    }
    for name, form in forms.items():
        value = getattr(found, name)
        assert (value.shape, value.dtype) == form, (
            f"{name} is {list(value.shape)} {value.dtype}, not {list(form[0])} {form[1]}"
        )
    for name, limit in (("centers", size), ("assignment", num_clusters)):
        value = getattr(found, name)
        _hold((value >= 0) & (value < limit), f"{name} out of range", found=value)
    usable, finite = usable_tokens(tokens, valid), tokens.isfinite().all(dim=-1)
    total = NearTies(0, 0, 0, 0)
    for b in range(batch):
        x = tokens[b].double().masked_fill(~finite[b, :, None], 0.0)
        band = _band(x, usable[b], pieces, None if center is None else center[b])
        clip = _Clip(
            ClusterResult(*(part[b] for part in found)),
            band,
            usable[b],
            finite[b],
            k,
            float(max(width, 1)) if scale else 1.0,
            include_self,
            peak_delta,
        )
        try:
            clip.check_density()
            clip.check_delta()
            clip.check_centers()
            clip.check_assignment()
            ties = clip.near_ties()
            if ties.certain:
                _assert_is_reference(
                    found, b, tokens, usable, k, num_clusters, scale, include_self, peak_delta
                )
        except AssertionError as wrong:
            raise AssertionError(f"clip {b}: {wrong}") from None
        total = NearTies(*(a + b for a, b in zip(total, ties, strict=True)))
    return total


def _assert_is_reference(
    found: ClusterResult,
    b: int,
    tokens: Tensor,
    usable: Tensor,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
) -> None:
    clip = slice(b, b + 1)
    with ops.without_value_checks():
        truth = ops.dpc_knn(
            tokens[clip].double(),
            k,
            num_clusters,
            scale=scale,
            include_self=include_self,
            peak_delta=peak_delta,
            valid=usable[clip],
            backend="reference",
        )
    for name in ("centers", "assignment"):
        one, other = getattr(found, name)[b], getattr(truth, name)[0]
        _hold(
            one == other,
            f"{name} of a clip without near-ties differ from the float64 reference's",
            found=one,
            reference=other,
        )
