"""What is not computed, for speed, because nobody reads it or stochastic depth drops it.

Some products of a training step need some rows of a tensor only, and how many they are is known
beforehand, so that shapes stay static and the host reads nothing:

- An auxiliary branch's loss reads the corrupted patch tokens, round(p·T·N) of a clip. Attention
  needs all tokens as keys, but what follows a pathway's last attention is token by token: its
  projection, the MLP and the linear map after ⊕ run on the tokens that are read (:class:`Reads`).
- Most tokens of a corrupted branch are the clean branch's, and masked ones are alike in all clips:
  the first projections of the criss-cross network run once for each that differs
  (:class:`Distinct`).
- Stochastic depth computes a residual branch for the samples that keep it, ⌊(1 − p)·B·T⌉ of them
  (:func:`add_for_kept`).

All are exact: ``tests/models/test_rows.py`` holds losses and gradients to those of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Read = Callable[[Tensor], Tensor]
"""Takes the tokens that are read out of [B, T, S, D]: → [..., D]."""


class _Take(torch.autograd.Function):
    """``x.index_select(0, rows)`` for rows that differ: the gradient is written, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = x.shape[0]
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return whole.index_copy(0, rows, gradient), None


class _Branch(torch.autograd.Function):
    """x, and ``x.index_select(0, rows)`` for rows that differ.

    As one function, the rows' gradient is added into x's: autograd would make a whole tensor of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Any:
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, of_x: Tensor, of_rows: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return of_x.index_copy(0, rows, of_x.index_select(0, rows) + of_rows), None


class _Join(torch.autograd.Function):
    """``x.index_add(0, rows, branch, alpha=scale)``, with ``x.index_select(0, rows)`` at hand."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Tensor, at_rows: Tensor, branch: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.scale = scale
        return x.index_copy(0, rows, torch.add(at_rows, branch, alpha=scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return gradient, None, None, gradient.index_select(0, rows) * ctx.scale, None


def take(x: Tensor, rows: Tensor) -> Tensor:
    """x [..., D], its leading dimensions as one, at ``rows`` [M] that differ: [M, D]."""
    return _Take.apply(x.flatten(0, -2), rows)


# -- stochastic depth -----------------------------------------------------------------------------


def kept_count(samples: int, rate: float) -> int:
    """⌊(1 − rate) · samples⌉, and at least 1: of how many samples a branch is computed."""
    return max(1, round((1.0 - rate) * samples))


def add_for_kept(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
    """``x + branch(x) · scale`` for the samples ``kept``, x alone for the others.

    scale = samples / kept, so that the expectation is that of keeping all.

    Args:
        x: [samples, ...].
        branch: treats every sample by itself and keeps the shape.
        kept: indices of samples that differ.
    """
    if len(kept) == len(x):
        return x + branch(x)
    rest, at_kept = _Branch.apply(x, kept)
    # The same rows are read by the branch and added to its result. The gradient of the sum reaches
    # them by _Join with that of all of x, and must not reach them a second time: so detach.
    return _Join.apply(rest, kept, at_kept.detach(), branch(at_kept), len(x) / len(kept))


# -- tokens that are read -------------------------------------------------------------------------


def everything(x: Tensor) -> Tensor:
    """All tokens are read."""
    return x


class Reads(NamedTuple):
    """Which tokens are read of the criss-cross network's, after the last attention of a stack.

    Attributes:
        between: of D_S(X), by the D_T that follows.
        first: of D_T(D_S(X)), with what ``between`` has left of its slots.
        second: of D_S(D_T(X)); the same tokens, in the same order.
    """

    between: Read = everything
    first: Read = everything
    second: Read = everything


ALL = Reads()


def corrupted_tokens(corrupted: Tensor, ratio: float) -> Tensor:
    """Where the corrupted tokens of ``corruption: exact`` are in each clip, ascending.

    [B, T, N] bool → [B, round(ratio·T·N)] in 0 .. T·N − 1.
    """
    flags = corrupted.flatten(1)
    order = flags.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return order[:, : round(ratio * flags.shape[1])]


def reads(
    shape: Sequence[int], patches: int, *, keypoints: bool, tokens: Sequence[Tensor] | None = None
) -> Reads:
    """What the temporal fusion and the auxiliary losses read of the branches.

    Args:
        shape: of the branches: R, B, T and S.
        patches: N, how many of a frame's S slots are patch tokens. They come first.
        keypoints: whether the keypoint tokens of the clean branch are read.
        tokens: for each auxiliary branch which of a clip's T·N patch tokens are read: [B, M]. None:
            all slots that are read of the clean branch are read of all.

    Returns:
        What takes them out of [R·B, T, S, D]: all branches' as [R·B, T, slots, D] or, with
        ``tokens``, the clean branch's and then each auxiliary one's in one list of rows, [rows, D].
    """
    slots = shape[3] if keypoints else patches

    def first_slots(x: Tensor) -> Tensor:
        return x[:, :, :slots]

    between = everything if keypoints else first_slots
    if tokens is None:
        return Reads(between, everything, between)

    def of(width: int) -> Read:
        index = torch.arange(math.prod(shape[:3]) * width, device=tokens[0].device)
        clean, *others = index.view(*shape[:3], width).unbind(0)
        rows = [clean[..., :slots].flatten()]
        for branch, chosen in zip(others, tokens, strict=True):
            rows.append(branch[..., :patches].flatten(1).gather(1, chosen).flatten())
        joined = torch.cat(rows)
        return lambda x: take(x, joined)

    second = of(shape[3])
    return Reads(between, second if keypoints else of(slots), second)


# -- tokens that differ ---------------------------------------------------------------------------


class Distinct(NamedTuple):
    """The tokens of the clean and the corrupted branches that differ.

    Attributes:
        tokens: [U, D]: the clean branch's; then for each corrupted branch what it has in place of
            the clean tokens: T·S that all clips share, or M for each clip.
        rows: [R, B, T, S] int64, which of them each token of the branches is.
        corrupted: for each corrupted branch [B, T, S] bool.
        own: for each corrupted branch where its tokens are in [B·T·S]; None if clips share them.
    """

    tokens: Tensor
    rows: Tensor
    corrupted: tuple[Tensor, ...]
    own: tuple[Tensor | None, ...]


def distinct_tokens(
    x: Tensor,
    corrupted: Sequence[Tensor],
    tokens: Sequence[Tensor],
    replacements: Sequence[Tensor | None],
) -> Distinct:
    """The tokens of the branches [R, B, T, S, D] that differ.

    Args:
        x: the branches; the first is clean, the others equal it but for corrupted tokens.
        corrupted: for each corrupted branch which of its patch tokens are, [B, T, N] bool.
        tokens: for each where they are among a clip's T·N, [B, M].
        replacements: for each [T, S, D], what stands in their places in every clip, or None where
            they differ from clip to clip.
    """
    clean, *branches = x.unbind()
    B, T, S, _ = clean.shape
    positions = torch.arange(B * T * S, device=x.device).view(B, T, S)
    parts, index, flags = [clean.flatten(0, 2)], [positions], []
    own: list[Tensor | None] = []
    count = B * T * S
    for branch, bad, chosen, shared in zip(branches, corrupted, tokens, replacements, strict=True):
        flags.append(torch.nn.functional.pad(bad, (0, S - bad.shape[2])))
        if shared is None:
            at = positions[..., : bad.shape[2]].flatten(1).gather(1, chosen).flatten()
            fresh = torch.arange(count, count + len(at), device=x.device)
            index.append(positions.flatten().index_copy(0, at, fresh).view_as(positions))
            parts.append(take(branch, at))
            own.append(at)
        else:
            fresh = torch.arange(count, count + T * S, device=x.device).view(T, S)
            index.append(torch.where(flags[-1], fresh, positions))
            parts.append(shared.flatten(0, 1))
            own.append(None)
        count += len(parts[-1])
    return Distinct(torch.cat(parts), torch.stack(index), tuple(flags), tuple(own))


class _Spread(torch.autograd.Function):
    """``rows[index]``: [U, E] → [R·B, T, S, E], for the ``rows`` of a :class:`Distinct`.

    A row's gradient is the sum over where it stands. It is written out because autograd would add
    it up row by row, which on a card has no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, *where: Tensor | None) -> Tensor:
        ctx.save_for_backward(*where)
        ctx.clips = index.shape[1]
        return rows.index_select(0, index.flatten()).view(-1, *index.shape[2:], rows.shape[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        where = ctx.saved_tensors
        corrupted, own = where[: len(where) // 2], where[len(where) // 2 :]
        clean, *branches = gradient.unflatten(0, (-1, ctx.clips)).unbind()
        parts = []
        for branch, flags, at in zip(branches, corrupted, own, strict=True):
            clean = torch.addcmul(clean, branch, (~flags)[..., None].to(branch.dtype))
            if at is None:  # a sum over clips, as products of [1, B] and [B, E]
                weights = flags.flatten(1).t().to(branch.dtype)[:, None]
                parts.append(torch.bmm(weights, branch.flatten(1, 2).transpose(0, 1)).squeeze(1))
            else:
                parts.append(branch.flatten(0, 2).index_select(0, at))
        return torch.cat([clean.flatten(0, 2), *parts]), None, *[None] * len(where)


def spread(rows: Tensor, distinct: Distinct) -> Tensor:
    """What was computed of ``distinct.tokens``, [U, E], for each token: [R·B, T, S, E]."""
    return _Spread.apply(rows, distinct.rows, *distinct.corrupted, *distinct.own)
