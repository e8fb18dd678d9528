"""Predicts what a training step will need: memory, floating-point operations, time.

Nothing here is measured. Memory comes from running the step on torch's meta device, where tensors
have shapes and no values; operations from the layers' formulas; time from a card's datasheet.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmpose.config import Config, ModelConfig
from cmpose.evaluation.inference import compute_dtype
from cmpose.models.cmpose import CMPose
from cmpose.models.vit import PATCH, VIT_SIZES
from cmpose.train.parallel import sharded_units
from cmpose.train.schedule import check_batch
from cmpose.train.step import LossModule

GB = 1e9
LIBRARIES = 0.8e9
"""Assumed: a CUDA context, and the workspaces of cuBLAS and cuDNN."""

SMALL_CARD = 24564 << 20
"""Bytes of an RTX 4090, the 24 GB card."""

OPTIMIZER_TRAFFIC = 28
"""Bytes that fused AdamW moves for each weight: it reads the weight, its gradient and two moments,
and writes all but the gradient, 4 bytes each."""


@dataclass(frozen=True)
class Card:
    """A card by its datasheet.

    Attributes:
        name: as it is sold.
        flops_16: dense FLOP/s of 16-bit products.
        flops_32: FLOP/s of float32 products.
        bandwidth: bytes/s of its memory.
    """

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float


CARDS = (
    Card("RTX 4090", 165.2e12, 82.6e12, 1.008e12),
    Card("H200 SXM", 989e12, 67e12, 4.8e12),
)


# -- operations -----------------------------------------------------------------------------------


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Floating-point operations of a clip's forward pass in training, by part of the model.

    A multiplication and an addition are two operations. Only matrix products, convolutions and
    attention count, as in torch's ``FlopCounterMode``; the clustering's distances do not.
    """
    size = VIT_SIZES[config.backbone]
    D, depth, T, K = size.width, config.depth or size.depth, config.num_frames, config.num_keypoints
    height, width = (side // PATCH for side in config.image_size)
    N = height * width
    S, hidden = N + K, int(D * config.mlp_ratio)

    def block(rows: int, keys: int) -> float:
        return 2 * rows * (4 * D * D + 2 * D * hidden) + 4 * rows * keys * D

    if config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny"):
        stem, channels, pixels = 0.0, 3, N * PATCH * PATCH
        for out in (D // 8, D // 4, D // 2, D):
            pixels //= 4
            stem += 2 * pixels * 9 * channels * out
            channels = out
        stem += 2 * N * D * D
    else:
        stem = 2 * N * 3 * PATCH * PATCH * D
    branches = 1 + config.mask_task + config.denoise_task
    rows = branches * T * S
    pathway = config.criss_cross_depth * (block(rows, S) + block(rows, T))
    parts = {
        "stem": T * stem,
        "backbone": depth * block(T * N, N),
        "coarse": 2 * pathway + 4 * rows * D * D,
        "fusion": 2 * S * T * D * D,
    }
    loose = N
    if config.fine != "off":
        parts["fine"] = 2 * (K + N) * D * D + 2 * K * N * D
        loose = config.tokens_per_keypoint * K
        loose += config.num_clusters if config.fine == "full" else 0
    C = config.head_channels
    if config.head == "deconv":
        parts["head"] = 2 * N * 16 * (D * C + 4 * C * C) + 2 * 16 * N * C * K
    else:
        attention = 4 * K * D * D + 4 * loose * D * D + 4 * K * loose * D
        parts["head"] = attention + 4 * K * D * hidden + 2 * K * D * 16 * N
    return {name: float(value) for name, value in parts.items()}


def training_flops(config: ModelConfig) -> float:
    """Operations of a clip's forward and backward pass.

    They are three times the forward pass's, less the first layer's gradient to the pixels, which is
    not computed, and plus the second forward pass of recomputed blocks.
    """
    parts = forward_flops(config)
    first = parts["stem"]
    if config.stem == "conv" or (config.stem == "auto" and config.backbone == "tiny"):
        D, pixels = VIT_SIZES[config.backbone].width, config.image_size[0] * config.image_size[1]
        first = config.num_frames * 2 * (pixels // 4) * 9 * 3 * (D // 8)
    total = 3 * sum(parts.values()) - first
    if config.checkpoint_activations:
        S = config.image_size[0] * config.image_size[1] // PATCH**2 + config.num_keypoints
        rows = (1 + config.mask_task + config.denoise_task) * config.num_frames * S
        size = VIT_SIZES[config.backbone]
        fuse = 4 * rows * size.width**2
        total += parts["backbone"] + parts["coarse"] - fuse
        # Recomputing a part ends before its last product, whose result the backward pass does not
        # need. The first blocks of the two pathways are one part.
        last = 2 * size.width * int(size.width * config.mlp_ratio)
        depth = config.depth or size.depth
        total -= last * depth * config.num_frames * (S - config.num_keypoints)
        total -= last * (4 * config.criss_cross_depth - 1) * rows
    return total


# -- memory ---------------------------------------------------------------------------------------

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "convolution", "convolution_backward", "mv")


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
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        old = {t.untyped_storage()._cdata for t in given}
        fresh = [t for t in made if t.untyped_storage()._cdata not in old]
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
            self.traffic += sum(t.numel() * t.element_size() for t in (*given, *made))
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
        known = self.weights + self.gradients + self.optimizer + self.batch + self.gathered
        return self.peak - known - sum(self.activations.values()) - int(LIBRARIES)

    def seconds(self, card: Card) -> tuple[float, float]:
        """Predicts a step's time on a card.

        Returns:
            Seconds of the products alone, and with the bytes that the other operators move.
        """
        train = self.config.train
        rate = card.flops_32 if train.precision == "fp32" else card.flops_16
        clips = self.micro_batch * train.accumulate
        products = training_flops(self.config.model) * clips / rate
        mine = self.parameters / (self.processes if self.gathered else 1)
        moved = self.traffic * train.accumulate + OPTIMIZER_TRAFFIC * mine
        return products, products + moved / card.bandwidth


def _parts_of(core: CMPose, live: LiveBytes, held: dict[str, int]) -> list[Any]:
    """Makes each part's forward pass note in ``held`` the bytes that it leaves; gives the hooks."""
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(live.live)

    def leave(name: str) -> Any:
        def note(*_: Any) -> None:
            held[name] = live.live - before.pop()

        return note

    handles: list[Any] = []
    for name, part in core.named_children():
        handles += [part.register_forward_pre_hook(enter), part.register_forward_hook(leave(name))]
    return handles


def _in_shards(config: Config, processes: int) -> bool:
    return config.train.distributed == "fsdp" and processes > 1


def _drop_gradients(parameters: list[torch.nn.Parameter], processes: int) -> list[Tensor]:
    """Lets only this card's part of each gradient stay, as with shards; gives these parts."""
    kept: list[Tensor] = []

    def reduce(parameter: Tensor) -> None:
        kept.append(torch.empty(-(-parameter.numel() // processes), device="meta"))
        parameter.grad = None

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(reduce)
    return kept


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
    model, train = config.model, config.train
    check_batch(train, processes)
    shards = _in_shards(config, processes)
    micro_batch = train.batch_size // train.accumulate // processes
    dtype = compute_dtype(train.precision)
    with torch.device("meta"):
        core = CMPose(model)
        B, T, K = micro_batch, model.num_frames, model.num_keypoints
        images = torch.empty(B, T, 3, *model.image_size, dtype=dtype)
        seed = torch.zeros(1, dtype=torch.int64)
        centers, weight = torch.empty(B, K, 2), torch.empty(B, K)
        joints = torch.empty(())
    losses = LossModule(core)
    parameters = list(core.parameters())
    count = sum(p.numel() for p in parameters)
    size = sum(p.numel() * p.element_size() for p in parameters)
    if train.accumulate > 1 and not shards:  # as the micro-batch before has left them
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
    parts = processes if shards else 1
    gathered = _gathered(core) if shards else 0
    kept = _drop_gradients(parameters, processes) if shards else []
    held: dict[str, int] = {}
    with LiveBytes() as live:
        handles = _parts_of(core, live, held)
        result, heatmaps = losses(images, seed, 0, centers, weight, joints)
        held["losses"] = live.live - sum(held.values())
        for handle in handles:
            handle.remove()
        (result.total / train.accumulate).backward()
    buffers = sum(b.numel() * b.element_size() for b in core.buffers())
    size //= parts
    moments = 2 * size
    batch = images.numel() * images.element_size() * train.accumulate
    grown = live.peak + (size if train.accumulate > 1 else 0)
    del heatmaps, kept
    return StepPrediction(
        config=config,
        micro_batch=micro_batch,
        parameters=count,
        weights=size + buffers,
        gradients=size,
        optimizer=moments,
        batch=batch,
        activations=held,
        peak=size + buffers + moments + batch + max(grown, size) + gathered + int(LIBRARIES),
        traffic=live.traffic,
        processes=processes,
        gathered=gathered,
    )


# -- in words -------------------------------------------------------------------------------------


def savings(config: Config) -> list[tuple[str, Config]]:
    """Recipes that need less memory and learn the same, in the order to try them.

    Returns:
        (field, recipe with this field and those before it).
    """
    cheaper_recipes = []
    model, train = config.model, config.train
    if train.precision == "fp32":
        train = replace(train, precision="bf16")
        cheaper_recipes.append(("train.precision=bf16", replace(config, train=train)))
    if not model.checkpoint_activations:
        model = replace(model, checkpoint_activations=True)
        names = "model.checkpoint_activations=true"
        cheaper_recipes.append((names, replace(config, model=model, train=train)))
    for accumulate in range(train.accumulate + 1, train.batch_size + 1):
        if train.batch_size % accumulate == 0:
            cut = replace(train, accumulate=accumulate)
            cheaper = replace(config, model=model, train=cut)
            cheaper_recipes.append((f"train.accumulate={accumulate}", cheaper))
    return cheaper_recipes


def _advice(config: Config) -> str:
    fields = [name for name, _ in savings(config)]
    kept = [name for name in fields if not name.startswith("train.accumulate")]
    kept += [name for name in fields if name.startswith("train.accumulate")][:1]
    return ", then ".join([*kept, "a smaller train.batch_size"])


def out_of_memory(config: Config, error: BaseException) -> str:
    """The message for a step that did not fit: which fields need less, in the order to try."""
    reason = str(error).partition(". ")[0]
    return (
        f"the device's memory does not hold a step of train.batch_size={config.train.batch_size} "
        f"in train.accumulate={config.train.accumulate} part(s) ({reason}): set {_advice(config)}; "
        "`cmpose train --dry-run` predicts what each needs"
    )


def _fitting(config: Config, memory: int, processes: int) -> str:
    """Says which fields make a step fit, by trying one after the other on the meta device."""
    tried: list[str] = []
    for name, cheaper in savings(config):
        if name.startswith("train.accumulate"):
            tried = [field for field in tried if not field.startswith("train.accumulate")]
        if cheaper.train.batch_size % (cheaper.train.accumulate * processes):
            continue
        tried.append(name)
        if predict_step(cheaper, processes).peak <= memory:
            return f"set {' and '.join(tried)}"
    if processes > 1 and config.train.distributed != "fsdp":
        return "no other field makes it fit: set train.distributed=fsdp"
    return "no field makes it fit: use a smaller model.backbone"


def report(config: Config, processes: int = 1) -> str:
    """What ``cmpose train --dry-run`` prints, for one of ``processes`` cards.

    Raises:
        ValueError: as :func:`predict_step`.
    """
    if processes < 1:
        raise ValueError(f"--processes={processes}: must be at least 1, the number of cards")
    predicted = predict_step(config, processes)
    train, model = config.train, config.model
    lines = [
        f"ViT {model.backbone}, {predicted.parameters / 1e6:.1f} M weights, "
        f"{model.image_size[0]}×{model.image_size[1]}, T = {model.num_frames}, {train.precision}, "
        f"{train.batch_size} clips a step in {train.accumulate} part(s)"
        + (", blocks recomputed" if model.checkpoint_activations else "")
        + (f", {processes} cards by {train.distributed}" if processes > 1 else ""),
        "",
        "memory of the eager step"
        + (" on each card" if processes > 1 else "")
        + ", predicted (GB = 10⁹ bytes)",
    ]
    rows = [
        ("weights, float32", predicted.weights),
        ("gradients, float32", predicted.gradients),
        ("optimiser state, float32", predicted.optimizer),
        ("images", predicted.batch),
        *((f"activations: {name}", value) for name, value in predicted.activations.items()),
        ("the worst moment, less the sum", predicted.difference),
        ("CUDA and its libraries (assumed)", int(LIBRARIES)),
        *([("gathered for a while", predicted.gathered)] if predicted.gathered else []),
        ("peak", predicted.peak),
    ]
    lines += [f"  {name:34}{value / GB:8.2f}" for name, value in rows]
    if predicted.peak <= SMALL_CARD:
        left = (SMALL_CARD - predicted.peak) / GB
        lines.append(f"  a 24 GB card ({SMALL_CARD / GB:.1f}): fits, {left:.1f} are left")
    else:
        over = _fitting(config, SMALL_CARD, processes)
        lines.append(f"  a 24 GB card ({SMALL_CARD / GB:.1f}): does not fit; {over}")
    flops = training_flops(model)
    lines += [
        "",
        f"speed, predicted from datasheets ({flops / 1e9:.0f} GFLOP a clip, recomputed ones too)"
        + (", of all cards, if nothing had to travel between them" if processes > 1 else ""),
    ]
    for card in CARDS:
        bound, eager = (train.batch_size / seconds for seconds in predicted.seconds(card))
        lines.append(
            f"  {card.name:10} at most {bound:6.0f} clips/s; operators one by one, each at the "
            f"memory's full speed, {eager:6.0f}"
        )
    return "\n".join(lines)
