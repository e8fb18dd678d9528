"""Squared distances by matrix products, as near to the truth as from the differences of tokens.

d² = |x|² + |y|² − 2xy of centred tokens. A library may round the same product differently in
another place of the matrix, so d² is computed for one of (x, y) and (y, x) and taken for both.
Where d² is so small that it may be nothing but rounding, it is computed again from the difference:
equal tokens are at distance 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpose.ops.cpu import bags
from cmpose.ops.distances import INF, masked, own_where_missing, usable_tokens

MATRIX_TOKENS = 2048
"""Up to so many tokens a clip's d² are kept; beyond that memory is O(M · D)."""

BLOCK = 1024  # tokens against tokens at once, of longer clips
_PANEL = 64  # rows of a matrix that is kept: the half above the diagonal is computed
_CLIPS = 1 << 21  # distances that are computed at once, of as many clips as have so many
_CHANNELS = 1 << 17  # channels whose squares are in memory at once
_ONE_BY_ONE = 8  # the largest k for which the k smallest are searched one after another
_FOLD = 4  # size of a group of numbers, of which the smallest is compared first

_BITS = {torch.float32: (torch.int32, 2**23 - 1), torch.float64: (torch.int64, 2**52 - 1)}
"""The whole numbers of a dtype's width, and which of their bits are the mantissa's."""

_SOUND = {torch.float32: 2.0**125, torch.float64: 2.0**1021}
"""Squared norms up to which no d² overflows."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it products of float32 are float32's, whatever set_float32_matmul_precision says."""
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def centred(x: Tensor, usable: Tensor | None) -> Tensor:
    """The tokens [B, M, D] less about their mean, so that |x|² + |y|² − 2xy does not cancel.

    The mean of a channel is rounded to a multiple of the power of two that its spread is rounded up
    to: then the shift has so few bits that x − shift hardly ever rounds, and whole numbers stay
    whole. A channel of one value becomes 0. Tokens that are not ``usable`` do not count in it.
    """
    if usable is None:
        mean, low, high = x.mean(1, True), x.amin(1, True), x.amax(1, True)
    else:
        out = ~usable[..., None]
        mean = x.masked_fill(out, 0.0).sum(1, True) / usable.sum(1)[:, None, None].clamp(min=1)
        low, high = x.masked_fill(out, INF).amin(1, True), x.masked_fill(out, -INF).amax(1, True)
    whole, mantissa = _BITS[x.dtype]
    spread = (high - mean).maximum(mean - low).view(whole)
    spread = spread.add_(mantissa).bitwise_and_(~mantissa).view(x.dtype)
    shift = (mean / spread).round_().mul_(spread)
    shift = torch.where(low == high, high, shift).nan_to_num_(0.0, 0.0, 0.0)
    return x - shift


def keeps_matrix(tokens: Tensor) -> bool:
    """Whether clips' d² are kept; without a clip there is nothing to keep."""
    return tokens.shape[1] <= MATRIX_TOKENS or not len(tokens)


