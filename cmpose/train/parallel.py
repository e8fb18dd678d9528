"""How several processes share a training step: DistributedDataParallel, or weights in shards.

With ``train.distributed=ddp`` every process holds the whole model, and gradients are averaged while
the backward pass goes on. With ``fsdp`` (FSDP2, ``fully_shard``) every process holds a part (shard)
of each weight, gradient and moment, and gathers a block's weights just before the block runs.
Checkpoints hold whole tensors under the same names either way. With one process there is nothing
to share.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from cmpose.config import Config, TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def check_parallel(train: TrainConfig, world: World) -> None:
    """Raises ValueError for a recipe whose weights cannot be in shards."""
    if train.distributed != "fsdp" or world.size == 1:
        return
    if train.speed in ("compile", "graph"):
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
    """The parts whose weights are gathered before they run and dropped afterwards.

    All other weights stay gathered during a step. Each backbone block is such a part. The
    criss-cross network is one part as a whole, because its blocks read one another's weights
    (:func:`cmpose.models.fused.shared_projections`), and run twice.
    """
    return [*core.backbone.blocks, core.coarse.criss_cross]


def share(losses: nn.Module, core: CMPose, config: Config, world: World) -> nn.Module:
    """Makes ``losses``, a module around ``core``, train together with all other processes.

    With ``fsdp`` core's parameters are replaced: optimisers must be made afterwards.

    Returns:
        The module to call in place of ``losses``.
    """
    train = config.train
    if world.size == 1:
        return losses
    if train.distributed == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(world.device.type, (world.size,))
        policy = MixedPrecisionPolicy(
            # Weights are gathered in float32 and cast where they are used, as without shards.
            reduce_dtype=torch.bfloat16 if train.gradient_compression == "bf16" else None,
            cast_forward_inputs=False,
        )
        # torch warns where a unit returns a view, in case somebody writes into it: nobody does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        for unit in (*sharded_units(core), core):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
        return losses
    # DDP records the graph in its first backward pass. With accumulation that pass averages
    # nothing, so that the record would be of no use.
    static = train.accumulate == 1
    # The only case in which some weights get no gradient: no loss depends on the scores.
    unused = config.model.fine == "causal_only" and config.model.selection_weight == 0
    shared = DistributedDataParallel(
        losses,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
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
    """torch's hook under another name. DDP refuses the original for gloo, which can do it."""
    return bf16_compress_hook(group, bucket)  # type: ignore[arg-type]


# DDP compares the hook's annotations with classes, not with their names as strings.
_compress.__annotations__ = {
    "bucket": dist.GradBucket,
    "return": torch.futures.Future[Tensor],
}


# -- whole tensors and shards ---------------------------------------------------------------------


def _in_shards(value: Any) -> TypeGuard[DTensor]:
    """Whether a value is a tensor in shards.

    There is none unless :func:`share` made it. So that other runs start a second sooner, nothing
    here imports torch's distributed tensors but what shards.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor that may be in shards; every process must call it."""
    return value.full_tensor() if _in_shards(value) else value


def gather(values: Any, world: World) -> Any:
    """A tree of values in which every sharded tensor is whole, for the main process to save.

    Sharded tensors are gathered one at a time: to the CPU in the main process, while they are None
    in the others. Every process must call it.
    """

    def one(value: Any) -> Any:
        if not _in_shards(value):
            return value
        full = value.full_tensor()
        return full.cpu() if world.main else None

    return tree_map(one, values)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that every process has.

    Args:
        value: the whole tensor.
        like: says how to cut it; where it is whole itself ``value`` is returned as it is.
    """
    if not _in_shards(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def whole_model(core: CMPose) -> CMPose:
    """A model with whole weights, which each process can run by itself: for evaluation.

    It is ``core`` itself if that is not in shards. Every process must call it.
    """
    if not any(map(_in_shards, core.parameters())):
        return core
    with torch.device("meta"):
        model = CMPose(core.config)
    state = {name: whole(value.detach()) for name, value in core.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.backbone.keep_below = core.backbone.keep_below  # not part of the state dict
    return model
