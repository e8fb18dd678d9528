"""A training step as a function of tensors: run as it is, compiled, or captured in a CUDA graph.

Everything here happens on the device. The host reads no value, so that it never waits and the whole
step can be captured. What the host decides (learning rate, seed, the step's number) comes in as
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmpose import ops
from cmpose.config import Config, TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose
from cmpose.models.losses import Losses, cmpose_loss
from cmpose.train.parallel import gather, shard_like, whole

LOSS_TERMS = ("loss", *Losses._fields[1:])

COMPILER = "inductor"
"""The backend of ``torch.compile``."""

WARM_UP = 3
"""Steps taken before one is captured, in which memory is allocated, kernels are tuned and the
optimiser makes its state."""


class StepOutput(NamedTuple):
    """Results of a step.

    Attributes:
        terms: [5] loss terms in the order of ``LOSS_TERMS``, over all processes' clips, float32.
        norm: [] gradient norm before clipping, float32.
        heatmaps: [b, K, h, w] of the last micro-batch.
    """

    terms: Tensor
    norm: Tensor
    heatmaps: Tensor


class LossModule(nn.Module):
    """The model and its losses as one module, for DDP and ``torch.compile`` to take as a whole."""

    def __init__(self, core: CMPose, *, compiled: bool = False) -> None:
        super().__init__()
        self.core = core
        self._run = self._losses
        if compiled:
            self._run = torch.compile(self._losses, fullgraph=True, backend=COMPILER)

    def _losses(
        self,
        images: Tensor,
        seed: Tensor,
        first_clip: int,
        centers: Tensor,
        weight: Tensor,
        joints: Tensor,
    ) -> tuple[Losses, Tensor]:
        output = self.core(images, seed, first_clip)
        losses = cmpose_loss(output, centers, weight, self.core.config, joints=joints)
        return losses, output.heatmaps

    def forward(self, *arguments: Any) -> tuple[Losses, Tensor]:
        """images, seed, first clip's index, centers, weight, joints → losses, heatmaps."""
        return self._run(*arguments)


class FiniteWatch:
    """Remembers on the device the first step that was not finite.

    From that step on :attr:`halted` is 1, which keeps the fused optimiser from changing weights
    or its own state. So the host need not look after every step (:meth:`read`) and still finds the
    weights as they were before the one that failed.
    """

    def __init__(self, device: torch.device) -> None:
        self.halted = torch.zeros((), device=device)
        self._record = torch.zeros(len(LOSS_TERMS) + 2, dtype=torch.float64, device=device)

    def observe(self, step: Tensor, terms: Tensor, norm: Tensor, *, norm_counts: bool) -> None:
        """Takes note of a step.

        Args:
            step: [] int64, its number.
            terms: [5] loss terms.
            norm: [] gradient norm.
            norm_counts: whether an infinite gradient is a failure too.
        """
        finite = terms.isfinite().all()
        if norm_counts:
            finite = finite & norm.isfinite()
        bad = (~finite).to(self.halted.dtype)
        values = torch.cat([part.reshape(-1).double() for part in (step, terms, norm)])
        first = (bad > 0) & (self.halted == 0)
        self._record.copy_(torch.where(first, values, self._record))
        self.halted.copy_(torch.maximum(self.halted, bad))

    def read(self) -> tuple[int, dict[str, float], float] | None:
        """None, or step, loss terms and gradient norm of the first failure.

        Waits for the device.
        """
        if not bool(self.halted):
            return None
        step, *terms, norm = self._record.tolist()
        return int(step), dict(zip(LOSS_TERMS, terms, strict=True)), norm


