"""Training: exact to resume, the same on one process or on many."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmpose import config as configuration
from cmpose.config import Config, TrainConfig
from cmpose.data.clips import ClipDataset
from cmpose.distributed import World, claim_together, join_world
from cmpose.evaluation.evaluate import OUTPUT_FOLDERS, evaluate_model, evaluation_clips
from cmpose.files import (
    Interrupted,
    OutputError,
    stop_requests,
    write_json,
    write_metrics,
    write_text,
)
from cmpose.memory import OutOfMemory, is_out_of_memory
from cmpose.models.weights import checkpoint
from cmpose.models.weights.card import model_card
from cmpose.models.weights.folder import CARD
from cmpose.train.batches import open_training_clips, training_loader
from cmpose.train.dry_run import out_of_memory
from cmpose.train.elastic import is_restart, mark_begun
from cmpose.train.monitor import Monitor
from cmpose.train.parallel import check_parallel, gather, whole_model
from cmpose.train.products import check_channels, check_products, sums_of_products
from cmpose.train.schedule import check_batch
from cmpose.train.state import RESUME, new_state, resume_or_start
from cmpose.train.step import check_speed, settled_speed
from cmpose.train.trainer import NonFiniteLoss, Trainer

__all__ = ["Interrupted", "NonFiniteLoss", "OutOfMemory", "train"]

_SUBFOLDERS = (checkpoint.CHECKPOINTS, *OUTPUT_FOLDERS)
"""Where a killed run may have left something unfinished."""


def train(
    config: Config, output: str | Path, *, resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Trains a model into the folder ``output`` and returns its metrics.

    Args:
        config: the recipe.
        output: gets ``checkpoints/``, ``model/`` (the final weights), ``log.jsonl``,
            ``tensorboard/``, ``predictions/`` and ``metrics.json``.
        resume: goes on from the newest checkpoint in ``output``; starts when there is none. A run
            that ``torchrun`` has restarted does so by itself.
        progress: shows a progress bar.

    Raises:
        ValueError: for a recipe that cannot work.
        FileNotFoundError: there are no annotations to train, or to evaluate on at the end.
        FileExistsError: if ``output`` holds a run and ``resume`` is False.
        InUse: another process trains into ``output``.
        OutputError: when something cannot be written.
        NonFiniteLoss: when the loss or gradient is not finite; the state is saved first.
        OutOfMemory: when the card's memory does not hold a step.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    output = Path(output)
    with join_world(config.train.device) as world, stop_requests() as stop:
        speed = settled_speed(config.train, world)
        config = replace(config, train=replace(config.train, speed=speed))
        check_recipe(config.train, world)
        check_channels(config)
        with claim_together(world, output, "train", "--output", _SUBFOLDERS):
            return _train(config, output, world, stop, resume=resume, progress=progress)


def _train(
    config: Config,
    output: Path,
    world: World,
    stop: threading.Event,
    *,
    resume: bool,
    progress: bool,
) -> dict[str, Any]:
    # In a function of its own, so that the model is gone before the processes part: where DDP's
    # reducer outlives torch's process group, the two can wait for each other for ever (torch 2.13).
    clips, config = open_training_clips(config, world)
    check_evaluation(config, clips, world)
    trainer = Trainer(new_state(config, clips, world))
    resume_or_start(trainer.state, output, resume=is_restart(output, world) or resume)
    mark_begun(output, world)
    if world.main:
        write_json(output / checkpoint.CONFIG, configuration.to_dict(config), RESUME)
    with Monitor(trainer, output, progress=progress) as monitor:
        take_steps(trainer, output, monitor, stop)
        return finish(trainer, output, monitor)


def check_evaluation(config: Config, clips: ClipDataset, world: World) -> None:
    """Opens what the run evaluates on at its end, so that it does not fail there, hours later.

    Raises:
        FileNotFoundError: there are no such annotations; else as ``evaluation_clips``.
    """
    data = config.data
    annotations = Path(data.root).expanduser() / data.val_annotations
    if not annotations.exists():
        raise FileNotFoundError(
            f"data.val_annotations={data.val_annotations!r}: {annotations} is not there, and "
            "training evaluates at its end, with train.evaluate_every=0 too: give annotations to "
            "evaluate on; where there are no others, set what data.train_annotations is"
        )
    evaluation_clips(config, clips.skeleton, world.device, quiet=True)


def check_recipe(train: TrainConfig, world: World) -> None:
    """Raises ValueError for a recipe that so many processes on such a device cannot train."""
    check_batch(train, world.size)
    check_speed(train, world)
    check_parallel(train, world)
    check_products(train, world)
    if train.epochs < 1:
        raise ValueError(f"train.epochs={train.epochs}: must be at least 1")


def take_steps(trainer: Trainer, output: Path, monitor: Monitor, stop: threading.Event) -> None:
    """Trains to the last step; saves, logs and evaluates when the recipe says so.

    Raises:
        NonFiniteLoss, OutOfMemory, Interrupted: as :func:`train`.
    """
    state, world, train = trainer.state, trainer.state.world, trainer.state.config.train
    checkpoints, last = output / checkpoint.CHECKPOINTS, trainer.total_steps
    save_every = train.checkpoint_every or trainer.steps_per_epoch
    evaluate_every = train.evaluate_every * trainer.steps_per_epoch
    state.losses.train()
    monitor.start_clock()
    for batch in training_loader(state.clips, state.config, world, state.step):
        try:
            with sums_of_products(train.products):
                result = trainer.step(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(out_of_memory(state.config, error)) from error
        save_due = state.step % save_every == 0 or state.step == last
        look_due = save_due or state.step % trainer.look_every == 0
        # Several processes agree on a stop where they wait for the device in any case.
        stop_requested = stop.is_set() if world.size == 1 else look_due and world.any(stop.is_set())
        stopped = stop_requested and state.step < last
        save_due = save_due or stopped
        if save_due or look_due:
            _check_there(output, world)
            trainer.check_finite(checkpoints)
        monitor.step_taken(batch, result)
        if save_due:
            path = state.save(checkpoints)
            if stopped:
                raise Interrupted(
                    f"stopped after step {state.step} of {last}; {path} is saved, "
                    "the same command with --resume goes on"
                )
        if evaluate_every and state.step % evaluate_every == 0 and state.step < last:
            evaluate(trainer, output, monitor)
        monitor.start_clock()


def _check_there(output: Path, world: World) -> None:
    """Raises OutputError if the run's folder was deleted; else a part of it would come back."""
    if world.main and not (output / checkpoint.CONFIG).is_file():
        raise OutputError(
            f"{output / checkpoint.CONFIG}: is not there any more: put the run's folder back and "
            "go on with --resume, or run the same command again to start anew"
        )


