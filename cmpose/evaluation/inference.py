"""From a batch of clips to the model's input, and the model's answer to it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cmpose import ops
from cmpose.config import Config, DataConfig, ModelConfig
from cmpose.data.transforms import normalize_clips
from cmpose.evaluation.decode import flip_heatmaps
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.models.weights.folder import CheckpointError
from cmpose.viz.tokens import Tokens


def compute_dtype(precision: str, device: torch.device | None = None) -> torch.dtype:
    """The dtype of the clips, and with it of the whole model (``cmpose/models/layers.py``).

    Args:
        precision: the recipe's.
        device: where the model predicts: bfloat16 becomes float32 on a CPU without instructions
            for it, which would take many times as long. None keeps to the recipe.
    """
    slow = (
        device is not None
        and device.type == "cpu"
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    if precision == "bf16" and slow:
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


_PIXELS = ("clip", "frames", "frames_matrix")


def move_pixels(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The parts of a batch from which images are made, moved to ``device``."""
    moved = {key: batch[key] for key in _PIXELS if key in batch}
    return {key: value.to(device, non_blocking=True) for key, value in moved.items()}


def clip_images(
    pixels: dict[str, Tensor],
    config: Config,
    part: slice = slice(None),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The model's input: normalised RGB crops, made where the pixels are.

    Args:
        pixels: from ``move_pixels``.
        config: the recipe.
        part: of the batch's clips.
        dtype: of the result, and of what the model computes from it; None is the recipe's.

    Returns:
        [B, T, 3, H, W].
    """
    dtype = dtype or compute_dtype(config.train.precision)
    if "clip" in pixels:
        return normalize_clips(pixels["clip"][part], dtype)
    matrices = pixels["frames_matrix"][part]
    return ops.warp_clips(
        pixels["frames"].expand(len(matrices), -1, -1, -1, -1),  # all clips share one picture
        matrices,
        config.model.image_size,
        dtype=dtype,
        backend=config.model.backend,
    )


def key_crops(batch: dict[str, Tensor], model: ModelConfig, count: int) -> np.ndarray:
    """The crops of the key frame of a batch's last ``count`` clips, uint8 RGB [count, H, W, 3]."""
    key = model.num_frames // 2
    if "clip" in batch:
        return batch["clip"][-count:, key].numpy()
    crops = ops.warp_clips(
        batch["frames"][key : key + 1].expand(count, -1, -1, -1, -1),
        batch["frames_matrix"][-count:],
        model.image_size,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255, 1 / 255, 1 / 255),
        backend="reference",  # the batch is on the host
    )
    return crops[:, 0].round().to(torch.uint8).movedim(1, -1).contiguous().numpy()


def predict_heatmaps(model: CMPose, images: Tensor, data: DataConfig) -> CMPoseOutput:
    """The model's output; with ``flip_test`` its heatmaps are averaged with the mirrored clip's.

    Raises:
        CheckpointError: what it computes is NaN or infinite; the message names the weights' file.
    """
    try:
        output = model(images)
        if data.flip_test:
            mirrored = flip_heatmaps(
                model(images.flip(-1)).heatmaps, udp=data.udp, skeleton=model.skeleton
            )
            output = output._replace(heatmaps=0.5 * (output.heatmaps + mirrored))
    except ValueError as error:  # an op checks values; shapes are right here
        raise _not_finite(model, str(error)) from error
    if not bool(output.heatmaps.isfinite().all()):
        raise _not_finite(model, "heatmaps are NaN or infinite")
    return output


def _not_finite(model: CMPose, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{model.source}: its weights are numbers, but too large for what the model computes with "
        f"them ({problem}): the training it is of diverged, or it is damaged; use another "
        "checkpoint, or train.precision=fp32"
    )


def clip_tokens(model: CMPose, output: CMPoseOutput, row: int) -> Tokens | None:
    """The tokens of clip ``row`` of a batch; None without Fine Token Enhancement."""
    fine = output.fine
    if fine is None:
        return None
    scores = fine.selection.scores[row].float().cpu()
    tokens = Tokens(
        grid=model.backbone.grid,
        scores=scores.numpy(),
        top=scores.topk(model.config.tokens_per_keypoint, dim=-1).indices.numpy(),
        causal=fine.selection.causal[row].cpu().numpy(),
        noncausal=fine.selection.noncausal[row].cpu().numpy(),
    )
    if fine.clusters is None:
        return tokens
    return replace(
        tokens,
        assignment=fine.clusters.assignment[row].cpu().numpy(),
        centers=fine.clusters.centers[row].cpu().numpy(),
    )
