"""The training step: ``python -m bench.train_step [--backbone base] [--variant V] [--json FILE]``.

Crops are warped on the device, the model runs in their dtype as ``cmpose train`` runs it, AdamW is
fused. The references' attention is torch's scaled_dot_product_attention, everything else of theirs
is the ops' reference.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import record_function

from bench.harness import records, timing
from bench.harness.bound import Rates, measure_rates
from bench.harness.measure import message
from bench.harness.workload import counted_flops
from cmpose import ops, provenance
from cmpose.config import Backend, ModelConfig, TrainConfig
from cmpose.models.cmpose import CMPose
from cmpose.models.losses import cmpose_loss
from cmpose.models.vit import Attention
from cmpose.train.schedule import parameter_groups

VARIANTS = (
    "eager reference",
    "compiled reference",
    "ours",
    "ours compiled",
    "ours in a CUDA graph",
    "ours compiled in a CUDA graph",
)

PARTS = (
    "input",
    "backbone",
    "corruption",
    "criss-cross attention",
    "other criss-cross",
    "selection, clustering, merge",
    "head",
    "losses",
    "optimiser",
    "other",
)

BATCH = {"tiny": 2, "small": 32, "base": 32, "large": 16, "huge": 16}

DATASHEET = {"H200": 989e12, "H100": 989e12, "4090": 165.2e12}
"""Dense bfloat16 operations a second with float32 accumulation, by what a card's name holds."""


def model_config(backbone: str, backend: Backend) -> ModelConfig:
    """As the recipes have it; ``tiny`` on small crops with fewer tokens, for a CPU."""
    if backbone == "tiny":
        return ModelConfig(
            backbone="tiny",
            depth=2,
            image_size=(128, 96),
            tokens_per_keypoint=2,
            num_clusters=8,
            head_channels=32,
            backend=backend,
        )
    return ModelConfig(backbone=backbone, backend=backend)  # type: ignore[arg-type]


# -- the reference's attention --------------------------------------------------------------------


def sdpa_spatial(qkv: Tensor, *, backend: str = "") -> Tensor:
    """softmax within a frame by torch's kernel of choice."""
    B, T = qkv.shape[:2]
    q, k, v = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(0, (B, T))


def sdpa_temporal(qkv: Tensor, *, backend: str = "") -> Tensor:
    """softmax along the frames by torch's kernel of choice."""
    B, _, S = qkv.shape[:3]
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)
    out = scaled_dot_product_attention(q, k, v).unflatten(0, (B, S))
    return out.permute(0, 3, 1, 2, 4)


def with_sdpa(model: CMPose) -> CMPose:
    """Puts torch's attention in the place of the ops."""
    for module in model.modules():
        if isinstance(module, Attention):
            temporal = module.attend is ops.temporal_attention
            module.attend = sdpa_temporal if temporal else sdpa_spatial
    return model


# -- a step ---------------------------------------------------------------------------------------