class TrainingStep:
    """Forward, losses, backward, clipping and optimiser on a batch that is on the device.

    Args:
        losses: a ``LossModule``, or what ``share`` made of one.
        core: its model.
        optimizer: a fused one, which ``watch`` can keep from taking steps.
        scaler: of the loss, for float16.
        watch: is shown the terms and the norm.
        config: the recipe.
        world: this process.
    """

    def __init__(
        self,
        losses: nn.Module,
        core: CMPose,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        watch: FiniteWatch,
        config: Config,
        world: World,
    ) -> None:
        self.losses, self.optimizer, self.scaler = losses, optimizer, scaler
        self.watch, self.train, self.world = watch, config.train, world
        self.parameters = [p for p in core.parameters() if p.requires_grad]
        if not scaler.is_enabled():
            # While this is 1 torch's fused optimisers leave everything as it is.
            optimizer.found_inf = watch.halted  # type: ignore[attr-defined]

    def __call__(self, batch: dict[str, Tensor]) -> StepOutput:
        """batch: images [B, T, 3, H, W], centers [B, K, 2], weight [B, K], seed [1], step []."""
        train, world = self.train, self.world
        images, centers, weight = batch["images"], batch["centers"], batch["weight"]
        parts = train.accumulate * world.size
        joints = world.sum(weight.sum()).clamp(min=1.0) / parts
        count = len(images)
        size = count // train.accumulate
        terms = torch.zeros(len(LOSS_TERMS), device=images.device)
        for part in range(train.accumulate):
            window = slice(part * size, (part + 1) * size)
            last = part == train.accumulate - 1
            wait = isinstance(self.losses, DistributedDataParallel) and not last
            with self.losses.no_sync() if wait else nullcontext():  # type: ignore[operator]
                # The watch reports NaN, with more about it than the first op that meets it could.
                with ops.without_value_checks():
                    losses, heatmaps = self.losses(
                        images[window],
                        batch["seed"],
                        world.rank * count + window.start,
                        centers[window],
                        weight[window],
                        joints,
                    )
                self.scaler.scale(losses.total / train.accumulate).backward()
            terms = terms + torch.stack([term.detach().float() for term in losses])
        # Every term is the mean over parts (micro-batches and processes). Each part has divided its
        # pose term by the mean number of visible joints in a part, so that this is the mean over
        # all joints.
        terms = world.sum(terms / parts)
        self.scaler.unscale_(self.optimizer)
        limit = train.clip_norm if train.clip_norm > 0 else float("inf")
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, limit)).detach().float()
        # With loss scaling an infinite gradient is normal: the scaler skips that step.
        self.watch.observe(batch["step"], terms, norm, norm_counts=not self.scaler.is_enabled())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # Dropped, not set to 0, so that a captured step's backward pass writes and does not add.
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutput(terms, norm, heatmaps.detach())


# -- CUDA graphs ----------------------------------------------------------------------------------


class Capture(Protocol):
    """Something that records a call once and repeats it."""

    def warm_up(self, call: Callable[[], StepOutput]) -> StepOutput:
        """Runs the call as it will be recorded."""

    def record(self, call: Callable[[], StepOutput]) -> None:
        """Records the call without running it."""

    def replay(self) -> StepOutput:
        """Runs what was recorded; the results lie where they lay the last time."""


