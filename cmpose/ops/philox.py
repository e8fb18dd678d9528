"""Counter-based random numbers, the same on every device: Philox4x32-10 (Salmon et al., SC 2011).

A 64-bit key and a 128-bit counter give four 32-bit words; no state is kept between calls. Words are
held in int64 tensors, with values in 0 .. 2³²−1. A kernel must give the same words bit for bit.

**Layout.** The key is the seed: (low 32 bits, high 32 bits). The counter is four words,

| word | meaning |
|---|---|
| c0 | which of the words that are drawn for c1: see below |
| c1 | the token's index t·N + n, or the index of a block of 128 permuted indices |
| c2 | the clip's global index: first_clip + b |
| c3 | the purpose: ``TAG_MASK`` 0, ``TAG_NOISE`` 1, ``TAG_GAUSSIAN`` 2, ``TAG_DROP_PATH`` ≥ 3 |

- ``exact`` selection, round r of 12 (c3 = TAG_MASK or TAG_NOISE): the round's key is
  word r mod 4 at c0 = 12 + ⌊r/4⌋, c1 = 0, scaled to 0 .. n−1 as (word · n) >> 32; the swap bit of
  index i is bit i mod 32 of word ⌊i/32⌋ mod 4 at c0 = r, c1 = ⌊i/128⌋.
- ``bernoulli`` selection: word 0 at c0 = 16, c1 = token; the token is selected when
  word < round(p · 2³²).
- Drop path, ``exact``: a permutation of the B·T frames that are drawn for at once, as above with
  c3 = TAG_KEPT_SAMPLES (4) + 2 · block + branch and c2 = first_clip.
- Drop path, ``bernoulli`` (c3 = TAG_DROP_PATH): word 0 at c0 = 16,
  c1 = (2 · block + branch) · T + frame.
- Gaussian noise (c3 = TAG_GAUSSIAN): channels 4e .. 4e+3 of a token are the four normals of the
  words at c0 = e, c1 = token (:func:`normals`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TAG_MASK, TAG_NOISE, TAG_GAUSSIAN, TAG_DROP_PATH, TAG_KEPT_SAMPLES = range(5)
PERMUTATION_ROUNDS = 12
KEY_OFFSET = PERMUTATION_ROUNDS  # c0 of the first four round keys
BERNOULLI_OFFSET = 16

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85  # of the keys
WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, seed: Tensor) -> Words:
    """Philox4x32-10.

    Args:
        counter: four int64 tensors that broadcast against each other, values in 0 .. 2³²−1.
        seed: int64, one element; its 64 bits are the key.

    Returns:
        Four int64 tensors of the broadcast shape, values in 0 .. 2³²−1.
    """
    (m0, m1), (w0, w1) = MULTIPLIERS, INCREMENTS
    seed = seed.reshape(())
    k0, k1 = seed & WORD, (seed >> 32) & WORD
    c0, c1, c2, c3 = counter
    # As numbers: of an arange torch.compile would make an index of 32 bits, and multiply that.
    c0, c2 = c0 & WORD, c2 & WORD
    for _ in range(10):
        # The 64-bit products wrap around in int64; their upper halves are masked below. The lower
        # halves (c1, c3) keep other bits above bit 31 until the next XOR is masked.
        p0, p1 = c0 * m0, c2 * m1
        c0, c1 = ((p1 >> 32) ^ (c1 ^ k0)) & WORD, p1
        c2, c3 = ((p0 >> 32) ^ (c3 ^ k1)) & WORD, p0
        k0, k1 = (k0 + w0) & WORD, (k1 + w1) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def normals(words: Words) -> Tensor:
    """Four float32 standard normals of each counter's words, by Box–Muller: [..., 4].

    With u = (2 · (word >> 9) + 1) · 2⁻²⁴, which float32 holds exactly and which is never 0 or 1,
    words (a, b) give √(−2 ln u_a) · (cos 2πu_b, sin 2πu_b); words 0, 1 make the first two normals,
    words 2, 3 the last two.
    """
    u0, u1, u2, u3 = (((word >> 9) * 2 + 1).to(torch.float32) * 2.0**-24 for word in words)
    pairs = []
    for u, angle in ((u0, u1 * (2 * math.pi)), (u2, u3 * (2 * math.pi))):
        radius = (-2.0 * u.log()).sqrt()
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, dim=-1)


def exact_subsets(seed: Tensor, clips: Tensor, tags: Tensor, n: int) -> Tensor:
    """Where a keyed permutation of 0 .. n−1 sends each index, for every tag and clip.

    It is the swap-or-not shuffle (Hoang, Morris and Rogaway, CRYPTO 2012): in a round with key κ,
    index x and its partner κ − x mod n swap if a random bit of the larger one is 1. It works for
    any n, and the image of an index is computed without those of others.

    Args:
        seed: int64, one element.
        clips: [B] int64, global clip indices.
        tags: [P] int64, purposes (c3).
        n: how many indices there are, ≥ 1.

    Returns:
        [P, B, n] int64, a permutation in each row.
    """
    device = seed.device
    rounds = torch.arange(PERMUTATION_ROUNDS, device=device)
    blocks = torch.arange((n + 127) // 128, device=device)
    tag, clip = tags[:, None, None, None], clips[:, None, None]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    keys = torch.stack(philox4x32((rounds[:3, None] + KEY_OFFSET, zero, clip, tag), seed), dim=-1)
    keys = (keys.flatten(-3) * n) >> 32  # [P, B, 12]
    words = torch.stack(philox4x32((rounds[:, None], blocks, clip, tag), seed), dim=-1)
    words = words.flatten(-2)  # [P, B, 12, 4 · blocks]

    index = torch.arange(n, device=device).expand(*keys.shape[:2], n)
    for r in range(PERMUTATION_ROUNDS):
        partner = (keys[..., r : r + 1] - index) % n
        larger = torch.maximum(index, partner)
        bit = (words[:, :, r].gather(-1, larger >> 5) >> (larger & 31)) & 1
        index = torch.where(bit == 1, partner, index)
    return index


def bernoulli_subsets(seed: Tensor, clips: Tensor, tag: int, n: int, probability: float) -> Tensor:
    """[B, n] bool: each index of each clip is chosen with ``probability``, independently."""
    return words_of_clips(seed, clips, tag, n) < round(probability * 2.0**32)


def words_of_clips(seed: Tensor, clips: Tensor, tag: int, n: int) -> Tensor:
    """[B, n] int64: a word in 0 .. 2³²−1 for each index of each clip [B]."""
    tokens = torch.arange(n, device=seed.device)
    offset = torch.full((), BERNOULLI_OFFSET, device=seed.device)
    purpose = torch.full((), tag, device=seed.device)
    return philox4x32((offset, tokens, clips[:, None], purpose), seed)[0]


def gaussian_rows(seed: Tensor, clips: Tensor, tokens: Tensor, width: int) -> Tensor:
    """Standard normals for some tokens: clips [B], tokens [B or 1, R] → [B, R, width] float32."""
    elements = torch.arange((width + 3) // 4, device=seed.device)
    purpose = torch.full((), TAG_GAUSSIAN, device=seed.device)
    counter = (elements, tokens[:, :, None], clips[:, None, None], purpose)
    return normals(philox4x32(counter, seed)).flatten(-2)[..., :width]
