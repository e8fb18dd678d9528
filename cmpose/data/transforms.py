"""Crop geometry, augmentation, flips, normalisation and heatmap targets, as DCPose has them.

A pixel's coordinates are those of its centre. ``matrix`` always maps image → crop: it is [2, 3],
and ``crop = matrix[:, :2] @ image + matrix[:, 2]``. ``cv2.warpAffine`` takes it as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch

from cmpose.config import AugmentConfig
from cmpose.data.skeleton import POSETRACK, Skeleton

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF_BODY_ENLARGE = 1.5
FAR_OUTSIDE = -1e4
"""Heatmap coordinate of a Gaussian that is too far away to reach the heatmap: an empty target."""


class Region(NamedTuple):
    """The upright rectangle of the image that fills a crop.

    Attributes:
        center: (x, y), pixels.
        size: (width, height), pixels.
    """

    center: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Augmentation:
    """One draw of :func:`sample_augmentation`.

    Attributes:
        region: the scaled region that fills the crop.
        rotation: in degrees, see :func:`crop_matrix`.
        flip: whether the crop is mirrored.
    """

    region: Region
    rotation: float = 0.0
    flip: bool = False


def clean_box(box: np.ndarray, width: int, height: int) -> np.ndarray | None:
    """DCPose's cleaned box, or None where nothing of the image is in it.

    x1 = max(0, x), x2 = min(W − 1, x1 + max(0, w − 1)), and likewise in y. As in DCPose, a box
    that starts left of (or above) the image is moved inside rather than cut. Unlike there, a box
    that does not touch the image at all gives None instead of a crop of its border.

    Args:
        box: x, y, width, height in pixels.
        width: of the image in pixels.
        height: likewise.

    Returns:
        float64 [4], x, y, width, height; or None for a box without area, outside the image, or
        smaller than a pixel.
    """
    x, y, w, h = (float(value) for value in box)
    if not (w > 0 and h > 0) or x + w <= 0 or y + h <= 0 or x > width - 1 or y > height - 1:
        return None
    x1, y1 = max(0.0, x), max(0.0, y)
    x2 = min(width - 1.0, x1 + max(0.0, w - 1.0))
    y2 = min(height - 1.0, y1 + max(0.0, h - 1.0))
    if x2 < x1 or y2 < y1 or max(x2 - x1, y2 - y1) < 1.0:
        return None
    return np.array([x1, y1, x2 - x1, y2 - y1])


def crop_region(box: np.ndarray, image_size: tuple[int, int], enlarge: float = 1.25) -> Region:
    """A box, widened to the crop's aspect ratio and enlarged about its centre.

    Args:
        box: x, y, width, height in pixels, as cleaned by :func:`clean_box`.
        image_size: (height, width) of the crop.
        enlarge: factor after widening; 1.25 in the paper and in DCPose.
    """
    x, y, w, h = (float(value) for value in box)
    return _region(np.array([x + w / 2, y + h / 2]), w, h, image_size, enlarge)


def _region(
    center: np.ndarray, w: float, h: float, image_size: tuple[int, int], enlarge: float
) -> Region:
    aspect = image_size[1] / image_size[0]
    if w > aspect * h:
        h = w / aspect
    else:
        w = h * aspect
    return Region(center, np.array([w, h]) * enlarge)


def crop_matrix(
    region: Region, image_size: tuple[int, int], rotation: float = 0.0, *, udp: bool = False
) -> np.ndarray:
    """The affine map of a region onto a crop, in closed form.

    DCPose (HRNet): A = (W / w)·R, t = (W/2, H/2) − A·center, with R = [[cos, sin], [−sin, cos]];
    this equals cv2.getAffineTransform on its three points. UDP maps the w×h region's corners onto
    pixel centres: A = diag((W−1)/w, (H−1)/h)·R, t = ((W−1)/2, (H−1)/2) − A·center.

    Args:
        region: from :func:`crop_region`.
        image_size: (H, W) of the crop.
        rotation: degrees; positive turns the crop's content anticlockwise on the screen.
        udp: unbiased data processing.

    Returns:
        float64 [2, 3], image → crop.
    """
    height, width = image_size
    radians = np.deg2rad(rotation)
    cos, sin = np.cos(radians), np.sin(radians)
    turn = np.array([[cos, sin], [-sin, cos]])
    if udp:
        target = np.array([width - 1.0, height - 1.0])
        linear = (target / region.size)[:, None] * turn
    else:
        target = np.array([float(width), float(height)])
        linear = width / region.size[0] * turn
    offset = target / 2 - linear @ region.center
    return np.concatenate([linear, offset[:, None]], axis=1)


def flip_matrix(matrix: np.ndarray, width: int) -> np.ndarray:
    """The image → crop map whose crop is mirrored: x → width − 1 − x in the crop."""
    flipped = np.array(matrix, dtype=np.float64)
    flipped[0] = -flipped[0]
    flipped[0, 2] += width - 1
    return flipped


def apply_matrix(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points [..., 2] through a [2, 3] map, float64."""
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]