class CudaCapture:
    """A CUDA graph, warmed up and recorded on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()
        self._output: StepOutput | None = None

    def warm_up(self, call: Callable[[], StepOutput]) -> StepOutput:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = call()
        current.wait_stream(self._stream)
        return output

    def record(self, call: Callable[[], StepOutput]) -> None:
        # In the other modes a loader thread that pins memory meanwhile would break the capture.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._output = call()

    def replay(self) -> StepOutput:
        assert self._output is not None, "record comes first"
        self._graph.replay()
        return self._output


def capture_on(device: torch.device) -> Capture:
    """The way to capture a step on a device.

    Raises:
        ValueError: for a device without CUDA graphs.
    """
    if device.type != "cuda":
        raise ValueError(
            f"train.speed='graph' captures a CUDA graph, but train.device is {device.type}: "
            "use train.speed=eager or compile"
        )
    return CudaCapture(device)


class CapturedStep:
    """A step that runs on static buffers, is captured after a few real steps, and replayed.

    The batch is copied into the buffers before each call. The first ``warm_up`` calls are
    training steps like any other; the next is captured, which runs nothing, and replayed.

    Args:
        function: the step; it may read tensors in its argument and tensors that live as long as
            it does, and nothing else that changes.
        capture: records and replays it.
        warm_up: calls before the capture, ≥ 1.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], StepOutput],
        capture: Capture,
        warm_up: int = WARM_UP,
    ) -> None:
        self._function, self._capture, self._warm_up = function, capture, warm_up
        self._calls = 0
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, batch: dict[str, Tensor]) -> StepOutput:
        """One step; the results are the caller's to keep.

        Raises:
            ValueError: for a batch of other shapes or dtypes than the first one's.
        """
        self._fill(batch)
        if self._calls < self._warm_up:
            output = self._capture.warm_up(self._on_buffers)
        else:
            if self._calls == self._warm_up:
                self._capture.record(self._on_buffers)
            output = self._capture.replay()
        self._calls += 1
        return StepOutput(*(part.clone() for part in output))

    def _on_buffers(self) -> StepOutput:
        return self._function(self.buffers)

    def _fill(self, batch: dict[str, Tensor]) -> None:
        if not self.buffers:
            self.buffers = {name: value.clone() for name, value in batch.items()}
            return
        for name, buffer in self.buffers.items():
            value = batch[name]
            if value.shape != buffer.shape or value.dtype != buffer.dtype:
                raise ValueError(
                    f"train.speed='graph': {name} is {list(value.shape)} {value.dtype}, the step "
                    f"was captured for {list(buffer.shape)} {buffer.dtype}; a graph has one "
                    "shape, use train.speed=compile or eager"
                )
            buffer.copy_(value)


def settled_speed(train: TrainConfig, world: World) -> Literal["eager", "compile", "graph"]:
    """``train.speed``, or what ``auto`` stands for among these processes."""
    if train.speed != "auto":
        return train.speed
    several = world.size > 1
    if world.device.type != "cuda" or (several and train.distributed == "fsdp"):
        return "eager"
    if train.products == "fp16_accumulate_emulated":
        return "eager"
    return "compile" if several or train.precision == "fp16" else "graph"


def check_speed(train: TrainConfig, world: World) -> None:
    """Raises ValueError for a recipe that cannot be captured."""
    if train.speed != "graph":
        return
    capture_on(world.device)
    if world.size > 1:
        raise ValueError(
            f"train.speed='graph' is for one process, there are {world.size}: "
            "use train.speed=compile or eager"
        )
    if train.precision == "fp16":
        raise ValueError(
            "train.speed='graph' cannot scale losses, which train.precision='fp16' needs: "
            "use train.precision=bf16, or train.speed=compile"
        )


# -- learning rates -------------------------------------------------------------------------------


def prepare_groups(optimizer: torch.optim.Optimizer, device: torch.device, captured: bool) -> None:
    """A captured step sees a group's rate change in a tensor on the device; else it is a number."""
    for group in optimizer.param_groups:
        group["capturable"] = captured and device.type == "cuda"
        rate = float(group["lr"])
        group["lr"] = torch.tensor(rate, device=device) if captured else rate


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets every group's rate to ``rate`` times the group's scale.

    Rounded to float32, which is what a captured step reads: every speed takes the same steps.
    """
    for group in optimizer.param_groups:
        value = float(np.float32(rate * group["scale"]))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def optimizer_state(optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """An optimiser's state with rates as plain numbers and with whole tensors.

    So it is the same for every ``train.speed`` and ``train.distributed``. Every process must call
    it; only the main one gets all tensors.
    """
    state = gather(optimizer.state_dict(), world)
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores what :func:`optimizer_state` gave, cut into this run's shards if it has any."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": moments})
