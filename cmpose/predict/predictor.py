"""Runs the model on people in windows of frames, and draws what it based a pose on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cmpose import ops
from cmpose.config import Config
from cmpose.data.clips import resolve_warp
from cmpose.data.transforms import apply_matrix, crop_matrix, crop_region, normalize_clips, warp
from cmpose.data.video import VideoFrame
from cmpose.distributed import pick_device
from cmpose.evaluation.decode import decode_heatmaps, to_image
from cmpose.evaluation.inference import clip_tokens, compute_dtype, predict_heatmaps
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.models.weights import checkpoint
from cmpose.viz.explain import explain_figure

T = TypeVar("T")


def windows(items: Iterable[T], num_frames: int) -> Iterator[list[T]]:
    """For every item the ``num_frames`` items around it; the first and last are repeated."""
    reach = num_frames // 2
    recent: deque[T] = deque(maxlen=num_frames)
    for item in items:
        if not recent:
            recent.extend([item] * (reach + 1))
        else:
            recent.append(item)
        if len(recent) == num_frames:
            yield list(recent)
    for _ in range(reach):
        if recent:
            recent.append(recent[-1])
            if len(recent) == num_frames:
                yield list(recent)


class Poses(NamedTuple):
    """The poses of a batch of P people.

    Attributes:
        keypoints: [P, K, 2] in image pixels.
        scores: [P, K], the heatmaps' maxima.
        output: the model's.
        matrices: [P, 2, 3], from image to crop pixels.
    """

    keypoints: np.ndarray
    scores: np.ndarray
    output: CMPoseOutput
    matrices: np.ndarray


class Predictor:
    """A model, its recipe, the device that it runs on, and the folder that it is from."""

    def __init__(self, model: CMPose, config: Config, device: torch.device, folder: Path) -> None:
        self.model, self.config, self.device = model.to(device).eval(), config, device
        self.folder = folder

    @classmethod
    def load(cls, path: str | Path, device: str = "auto") -> Predictor:
        """The model of a run's folder, or of a checkpoint.

        Args:
            path: the folder.
            device: ``auto``, ``cpu`` or ``cuda``.

        Raises:
            CheckpointError: no usable checkpoint.
            ValueError: no such device.
        """
        folder = checkpoint.find(path)
        return cls(*checkpoint.load_model(folder), pick_device(device), folder)

    def crops(
        self, window: Sequence[VideoFrame], boxes: Sequence[np.ndarray]
    ) -> tuple[Tensor, np.ndarray]:
        """Cuts people out of a window of T frames.

        Args:
            window: the frames.
            boxes: P boxes [4] (x, y, width, height) in pixels of the middle frame.

        Returns:
            The model's input: normalised clips [P, T, 3, H, W], warped on the host or on the
            device as ``data.warp`` says, and the matrices [P, 2, 3] from image to crop pixels.
        """
        c = self.config
        size, dtype = c.model.image_size, compute_dtype(c.train.precision, self.device)
        matrices = np.stack(
            [
                crop_matrix(crop_region(b, size, c.data.box_enlarge), size, udp=c.data.udp)
                for b in boxes
            ]
        )
        if resolve_warp(c.data, self.device) == "host":
            crops = [[warp(frame.picture, m, size) for frame in window] for m in matrices]
            pixels = torch.from_numpy(np.stack(crops)[..., ::-1].copy())
            return normalize_clips(pixels.to(self.device), dtype), matrices
        # One copy of the frames serves everybody: the op reads them through a stride of zero.
        frames = torch.from_numpy(np.stack([frame.picture[..., ::-1] for frame in window]))
        frames = frames.to(self.device).expand(len(boxes), *frames.shape)
        on_device = torch.from_numpy(matrices).to(self.device, torch.float32)
        clips = ops.warp_clips(frames, on_device, size, dtype=dtype, backend=c.model.backend)
        return clips, matrices

    @torch.no_grad()
    def poses(self, clips: Tensor, matrices: np.ndarray) -> Poses:
        """Poses of the people in clips [P, T, 3, H, W], of one frame or of several."""
        c = self.config
        output = predict_heatmaps(self.model, clips, c.data)
        xy, scores = decode_heatmaps(
            output.heatmaps.float().cpu(), c.data.decode, sigma=c.model.sigma
        )
        image_xy = to_image(
            xy,
            torch.from_numpy(matrices),
            heatmap_size=self.model.heatmap_size,
            image_size=c.model.image_size,
            udp=c.data.udp,
        )
        return Poses(image_xy.numpy(), scores.numpy(), output, matrices)

    def explain(
        self, picture: np.ndarray, poses: Poses, person: int, title: str, path: Path
    ) -> None:
        """Writes a picture, and a record, of what one person's pose was read from.

        Args:
            picture: the frame's, uint8 [H, W, 3], BGR.
            poses: of the batch that the person is in.
            person: their row in it.
            title: of the picture.
            path: of the picture.

        Raises:
            OutputError: the picture cannot be written.
        """
        c = self.config
        crop = warp(picture, poses.matrices[person], c.model.image_size)[..., ::-1]
        keypoints = apply_matrix(poses.matrices[person], poses.keypoints[person])
        heatmaps = poses.output.heatmaps[person].float().cpu().numpy()
        explain_figure(
            np.ascontiguousarray(crop),
            heatmaps,
            keypoints,
            poses.scores[person],
            clip_tokens(self.model, poses.output, person),
            title=title,
            path=path,
            skeleton=self.model.skeleton,
        )