def rows_at_once(columns: int) -> int:
    """How many rows of so many distances are as many as a block has, or BLOCK."""
    return max(1, min(BLOCK, BLOCK * BLOCK // max(1, columns)))


class Distances:
    """d² of centred tokens [B, M, D], a block at a time."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        rows = x.flatten(0, 1)
        each = torch.arange(len(rows))
        self.norms = bags.dots(rows, rows, each, each).view(x.shape[:2])
        # A step of a product's sum loses at most half an ulp; 8 ulp stand for what is around it.
        self.loss = torch.finfo(x.dtype).eps * (x.shape[-1] / 2 + 8)
        self._numbers: Tensor | None = None

    def sound(self) -> bool:
        """Whether no d² overflows."""
        return bool((self.norms <= _SOUND[self.x.dtype]).all())

    def numbers(self) -> Tensor:
        """[B, M]: equal tokens, and only those, have the same number. Found when first wanted."""
        if self._numbers is None:
            flat = self.x.flatten(0, 1)
            self._numbers = flat.unique(dim=0, return_inverse=True)[1].view(self.x.shape[:2])
        return self._numbers

    def block(self, rows: Any, columns: Any, own: Tensor | None) -> Tensor:
        """d² between some tokens and others: [B, R, C].

        Args:
            rows, columns: slices or index tensors, of the same tokens in every clip.
            own: [R], the column that is the row's own token; None where no column is.
        """
        square = self._product(rows, columns)
        if own is not None:
            own = own[None, :, None].expand(len(square), -1, 1)
            square.scatter_(2, own, INF)
        self._check(square, rows, columns)
        return square if own is None else square.scatter_(2, own, 0.0)

    def _product(self, rows: Any, columns: Any) -> Tensor:
        """d² as the product rounds it: [B, R, C]."""
        square = self.norms[:, rows, None] + self.norms[:, None, columns]
        return square.baddbmm_(self.x[:, rows], self.x[:, columns].mT, alpha=-2)

    def _check(self, square: Tensor, rows: Any, columns: Any) -> None:
        """Computes d² again where it may be nothing but rounding; a token's own is infinite."""
        # (|x| + |y|)², which the error is relative to, is about 4 |x|² where d² is small beside it.
        suspects = square.amin(dim=2) <= 5 * self.loss * self.norms[:, rows]
        if bool(suspects.any()):
            sides = self.x[:, rows], self.x[:, columns], self.norms[:, rows], self.norms[:, columns]
            numbers = self.numbers()
            for some in suspects.nonzero().split(rows_at_once(square.shape[2])):
                self._mend(square, some, sides, (numbers[:, rows], numbers[:, columns]))

    def _mend(
        self,
        square: Tensor,
        suspects: Tensor,
        sides: tuple[Tensor, ...],
        numbers: tuple[Tensor, Tensor],
    ) -> None:
        """Computes d² again, in rows [n, 2] of (clip, row), where it is below its rounding.

        Between equal tokens, of which there may be very many, it is 0 without a computation.
        """
        left, right, of_left, of_right = sides
        clips, rows = suspects.unbind(1)
        bound = 2 * self.loss * (of_left[clips, rows][:, None] + of_right[clips])
        same = numbers[0][clips, rows][:, None] == numbers[1][clips]
        again = square[clips, rows].masked_fill_(same, 0.0)
        square[clips, rows] = again
        line, column = ((again <= bound) & ~same).nonzero().unbind(1)
        clips, rows = clips[line], rows[line]
        step = max(1, _CHANNELS // max(1, left.shape[-1]))
        for c, i, j in zip(clips.split(step), rows.split(step), column.split(step), strict=True):
            square[c, i, j] = (left[c, i] - right[c, j]).square().sum(dim=-1)

    def matrix(self) -> Tensor:
        """All of them, [B, M, M]; only the half above the diagonal is computed."""
        batch, size, _ = self.x.shape
        panels = -(-size // _PANEL)
        step = -(-size // panels)
        square = self.x.new_empty(batch, size, size)
        for start in range(0, size, step):
            stop = min(start + step, size)
            panel = self._product(slice(start, stop), slice(start, size))
            corner, rest = panel[:, :, : stop - start], panel[:, :, stop - start :]
            square[:, start:stop, stop:] = rest
            square[:, stop:, start:stop] = rest.mT
            torch.minimum(corner, corner.mT, out=square[:, start:stop, start:stop])
        own = square.diagonal(dim1=1, dim2=2)
        own.fill_(INF)
        # Of two that are mirrored both rows are looked at: where d² is small, norms are alike.
        self._check(square, slice(None), slice(None))
        own.fill_(0.0)
        return square

    def triangle(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks of [1, M, M] and their mirror images, for longer clips: (rows, columns, d²).

        The caller may write to them.
        """
        size = self.x.shape[1]
        step = -(-size // -(-size // BLOCK))
        parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        for n, rows in enumerate(parts):
            square = self.block(rows, rows, torch.arange(rows.stop - rows.start))
            yield rows, rows, torch.minimum(square, square.mT)
            for columns in parts[n + 1 :]:
                square = self.block(rows, columns, None)
                mirrored = square.mT.contiguous()
                yield rows, columns, square
                yield columns, rows, mirrored


class Clips(NamedTuple):
    """Some clips of tokens, ready for products."""

    distances: Distances
    finite: Tensor  # [B, M]
    usable: Tensor  # [B, M]: finite and valid
    every: bool  # all are usable

    @classmethod
    def of(cls, tokens: Tensor, valid: Tensor | None) -> Clips | None:
        """Of tokens [B, M, D] and ``valid`` [B, M]; None where a d² of finite tokens overflows."""
        wide = torch.promote_types(tokens.dtype, torch.float32)
        distances = Distances(centred(tokens.to(wide), valid))
        if distances.sound():  # then all are finite
            finite = torch.ones(tokens.shape[:2], dtype=torch.bool)
            return cls(distances, finite, finite if valid is None else valid, valid is None)
        x, finite, usable = usable_tokens(tokens, valid)
        distances = Distances(centred(x, usable))
        return cls(distances, finite, usable, False) if distances.sound() else None


def smallest(square: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and places of each row's k smallest, the values ascending.

    They are in the k groups of four with the smallest minima. For rows shorter than 64 k, which
    torch would partition as a whole, it is faster to choose these groups first.
    """
    size = square.shape[-1]
    groups = size // _FOLD
    if not (k < groups and size < 64 * k):
        return square.topk(k, dim=-1, largest=False)
    folded = square[..., : _FOLD * groups].unflatten(-1, (_FOLD, groups)).amin(dim=-2)
    best = smallest(folded, k)[1]
    rest = torch.arange(_FOLD * groups, size).expand(*best.shape[:-1], -1)
    places = torch.cat((*(best + n * groups for n in range(_FOLD)), rest), dim=-1)
    values, at = square.gather(-1, places).topk(k, dim=-1, largest=False)
    return values, places.gather(-1, at)


def smallest_values(square: Tensor, k: int) -> Tensor:
    """Each row's k smallest of d² [B, M, M], ascending."""
    values = _distinct(square, k)
    return smallest(square, k)[0] if values is None else values


def _distinct(square: Tensor, k: int) -> Tensor | None:
    """:func:`smallest_values` if these are finite and no two of a row are equal; else, and where
    topk is as fast, None.

    Floats from 0 on are in the order of their bits, read as whole numbers. Each step subtracts the
    last number found, plus one, modulo 2³¹: it and all below it become larger than the others, of
    which the least is the next number.
    """
    if square.dtype != torch.float32 or k > _ONE_BY_ONE or square.shape[2] >= 64 * k:
        return None
    if not square.numel():
        return None
    bits = square.view(torch.int32)
    least = [bits.amin(dim=2, keepdim=True)]
    for _ in range(k - 1):
        after = least[-1] + 1
        least.append((bits - after).bitwise_and_(2**31 - 1).amin(dim=2, keepdim=True).add_(after))
    values = torch.cat(least, dim=2).view(torch.float32)
    last = values[..., -1:]
    # In a row of fewer than k different numbers the last step ends at a negative one.
    lowest, highest = (float(bound) for bound in least[-1].view(torch.float32).aminmax())
    if k > 1 and not (lowest > 0 and highest < INF):
        return None
    return values if int((square <= last).count_nonzero()) == values.numel() else None


class Nearest(NamedTuple):
    """The nearest usable other tokens of every token of a clip."""

    square: Tensor  # [1, M, k]: d² ascending, infinite where there are fewer than k
    indices: Tensor  # [1, M, k] int64
    farthest: Tensor  # [1, M]: the largest d² to a usable token
    counts: Tensor  # [1, M] int64: those within a distance


def nearest_of_many(clips: Clips, k: int, within: float = -1.0) -> Nearest:
    """The k nearest of a long clip's tokens, in one pass over half of the blocks of d².

    ``within`` is the squared distance up to which tokens are counted.
    """
    d, usable = clips.distances, clips.usable
    size = usable.shape[1]
    square, index = d.x.new_full((1, size, k), INF), torch.zeros(1, size, k, dtype=torch.int64)
    farthest, counts = d.x.new_zeros(1, size), torch.zeros(1, size, dtype=torch.int64)
    for rows, columns, block in d.triangle():
        if clips.every:
            largest = block.amax(dim=2)
        else:
            out = ~usable[:, None, columns]
            largest = block.masked_fill(out, 0.0).amax(dim=2)
            block.masked_fill_(out | ~clips.finite[:, rows, None], INF)
        farthest[:, rows] = farthest[:, rows].maximum(largest)
        if rows == columns:
            block.diagonal(dim1=1, dim2=2).fill_(INF)
        if within >= 0:
            counts[:, rows] += (block <= within).sum(dim=2)
        values, places = block.topk(min(k, block.shape[2]), dim=2, largest=False)
        values = torch.cat((square[:, rows], values), dim=2)
        places = torch.cat((index[:, rows], places + columns.start), dim=2)
        square[:, rows], best = values.topk(k, dim=2, largest=False)
        index[:, rows] = places.gather(2, best)
    return Nearest(square, index, farthest, counts)


Rows = Callable[[Tensor, Tensor], Tensor]
"""Clips [n] and tokens [n] → their d² to all tokens of the clip, infinite to those that do not
count: [n, M]."""


def in_order(square: Tensor, index: Tensor, k: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """The first k of each token's nearest, in the order (d², index), equal ones included.

    Args:
        square, index: [B, M, more], d² ascending; ``more`` is above k unless these are all.
        k: how many.
        rows: gives what ``index`` does not hold of ties at its end.
    """
    last = square[..., k - 1]
    if square.shape[2] > k:
        clip, token = ((square[..., k] == last) & (last < INF)).nonzero().unbind(1)
        square, index = square[..., :k].clone(), index[..., :k].clone()
        step = rows_at_once(square.shape[1])
        for c, t in zip(clip.split(step), token.split(step), strict=True) if len(clip) else ():
            whole = rows(c, t)
            # A library may round these otherwise than the blocks that ``last`` is from.
            most = whole.topk(k, dim=1, largest=False).values[:, -1]
            index[c, t] = _first_places(whole, most, k)
            square[c, t] = whole.gather(1, index[c, t])
    if bool((square[..., 1:] > square[..., :-1]).all() and (square[..., -1] < INF).all()):
        return square, index  # nothing ties, and no neighbour is missing
    index, order = index.sort(dim=2)
    square, order = square.gather(2, order).sort(dim=2, stable=True)
    return square, own_where_missing(square, index.gather(2, order))


def _first_places(rows: Tensor, most: Tensor, k: int) -> Tensor:
    """Of rows [n, C] whose k-th smallest value is ``most`` [n], the places of the k smallest, of
    equal ones the first: [n, k], ascending."""
    most = most[:, None]
    less, same = rows < most, rows == most
    chosen = less | (same & (same.cumsum(1) <= k - less.sum(1, keepdim=True)))
    return chosen.nonzero()[:, 1].view(-1, k)


def neighbors(
    clips: Clips, k: int, include_self: bool, within: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d² [B, M, k] and indices of the nearest, and how many there are ``within`` a d²: [B, M]."""
    size = clips.usable.shape[1]
    if keeps_matrix(clips.usable):
        others = masked_matrix(clips, clips.distances.matrix(), include_self)
        nearest = nearest_of_few(others, k)
        return *nearest, (others <= within).sum(dim=2) if within >= 0 else nearest[1].new_empty(0)
    near = nearest_of_many(clips, min(k + 1, size), within)
    counts = near.counts + clips.usable if include_self and within >= 0 else near.counts
    return *nearest_in_order(clips, near, k, include_self), counts


def masked_matrix(clips: Clips, square: Tensor, include_self: bool) -> Tensor:
    """The matrix of d² with what does not count infinite; ``square`` itself if all does."""
    if not clips.every:
        return masked(square, clips.finite, clips.usable, include_self)
    if include_self:
        return square
    others = square.clone()
    others.diagonal(dim1=1, dim2=2).fill_(INF)
    return others


def nearest_of_few(others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """d² and indices [B, M, k] of the nearest, from a masked matrix."""
    if (values := _distinct(others, k)) is None:
        candidates = smallest(others, min(k + 1, others.shape[2]))
        return in_order(*candidates, k, lambda clip, token: others[clip, token])
    batch, rows, size = others.shape
    index = (others <= values[..., -1:]).flatten().nonzero().view(batch, rows, k)
    index -= torch.arange(0, batch * rows * size, size).view(batch, rows, 1)
    square, order = others.gather(2, index).sort(dim=2)
    return square, index.gather(2, order)


def nearest_in_order(
    clips: Clips, nearest: Nearest, k: int, include_self: bool
) -> tuple[Tensor, Tensor]:
    """d² and indices [1, M, k] of a long clip's nearest, of which ``nearest`` has k + 1 or all."""
    square, index = nearest.square, nearest.indices
    if include_self:
        own = torch.where(clips.usable, 0.0, INF)[..., None].to(square.dtype)
        tokens = torch.arange(square.shape[1])[None, :, None]
        square, index = torch.cat((own, square), dim=2), torch.cat((tokens, index), dim=2)

    def rows(_: Tensor, token: Tensor) -> Tensor:
        whole = clips.distances.block(token, slice(None), token)[0]
        whole.masked_fill_(~clips.usable, INF)  # of tokens that are not finite none is asked for
        return whole if include_self else whole.scatter_(1, token[:, None], INF)

    square, order = square.sort(dim=2, stable=True)  # the token itself may be no neighbour
    return in_order(square, index.gather(2, order), k, rows)


def clips_at_once(x: Tensor) -> list[slice]:
    """The clips of [B, M, D] in portions, so that the distances of one stay in a CPU's cache."""
    batch, size, _ = x.shape
    step = max(1, _CLIPS // size**2) if keeps_matrix(x) else 1
    return [slice(start, start + step) for start in range(0, max(batch, 1), step)]


def joined(results: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of all portions of the clips; those of one are not copied."""
    if len(results) == 1:
        return results[0]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
