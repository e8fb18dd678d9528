"""Spatial attention by torch's flash attention for CPUs: frames are its batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from cmpose.ops import checks
from cmpose.ops.attention import empty_gradients, keys_within, separate
from cmpose.ops.cpu import flash

_PART = 1 << 20
"""Elements of q that are computed at a time: about what a CPU's cache holds."""


def _one_batch(tensors: Sequence[Tensor]) -> bool:
    """Whether all clips' frames are one batch without a copy."""
    return all(
        t.stride(-1) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))
        for t in tensors
    )


def _parts(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Clips that are computed at a time: one by one where several would have to be copied."""
    step = max(1, _PART // tensors[0][0].numel()) if _one_batch(tensors) else 1
    for b in range(0, len(tensors[0]), step):
        yield slice(b, b + step)


def _mask(lengths: Tensor | None, q: Tensor) -> Tensor | None:
    """[frames, 1, 1, S]."""
    if lengths is None:
        return None
    allowed = keys_within(lengths, q.shape[2]).flatten(0, 1)
    return flash.mask_of(allowed[:, None, None], checks.accumulator(q))


def forward(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The attention [B, T, S, H, d], and the log-sum-exp of every row, [B, T, H, S]."""
    operands = separate(qkv, k, v)
    B, T, S, H, d = operands[0].shape
    wide = checks.accumulator(qkv)
    if operands[0].numel() > 0 and qkv.dtype == wide and _one_batch(operands):
        views = [flash.view(x.flatten(0, 1)) for x in operands]
        out, lse = flash.attend(views, scale, _mask(lengths, operands[0]))
        return out.reshape(B, T, S, H, d), lse.reshape(B, T, H, S).contiguous()
    out, lse = qkv.new_empty(B, T, S, H, d), qkv.new_empty(B, T, H, S, dtype=wide)
    # The kernel divides by the number of frames and heads.
    for part in _parts(operands) if out.numel() else ():
        views = [flash.view(x[part].flatten(0, 1)) for x in operands]
        mask = _mask(None if lengths is None else lengths[part], operands[0])
        some, rows = flash.attend(views, scale, mask)
        out[part], lse[part] = some.unflatten(0, (-1, T)), rows.unflatten(0, (-1, T))
    return out, lse


# Many parameters: those of the registered op.
def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to the operands, found for some clips at a time, which stay in cache."""
    tensors = (grad, *separate(qkv, k, v), out)
    results = empty_gradients(qkv, k, v)
    grads = results[0].unbind(3) if k is None else results
    for part in _parts(tensors) if out.numel() else ():
        upstream, *views, result = [flash.view(x[part].flatten(0, 1)) for x in tensors]
        mask = _mask(None if lengths is None else lengths[part], out)
        rows = lse[part].flatten(0, 1)
        some = flash.gradients(upstream, views, result, rows, scale, mask)
        if grad_lse is not None:
            _add_lse_gradient(some, grad_lse[part].flatten(0, 1), views, rows, scale, mask)
        for target, value in zip(grads, some, strict=True):
            target[part] = value.unflatten(0, (-1, out.shape[1]))
    return results


def _add_lse_gradient(
    grads: list[Tensor],
    grad_lse: Tensor,
    qkv: list[Tensor],
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
) -> None:
    """dq_i += scale · dl_i Σ_j P_ij k_j and dk_j += scale · Σ_i P_ij dl_i q_i, in place.

    The first sum is an attention whose values are the keys; the second is its gradient to them.
    """
    q, k, _ = qkv
    mixed, _ = flash.attend((q, k, k), scale, mask)
    weight = scale * grad_lse[..., None]  # [frames, H, S, 1]
    grads[0] += weight.transpose(1, 2) * mixed
    grads[1] += flash.gradients(weight * q, (q, k, k), mixed.transpose(1, 2), lse, scale, mask)[2]
