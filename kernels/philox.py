"""Random numbers inside a kernel: Philox4x32-10, standard normals and keyed subsets.

``cmpose.ops.philox`` defines what is drawn and how the counters are laid out. Words and subsets
are the same bit for bit; normals are the same formula in float32, evaluated here so that they are
within 2e-6 of its exact value.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

_TAG_GAUSSIAN = tl.constexpr(2)
_ROUNDS = tl.constexpr(12)  # of the permutation; c0 = 12, 13 and 14 then give its round keys
_BERNOULLI = tl.constexpr(16)

_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
_SQRT_HALF = tl.constexpr(0x3F3504F3)
_EXPONENT = tl.constexpr(-(1 << 23))  # sign and exponent
_LN2_PER_BIT = tl.constexpr(math.log(2) * 2.0**-23)

# (ln(1 + f) - f + f²/2) / f³ for 1 + f from √½ to √2; least maximum of ln's relative error, 3e-8.
_L0 = tl.constexpr(0.3333390951)
_L1 = tl.constexpr(-0.2500133812)
_L2 = tl.constexpr(0.1996306330)
_L3 = tl.constexpr(-0.1657758504)
_L4 = tl.constexpr(0.1491476893)
_L5 = tl.constexpr(-0.1426748633)
_L6 = tl.constexpr(0.0870043486)

# Taylor series of sin and cos of t quarter turns; for |t| ≤ ½ within 2e-9 and 3e-8.
_QUARTER = math.pi / 2
_S1 = tl.constexpr(_QUARTER)
_S3 = tl.constexpr(-(_QUARTER**3) / math.factorial(3))
_S5 = tl.constexpr(_QUARTER**5 / math.factorial(5))
_S7 = tl.constexpr(-(_QUARTER**7) / math.factorial(7))
_S9 = tl.constexpr(_QUARTER**9 / math.factorial(9))
_C2 = tl.constexpr(-(_QUARTER**2) / math.factorial(2))
_C4 = tl.constexpr(_QUARTER**4 / math.factorial(4))
_C6 = tl.constexpr(-(_QUARTER**6) / math.factorial(6))
_C8 = tl.constexpr(_QUARTER**8 / math.factorial(8))


@triton.jit
def philox4x32(seed, c0, c1, c2, c3):  # type: ignore[no-untyped-def]
    """The four uint32 words of a counter, whose own words may be of any integer type and broadcast.

    ``tl.philox`` gives the same words, but takes two multiplications for the two halves of each
    product. Here most products are one instruction (mul.wide.u32).

    Args:
        seed: int64 scalar, the key: low 32 bits, high 32 bits.
        c0, c1, c2, c3: the counter; c0 sets the shape.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    _, c1 = tl.broadcast(c0, tl.cast(c1, tl.uint32))
    _, c2 = tl.broadcast(c0, tl.cast(c2, tl.uint32))
    _, c3 = tl.broadcast(c0, tl.cast(c3, tl.uint32))
    for _ in range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def radius(word):  # type: ignore[no-untyped-def]
    """√(−2 ln u), float32, of u = (2 · (word >> 9) + 1) · 2⁻²⁴.

    ln u is computed from u − 1, which is exact near 1. With lg2.approx the logarithm would be off
    by 2⁻²² there, and the radius by 3e-4.
    """
    # 1 + k · 2⁻²³, put together from bits, less 1 - 2⁻²⁴: exact, because u has 24 bits.
    u = ((word >> 9) | _ONE).to(tl.float32, bitcast=True) - (1 - 2.0**-24)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF) & _EXPONENT  # u = 2^e · (1 + f); this is e · 2²³
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = _L6 * f + _L5
    p = p * f + _L4
    p = p * f + _L3
    p = p * f + _L2
    p = p * f + _L1
    p = p * f + _L0
    ln = (p * f - 0.5) * (f * f) + f
    return tl.sqrt(-2.0 * (exponent.to(tl.float32) * _LN2_PER_BIT + ln))


