"""The runs of a study: what each trains, what it leaves behind, and which are finished."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct

from cmpose import config as configuration
from cmpose import provenance
from cmpose.config import Config
from cmpose.data.formats.reader import Count, Number, Whole, convert, parse_file
from cmpose.files import write_json
from cmpose.models.weights import checkpoint
from cmpose.study.grid import Setting, Study, run_name
from cmpose.train.state import FREE_FIELDS
from cmpose.train.train import train


def result_file(folder: Path, name: str, seed: int) -> Path:
    """What a run writes last: a run that has it is finished."""
    return folder / "runs" / f"{run_name(name, seed)}.json"


def training_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a run trains."""
    return folder / "train" / run_name(name, seed)


def run_config(recipe: Config, setting: Setting, seed: int) -> Config:
    """The recipe with a setting's fields and a seed."""
    config = copy.deepcopy(recipe)
    for dotted, value in setting.items():
        section, name = dotted.split(".")
        setattr(config, section, replace(getattr(config, section), **{name: value}))
    config.train.seed = seed
    return config


def learnt_fields(recipe: Config) -> dict[str, Any]:
    """The recipe's fields, by dotted name, that change what is learnt."""
    fields = configuration.flatten(configuration.to_dict(recipe))
    return {name: value for name, value in fields.items() if name not in FREE_FIELDS}


def run_one(config: Config, folder: Path, name: str, seed: int, threads: int) -> dict[str, Any]:
    """Trains a run from its last checkpoint, evaluates it, and writes its result.

    Its weights are deleted then.

    Args:
        config: its recipe.
        folder: the study's.
        name: of its setting.
        seed: its number.
        threads: how many torch may use.

    Returns:
        What the result file holds.

    Raises:
        Interrupted, OutputError, ...: as :func:`cmpose.train.train.train`.
    """
    torch.set_num_threads(threads)
    trained = training_folder(folder, name, seed)
    metrics = train(config, trained, resume=trained.exists(), progress=False)
    result = {
        "name": name,
        "seed": seed,
        "recipe": learnt_fields(config),
        "subsets": metrics["subsets"],
        "ap": metrics["ap"],
        "box_source": metrics["box_source"],
        "clips": metrics["clips"],
        "causal_hit_rate": metrics["causal_hit_rate"],
        "steps": metrics["steps"],
        "training_seconds": metrics["seconds"],
        "evaluation_seconds": metrics["evaluation_seconds"],
        "threads": threads,
        "provenance": provenance.provenance(command=""),
    }
    write_json(result_file(folder, name, seed), result, "run the same command again")
    checkpoint.discard(trained)
    return result


_REMEDY = "delete it and run again"


class Origin(Struct):
    """``provenance`` of a result, as far as the report names it."""

    commit: str
    dirty: bool
    torch: str
    python: str
    utc: str
    gpu: str | None = None
    cpu: str | None = None


class SubsetResult(Struct):
    """A subset's AP and PCKh in percent and its error in head sizes; null where there is none."""

    ap: Number | None
    pckh: Number | None
    error: Number | None
    frames: Count
    joints: Count


class RunResult(Struct):
    """A result file, as far as the report reads it."""

    name: str
    seed: Whole
    recipe: dict[str, Any]
    subsets: dict[str, SubsetResult]
    box_source: str
    clips: Count
    steps: Count
    training_seconds: Number
    evaluation_seconds: Number
    threads: Count
    provenance: Origin


def finished_results(study: Study, folder: Path) -> list[dict[str, Any]]:
    """The finished runs' results, in the study's order.

    Raises:
        ValueError: a result that is damaged, or of other settings than the study's.
    """
    settings = study.settings()
    results = []
    for name, seed in study.runs():
        path = result_file(folder, name, seed)
        if not path.exists():
            continue
        result = parse_file(path, ValueError, _REMEDY)
        checked = convert(result, RunResult, str(path), ValueError, remedy=_REMEDY)
        if (checked.name, checked.seed) != (name, seed):
            raise ValueError(
                f"{path}: holds the run {run_name(checked.name, checked.seed)!r:.80}; {_REMEDY}"
            )
        config = run_config(study.recipe, settings[name], seed)
        changed = configuration.differences(checked.recipe, learnt_fields(config))
        if changed:
            raise ValueError(
                f"{path} is of other settings ({configuration.in_words(changed)}): "
                "delete it and run again"
            )
        results.append(result)
    return results
