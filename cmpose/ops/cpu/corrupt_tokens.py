"""Corrupted copies of tokens: noise is drawn for the noised tokens alone, and every number of the
result is written where it belongs at once.

The words and normals are those of ``philox``, its steps in place and a part at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cmpose.ops import philox

_COUNTERS = 1 << 17  # that are worked on at once: what a CPU's cache holds


# Many parameters: those of the op and the chosen tokens.
def forward(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None,
    position_after: bool,
    masked: Tensor,
    noised: Tensor,
    first_clip: int,
    seed: Tensor,
    noise_std: float,
) -> Tensor:
    """The three branches [3, B, T, N+K, D], in the dtype of tokens.

    Args:
        tokens, keypoint_tokens, position, position_after, first_clip, noise_std: the op's.
        masked, noised: [B, T, N] bool.
        seed: int64 [].
    """
    B, T, N, D = tokens.shape
    K = len(keypoint_tokens)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    x = tokens.new_empty(3, B, T, N + K, D)
    clean = x[0, :, :, :N]
    slots = None if position is None else position.to(wide)
    if slots is None:
        clean.copy_(tokens)
        x[:, :, :, N:] = keypoint_tokens
    else:
        torch.add(tokens, slots[:, :N], out=clean)
        x[:, :, :, N:] = keypoint_tokens.to(wide) + slots[:, N:]
    x[1:, :, :, :N] = clean
    added = None if slots is None else slots[:, :N].reshape(T * N, D)

    row = masked.flatten().nonzero()[:, 0]
    branch = x[1].view(B * T * (N + K), D)
    if added is None or not position_after:
        branch.index_fill_(0, row + row // N * K, 0.0)
    else:
        branch.index_copy_(0, row + row // N * K, added[row % (T * N)].to(x.dtype))

    branch = x[2].view(B * T * (N + K), D)
    flat_tokens = tokens.reshape(B * T * N, D)
    rows = noised.flatten().nonzero()[:, 0]
    for row in rows.split(max(1, _COUNTERS * 4 // D)):
        token = row % (T * N)
        noise = _normals(int(seed), row // (T * N) + first_clip, token, D).mul_(noise_std)
        value = flat_tokens[row].to(wide)
        if added is None:
            value += noise
        elif position_after:
            value.add_(noise).add_(added[token])
        else:
            value.add_(added[token]).add_(noise)
        branch.index_copy_(0, row + row // N * K, value.to(x.dtype))
    return x


def backward(
    grad: Tensor,
    masked: Tensor,
    keypoint_dtype: torch.dtype,
    position_dtype: torch.dtype | None,
    position_after: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients, as the reference's."""
    N = masked.shape[-1]
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    clean, masked_branch, noised = wide[:, :, :, :N]
    tokens = masked_branch.masked_fill(masked[..., None], 0.0).add_(clean).add_(noised)
    slots = wide.sum(dim=(0, 1))
    keypoints = slots[:, N:].sum(dim=0).to(keypoint_dtype)
    if not position_after:
        slots[:, :N] = tokens.sum(dim=0)
    position = grad.new_empty(0) if position_dtype is None else slots.to(position_dtype)
    return tokens.to(grad.dtype).contiguous(), keypoints, position


def _normals(seed: int, clip: Tensor, token: Tensor, width: int) -> Tensor:
    """``philox.gaussian_rows`` of tokens [R] of clips [R]: [R, width]."""
    normals = torch.empty(len(token), (width + 3) // 4, 4)
    words = _words(seed, clip[:, None], token[:, None], torch.arange(normals.shape[1]))
    for pair in (0, 2):
        # (2 · (word >> 9) + 1) · 2⁻²⁴, where 2⁻²⁴ rounds nothing
        radius, angle = (
            words[pair + i].bitwise_right_shift_(8).bitwise_and_(0xFFFFFF).bitwise_or_(1)
            .to(torch.float32) for i in (0, 1)
        )  # fmt: skip
        radius.mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
        angle.mul_(2 * math.pi * 2.0**-24)
        torch.mul(radius, angle.cos(), out=normals[..., pair])
        torch.mul(radius, angle.sin_(), out=normals[..., pair + 1])
    return normals.flatten(1)[:, :width]


def _words(seed: int, clip: Tensor, token: Tensor, element: Tensor) -> list[Tensor]:
    """``philox.philox4x32`` of counters (element, token, clip, TAG_GAUSSIAN), as int32.

    After two rounds a counter depends on element, token and clip. Until then it depends on some of
    them, so that there are far fewer different counters than words.
    """
    word, m0, m1 = philox.WORD, *philox.MULTIPLIERS
    keys = [
        [(k + n * increment) & word for k, increment in
         zip((seed & word, (seed >> 32) & word), philox.INCREMENTS, strict=True)]
        for n in range(10)
    ]  # fmt: skip
    c0, c1, c2, c3 = element, token, clip, torch.tensor(philox.TAG_GAUSSIAN)
    for k0, k1 in keys[:2]:
        p0, p1 = c0 * m0, c2 * m1
        # Both sides are masked while they are small; only the last XOR is as large as the words.
        c0 = (((p1 >> 32) ^ k0) & word) ^ (c1 & word)
        c2 = (((p0 >> 32) ^ k1) & word) ^ (c3 & word)
        c1, c3 = p1, p0
    p0, p1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in keys[2:]:
        torch.mul(c0, m0, out=p0)
        torch.mul(c2, m1, out=p1)
        for c, product, other, key in ((c0, p1, c1, k0), (c2, p0, c3, k1)):
            torch.bitwise_right_shift(product, 32, out=c)
            c.bitwise_xor_(other).bitwise_xor_(key).bitwise_and_(word)
        if c1.shape != c0.shape:  # what the first two rounds left
            c1, c3 = torch.empty_like(c0), torch.empty_like(c0)
        c1, p1, c3, p0 = p1, c1, p0, c3
    return [c.to(torch.int32) for c in (c0, c1, c2, c3)]
