"""The three inputs of the criss-cross network in one call: clean, masked and noised tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library, philox
from cmpose.ops.cpu import corrupt_tokens as cpu


class CorruptedTokens(NamedTuple):
    """Result of :func:`corrupt_tokens`."""

    x: Tensor
    """[3, B, T, N+K, D]: the clean, the masked and the noised branch."""
    masked: Tensor
    """[B, T, N] bool: tokens that are zero in the masked branch."""
    noised: Tensor
    """[B, T, N] bool: tokens that carry noise in the noised branch."""


MAX_NOISE_STD = 1e30  # times a standard normal it is a number of float32

# -- reference ------------------------------------------------------------------------------------


def _selected(
    seed: Tensor, clips: Tensor, n: int, ratios: tuple[float, float], selection: str
) -> tuple[Tensor, Tensor]:
    """The masked and the noised tokens, each [B, n] bool."""
    if selection == "bernoulli":
        mask, noise = (
            philox.bernoulli_subsets(seed, clips, tag, n, ratio)
            for tag, ratio in zip((philox.TAG_MASK, philox.TAG_NOISE), ratios, strict=True)
        )
        return mask, noise
    tags = torch.arange(2, device=seed.device)  # TAG_MASK, TAG_NOISE
    image = philox.exact_subsets(seed, clips, tags, n)
    return image[0] < round(ratios[0] * n), image[1] < round(ratios[1] * n)


def _noise(seed: Tensor, clips: Tensor, noised: Tensor, width: int, count: int | None) -> Tensor:
    """Standard normals on the noised tokens and 0 on the others: [B, n, width] float32.

    Where every clip has the same number of noised tokens, ``count``, none are drawn for the others.
    """
    batch, n = noised.shape
    if count is None:
        drawn = philox.gaussian_rows(seed, clips, torch.arange(n, device=seed.device)[None], width)
        return torch.where(noised[..., None], drawn, 0.0)
    rows = noised.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    drawn = philox.gaussian_rows(seed, clips, rows, width)
    empty = torch.zeros(batch, n, width, dtype=torch.float32, device=seed.device)
    return empty.scatter(1, rows[..., None].expand(-1, -1, width), drawn)


# Many parameters: those of the op itself.
def corrupt_tokens_reference(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None,
    seed: Tensor,
    mask_ratio: float,
    noise_ratio: float,
    noise_std: float,
    selection: str,
    position_after: bool,
    first_clip: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`corrupt_tokens` in plain PyTorch."""
    batch, frames, n, width = tokens.shape
    clips = torch.arange(first_clip, first_clip + batch, device=tokens.device)
    masked, noised = _selected(seed, clips, frames * n, (mask_ratio, noise_ratio), selection)
    count = round(noise_ratio * frames * n) if selection == "exact" else None
    noise = _noise(seed, clips, noised, width, count).reshape(tokens.shape) * noise_std
    masked, noised = masked.reshape(batch, frames, n), noised.reshape(batch, frames, n)

    # Low-precision inputs are summed in float32 and rounded once.
    dtype = checks.accumulator(tokens)
    patches = tokens.to(dtype)
    keypoints = keypoint_tokens.to(dtype).expand(batch, frames, -1, -1)
    position = None if position is None else position.to(dtype)
    if position is not None and not position_after:
        patches, keypoints = patches + position[:, :n], keypoints + position[:, n:]
    branches = (patches, patches.masked_fill(masked[..., None], 0.0), patches + noise)
    x = torch.stack([torch.cat((branch, keypoints), dim=2) for branch in branches])
    if position is not None and position_after:
        x = x + position
    return x.to(tokens.dtype), masked, noised