def clip_matrix(
    augmentation: Augmentation, image_size: tuple[int, int], *, udp: bool = False
) -> np.ndarray:
    """The one image → crop matrix, float64 [2, 3], that all frames of a clip go through."""
    matrix = crop_matrix(augmentation.region, image_size, augmentation.rotation, udp=udp)
    return flip_matrix(matrix, image_size[1]) if augmentation.flip else matrix


def transform_joints(
    keypoints: np.ndarray,
    matrix: np.ndarray,
    image_size: tuple[int, int],
    *,
    flip: bool = False,
    skeleton: Skeleton = POSETRACK,
) -> tuple[np.ndarray, np.ndarray]:
    """Joints into the crop.

    Only annotated joints are moved, the others are (0, 0). A joint that leaves the crop
    (x < 0, y < 0, x > W or y > H) becomes invisible and keeps its coordinates.

    Args:
        keypoints: [K, 3], x, y in image pixels and v.
        matrix: [2, 3], image → crop; mirroring included if ``flip``.
        image_size: (H, W) of the crop.
        flip: swaps left and right joints.
        skeleton: says which those are.

    Returns:
        float64 [K, 2] in crop pixels, float64 [K] visibility (0 or 1).
    """
    if flip:
        keypoints = keypoints[list(skeleton.flip_permutation)]
    visible = keypoints[:, 2] > 0
    points = np.where(visible[:, None], apply_matrix(matrix, keypoints[:, :2]), 0.0)
    height, width = image_size
    inside = (points >= 0).all(axis=1) & (points[:, 0] <= width) & (points[:, 1] <= height)
    return points, (visible & inside).astype(np.float64)


