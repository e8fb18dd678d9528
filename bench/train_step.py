"""The training step: ``python -m bench.train_step [--backbone base] [--variant V] [--json FILE]``.

Crops are warped on the device, the model runs in their dtype as ``cmpose train`` runs it, AdamW is
fused. The references' attention is torch's scaled_dot_product_attention, everything else of theirs
is the ops' reference.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bench import provenance, records, timing
from bench.measure import message
from bench.model_flops import step_flops
from bench.roofline import Rates, measure_rates
from bench.train_parts import Recorder, cuda_recorder
from cmpose import ops
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
    config = copy.copy(config)
    config.backend = "reference" if reference else "auto"
    step = Step(config, batch, device, precision, reference=reference, capturable=graph)
    if "compiled" in variant:
        step.loss_of = torch.compile(step._loss, fullgraph=True, dynamic=False)
    return step, captured(step) if graph else step


# -- measuring ------------------------------------------------------------------------------------


def timed(run: Callable[[], None], device: str, samples: int, together: int) -> list[float]:
    """Seconds a step, of groups of steps between synchronisations."""

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    found = []
    for _ in range(samples):
        synchronize()
        start = time.perf_counter()
        for _ in range(together):
            run()
        synchronize()
        found.append((time.perf_counter() - start) / together)
    return found


def parts(step: Step, recorder: Recorder) -> dict[str, float]:
    """Seconds of each part of one eager step; the step's model is not to be used afterwards."""
    model, wrap = step.model, recorder.wrap
    modules: dict[str, nn.Module | None] = {
        "backbone": model.backbone,
        "criss-cross": model.coarse.criss_cross,
        "fusion": model.coarse.fusion,
        "head": model.head,
        "selection, clustering, merge": model.fine,
    }
    for name, part in modules.items():
        if part is not None:
            part.forward = wrap(name, part.forward)
    model.coarse._branches = wrap("corruption", model.coarse._branches)  # type: ignore[method-assign]
    for module in model.coarse.criss_cross.modules():
        if isinstance(module, Attention):
            module.attend = wrap("criss-cross attention", module.attend)
    step.images = wrap("input", step.images)  # type: ignore[method-assign]
    step.losses = wrap("losses", step.losses)  # type: ignore[method-assign]
    optimise = wrap("optimiser", step.update)

    def update() -> None:
        recorder.close()
        optimise()

    step.update = update  # type: ignore[method-assign]
    step()
    found = recorder.seconds()
    inside = found.pop("criss-cross") - found["criss-cross attention"]
    found["other criss-cross"] = max(inside, 0.0) + found.pop("fusion")
    return {name: found[name] for name in PARTS}


def peak_rate(card: str) -> float | None:
    """The card's datasheet rate, for utilisation; None where it is not known here."""
    return next((rate for name, rate in DATASHEET.items() if name in card), None)


def measure(
    variant: str,
    config: ModelConfig,
    batch: int,
    device: str,
    precision: str,
    *,
    samples: int,
    together: int,
) -> dict[str, Any]:
    """One variant, as a results file holds it."""
    step, run = prepare(variant, config, batch, device, precision)
    for _ in range(3 if device == "cuda" else 1):
        run()
    if device == "cuda" and run is step:  # a graph's memory is taken when it is captured
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(run, device, samples, together)
    # On a card weights and optimiser count too, on a CPU only what a step takes beside them.
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else timing.peak_bytes(run, device)
    us = timing.quantiles(seconds)
    flops, median = step_flops(config), us["p50"] * 1e-6
    loss = float(step.loss)
    split: dict[str, float] = {}
    if run is step and "compiled" not in variant:
        make = cuda_recorder if device == "cuda" else lambda: Recorder(time.perf_counter, _minus)
        split = {name: round(s * 1e3, 4) for name, s in parts(step, make()).items()}
    rate = peak_rate(provenance.machine()) if device == "cuda" and precision == "bf16" else None
    return {
        "clips_per_s": round(batch / median, 3),
        "ms": {name: round(value / 1e3, 4) for name, value in us.items()},
        "peak_bytes": peak,
        "model_flops_per_clip": flops,
        "mfu": None if rate is None else round(flops * batch / median / rate, 4),
        "loss": loss if loss > 0 else None,
        "parts_ms": split,
    }


def _minus(start: float, stop: float) -> float:
    return stop - start


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
        "note": None if origin["gpu"] else provenance.NOT_A_RESULT,
        "provenance": origin,
    }


def put(path: Path, step: dict[str, Any], variant: str, found: Any) -> None:
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
    records.add(content, steps=[{**step, "variants": {**held, variant: found}}])
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
        print(provenance.NOT_A_RESULT)
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
            found: Any = measure(
                name,
                config,
                batch,
                device,
                options.precision,
                samples=10 if device == "cuda" else 2,
                together=5 if device == "cuda" else 1,
            )
        except Exception as error:
            found = message(error)
            # A reference that fails is a finding; ours that fails is a fault.
            status = status or int("ours" in name)
        if options.json:
            put(options.json, step, name, found)
        print(f"ViT {options.backbone}, {batch} clips, {options.precision}, {name}: {_text(found)}")
    return status


def _text(found: Any) -> str:
    if isinstance(found, str):
        return found
    mfu = "" if found["mfu"] is None else f", MFU {100 * found['mfu']:.1f} %"
    lines = [
        f"{found['clips_per_s']:,.1f} clips/s, peak {found['peak_bytes'] / 1e9:,.2f} GB, "
        f"{found['model_flops_per_clip'] / 1e9:,.1f} GFLOP a clip{mfu}"
    ]
    lines += [f"    {name:30} {ms:10.3f} ms" for name, ms in found["parts_ms"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
