"""The state of a run: what training changes, kept in checkpoints and read back from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.posetrack import listed
from cmpose.distributed import World, synchronize_batch_norms
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from cmpose.models.weights.pretrained import load_pretrained
from cmpose.train.parallel import gather, shard_like, share
from cmpose.train.products import use_products
from cmpose.train.schedule import parameter_groups
from cmpose.train.step import LossModule, load_optimizer_state, optimizer_state, prepare_groups

RESUME = "go on with --resume"
"""What a message says to do, once what kept something from being written is gone."""

FREE_FIELDS = (
    "data.num_workers",
    "data.frame_cache_mb",
    "data.warp",  # auto depends on the device; where crops are made is compared instead
    "model.checkpoint_activations",
    "model.drop_path_selection",  # draws differ, the expectation does not; older runs have one only
    "data.reduced_decode",  # of no effect with a cache; what pixels are made of is compared
    "data.cache",  # a raw cache holds the frames' own pixels; what pixels are made of is compared
    "data.cache_format",
    "data.cache_quality",
    "data.cache_detail",
    "train.device",
    "train.distributed",  # changes rounding only, as another number of processes does
    "train.speed",  # graph takes compile's steps bit for bit; eager rounds otherwise
    "train.log_every",
    "train.pictures_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
)
"""Fields that may differ when a run is resumed, because they do not change what is learnt."""


@dataclass
class TrainingState:
    """What a run consists of.

    Attributes:
        config: the recipe.
        world: this process among those that train.
        clips: the training clips.
        model: the network; its weights are in shards with ``train.distributed=fsdp``.
        losses: the network with its losses, shared among the processes.
        optimizer: AdamW.
        scaler: of the loss, for float16.
        step: how many steps have been taken.
        seconds: how long they took.
    """

    config: Config
    world: World
    clips: ClipDataset
    model: CMPose
    losses: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    seconds: float = 0.0

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self.config.train.speed == "graph"

    def save(self, checkpoints: Path, name: str = "", **extra: Any) -> Path:
        """Writes a checkpoint, whole or not at all; every process must call it.

        Args:
            checkpoints: the folder of checkpoints.
            name: of the new one; without it its step's, and old checkpoints are deleted.
            extra: more to write into ``state.pt``.

        Returns:
            The checkpoint's folder.

        Raises:
            OutputError: when it cannot be written.
        """
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warp": self.clips.data.warp,
            "optimizer": optimizer_state(self.optimizer, self.world),
            "pixels": self.clips.pixels,
            "scaler": self.scaler.state_dict(),
        } | extra
        path = checkpoints / (name or checkpoint.name_of(self.step))
        weights = gather(self.model.state_dict(), self.world)
        if self.world.main:
            skeleton = self.model.skeleton
            checkpoint.save(
                checkpoints, path.name, weights, self.config, state, skeleton, remedy=RESUME
            )
            if not name:
                checkpoint.prune(checkpoints, self.config.train.keep_checkpoints)
        self.world.barrier()
        return path

    def restore(self, folder: Path) -> None:
        """Takes everything from a checkpoint.

        Raises:
            ValueError: when it was made with another recipe, keypoints or pixels.
            CheckpointError: when it cannot be read.
        """
        _check_recipe_is_unchanged(folder, self.config)
        _check_keypoints_are_unchanged(folder, self.clips)
        checkpoint.load_into(self.model, checkpoint.load_weights(folder), folder, shard=shard_like)
        state = checkpoint.load_state(folder)
        _check_pixels_are_unchanged(folder, state, self.clips)
        load_optimizer_state(self.optimizer, state["optimizer"])
        prepare_groups(self.optimizer, self.world.device, self.captured)
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]


def new_state(config: Config, clips: ClipDataset, world: World) -> TrainingState:
    """The state at step 0: fresh or pretrained weights on the device, and a new optimiser."""
    train, device = config.train, world.device
    compiled = train.speed in ("compile", "graph")
    torch.manual_seed(train.seed)
    model = CMPose(config.model)
    model.skeleton = clips.skeleton
    if config.model.pretrained:
        report = load_pretrained(model, config.model.pretrained)
        if world.main:
            print(report)
    model.to(device)
    use_products(model, train.products)
    if world.size > 1:
        synchronize_batch_norms(model, device, compiled=compiled)
    # Before the optimiser: shards are new parameters.
    losses = share(LossModule(model, compiled=compiled), model, config, world)
    optimizer = torch.optim.AdamW(parameter_groups(model, train), lr=train.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
    state = TrainingState(config, world, clips, model, losses, optimizer, scaler)
    prepare_groups(optimizer, device, state.captured)
    return state


def resume_or_start(state: TrainingState, output: Path, *, resume: bool) -> None:
    """Restores the newest checkpoint of the run in ``output``; keeps step 0 when there is none.

    Raises:
        FileExistsError: ``output`` holds a run, and ``resume`` is False.
        ValueError, CheckpointError: as :meth:`TrainingState.restore`.
    """
    checkpoints = checkpoint.training_checkpoints(output / checkpoint.CHECKPOINTS)
    if not checkpoints:
        if resume and state.world.main:
            print(f"{output} holds no checkpoint to resume from: training starts anew")
        return
    newest = checkpoints[-1]
    if not resume:
        raise FileExistsError(
            f"{output} already holds a run (checkpoints up to {newest.name}): "
            "add --resume to go on with it, or give another --output"
        )
    state.restore(newest)
    if state.world.main:
        print(f"resuming from {newest}")


def _check_recipe_is_unchanged(folder: Path, config: Config) -> None:
    changed = configuration.differences(
        configuration.to_dict(checkpoint.load_config(folder)), configuration.to_dict(config)
    )
    changed = {k: v for k, v in changed.items() if k not in FREE_FIELDS}
    if changed:
        raise ValueError(
            f"cannot resume {folder} with another recipe ({configuration.in_words(changed)}): "
            "give the same fields, or another --output"
        )


def _check_keypoints_are_unchanged(folder: Path, clips: ClipDataset) -> None:
    trained = checkpoint.load_skeleton(folder, len(clips.skeleton))
    if trained != clips.skeleton:
        raise ValueError(
            f"cannot resume {folder}: it was trained on {listed(trained)}, the annotations "
            f"have {listed(clips.skeleton)}, or other flip_pairs, limbs or halves: "
            "restore the annotations' category, or give another --output"
        )


def _check_pixels_are_unchanged(folder: Path, state: dict[str, Any], clips: ClipDataset) -> None:
    # A checkpoint from before there was a choice does not say.
    before, now = state.get("warp", "host"), clips.data.warp
    if before != now:
        raise ValueError(
            f"cannot resume {folder}: its crops were made on the {before}, this run would make "
            f"them on the {now}, which rounds pixels otherwise; set data.warp={before}"
        )
    source = state.get("pixels", "frames")
    if source != clips.pixels:
        raise ValueError(
            f"cannot resume {folder}: its crops were made from {source}, this run would make "
            f"them from {clips.pixels}; set data.cache and its fields, and data.reduced_decode, "
            "as they were"
        )
