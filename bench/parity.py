"""Whether speed settings change what is learnt: ``python -m bench.parity``, minutes on two cores.

Every seed is trained by the plain recipe (``train.speed=eager``, the ops' reference) and by the
fast ones: ``compile``, and on a card ``graph`` too, with the kernels that ``auto`` takes. Seeds
decide weights, order, augmentation and corruption; docs/parity.md says what passes.

``--of products`` compares ``train.products`` in place of speeds: fp8, and float16 products summed
in float16, each on a card that has it, else its emulation; and float16 with sums in float32, whose
loss scaling skips steps too.

Writes ``<machine>.json`` and ``<machine>.svg`` (``<machine>-products``) into ``--output`` and the
page beside that folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.harness.records import slug
from bench.report.tables import origin, rendered, table
from cmpose import config as configuration
from cmpose import provenance
from cmpose.config import Config, TrainConfig
from cmpose.data.clips import open_clips
from cmpose.distributed import World
from cmpose.evaluation.intervals import Interval, paired
from cmpose.files import write_json, write_text
from cmpose.render.dataset import render_dataset
from cmpose.report.log import LOG, read_log
from cmpose.study.plots import new_figure, save_svg
from cmpose.train.float16_sums import Float16Sums
from cmpose.train.products import check_products
from cmpose.train.train import train

PLAIN = "eager, reference ops"
WINDOW = 10
"""Steps that a curve's running mean goes over: single batches differ from each other by more."""

Curves = dict[str, dict[int, list[float]]]
"""Variant → seed → loss of every step."""

VIDEOS, VAL_VIDEOS, FRAMES = 48, 24, 4


def variants(device: str, of: str = "speed") -> dict[str, dict[str, str]]:
    """Name → fields, the plain one first."""
    plain = {"train.speed": "eager", "model.backend": "reference"}
    fields = {PLAIN: plain}
    if of == "products":
        return fields | products(plain, World(0, 1, torch.device(device)))
    fields["compile"] = {"train.speed": "compile", "model.backend": "auto"}
    if device == "cuda":
        fields["graph, kernels"] = {"train.speed": "graph", "model.backend": "auto"}
    return fields


def products(plain: dict[str, str], world: World) -> dict[str, dict[str, str]]:
    """Name → fields of the cheaper products, emulated where this device does not take them."""
    fields: dict[str, dict[str, str]] = {}
    real = (
        TrainConfig(products="fp8", precision="bf16"),
        TrainConfig(products="fp16_accumulate", precision="fp16"),
    )
    fields["fp16, sums in float32"] = plain | {"train.precision": "fp16"}
    for kind in real:
        name, own = f"{kind.products}, emulated", f"{kind.products}_emulated"
        with suppress(ValueError):
            check_products(kind, world)
            name = own = kind.products
        fields[name] = plain | {"train.products": own}
        if kind.precision == "fp16" or own == kind.products:
            fields[name]["train.precision"] = kind.precision
    return fields


def float16_products(config: Config) -> AbstractContextManager[object]:
    """Within it a CPU computes plain float16 products as a card does; its own take far longer."""
    train = config.train
    plain = train.precision == "fp16" and train.products == "plain"
    return Float16Sums(step=None) if plain and train.device == "cpu" else nullcontext()


def recipe(data: Path, device: str, steps: int, **fields: str | int) -> Config:
    """The ablations' small model on small crops, with a variant's fields."""
    config = configuration.load(
        str(files("cmpose.configs") / "ablate_cpu.yaml"),
        **{
            "data.root": str(data), "model.image_size": [96, 80], "model.depth": 1,
            "model.head_channels": 32, "model.num_clusters": 6, "train.log_every": 1,
            "train.device": device, "train.precision": "bf16" if device == "cuda" else "fp32",
            **fields,
        },
    )  # fmt: skip
    per_epoch = len(open_clips(config, train=True, quiet=True)) // config.train.batch_size
    config.train.epochs = max(1, round(steps / per_epoch))
    return config


