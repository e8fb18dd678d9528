"""Clean, masked and noised tokens in one launch, and their gradients.

A clip's rows are its T·S slots with S = N + K: N patch tokens and K keypoint tokens a frame.

Bytes at the reference shape (B = 32, T = 3, N = 192, K = 15, D = 768, bf16): the forward pass
reads 28 MB and writes 92, the backward pass reads 92 and writes 28. At an H200's 4.3 TB/s each
takes 28 µs. The forward pass computes meanwhile, counted in warp instructions of sm_90:

- flags: a program of ROWS rows draws 2 · ROWS of them, one a lane, in about 1,000 instructions: 15
  Philox calls and the 12 rounds of the shuffle. 2,496 programs of 8 rows take 2.5 million. (If
  every thread drew the flags of its row, they would take 40 million.)
- copies: about 190 instructions for a row of 768 channels, 3.8 million in all.
- noise: about 350 instructions for 256 channels of a noised row, 8.7 million in all.

The sum is 15 million. 132 SMs at 1.8 GHz issue them in 16 µs, of which the flags take 2.6.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels.configs import config
from cmpose.kernels.launch import arch_of, launch
from cmpose.kernels.philox import bernoulli, gaussian, permuted


@triton.jit
def _flags(
    masked_ptr,
    noised_ptr,
    key,
    global_clip,
    first,
    rows,
    patches,
    slots,
    tokens,
    mask_limit,
    noise_limit,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Draws and stores the flags of ROWS rows, one a lane.

    Returns:
        int32, the same in every thread: bit r is row r's mask flag, bit ROWS + r its noise flag.
        Keypoint tokens have none.
    """
    lane = tl.arange(0, 2 * ROWS)
    tag, row = lane // ROWS, first + lane % ROWS
    frame = row // slots
    slot = row - frame * slots
    token = frame * patches + slot
    limit = tl.where(tag == 0, mask_limit, noise_limit)
    if EXACT:
        chosen = permuted(key, global_clip, tag, token, tokens) < limit
    else:
        chosen = bernoulli(key, global_clip, tag, token, limit)
    is_patch = (row < rows) & (slot < patches)
    chosen = (chosen & is_patch).to(tl.int32)
    tl.store(masked_ptr + token, chosen.to(tl.uint8), mask=is_patch & (tag == 0))
    tl.store(noised_ptr + token, chosen.to(tl.uint8), mask=is_patch & (tag == 1))
    return tl.sum(chosen << lane)


