"""The training step: ``python -m bench.train_step [--backbone base] [--variant V] [--json FILE]``.

It is ``cmpose train``'s step, with crops that are warped on the device. The references' attention
is torch's scaled_dot_product_attention, everything else of theirs is the ops' reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import record_function

from bench import spatial_attention, temporal_attention
from bench.harness import records, timing
from bench.harness.measure import message
from bench.harness.workload import Draw
from bench.report import tables
from cmpose import ops, provenance
from cmpose.config import Config, ModelConfig, TrainConfig
from cmpose.distributed import World
from cmpose.evaluation.inference import compute_dtype
from cmpose.memory import is_out_of_memory, reason
from cmpose.models.vit import Attention
from cmpose.train import step as training
from cmpose.train.cards import card_of
from cmpose.train.dry_run import fitting
from cmpose.train.prediction import predict_step
from cmpose.train.products import FIRST_WITH_FP8
from cmpose.train.state import new_state

VARIANTS = ("eager reference", "compiled reference", "ours", "ours compiled",
            "ours in a CUDA graph", "ours compiled in a CUDA graph",
            "ours compiled in a CUDA graph, fp8")  # fmt: skip

PARTS = ("input", "backbone", "corruption", "criss-cross attention", "other criss-cross",
         "selection, clustering, merge", "head", "losses", "optimiser", "other")  # fmt: skip

GROUPS = {"cuda": (10, 5), "cpu": (2, 1)}
"""Device → groups of steps that are timed, and steps of a group."""

BATCH = {"tiny": 2, "small": 32, "base": 32, "large": 16, "huge": 16}


def variants_on(device: str) -> list[str]:
    """Those that the device can run: graphs need a card, fp8 one that has it."""
    if device == "cpu":
        return [name for name in VARIANTS if "graph" not in name]
    has_fp8 = torch.cuda.get_device_capability() >= FIRST_WITH_FP8
    return [name for name in VARIANTS if has_fp8 or "fp8" not in name]


def model_config(backbone: str) -> ModelConfig:
    """As the recipes have it; ``tiny`` on small crops with fewer tokens, for a CPU."""
    if backbone == "tiny":
        return ModelConfig(
            backbone="tiny", depth=2, image_size=(128, 96), tokens_per_keypoint=2, num_clusters=8,
            head_channels=32,
        )  # fmt: skip
    return ModelConfig(backbone=backbone)  # type: ignore[arg-type]


def _by_sdpa(op: ModuleType) -> Callable[..., Tensor]:
    def attend(qkv: Tensor, *, backend: str = "") -> Tensor:
        return op.restore(scaled_dot_product_attention(*op.arrange(qkv)), qkv)

    return attend


sdpa_spatial, sdpa_temporal = _by_sdpa(spatial_attention), _by_sdpa(temporal_attention)


class Step:
    """``cmpose train``'s step on a batch whose frames lie on the device; a call trains once.

    Args:
        variant: of :data:`VARIANTS`.
        recipe: its model, batch, precision and accumulation; the variant decides the rest.
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, variant: str, recipe: Config, device: str) -> None:
        reference, captured = "reference" in variant, "graph" in variant
        compiled = "compiled" in variant
        self.device, self.eager = device, not captured and not compiled
        self.dtype = compute_dtype(recipe.train.precision)
        config, batch = recipe.model, recipe.train.batch_size
        model = replace(config, backend="reference" if reference else "auto")
        speed: Any = "graph" if captured else "compile" if compiled else "eager"
        products: Any = "fp8" if "fp8" in variant else "plain"
        recipe = Config(model=model, train=replace(recipe.train, speed=speed, products=products))
        world, no_clips = World(0, 1, torch.device(device)), SimpleNamespace(skeleton=None)
        state = new_state(recipe, no_clips, world)  # type: ignore[arg-type]
        self.config, self.model = model, state.model.train()
        if reference:
            for module in self.model.modules():
                if isinstance(module, Attention):
                    temporal = module.attend is ops.temporal_attention
                    module.attend = sdpa_temporal if temporal else sdpa_spatial
        self.losses = state.losses if compiled else training.LossModule(self.model)
        watch = training.FiniteWatch(world.device)
        self.train: Callable[[dict[str, Tensor]], training.StepOutput] = training.TrainingStep(
            self.losses, self.model, state.optimizer, state.scaler, watch, recipe, world
        )
        if captured:
            self.train = training.CapturedStep(self.train, training.capture_on(world.device))

        T, K, (height, width) = config.num_frames, config.num_keypoints, config.image_size
        draw = Draw(torch.float32, device)
        # Cut-outs of the frames, half as large again as the crops.
        sides = (3 * height // 2, 3 * width // 2)
        self.frames = draw.integers(256, batch, T, *sides, 3, dtype=torch.uint8)
        matrix = [[0.66, 0.1, 0.0], [-0.1, 0.66, 8.0]]
        self.matrices = torch.tensor(matrix, dtype=torch.float64, device=device).repeat(batch, 1, 1)
        extent = torch.tensor(self.model.heatmap_size[::-1], device=device)
        self.inputs = {
            "centers": draw.uniform(batch, K, 2) * extent,
            "weight": (draw.uniform(batch, K) < 0.8).float(),
            "seed": torch.zeros(1, dtype=torch.int64, device=device),
            "step": torch.zeros((), dtype=torch.int64, device=device),
        }
        self.loss = torch.zeros((), device=device)

    def images(self) -> Tensor:
        """The clips' crops, warped on the device."""
        size, backend = self.config.image_size, self.config.backend
        return ops.warp_clips(self.frames, self.matrices, size, dtype=self.dtype, backend=backend)

    def __call__(self) -> None:
        self.loss = self.train({"images": self.images(), **self.inputs}).terms[0]
        self.inputs["seed"] += 1
        self.inputs["step"] += 1


def label_parts(step: Step) -> None:
    """Names a step's parts in the profiler's events; of one within another the inner one counts.

    So what is left of the losses' module is the losses, and what is left of the step the optimiser
    with its clipping.
    """
    model, coarse = step.model, step.model.coarse
    attentions = [m for m in coarse.criss_cross.modules() if isinstance(m, Attention)]
    places: list[tuple[str, Any, str]] = [
        ("backbone", model.backbone, "forward"),
        ("other criss-cross", coarse.criss_cross, "forward"),
        ("other criss-cross", coarse.fusion, "forward"),
        ("selection, clustering, merge", model.fine, "forward"),
        ("head", model.head, "forward"),
        *(("criss-cross attention", module, "attend") for module in attentions),
        ("corruption", coarse, "corrupt"),
        ("losses", step.losses, "forward"),
        ("input", step, "images"),
        ("optimiser", step, "train"),
    ]
    for part, owner, name in places:
        if owner is not None:
            setattr(owner, name, record_function(part)(getattr(owner, name)))


def seconds_by_part(events: Iterable[Any], device: str) -> dict[str, float]:
    """Seconds of each part, forward and backward: of the kernels on a card, of operators on a CPU.

    An event belongs to the innermost part that it lies in. A backward pass lies in none; autograd
    gives its events the sequence number that the forward operator had, and so the part.
    """
    events = [event for event in events if event.device_type == DeviceType.CPU]
    events.sort(key=lambda e: (e.time_range.start, -e.time_range.end))
    part_of: dict[int, str] = {}
    forward: dict[int, str] = {}
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:  # a parent comes before its children
        part = part_of.get(id(event.cpu_parent), "other")
        if event.name in PARTS:
            part = event.name
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = forward.get(event.sequence_nr, "other")
        part_of[id(event)] = part
        if event.sequence_nr >= 0 and part != "other":
            # Of several operators with a number the last one made the node of the backward pass.
            forward[event.sequence_nr] = part
        on_card = 0 if event.name in PARTS else event.self_device_time_total
        seconds[part] += 1e-6 * (on_card if device == "cuda" else event.self_cpu_time_total)
    return seconds


def step_flops(config: ModelConfig, batch: int) -> float:
    """Operations of one of a batch's clips, forward and backward, of products and convolutions.

    Those of a step by the ops' references, so that recomputation inside a kernel does not count as
    work, nor do distances of DPC-kNN, norms, activations and losses.
    """
    config = replace(config, backend="reference", checkpoint_activations=False)
    return predict_step(Config(model=config, train=TrainConfig(batch_size=batch))).flops


def measure(variant: str, recipe: Config, device: str) -> dict[str, Any]:
    """One variant, as a results file holds it."""
    on_card, batch = device == "cuda", recipe.train.batch_size
    step = Step(variant, recipe, device)
    for _ in range(training.WARM_UP + 2 if on_card else 1):
        step()
    if on_card and "graph" not in variant:  # a graph's memory is taken when it is captured
        torch.cuda.reset_peak_memory_stats()
    clock, seconds = timing.clock_for(device), []
    groups, together = GROUPS[device]
    for _ in range(groups):  # of steps between two synchronisations
        steps = partial(timing.one_after_another, [step] * together)
        seconds.append(clock.wall(steps) / together)
    us = timing.quantiles(seconds)
    # On a card weights and optimiser count too, on a CPU only what a step takes beside them.
    peak = torch.cuda.max_memory_allocated() if on_card else timing.peak_bytes(step, device)
    flops, clips_per_s = step_flops(recipe.model, batch), 1e6 * batch / us["p50"]
    loss = float(step.loss)
    split = {}
    if step.eager:
        label_parts(step)  # nothing is run with it afterwards
        split = seconds_by_part(timing.profile(step, device).events(), device)
    card = card_of(provenance.machine())
    rate = card.flops_16 if card and recipe.train.precision == "bf16" else None
    return {
        "clips_per_s": round(clips_per_s, 3),
        "ms": {name: round(value / 1e3, 4) for name, value in us.items()},
        "peak_bytes": peak,
        "model_flops_per_clip": round(flops),
        "mfu": None if rate is None else round(flops * clips_per_s / rate, 4),
        "loss": loss if loss > 0 else None,
        "parts_ms": {name: round(seconds * 1e3, 4) for name, seconds in split.items()},
    }


def put(path: Path | None, step: dict[str, Any], variant: str, result: Any) -> None:
    """Adds a variant's outcome to the step's record, and to that of a results file."""
    step["variants"][variant] = result
    if path is None:
        return
    content = records.load_or_empty(path, provenance.machine())
    for earlier in content["train_step"]:
        # What another commit's variants took is not compared with these.
        same_commit = earlier["provenance"]["commit"] == step["provenance"]["commit"]
        if same_commit and records.key(earlier) == records.key(step):
            step["variants"] = earlier["variants"] | step["variants"]
    records.add(content, steps=[step])
    records.save(path, content)


def main(arguments: list[str] | None = None) -> int:
    device = provenance.device()
    on_card = device == "cuda"
    parser = argparse.ArgumentParser(prog="python -m bench.train_step")
    parser.add_argument("--backbone", choices=tuple(BATCH), default="base" if on_card else "tiny")
    parser.add_argument("--variant", choices=VARIANTS, help="default: every one that can run")
    parser.add_argument("--json", type=Path, help="results file")
    options = parser.parse_args(arguments)
    config = model_config(options.backbone)
    train = TrainConfig(batch_size=BATCH[options.backbone], precision="bf16" if on_card else "fp32")
    recipe, note = Config(model=config, train=train), None if on_card else records.NOT_A_RESULT
    if on_card:
        memory = torch.cuda.mem_get_info()[0]
        fields, recipe = fitting(recipe, memory) or ([], recipe)
        note = f"to fit {memory / 1e9:.1f} GB: {', '.join(fields)}" if fields else None
    else:
        print(note)
    height, width = config.image_size
    step: dict[str, Any] = {
        "backbone": options.backbone, "batch": train.batch_size, "precision": train.precision,
        "shape": {"T": config.num_frames, "K": config.num_keypoints, "height": height,
                  "width": width},
        "variants": {}, "rates": asdict(timing.measure_rates(device)), "note": note,
        "provenance": provenance.provenance(),
    }  # fmt: skip
    status = 0
    for name in [options.variant] if options.variant else variants_on(device):
        # This stands if the process dies.
        put(options.json, step, name, "error: the process died while it ran")
        try:
            result: Any = measure(name, recipe, device)
        except Exception as error:
            # A reference that fails is a finding, as is what a card does not hold; else ours is at
            # fault.
            full = is_out_of_memory(error)
            result = f"does not fit: {reason(error)}" if full else message(error)
            status = status or int("ours" in name and not full)
        put(options.json, step, name, result)
    print(tables.train_step([{"card": provenance.machine(), "train_step": [step]}]))
    return status


if __name__ == "__main__":
    sys.exit(main())
