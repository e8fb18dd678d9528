"""Philox against the known answers of its authors, another implementation, and statistics."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from cmpose.ops import philox

ONES = 0xFFFFFFFF


def seed_of(low: int, high: int) -> Tensor:
    value = low | high << 32
    return torch.tensor(value - (1 << 64) if value >> 63 else value)


def words(counter: tuple[int, ...], seed: Tensor) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(c) for c in counter)
    return tuple(int(w) for w in philox.philox4x32((c0, c1, c2, c3), seed))


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert words(counter, seed_of(*key)) == answer


def plain_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & ONES,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & ONES,
        )
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return c0, c1, c2, c3


def test_broadcasting_and_many_counters() -> None:
    seed = seed_of(0x89ABCDEF, 0xFEDCBA98)
    rows, columns = torch.tensor([[0], [5], [ONES]]), torch.tensor([1, 2**31, ONES - 1, 7])
    actual = philox.philox4x32((rows, columns, columns, rows), seed)
    for i in range(3):
        for j in range(4):
            r, c = int(rows[i, 0]), int(columns[j])
            expected = plain_philox((r, c, c, r), (0x89ABCDEF, 0xFEDCBA98))
            assert tuple(int(w[i, j]) for w in actual) == expected


def test_inductor_keeps_the_words() -> None:
    """Compiled C++ must wrap the 64-bit products as eager torch does."""
    seed = seed_of(0x89ABCDEF, 0xFEDCBA98)
    index = torch.arange(500)
    counter = (index, index * 8589934, ONES - index, torch.tensor(2))
    compiled = torch.compile(philox.philox4x32, fullgraph=True)
    actual, expected = compiled(counter, seed), philox.philox4x32(counter, seed)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_normals() -> None:
    count = 50_000
    counter = (torch.arange(count), *(torch.tensor(0) for _ in range(3)))
    drawn = philox.normals(philox.philox4x32(counter, torch.tensor(3))).double()  # type: ignore[arg-type]
    flat = drawn.flatten()
    n = flat.numel()
    # Standard errors of the first four moments of n standard normals; 4 of them.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(flat.pow(power).mean() - moment) < 4 * (variance / n) ** 0.5
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 4 / count**0.5
    uniform = torch.special.ndtr(flat).sort().values
    distance = (uniform - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / n**0.5  # Kolmogorov–Smirnov at 0.1 %


def test_normals_at_the_ends_of_the_range() -> None:
    low, high = torch.tensor(0), torch.tensor(ONES)
    for first in (low, high):
        for second in (low, high):
            assert philox.normals((first, second, second, first)).isfinite().all()


@pytest.mark.parametrize("n", [1, 2, 3, 31, 128, 129, 300])
def test_every_image_once(n: int) -> None:
    image = philox.exact_subsets(torch.tensor(1), torch.arange(5), torch.arange(2), n)
    assert torch.equal(image.sort(dim=-1).values, torch.arange(n).expand(2, 5, n))


def test_swap_or_not_by_hand() -> None:
    """The permutation of one clip as the layout describes it, one index at a time."""
    seed, clip, tag, n = torch.tensor(77), 3, philox.TAG_NOISE, 144
    expected = []
    for start in range(n):
        index = start
        for r in range(12):
            key = words((12 + r // 4, 0, clip, tag), seed)[r % 4] * n >> 32
            partner = (key - index) % n
            larger = max(index, partner)
            word = words((r, larger // 128, clip, tag), seed)[larger // 32 % 4]
            if word >> larger % 32 & 1:
                index = partner
        expected.append(index)
    image = philox.exact_subsets(seed, torch.tensor([clip]), torch.tensor([tag]), n)
    assert image[0, 0].tolist() == expected


def test_gaussian_rows_by_hand() -> None:
    seed = torch.tensor(-9)
    rows = philox.gaussian_rows(seed, torch.tensor([4, 9]), torch.tensor([[7, 50], [1, 8]]), 6)
    assert rows.shape == (2, 2, 6)
    for b, clip, r, token in ((0, 4, 1, 50), (1, 9, 0, 1)):
        expected = []
        for element in range(2):
            u = [
                (2 * (word >> 9) + 1) / 2**24
                for word in words((element, token, clip, philox.TAG_GAUSSIAN), seed)
            ]
            for radius, angle in ((u[0], u[1]), (u[2], u[3])):
                length = math.sqrt(-2 * math.log(radius))
                expected += [length * f(2 * math.pi * angle) for f in (math.cos, math.sin)]
        torch.testing.assert_close(rows[b, r], torch.tensor(expected[:6]), rtol=0, atol=1e-5)


def test_subsets_are_fair() -> None:
    """z-scores of single and pair inclusion have unit spread: 576 tokens, 4,000 draws."""
    n, draws, count = 576, 4000, 259
    image = philox.exact_subsets(torch.tensor(5), torch.arange(draws), torch.arange(2), n)
    inside = (image < count).float()
    p = count / n
    for branch in inside:
        single = (branch.sum(dim=0).double() - draws * p) / (draws * p * (1 - p)) ** 0.5
        pair_p = p * (count - 1) / (n - 1)
        pairs = (branch.T @ branch).double()
        pairs = pairs[torch.ones(n, n, dtype=torch.bool).triu(1)]
        pair = (pairs - draws * pair_p) / (draws * pair_p * (1 - pair_p)) ** 0.5
        # The spread of 576 singles is known to 3 %, that of 165,600 pairs to 0.2 %, more because
        # pairs share tokens; the extremes are those of as many normals.
        assert abs(single.std() - 1) < 0.12
        assert abs(pair.std() - 1) < 0.03
        assert single.abs().max() < 4.5
        assert pair.abs().max() < 6.0
    # Masked and noised tokens are independent of each other.
    both = (inside[0] * inside[1]).sum(dim=0).double()
    z = (both - draws * p * p) / (draws * p * p * (1 - p * p)) ** 0.5
    assert abs(z.std() - 1) < 0.12


def test_successive_seeds_are_unrelated() -> None:
    n, count = 144, 65
    inside = torch.stack(
        [
            philox.exact_subsets(torch.tensor(s), torch.arange(1), torch.arange(1), n)[0, 0] < count
            for s in range(300)
        ]
    ).double()
    p = count / n
    single = (inside.sum(dim=0) - 300 * p) / (300 * p * (1 - p)) ** 0.5
    assert abs(single.std() - 1) < 0.25
    neighbours = (inside[1:] * inside[:-1]).mean()
    assert abs(neighbours - p * p) < 4 * (p * p * (1 - p * p) / (299 * n)) ** 0.5


def test_triton_has_the_same_philox() -> None:
    """tl.philox in Triton's interpreter, in a process of its own: the switch is read at import."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("support") / "triton_philox.py"
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["equal", "256"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++")
def test_inductor_multiplies_numbers_not_indices() -> None:
    """Of a card's kernel an index has 32 bits, which Triton does not multiply by a larger constant.

    What Inductor makes an index it makes one on a CPU too.
    """

    def drawn(seed: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return philox.philox4x32((torch.arange(4), zero, torch.arange(4), zero), seed)[0]

    seed = seed_of(3, 5)
    torch._dynamo.reset()
    words, (code,) = run_and_get_code(torch.compile(drawn, fullgraph=True), seed)
    assert torch.equal(words, drawn(seed))
    assert str(philox.MULTIPLIERS[0]) in code
    assert re.findall(r"\d{10}L?\s*\*\s*x\d|x\d\s*\*\s*\d{10}", code) == []