class Step:
    """A model, its data on the device, its optimiser; calling it trains once.

    Args:
        config: of the model.
        batch: clips.
        device: ``cuda`` or ``cpu``.
        precision: ``bf16`` (float32 weights are cast where they are used) or ``fp32``.
        reference: attention by torch.
        capturable: the optimiser's state lives on the device, for CUDA graphs.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        device: str,
        precision: str,
        *,
        reference: bool = False,
        capturable: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.config, self.batch, self.device, self.precision = config, batch, device, precision
        self.model = CMPose(config).to(device).train()
        if reference:
            with_sdpa(self.model)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, TrainConfig()), lr=2e-4, fused=True, capturable=capturable
        )
        T, (height, width) = config.num_frames, config.image_size
        generator = torch.Generator(device=device).manual_seed(0)

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(*sizes, device=device, generator=generator)

        # Cut-outs of the frames, half as large again as the crops.
        sides = (3 * height // 2, 3 * width // 2)
        self.frames = (uniform(batch, T, *sides, 3) * 256).to(torch.uint8)
        matrix = [[0.66, 0.1, 0.0], [-0.1, 0.66, 8.0]]
        self.matrices = torch.tensor(matrix, dtype=torch.float64, device=device).repeat(batch, 1, 1)
        extent = torch.tensor(self.model.heatmap_size[::-1], device=device)
        self.centers = uniform(batch, config.num_keypoints, 2) * extent
        self.weight = (uniform(batch, config.num_keypoints) < 0.8).float()
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.loss_of: Callable[..., Tensor] = self._loss
        self.loss = torch.zeros((), device=device)

    def images(self) -> Tensor:
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return ops.warp_clips(
            self.frames,
            self.matrices,
            self.config.image_size,
            dtype=dtype,
            backend=self.config.backend,
        )

    def _loss(self, images: Tensor, seed: Tensor, centers: Tensor, weight: Tensor) -> Tensor:
        return self.losses(self.model(images, seed), centers, weight)

    def losses(self, output: Any, centers: Tensor, weight: Tensor) -> Tensor:
        return cmpose_loss(output, centers, weight, self.config).total

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        with ops.without_value_checks():
            loss = self.loss_of(self.images(), self.seed, self.centers, self.weight)
        loss.backward()
        self.update()
        self.seed.add_(1)
        self.loss.copy_(loss.detach())


def captured(step: Step) -> Callable[[], None]:
    """The whole step as a CUDA graph: input, forward, backward, optimiser."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def prepare(
    variant: str, config: ModelConfig, batch: int, device: str, precision: str
) -> tuple[Step, Callable[[], None]]:
    """A variant's step, and how it is run.

    Raises:
        ValueError: no such variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"--variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    reference, graph = "reference" in variant, "graph" in variant
    config = replace(config, backend="reference" if reference else "auto")
    step = Step(config, batch, device, precision, reference=reference, capturable=graph)
    if "compiled" in variant:
        step.loss_of = torch.compile(step._loss, fullgraph=True, dynamic=False)
    return step, captured(step) if graph else step


# -- parts of a step -----------------------------------------------------------------------------


def labelled(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` under the part's name in the profiler's events."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        with record_function(part):
            return function(*arguments, **keywords)

    return run


def label_parts(step: Step) -> None:
    """Names the parts of a step; where one lies within another, the inner one counts."""
    coarse = step.model.coarse
    modules: list[tuple[str, nn.Module | None]] = [
        ("backbone", step.model.backbone),
        ("other criss-cross", coarse.criss_cross),
        ("other criss-cross", coarse.fusion),
        ("selection, clustering, merge", step.model.fine),
        ("head", step.model.head),
    ]
    for part, module in modules:
        if module is not None:
            module.forward = labelled(part, module.forward)
    for module in coarse.criss_cross.modules():
        if isinstance(module, Attention):
            module.attend = labelled("criss-cross attention", module.attend)
    coarse.corrupt = labelled("corruption", coarse.corrupt)  # type: ignore[method-assign]
    step.images = labelled("input", step.images)  # type: ignore[method-assign]
    step.losses = labelled("losses", step.losses)  # type: ignore[method-assign]
    step.update = labelled("optimiser", step.update)  # type: ignore[method-assign]


def seconds_by_part(events: Iterable[Any], device: str) -> dict[str, float]:
    """Seconds of each part, forward and backward: of the kernels on a card, of operators on a CPU.

    An event belongs to the innermost part that it lies in. A backward pass lies in none; autograd
    gives its events the sequence number that the forward operator had, and so the part.
    """
    events = sorted((e for e in events if e.device_type == DeviceType.CPU), key=_start)
    part_of: dict[int, str] = {}
    forward: dict[int, str] = {}
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:  # a parent comes before its children
        part = "other"
        if event.name in PARTS:
            part = event.name
        elif event.name.startswith("autograd::engine::evaluate_function"):
            part = forward.get(event.sequence_nr, "other")
        elif event.cpu_parent is not None:
            part = part_of[id(event.cpu_parent)]
        part_of[id(event)] = part
        if event.sequence_nr >= 0 and part != "other":
            # Of several operators with a number the last one made the node of the backward pass.
            forward[event.sequence_nr] = part
        on_card = 0 if event.name in PARTS else event.self_device_time_total
        seconds[part] += 1e-6 * (on_card if device == "cuda" else event.self_cpu_time_total)
    return seconds


def _start(event: Any) -> tuple[float, float]:
    """Orders events so that one that holds another comes before it."""
    return event.time_range.start, -event.time_range.end


def parts(step: Step) -> dict[str, float]:
    """Seconds of each part of one eager step; the step's model is not to be used afterwards."""
    label_parts(step)
    profiled = timing.profile(step, step.device)
    return seconds_by_part(profiled.events(), step.device)


# -- measuring ------------------------------------------------------------------------------------


def step_flops(config: ModelConfig) -> int:
    """Operations of a clip's forward and backward pass, of products and convolutions.

    Those of a step on the meta device by the ops' references, so that recomputation inside a
    kernel does not count as work. Distances of DPC-kNN, norms, activations and losses are left
    out: they are not what the model's utilisation is counted in.
    """
    config = replace(config, backend="reference")
    with torch.device("meta"):
        model = CMPose(config).train()
        images = torch.empty(1, config.num_frames, 3, *config.image_size)
        seed = torch.zeros(1, dtype=torch.int64)
        centers = torch.empty(1, config.num_keypoints, 2)
        weight = torch.empty(1, config.num_keypoints)

    def step() -> None:
        with ops.without_value_checks():
            cmpose_loss(model(images, seed), centers, weight, config).total.backward()

    return counted_flops(step)


