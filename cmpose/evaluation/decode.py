"""From heatmaps to joints in the image: arg max, sub-pixel offset, inverse crop."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from cmpose.data.skeleton import POSETRACK, Skeleton

DecodeMethod = Literal["quarter", "dark"]


def decode_heatmaps(
    heatmaps: torch.Tensor, method: DecodeMethod = "quarter", *, sigma: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint positions and scores from heatmaps.

    ``quarter`` moves the maximum's position by a quarter pixel towards the higher neighbour in x
    and in y, as HRNet and DCPose do, where it is at least two pixels from the border. ``dark`` is
    "Distribution-Aware Coordinate Representation" (Zhang et al., CVPR 2020): the heatmap is
    blurred with the target's own Gaussian, and one Newton step is taken on its logarithm, which
    is exact for a Gaussian. No step is taken within two pixels of the border or where the
    logarithm has no maximum; none is longer than one pixel in x and in y.

    Args:
        heatmaps: [B, K, h, w], floating point.
        method: ``quarter`` or ``dark``.
        sigma: of the target Gaussian in heatmap pixels; ``dark`` blurs with it.

    Returns:
        Positions [B, K, 2], x and y in heatmap pixels, (0, 0) where the maximum is not positive;
        and scores [B, K], the maximum. float64 for float64 heatmaps, else float32.

    Raises:
        ValueError: wrong shape, method or sigma.
    """
    if heatmaps.ndim != 4 or 0 in heatmaps.shape[1:]:
        raise ValueError(f"heatmaps must be [B, K, h, w], got shape {tuple(heatmaps.shape)}")
    if method not in ("quarter", "dark"):
        raise ValueError(f"method must be 'quarter' or 'dark', got {method!r}")
    heatmaps = heatmaps if heatmaps.dtype == torch.float64 else heatmaps.float()
    width = heatmaps.shape[3]
    scores, peak = heatmaps.flatten(2).max(dim=2)
    x, y = peak % width, peak // width
    if method == "quarter":
        offset = _quarter_offset(heatmaps, x, y)
    else:
        offset = _dark_offset(heatmaps, x, y, sigma)
    xy = torch.stack([x, y], dim=-1) + offset
    return torch.where(scores[..., None] > 0, xy, 0.0), scores


def _sample(maps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values [B, K] at pixels; outside the map the border's value, which callers must mask."""
    height, width = maps.shape[-2:]
    index = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)
    return maps.flatten(2).gather(2, index[..., None])[..., 0]


def _quarter_offset(heatmaps: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    height, width = heatmaps.shape[-2:]
    dx = _sample(heatmaps, x + 1, y) - _sample(heatmaps, x - 1, y)
    dy = _sample(heatmaps, x, y + 1) - _sample(heatmaps, x, y - 1)
    inside = (x > 1) & (x < width - 1) & (y > 1) & (y < height - 1)
    return torch.where(inside[..., None], 0.25 * torch.stack([dx, dy], dim=-1).sign(), 0.0)


def _dark_offset(
    heatmaps: torch.Tensor, x: torch.Tensor, y: torch.Tensor, sigma: float
) -> torch.Tensor:
    height, width = heatmaps.shape[-2:]
    log = _blur(heatmaps, sigma).clamp(min=1e-10).log()

    def at(i: int, j: int) -> torch.Tensor:
        return _sample(log, x + i, y + j)

    dx, dy = (at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2
    dxx = (at(2, 0) - 2 * at(0, 0) + at(-2, 0)) / 4
    dyy = (at(0, 2) - 2 * at(0, 0) + at(0, -2)) / 4
    dxy = (at(1, 1) - at(1, -1) - at(-1, 1) + at(-1, -1)) / 4
    determinant = dxx * dyy - dxy * dxy
    maximum = (determinant > 0) & (dxx < 0)
    inside = (x > 1) & (x < width - 2) & (y > 1) & (y < height - 2)
    usable = maximum & inside
    determinant = torch.where(usable, determinant, 1.0)
    newton = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], dim=-1)
    step = (newton / determinant[..., None]).clamp(-1, 1)
    return torch.where(usable[..., None], step, 0.0)


