"""Jobs of several gloo processes, which the tests' zygote forks: see ``tests/zygote.py``.

A job is [kind, arguments, port]; every process has torchrun's variables, and a job is a process
group of its own. One pair of processes for many checks: to import torch and to start it takes
longer than most of them.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import multiprocessing
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

import cmpose.evaluation.evaluate as evaluation
import cmpose.train.step as step_module
from cmpose import config as configuration
from cmpose.distributed import join_world
from cmpose.evaluation.inference import clip_images
from cmpose.files import InUse
from cmpose.models.cmpose import CMPose
from cmpose.train import batches, parallel, state
from cmpose.train import train as training
from cmpose.train.parallel import gather, share, whole
from cmpose.train.step import LossModule, StepOutput
from cmpose.train.trainer import NonFiniteLoss, Trainer


class Descend(torch.optim.SGD):
    """SGD that takes AdamW's arguments."""

    def __init__(self, groups, lr, fused) -> None:
        groups = [{**group, "weight_decay": 0.0} for group in groups]
        super().__init__(groups, lr=lr, fused=fused)


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Runs within it keep weights, and compute, in the dtype."""
    wide = getattr(torch, dtype)
    images = functools.partial(clip_images, dtype=wide)
    buckets = functools.partial(parallel.DistributedDataParallel, bucket_cap_mb=4)
    with (
        mock.patch.object(state, "CMPose", lambda model: CMPose(model).to(wide)),
        mock.patch.object(batches, "clip_images", images),
        mock.patch.object(evaluation, "clip_images", images),
        mock.patch.object(step_module, "COMPILER", "aot_eager"),
        # Small buckets, so that this small model has several, as large ones have.
        mock.patch.object(parallel, "DistributedDataParallel", buckets),
    ):
        yield


@contextmanager
def weights_kept_before_the_first_step(file: Path) -> Iterator[None]:
    """Runs within it write the weights that they start from."""
    original = Trainer.step

    def step(self: Trainer, batch: dict[str, Tensor]) -> StepOutput:
        if self.state.step == 0:
            weights = gather(self.state.model.state_dict(), self.state.world)
            if self.state.world.main:
                save_file(weights, file)
        return original(self, batch)

    with mock.patch.object(Trainer, "step", step):
        yield


def descend(recipe: str, output: str, dtype: str) -> None:
    """A run by plain gradient descent, in a dtype."""
    with (
        precision(dtype),
        mock.patch.object(torch.optim, "AdamW", Descend),
        weights_kept_before_the_first_step(Path(output) / "start.safetensors"),
    ):
        training.train(configuration.load(recipe), output, progress=False)


def train(recipe: str, output: str, dtype: str, goes_on_from: str = "") -> None:
    """A run as it is, in a dtype; it may go on from another run's checkpoint."""
    if goes_on_from and os.environ.get("RANK", "0") == "0":
        source = Path(goes_on_from)
        shutil.copytree(source, Path(output) / "checkpoints" / source.name)
    with precision(dtype):
        config = configuration.load(recipe)
        training.train(config, output, resume=bool(goes_on_from), progress=False)


def fail(recipe: str, output: str) -> None:
    """A run that must be refused, or find its gradient not finite.

    Each process writes what it was told into OUTPUT/message0 and 1.
    """
    try:
        training.train(configuration.load(recipe), output, progress=False)
    except (InUse, NonFiniteLoss) as error:
        (Path(output) / f"message{os.environ['RANK']}").write_text(str(error))


def gradients(recipe: str, output: str) -> None:
    """This process's own gradients of a batch, and what the processes make of them.

    OUTPUT/RANK.safetensors holds ``own.NAME`` and, for each way of sharing, ``WAY.NAME``.
    """
    gradients: dict[str, torch.Tensor] = {}
    config = configuration.load(recipe)
    with join_world("cpu") as world:
        for way in ("own", "ddp.none", "ddp.bf16", "fsdp.none", "fsdp.bf16"):
            kind, _, compression = way.partition(".")
            torch.manual_seed(0)
            core = CMPose(config.model)
            losses = LossModule(core)
            module: torch.nn.Module = losses
            if way != "own":
                config.train.distributed, config.train.gradient_compression = kind, compression
                module = share(losses, core, config, world)
            torch.manual_seed(1 + world.rank)
            model = config.model
            images = torch.randn(2, model.num_frames, 3, *model.image_size)
            centers = torch.rand(2, model.num_keypoints, 2) * 10
            weight = torch.ones(2, model.num_keypoints)
            seed, joints = torch.tensor([5]), torch.tensor(30.0)
            result, _ = module(images, seed, 2 * world.rank, centers, weight, joints)
            result.total.backward()
            for name, parameter in core.named_parameters():
                gradients[f"{way}/{name}"] = whole(parameter.grad).clone()
            dist.barrier()
        save_file(gradients, Path(output) / f"{world.rank}.safetensors")


JOBS = {"descend": descend, "train": train, "fail": fail, "gradients": gradients}


def die_twice(recipe: str, output: str) -> None:
    """A run whose second process is killed before the first checkpoint, and after it."""
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    deadly = {0: 1, 1: 3}.get(attempt)
    original = Trainer.step

    def step(self: Trainer, batch: dict[str, Tensor]) -> StepOutput:
        if self.state.step == deadly and self.state.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, batch)

    with mock.patch.object(Trainer, "step", step):
        training.train(configuration.load(recipe), output, progress=False)


def _rank(jobs: list[list], rank: str, errors: str) -> None:
    """One of two processes goes through the jobs."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()
    torch.set_num_threads(1)  # so that sums have one order
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "RANK": rank, "LOCAL_RANK": rank}
    for kind, arguments, port in jobs:
        os.environ["MASTER_PORT"] = str(port)
        JOBS[kind](*arguments)


def go_through(jobs: list[list], folder: Path) -> None:
    """Two processes go through the jobs.

    ``FOLDER/errors0`` and ``errors1`` are their messages, ``codes.json`` their exit codes.
    """
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=_rank, args=(jobs, rank, str(folder / f"errors{rank}")))
        for rank in "01"
    ]
    for process in processes:
        process.start()
    for _ in range(3000):
        codes = [process.exitcode for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    for process in processes:  # what one waits for does not come once the other is dead
        process.join(10)
        process.kill()
        process.join()
    (folder / "codes.json").write_text(json.dumps([process.exitcode for process in processes]))


def launch(recipe: str, output: str) -> None:
    """:func:`die_twice` in two processes, started by torchrun's agent and again when one dies."""
    torch.set_num_threads(1)
    options_of_run = ["--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
    standalone = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"]
    options = run.parse_args([*standalone, *options_of_run, "--start-method=fork", "die_twice"])
    config, *_ = run.config_from_args(options)
    elastic_launch(config, die_twice)(recipe, output)
