"""``cmpose ablate``: the paper's ablations on a data set, seed by seed, run by run.

Below the output folder: ``settings.json`` (the recipe and the data that all runs share), ``data/``
(a preset's rendered people), ``train/<run>/`` (what a run leaves behind, without its weights once
it is evaluated), ``runs/<run>.json`` (written last, whole or not at all: a run that has one is
finished), ``pieces.jsonl`` (how long each call took) and ``report/``.
"""

from __future__ import annotations

import contextlib
import copy
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cmpose import config as configuration
from cmpose import provenance
from cmpose.config import Config
from cmpose.evaluation.evaluate import score_mean_pose
from cmpose.files import alone_in, finite_or_none, write_text
from cmpose.render.dataset import render_dataset
from cmpose.render.settings import Difficulty
from cmpose.study.grid import Part, Setting, Study, chosen_parts, run_name
from cmpose.study.report import write_report
from cmpose.train.train import FREE_FIELDS, Interrupted, train

GRACE = 40.0
"""Seconds before the limit at which runs are told to stop: to finish a step and save."""

_CHUNK = 64  # sequences rendered between two looks at the clock


@dataclass(frozen=True)
class RenderedData:
    """The rendered people of a preset; the fields are ``render_dataset``'s."""

    train_videos: int
    val_videos: int
    frames: int
    fps: float
    max_people: int
    difficulty: Difficulty
    seed: int = 2026


@dataclass(frozen=True)
class Preset:
    """Recipe file in ``configs/``, data, and how the runs are laid out; 0 minutes is no limit."""

    recipe: str
    data: RenderedData
    seeds: int
    ratios: tuple[float, ...]
    jobs: int
    limit_minutes: float


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        recipe="ablate_cpu.yaml",
        data=RenderedData(
            train_videos=150,
            val_videos=72,
            frames=4,
            fps=6.25,
            max_people=2,
            difficulty=Difficulty(
                occluders=0.3,
                defocus=0.4,
                background_defocus=0.1,
                crossing=0.2,
                closeup=0.0,
                motion_blur=0.0,
            ),
        ),
        seeds=3,
        ratios=(0.15, 0.75),
        jobs=2,
        limit_minutes=0.0,
    ),
    "gpu": Preset(
        recipe="ablate_gpu.yaml",
        data=RenderedData(
            train_videos=400,
            val_videos=100,
            frames=30,
            fps=25.0,
            max_people=4,
            difficulty=Difficulty(),
        ),
        seeds=5,
        ratios=(0.15, 0.3, 0.6, 0.75),
        jobs=1,
        limit_minutes=8.5,
    ),
}


def preset_recipe(name: str) -> Config:
    """The recipe of a preset; ``data.root`` is set to where its people are rendered."""
    return configuration.load(str(files("cmpose.configs") / PRESETS[name].recipe))


def ablate(
    output: str | Path,
    preset: str = "cpu",
    recipe: Config | None = None,
    *,
    own_data: bool = False,
    parts: list[Part] | None = None,
    ratios: list[float] | None = None,
    seeds: int = 0,
    jobs: int = 0,
    limit_minutes: float | None = None,
    report: str | Path = "",
    progress: bool = True,
) -> bool:
    """Trains and evaluates what is not finished yet, and writes the report of what is.

    Args:
        output: the study's folder.
        preset: of ``PRESETS``; gives what the other arguments leave out.
        recipe: the full model's; None takes the preset's.
        own_data: the recipe's ``data`` names a data set; otherwise the preset's is rendered.
        parts: of ``table4``, ``table5``, ``figure3``; all without.
        ratios: Figure 3's.
        seeds: how many.
        jobs: runs at a time, each in a process of its own with its share of the cores.
        limit_minutes: ends within this time, runs under way saved; 0 is no limit.
        report: folder of the report, default ``output/report``.
        progress: shows a bar.

    Returns:
        Whether every run is finished.

    Raises:
        ValueError: an argument or recipe that cannot work; other settings than ``output``'s.
        RuntimeError: a run failed, or another process works in ``output``.
        KeyboardInterrupt: on SIGINT or SIGTERM, when the runs under way have been saved.
    """
    started = time.perf_counter()
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: there are {', '.join(PRESETS)}")
    chosen, folder = PRESETS[preset], Path(output)
    base = copy.deepcopy(recipe) if recipe is not None else preset_recipe(preset)
    if not own_data:
        if base.data.root != ".":
            raise ValueError(
                f"data.root={base.data.root}: preset {preset} renders its own data; for another "
                "data set give a recipe of your own with --config"
            )
        base.data.root = str(folder / "data")
    base.train.evaluate_every, base.train.keep_checkpoints = 0, 1
    study = Study(base, chosen_parts(parts), tuple(ratios or chosen.ratios), seeds or chosen.seeds)
    jobs = jobs or chosen.jobs
    limit = chosen.limit_minutes if limit_minutes is None else limit_minutes
    if jobs < 1 or limit < 0 or 0 < 60 * limit <= 2 * GRACE:
        raise ValueError(
            f"jobs={jobs}, limit_minutes={limit}: jobs must be at least 1, and a limit more than "
            f"{2 * GRACE / 60:.1f} minutes, or 0 for none"
        )
    stop_at = started + 60 * limit - GRACE if limit else float("inf")
    with _claimed(folder, base, None if own_data else chosen.data), _sigterm_as_sigint():
        workshop = Workshop(study, folder, jobs, progress)
        try:
            done = own_data or render(folder / "data", chosen.data, stop_at, progress)
            if done:
                baseline(base, folder)
                done = workshop.work(stop_at)
        finally:
            line = {
                "seconds": round(time.perf_counter() - started, 1),
                "command": provenance.command_line(),
            }
            with (folder / "pieces.jsonl").open("a") as pieces:
                pieces.write(json.dumps(line) + "\n")
        finished = workshop.finished()
        if finished:
            place = Path(report) if report else folder / "report"
            print(f"report: {write_report(study, folder, place, finished)}")
        if not done:
            count = f"{len(finished)} of {len(study.runs())}"
            print(f"{count} runs are finished: the same command goes on")
        return done


