"""The kernel of ``warp_clips``: the reference's bits, and cv2's grey levels within half a one."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels import warp_clips
from cmpose.kernels.warp_clips import _fixed, _layout
from cmpose.ops.warp_clips import IMAGENET_MEAN, IMAGENET_STD, warp_clips_reference
from cmpose.ops.warp_clips import _fixed as fixed_reference
from tests.ops.support.assertions import assert_layout, assert_repeats, assert_same_bits

# bfloat16 is wrong in Triton's interpreter.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()


def noise_frames(device: str, *shape: int) -> Tensor:
    """On white noise every pixel differs from the next: any other weights would show."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)
    return frames.to(device)


def rotation(angle: float, scale: float, x: float, y: float) -> Tensor:
    matrix = cv2.getRotationMatrix2D((20.0, 15.0), angle, scale)
    matrix[:, 2] -= (x, y)
    return torch.from_numpy(matrix)


MATRICES = torch.stack(
    [
        rotation(0, 1, 0, 0),
        rotation(0, 1, 12.5, -7.25),
        rotation(33.3, 0.71, 2.2, 1.7),
        rotation(-120, 2.3, -10.4, 5.9),
        rotation(45, 1, -500, 0),
        rotation(10, 1.1, 5, 5) * torch.tensor([[-1.0], [1.0]], dtype=torch.float64),  # mirrored
    ]
)


def assert_is_the_reference(
    frames: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
) -> Tensor:
    """Bit for bit: weights and sums are exact, and the last steps are rounded alike."""
    actual = warp_clips.forward(frames, matrices, size, mean, std, dtype)
    expected = warp_clips_reference(frames, matrices, size, mean, std, dtype)
    assert_layout(actual, expected.shape, dtype)
    assert_same_bits(actual, expected)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "width", "clips", "num_frames"), [((6, 33), 48, 6, 2), ((33, 5), 43, 3, 1)]
)
def test_white_noise(
    device: str,
    dtype: torch.dtype,
    size: tuple[int, int],
    width: int,
    clips: int,
    num_frames: int,
) -> None:
    """Tiles cut off in both directions, and more than one band of rows."""
    frames = noise_frames(device, clips, num_frames, 31, width)
    assert _layout(frames, size) == ("packed" if width % 8 else "words")
    warped = assert_is_the_reference(frames, MATRICES[-clips:].to(device), size, dtype)
    assert len(warped.unique()) > 100


def test_cv2_within_half_a_grey_level(device: str) -> None:
    frames = noise_frames(device, len(MATRICES), 1, 31, 43)
    plain = (0.0,) * 3, (1.0,) * 3
    warped = warp_clips.forward(frames, MATRICES.to(device), (7, 33), *plain, torch.float32)
    levels = (warped[:, 0] * 255).permute(0, 2, 3, 1).cpu().numpy()
    for crop, frame, matrix in zip(levels, frames[:, 0].cpu().numpy(), MATRICES, strict=True):
        expected = cv2.warpAffine(frame, matrix.numpy(), (33, 7), flags=cv2.INTER_LINEAR)
        assert np.abs(crop - expected.astype(np.float32)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (1, 1), (3, 1), (1, 5)])
def test_batches_and_frames(device: str, shape: tuple[int, int]) -> None:
    frames = noise_frames(device, *shape, 7, 11)
    assert_is_the_reference(frames, MATRICES[: shape[0]].to(device), (5, 3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (1, 8)])
def test_frames_of_one_row_or_column(device: str, shape: tuple[int, int]) -> None:
    """Each position has a tap outside, in one direction at least."""
    half = torch.tensor([[[2.0, 0.0, 0.5], [0.0, 2.0, 0.5]]], dtype=torch.float64, device=device)
    assert_is_the_reference(noise_frames(device, 1, 1, *shape), half, (4, 19))


@pytest.mark.parametrize(
    "dtype", [torch.float64, *DTYPES], ids=lambda dtype: f"matrices of {dtype}"
)
def test_dtypes_of_matrices(device: str, dtype: torch.dtype) -> None:
    frames = noise_frames(device, 2, 1, 31, 43)
    assert_is_the_reference(frames, MATRICES[1:3].to(device, dtype), (9, 7))


def test_mean_and_std_are_those_of_the_channels(device: str) -> None:
    frames = noise_frames(device, 1, 1, 9, 9)
    options = {"mean": (0.1, 0.25, 0.9), "std": (0.5, 2.0, 0.01)}
    assert_is_the_reference(frames, MATRICES[:1].to(device), (9, 9), **options)


