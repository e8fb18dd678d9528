"""One process or many: what training and evaluation need of torch.distributed.

``torchrun`` starts the processes and names them in the environment. Without it there is one, and
everything here does nothing, so that training and evaluation are written once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from cmpose.files import OutputError, claim


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The values' sum over all processes, written over them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one process at least; the answer is the same in all."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a name stands for: ``auto`` is a GPU when there is one.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        local_rank: number of the process on its machine, and of the GPU that ``cuda`` is for it.

    Raises:
        ValueError: for a device torch does not know, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device={name!r} is no device: use auto, cpu or cuda") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                f"train.device={name!r}, but torch sees no GPU: use cpu, or see `cmpose doctor`"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def _meeting_point() -> dist.Store:
    """The key-value store in which processes find one another.

    torchrun keeps one store over restarts, in which restarted processes would find the addresses
    of dead ones (seen with torch 2.13): so each restart has keys of its own. On several nodes the
    counts of restarts differ; there torchrun must make a store for each.

    Raises:
        ValueError: for restarts on several nodes without that.
    """
    store, _, _ = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"restart {restarts}", store)
    allowed = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if allowed > 0:
        raise ValueError(
            f"--max-restarts={allowed} on several nodes: after a restart processes would look for "
            "dead ones; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend=c10d for "
            "torchrun on every node, or --max-restarts=0"
        )
    return store


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started, and leaves them at the end.

    Args:
        device: of the recipe, see :func:`pick_device`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1:
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_meeting_point(), rank=rank, world_size=size)
    try:
        yield World(rank, size, picked)
    finally:
        if size > 1:
            dist.destroy_process_group()


@contextmanager
def claim_together(
    world: World, folder: Path, command: str, option: str, subfolders: Iterable[str] = ()
) -> Iterator[None]:
    """The main process claims an output folder for all, see :func:`cmpose.files.claim`.

    Raises:
        OutputError: the same in every process, so that none waits for one that was refused.
    """
    with ExitStack() as stack:
        refusal: OutputError | None = None
        if world.main:
            try:
                stack.enter_context(claim(folder, command, option, subfolders))
            except OutputError as error:
                refusal = error
        refusal = world.gather(refusal)[0]
        if refusal is not None:
            raise refusal
        yield


@torch.library.custom_op("cmpose::sum_over_processes", mutates_args=())
def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, with a gradient; one operator to ``torch.compile``."""
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


@sum_over_processes.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


# Every process's loss counts: the gradient of a sum over processes is the gradients' sum.
sum_over_processes.register_autograd(lambda _, gradient: sum_over_processes(gradient))


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the clips of all processes, on any device, eager or compiled.

    torch's SyncBatchNorm refuses CPU tensors, and its collectives are not operators that
    ``torch.compile`` could take into one graph.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = (0, 2, 3)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = sum_over_processes(wide.sum(axes)) / count
        centered = wide - mean[:, None, None]
        variance = sum_over_processes(centered.square().sum(axes)) / count
        with torch.no_grad():
            # torch's class leaves these out only when it is told not to track them.
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronize_batch_norms(
    model: nn.Module, device: torch.device, *, compiled: bool = False
) -> None:
    """Makes every batch norm inside ``model`` normalise over the clips of all processes.

    Args:
        model: changed in place.
        device: it is on.
        compiled: whether ``torch.compile`` will take it.
    """
    if device.type == "cuda" and not compiled:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = GlobalBatchNorm2d(child.num_features, child.eps, child.momentum or 0.1)
                norm.to(child.weight).load_state_dict(child.state_dict())
                setattr(parent, name, norm)
