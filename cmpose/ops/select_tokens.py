"""Which tokens matter to which keypoint, and the split into causal and non-causal tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpose.ops import backends, checks, cuda, library

MAX_SHARED = 101_376
"""Bytes of shared memory of a block on the cards that have the least, such as the RTX 4090."""


class SelectedTokens(NamedTuple):
    """Result of :func:`select_tokens`."""

    scores: Tensor
    """[B, K, N]: softmax of each keypoint's logits over the tokens."""
    importance: Tensor
    """[B, N]: mean or maximum of the scores over the keypoints."""
    causal: Tensor
    """[B, nK] int64: indices of the causal tokens, ascending."""
    noncausal: Tensor
    """[B, N−nK] int64: indices of the others, ascending."""


# -- reference ------------------------------------------------------------------------------------


def select_tokens_reference(logits: Tensor, n: int, importance: str) -> SelectedTokens:
    """:func:`select_tokens` in plain PyTorch."""
    keypoints = logits.shape[1]
    scores = logits.to(checks.accumulator(logits)).softmax(dim=-1)
    s = scores.mean(dim=1) if importance == "mean" else scores.amax(dim=1)

    # Logits have the order of their scores, and differ where scores round to the same number.
    order = logits.detach().argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[2], device=order.device).expand_as(order)
    best_rank = torch.empty_like(order).scatter(2, order, places).amin(dim=1)
    best_score = scores.detach().amax(dim=1)
    # The order by several keys comes from stable sorts, of which the most important key is last.
    by_score = best_score.argsort(dim=-1, descending=True, stable=True)
    by_rank = best_rank.gather(1, by_score).argsort(dim=-1, stable=True)
    chosen = by_score.gather(1, by_rank)
    causal = chosen[:, : n * keypoints].sort(dim=-1).values
    noncausal = chosen[:, n * keypoints :].sort(dim=-1).values
    return SelectedTokens(scores.to(logits.dtype), s.to(logits.dtype), causal, noncausal)


def select_tokens_backward_reference(
    logits: Tensor,
    d_scores: Tensor | None,
    d_importance: Tensor | None,
    importance: str,
) -> Tensor:
    """Its gradient to logits: S (t − Σ S t) in each row, where t is the whole gradient to S."""
    scores = logits.to(checks.accumulator(logits)).softmax(dim=-1)
    total = torch.zeros_like(scores)
    if d_scores is not None:
        total = total + d_scores
    if d_importance is not None:
        if importance == "mean":
            share = torch.full_like(scores, 1.0 / scores.shape[1])
        else:  # the keypoints that have the maximum share it equally
            attained = (scores == scores.amax(dim=1, keepdim=True)).to(scores.dtype)
            share = attained / attained.sum(dim=1, keepdim=True)
        total = total + d_importance.to(scores.dtype)[:, None] * share
    # This is what autograd of softmax computes.
    gradient = torch.ops.aten._softmax_backward_data(total, scores, -1, scores.dtype)
    return gradient.to(logits.dtype).contiguous()


# -- CUDA C++ -------------------------------------------------------------------------------------


def _shape(logits: Tensor, importance: str) -> tuple[int, int, int, int, bool]:
    return cuda.DTYPES[logits.dtype], *logits.shape, importance == "max"


def _cuda_forward(logits: Tensor, n: int, importance: str) -> tuple[Tensor, ...]:
    logits = logits.contiguous()
    results = _forward_fake(logits, n, importance, "cuda")
    cuda.call("select_tokens", logits, *_shape(logits, importance), n, logits, *results)
    return results


def _cuda_backward(
    logits: Tensor, d_scores: Tensor | None, d_importance: Tensor | None, importance: str
) -> Tensor:
    logits = logits.contiguous()
    gradients = [None if g is None else g.contiguous() for g in (d_scores, d_importance)]
    d_logits = torch.empty_like(logits)
    shape = _shape(logits, importance)
    cuda.call("select_tokens_backward", logits, *shape, logits, *gradients, d_logits)
    return d_logits


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(logits: Tensor, n: int, importance: str, backend: str) -> tuple[Tensor, ...]:
    B, K, N = logits.shape
    return (
        logits.new_empty(B, K, N),
        logits.new_empty(B, N),
        logits.new_empty(B, n * K, dtype=torch.int64),
        logits.new_empty(B, N - n * K, dtype=torch.int64),
    )


