"""``cmpose ablate``: the paper's ablations on a data set, seed by seed, run by run.

Below the output folder lie ``settings.json`` (the recipe and the data that all runs share),
``data/`` (a preset's rendered people), ``mean_pose.json`` (the baseline), ``train/<run>/`` (what a
run leaves behind, without its weights once it is evaluated), ``runs/<run>.json`` (its result,
written last), ``pieces.jsonl`` (the command and the time of each call) and ``report/``.
"""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmpose import config as configuration
from cmpose import provenance
from cmpose.config import Config
from cmpose.data.formats.reader import read
from cmpose.evaluation.evaluate import score_mean_pose
from cmpose.files import claim, write_json, writing
from cmpose.models.weights import checkpoint
from cmpose.render.dataset import render_dataset
from cmpose.study.grid import Part, Study, chosen_parts
from cmpose.study.pool import GRACE, RunPool, cores
from cmpose.study.presets import PRESETS, Preset, RenderedData, preset_recipe
from cmpose.study.report import CALLS, MEAN_POSE, write_report
from cmpose.study.runs import finished_results, learnt_fields, training_folder

_CHUNK = 64
"""Sequences that are rendered between two looks at the clock."""


@dataclass(frozen=True)
class AblationOptions:
    """What a call changes of its preset; what is empty, 0 or None is the preset's.

    Attributes:
        parts: of ``table4``, ``table5``, ``figure3``; all without.
        ratios: of Figure 3.
        seeds: how many.
        jobs: runs at a time, each in a process of its own with its share of the cores.
        limit_minutes: ends within this time, runs under way saved; 0 is no limit.
        report: folder of the report; empty is ``report`` in the study's.
    """

    parts: tuple[Part, ...] = ()
    ratios: tuple[float, ...] = ()
    seeds: int = 0
    jobs: int = 0
    limit_minutes: float | None = None
    report: str | Path = ""


def ablate(
    output: str | Path,
    preset: str = "cpu",
    recipe: Config | None = None,
    *,
    own_data: bool = False,
    options: AblationOptions | None = None,
    progress: bool = True,
) -> bool:
    """Trains and evaluates the runs that are not finished yet, and writes a report of all.

    Args:
        output: the study's folder.
        preset: of ``PRESETS``; gives what the other arguments leave out.
        recipe: the full model's; None takes the preset's.
        own_data: the recipe's ``data`` names a data set; otherwise the preset's is rendered.
        options: what else differs from the preset.
        progress: shows a bar.

    Returns:
        Whether every run is finished.

    Raises:
        ValueError: an argument or recipe that cannot work; other settings than ``output``'s.
        InUse: another process works in ``output``.
        OutputError: when something cannot be written.
        RuntimeError: a run failed.
        Interrupted: on SIGINT or SIGTERM, when the runs under way have been saved.
    """
    started = time.perf_counter()
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: there are {', '.join(PRESETS)}")
    chosen, folder, options = PRESETS[preset], Path(output), options or AblationOptions()
    data = None if own_data else chosen.data
    study = Study(
        _full_recipe(preset, recipe, folder, data),
        chosen_parts(options.parts),
        options.ratios or chosen.ratios,
        options.seeds or chosen.seeds,
    )
    jobs, limit = _jobs_and_limit(options, chosen)
    stop_at = started + 60 * limit - GRACE if limit else float("inf")
    with claim(folder, "ablate", "folder", ("runs",)):
        check_settings(folder, study.recipe, data)
        for result in finished_results(study, folder):
            # A process that was killed behind its result has left them.
            checkpoint.discard(training_folder(folder, result["name"], result["seed"]))
        pool = RunPool(study, folder, jobs, progress)
        try:
            done = data is None or render(folder / "data", data, stop_at, progress)
            if done:
                baseline(study.recipe, folder)
                done = pool.work(stop_at)
        finally:
            _note_call(folder, time.perf_counter() - started)
        finished = finished_results(study, folder)
        if finished:
            page = write_report(study, folder, Path(options.report or folder / "report"), finished)
            print(f"report: {page}")
        if not done:
            count = f"{len(finished)} of {len(study.runs())}"
            print(f"{count} runs are finished: the same command goes on")
        return done


def _full_recipe(
    preset: str, recipe: Config | None, folder: Path, data: RenderedData | None
) -> Config:
    """The full model's recipe, which all runs depart from."""
    full = copy.deepcopy(recipe) if recipe is not None else preset_recipe(preset)
    if data is not None:
        if full.data.root != ".":
            raise ValueError(
                f"data.root={full.data.root}: preset {preset} renders its own data; for another "
                "data set give a recipe of your own with --config"
            )
        full.data.root = str(folder / "data")
    full.train.evaluate_every, full.train.keep_checkpoints = 0, 1
    return full


def _jobs_and_limit(options: AblationOptions, preset: Preset) -> tuple[int, float]:
    jobs = options.jobs or preset.jobs
    limit = preset.limit_minutes if options.limit_minutes is None else options.limit_minutes
    if jobs < 1 or limit < 0 or 0 < 60 * limit <= 2 * GRACE:
        raise ValueError(
            f"jobs={jobs}, limit_minutes={limit}: jobs must be at least 1, and a limit more than "
            f"{2 * GRACE / 60:.1f} minutes, or 0 for none"
        )
    return jobs, limit


def check_settings(folder: Path, recipe: Config, data: RenderedData | None) -> None:
    """Holds a study's folder to one recipe and data set.

    Raises:
        ValueError: its runs were made with others.
    """
    settings: dict[str, Any] = learnt_fields(recipe)
    for name, value in configuration.flatten(asdict(data) if data else {}).items():
        settings[f"rendered.{name}"] = value
    path = folder / "settings.json"
    if not path.exists():
        write_json(path, settings)
        return
    changed = configuration.differences(
        read(path, dict[str, Any], ValueError, "give another folder"), settings
    )
    if changed:
        raise ValueError(
            f"{path}: the runs in {folder} were made with other settings "
            f"({configuration.in_words(changed)}): give the same ones, or another folder"
        )


def _note_call(folder: Path, seconds: float) -> None:
    line = {"seconds": round(seconds, 1), "command": provenance.command_line()}
    with writing(folder / CALLS), (folder / CALLS).open("a") as calls:
        calls.write(json.dumps(line) + "\n")


def render(root: Path, data: RenderedData, stop_at: float, progress: bool = True) -> bool:
    """Renders what is missing of a preset's data until ``stop_at``; whether all of it is there."""
    for split, videos in (("train", data.train_videos), ("val", data.val_videos)):
        chunk = videos if stop_at == float("inf") else _CHUNK
        for first in range(0, videos, chunk):
            if time.perf_counter() > stop_at:
                return False
            render_dataset(
                root,
                videos=min(chunk, videos - first),
                first_video=first,
                frames=data.frames,
                seed=data.seed,
                split=split,
                max_people=data.max_people,
                fps=data.fps,
                difficulty=data.difficulty,
                workers=cores(),
                progress=progress,
            )
    return True


def baseline(recipe: Config, folder: Path) -> None:
    """Scores the mean pose, once, into ``mean_pose.json``.

    Raises:
        ValueError: the evaluation data have no official AP.
    """
    path = folder / MEAN_POSE
    if path.exists():
        return
    _, subsets = score_mean_pose(recipe, folder / "mean_pose")
    if not subsets:
        raise ValueError(
            f"data.val_annotations={recipe.data.val_annotations!r}: nobody has a head box, or "
            "the keypoints are not PoseTrack's, so there is no official AP to compare settings "
            "by: give annotations with bbox_head"
        )
    write_json(path, subsets)