def evaluate(trainer: Trainer, output: Path, monitor: Monitor) -> dict[str, Any]:
    """Evaluates the weights as they are now; the metrics, on every process."""
    state = trainer.state
    _check_there(output, state.world)
    state.losses.eval()
    metrics = evaluate_model(
        whole_model(state.model).eval(),
        state.config,
        output,
        state.world,
        progress=monitor.progress,
    )
    state.losses.train()
    monitor.evaluated(metrics)
    return metrics


def finish(trainer: Trainer, output: Path, monitor: Monitor) -> dict[str, Any]:
    """Writes the final model and evaluates it.

    Returns:
        What ``metrics.json`` holds.
    """
    state, total = trainer.state, trainer.total_steps
    config, main = state.config, state.world.main
    weights = gather(state.model.state_dict(), state.world)
    _check_there(output, state.world)
    if main:  # saved before the evaluation, which may fail when data are missing
        skeleton, card = state.model.skeleton, model_card(config)
        checkpoint.save(output, checkpoint.MODEL, weights, config, skeleton=skeleton, card=card)
    metrics = evaluate(trainer, output, monitor)
    if main:
        metrics |= {
            "evaluation_seconds": metrics["seconds"],
            "evaluation_clips_per_second": metrics["clips_per_second"],
            "seconds": state.seconds,
            "clips_per_second": total * config.train.batch_size / max(state.seconds, 1e-9),
            "steps": total,
        }
        write_metrics(output, metrics)
        write_text(output / checkpoint.MODEL / CARD, model_card(config, [metrics]), RESUME)
    return metrics