def corrupt_tokens_backward_reference(
    grad: Tensor,
    masked: Tensor,
    keypoint_dtype: torch.dtype,
    position_dtype: torch.dtype | None,
    position_after: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients to tokens, keypoint_tokens and position (empty where there is none).

    d tokens = d clean + keep · d masked + d noised, so the noise is not needed again. The gradient
    of keypoint tokens is the sum over branches, clips and frames. That of position is the sum over
    branches and clips; masked tokens count in it only where position is added after the corruption.
    """
    n = masked.shape[-1]
    grad_32 = grad.to(checks.accumulator(grad))
    unmasked = grad_32[1, :, :, :n].masked_fill(masked[..., None], 0.0)
    tokens = grad_32[0, :, :, :n] + unmasked + grad_32[2, :, :, :n]
    keypoints = grad_32[:, :, :, n:].sum(dim=(0, 1, 2))
    position = grad.new_empty(0, dtype=position_dtype or grad.dtype)
    if position_dtype is not None:
        patches = grad_32[:, :, :, :n].sum(dim=0) if position_after else tokens
        slots = torch.cat((patches.sum(dim=0), grad_32[:, :, :, n:].sum(dim=(0, 1))), dim=1)
        position = slots.to(position_dtype)
    tokens = tokens.to(grad.dtype).contiguous()
    return tokens, keypoints.to(keypoint_dtype).contiguous(), position.contiguous()


# Many parameters: those of the op itself.
def _cpu_forward(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None,
    seed: Tensor,
    mask_ratio: float,
    noise_ratio: float,
    noise_std: float,
    selection: str,
    position_after: bool,
    first_clip: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, n, _ = tokens.shape
    clips = torch.arange(first_clip, first_clip + batch)
    selected = _selected(seed, clips, frames * n, (mask_ratio, noise_ratio), selection)
    masked, noised = (chosen.reshape(batch, frames, n) for chosen in selected)
    inputs = tokens, keypoint_tokens, position, position_after, masked, noised
    return cpu.forward(*inputs, first_clip, seed, noise_std), masked, noised


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(
    tokens: Tensor, keypoint_tokens: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, N, D = tokens.shape
    x = tokens.new_empty(3, B, T, N + keypoint_tokens.shape[0], D)
    masked, noised = (tokens.new_empty(B, T, N, dtype=torch.bool) for _ in range(2))
    return x, masked, noised


def _backward_fake(
    grad: Tensor,
    masked: Tensor,
    keypoint_dtype: torch.dtype,
    position_dtype: torch.dtype | None,
    position_after: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _, B, T, S, D = grad.shape
    N = masked.shape[-1]
    tokens = grad.new_empty(B, T, N, D)
    keypoints = grad.new_empty(S - N, D, dtype=keypoint_dtype)
    if position_dtype is None:
        return tokens, keypoints, grad.new_empty(0)
    return tokens, keypoints, grad.new_empty(T, S, D, dtype=position_dtype)


_forward = library.register(
    "corrupt_tokens(Tensor tokens, Tensor keypoint_tokens, Tensor? position, Tensor seed, "
    "float mask_ratio, float noise_ratio, float noise_std, str selection, bool position_after, "
    "SymInt first_clip, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    reference=corrupt_tokens_reference,
    cpu=_cpu_forward,
    triton=library.triton_kernel("corrupt_tokens", "forward"),
)
_backward = library.register(
    "corrupt_tokens_backward(Tensor grad, Tensor masked, ScalarType keypoint_dtype, "
    "ScalarType? position_dtype, bool position_after, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    reference=corrupt_tokens_backward_reference,
    cpu=cpu.backward,
    triton=library.triton_kernel("corrupt_tokens", "backward"),
)


class _CorruptTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        keypoint_tokens: Tensor,
        position: Tensor | None,
        *arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, masked, noised = _forward(tokens, keypoint_tokens, position, *arguments)
        ctx.save_for_backward(masked)
        ctx.set_materialize_grads(False)  # else zeros are written for the two that have no gradient
        ctx.mark_non_differentiable(masked, noised)
        ctx.dtypes = keypoint_tokens.dtype, None if position is None else position.dtype
        ctx.position_after, ctx.backend = arguments[-3], arguments[-1]
        return x, masked, noised

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 11
        (masked,) = ctx.saved_tensors
        tokens, keypoints, position = library.first_order(
            "corrupt_tokens", _backward, grad, masked, *ctx.dtypes, ctx.position_after, ctx.backend
        )
        return tokens, keypoints, position if ctx.dtypes[1] is not None else None, *[None] * 8


# -- public ---------------------------------------------------------------------------------------


# Many parameters: every open point of the paper's corruption is one, and they are public.
def corrupt_tokens(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None = None,
    *,
    seed: Tensor | int,
    mask_ratio: float = 0.45,
    noise_ratio: float = 0.45,
    noise_std: float = 1.0,
    selection: str = "exact",
    position_after: bool = True,
    first_clip: int = 0,
    backend: str = "auto",
) -> CorruptedTokens:
    """Clean, masked and noised copies of a clip's tokens, each followed by the keypoint tokens.

    Masking sets patch tokens to zero, noising adds noise_std · N(0, 1) to them; the two subsets are
    drawn independently. Keypoint tokens are copied to every frame and never corrupted. The random
    numbers are Philox4x32-10 of each token's index in the clip (``cmpose.ops.philox``): a seed
    draws the same on every device and for every split of the clips into batches.

    Args:
        tokens: [B, T, N, D] floating point, patch tokens.
        keypoint_tokens: [K, D] floating point; cast to tokens' dtype.
        position: [T, N+K, D] floating point, added to every clip and branch; None adds nothing.
        seed: int64 tensor of one element on tokens' device; all 64 bits count. As a tensor a CUDA
            graph draws other numbers at every replay. An integer of 64 bits is taken too.
        mask_ratio: share of the T·N patch tokens of a clip that is masked, 0 to 1.
        noise_ratio: share that gets noise, 0 to 1.
        noise_std: standard deviation of the noise, 0 to 1e30.
        selection: ``exact`` takes exactly round(ratio·T·N) tokens of every clip (Python's round:
            halves to even), ``bernoulli`` each token with that probability.
        position_after: adds position after the corruption, so that masked tokens still tell where
            they are; False adds it before, so that masking sets it to zero too.
        first_clip: global index of clip 0; with it the processes of a distributed run draw what
            one process would.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        :class:`CorruptedTokens`; x in tokens' dtype, summed in at least float32 and rounded once.
        Gradients flow to tokens (d clean + keep · d masked + d noised), keypoint_tokens and
        position. NaN tokens stay NaN except where they are masked.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, ratio, noise_std, selection, first_clip or seed.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes = _check_tensors(tokens, keypoint_tokens, position)
    checks.between("mask_ratio", mask_ratio, 0.0, 1.0)
    checks.between("noise_ratio", noise_ratio, 0.0, 1.0)
    checks.between("noise_std", noise_std, 0.0, MAX_NOISE_STD)
    checks.choice("selection", selection, ("exact", "bernoulli"))
    checks.boolean("position_after", position_after)
    checks.between("first_clip", first_clip, 0, 2**32 - 1 - sizes["B"])
    seed = checks.seed(seed, tokens)
    chosen = backends.choose(
        "corrupt_tokens", backend, tokens.device, tokens, keypoint_tokens, position
    )
    arguments = (
        tokens,
        keypoint_tokens,
        position,
        seed,
        mask_ratio,
        noise_ratio,
        float(noise_std),
        selection,
        position_after,
        first_clip,
    )
    if chosen == backends.PLAIN:
        return CorruptedTokens(*corrupt_tokens_reference(*arguments))
    if library.wants_gradient("corrupt_tokens", tokens, keypoint_tokens, position):
        return CorruptedTokens(*_CorruptTokens.apply(*arguments, chosen))
    return CorruptedTokens(*_forward(*arguments, chosen))


def _check_tensors(
    tokens: Tensor, keypoint_tokens: Tensor, position: Tensor | None
) -> checks.Sizes:
    sizes: checks.Sizes = {}
    checks.tensor("tokens", tokens, "B T N D", sizes)
    checks.tensor("keypoint_tokens", keypoint_tokens, "K D", sizes)
    if position is not None:
        checks.tensor("position", position, "T N+K D", sizes)
    checks.same_device("tokens", tokens, keypoint_tokens=keypoint_tokens, position=position)
    return sizes


def _triton_limits(tokens: Tensor, keypoint_tokens: Tensor, position: Tensor | None) -> str | None:
    tensors = {"tokens": tokens, "keypoint_tokens": keypoint_tokens, "position": position}
    return backends.dtype_refusal(**tensors) or backends.interpreter_refusal(
        tokens=tokens, keypoint_tokens=keypoint_tokens, position=position
    )


backends.entry(corrupt_tokens, "tokens", cpu=None, triton=_triton_limits)
