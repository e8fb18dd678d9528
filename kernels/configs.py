"""The configuration of every kernel, pinned per architecture.

Nothing is tuned while a user's program runs: every process uses what is written here. Each line is
one variant of a kernel, with block sizes, warps and pipeline stages for each compute capability. A
card takes the entry of the highest capability that is not above its own. ``python -m
cmpose.kernels.tune`` measures other settings on the card at hand; ``CMPOSE_CONFIGS=FILE`` uses what
it writes.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cmpose.kernels import overrides
from cmpose.kernels.launch import Config

Variant = Hashable
Lines = dict[Variant, dict[int, Config]]


def c(num_warps: int = 4, num_stages: int = 1, **blocks: int) -> Config:
    """One entry of the table."""
    return Config(blocks, num_warps, num_stages)


# --- temporal_attention ----------------------------------------------------------------------
# The variant of rows is the head dimension, padded to a power of two, and an element's bytes. With
# these ROWS a thread has 16 bytes of a tile.
_ROWS: Lines = {
    (16, 2): {80: c(4, ROWS=64)},
    (32, 2): {80: c(4, ROWS=32)},
    (64, 2): {80: c(4, ROWS=16)},
    (128, 2): {80: c(4, ROWS=8)},
    (16, 4): {80: c(4, ROWS=32)},
    (32, 4): {80: c(4, ROWS=16)},
    (64, 4): {80: c(4, ROWS=8)},
    (128, 4): {80: c(4, ROWS=4)},
}
# The variant of tiles is the largest power of two in the head dimension (32 for 16), an element's
# bytes, and the frames. One warp an item, so that no warp waits for another; float32 and 32 frames
# need the registers of more.
_TILE: Lines = {
    (32, 2, 16): {80: c(1)},
    (64, 2, 16): {80: c(1)},
    (128, 2, 16): {80: c(1)},
    (32, 4, 16): {80: c(1)},
    (64, 4, 16): {80: c(2)},
    (128, 4, 16): {80: c(4)},
    (32, 2, 32): {80: c(1)},
    (64, 2, 32): {80: c(2)},
    (128, 2, 32): {80: c(4)},
    (32, 4, 32): {80: c(2)},
    (64, 4, 32): {80: c(8)},
    (128, 4, 32): {80: c(8)},
}
TEMPORAL_ATTENTION: dict[str, Lines] = {
    "temporal_attention_rows_forward": _ROWS,
    "temporal_attention_rows_backward": _ROWS,
    "temporal_attention_tile_forward": _TILE,
    "temporal_attention_tile_backward": _TILE,
}

# --- spatial_attention -----------------------------------------------------------------------
# The variant is the widest head and an element's bytes, or the widest head and the most tokens.
# Three stages: with two, the next keys' copies are asked for only when a tile is done. With
# mma.sync, programs of 64 queries and 4 warps fit a multiprocessor three at a time. On 9.0, where
# memory is fast, 128 queries halve the reads of K and V from the L2 cache; wgmma needs fewer
# registers, so that two such programs fit.
_ATTEND = c(4, 3, BLOCK_M=64, BLOCK_N=32)
_ATTEND_90, _ATTEND_90_WIDE = (c(8, 3, BLOCK_M=128, BLOCK_N=keys) for keys in (64, 32))
_DKV_32, _DKV_16 = (c(4, 3, BLOCK_M=rows, BLOCK_N=64) for rows in (32, 16))
_DKV_90 = c(4, 2, BLOCK_M=32, BLOCK_N=64)  # a third stage costs a program a multiprocessor
# dK and dV of 256 keys take half the registers; with 32 queries at a time mma.sync would spill.
_WHOLE_32, _WHOLE_16 = (c(8, 2, BLOCK_M=rows) for rows in (32, 16))
SPATIAL_ATTENTION: dict[str, Lines] = {
    "spatial_attention_forward": {
        (64, 2): {80: _ATTEND, 90: _ATTEND_90, 120: _ATTEND},
        (128, 2): {80: _ATTEND, 90: _ATTEND_90_WIDE, 120: _ATTEND},
        (64, 4): {80: c(8, BLOCK_M=32, BLOCK_N=32)},
        (128, 4): {80: c(4, BLOCK_M=16, BLOCK_N=32)},
    },
    "spatial_attention_backward_dq": {
        (64, 2): {80: c(4, 3, BLOCK_M=64, BLOCK_N=32)},
        (128, 2): {80: c(4, 3, BLOCK_M=64, BLOCK_N=16), 89: c(4, 2, BLOCK_M=64, BLOCK_N=32)},
        (64, 4): {80: c(8, BLOCK_M=32, BLOCK_N=32)},
        (128, 4): {80: c(4, BLOCK_M=32, BLOCK_N=16)},
    },
    "spatial_attention_backward_dkv": {
        (64, 2): {80: _DKV_32, 90: _DKV_90, 120: _DKV_32},
        (128, 2): {80: _DKV_16, 90: _DKV_90, 120: c(4, BLOCK_M=16, BLOCK_N=64)},
        (64, 4): {80: c(4, BLOCK_M=16, BLOCK_N=32)},
        (128, 4): {80: c(4, BLOCK_M=16, BLOCK_N=32)},
    },
    "spatial_attention_backward_whole": {
        (64, 64): {80: c(4, 2, BLOCK_M=32)},
        (64, 128): {80: c(4, 2, BLOCK_M=16), 90: _WHOLE_32, 120: c(4, 2, BLOCK_M=16)},
        (64, 256): {80: _WHOLE_16, 90: _WHOLE_32, 120: _WHOLE_16},
        (80, 256): {80: c(8, BLOCK_M=16), 90: _WHOLE_32, 120: c(8, BLOCK_M=16)},
        (128, 128): {80: _WHOLE_16, 120: c(8, BLOCK_M=16)},
    },
}

# --- corrupt_tokens --------------------------------------------------------------------------
# A program is one warp. With 256 channels each lane has 16 bytes of bfloat16 and draws four normals
# twice. In the backward pass a lane has 12 such loads in flight: 6 KB a warp, 80 KB on an SM of 14
# warps.
CORRUPT_TOKENS: dict[str, Lines] = {
    "corrupt_tokens_forward": {
        "many rows": {80: c(1, ROWS=8, CHANNELS=256)},
        "few rows": {80: c(1, ROWS=2, CHANNELS=256)},
        "narrow": {80: c(1, ROWS=8, CHANNELS=128)},
    },
    "corrupt_tokens_backward": {
        "wide": {80: c(1, CLIPS=4, CHANNELS=256)},
        "narrow": {80: c(1, CLIPS=16, CHANNELS=64)},
    },
    "corrupt_tokens_keypoints": {None: {80: c(1, FRAMES=8, BLOCK=128)}},
}

# --- reconstruction_loss ---------------------------------------------------------------------
# The variant is the tile's channels. A thread has 32 elements: in bfloat16, 4 vectors of 16 bytes
# of each of pred and target are in flight, at 56 registers. A multiprocessor then has 9 programs
# and 144 KB in flight (less for tokens that are not corrupted), where 32 KB keep the memory busy.
# Larger tiles would leave the card idle at the end.
RECONSTRUCTION_LOSS: dict[str, Lines] = {
    "reconstruction_loss_forward": {
        64: {80: c(4, ROWS=64, BLOCK_D=64)},
        128: {80: c(4, ROWS=32, BLOCK_D=128)},
        256: {80: c(4, ROWS=16, BLOCK_D=256)},
    },
    "reconstruction_loss_scale": {
        64: {80: c(4, ROWS=64, BLOCK_D=64)},
        128: {80: c(4, ROWS=32, BLOCK_D=128)},
        256: {80: c(4, ROWS=16, BLOCK_D=256)},
    },
    "block_sums": {None: {80: c(32, BLOCK=32768)}},
    # The variant is the most partial sums that one pass takes.
    "finish": {
        32: {80: c(1, BLOCK=32)},
        512: {80: c(4, BLOCK=512)},
        4096: {80: c(8, BLOCK=4096)},
    },
}

# --- heatmap_loss ----------------------------------------------------------------------------
# The variant is the tile's columns: those of the heatmap, 128 at most. A heatmap of 64×48 is one
# tile, so that 32 clips run in a single wave, with 16 elements and 48 registers a thread. Wider
# tiles of 8 warps spill.
HEATMAP_LOSS: dict[str, Lines] = {
    "heatmap_loss_forward": {
        32: {80: c(4, BLOCK_H=32, BLOCK_W=32)},
        64: {80: c(8, BLOCK_H=64, BLOCK_W=64)},
        128: {80: c(4, BLOCK_H=16, BLOCK_W=128)},
    },
    "heatmap_loss_scale": {None: {80: c(4, BLOCK=4096)}},
}


# --- warp_clips ------------------------------------------------------------------------------
# The variant is how frames are read: words of 8 bytes, bytes of pixels side by side, or bytes of
# any strides. A program is one warp: nothing waits at barriers, and its matrix is inverted in
# float64 once for 32 rows. A thread takes four pixels at a time; with any strides, whose addresses
# need more registers, two. On an H200, where memory waits for programs, 16 rows of 64 columns load
# twice as much at a time as 32 rows of 32: 30 µs by estimate where those take 44.
def _warp(rows: int) -> dict[int, Config]:
    return {80: c(1, BANDS=32 // rows, BLOCK_Y=rows, BLOCK_X=32)}


WARP_CLIPS: dict[str, Lines] = {
    "warp_clips": {
        "words": {**_warp(4), 90: c(1, BANDS=4, BLOCK_Y=4, BLOCK_X=64), 120: _warp(4)[80]},
        "packed": _warp(4),
        "any": _warp(2),
    },
}


CONFIGS: dict[str, Lines] = {
    **TEMPORAL_ATTENTION,
    **SPATIAL_ATTENTION,
    **CORRUPT_TOKENS,
    **RECONSTRUCTION_LOSS,
    **HEATMAP_LOSS,
    **WARP_CLIPS,
}
"""Kernel name → variant → compute capability → configuration."""

CONFIGS = overrides.load(CONFIGS, os.environ)


class Lookup(NamedTuple):
    """One call of :func:`config`: the line it asked for, and the capability of the entry it got."""

    kernel: str
    variant: Variant
    arch: int
    config: Config


_noted: list[Lookup] | None = None


@contextmanager
def noting() -> Iterator[list[Lookup]]:
    """Within it lookups are noted, each with a configuration object of its own.

    So the identity of a recorded launch's configuration shows which line of the table it is from.
    """
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def config(kernel: str, variant: Variant, arch: int) -> Config:
    """The configuration of ``kernel`` on a card of compute capability ``arch``.

    Raises:
        KeyError: the table has no such kernel or variant, which is a bug.
    """
    line = CONFIGS[kernel][variant]
    entry = max((entry_arch for entry_arch in line if entry_arch <= arch), default=min(line))
    if _noted is None:
        return line[entry]
    lookup = Lookup(kernel, variant, entry, Config(*line[entry]))
    _noted.append(lookup)
    return lookup.config