def smooth(curve: list[float]) -> np.ndarray:
    """Running mean over ``WINDOW`` steps."""
    window = min(WINDOW, len(curve))
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def distance(a: list[float], b: list[float]) -> float:
    """Mean absolute difference of two smoothed curves."""
    return float(np.abs(smooth(a) - smooth(b)).mean())


def final(curve: list[float]) -> float:
    """Mean loss over the last quarter."""
    return float(np.mean(curve[-max(1, len(curve) // 4) :]))


def compare(curves: Curves) -> dict[str, dict[str, Any]]:
    """Every fast variant against the plain one, of at least two seeds.

    Returns:
        Variant → ``speed_distance`` (mean over seeds, same seed), ``seed_distance`` (mean over
        pairs of seeds, plain recipe), ``ratio``, ``final_difference`` [mean, half a 95 %
        interval] of final losses seed by seed, ``passed``.
    """
    plain = curves[PLAIN]
    noise = float(np.mean([distance(a, b) for a, b in itertools.combinations(plain.values(), 2)]))
    finals = {n: {seed: final(curve) for seed, curve in of.items()} for n, of in curves.items()}
    comparison = {}
    for name in [name for name in curves if name != PLAIN]:
        own = float(np.mean([distance(curves[name][seed], plain[seed]) for seed in plain]))
        difference = paired(finals[name], finals[PLAIN])
        assert difference is not None
        comparison[name] = {
            "speed_distance": own,
            "seed_distance": noise,
            "ratio": own / noise,
            "final_difference": [difference.mean, difference.half],
            "passed": own < noise and bool(difference.covers_zero),
        }
    return comparison


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Smoothed loss curves: a line the mean, a band from the lowest to the highest seed."""
    figure, axes = new_figure(7.5, 4.0)
    styles = (("#222222", "-"), ("#b3402e", "--"), ("#3b6fb6", ":"), ("#4f8a4c", "-."))
    for (name, runs), (color, line) in zip(content["curves"].items(), styles, strict=False):
        smoothed = np.stack([smooth(curve) for curve in runs.values()])
        steps = np.arange(smoothed.shape[1]) + WINDOW
        axes.fill_between(steps, smoothed.min(0), smoothed.max(0), color=color, alpha=0.15)
        axes.plot(steps, smoothed.mean(0), color=color, linestyle=line, label=name)
    title = f"{content['machine']}: mean and range of {len(content['curves'][PLAIN])} seeds"
    axes.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps", title=title)
    axes.legend()
    save_svg(figure, path)


HEAD = ("against eager with the reference ops", "curves of the same seed differ by",
        "of two seeds by", "ratio", "final loss, difference", "held-out AP, difference",
        "within noise")  # fmt: skip


def section(content: Mapping[str, Any], picture: str) -> str:
    """A machine's part of the page."""
    plain = content["curves"][PLAIN]
    steps = len(next(iter(plain.values())))
    where = origin(
        content["provenance"],
        f"{content['threads']} thread(s)",
        f"{len(plain)} seeds",
        f"{steps} steps of {content['batch_size']} clips each",
        f"{content['precision']}; {content['seconds'] / 60:.1f} minutes.",
    )
    aps, rows = content["ap"], []
    for name, compared in content["comparison"].items():
        ap = paired(aps[name], aps[PLAIN])
        assert ap is not None
        distances = (f"{compared[name]:.4f}" for name in ("speed_distance", "seed_distance"))
        mean, half = compared["final_difference"]
        loss = Interval(mean, half, len(plain)).text(sign=True, digits=4)
        verdict = ap.text(sign=True, digits=2), "yes" if compared["passed"] else "no"
        rows.append((name, *distances, f"{compared['ratio']:.3f}", loss, *verdict))
    finals, ap_plain = [final(curve) for curve in plain.values()], aps[PLAIN].values()
    ranges = (
        f"The plain recipe's final losses lie between {min(finals):.3f} and {max(finals):.3f} over "
        f"the seeds, its held-out AP between {min(ap_plain):.1f} and {max(ap_plain):.1f} "
        "(ground-truth boxes)."
    )
    of = ", train.products" if content.get("of") == "products" else ""
    heading, shown = f"## {content['machine']}{of}", f"![Loss curves]({picture})"
    return "\n\n".join([heading, where, table(HEAD, rows), ranges, shown])


def write_page(folder: Path) -> Path:
    """Renews the part of the page beside ``folder`` that has its machines."""
    paths = sorted(folder.glob("*.json"))
    contents = [json.loads(path.read_text()) for path in paths]
    pictures = [f"{folder.name}/{path.stem}.svg" for path in paths]
    parts = list(map(section, contents, pictures))
    if not any(content["provenance"]["gpu"] for content in contents):
        parts.insert(0, "On a GPU, with CUDA graphs and kernels: not yet measured.")
    page = folder.with_suffix(".md")
    write_text(page, rendered(page.read_text(), {"parity": "\n\n".join(parts)}))
    return page


def measure(
    work: Path, seeds: int, steps: int, device: str, of: str
) -> tuple[Curves, dict, Config]:
    """Trains every variant with every seed: loss curves, held-out AP, the plain recipe."""
    for split, videos in (("train", VIDEOS), ("val", VAL_VIDEOS)):
        render_dataset(
            work / "data", videos=videos, frames=FRAMES, seed=7, split=split, max_people=2,
            fps=6.25, workers=2, progress=False,
        )  # fmt: skip
    curves: Curves = {}
    ap: dict[str, dict[int, float]] = {}
    for name, fields in variants(device, of).items():
        for seed in range(seeds):
            settings: dict[str, str | int] = {**fields, "train.seed": seed}
            config = recipe(work / "data", device, steps, **settings)
            torch.compiler.reset()  # models of the last runs are nothing to this one
            folder = work / "runs" / f"{slug(name)}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            with float16_products(config):
                metrics = train(config, folder, progress=False)
            losses = [line["loss"] for line in read_log(folder / LOG) if line["kind"] == "train"]
            curves.setdefault(name, {})[seed] = losses
            ap.setdefault(name, {})[seed] = metrics["ap"]["columns"]["Mean"]
            print(f"{name}, seed {seed}: final loss {final(losses):.4f}", flush=True)
    return curves, ap, recipe(work / "data", device, steps, **variants(device, of)[PLAIN])


def main(arguments: list[str] | None = None) -> int:
    """Trains, compares, writes; exit status 1 if a variant is not within noise."""
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--of", choices=("speed", "products"), default="speed")
    parser.add_argument("--steps", type=int, default=140, help="about; whole epochs are run")
    parser.add_argument("--work", type=Path, default=Path("build/parity"))
    parser.add_argument("--output", type=Path, default=provenance.PROJECT / "docs" / "parity")
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error(f"--seeds {args.seeds}: one seed shows no run-to-run noise; give at least 2")
    source, started = provenance.provenance(), time.perf_counter()
    curves, ap, config = measure(args.work, args.seeds, args.steps, provenance.device(), args.of)
    content: dict[str, Any] = {
        "machine": provenance.machine(), "of": args.of, "threads": torch.get_num_threads(),
        "batch_size": config.train.batch_size, "precision": config.train.precision,
        "seconds": time.perf_counter() - started, "comparison": compare(curves), "ap": ap,
        "curves": curves, "provenance": source,
    }  # fmt: skip
    name = slug(provenance.machine()) + ("-products" if args.of == "products" else "")
    path = args.output / f"{name}.json"
    write_json(path, content)
    draw(content, path.with_suffix(".svg"))
    print(f"written: {path}, its picture, {write_page(args.output)}")
    return int(not all(compared["passed"] for compared in content["comparison"].values()))


if __name__ == "__main__":
    sys.exit(main())
