"""AP of a CM-Pose by where it starts: ``python -m bench.learning.warm_start``.

A plain ViTPose of the demo's size (16×16 patches, one frame, backbone and head, no auxiliary task)
is trained on the demo's rendered clips and saved under ViTPose's names. CM-Poses of the same size
then begin with its weights exactly (``model.identity_start``), with its weights as they are
otherwise, and from scratch. Each learns on from the rendered people of a part of the training
videos, and from the real people of the PoseTrack18 sample, by the recipe's learning rate from
scratch and by a quarter of it from weights. Every AP is of ground-truth boxes; the rendered ones
are held-out clips, the sample's those that are learnt.

Data that lie in ``--data`` already, and what is trained in ``--work``, are kept. Renews the table
of ``docs/weights.md``.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from bench.report.tables import origin, rendered, table
from cmpose import config as configuration
from cmpose import demo, provenance
from cmpose.config import Config
from cmpose.distributed import World
from cmpose.evaluation.evaluate import evaluate_model
from cmpose.files import whole_file, write_text
from cmpose.models.cmpose import CMPose
from cmpose.train.batches import open_training_clips, training_loader
from cmpose.train.state import TrainingState, new_state
from cmpose.train.train import train
from cmpose.train.trainer import Trainer

PAGE = provenance.PROJECT / "docs" / "weights.md"
SAMPLE = provenance.PROJECT.parent / "shared" / "data"
CPU = World(0, 1, torch.device("cpu"))

VITPOSE = {"num_frames": 1, "fine": "off", "mask_task": False, "denoise_task": False}
"""A CM-Pose with these fields and an identity start is a ViTPose as long as nothing between its
backbone and its head learns."""

TUNING = 0.25
"""Learning rate from weights, as a share of the recipe's."""

STARTS: dict[str, dict[str, bool]] = {
    "ViTPose's weights, `identity_start: true`": {"pretrained": True, "identity_start": True},
    "ViTPose's weights, as before": {"pretrained": True, "identity_start": False},
    "from scratch": {"pretrained": False, "identity_start": False},
}


def recipe(name: str, **fields: object) -> Config:
    """A recipe of ``configs/`` with ViTPose's patches and the ``model`` fields given."""
    config = configuration.load(str(files("cmpose.configs") / f"{name}.yaml"))
    return replace(config, model=replace(config.model, stem="patch", **fields))  # type: ignore[arg-type]


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
    for line in (folder / "run" / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["kind"] == "evaluate":
            aps[entry["step"]] = entry["Mean"]
    return aps


def few_annotations(data: Path, work: Path, videos: int) -> Path:
    """A folder with the annotations of the first training videos."""
    for path in sorted((data / "annotations" / "train").glob("*.json"))[:videos]:
        write_text(work / "few" / path.name, path.read_text())
    return (work / "few").absolute()


def learning(
    data: Path, work: Path, sample: Path, videos: int, epochs: tuple[int, int]
) -> dict[str, Config]:
    """What is learnt on → its recipe, all fields but the start."""
    rendered_people = recipe("demo")
    rendered_people.data.root = str(data)
    rendered_people.data.train_annotations = str(few_annotations(data, work, videos))
    rendered_people.train.epochs, rendered_people.train.evaluate_every = epochs[0], 1
    found = {"rendered people, held out": rendered_people}
    if sample.is_dir():
        real = recipe("posetrack18_sample")
        real.data.root = str(sample)
        real.train.epochs, real.train.evaluate_every = epochs[1], max(1, epochs[1] // 3)
        found["the real sample, learnt"] = real
    return found


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
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning.warm_start", description=__doc__
    )
    parser.add_argument("--work", type=Path, default=Path("build/warm_start"))
    parser.add_argument("--data", type=Path, help="the demo's data; default in --work")
    parser.add_argument("--videos", type=int, default=16, help="to learn on from")
    parser.add_argument("--vitpose-epochs", type=int, default=1, help="over all videos")
    parser.add_argument("--epochs", type=int, nargs=2, default=(1, 15), help="rendered, sample")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(arguments)
    source, data = provenance.provenance(), args.data or args.work / "data"
    demo.render(data)
    plain = recipe("demo", identity_start=True, **VITPOSE)
    plain.data.root, plain.train.epochs = str(data), args.vitpose_epochs
    file, trained = train_vitpose(plain, args.work)
    shared = Path(os.environ.get("CMPOSE_SHARED_DATA", SAMPLE)) / "posetrack18"
    vitpose: dict[str, float] = {}
    aps: dict[str, dict[str, dict[int, float]]] = {}
    for name, config in learning(data, args.work, shared, args.videos, args.epochs).items():
        folder = args.work / name.split()[-1]
        plain.data = config.data
        vitpose[name] = percent(trained.model, plain, folder / "vitpose")
        for number, (start, fields) in enumerate(STARTS.items()):
            pretrained = str(file) if fields["pretrained"] else ""
            identity = fields["identity_start"]
            model = replace(config.model, pretrained=pretrained, identity_start=identity)
            rate = config.train.lr * (TUNING if pretrained else 1)
            begun = replace(config, model=model, train=replace(config.train, lr=rate))
            aps.setdefault(name, {})[start] = learn_on(begun, folder / str(number))
            print(name, start, aps[name][start], flush=True)
    made = origin(
        source,
        f"the ViTPose took {args.vitpose_epochs} epoch(s) of the demo's clips",
        f"the rendered people to learn on are those of {args.videos} of its videos",
        "one seed",
    )
    part = f"{result_table(vitpose, aps)}\n\n{made}."
    print(part)
    write_text(args.page, rendered(args.page.read_text(), {"warm-start": part}))


if __name__ == "__main__":
    main()
