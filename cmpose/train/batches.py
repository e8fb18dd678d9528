"""From the training clips to the tensors of a step."""

from __future__ import annotations

import signal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cmpose.config import Config
from cmpose.data.clips import ClipDataset, fit_keypoints, open_clips, worker_init
from cmpose.data.cutouts import collate
from cmpose.data.transforms import heatmap_targets
from cmpose.distributed import World
from cmpose.evaluation.inference import clip_images, move_pixels
from cmpose.train.schedule import StepBatches, seed_of


def open_training_clips(config: Config, world: World) -> tuple[ClipDataset, Config]:
    """The clips of a recipe, and the recipe with the number of their keypoints.

    Raises:
        ValueError: for annotations that cannot be used.
    """
    clips = open_clips(config, train=True, device=world.device, quiet=not world.main)
    return clips, fit_keypoints(config, clips)


def _start_worker(worker_id: int) -> None:
    """Lets a loader process outlive Ctrl-C, which reaches every process of the terminal.

    The main process still needs its batches to finish the step and save.
    """
    worker_init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def training_loader(
    clips: ClipDataset, config: Config, world: World, first_step: int
) -> DataLoader[dict[str, Tensor]]:
    """This process's batch of every step from ``first_step`` to the end of the run."""
    return DataLoader(
        clips,
        batch_sampler=StepBatches(len(clips), config.train, world, first_step),
        num_workers=config.data.num_workers,
        worker_init_fn=_start_worker,
        collate_fn=collate,
        pin_memory=world.device.type == "cuda",
    )


def step_inputs(
    batch: dict[str, Tensor],
    step: int,
    heatmap_size: tuple[int, int],
    config: Config,
    device: torch.device,
) -> dict[str, Tensor]:
    """What ``TrainingStep`` takes, on the device.

    Args:
        batch: from :func:`training_loader`.
        step: its number, from 0; seeds the corruption.
        heatmap_size: (h, w) of the model's heatmaps.
        config: the recipe.
        device: where the step is taken.

    Returns:
        ``images`` [B, T, 3, H, W], ``centers`` [B, K, 2] in heatmap pixels, ``weight`` [B, K],
        ``seed`` [1] and ``step`` [], int64.
    """
    centers, weight = heatmap_targets(
        batch["keypoints"].to(device, non_blocking=True),
        batch["visible"].to(device, non_blocking=True),
        image_size=config.model.image_size,
        heatmap_size=heatmap_size,
        sigma=config.model.sigma,
        unannotated=config.data.unannotated,
        udp=config.data.udp,
    )
    return {
        "images": clip_images(move_pixels(batch, device), config),
        "centers": centers,
        "weight": weight,
        # Filled on the device: a copy from ordinary memory would make the host wait.
        "seed": torch.full((1,), seed_of(config.train.seed, step), device=device),
        "step": torch.full((), step, device=device),
    }
