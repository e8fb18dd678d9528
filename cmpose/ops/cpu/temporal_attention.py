"""Temporal attention: over few frames by products of whole tensors, over more by flash attention.

Over T ≤ 4 frames a matrix product has too little to do. Then T² products of whole frames, some
positions at a time, are faster: nothing is moved in memory, and what they give stays in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cmpose.ops import checks
from cmpose.ops.attention import empty_gradients, keys_within, separate
from cmpose.ops.cpu import flash

FEW_FRAMES = 4
_PART = 1 << 18
"""Elements of a frame that are computed at a time: T frames' products are what a cache holds."""

Slices = tuple[slice, slice, slice]


def _parts(q: Tensor) -> Iterator[Slices]:
    """[B, T, S] in parts: several clips, or some positions of one."""
    B, _, S, H, d = q.shape
    clips = max(1, _PART // max(1, S * H * d))
    positions = S if clips > 1 else max(1, _PART // max(1, H * d))
    for b in range(0, B, clips):
        for s in range(0, S, positions):
            yield slice(b, b + clips), slice(None), slice(s, s + positions)


def _allowed(lengths: Tensor | None, T: int, causal: bool) -> Tensor | None:
    """Keys that a query attends to: bool [B or 1, T or 1, T]."""
    allowed = None if lengths is None else keys_within(lengths, T)[:, None]
    if causal:
        order = torch.ones(1, T, T, dtype=torch.bool).tril()
        allowed = order if allowed is None else allowed & order
    return allowed


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Σ_d x_i y_j: [b, T, s, H, d] twice → [b, T, T, s, H]."""
    return torch.stack([(x[:, i : i + 1] * y).sum(-1) for i in range(x.shape[1])], dim=1)


def _mix(weights: Tensor, x: Tensor, out: Tensor) -> None:
    """out_i = Σ_j weights_ij x_j."""
    if out.dtype != x.dtype:
        wide = torch.empty(out.shape, dtype=x.dtype)
        _mix(weights, x, wide)
        out.copy_(wide)
        return
    torch.mul(weights[:, :, 0, ..., None], x[:, :1], out=out)
    for j in range(1, x.shape[1]):
        out.addcmul_(weights[:, :, j, ..., None], x[:, j : j + 1])


def _weights(q: Tensor, k: Tensor, scale: float, allowed: Tensor | None) -> Tensor:
    logits = _dots(q, k).mul_(scale)
    if allowed is not None:
        logits.masked_fill_(~allowed[..., None, None], -torch.inf)
    return torch.softmax(logits, dim=2)


def _some(allowed: Tensor | None, clips: slice) -> Tensor | None:
    return allowed if allowed is None or len(allowed) == 1 else allowed[clips]


# Many parameters: those of the registered op.
def forward(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """The attention, [B, T, S, H, d]."""
    parts = separate(qkv, k, v)
    out, T = qkv.new_empty(parts[0].shape), qkv.shape[1]
    if out.numel() == 0:
        return out
    if T > FEW_FRAMES:
        for b, operands, mask in _clips(parts, lengths):
            out[b] = flash.attend(operands, scale, mask, causal)[0].transpose(0, 1)
        return out
    allowed, wide = _allowed(lengths, T, causal), checks.accumulator(qkv)
    for part in _parts(parts[0]):
        q, key, value = (x[part].to(wide) for x in parts)
        _mix(_weights(q, key, scale, _some(allowed, part[0])), value, out[part])
    return out


# Many parameters: those of the registered op.
def backward(
    grad: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to the operands; the weights are computed again."""
    parts, T = separate(qkv, k, v), qkv.shape[1]
    results = empty_gradients(qkv, k, v)
    if grad.numel() == 0:
        return results
    grads = results[0].unbind(3) if k is None else results
    if T > FEW_FRAMES:
        for b, tensors, mask in _clips((grad, *parts), lengths):
            upstream, *operands = tensors
            out, lse = flash.attend(operands, scale, mask, causal)
            result = out.transpose(1, 2)
            gradients = flash.gradients(upstream, operands, result, lse, scale, mask, causal)
            for target, value in zip(grads, gradients, strict=True):
                target[b] = value.transpose(0, 1)
        return results
    allowed, wide = _allowed(lengths, T, causal), checks.accumulator(qkv)
    for part in _parts(parts[0]):
        g, q, key, value = (x[part].to(wide) for x in (grad, *parts))
        weights = _weights(q, key, scale, _some(allowed, part[0]))
        change = _dots(g, value)
        change -= (weights * change).sum(dim=2, keepdim=True)
        change.mul_(weights).mul_(scale)
        _mix(change, key, grads[0][part])
        _mix(change.transpose(1, 2), q, grads[1][part])
        _mix(weights.transpose(1, 2), g, grads[2][part])
    return results


def _clips(
    tensors: tuple[Tensor, ...], lengths: Tensor | None
) -> Iterator[tuple[int, list[Tensor], Tensor | None]]:
    """For each clip its tensors as flash attention takes them, positions as batch, and its mask."""
    for b in range(len(tensors[0])):
        views = [flash.view(x[b].transpose(0, 1)) for x in tensors]  # [S, H, T, d]
        mask = None
        if lengths is not None:
            allowed = keys_within(lengths[b], tensors[0].shape[1])
            mask = flash.mask_of(allowed[None, None, None], checks.accumulator(tensors[0]))
        yield b, views, mask