def strided(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Frames, most of them [2, 2, 13, 11, 3], and matrices of all sorts of strides."""
    frames, matrices = noise_frames(device, 2, 2, 13, 11), MATRICES[2:4].to(device)
    words = noise_frames(device, 2, 3, 13, 24)
    wide = noise_frames(device, 3, 4, 26, 15)
    parts = torch.zeros(3, 4, 5, dtype=torch.float64, device=device)
    parts[:2, 1:3, 2:] = matrices
    return {
        "one clip for all": (frames[:1].expand(2, -1, -1, -1, -1), matrices),
        "one frame for all": (frames[:, :1].expand(-1, 2, -1, -1, -1), matrices),
        "one pixel": (frames[:1, :1, :1, :1].expand(2, 2, 13, 11, 3), matrices),
        "grey": (frames[..., :1].expand(-1, -1, -1, -1, 3), matrices),
        "a cut-out": (wide[1:, 1:3, 2:15, 3:14], matrices),
        "words, cut out of a clip": (words[:, 1:, 2:, 8:16], matrices),
        "words of one clip": (words[:1].expand(2, -1, -1, -1, -1), matrices),
        "words that begin elsewhere": (words[..., 7:23, :], matrices),
        "rows that end in a word": (words[..., :15, :], matrices),
        "every second row": (wide[:2, ::2, ::2, :11], matrices),
        "channels first": (
            frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
            matrices,
        ),
        "columns first": (
            frames.transpose(2, 3).contiguous().transpose(2, 3),
            matrices.mT.contiguous().mT,
        ),
        "frames first": (frames.transpose(0, 1).contiguous().transpose(0, 1), matrices),
        "matrices cut out": (frames, parts[:2, 1:3, 2:]),
        "one matrix for all": (frames, matrices[:1].expand(2, -1, -1)),
    }


@pytest.mark.parametrize("name", strided("cpu"))
def test_strides(device: str, name: str) -> None:
    frames, matrices = strided(device)[name]
    assert (_layout(frames, (6, 5)) == "words") == (
        name in ("words, cut out of a clip", "words of one clip")
    )
    warped = assert_is_the_reference(frames, matrices, (6, 5))
    compact = assert_is_the_reference(frames.contiguous(), matrices.contiguous(), (6, 5))
    assert_same_bits(warped, compact)


BEYOND = 2**31 + 8


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 1, 3, 4, 3), (BEYOND, 0, 12, 3, 1)),
        ((1, 2, 3, 8, 3), (0, BEYOND, 24, 3, 1)),
        ((1, 1, 2, 8, 3), (0, 0, BEYOND, 3, 1)),
        ((1, 1, 3, 2, 3), (0, 0, 3, BEYOND, 1)),
        ((1, 1, 3, 4, 3), (0, 0, 4, 1, BEYOND // 2 + 99)),
        ((3, 3, 2, 2, 3), (2**30, 2**29, 2**28, 2**27 + 8, 2**26)),
    ],
    ids=["clip", "frame", "row", "column", "channel", "sum"],
)
def test_offsets_beyond_2_31(device: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Memory that is only reserved takes no room: only pages that hold pixels are filled in."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert span > 2**31
    frames = torch.empty(span, dtype=torch.uint8, device=device).as_strided(shape, strides)
    frames.copy_(noise_frames(device, *shape[:-1]))
    matrices = torch.tensor([[[1.2, 0.1, 0.3], [0.0, 1.3, 0.2]]], device=device)
    warped = assert_is_the_reference(frames, matrices.expand(shape[0], -1, -1), (4, 5))
    # Compared with the same pixels close together: the reference could read the same wrong ones.
    near = warp_clips.forward(
        frames.contiguous(),
        matrices.expand(shape[0], -1, -1),
        (4, 5),
        IMAGENET_MEAN,
        IMAGENET_STD,
        torch.float32,
    )
    assert_same_bits(warped, near)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter would take days")
def test_more_than_2_31_elements(device: str) -> None:
    """The last rows of a crop of 3.2·10⁹ elements are those of a small one that starts there."""
    frames = noise_frames(device, 1, 1, 64, 64)
    height, width, rows = 32_800, 32_768, 40
    matrix = torch.tensor([[[512.0, 0, 0], [0, 512.0, 0]]], dtype=torch.float64, device=device)
    moved = matrix.clone()
    moved[0, 1, 2] -= height - rows  # whole destination pixels
    options = IMAGENET_MEAN, IMAGENET_STD, torch.float16
    warped = warp_clips.forward(frames, matrix, (height, width), *options)[..., -rows:, :]
    assert_same_bits(warped, warp_clips.forward(frames, moved, (rows, width), *options))


def test_indices_of_large_crops_do_not_fit_31_bits() -> None:
    frames = noise_frames("cpu", 1, 1, 8, 16)
    assert [_layout(frames, (side, side)) for side in (26_754, 26_755)] == ["words", "packed"]


def test_every_element_is_written_and_repeats(device: str, poisoned_memory: None) -> None:
    frames, matrices = noise_frames(device, 2, 1, 13, 11), MATRICES[2:4].to(device)

    def run() -> Tensor:
        return warp_clips.forward(
            frames, matrices, (5, 35), IMAGENET_MEAN, IMAGENET_STD, torch.float16
        )

    assert assert_repeats(run).isfinite().all()


# -- positions ---------------------------------------------------------------------------------


@triton.jit
def _round(values, out, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    tl.store(out + index, _fixed(tl.load(values + index)))


def test_fixed_point(device: str) -> None:
    """Ties go to even, as torch.round's; what is too large stays in range; NaN is far away."""
    ties = (torch.arange(-16, 16, dtype=torch.float64) + 0.5) / 1024
    edges = torch.tensor([2.0**20 - 0.5 / 1024, 2.0**20, 2.0**31, 1e300, math.inf, 0.49999999999])
    odd = torch.tensor([0.0, -0.0, math.nan, 5e-324, 0.3, 123.456], dtype=torch.float64)
    values = torch.cat([ties, edges.double(), -edges.double(), odd, ties[:14].nextafter(odd[2:3])])
    values[-14:] = torch.nextafter(ties[:14], torch.tensor(0.0, dtype=torch.float64))
    values = values.to(device)
    out = torch.empty(len(values), dtype=torch.int32, device=device)
    _round[(1,)](values, out, COUNT=len(values))
    assert_same_bits(out.long(), fixed_reference(values))
    assert out[:4].tolist() == [-16, -14, -14, -12]
    assert out[32 + 12 + 2] == 2**30


def test_positions_halfway_between_those_that_count(device: str) -> None:
    """Translations by odd multiples of 1/2048: every column and row is a tie."""
    frames = noise_frames(device, 6, 1, 9, 9)
    matrices = torch.eye(2, 3, dtype=torch.float64).repeat(6, 1, 1)
    matrices[:, 0, 2] = torch.tensor([1.0, -1, 31, 33, -31, 95]) / 2048
    matrices[:, 1, 2] = torch.tensor([3.0, 1, -33, 63, 65, -1]) / 2048
    assert_is_the_reference(frames, matrices.to(device), (9, 9))


@pytest.mark.parametrize("width", [6, 8])
def test_matrices_that_are_no_use(device: str, width: int) -> None:
    """The op refuses them where it may read values; elsewhere nothing is read out of bounds."""
    nan, inf = math.nan, math.inf
    matrices = torch.tensor(
        [
            [[0.0, 0, 0], [0, 0, 0]],
            [[1, 2, 3], [2, 4, 5]],  # singular: the pixel in the corner
            [[nan, 0, 0], [0, 1, 0]],
            [[1, 0, inf], [0, 1, -inf]],
            [[1e-12, 0, 0], [0, 1e-12, 0]],
            [[1, 0, 1e300], [0, 1, -1e300]],
            [[1e200, 0, 0], [0, 1e200, 0]],  # the determinant is infinite
            [[1e-160, 0, 1], [0, 1e-160, 1]],  # its inverse is
            [[1, 0, 2.0**20 - 3], [0, 1, 3 - 2.0**20]],
            [[1e-12, -1e-12, 0], [1e-12, 1e-12, 0]],  # columns and rows are 2²⁰ pixels away
        ],
        dtype=torch.float64,
        device=device,
    )
    frames = noise_frames(device, len(matrices), 1, 5, width)
    with np.errstate(all="ignore"):  # Triton's interpreter computes with numpy
        warped = assert_is_the_reference(frames, matrices, (4, 6))
    assert warped.isfinite().all()
