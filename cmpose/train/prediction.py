"""Predicts what a training step will need: memory, floating-point operations, time.

Nothing here is measured. Memory comes from running the step on torch's meta device, where tensors
have shapes and no values; operations from running it once more, for torch's counter keeps some of
the memory (:mod:`cmpose.train.flops`); time from a card's datasheet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmpose.config import Config
from cmpose.evaluation.inference import compute_dtype
from cmpose.models.cmpose import CMPose
from cmpose.train.cards import Card
from cmpose.train.cost import COPY_SHARE, fused, kind_of, rate_of, seconds_by
from cmpose.train.flops import counter
from cmpose.train.parallel import sharded_units
from cmpose.train.products import check_channels, use_products
from cmpose.train.schedule import check_batch
from cmpose.train.step import LossModule
from cmpose.train.trace import Call, Trace

LIBRARIES = 0.8e9
"""Assumed: a CUDA context, and the workspaces of cuBLAS and cuDNN."""

OPTIMIZER_TRAFFIC = 28
"""Bytes that fused AdamW moves for each weight: it reads the weight, its gradient and two moments,
and writes all but the gradient, 4 bytes each."""

_PRODUCTS = (
    *("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "_scaled_mm"),
    *("convolution", "convolution_backward"),
)
CLIPPING_TRAFFIC = 12
"""Bytes that clipping moves for each weight: its gradient is read for the norm, and scaled."""

PARTS = {"backbone": "backbone", "coarse": "criss-cross", "fine": "clustering", "head": "heads"}
"""Part of the model → what its time is called; all else is of the losses."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every operator's results from when they are made until they are freed.

    Attributes:
        live: bytes that are held now.
        peak: the most that were held so far.
        traffic: bytes that operators other than products have read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.traffic = 0
        self._known: set[int] = set()

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        old = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in old]
        for tensor in fresh:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                continue
            self._known.add(key)
            finalizer = weakref.finalize(storage, self._free, key, size)
            finalizer.atexit = False  # type: ignore[misc]
            self.live += size
        self.peak = max(self.peak, self.live)
        name = func._schema.name.partition("::")[2]
        writes = bool(fresh) or func._schema.is_mutable
        if writes and name not in _PRODUCTS:
            self.traffic += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return result


@dataclass(frozen=True)
class StepPrediction:
    """What a recipe's step is predicted to need on one of its cards; sizes are in bytes.

    Attributes:
        config: the recipe.
        micro_batch: clips that this card takes at once.
        parameters: weights of the whole model, their number.
        weights: what this card holds of them, with buffers.
        gradients: what it holds of the gradients.
        optimizer: what it holds of AdamW's moments.
        batch: the images of its clips.
        activations: what the forward pass of a micro-batch leaves for the backward pass, by part.
        peak: the most that is held at any moment.
        traffic: what operators other than products read and write in a micro-batch.
        processes: cards that share the step.
        gathered: with shards, what is whole for a while: the weights outside units, those of two
            units (while one runs, the next is gathered), and the largest gradient on its way.
    """

    config: Config
    micro_batch: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    batch: int
    activations: dict[str, int]
    peak: int
    traffic: int
    processes: int = 1
    gathered: int = 0

    @property
    def difference(self) -> int:
        """The peak less all other parts.

        Working memory counts up, and gradients that come when activations have gone count down, so
        that it is mostly below 0.
        """
        listed = self.weights + self.gradients + self.optimizer + self.batch + self.gathered
        return self.peak - listed - sum(self.activations.values()) - int(LIBRARIES)

    @cached_property
    def flops(self) -> float:
        """Operations of a clip's forward and backward pass, those of recomputed blocks too."""
        losses, arguments = _on_meta(self.config, self.micro_batch)
        with counter() as operations:
            losses(*arguments)[0].total.backward()
        return operations.get_total_flops() / self.micro_batch

    @cached_property
    def calls(self) -> list[Call]:
        """The operators of a micro-batch's forward and backward pass."""
        losses, arguments = _on_meta(self.config, self.micro_batch)
        with Trace("losses") as trace:
            for name, module in losses.core.named_children():
                module.register_forward_pre_hook(
                    lambda *_, name=name: trace.parts.enter(PARTS.get(name, "losses"))
                )
                module.register_forward_hook(lambda *_: trace.parts.leave())
            losses(*arguments)[0].total.backward()
        return trace.calls

    @cached_property
    def fused_calls(self) -> list[Call]:
        """The same with neighbours as one kernel (:func:`cmpose.train.cost.fused`)."""
        return fused(self.calls)

    def _seconds_by(
        self, key: Callable[[Call], str], card: Card, compiled: bool
    ) -> dict[str, float]:
        train = self.config.train
        calls = self.fused_calls if compiled else self.calls
        seconds = seconds_by(key, calls, card, float16_sums=train.products == "fp16_accumulate")
        return {name: train.accumulate * value for name, value in seconds.items()}

    def parts(self, card: Card, *, compiled: bool) -> dict[str, float]:
        """Part of a step → seconds on a card, by the estimate of :mod:`cmpose.train.cost`.

        The host is taken to keep up with the card, and nothing to travel between cards.

        Args:
            card: whose datasheet is taken.
            compiled: whether neighbours are one kernel.
        """
        by_part = self._seconds_by(lambda call: call.part, card, compiled)
        seconds = {"input": 2 * self.batch / card.bandwidth / COPY_SHARE}
        for part in dict.fromkeys([*PARTS.values(), *by_part]):
            seconds[part] = by_part.get(part, 0.0)
        mine = self.parameters / (self.processes if self.gathered else 1)
        moved = (OPTIMIZER_TRAFFIC + CLIPPING_TRAFFIC) * mine
        seconds["optimiser"] = moved / card.bandwidth / COPY_SHARE
        return seconds

    def kinds(self, card: Card, *, compiled: bool) -> dict[str, float]:
        """Kind of operator (:func:`cmpose.train.cost.kind_of`) → seconds, as in :meth:`parts`.

        They are those of the passes through the model: without ``input`` and ``optimiser``.
        """
        return self._seconds_by(kind_of, card, compiled)

    def seconds(self, card: Card) -> tuple[float, float]:
        """Predicts a step's time on a card.

        Returns:
            Seconds of the products alone, each at the datasheet's rate for its format, and with the
            bytes that the other operators move.
        """
        train = self.config.train
        sums = train.products == "fp16_accumulate"
        works = (call.flops / rate_of(call, card, float16_sums=sums) for call in self.calls)
        products = train.accumulate * sum(works)
        mine = self.parameters / (self.processes if self.gathered else 1)
        moved = self.traffic * train.accumulate + OPTIMIZER_TRAFFIC * mine
        return products, products + moved / card.bandwidth