@triton.jit
def _write_row(
    source_ptr,
    position_ptr,
    x_ptr,
    source_stride_d,
    position_stride_d,
    branch_stride,
    is_masked,
    is_noised,
    DIM: tl.constexpr,
    POSITION_AFTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Writes a row's clean and masked copies, and the noised branch's too where nothing is noised.

    CHUNKS · CHANNELS channels are loaded before the first is stored: at the reference shape a warp
    has 1.5 KB of tokens in flight, and an SM has 19 warps.
    """
    dtype = x_ptr.dtype.element_ty
    for start in range(0, DIM, CHUNKS * CHANNELS):
        loaded = ()
        for i in tl.static_range(CHUNKS):
            d = (start + i * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
            value = tl.load(source_ptr + d * source_stride_d, mask=d < DIM)
            position = value
            if position_ptr is not None:
                position = tl.load(position_ptr + d * position_stride_d, mask=d < DIM)
            loaded = loaded + ((value, position),)
        for i in tl.static_range(CHUNKS):
            d = (start + i * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
            value, position = loaded[i]
            clean = value.to(tl.float32)
            if position_ptr is not None:
                clean += position.to(tl.float32)
            clean = clean.to(dtype)
            emptied = tl.zeros([CHANNELS], dtype)
            if position_ptr is not None and POSITION_AFTER:
                emptied = position.to(tl.float32).to(dtype)
            tl.store(x_ptr + d, clean, mask=d < DIM)
            at = x_ptr + branch_stride + d
            tl.store(at, tl.where(is_masked, emptied, clean), mask=d < DIM)
            tl.store(at + branch_stride, clean, mask=(d < DIM) & (is_noised == 0))


@triton.jit(do_not_specialize=["first_clip", "mask_limit", "noise_limit"])
# Long: 30 of its lines are parameters, and 40 hand them on to the helpers, one a line.
def forward_kernel(
    tokens_ptr,
    keypoints_ptr,
    position_ptr,
    seed_ptr,
    x_ptr,
    masked_ptr,
    noised_ptr,
    frames,
    patches,
    slots,
    tokens_stride_b,
    tokens_stride_t,
    tokens_stride_n,
    tokens_stride_d,
    keypoints_stride_k,
    keypoints_stride_d,
    position_stride_t,
    position_stride_n,
    position_stride_d,
    branch_stride,
    first_clip,
    mask_limit,
    noise_limit,
    noise_std,
    DIM: tl.constexpr,
    POSITION_AFTER: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """A program makes ROWS (at most 16) rows of a clip.

    It is one warp that takes its rows in turn. So each row takes its own branch, and no other row
    waits while noise is drawn for one.
    """
    rows = frames * slots
    blocks = tl.cdiv(rows, ROWS)
    b = tl.program_id(0) // blocks
    first = (tl.program_id(0) - b * blocks) * ROWS
    b = b.to(tl.int64)
    key = tl.load(seed_ptr)
    global_clip = (b + first_clip).to(tl.uint32)
    tokens = frames * patches
    flags = _flags(
        masked_ptr + b * tokens,
        noised_ptr + b * tokens,
        key,
        global_clip,
        first,
        rows,
        patches,
        slots,
        tokens,
        mask_limit,
        noise_limit,
        EXACT,
        ROWS,
    )
    tokens_ptr += b * tokens_stride_b
    x_ptr += (b * rows + first) * DIM
    for r in range(tl.minimum(rows - first, ROWS)):
        row = first + r
        frame = row // slots
        slot = row - frame * slots
        t, n = frame.to(tl.int64), slot.to(tl.int64)
        out_ptr = x_ptr + tl.cast(r, tl.int64) * DIM
        position_row_ptr = position_ptr
        if position_ptr is not None:
            position_row_ptr += t * position_stride_t + n * position_stride_n
        if slot < patches:
            token_ptr = tokens_ptr + t * tokens_stride_t + n * tokens_stride_n
            is_masked, is_noised = (flags >> r) & 1, (flags >> (ROWS + r)) & 1
            _write_row(
                token_ptr,
                position_row_ptr,
                out_ptr,
                tokens_stride_d,
                position_stride_d,
                branch_stride,
                is_masked != 0,
                is_noised,
                DIM,
                POSITION_AFTER,
                CHANNELS,
                CHUNKS,
            )
            if is_noised != 0:
                # The token was read just before, so it comes from the first-level cache.
                noised_row_ptr = out_ptr + branch_stride + branch_stride
                for start in range(0, DIM, CHANNELS):
                    d = (start + tl.arange(0, CHANNELS)).to(tl.int64)
                    element = start // 4 + tl.arange(0, CHANNELS // 4)
                    noise = gaussian(key, global_clip, frame * patches + slot, element) * noise_std
                    value = tl.load(token_ptr + d * tokens_stride_d, mask=d < DIM).to(tl.float32)
                    if position_ptr is None:
                        value += noise
                    else:
                        position = tl.load(position_row_ptr + d * position_stride_d, mask=d < DIM)
                        if POSITION_AFTER:
                            value = (value + noise) + position.to(tl.float32)
                        else:
                            value = (value + position.to(tl.float32)) + noise
                    value = value.to(x_ptr.dtype.element_ty)
                    tl.store(noised_row_ptr + d, value, mask=d < DIM)
        else:
            _write_row(
                keypoints_ptr + (n - patches) * keypoints_stride_k,
                position_row_ptr,
                out_ptr,
                keypoints_stride_d,
                position_stride_d,
                branch_stride,
                False,
                0,
                DIM,
                POSITION_AFTER,
                CHANNELS,
                CHUNKS,
            )


@triton.jit
def backward_kernel(
    grad_ptr,
    masked_ptr,
    dtokens_ptr,
    dposition_ptr,
    partial_ptr,
    batch,
    frames,
    patches,
    slots,
    grad_stride_branch,
    grad_stride_b,
    grad_stride_t,
    grad_stride_s,
    grad_stride_d,
    masked_stride_b,
    masked_stride_t,
    masked_stride_n,
    DIM: tl.constexpr,
    POSITION_AFTER: tl.constexpr,
    CLIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program takes one slot and CHANNELS channels, and goes through the clips, CLIPS at a time.

    It writes the gradient of the tokens and sums that of the position. At a keypoint's slot the sum
    is also what this frame adds to the keypoint's gradient (partial [T, K, D], float32).
    """
    CHUNKS: tl.constexpr = (DIM + CHANNELS - 1) // CHANNELS
    row = tl.program_id(0) // CHUNKS
    d = ((tl.program_id(0) - row * CHUNKS) * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    frame = row // slots
    slot = row - frame * slots
    is_patch = slot < patches
    t, n = frame.to(tl.int64), slot.to(tl.int64)
    grad_ptr += t * grad_stride_t + n * grad_stride_s
    masked_ptr += t * masked_stride_t + n * masked_stride_n
    dtokens_ptr += (t * patches + n) * DIM
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(0, batch, CLIPS):
        b = (start + tl.arange(0, CLIPS)).to(tl.int64)
        inside = (b < batch)[:, None] & (d < DIM)[None, :]
        at = grad_ptr + b[:, None] * grad_stride_b + d[None, :] * grad_stride_d
        clean = tl.load(at, mask=inside, other=0.0)
        at += grad_stride_branch
        emptied = tl.load(at, mask=inside, other=0.0)
        at += grad_stride_branch
        disturbed = tl.load(at, mask=inside, other=0.0)
        flag = masked_ptr + b * masked_stride_b
        is_masked = tl.load(flag, mask=(b < batch) & is_patch, other=0) != 0
        clean, emptied = clean.to(tl.float32), emptied.to(tl.float32)
        disturbed = disturbed.to(tl.float32)
        kept = tl.where(is_masked[:, None], 0.0, emptied)
        dtokens = clean + kept + disturbed
        if POSITION_AFTER:
            total += tl.sum(clean + emptied + disturbed, axis=0)
        else:
            total += tl.sum(dtokens, axis=0)
        at = dtokens_ptr + b[:, None] * frames * patches * DIM + d[None, :]
        tl.store(at, dtokens.to(dtokens_ptr.dtype.element_ty), mask=inside & is_patch)
    if dposition_ptr is not None:
        at = dposition_ptr + row.to(tl.int64) * DIM + d
        tl.store(at, total.to(dposition_ptr.dtype.element_ty), mask=d < DIM)
    at = partial_ptr + (t * (slots - patches) + n - patches) * DIM + d
    tl.store(at, total, mask=(d < DIM) & (slot >= patches))


@triton.jit
def keypoints_kernel(
    partial_ptr, dkeypoints_ptr, frames, size, FRAMES: tl.constexpr, BLOCK: tl.constexpr
):
    """Sums the frames' partial gradients in order, FRAMES at a time: [T, size] → [size]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, frames, FRAMES):
        t = start + tl.arange(0, FRAMES)
        at = partial_ptr + t.to(tl.int64)[:, None] * size + i[None, :]
        inside = (t < frames)[:, None] & (i < size)[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
    tl.store(dkeypoints_ptr + i, total.to(dkeypoints_ptr.dtype.element_ty), mask=i < size)


# Many parameters: they are those of ops.corrupt_tokens.
def forward(
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
    """The three branches, and which tokens are corrupted, as ``ops.corrupt_tokens`` defines them.

    Args:
        tokens: [B, T, N, D] float32, float16 or bfloat16, any strides; T·(N+K) < 2³¹.
        keypoint_tokens: [K, D], any of these dtypes and any strides, like position.
        position: [T, N+K, D] or None.
        seed: int64, one element.
        mask_ratio, noise_ratio: 0 to 1.
        noise_std: ≥ 0.
        selection: ``exact`` or ``bernoulli``.
        position_after: whether position is added after the corruption.
        first_clip: global index of clip 0, below 2³² − B.

    Returns:
        [3, B, T, N+K, D] in tokens' dtype; masked and noised, [B, T, N] bool.
    """
    batch, frames, patches, dim = tokens.shape
    slots = patches + keypoint_tokens.shape[0]
    x = torch.empty((3, batch, frames, slots, dim), dtype=tokens.dtype, device=tokens.device)
    masked, noised = (
        torch.empty((batch, frames, patches), dtype=torch.bool, device=tokens.device)
        for _ in range(2)
    )
    exact = selection == "exact"
    domain = frames * patches if exact else 2.0**32
    variant = "narrow"
    if dim > 128:
        # With 8 rows a program, flags take half the instructions that they take with 4, and 17,000
        # rows are still 16 programs for each of 132 SMs. Fewer rows are spread over more programs.
        variant = "many rows" if batch * frames * slots >= 8192 else "few rows"
    pinned = config("corrupt_tokens_forward", variant, arch_of(tokens))
    # A pass takes three chunks of a row at most; the chunks are spread evenly over the passes.
    chunks = max(1, triton.cdiv(dim, pinned.blocks["CHANNELS"]))
    chunks = triton.cdiv(chunks, triton.cdiv(chunks, 3))
    launch(
        forward_kernel,
        (batch * triton.cdiv(frames * slots, pinned.blocks["ROWS"]),),
        tokens,
        keypoint_tokens,
        position,
        seed,
        x,
        masked.view(torch.uint8),
        noised.view(torch.uint8),
        frames,
        patches,
        slots,
        *tokens.stride(),
        *keypoint_tokens.stride(),
        *((0, 0, 0) if position is None else position.stride()),
        x.stride(0),
        first_clip,
        round(mask_ratio * domain),
        round(noise_ratio * domain),
        float(noise_std),
        config=pinned,
        DIM=dim,
        POSITION_AFTER=position_after,
        EXACT=exact,
        CHUNKS=chunks,
    )
    return x, masked, noised


def backward(
    grad: Tensor,
    masked: Tensor,
    keypoint_dtype: torch.dtype,
    position_dtype: torch.dtype | None,
    position_after: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of tokens, keypoint tokens and position; sums in float32, in a fixed order.

    Args:
        grad: [3, B, T, N+K, D] float32, float16 or bfloat16, any strides.
        masked: [B, T, N] bool, any strides.
        keypoint_dtype: of the keypoint tokens.
        position_dtype: of the position; None if there is none.
        position_after: as in :func:`forward`.

    Returns:
        [B, T, N, D] in grad's dtype, [K, D] in keypoint_dtype and [T, N+K, D] in position_dtype
        (if that is None, [0] in grad's).
    """
    _, batch, frames, slots, dim = grad.shape
    patches = masked.shape[2]
    keypoints = slots - patches
    device = grad.device
    dtokens = torch.empty((batch, frames, patches, dim), dtype=grad.dtype, device=device)
    dkeypoints = torch.empty((keypoints, dim), dtype=keypoint_dtype, device=device)
    dposition = torch.empty(
        0 if position_dtype is None else (frames, slots, dim),
        dtype=position_dtype or grad.dtype,
        device=device,
    )
    partial = torch.empty((frames, keypoints, dim), dtype=torch.float32, device=device)
    # Narrow tiles where there would be too few wide ones to keep a card busy.
    wide = dim > 128 and frames * slots * triton.cdiv(dim, 256) >= 1024
    pinned = config("corrupt_tokens_backward", "wide" if wide else "narrow", arch_of(grad))
    launch(
        backward_kernel,
        (frames * slots * triton.cdiv(dim, pinned.blocks["CHANNELS"]),),
        grad,
        masked.view(torch.uint8),
        dtokens,
        None if position_dtype is None else dposition,
        partial,
        batch,
        frames,
        patches,
        slots,
        *grad.stride(),
        *masked.stride(),
        config=pinned,
        DIM=dim,
        POSITION_AFTER=position_after or position_dtype is None,
    )
    pinned = config("corrupt_tokens_keypoints", None, arch_of(grad))
    launch(
        keypoints_kernel,
        (triton.cdiv(keypoints * dim, pinned.blocks["BLOCK"]),),
        partial,
        dkeypoints,
        frames,
        keypoints * dim,
        config=pinned,
    )
    return dtokens, dkeypoints, dposition
