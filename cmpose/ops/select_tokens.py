"""Which tokens matter to which keypoint, and the split into causal and non-causal tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cmpose.ops import backends, checks


class SelectedTokens(NamedTuple):
    """What :func:`select_tokens` gives."""

    scores: Tensor
    """[B, K, N]: softmax of a keypoint's logits over the tokens."""
    importance: Tensor
    """[B, N]: mean or maximum of the scores over the keypoints."""
    causal: Tensor
    """[B, nK] int64: indices of the causal tokens, ascending."""
    noncausal: Tensor
    """[B, N−nK] int64: indices of the others, ascending."""


def select_tokens_reference(logits: Tensor, n: int, importance: str) -> SelectedTokens:
    """:func:`select_tokens` as it reads."""
    keypoints = logits.shape[1]
    scores = logits.to(checks.accumulator(logits)).softmax(dim=-1)
    s = scores.mean(dim=1) if importance == "mean" else scores.amax(dim=1)

    # The softmax keeps a row's order; its logits also tell apart scores that round alike.
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    best_rank = order.argsort(dim=-1).amin(dim=1)
    best_score = scores.detach().amax(dim=1)
    # Lexicographic: stable sorts, the last key first.
    by_score = best_score.argsort(dim=-1, descending=True, stable=True)
    by_rank = best_rank.gather(1, by_score).argsort(dim=-1, stable=True)
    chosen = by_score.gather(1, by_rank)
    causal = chosen[:, : n * keypoints].sort(dim=-1).values
    noncausal = chosen[:, n * keypoints :].sort(dim=-1).values
    return SelectedTokens(scores.to(logits.dtype), s.to(logits.dtype), causal, noncausal)


def select_tokens(
    logits: Tensor, n: int, *, importance: str = "mean", backend: str = "auto"
) -> SelectedTokens:
    """Scores S = softmax(logits), token importance s, and the nK causal tokens.

    A token's rank in a keypoint's row counts the tokens before it in (score descending, index
    ascending); its best rank is its smallest over the keypoints, its best score its largest. The
    nK tokens with the smallest (best rank, −best score, index) are causal: every keypoint's top n
    is among them, and their number is always the same.

    Args:
        logits: [B, K, N] floating point, keypoint against token.
        n: tokens a keypoint, ≥ 1; n·K ≤ N.
        importance: ``mean`` or ``max`` over the keypoints.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        :class:`SelectedTokens`; scores and importance in logits' dtype (computed in at least
        float32, which also ranks), with gradients to logits. The indices have none.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, n < 1, n·K > N, an unknown importance; on the CPU also NaN in
            logits. Elsewhere the split of a clip with NaN is some split.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("logits", logits, "B K N", sizes)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if n * sizes["K"] > sizes["N"]:
        raise ValueError(
            f"n·K must not exceed N, got n={n}, K={sizes['K']}, N={sizes['N']}: lower n"
        )
    checks.choice("importance", importance, ("mean", "max"))
    if checks.readable(logits) and bool(logits.isnan().any()):
        raise ValueError("logits must not be NaN")
    backends.choose("select_tokens", backend, logits.device)  # only the reference is there: check
    return select_tokens_reference(logits, n, importance)


backends.entry(select_tokens, "logits")
