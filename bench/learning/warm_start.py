"""AP of a CM-Pose by where it starts: ``python -m bench.learning.warm_start``.

A plain ViTPose of the demo's size (16×16 patches, one frame, backbone and head, no auxiliary task)
is trained on the demo's rendered clips. CM-Poses of the same size learn on from its weights, and
from scratch: from the rendered people of a part of the training videos, and from the real people of
the PoseTrack18 sample. Every AP is of ground-truth boxes; the rendered ones are held-out clips, the
sample's those that are learnt.

What lies in ``--work`` already is kept. Renews the table of ``docs/weights.md``.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from bench.report.tables import origin, rendered, table
from cmpose import config as configuration
from cmpose import demo, provenance
from cmpose.config import Config
from cmpose.distributed import World
from cmpose.evaluation.evaluate import evaluate_model
from cmpose.files import whole_file, write_text
from cmpose.models.cmpose import CMPose
from cmpose.report.log import LOG, read_log
from cmpose.train.batches import open_training_clips, training_loader
from cmpose.train.state import TrainingState, new_state
from cmpose.train.train import train
from cmpose.train.trainer import Trainer

PAGE = provenance.PROJECT / "docs" / "weights.md"
SAMPLE = provenance.PROJECT.parent / "shared" / "data"
CPU = World(0, 1, torch.device("cpu"))

VITPOSE = {"model.identity_start": True, "model.num_frames": 1, "model.fine": "off",
           "model.mask_task": False, "model.denoise_task": False}  # fmt: skip
"""A CM-Pose with these fields is a ViTPose as long as nothing between its backbone and its head
learns."""

TUNING = 0.25
"""Learning rate from weights, as a share of the recipe's."""

VITPOSE_EPOCHS, VIDEOS = 1, 16
"""Of the demo's videos: how often the ViTPose sees all, and how many are there to learn on from."""

STARTS = {
    "ViTPose's weights, `identity_start: true`": (True, True),
    "ViTPose's weights, as before": (True, False),
    "from scratch": (False, False),
}
"""Name → whether it has the ViTPose's weights, and whether it begins as the ViTPose exactly."""


def recipe(name: str, data: Path, **fields: Any) -> Config:
    """A recipe of ``configs/`` with ViTPose's patches, its data, and other dotted ``fields``."""
    settings = {"data.root": str(data), "model.stem": "patch", **fields}
    return configuration.load(str(files("cmpose.configs") / f"{name}.yaml"), **settings)


def percent(model: CMPose, config: Config, folder: Path) -> float:
    """The AP of a model on its recipe's evaluation clips."""
    metrics = evaluate_model(model.eval(), config, folder, CPU, progress=False)
    return float(metrics["ap"]["columns"]["Mean"])


def train_vitpose(config: Config, work: Path) -> tuple[Path, TrainingState]:
    """Trains backbone and head alone; their file, under ViTPose's names, and the model's state.

    A file that is there is kept.
    """
    file = work / "vitpose.pth"
    clips, config = open_training_clips(config, CPU)
    if file.exists():
        model = replace(config.model, pretrained=str(file))
        return file, new_state(replace(config, model=model), clips, CPU)
    state = new_state(config, clips, CPU)
    for parameter in state.model.coarse.parameters():
        parameter.requires_grad_(False)
    state.losses.train()
    trainer = Trainer(state)
    for batch in training_loader(clips, config, CPU, 0):
        trainer.step(batch)
        if state.step % 100 == 0:
            print(f"ViTPose, step {state.step} of {trainer.total_steps}", flush=True)
    weights = {
        name.replace("head.", "keypoint_head.", 1): tensor
        for name, tensor in state.model.state_dict().items()
        if name.startswith(("backbone.", "head."))
    }
    with whole_file(file) as partial:
        torch.save({"state_dict": weights}, partial)
    return file, state


def learn_on(config: Config, folder: Path) -> dict[int, float]:
    """Steps of the recipe → AP, from before the first one to the last."""
    clips, whole = open_training_clips(config, CPU)
    aps = {0: percent(new_state(whole, clips, CPU).model, whole, folder / "start")}
    train(config, folder / "run", resume=(folder / "run").exists(), progress=False)
    log = read_log(folder / "run" / LOG)
    return aps | {line["step"]: line["Mean"] for line in log if line["kind"] == "evaluate"}


def learning(data: Path, work: Path) -> dict[str, Config]:
    """What is learnt on → its recipe, all fields but the start."""
    few = (work / "few").absolute()  # of the training videos' annotations
    for path in sorted((data / "annotations" / "train").glob("*.json"))[:VIDEOS]:
        write_text(few / path.name, path.read_text())
    drawn = {"data.train_annotations": str(few), "train.epochs": 1, "train.evaluate_every": 1}
    recipes = {"rendered people, held out": recipe("demo", data, **drawn)}
    sample = Path(os.environ.get("CMPOSE_SHARED_DATA", SAMPLE)) / "posetrack18"
    if sample.is_dir():
        real = {"train.epochs": 15, "train.evaluate_every": 5}
        recipes["the real sample, learnt"] = recipe("posetrack18_sample", sample, **real)
    return recipes


def result_table(vitpose: dict[str, float], aps: dict[str, dict[str, dict[int, float]]]) -> str:
    """A table for each data set: AP by start and number of steps.

    Args:
        vitpose: data set → AP of the ViTPose that all began with.
        aps: data set → start → steps → AP.
    """
    parts = []
    for name, starts in aps.items():
        steps = list(next(iter(starts.values())))
        head = [f"AP on {name}", *(f"after {n} steps" if n else "before training" for n in steps)]
        rows = [[start, *(f"{of[n]:.1f}" for n in steps)] for start, of in starts.items()]
        rows.append(["ViTPose itself", f"{vitpose[name]:.1f}", *[""] * (len(steps) - 1)])
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Trains, evaluates, and writes the tables."""
    parser = argparse.ArgumentParser("python -m bench.learning.warm_start", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/warm_start"))
    args = parser.parse_args(arguments)
    source, data = provenance.provenance(), args.work / "data"
    demo.render(data)
    plain = recipe("demo", data, **VITPOSE, **{"train.epochs": VITPOSE_EPOCHS})
    file, trained = train_vitpose(plain, args.work)
    vitpose: dict[str, float] = {}
    aps: dict[str, dict[str, dict[int, float]]] = {}
    for name, config in learning(data, args.work).items():
        folder = args.work / name.split()[-1]
        vitpose[name] = percent(trained.model, replace(plain, data=config.data), folder / "vitpose")
        for number, (start, (pretrained, exactly)) in enumerate(STARTS.items()):
            weights = str(file) if pretrained else ""
            model = replace(config.model, pretrained=weights, identity_start=exactly)
            rate = config.train.lr * (TUNING if pretrained else 1)
            begun = replace(config, model=model, train=replace(config.train, lr=rate))
            aps.setdefault(name, {})[start] = learn_on(begun, folder / str(number))
            print(name, start, aps[name][start], flush=True)
    footnote = origin(
        source,
        f"the ViTPose took {VITPOSE_EPOCHS} epoch(s) of the demo's clips",
        f"the rendered people to learn on are those of {VIDEOS} of its videos",
        "one seed",
    )
    part = f"{result_table(vitpose, aps)}\n\n{footnote}."
    print(part)
    write_text(PAGE, rendered(PAGE.read_text(), {"warm-start": part}))


if __name__ == "__main__":
    main()