def warp(image: np.ndarray, matrix: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Crop of an image [h, w, C]: bilinear, black outside the image → [H, W, C]."""
    height, width = image_size
    return cv2.warpAffine(
        image,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=0,
    )


def half_body_region(
    keypoints: np.ndarray,
    image_size: tuple[int, int],
    *,
    upper: bool,
    skeleton: Skeleton = POSETRACK,
) -> Region | None:
    """The region around the visible joints of the upper or the lower body, 1.5 times enlarged.

    A half with at most two visible joints gives way to the other one.

    Args:
        keypoints: [K, 3] in image pixels.
        image_size: (H, W) of the crop.
        upper: which half.
        skeleton: says which joints the halves have.

    Returns:
        None if the half has fewer than two joints or no extent (DCPose crashes there; HRNet does
        not), or if the skeleton does not say what the halves are.
    """
    if not (skeleton.upper_body and skeleton.lower_body):
        return None
    visible = keypoints[:, 2] > 0
    halves = {
        True: keypoints[[j for j in skeleton.upper_body if visible[j]], :2],
        False: keypoints[[j for j in skeleton.lower_body if visible[j]], :2],
    }
    if upper and len(halves[True]) > 2:
        points = halves[True]
    else:
        points = halves[False] if len(halves[False]) > 2 else halves[True]
    if len(points) < 2:
        return None
    w, h = points.max(axis=0) - points.min(axis=0)
    if max(w, h) < 1.0:
        return None
    return _region(points.mean(axis=0), float(w), float(h), image_size, HALF_BODY_ENLARGE)


def sample_augmentation(
    region: Region,
    keypoints: np.ndarray,
    image_size: tuple[int, int],
    config: AugmentConfig,
    rng: np.random.Generator,
    skeleton: Skeleton = POSETRACK,
) -> Augmentation:
    """Draws half body (truncation), scale, rotation and flip.

    ``paper``: scale uniform in 1 ± ``scale``, rotation uniform in ± ``rotation``. ``dcpose``:
    scale clip(N(1, scale), 1 ± scale); rotation clip(N(0, rotation), ± 2·rotation) with
    probability 0.6, else 0; and the upper body is taken where N(0, 1) < 0.5.

    Args:
        region: of the whole person.
        keypoints: [K, 3] in image pixels.
        image_size: (H, W) of the crop.
        config: factors and probabilities; ``enabled`` is for the caller to look at.
        rng: the item's own generator.
        skeleton: says what the halves of a body are.
    """
    dcpose = config.sampling == "dcpose"
    if (
        int((keypoints[:, 2] > 0).sum()) > config.half_body_min_joints
        and rng.random() < config.half_body
    ):
        upper = rng.standard_normal() < 0.5 if dcpose else rng.random() < 0.5
        half = half_body_region(keypoints, image_size, upper=bool(upper), skeleton=skeleton)
        region = half or region
    if dcpose:
        low, high = 1 - config.scale, 1 + config.scale
        scale = float(np.clip(rng.standard_normal() * config.scale + 1, low, high))
        limit = 2 * config.rotation
        rotation = float(np.clip(rng.standard_normal() * config.rotation, -limit, limit))
        if rng.random() > 0.6:
            rotation = 0.0
    else:
        scale = float(rng.uniform(1 - config.scale, 1 + config.scale))
        rotation = float(rng.uniform(-config.rotation, config.rotation))
    flip = bool(rng.random() < config.flip)
    return Augmentation(Region(region.center, region.size * scale), rotation, flip)


def normalize_clips(clips: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 RGB [B, T, H, W, 3] → [B, T, 3, H, W], (x/255 − mean)/std of ImageNet.

    Raises:
        TypeError: if ``clips`` is not uint8.
        ValueError: if it is not [..., H, W, 3].
    """
    if clips.dtype != torch.uint8:
        raise TypeError(f"clips: expected uint8, got {clips.dtype}")
    if clips.ndim < 3 or clips.shape[-1] != 3:
        raise ValueError(f"clips: expected [B, T, H, W, 3], got {tuple(clips.shape)}")
    mean, std = _imagenet(clips.device)
    return ((clips.float() - mean) / std).movedim(-1, -3).to(dtype).contiguous()


@lru_cache
def _imagenet(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's mean and std on the scale 0 to 255, kept so that no step waits for a copy."""
    mean = torch.tensor(IMAGENET_MEAN, device=device) * 255
    return mean, torch.tensor(IMAGENET_STD, device=device) * 255


def heatmap_targets(
    keypoints: torch.Tensor,
    visible: torch.Tensor,
    *,
    image_size: tuple[int, int],
    heatmap_size: tuple[int, int],
    sigma: float = 2.0,
    unannotated: Literal["ignore", "background"] = "ignore",
    udp: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Centres and weights of the target Gaussians, for ``cmpose.ops.heatmap_loss``.

    DCPose: centre = ⌊x / stride + 0.5⌋, a whole heatmap pixel. UDP: centre = x·(w−1)/(W−1), not
    rounded. A joint whose 3σ patch (about the rounded centre) lies fully outside has no target.

    A joint without target (nobody annotated it, augmentation moved it out of the crop, or the
    patch is outside) has weight 0 under ``ignore``; under ``background`` it has weight 1 and a
    centre far outside, so that its heatmap is trained towards empty.

    Args:
        keypoints: [B, K, 2], x, y in crop pixels.
        visible: [B, K], > 0 where the joint is annotated and inside the crop.
        image_size: (H, W) of the crop.
        heatmap_size: (h, w).
        sigma: the Gaussian's, in heatmap pixels.
        unannotated: ``ignore`` or ``background``.
        udp: whether coordinates are UDP's.

    Returns:
        centers [B, K, 2] in heatmap pixels and weight [B, K], float32.
    """
    if keypoints.ndim != 3 or keypoints.shape[-1] != 2 or keypoints.shape[:2] != visible.shape:
        raise ValueError(
            "keypoints, visible: expected [B, K, 2] and [B, K], got "
            f"{tuple(keypoints.shape)} and {tuple(visible.shape)}"
        )
    if unannotated not in ("ignore", "background"):
        raise ValueError(f"unannotated: {unannotated!r} is neither 'ignore' nor 'background'")
    last = 1 if udp else 0
    exact, rounded, reaches = [], [], visible > 0
    for axis, (crop, heatmap) in enumerate(
        ((image_size[1], heatmap_size[1]), (image_size[0], heatmap_size[0]))
    ):
        value = keypoints[..., axis].float() * ((heatmap - last) / (crop - last))
        whole = torch.floor(value + 0.5)
        exact.append(value)
        rounded.append(whole)
        reaches = reaches & (whole - 3 * sigma < heatmap) & (whole + 3 * sigma >= 0)
    centers = torch.stack(exact if udp else rounded, dim=-1)
    if unannotated == "background":
        return centers.masked_fill(~reaches[..., None], FAR_OUTSIDE), torch.ones_like(exact[0])
    return centers.masked_fill(~reaches[..., None], 0.0), reaches.float()
