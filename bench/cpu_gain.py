"""What the ops' path for a CPU gains: ``python -m bench.cpu_gain [--pairs N] [--save]``.

Training steps of two recipes, and the model of a prediction, by ``auto`` and by ``reference``: the
same object, one after the other in pairs, so that what else the machine does weighs on both. On a
CPU ``auto`` takes the ops' CPU path. ``--save`` renews ``bench/results/cpu/gain.json``, from which
``make performance-docs`` makes its table.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from importlib.resources import files

import torch

from bench.harness import records
from bench.harness.shapes import THREADS
from bench.harness.timing import Call, Clock
from bench.report.tables import cpu_gain
from bench.train_step import Step, model_config
from cmpose import config as configuration
from cmpose import ops, provenance
from cmpose.config import Config, ModelConfig, TrainConfig
from cmpose.models.cmpose import CMPose

RECORD = records.RESULTS / "cpu" / "gain.json"
BACKENDS = ("auto", "reference")


def training_step(recipe: str = "") -> Call:
    """A step of ``cmpose train`` on a drawn batch, in float32; of ViT-S and 2 clips unless told."""
    read = Config(model=model_config("small"), train=TrainConfig(batch_size=2))
    if recipe:
        read = configuration.load(str(files("cmpose.configs") / f"{recipe}.yaml"))
    train = TrainConfig(batch_size=read.train.batch_size, precision="fp32")
    return Step("ours", Config(model=read.model, train=train), "cpu")


def prediction() -> Call:
    """ViT-B on a person's clip."""
    torch.manual_seed(0)
    config = ModelConfig()
    model = CMPose(config).eval()
    images = torch.randn(1, config.num_frames, 3, *config.image_size)
    return torch.inference_mode()(lambda: model(images))


CASES: dict[str, Callable[[], Call]] = {
    "training step, `configs/demo.yaml`": lambda: training_step("demo"),
    "training step, `configs/posetrack18_sample.yaml`": lambda: training_step("posetrack18_sample"),
    "training step of ViT-S, 256×192, 2 clips": training_step,
    "prediction of a person by ViT-B, 256×192": prediction,
}


def measure(call: Call, pairs: int) -> dict[str, float]:
    """Median milliseconds on each backend, and the median of the pairs' ratios."""
    ms: dict[str, list[float]] = {name: [] for name in BACKENDS}
    for n in range(pairs + 1):
        for name in BACKENDS[:: 1 if n % 2 else -1]:
            with ops.backend(name):
                ms[name].append(1e3 * Clock().wall(call))
    timed = {name: values[1:] for name, values in ms.items()}  # the first pair warms up
    ratios = [b / a for a, b in zip(*timed.values(), strict=True)]
    return {n: statistics.median(v) for n, v in timed.items()} | {"gain": statistics.median(ratios)}


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_gain")
    parser.add_argument("--pairs", type=int, default=7, help="of calls")
    parser.add_argument("--save", action="store_true", help=f"renew {RECORD.name}")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a card
    rows = []
    for name, make in CASES.items():
        call = make()
        for threads in THREADS:
            torch.set_num_threads(threads)
            rows.append({"case": name, "threads": threads} | measure(call, options.pairs))
            print(rows[-1], flush=True)
    record = {"provenance": provenance.provenance(), "pairs": options.pairs, "rows": rows}
    if options.save:
        records.save(RECORD, record, records.Gain)
    print(f"\n{cpu_gain(record)}")


if __name__ == "__main__":
    main()