_forward = library.register(
    "select_tokens(Tensor logits, int n, str importance, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    reference=lambda *arguments: tuple(select_tokens_reference(*arguments)),
    cuda=_cuda_forward,
)
_backward = library.register(
    "select_tokens_backward(Tensor logits, Tensor? d_scores, Tensor? d_importance, "
    "str importance, str backend) -> Tensor",
    lambda logits, d_scores, d_importance, importance, backend: logits.new_empty(logits.shape),
    reference=select_tokens_backward_reference,
    cuda=_cuda_backward,
)


class _SelectTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, n: int, importance: str, backend: str) -> Any:
        ctx.save_for_backward(logits)
        ctx.options = importance, backend
        ctx.set_materialize_grads(False)
        scores, s, causal, noncausal = _forward(logits, n, importance, backend)
        ctx.mark_non_differentiable(causal, noncausal)
        return scores, s, causal, noncausal

    @staticmethod
    def backward(
        ctx: Any, d_scores: Tensor | None, d_importance: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if d_scores is None and d_importance is None:
            return None, None, None, None
        (logits,) = ctx.saved_tensors
        gradient = library.first_order(
            "select_tokens", _backward, logits, d_scores, d_importance, *ctx.options
        )
        return gradient, None, None, None


# -- public ---------------------------------------------------------------------------------------


def select_tokens(
    logits: Tensor, n: int, *, importance: str = "mean", backend: str = "auto"
) -> SelectedTokens:
    """Scores S = softmax(logits), token importance s, and the nK causal tokens.

    A token's rank in a keypoint's row is the number of tokens before it in (score descending, index
    ascending). Its best rank is the smallest over the keypoints, its best score the largest. The
    nK tokens with the smallest (best rank, −best score, index) are causal: every keypoint's top n
    are among them, and their number is always the same.

    Args:
        logits: [B, K, N] floating point, keypoint against token.
        n: causal tokens per keypoint, ≥ 1; n·K ≤ N.
        importance: ``mean`` or ``max`` over the keypoints.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        :class:`SelectedTokens`; scores and importance in logits' dtype (computed in at least
        float32, which also ranks), with gradients to logits. The indices have none.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, no keypoint, n < 1, n·K > N, an unknown importance; on the CPU
            also logits with NaN or +inf, or of −inf alone in a row: their softmax is NaN. Elsewhere
            such a clip is split in an undefined way.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("logits", logits, "B K N", sizes)
    if not 1 <= sizes["K"] <= sizes["N"]:
        raise ValueError(f"logits must have 1 ≤ K ≤ N in [B, K, N], got {list(logits.shape)}")
    most = sizes["N"] // sizes["K"]
    checks.between("n", n, 1, most, "n·K must not exceed N")
    checks.choice("importance", importance, ("mean", "max"))
    # A row's maximum is NaN or infinite where its softmax is NaN, and only there.
    if checks.readable(logits) and not bool(logits.amax(dim=-1).isfinite().all()):
        raise ValueError(
            "logits must not be NaN or +inf, and not -inf for all tokens of a keypoint"
        )
    chosen = backends.choose("select_tokens", backend, logits.device, logits)
    if chosen == backends.PLAIN:
        return select_tokens_reference(logits, n, importance)
    if library.wants_gradient("select_tokens", logits):
        return SelectedTokens(*_SelectTokens.apply(logits, n, importance, chosen))
    return SelectedTokens(*_forward(logits, n, importance, chosen))


def shared_bytes(keypoints: int, tokens: int) -> int:
    """Bytes of shared memory that a clip's block takes.

    The same as ``select_tokens_shared`` of csrc, in Python so that torch.compile can trace it.
    """
    rows = 2 if tokens > 256 else 1
    parts = (4 * keypoints * tokens,) * rows + (8 * tokens,) + (4 * tokens,) * 2
    return sum(-(-part // 16) * 16 for part in parts)


def _cuda_limits(logits: Tensor) -> str | None:
    K, N = logits.shape[1:]
    shared = shared_bytes(K, N)
    if shared > MAX_SHARED:
        return (
            f"{K} keypoints by {N} tokens take {shared} bytes of shared memory; the kernels have "
            f"{MAX_SHARED}"
        )
    return backends.dtype_refusal(logits=logits)


backends.entry(select_tokens, "logits", cuda=_cuda_limits)
