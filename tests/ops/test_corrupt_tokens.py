from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import philox

SEED = torch.tensor(2024)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


TOKENS, KEYPOINTS = random(4, 3, 12, 10), random(5, 10, seed=1)
POSITION = random(3, 17, 10, seed=2)


def noise_of(tokens: Tensor, seed: Tensor = SEED, first_clip: int = 0) -> Tensor:
    """The noise that a token gets if it is noised, straight from the generator."""
    batch, frames, n, width = tokens.shape
    clips = torch.arange(first_clip, first_clip + batch)
    drawn = philox.gaussian_rows(seed, clips, torch.arange(frames * n)[None], width)
    return drawn.reshape(tokens.shape)


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_branches(selection: str) -> None:
    corrupted = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED, selection=selection, noise_std=0.5)
    clean, masked, noised = corrupted.x[:, :, :, :12]
    assert torch.equal(clean, TOKENS)
    assert (masked[corrupted.masked] == 0).all()
    assert torch.equal(masked[~corrupted.masked], TOKENS[~corrupted.masked])
    assert torch.equal(noised[~corrupted.noised], TOKENS[~corrupted.noised])
    expected = TOKENS + 0.5 * noise_of(TOKENS)
    assert torch.equal(noised[corrupted.noised], expected[corrupted.noised])
    assert torch.equal(corrupted.x[:, :, :, 12:], KEYPOINTS.expand(3, 4, 3, 5, 10))


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.45, 0.5, 1.0])
def test_exact_count(ratio: float) -> None:
    corrupted = ops.corrupt_tokens(
        TOKENS, KEYPOINTS, seed=SEED, mask_ratio=ratio, noise_ratio=1 - ratio
    )
    assert (corrupted.masked.flatten(1).sum(1) == round(ratio * 36)).all()
    assert (corrupted.noised.flatten(1).sum(1) == round((1 - ratio) * 36)).all()


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_bernoulli_rate(ratio: float) -> None:
    tokens = torch.zeros(200, 3, 48, 1)
    corrupted = ops.corrupt_tokens(
        tokens,
        torch.zeros(0, 1),
        seed=SEED,
        selection="bernoulli",
        mask_ratio=ratio,
        noise_ratio=ratio,
    )
    n = tokens.numel()
    allowed = 4 * math.sqrt(n * ratio * (1 - ratio))
    assert abs(corrupted.masked.sum() - n * ratio) <= allowed
    assert abs(corrupted.noised.sum() - n * ratio) <= allowed
    both = (corrupted.masked & corrupted.noised).sum()
    p = ratio**2
    assert abs(both - n * p) <= 4 * math.sqrt(n * p * (1 - p))
    if 0 < ratio < 1:  # counts scatter from clip to clip, unlike those of "exact"
        assert corrupted.masked.flatten(1).sum(1).unique().numel() > 10


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_nothing_corrupted(selection: str) -> None:
    corrupted = ops.corrupt_tokens(
        TOKENS, KEYPOINTS, POSITION, seed=SEED, mask_ratio=0, noise_ratio=0, selection=selection
    )
    assert not corrupted.masked.any()
    assert not corrupted.noised.any()
    assert torch.equal(corrupted.x[1], corrupted.x[0])
    assert torch.equal(corrupted.x[2], corrupted.x[0])


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_everything_corrupted(selection: str) -> None:
    corrupted = ops.corrupt_tokens(
        TOKENS, KEYPOINTS, seed=SEED, mask_ratio=1, noise_ratio=1, selection=selection
    )
    assert corrupted.masked.all()
    assert corrupted.noised.all()
    assert (corrupted.x[1, :, :, :12] == 0).all()
    assert torch.equal(corrupted.x[2, :, :, :12], TOKENS + noise_of(TOKENS))


def test_position_after_and_before() -> None:
    after = ops.corrupt_tokens(TOKENS, KEYPOINTS, POSITION, seed=SEED)
    before = ops.corrupt_tokens(TOKENS, KEYPOINTS, POSITION, seed=SEED, position_after=False)
    plain = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED)
    assert torch.equal(after.x, plain.x + POSITION)
    assert torch.equal(before.x[0], after.x[0])
    torch.testing.assert_close(before.x[2], after.x[2])
    assert torch.equal(before.masked, after.masked)
    here = before.masked
    assert (before.x[1, :, :, :12][here] == 0).all()
    assert torch.equal(after.x[1, :, :, :12][here], POSITION[:, :12].expand_as(TOKENS)[here])
    assert torch.equal(before.x[1, :, :, 12:], after.x[1, :, :, 12:])


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_first_clip_makes_any_split_draw_alike(selection: str) -> None:
    whole = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED, selection=selection, first_clip=6)
    parts = [
        ops.corrupt_tokens(
            TOKENS[i : i + 2], KEYPOINTS, seed=SEED, selection=selection, first_clip=6 + i
        )
        for i in (0, 2)
    ]
    assert torch.equal(whole.x, torch.cat([part.x for part in parts], dim=1))
    assert torch.equal(whole.masked, torch.cat([part.masked for part in parts]))
    assert torch.equal(whole.noised, torch.cat([part.noised for part in parts]))


def test_clips_seeds_and_branches_differ() -> None:
    corrupted = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED)
    flags = torch.cat((corrupted.masked, corrupted.noised)).flatten(1)
    others = [torch.tensor(2025), torch.tensor(2024 + (1 << 32)), torch.tensor(-2024)]
    for seed in others:
        other = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=seed)
        flags = torch.cat((flags, other.masked.flatten(1)))
    assert flags.unique(dim=0).shape == flags.shape