def _on_meta(config: Config, clips: int) -> tuple[LossModule, tuple[Any, ...]]:
    """The model with its losses, and arguments for so many clips, without values."""
    model = config.model
    with torch.device("meta"):
        core = CMPose(model)
        images = torch.empty(
            clips,
            model.num_frames,
            3,
            *model.image_size,
            dtype=compute_dtype(config.train.precision),
        )
        seed = torch.zeros(1, dtype=torch.int64)
        centers = torch.empty(clips, model.num_keypoints, 2)
        weight = torch.empty(clips, model.num_keypoints)
        joints = torch.empty(())
    use_products(core, config.train.products)
    return LossModule(core), (images, seed, 0, centers, weight, joints)


def _parts_of(core: CMPose, live: LiveBytes, activations: dict[str, int]) -> list[Any]:
    """Lets each part's forward pass write the bytes that it leaves into ``activations``.

    Returns the hooks.
    """
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(live.live)

    def leave(name: str) -> Any:
        def note(*_: Any) -> None:
            activations[name] = live.live - before.pop()

        return note

    handles: list[Any] = []
    for name, part in core.named_children():
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave(name))]
    return handles


def _in_shards(config: Config, processes: int) -> bool:
    return config.train.distributed == "fsdp" and processes > 1


def _drop_gradients(parameters: list[torch.nn.Parameter], processes: int) -> list[Tensor]:
    """Lets only this card's part of each gradient stay, as with shards; gives these parts."""
    own_parts: list[Tensor] = []

    def reduce(parameter: Tensor) -> None:
        own_parts.append(torch.empty(-(-parameter.numel() // processes), device="meta"))
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(reduce)
    return own_parts


def _gathered(core: CMPose) -> int:
    """Bytes of ``StepPrediction.gathered``."""
    units = [sum(p.numel() * p.element_size() for p in u.parameters()) for u in sharded_units(core)]
    rest = sum(p.numel() * p.element_size() for p in core.parameters()) - sum(units)
    return rest + 2 * max(units) + max(rest, *units)


def predict_step(config: Config, processes: int = 1) -> StepPrediction:
    """Predicts a recipe's eager step on one of its cards; takes seconds and needs no card.

    Args:
        config: the recipe.
        processes: cards that share the batch, and with ``train.distributed=fsdp`` the weights.

    Raises:
        ValueError: for a model that cannot be built, or a batch that cannot be cut.
    """
    train = config.train
    check_batch(train, processes)
    check_channels(config)
    shards = _in_shards(config, processes)
    micro_batch = train.batch_size // train.accumulate // processes
    losses, arguments = _on_meta(config, micro_batch)
    core, images = losses.core, arguments[0]
    parameters = list(core.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    if train.accumulate > 1 and not shards:  # as the micro-batch before has left them
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    parts = processes if shards else 1
    gathered = _gathered(core) if shards else 0
    own_gradients = _drop_gradients(parameters, processes) if shards else []
    activations: dict[str, int] = {}
    with LiveBytes() as live:
        handles = _parts_of(core, live, activations)
        result, heatmaps = losses(*arguments)
        activations["losses"] = live.live - sum(activations.values())
        for handle in handles:
            handle.remove()
        (result.total / train.accumulate).backward()
    buffers = sum(b.numel() * b.element_size() for b in core.buffers())
    size //= parts
    moments = 2 * size
    batch = images.numel() * images.element_size() * train.accumulate
    grown = live.peak + (size if train.accumulate > 1 else 0)
    del heatmaps, own_gradients
    return StepPrediction(
        config=config,
        micro_batch=micro_batch,
        parameters=count,
        weights=size + buffers,
        gradients=size,
        optimizer=moments,
        batch=batch,
        activations=activations,
        peak=size + buffers + moments + batch + max(grown, size) + gathered + int(LIBRARIES),
        traffic=live.traffic,
        processes=processes,
        gathered=gathered,
    )
