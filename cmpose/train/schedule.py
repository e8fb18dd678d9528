"""Which clips a step sees and its learning rate, as functions of seed and step alone.

Nothing here has a state that would have to be saved, so that a resumed run is exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import nn
from torch.utils.data import Sampler

from cmpose.config import TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose


def steps_per_epoch(num_clips: int, train: TrainConfig) -> int:
    """Number of whole batches in a pass; which clips are left over differs from epoch to epoch.

    Raises:
        ValueError: when there are fewer clips than a batch has.
    """
    if num_clips < train.batch_size:
        raise ValueError(
            f"train.batch_size={train.batch_size} is more than the {num_clips} clips to train on: "
            f"set it to at most {num_clips}"
        )
    return num_clips // train.batch_size


def check_batch(train: TrainConfig, world_size: int) -> None:
    """Raises ValueError unless the batch divides evenly over processes and micro-batches."""
    parts = world_size * train.accumulate
    if train.batch_size < 1 or train.accumulate < 1 or train.batch_size % parts:
        raise ValueError(
            f"train.batch_size={train.batch_size} cannot be cut evenly over {world_size} "
            f"process(es) × train.accumulate={train.accumulate}: make it a multiple of {parts}"
        )


def seed_of(*numbers: int) -> int:
    """A 63-bit seed that is a function of the numbers, such as (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class StepBatches(Sampler[list[tuple[int, int]]]):
    """This process's clips of every step from ``first_step`` on, as (epoch, index).

    One loader serves a whole run. Each epoch has one shuffled order of all clips; a step takes the
    next ones of it, and each process its part of these. So the global batch is the same for any
    number of processes.
    """

    def __init__(self, num_clips: int, train: TrainConfig, world: World, first_step: int) -> None:
        self.num_clips = num_clips
        self.train = train
        self.world = world
        self.first_step = first_step
        self.per_epoch = steps_per_epoch(num_clips, train)

    def __len__(self) -> int:
        return self.per_epoch * self.train.epochs - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size, local = self.train.batch_size, self.train.batch_size // self.world.size
        for step in range(self.first_step, self.per_epoch * self.train.epochs):
            epoch, position = divmod(step, self.per_epoch)
            if position == 0 or step == self.first_step:
                order = np.random.default_rng([self.train.seed, epoch]).permutation(self.num_clips)
            start = position * size + self.world.rank * local
            yield [(epoch, int(i)) for i in order[start : start + local]]


def learning_rate(step: int, per_epoch: int, train: TrainConfig) -> float:
    """The learning rate at a step, counted from 0, before layer decay."""
    if train.schedule == "one_cycle":
        total = max(per_epoch * train.epochs, 1)
        peak = 0.3 * total
        if step < peak:
            low, x = 0.04, step / peak
            return train.lr * (low + (1 - low) * 0.5 * (1 - math.cos(math.pi * x)))
        x = (step - peak) / max(total - peak, 1)
        return train.lr * (1e-4 + (1 - 1e-4) * 0.5 * (1 + math.cos(math.pi * min(x, 1.0))))
    drops = sum(step // per_epoch >= epoch for epoch in train.step_epochs)
    warmup = min(1.0, (step + 1) / train.warmup_steps) if train.warmup_steps else 1.0
    return train.lr * train.step_factor**drops * warmup


_EMBEDDINGS = ("pos_embed", "keypoint_tokens", "frame_embed", "slot_embed")


def parameter_groups(model: CMPose, train: TrainConfig) -> list[dict]:
    """AdamW's parameter groups, with layer-wise rates and no decay for vectors and embeddings.

    A group's learning rate is the schedule's times its ``scale``, layer_decay^(number of layers
    above), as in ViTPose: patch and position embeddings are layer 0, block i is layer i + 1, and
    everything else is on top with scale 1.
    """
    depth = len(model.backbone.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = depth + 1
        if name.startswith(("backbone.patch_embed", "backbone.pos_embed")):
            layer = 0
        elif name.startswith("backbone.blocks."):
            layer = int(name.split(".")[2]) + 1
        plain = parameter.ndim <= 1 or name.endswith(_EMBEDDINGS)
        key = (train.layer_decay ** (depth + 1 - layer), 0.0 if plain else train.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