def test_a_seed_in_any_shape_of_one_element() -> None:
    a = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED)
    b = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=SEED.reshape(1, 1))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_flags_and_noise_do_not_depend_on_dtype_or_width() -> None:
    tokens = torch.zeros(2, 3, 12, 10)
    expected = ops.corrupt_tokens(tokens, KEYPOINTS, seed=SEED)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        corrupted = ops.corrupt_tokens(tokens.to(dtype), KEYPOINTS, seed=SEED)
        assert torch.equal(corrupted.masked, expected.masked)
        assert torch.equal(corrupted.x, expected.x.to(dtype))
    narrow = ops.corrupt_tokens(tokens[..., :7], KEYPOINTS[:, :7], seed=SEED)
    assert torch.equal(narrow.x, expected.x[..., :7])


def test_pinned_values() -> None:
    """The layout of the counters is a promise: these values hold on every device and version."""
    corrupted = ops.corrupt_tokens(
        torch.zeros(1, 2, 6, 4), torch.zeros(1, 4), seed=torch.tensor(7), noise_ratio=1.0
    )
    assert corrupted.masked.flatten().nonzero().flatten().tolist() == [0, 4, 5, 8, 11]
    noise = torch.tensor([-1.656407, -0.551622, -0.218921, -1.773907])
    torch.testing.assert_close(corrupted.x[2, 0, 1, 5], noise, rtol=0, atol=1e-6)


def test_nan_tokens_are_wiped_by_the_mask_only() -> None:
    tokens = torch.full((1, 3, 12, 4), math.nan)
    corrupted = ops.corrupt_tokens(tokens, torch.zeros(2, 4), seed=SEED)
    assert torch.equal(corrupted.x[1, :, :, :12].isnan().all(-1), ~corrupted.masked)
    assert corrupted.x[[0, 2], :, :, :12].isnan().all()
    assert not corrupted.x[:, :, :, 12:].isnan().any()


def test_gradients_are_the_documented_sums() -> None:
    tokens, keypoints, position = (
        t.double().requires_grad_() for t in (TOKENS.clone(), KEYPOINTS.clone(), POSITION.clone())
    )
    corrupted = ops.corrupt_tokens(tokens, keypoints, position, seed=SEED)
    grad = random(*corrupted.x.shape, seed=5, dtype=torch.float64)
    d_tokens, d_keypoints, d_position = torch.autograd.grad(
        corrupted.x, (tokens, keypoints, position), grad
    )
    clean, masked, noised = grad[:, :, :, :12]
    keep = (~corrupted.masked)[..., None]
    torch.testing.assert_close(d_tokens, clean + keep * masked + noised)
    torch.testing.assert_close(d_keypoints, grad[:, :, :, 12:].sum(dim=(0, 1, 2)))
    torch.testing.assert_close(d_position, grad.sum(dim=(0, 1)))


def test_one_of_everything_and_no_keypoints() -> None:
    for keypoints in (torch.ones(1, 1), torch.ones(0, 1)):
        corrupted = ops.corrupt_tokens(torch.ones(1, 1, 1, 1), keypoints, seed=SEED, mask_ratio=1)
        assert corrupted.x.shape == (3, 1, 1, 1 + len(keypoints), 1)
        assert corrupted.masked.all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask_ratio": 1.1}, ValueError, r"mask_ratio must be between 0.0 and 1.0, got 1.1"),
        ({"noise_ratio": -0.1}, ValueError, r"noise_ratio must be between 0.0 and 1.0, got -0.1"),
        ({"noise_ratio": math.nan}, ValueError, r"noise_ratio must be .* got nan"),
        ({"noise_std": -1.0}, ValueError, r"noise_std must be between 0.0 and 1e\+30, got -1.0"),
        ({"noise_std": 1e300}, ValueError, r"noise_std must be between .* got 1e\+300"),
        ({"selection": "all"}, ValueError, r"selection must be one of exact, bernoulli, got 'all'"),
        ({"first_clip": -1}, ValueError, r"first_clip must be between 0 and .*, got -1"),
        ({"seed": "3"}, TypeError, r"seed must be an int64 tensor of one element or an .* '3'"),
        ({"seed": 2**63}, ValueError, r"seed must be between -9223372036854775808 and 92"),
        ({"seed": torch.tensor(3.0)}, TypeError, r"seed must be of dtype int64, got float32"),
        (
            {"seed": torch.tensor([1, 2])},
            ValueError,
            r"seed must hold one element, got shape \[2\]",
        ),
        (
            {"position": torch.zeros(3, 16, 10)},
            ValueError,
            r"position must have shape \[T, N\+K, D\].*N\+K=17.* got \[3, 16, 10\]",
        ),
        (
            {"keypoint_tokens": torch.zeros(5, 9)},
            ValueError,
            r"keypoint_tokens must have shape \[K, D\] with D=10 .* got \[5, 9\]",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"tokens": TOKENS, "keypoint_tokens": KEYPOINTS, "seed": SEED, **options}
    with pytest.raises(error, match=message):
        ops.corrupt_tokens(**arguments)


def test_an_integer_is_a_seed_too() -> None:
    for seed in (11, -(2**63), 2**63 - 1):
        one = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=seed)
        other = ops.corrupt_tokens(TOKENS, KEYPOINTS, seed=torch.tensor(seed))
        assert torch.equal(one.x, other.x)
