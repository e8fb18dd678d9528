"""How several processes share a training step: DistributedDataParallel, or weights in shards.

With ``train.distributed=ddp`` every process holds the whole model and gradients are averaged while
the backward pass goes on. With ``fsdp`` (FSDP2, ``fully_shard``) every process holds a part of each
weight, gradient and moment, and gathers a block's weights where it runs. Checkpoints hold whole
tensors under the same names either way. With one process there is nothing to share.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from cmpose.config import Config, TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose


def check_parallel(train: TrainConfig, place: World) -> None:
    """Raises ValueError for a recipe whose weights cannot be in shards."""
    if train.distributed != "fsdp" or place.size == 1:
        return
    if train.speed != "eager":
        raise ValueError(
            f"train.distributed='fsdp' gathers weights between operators, which "
            f"train.speed={train.speed!r} does not let it: use train.speed=eager, or "
            "train.distributed=ddp"
        )
    if train.precision == "fp16":
        raise ValueError(
            "train.distributed='fsdp' does not scale losses, which train.precision='fp16' needs: "
            "use train.precision=bf16, or train.distributed=ddp"
        )


def sharded_units(core: CMPose) -> list[nn.Module]:
    """The parts whose weights are gathered together and dropped again; the rest stays gathered.

    A backbone block each. The criss-cross network is one: its blocks read one another's weights
    (:func:`cmpose.models.fused.shared_projections`), and run twice.
    """
    return [*core.backbone.blocks, core.coarse.criss_cross]


def share(losses: nn.Module, core: CMPose, config: Config, place: World) -> nn.Module:
    """Makes ``losses``, a module around ``core``, train with all processes; gives what to call.

    With ``fsdp`` core's parameters are replaced, so that optimisers are made afterwards.
    """
    train = config.train
    if place.size == 1:
        return losses
    if train.distributed == "fsdp":
        mesh = init_device_mesh(place.device.type, (place.size,))
        policy = MixedPrecisionPolicy(
            # Weights travel in float32 and are cast where they are used, as without shards.
            reduce_dtype=torch.bfloat16 if train.gradient_compression == "bf16" else None,
            cast_forward_inputs=False,
        )
        # Nothing writes into what a unit returns, of which torch warns where that is a view.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for unit in (*sharded_units(core), core):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        return losses
    # DDP records the graph in its first backward pass, which must be one that averages.
    static = train.accumulate == 1
    # The one case in which weights take no gradient: nothing teaches the scores.
    unused = config.model.fine == "causal_only" and config.model.selection_weight == 0
    shared = DistributedDataParallel(
        losses,
        device_ids=[place.device.index] if place.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        static_graph=static,
        find_unused_parameters=unused and not static,
    )
    if train.gradient_compression == "bf16":
        shared.register_comm_hook(None, _compress)
    return shared


def _compress(
    group: dist.ProcessGroup | None, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """torch's hook under another name: by its own DDP refuses it for gloo, which can do it."""
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]


# DDP compares the hook's annotations with the classes themselves.
_compress.__annotations__ = {
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[Tensor],
}


# -- whole tensors and shards ---------------------------------------------------------------------


def whole(value: Tensor) -> Tensor:
    """A tensor with all its shards; every process must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(values: Any, place: World) -> Any:
    """A tree with every sharded tensor whole, on the CPU of the main process; elsewhere None.

    One tensor at a time is gathered; every process must call it.
    """

    def one(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        full = value.full_tensor()
        return full.cpu() if place.main else None

    return tree_map(one, values)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that every process has; as it is if like is whole."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def whole_model(core: CMPose) -> CMPose:
    """The model with whole weights, which processes can run by themselves: for evaluation.

    ``core`` itself if it is not in shards; every process must call it.
    """
    if not isinstance(core, FSDPModule):
        return core
    with torch.device("meta"):
        model = CMPose(core.config)
    state = {name: whole(value.detach()) for name, value in core.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.backbone.keep_below = core.backbone.keep_below  # in no state dict
    return model