def timed(run: Callable[[], None], device: str, samples: int, together: int) -> list[float]:
    """Seconds a step, of groups of steps between synchronisations."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for _ in range(samples):
        start = now()
        for _ in range(together):
            run()
        seconds.append((now() - start) / together)
    return seconds


def peak_rate(card: str) -> float | None:
    """The card's datasheet rate, for utilisation; None where it is not known here."""
    return next((rate for name, rate in DATASHEET.items() if name in card), None)


def measure(
    variant: str, config: ModelConfig, batch: int, device: str, precision: str
) -> dict[str, Any]:
    """One variant, as a results file holds it."""
    on_card = device == "cuda"
    step, run = prepare(variant, config, batch, device, precision)
    for _ in range(3 if on_card else 1):
        run()
    if on_card and run is step:  # a graph's memory is taken when it is captured
        torch.cuda.reset_peak_memory_stats()
    us = timing.quantiles(timed(run, device, *((10, 5) if on_card else (2, 1))))
    # On a card weights and optimiser count too, on a CPU only what a step takes beside them.
    peak = torch.cuda.max_memory_allocated() if on_card else timing.peak_bytes(run, device)
    flops, clips_per_s = step_flops(config), 1e6 * batch / us["p50"]
    loss = float(step.loss)
    eager = run is step and "compiled" not in variant
    split = parts(step) if eager else {}
    rate = peak_rate(provenance.machine()) if on_card and precision == "bf16" else None
    return {
        "clips_per_s": round(clips_per_s, 3),
        "ms": {name: round(value / 1e3, 4) for name, value in us.items()},
        "peak_bytes": peak,
        "model_flops_per_clip": flops,
        "mfu": None if rate is None else round(flops * clips_per_s / rate, 4),
        "loss": loss if loss > 0 else None,
        "parts_ms": {name: round(seconds * 1e3, 4) for name, seconds in split.items()},
    }


def entry(backbone: str, config: ModelConfig, batch: int, precision: str, rates: Rates) -> Any:
    """A step's record without variants."""
    origin = provenance.provenance()
    return {
        "backbone": backbone,
        "batch": batch,
        "precision": precision,
        "shape": {
            "T": config.num_frames,
            "K": config.num_keypoints,
            "height": config.image_size[0],
            "width": config.image_size[1],
        },
        "variants": {},
        "rates": rates.as_dict(),
        "note": None if origin["gpu"] else records.NOT_A_RESULT,
        "provenance": origin,
    }


def put(path: Path, step: dict[str, Any], variant: str, result: Any) -> None:
    """Adds a variant's outcome to the step's record of a results file."""
    content = records.load_or_empty(path, provenance.machine())
    same = [
        s
        for s in content["train_step"]
        if all(s[k] == step[k] for k in ("backbone", "batch", "precision"))
        # What another commit's variants took is not compared with these.
        and s["provenance"]["commit"] == step["provenance"]["commit"]
    ]
    held = same[0]["variants"] if same else {}
    records.add(content, steps=[{**step, "variants": {**held, variant: result}}])
    records.save(path, content)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.train_step")
    device = provenance.device()
    parser.add_argument(
        "--backbone", choices=tuple(BATCH), default="base" if device == "cuda" else "tiny"
    )
    parser.add_argument("--variant", choices=VARIANTS, help="default: every one that can run")
    parser.add_argument("--batch", type=int, help="clips")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16" if device == "cuda" else "fp32"
    )
    parser.add_argument("--json", type=Path, help="results file")
    options = parser.parse_args(arguments)
    batch = options.batch or BATCH[options.backbone]
    config = model_config(options.backbone, "auto")
    if device == "cpu":
        print(records.NOT_A_RESULT)
    rates = measure_rates(device)
    step = entry(options.backbone, config, batch, options.precision, rates)
    names = [options.variant] if options.variant else list(VARIANTS)
    if device == "cpu" and not options.variant:
        names = [name for name in names if "graph" not in name]
    status = 0
    for name in names:
        if options.json:  # stands if the process dies
            put(options.json, step, name, "error: the process died while it ran")
        try:
            result: Any = measure(name, config, batch, device, options.precision)
        except Exception as error:
            result = message(error)
            # A reference that fails is a finding; ours that fails is a fault.
            status = status or int("ours" in name)
        if options.json:
            put(options.json, step, name, result)
        print(
            f"ViT {options.backbone}, {batch} clips, {options.precision}, {name}: {_text(result)}"
        )
    return status


def _text(result: Any) -> str:
    if isinstance(result, str):
        return result
    mfu = "" if result["mfu"] is None else f", MFU {100 * result['mfu']:.1f} %"
    lines = [
        f"{result['clips_per_s']:,.1f} clips/s, peak {result['peak_bytes'] / 1e9:,.2f} GB, "
        f"{result['model_flops_per_clip'] / 1e9:,.1f} GFLOP a clip{mfu}"
    ]
    lines += [f"    {name:30} {ms:10.3f} ms" for name, ms in result["parts_ms"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