@triton.jit
def rotation(word):  # type: ignore[no-untyped-def]
    """cos and sin, float32, of (2 · (word >> 9) + 1) · 2⁻²⁴ turns.

    The nearest quarter turn is split off in integers, which is exact. tl.sin and tl.cos would
    include the code that reduces huge angles, which needs a stack frame.
    """
    shifted = word + (1 << 29)  # bits 31 and 30: the nearest quarter turn
    # 1 + the rest in quarter turns, put together from bits, without the word's lowest 9.
    t = (((shifted >> 7) & 0x7FFFFC) | _ONE).to(tl.float32, bitcast=True) - (1.5 - 2.0**-22)
    z = t * t
    s = _S9 * z + _S7
    s = s * z + _S5
    s = s * z + _S3
    s = (s * z + _S1) * t
    c = _C8 * z + _C6
    c = c * z + _C4
    c = c * z + _C2
    c = c * z + 1.0
    swap = (shifted & (1 << 30)) != 0
    cos, sin = tl.where(swap, s, c), tl.where(swap, c, s)
    cos = tl.where(((shifted ^ (shifted << 1)) >> 31) != 0, -cos, cos)
    return cos, tl.where((shifted >> 31) != 0, -sin, sin)


@triton.jit
def normals(word0, word1, word2, word3):  # type: ignore[no-untyped-def]
    """Standard normals of E counters by Box–Muller: [E] words → [4 · E] float32.

    Counter e gives elements 4e .. 4e+3: words 0 and 1 the first two, words 2 and 3 the others.
    """
    r0, r1 = radius(word0), radius(word2)
    cos0, sin0 = rotation(word1)
    cos1, sin1 = rotation(word3)
    four = tl.join(tl.join(r0 * cos0, r1 * cos1), tl.join(r0 * sin0, r1 * sin1))
    return four.reshape(4 * word0.shape[0])  # from [E, pair, cos or sin]


@triton.jit
def gaussian(seed, clip, token, element):  # type: ignore[no-untyped-def]
    """Standard normals of a token: channels 4 · element .. 4 · element + 3, [E] → [4 · E]."""
    word0, word1, word2, word3 = philox4x32(seed, element, token, clip, _TAG_GAUSSIAN)
    return normals(word0, word1, word2, word3)


@triton.jit
def bernoulli(seed, clip, tag, index, limit):  # type: ignore[no-untyped-def]
    """Whether ``index`` is chosen, with probability limit · 2⁻³²; limit is 0 .. 2³² (so int64)."""
    word, _, _, _ = philox4x32(seed, index * 0 + _BERNOULLI, index, clip, tag)
    return word.to(tl.int64) < limit


@triton.jit
def permuted(seed, clip, tag, index, n):  # type: ignore[no-untyped-def]
    """Where the keyed permutation of 0 .. n−1 sends ``index``: the swap-or-not shuffle.

    15 Philox calls an index: 12 rounds, and 3 calls for the rounds' keys.

    Args:
        seed: int64 scalar, the key.
        clip: uint32, the clip's global index.
        tag: int32, the purpose.
        index: int32, the shape of the result; outside 0 .. n−1 the result has no meaning.
        n: size of the domain, < 2³¹.
    """
    zero = index * 0
    for group in range(_ROUNDS // 4):  # not unrolled: it is 5 Philox calls long
        keys = philox4x32(seed, zero + (_ROUNDS + group), zero, clip, tag)
        for step in tl.static_range(4):
            key = ((keys[step].to(tl.uint64) * n) >> 32).to(tl.int32)
            partner = key - index
            partner = tl.where(partner < 0, partner + n, partner)
            larger = tl.maximum(index, partner)
            word0, word1, word2, word3 = philox4x32(
                seed, zero + (4 * group + step), larger >> 7, clip, tag
            )
            even = tl.where((larger & 64) == 0, word0, word2)
            odd = tl.where((larger & 64) == 0, word1, word3)
            word = tl.where((larger & 32) == 0, even, odd)
            swap = ((word >> (larger & 31).to(tl.uint32)) & 1) != 0
            index = tl.where(swap, partner, index)
    return index
