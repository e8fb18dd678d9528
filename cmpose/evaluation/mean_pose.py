"""The baseline that every model must beat: the mean pose of the training people as every answer."""

from __future__ import annotations

import numpy as np


def mean_pose(
    keypoints: np.ndarray, visible: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """Where each joint lies on average in a person's crop.

    Args:
        keypoints: [P, K, 2], x and y in crop pixels.
        visible: [P, K]; only joints with a value above 0 count.
        image_size: (H, W) of the crops.

    Returns:
        float64 [K, 2] as shares of the crop's width and height. A joint that nobody has visible is
        put at the mean of the others.

    Raises:
        ValueError: wrong shapes, or no visible joint at all.
    """
    keypoints, visible = np.asarray(keypoints, np.float64), np.asarray(visible) > 0
    if keypoints.ndim != 3 or keypoints.shape[2] != 2 or visible.shape != keypoints.shape[:2]:
        raise ValueError(
            f"keypoints must be [P, K, 2] and visible [P, K], got {keypoints.shape} and "
            f"{visible.shape}"
        )
    if not visible.any():
        raise ValueError(f"visible: none of the {visible.size} joints is, so there is no mean pose")
    shares = keypoints / np.array([image_size[1], image_size[0]], np.float64)
    count = visible.sum(axis=0)
    total = np.where(visible[..., None], shares, 0.0).sum(axis=0)
    mean = total / np.maximum(count, 1)[:, None]
    return np.where(count[:, None] > 0, mean, mean[count > 0].mean(axis=0))


def mean_pose_in_images(
    mean: np.ndarray, matrices: np.ndarray, image_size: tuple[int, int]
) -> np.ndarray:
    """Puts the mean pose into every test box.

    Args:
        mean: [K, 2] from ``mean_pose``.
        matrices: [P, 2, 3], image → crop.
        image_size: (H, W) of the crops; may differ from the training crops'.

    Returns:
        float64 [P, K, 2] in image pixels.

    Raises:
        ValueError: wrong shapes, or a matrix that cannot be inverted.
    """
    matrices = np.asarray(matrices, np.float64)
    if matrices.ndim != 3 or matrices.shape[1:] != (2, 3):
        raise ValueError(f"matrices must be [P, 2, 3], got {matrices.shape}")
    linear = matrices[:, :, :2]
    singular = np.flatnonzero(np.abs(np.linalg.det(linear)) < 1e-12)
    if singular.size:
        raise ValueError(f"matrices[{singular[0]}] cannot be inverted")
    crop = np.asarray(mean, np.float64) * np.array([image_size[1], image_size[0]], np.float64)
    return np.linalg.solve(linear, (crop[None] - matrices[:, None, :, 2]).swapaxes(1, 2)).swapaxes(
        1, 2
    )