# -- the folder -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _claimed(folder: Path, recipe: Config, data: RenderedData | None) -> Iterator[None]:
    """Holds the folder for this process, and to one recipe and data set."""
    with alone_in(folder, "ablate", "folder"):
        _check_settings(folder, recipe, data)
        yield


def _comparable(recipe: Config) -> dict[str, Any]:
    """The recipe without the fields that do not change what is learnt."""
    flat = configuration.flatten(configuration.to_dict(recipe))
    return {key: value for key, value in flat.items() if key not in FREE_FIELDS}


def _check_settings(folder: Path, recipe: Config, data: RenderedData | None) -> None:
    wanted: dict[str, Any] = _comparable(recipe) | {
        f"rendered.{key}": value
        for key, value in configuration.flatten(asdict(data) if data else {}).items()
    }
    path = folder / "settings.json"
    if not path.exists():
        write_text(path, json.dumps(wanted, indent=1) + "\n")
        return
    held, wanted = json.loads(path.read_text()), json.loads(json.dumps(wanted))
    changed = configuration.differences(held, wanted)
    if changed:
        listed = "; ".join(f"{key} was {a!r}, is {b!r}" for key, (a, b) in changed.items())
        raise ValueError(
            f"{path}: the runs in {folder} were made with other settings ({listed}): "
            "give the same ones, or another folder"
        )


@contextlib.contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """SIGTERM too lets the runs under way be saved."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- data -----------------------------------------------------------------------------------------


def render(root: Path, data: RenderedData, stop_at: float, progress: bool = True) -> bool:
    """Renders what is missing of a preset's data, until ``stop_at``; whether all of it is there."""
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
                workers=_cores(),
                progress=progress,
            )
    return True


def baseline(recipe: Config, folder: Path) -> None:
    """What always answering the mean pose gets, into ``mean_pose.json``."""
    path = folder / "mean_pose.json"
    if not path.exists():
        _, subsets = score_mean_pose(recipe, folder / "mean_pose")
        if not subsets:
            raise ValueError(
                f"data.val_annotations={recipe.data.val_annotations!r}: nobody has a head box, or "
                "the keypoints are not PoseTrack's, so there is no official AP to compare settings "
                "by: give annotations with bbox_head"
            )
        write_text(path, json.dumps(finite_or_none(subsets), indent=1) + "\n")


# -- runs -----------------------------------------------------------------------------------------


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_config(recipe: Config, setting: Setting, seed: int) -> Config:
    """The recipe with a setting's fields and a seed."""
    config = copy.deepcopy(recipe)
    for dotted, value in setting.items():
        section, name = dotted.split(".")
        setattr(config, section, replace(getattr(config, section), **{name: value}))
    config.train.seed = seed
    return config


