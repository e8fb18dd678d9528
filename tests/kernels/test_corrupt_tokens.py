from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels import configs, corrupt_tokens
from cmpose.kernels import philox as kernel_philox
from cmpose.kernels.launch import launch, recording
from cmpose.ops import philox
from cmpose.ops.corrupt_tokens import (
    corrupt_tokens_backward_reference,
    corrupt_tokens_reference,
)
from tests.kernels.losses import DTYPES, HALVES, layouts, random, spread
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_repeats,
    assert_same_bits,
    assert_writes_everything,
    hostile_gradients,
)

SEEDS = (0x1234567890ABCDEF, -5, -(2**63), 2**31)
NOISE = 1e-5  # what two devices may differ in, for noise of standard deviation 1
ONE_WARP = configs.Config({}, 1)


# -- random numbers -------------------------------------------------------------------------------


@triton.jit
def words_kernel(seed_ptr, out_ptr, c1, c2, c3, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = i.to(tl.uint32) * 16777259
    words = kernel_philox.philox4x32(tl.load(seed_ptr), c0, i + c1, c2, c3)
    for j in tl.static_range(4):
        tl.store(out_ptr + j * N + i, words[j].to(tl.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_words(seed: int, device: str) -> None:
    key = torch.tensor(seed, device=device)
    actual = torch.empty(4, 256, dtype=torch.int64, device=device)
    launch(words_kernel, (1,), key, actual, 7, 2**32 - 2, 2, config=ONE_WARP, N=256)
    i = torch.arange(256, device=device)
    two = torch.tensor(2, device=device)
    expected = philox.philox4x32((i * 16777259 % 2**32, i + 7, two * 0 + 2**32 - 2, two), key)
    assert torch.equal(actual, torch.stack([word.expand(256) for word in expected]))


@triton.jit
def box_muller_kernel(radius_ptr, cos_ptr, sin_ptr, start, step, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    word = ((start + step * i) << 9).to(tl.uint32) | (i.to(tl.uint32) & 511)
    tl.store(radius_ptr + i, kernel_philox.radius(word))
    cos, sin = kernel_philox.rotation(word)
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


@pytest.mark.parametrize(
    ("start", "step"),
    [(0, 1), (2**23 - 2**16, 1), *((i, 128) for i in range(0, 128, 37))],
    ids=["near 0", "near 1", "0 of 128", "37 of 128", "74 of 128", "111 of 128"],
)
def test_box_muller(start: int, step: int, device: str) -> None:
    """Normals are within 2e-6 of the exact ones, by the radii and angles of some of all 2²³ u."""
    count, block = 2**16, 2**13
    radius, cos, sin = torch.empty(3, count, device=device)
    launch(box_muller_kernel, (8,), radius, cos, sin, start, step, config=ONE_WARP, N=block)
    k = start + step * torch.arange(count, dtype=torch.float64, device=device)
    u = (2 * k + 1) * 2.0**-24
    angle = 2 * math.pi * u
    radius_error = (radius - (-2 * u.log()).sqrt()).abs().max()
    angle_error = torch.maximum((cos - angle.cos()).abs().max(), (sin - angle.sin()).abs().max())
    assert radius_error < 1e-6
    assert angle_error < 1.6e-7
    assert radius_error + 5.78 * angle_error < 2e-6


@triton.jit
def subsets_kernel(seed_ptr, out_ptr, clip, n, limit, EXACT: tl.constexpr, N: tl.constexpr):
    key = tl.load(seed_ptr)
    tag, index = tl.program_id(0), tl.arange(0, N)
    if EXACT:
        chosen = kernel_philox.permuted(key, clip, tag, index, n)
    else:
        chosen = kernel_philox.bernoulli(key, clip, tag, index, limit).to(tl.int32)
    tl.store(out_ptr + tag * n + index, chosen, mask=index < n)


@pytest.mark.parametrize("n", [1, 2, 31, 128, 129, 700])
def test_permutation(n: int, device: str) -> None:
    key = torch.tensor(SEEDS[n % 4], device=device)
    actual = torch.empty(2, n, dtype=torch.int32, device=device)
    launch(subsets_kernel, (2,), key, actual, 2**32 - 9, n, 0, config=ONE_WARP, EXACT=True, N=1024)
    clips, tags = (torch.tensor(v, device=device) for v in ([2**32 - 9], [0, 1]))
    assert torch.equal(actual.long(), philox.exact_subsets(key, clips, tags, n)[:, 0])


@pytest.mark.parametrize("probability", [0.0, 2.0**-32, 0.3, 0.5, 1.0])
def test_bernoulli(probability: float, device: str) -> None:
    """The limit of probability 1 is 2³², which 32 bits do not hold."""
    n, key = 500, torch.tensor(SEEDS[0], device=device)
    actual = torch.empty(2, n, dtype=torch.int32, device=device)
    limit = round(probability * 2.0**32)
    launch(subsets_kernel, (2,), key, actual, 3, n, limit, config=ONE_WARP, EXACT=False, N=512)
    for tag in range(2):
        clip = torch.tensor([3], device=device)
        expected = philox.bernoulli_subsets(key, clip, tag, n, probability)[0]
        assert torch.equal(actual[tag] != 0, expected)
    assert (actual.float().mean() - probability).abs() < 0.1


# -- forward --------------------------------------------------------------------------------------


def inputs(
    shape: tuple[int, int, int, int],
    keypoints: int,
    device: str,
    *dtypes: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, keypoint tokens and position, of one dtype or of three."""
    _, frames, patches, dim = shape
    shapes = shape, (keypoints, dim), (frames, patches + keypoints, dim)
    tensors = (random(*s, seed=i, dtype=dtypes[i % len(dtypes)]) for i, s in enumerate(shapes))
    tokens, keypoint_tokens, position = (values.to(device) for values in tensors)
    return tokens, keypoint_tokens, position


def exact_noise(seed: Tensor, clips: Tensor, tokens: int, dim: int) -> Tensor:
    """The formula of ``philox.normals`` in float64: [B, tokens, dim]."""
    element = torch.arange((dim + 3) // 4, device=seed.device)
    token = torch.arange(tokens, device=seed.device)[:, None]
    tag = torch.tensor(2, device=seed.device)
    words = philox.philox4x32((element, token, clips[:, None, None], tag), seed)
    u = [((word >> 9) * 2 + 1).double() * 2.0**-24 for word in words]
    normals = [
        (-2 * u[i].log()).sqrt() * function(2 * math.pi * u[i + 1])
        for i in (0, 2)
        for function in (torch.cos, torch.sin)
    ]
    return torch.stack(normals, dim=-1).flatten(-2)[..., :dim]


# Many parameters: those of the kernel.
def exact(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None,
    seed: Tensor,
    masked: Tensor,
    noised: Tensor,
    noise_std: float,
    position_after: bool,
    first_clip: int,
) -> Tensor:
    """x in float64, with these flags."""
    batch, frames, patches, dim = tokens.shape
    clips = torch.arange(first_clip, first_clip + batch, device=tokens.device)
    noise = exact_noise(seed, clips, frames * patches, dim).reshape(tokens.shape) * noise_std
    embedding = torch.zeros(
        frames, patches + len(keypoint_tokens), dim, device=tokens.device
    ).double()
    if position is not None:
        embedding += position
    clean = torch.cat(
        (tokens.double(), keypoint_tokens.double().expand(batch, frames, -1, -1)), dim=2
    )
    x = (clean + embedding).repeat(3, 1, 1, 1, 1)
    wiped = embedding[:, :patches].expand_as(tokens) if position_after else torch.zeros_like(noise)
    x[1, :, :, :patches][masked] = wiped[masked]
    x[2, :, :, :patches][noised] += noise[noised]
    return x


# Many parameters: those of the kernel.
def check_forward(
    tokens: Tensor,
    keypoint_tokens: Tensor,
    position: Tensor | None,
    *,
    seed: int = SEEDS[0],
    ratios: tuple[float, float] = (0.45, 0.45),
    noise_std: float = 1.0,
    selection: str = "bernoulli",
    position_after: bool = True,
    first_clip: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    key = torch.tensor([seed], device=tokens.device)
    options = (key, *ratios, noise_std, selection, position_after, first_clip)
    actual = corrupt_tokens.forward(tokens, keypoint_tokens, position, *options)
    eager = corrupt_tokens_reference(tokens, keypoint_tokens, position, *options)
    assert_same_bits(actual[1:], eager[1:])
    exact_parts = exact(
        tokens, keypoint_tokens, position, key, *actual[1:], noise_std, position_after, first_clip
    )
    for branch, a, b, c in zip(
        ("clean", "masked", "noised"), actual[0], eager[0], exact_parts, strict=True
    ):
        assert a.is_contiguous(), branch
        assert_as_close_as_eager(a, b, c, reduction=3)
    return actual


SHAPES: list[tuple[tuple[int, int, int, int], int]] = [
    ((1, 1, 1, 1), 1),
    ((2, 3, 2, 10), 1),
    ((1, 2, 7, 64), 3),
    ((3, 1, 3, 80), 2),
    ((1, 2, 1, 300), 1),
    ((1, 1, 2, 900), 0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "keypoints"), SHAPES)
def test_forward(
    shape: tuple[int, int, int, int], keypoints: int, dtype: torch.dtype, device: str
) -> None:
    tokens, keypoint_tokens, position = inputs(shape, keypoints, device, dtype)
    check_forward(tokens, keypoint_tokens, position)


@pytest.mark.parametrize("ratios", [(0.45, 0.45), (0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_ratios(ratios: tuple[float, float], selection: str, device: str) -> None:
    arguments = inputs((2, 1, 5, 12), 1, device, torch.float32)
    _, masked, noised = check_forward(
        *arguments, ratios=ratios, selection=selection, seed=-7, noise_std=0.5
    )
    if selection == "exact" or ratios[0] in (0, 1):
        counts = [round(ratio * 5) for ratio in ratios]
        for flags, count in zip((masked, noised), counts, strict=True):
            assert flags.flatten(1).sum(1).tolist() == [count] * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position_after", [True, False])
def test_position(dtype: torch.dtype, position_after: bool, device: str) -> None:
    tokens, keypoint_tokens, position = inputs((1, 3, 4, 20), 2, device, dtype)
    tokens[0, 0, 1] = math.nan
    every = {"ratios": (1.0, 0.5), "seed": 2**32 + 1, "position_after": position_after}
    x, *_ = check_forward(tokens, keypoint_tokens, position, **every)
    assert not x[1].isnan().any()
    assert x[[0, 2], 0, 0, 1].isnan().all()
    check_forward(tokens, keypoint_tokens, None, **every)


@pytest.mark.parametrize("half", HALVES)
def test_mixed_dtypes(half: torch.dtype, device: str) -> None:
    for dtypes in ((half, torch.float32, torch.float32), (torch.float32, half, half)):
        for position_after in (True, False):
            arguments = inputs((1, 1, 5, 20), 2, device, *dtypes)
            check_forward(*arguments, position_after=position_after)


def test_as_the_reference_draws(device: str) -> None:
    """Noise of unit standard deviation as the CPU's, far up in the clips and with a 64-bit seed."""
    tokens, keypoint_tokens = torch.zeros(1, 1, 7, 50), torch.zeros(1, 50)
    for seed in SEEDS:
        options = (None, torch.tensor(seed), 0.5, 1.0, 1.0, "exact", True, 2**32 - 3)
        expected = corrupt_tokens_reference(tokens, keypoint_tokens, *options)
        on_device = (o.to(device) if isinstance(o, Tensor) else o for o in options)
        actual = corrupt_tokens.forward(tokens.to(device), keypoint_tokens.to(device), *on_device)
        x, *flags = (t.cpu() for t in actual)
        assert_same_bits(flags, list(expected[1:]))
        assert (x - expected[0]).abs().max() < NOISE
        assert x[2].std() > 0.8


@pytest.mark.parametrize("variant", ["many rows", "few rows"])
@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_variants(
    variant: str, selection: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a large batch runs with, on a small one; its 7 rows are one too few for a block."""
    lines = configs.CONFIGS["corrupt_tokens_forward"]
    monkeypatch.setitem(lines, "few rows", lines[variant])
    arguments = inputs((1, 1, 6, 520), 1, device, torch.float16)
    check_forward(*arguments, selection=selection, seed=SEEDS[1])


def test_forward_of_any_strides(device: str) -> None:
    tokens, keypoint_tokens, position = inputs((2, 2, 2, 3), 2, device, torch.float32)
    options = (torch.tensor(3, device=device), 0.5, 0.5, 1.0, "bernoulli", False, 0)
    expected = corrupt_tokens.forward(tokens, keypoint_tokens, position, *options)
    views = [list(layouts(values).items()) for values in (tokens, keypoint_tokens, position)]
    for i in range(max(map(len, views))):
        names, values = zip(*(v[i % len(v)] for v in views), strict=True)
        actual = corrupt_tokens.forward(*values, *options)
        assert_same_bits(actual, expected, f"{names}: ")
    one = tokens[:1, :1, :1, :1]
    actual = corrupt_tokens.forward(one.expand_as(tokens), keypoint_tokens, None, *options)
    compact = one.expand_as(tokens).contiguous()
    assert_same_bits(actual, corrupt_tokens.forward(compact, keypoint_tokens, None, *options))


@pytest.mark.parametrize("dim", range(4))
def test_forward_offsets_beyond_32_bits(dim: int, device: str) -> None:
    sizes = [1, 1, 2, 3]
    sizes[dim] = 3
    tokens, keypoint_tokens, position = inputs(tuple(sizes), 3, device, torch.float16)
    options = (torch.tensor(3, device=device), 0.5, 0.5, 1.0, "bernoulli", True, 0)
    expected = corrupt_tokens.forward(tokens, keypoint_tokens, position, *options)
    far = 2**30 + 8
    if dim > 0:
        position = spread(position, dim - 1, far)
    if dim > 1:
        keypoint_tokens = spread(keypoint_tokens, dim - 2, far)
    actual = corrupt_tokens.forward(spread(tokens, dim, far), keypoint_tokens, position, *options)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("stride", [2**30 + 8, 2**31 + 8])
def test_branches_beyond_32_bits(stride: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masked and the noised branch lie that many elements behind the one before."""
    arguments = inputs((1, 1, 3, 5), 1, device, torch.float16)
    options = (torch.tensor(3, device=device), 0.5, 0.5, 1.0, "bernoulli", True, 0)
    expected = corrupt_tokens.forward(*arguments, *options)
    empty = torch.empty

    def spread_out(size: Any, **kwargs: Any) -> Tensor:
        if len(size) != 5:
            return empty(size, **kwargs)
        return empty(2 * stride + 20, **kwargs).as_strided(size, (stride, 20, 20, 5, 1))

    monkeypatch.setattr(torch, "empty", spread_out)
    actual = corrupt_tokens.forward(*arguments, *options)
    monkeypatch.undo()
    assert actual[0].stride(0) == stride
    assert torch.equal(actual[0], expected[0])


# -- backward -------------------------------------------------------------------------------------


def check_backward(
    grad: Tensor,
    masked: Tensor,
    keypoint_dtype: torch.dtype,
    position_dtype: torch.dtype | None,
    position_after: bool,
) -> None:
    """Against autograd in float64."""
    options = (keypoint_dtype, position_dtype, position_after)
    actual = corrupt_tokens.backward(grad, masked, *options)
    eager = corrupt_tokens_backward_reference(grad, masked, *options)
    batch, frames, patches = masked.shape
    slots, dim = grad.shape[3:]
    zeros = {"dtype": torch.float64, "device": grad.device, "requires_grad": True}
    tokens = torch.zeros(batch, frames, patches, dim, **zeros)
    keypoint_tokens = torch.zeros(slots - patches, dim, **zeros)
    position = torch.zeros(frames, slots, dim, **zeros)
    embedded = tokens + position[:, :patches] * (not position_after)
    patch = torch.stack((embedded, embedded.masked_fill(masked[..., None], 0.0), embedded))
    x = torch.cat((patch, keypoint_tokens.expand(3, batch, frames, -1, -1)), dim=3)
    whole = torch.ones(slots, 1, device=grad.device, dtype=torch.float64)
    whole[:patches] = position_after
    x = x + position * whole
    exact_grads = torch.autograd.grad(x, (tokens, keypoint_tokens, position), grad.double())
    reductions = (3, 3 * batch * frames, 3 * batch)
    for a, b, c, reduction in zip(actual, eager, exact_grads, reductions, strict=True):
        assert a.is_contiguous()
        if position_dtype is None and reduction == reductions[2]:
            assert a.shape == (0,)
        else:
            assert_as_close_as_eager(a, b, c, reduction=reduction)


def gradient(
    shape: tuple[int, int, int, int], keypoints: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A gradient of x, and masked."""
    batch, frames, patches, dim = shape
    grad = random(3, batch, frames, patches + keypoints, dim, seed=4, dtype=dtype)
    return grad.to(device), (random(batch, frames, patches, seed=5) < 0).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "keypoints"), [*SHAPES, ((19, 2, 2, 20), 2)])
def test_backward(
    shape: tuple[int, int, int, int], keypoints: int, dtype: torch.dtype, device: str
) -> None:
    arguments = gradient(shape, keypoints, device, dtype)
    check_backward(*arguments, dtype, dtype, True)
    check_backward(*arguments, dtype, dtype, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_other_dtypes_or_without_position(dtype: torch.dtype, device: str) -> None:
    arguments = gradient((2, 9, 2, 20), 2, device, dtype)
    for other in {torch.float32, torch.float16} - {dtype}:
        check_backward(*arguments, other, other, False)
    check_backward(*arguments, dtype, None, True)


def test_backward_with_wide_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = configs.CONFIGS["corrupt_tokens_backward"]
    monkeypatch.setitem(lines, "narrow", lines["wide"])
    arguments = gradient((9, 1, 3, 520), 1, device, torch.float16)
    check_backward(*arguments, torch.float16, torch.float32, True)


def test_masked_gradients_are_dropped(device: str) -> None:
    """Not multiplied by 0: a NaN there goes nowhere, unless position is added after."""
    grad, masked = gradient((2, 1, 4, 5), 1, device, torch.float32)
    grad[1, :, :, :4][masked] = math.nan
    tokens, keypoint_tokens, position = corrupt_tokens.backward(
        grad, masked, torch.float32, torch.float32, False
    )
    assert not tokens.isnan().any()
    assert not keypoint_tokens.isnan().any()
    assert not position.isnan().any()
    *_, position = corrupt_tokens.backward(grad, masked, torch.float32, torch.float32, True)
    assert torch.equal(position[:, :4].isnan().all(-1), masked.any(0))


def test_hostile_gradients(device: str) -> None:
    shape, like = (3, 2, 2, 3, 2), torch.empty(0, device=device)
    _, masked = gradient((2, 2, 2, 2), 1, device, torch.float32)
    options = (torch.float32, torch.float32, True)
    for name, grad in hostile_gradients(shape, like):
        expected = corrupt_tokens.backward(grad.contiguous(), masked, *options)
        assert_same_bits(corrupt_tokens.backward(grad, masked, *options), expected, f"{name}, ")
    for name, flags in layouts(masked).items():
        actual = corrupt_tokens.backward(grad, flags, *options)
        assert_same_bits(actual, expected, f"flags {name}, ")


@pytest.mark.parametrize("dim", range(5))
def test_backward_offsets_beyond_32_bits(dim: int, device: str) -> None:
    sizes = [3, 1, 1, 1, 3]
    sizes[dim] = 3
    _, batch, frames, slots, width = sizes
    shape = (batch, frames, slots - slots // 2, width)
    grad, masked = gradient(shape, slots // 2, device, torch.float16)
    options = (torch.float16, torch.float16, False)
    expected = corrupt_tokens.backward(grad, masked, *options)
    actual = corrupt_tokens.backward(spread(grad, dim, 2**30 + 8), masked, *options)
    assert_same_bits(actual, expected)


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 1, 0, 5), (2, 1, 3, 0)])
def test_empty(shape: tuple[int, int, int, int], device: str) -> None:
    arguments = inputs(shape, 2, device, torch.float32)
    options = (torch.tensor(3, device=device), 0.5, 0.5, 1.0, "exact", True, 0)
    x, masked, noised = corrupt_tokens.forward(*arguments, *options)
    batch, frames, patches, dim = shape
    assert x.shape == (3, batch, frames, patches + 2, dim)
    assert masked.shape == noised.shape == (batch, frames, patches)
    if patches == 0:
        assert torch.equal(x, (arguments[1] + arguments[2]).expand_as(x))
    check_backward(*gradient(shape, 2, device, torch.float32), torch.float32, torch.float32, True)


def test_same_bits_every_time_and_everything_written(device: str) -> None:
    dtype = DTYPES[-1]
    arguments = inputs((1, 1, 3, 20), 1, device, dtype)
    options = (torch.tensor(3, device=device), 0.5, 0.5, 1.0, "exact", True, 0)
    slopes = gradient((5, 1, 1, 70), 1, device, dtype)
    for function in (
        lambda: corrupt_tokens.forward(*arguments, *options),
        lambda: corrupt_tokens.backward(*slopes, dtype, dtype, False),
    ):
        assert_repeats(function, times=3)
        assert_writes_everything(function)


def test_launches() -> None:
    """One launch forward, two backward, and no copy of anything large."""
    tokens = torch.empty(3, 32, 192, 768, device="meta", dtype=torch.bfloat16).transpose(0, 1)
    with recording(90) as launches:
        x, masked, _ = corrupt_tokens.forward(
            tokens,
            torch.empty(15, 768, device="meta"),
            torch.empty(3, 207, 768, device="meta"),
            torch.empty(1, device="meta", dtype=torch.int64),
            0.45,
            0.45,
            1.0,
            "exact",
            True,
            0,
        )
        corrupt_tokens.backward(x, masked, torch.float32, torch.float32, True)
    names = [launched.kernel.__name__ for launched in launches]
    assert names == ["forward_kernel", "backward_kernel", "keypoints_kernel"]
    assert launches[0].arguments[0] is tokens
    assert launches[1].arguments[0] is x
    assert [launched.config.num_warps for launched in launches] == [1, 1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_full_size() -> None:
    """More than 2³¹ elements: the last clips of a large batch are as if they were alone."""
    batch, first = 1600, 1590
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(
        batch, 3, 192, 768, generator=generator, device="cuda", dtype=torch.bfloat16
    )
    _, keypoint_tokens, position = inputs((1, 3, 192, 768), 15, "cuda", torch.bfloat16)
    seed = torch.tensor(3, device="cuda")
    options = (keypoint_tokens, position, seed, 0.45, 0.45, 1.0, "exact", True)
    x, *flags = corrupt_tokens.forward(tokens, *options, 0)
    assert x.numel() > 2**31
    last, *last_flags = corrupt_tokens.forward(tokens[first:], *options, first)
    assert_same_bits([flag[first:].contiguous() for flag in flags], last_flags)
    assert torch.equal(x[:, first:], last)
    masked = flags[0]
    x[:, :first] = 0
    types = (torch.bfloat16, torch.bfloat16, False)
    whole = corrupt_tokens.backward(x, masked, *types)
    part = corrupt_tokens.backward(last, masked[first:], *types)
    assert torch.equal(whole[0][first:], part[0])
    for a, b in zip(whole[1:], part[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-1)