def _blur(heatmaps: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur, zero beyond the border; 11 taps at sigma 2 and 17 at sigma 3, as DARK's."""
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    radius = int(2.5 * sigma + 0.5)
    taps = torch.arange(-radius, radius + 1, dtype=heatmaps.dtype, device=heatmaps.device)
    kernel = torch.exp(-taps.square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = heatmaps.reshape(-1, 1, *heatmaps.shape[-2:])
    flat = F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, radius))
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return flat.reshape(heatmaps.shape)


def to_crop(
    xy: torch.Tensor,
    heatmap_size: tuple[int, int],
    image_size: tuple[int, int],
    *,
    udp: bool = False,
) -> torch.Tensor:
    """Heatmap pixels → crop pixels.

    The plain way scales by the stride, W/w; unbiased data processing (UDP) lets the centres of
    the corner pixels coincide and scales by (W-1)/(w-1).

    Args:
        xy: [..., 2].
        heatmap_size: (h, w).
        image_size: (H, W) of the crop.
        udp: whether both follow UDP.

    Raises:
        ValueError: UDP with a heatmap that is one pixel high or wide.
    """
    less = 1 if udp else 0
    if min(heatmap_size) - less < 1:
        raise ValueError(f"heatmap_size {heatmap_size} is too small for udp={udp}")
    scale = [
        (image_size[1] - less) / (heatmap_size[1] - less),
        (image_size[0] - less) / (heatmap_size[0] - less),
    ]
    return xy * xy.new_tensor(scale)


def to_image(
    xy: torch.Tensor,
    matrices: torch.Tensor,
    *,
    heatmap_size: tuple[int, int],
    image_size: tuple[int, int],
    udp: bool = False,
) -> torch.Tensor:
    """Heatmap pixels → image pixels, through the crop.

    Args:
        xy: [B, K, 2].
        matrices: [B, 2, 3], image → crop, as clips carry them.
        heatmap_size: (h, w).
        image_size: (H, W) of the crop.
        udp: see ``to_crop``.

    Returns:
        float64 [B, K, 2].

    Raises:
        ValueError: wrong shapes, or a matrix that cannot be inverted.
    """
    if xy.ndim != 3 or xy.shape[2] != 2 or matrices.shape != (len(xy), 2, 3):
        raise ValueError(
            f"xy must be [B, K, 2] and matrices [B, 2, 3], got {tuple(xy.shape)} and "
            f"{tuple(matrices.shape)}"
        )
    crop = to_crop(xy.double(), heatmap_size, image_size, udp=udp)
    matrices = matrices.to(xy.device, torch.float64)
    linear, shift = matrices[:, :, :2], matrices[:, None, :, 2]
    singular = torch.linalg.det(linear).abs() < 1e-12
    if bool(singular.any()):
        clip = int(singular.nonzero()[0])
        raise ValueError(f"matrices[{clip}] cannot be inverted: {matrices[clip].tolist()}")
    return torch.linalg.solve(linear, (crop - shift).mT).mT


def flip_heatmaps(
    heatmaps: torch.Tensor, *, udp: bool = False, skeleton: Skeleton = POSETRACK
) -> torch.Tensor:
    """Heatmaps of a mirrored crop → heatmaps of the crop.

    Mirrors the columns and swaps left and right joints. Without UDP a mirrored crop's heatmap is
    then off by (W/w - 1)/(W/w) of a heatmap pixel, because crop pixel x becomes W-1-x while
    heatmap pixels scale by W/w. So it is moved one pixel to the right, as HRNet and DCPose do.

    Args:
        heatmaps: [B, K, h, w], in the skeleton's order.
        udp: whether crop and targets follow UDP, so that nothing need be moved.
        skeleton: says which keypoints are swapped.

    Raises:
        ValueError: not the skeleton's K keypoints.
    """
    if heatmaps.ndim != 4 or heatmaps.shape[1] != len(skeleton):
        raise ValueError(
            f"heatmaps must be [B, {len(skeleton)}, h, w], got shape {tuple(heatmaps.shape)}"
        )
    flipped = heatmaps.flip(3)[:, list(skeleton.flip_permutation)]
    if udp:
        return flipped
    return torch.cat([flipped[..., :1], flipped[..., :-1]], dim=3)