def run_one(config: Config, folder: Path, name: str, seed: int, threads: int) -> dict[str, Any]:
    """Trains (or goes on), evaluates, and writes the run's JSON below ``folder``."""
    torch.set_num_threads(threads)
    place = folder / "train" / run_name(name, seed)
    metrics = train(config, place, resume=True, progress=False)
    result = {
        "name": name,
        "seed": seed,
        "recipe": _comparable(config),
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
    path = folder / "runs" / f"{run_name(name, seed)}.json"
    write_text(path, json.dumps(finite_or_none(result), indent=1) + "\n")
    for weights in ("checkpoints", "model"):
        shutil.rmtree(place / weights, ignore_errors=True)
    return result


def _in_process(
    sender: Connection, config: Config, folder: Path, name: str, seed: int, threads: int
) -> None:
    """A run in a process of its own; what it prints goes into its folder."""
    place = folder / "train" / run_name(name, seed)
    place.mkdir(parents=True, exist_ok=True)
    try:
        with (place / "output.txt").open("a") as text, contextlib.redirect_stdout(text):
            run_one(config, folder, name, seed, threads)
    except (Interrupted, KeyboardInterrupt):
        sender.send("stopped")
    except (ValueError, OSError, RuntimeError) as error:  # their messages say all
        sender.send(f"{type(error).__name__}: {error}")
    except Exception:
        sender.send(traceback.format_exc())
    else:
        sender.send("finished")


@dataclass
class _Worker:
    run: tuple[str, int]
    process: BaseProcess
    receiver: Connection


class Workshop:
    """The runs of a study: which are finished, and some of the others at a time."""

    def __init__(self, study: Study, folder: Path, jobs: int, progress: bool) -> None:
        self.study, self.folder, self.jobs, self.progress = study, folder, jobs, progress
        self.settings = study.settings()
        self.threads = max(1, _cores() // jobs)
        self.workers: list[_Worker] = []

    def finished(self) -> list[dict[str, Any]]:
        """The finished runs' results, in the study's order.

        Raises:
            ValueError: a result that is no JSON, or of other settings than the study's.
        """
        found = []
        for name, seed in self.study.runs():
            path = self.folder / "runs" / f"{run_name(name, seed)}.json"
            if not path.exists():
                continue
            try:
                result = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path} is not JSON ({error}): delete it and run again"
                ) from error
            config = run_config(self.study.recipe, self.settings[name], seed)
            wanted = json.loads(json.dumps(_comparable(config)))
            changed = configuration.differences(result.get("recipe", {}), wanted)
            if changed:
                listed = "; ".join(f"{key} was {a!r}, is {b!r}" for key, (a, b) in changed.items())
                raise ValueError(f"{path} is of other settings ({listed}): delete it and run again")
            found.append(result)
        return found

    def work(self, stop_at: float) -> bool:
        """Starts runs and waits for them until ``stop_at``; whether all are finished."""
        done = {(result["name"], result["seed"]) for result in self.finished()}
        waiting = [run for run in self.study.runs() if run not in done]
        bar = tqdm(
            total=len(waiting) + len(done),
            initial=len(done),
            unit="run",
            desc="ablate",
            smoothing=0.1,
            disable=not self.progress,
        )
        shown = ""
        try:
            while waiting or self.workers:
                if time.perf_counter() > stop_at:
                    break
                while waiting and len(self.workers) < self.jobs:
                    self._start(waiting.pop(0))
                running = ", ".join(run_name(*worker.run) for worker in self.workers)
                if running != shown:
                    shown = running
                    bar.set_postfix_str(shown)
                if finished := self._collect(wait=0.5):
                    bar.update(finished)
        finally:
            self._stop()
            bar.close()
        return len(self.finished()) == len(self.study.runs())

    def _start(self, run: tuple[str, int]) -> None:
        # Spawned, because a forked process cannot use CUDA, and shares nothing with the last run.
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        name, seed = run
        config = run_config(self.study.recipe, self.settings[name], seed)
        process = context.Process(
            target=_in_process, args=(sender, config, self.folder, name, seed, self.threads)
        )
        process.start()
        sender.close()
        self.workers.append(_Worker(run, process, receiver))

    def _collect(self, wait: float) -> int:
        """Takes the runs that have ended; how many are finished.

        Raises:
            RuntimeError: naming a run that failed, and why.
        """
        multiprocessing.connection.wait([w.process.sentinel for w in self.workers], wait)
        finished = 0
        for worker in list(self.workers):
            if worker.process.is_alive():
                continue
            self.workers.remove(worker)
            try:
                said = worker.receiver.recv() if worker.receiver.poll() else ""
            except EOFError:
                said = ""
            if said == "finished":
                finished += 1
            elif said != "stopped":
                said = said or f"its process ended with exit code {worker.process.exitcode}"
                raise RuntimeError(
                    f"run {run_name(*worker.run)} failed: {said} (what it printed: "
                    f"{self.folder / 'train' / run_name(*worker.run) / 'output.txt'}); "
                    "the same command goes on from its last checkpoint"
                )
        return finished

    def _stop(self) -> None:
        """Lets the runs under way save, and ends those that take longer than ``GRACE``."""
        for worker in self.workers:
            worker.process.terminate()
        until = time.perf_counter() + GRACE
        for worker in self.workers:
            worker.process.join(max(0.0, until - time.perf_counter()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self.workers.clear()
