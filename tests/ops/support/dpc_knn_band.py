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

PIECES = ("exact", "two")
"""How float32 tokens are split: into three bfloat16 pieces (nothing is lost), or into two."""


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


def centred_norms(tokens: Tensor, usable: Tensor) -> Tensor:
    """|x_i − c'| at most, c' being what the kernel subtracts: [M, D], [M] → [M] float64.

    As center_tokens in csrc/dpc_knn.cu has it, that is in each channel the usable tokens' mean,
    rounded to a multiple of the power of two that is their spread max |x − mean| rounded up (so up
    to about a spread away from the mean); for 16-bit tokens 0 where a token less that multiple
    would round; a channel's one value if there is but one. Where the float32 mean may round either
    way, the farther counts.
    """
    finite = tokens.isfinite().all(dim=-1)
    x = tokens.double().masked_fill(~finite[:, None], 0.0)
    if not bool(usable.any()):
        return x.norm(dim=-1)  # 0 is subtracted
    counted = x[usable]
    mean, low, high = counted.mean(dim=0), counted.amin(dim=0), counted.amax(dim=0)
    spread = (high - mean).maximum(mean - low)
    slack = (len(counted) + 8) * U * counted.abs().amax(dim=0)
    farthest = torch.zeros_like(x)
    for sign in (-1, 1):
        unit = (spread + sign * slack).clamp(min=2.0**-126).log2().ceil().exp2()
        for nudge in (-slack, slack):
            shift = torch.where(low == high, high, ((mean + nudge) / unit).round() * unit)
            if tokens.dtype in (torch.bfloat16, torch.float16):
                y = (x - shift).float()
                exact = (y.to(tokens.dtype).double() == y) & (y + shift.float() == x)
                shift = torch.where((exact | ~finite[:, None]).all(dim=0), shift, 0.0)
            farthest = farthest.maximum((x - shift).abs())
    return farthest.norm(dim=-1)


def square_error(tokens: Tensor, usable: Tensor, pieces: str = "exact") -> Tensor:
    """e_ij, the error bound of d²_ij before the scale: [M, D], [M] → [M, M] float64.

        e_ij = (u · (n + 8) + p) · (|x_i−c'| + |x_j−c'|)²

    with c' of :func:`centred_norms`. A dot product is a float32 sum of n steps, each of which loses
    at most u = 2⁻²³ of a partial sum, and a partial sum of x·y is at most |x| |y|; 8 more stand for
    the few float32 operations around it. Channels go 8 a step, as on the cards that take the
    shortest, D filled up to a multiple of 64: n = D_pad/8, and D_pad/4 for float32 tokens in three
    pieces, for which a second product goes into the same sum. p = 0, or 2⁻¹⁵ for what two pieces
    leave of a float32 token. (d² of equal tokens is exactly 0 all the same; callers see to that.)

    Args:
        tokens: in the dtype in which the kernel gets them.
        usable: which of them count for the centre.
        pieces: one of :data:`PIECES`; only float32 tokens are split.
    """
    assert pieces in PIECES, f"pieces must be one of {PIECES}, got {pieces!r}"
    steps = -(-max(tokens.shape[1], 1) // 64) * 64 / 8
    lost = 0.0
    if tokens.dtype == torch.float32:
        steps, lost = (steps, 2.0**-15) if pieces == "two" else (2 * steps, 0.0)
    norm = centred_norms(tokens, usable)
    return (U * (steps + 8) + lost) * (norm[:, None] + norm).square()


def _band(tokens: Tensor, finite: Tensor, usable: Tensor, pieces: str) -> _Band:
    same, square = exact_squares(tokens.double().masked_fill(~finite[:, None], 0.0))
    error = square_error(tokens, usable, pieces).masked_fill(same, 0.0)
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
        pieces: how float32 tokens were split, one of :data:`PIECES`.

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
        band = _band(tokens[b], finite[b], usable[b], pieces)
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
