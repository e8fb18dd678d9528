"""Training: exact to resume, the same on one process or many."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.data.clips import fit_keypoints, open_clips, worker_init
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import listed
from cmpose.data.transforms import heatmap_targets
from cmpose.distributed import World, synchronize_batch_norms, world
from cmpose.evaluation.decode import decode_heatmaps, to_crop
from cmpose.evaluation.evaluate import evaluate_model
from cmpose.evaluation.inference import clip_images, key_crops, move_pixels
from cmpose.files import Interrupted, stop_requests, write_metrics, write_text
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from cmpose.models.weights.card import model_card
from cmpose.models.weights.folder import CARD
from cmpose.models.weights.pretrained import load_pretrained
from cmpose.train.elastic import is_restart, mark_begun
from cmpose.train.parallel import check_parallel, gather, shard_like, share, whole_model
from cmpose.train.plan import out_of_memory
from cmpose.train.runlog import RunLog
from cmpose.train.schedule import (
    StepBatches,
    check_batch,
    learning_rate,
    parameter_groups,
    seed_of,
    steps_per_epoch,
)
from cmpose.train.step import (
    LOSS_TERMS,
    CapturedStep,
    FiniteWatch,
    LossModule,
    StepOutput,
    TrainingStep,
    capture_on,
    check_speed,
    load_optimizer_state,
    optimizer_state,
    prepare_groups,
    set_rates,
)
from cmpose.viz.draw import montage

# What may differ when a run is resumed: these fields do not change what is learnt.
FREE_FIELDS = (
    "data.num_workers",
    "data.frame_cache_mb",
    "data.warp",  # what it comes to is compared: auto depends on the device
    "model.checkpoint_activations",
    "data.cache",  # likewise: a raw cache holds the frames' own pixels
    "data.cache_format",
    "data.cache_quality",
    "data.cache_detail",
    "train.device",
    "train.distributed",  # the same step within rounding, as another number of processes
    "train.log_every",
    "train.pictures_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names step, terms and state."""


class OutOfMemory(RuntimeError):
    """The card's memory is too small; the message names the fields that need less."""


def _start_worker(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one still needs its batches."""
    worker_init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
        FileExistsError: if ``output`` holds a run and ``resume`` is False.
        NonFiniteLoss: when the loss or gradient is not finite; the state is saved first.
        OutOfMemory: when the card's memory does not hold a step.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    with ExitStack() as stack:
        place = stack.enter_context(world(config.train.device))
        stop = stack.enter_context(stop_requests())
        return _Run(config, Path(output), place, progress, stop).run(resume)


class _Run:
    def __init__(
        self, config: Config, output: Path, place: World, progress: bool, stop: threading.Event
    ) -> None:
        check_batch(config.train, place.size)
        check_speed(config.train, place)
        check_parallel(config.train, place)
        if config.train.epochs < 1:
            raise ValueError(f"train.epochs={config.train.epochs}: must be at least 1")
        self.config, self.output, self.world, self.stop = config, output, place, stop
        self.progress = progress and place.main
        self.checkpoints = output / "checkpoints"
        torch.manual_seed(config.train.seed)
        self.clips = open_clips(config, train=True, device=place.device, quiet=not place.main)
        self.config = config = fit_keypoints(config, self.clips)
        self.per_epoch = steps_per_epoch(len(self.clips), config.train)
        model = CMPose(config.model)
        model.skeleton = self.clips.skeleton
        if config.model.pretrained:
            report = load_pretrained(model, config.model.pretrained)
            if place.main:
                print(report)
        self.core = model.to(place.device)
        speed = config.train.speed
        if place.size > 1:
            synchronize_batch_norms(self.core, place.device, compiled=speed != "eager")
        losses = LossModule(self.core, compiled=speed != "eager")
        self.model = share(losses, self.core, config, place)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.core, config.train), lr=config.train.lr, fused=True
        )
        self.scaler = torch.amp.GradScaler(
            place.device.type, enabled=config.train.precision == "fp16"
        )
        prepare_groups(self.optimizer, place.device, speed == "graph")
        self.watch = FiniteWatch(place.device)
        parts = self.model, self.core, self.optimizer, self.scaler, self.watch
        self._train_on: Callable[[dict[str, Tensor]], StepOutput]
        self._train_on = TrainingStep(*parts, config, place)
        if speed == "graph":
            self._train_on = CapturedStep(self._train_on, capture_on(place.device))
        # A failed step is found some steps later. With loss scaling it is not held: look at each.
        self.look_every = 1 if self.scaler.is_enabled() else config.train.log_every
        self.unseen: deque[tuple[int, list[int]]] = deque()
        self.step = 0
        self.seconds = 0.0

    # -- state ------------------------------------------------------------------------------

    def _save(self, name: str | None = None, **extra: Any) -> Path:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warp": self.clips.data.warp,
            "optimizer": optimizer_state(self.optimizer, self.world),
            "pixels": self.clips.pixels,
            "scaler": self.scaler.state_dict(),
        } | extra
        path = self.checkpoints / (name or checkpoint.name_of(self.step))
        weights = gather(self.core.state_dict(), self.world)
        if self.world.main:
            checkpoint.save(
                self.checkpoints, path.name, weights, self.config, state, self.core.skeleton
            )
            if name is None:
                checkpoint.prune(self.checkpoints, self.config.train.keep_checkpoints)
        self.world.barrier()
        return path

    def _restore(self, resume: bool) -> None:
        found = checkpoint.training_checkpoints(self.checkpoints)
        if not found:
            return
        if not resume:
            raise FileExistsError(
                f"{self.output} already holds a run (checkpoints up to {found[-1].name}): "
                "add --resume to go on with it, or give another --output"
            )
        folder = found[-1]
        changed = configuration.differences(
            configuration.to_dict(checkpoint.load_config(folder)),
            configuration.to_dict(self.config),
        )
        changed = {k: v for k, v in changed.items() if k not in FREE_FIELDS}
        if changed:
            fields = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise ValueError(
                f"cannot resume {folder} with another recipe ({fields}): "
                "give the same fields, or another --output"
            )
        trained = checkpoint.load_skeleton(folder, self.config.model.num_keypoints)
        if trained != self.clips.skeleton:
            raise ValueError(
                f"cannot resume {folder}: it was trained on {listed(trained)}, the annotations "
                f"have {listed(self.clips.skeleton)}, or other flip_pairs, limbs or halves: "
                "restore the annotations' category, or give another --output"
            )
        checkpoint.load_into(self.core, checkpoint.load_weights(folder), folder, shard=shard_like)
        state = checkpoint.load_state(folder)
        before, now = state.get("warp", "host"), self.clips.data.warp
        if before != now:
            raise ValueError(
                f"cannot resume {folder}: its crops were made on the {before}, this run would make "
                f"them on the {now}, which rounds pixels otherwise; set data.warp={before}"
            )
        source = state.get("pixels", "frames")
        if source != self.clips.pixels:
            raise ValueError(
                f"cannot resume {folder}: its crops were made from {source}, this run would make "
                f"them from {self.clips.pixels}; set data.cache and its fields as they were"
            )
        load_optimizer_state(self.optimizer, state["optimizer"])
        prepare_groups(self.optimizer, self.world.device, self.config.train.speed == "graph")
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.world.main:
            print(f"resuming from {folder}")

    # -- a step -----------------------------------------------------------------------------

    def _step(self, batch: dict[str, Tensor]) -> StepOutput:
        """One optimiser step; the host reads nothing of it."""
        train, device = self.config.train, self.world.device
        centers, weight = heatmap_targets(
            batch["keypoints"].to(device, non_blocking=True),
            batch["visible"].to(device, non_blocking=True),
            image_size=self.config.model.image_size,
            heatmap_size=self.core.heatmap_size,
            sigma=self.config.model.sigma,
            unannotated=self.config.data.unannotated,
            udp=self.config.data.udp,
        )
        set_rates(self.optimizer, learning_rate(self.step, self.per_epoch, train))
        self.unseen.append((self.step, batch["index"].tolist()))
        return self._train_on(
            {
                "images": clip_images(move_pixels(batch, device), self.config),
                "centers": centers,
                "weight": weight,
                # Filled, not copied: a copy from pageable memory would wait.
                "seed": torch.full((1,), seed_of(train.seed, self.step), device=device),
                "step": torch.full((), self.step, device=device),
            }
        )

    def _look(self) -> None:
        """Raises if a step since the last look was not finite; the weights are as before it."""
        failed = self.watch.read()
        seen, self.unseen = self.unseen, deque()
        if failed is None:
            return
        step, values, norm = failed
        # The state before the failed step, which the halted optimiser has kept.
        self.step = step
        mine = dict(seen)[step]
        indices = [i for part in self.world.gather(mine) for i in part]
        path = self._save(f"nonfinite-{checkpoint.name_of(step)}", clips=indices)
        terms = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        raise NonFiniteLoss(
            f"step {step}: not finite ({terms}, gradient norm {norm:.6g}); the state "
            f"before this step and the indices of its clips are in {path}. Lower train.lr, set "
            "train.clip_norm, or train.precision=fp32; then resume from the last checkpoint"
        )

    def _share_stop(self) -> None:
        """Every process stops after the same step."""
        if self.world.size == 1:
            return
        asked = torch.tensor(float(self.stop.is_set()), device=self.world.device)
        if self.world.sum(asked) > 0:
            self.stop.set()

    # -- the run ----------------------------------------------------------------------------

    def run(self, resume: bool) -> dict[str, Any]:
        again = is_restart(self.output, self.world)
        self._restore(resume or again)
        mark_begun(self.output, self.world)
        main, train = self.world.main, self.config.train
        total = self.per_epoch * train.epochs
        log = RunLog(self.output, self.step) if main else None
        if main:
            write_text(
                self.output / checkpoint.CONFIG,
                json.dumps(configuration.to_dict(self.config), indent=1) + "\n",
            )
        loader = DataLoader(
            self.clips,
            batch_sampler=StepBatches(len(self.clips), train, self.world, self.step),
            num_workers=self.config.data.num_workers,
            worker_init_fn=_start_worker,
            collate_fn=collate,
            pin_memory=self.world.device.type == "cuda",
        )
        bar = tqdm(
            total=total, initial=self.step, unit="step", disable=not self.progress, smoothing=0.1
        )
        save_every = train.checkpoint_every or self.per_epoch
        elapsed = 0.0
        self.model.train()
        try:
            mark, recent = time.perf_counter(), []
            for batch in loader:
                try:
                    output = self._step(batch)
                except torch.OutOfMemoryError as error:
                    raise OutOfMemory(out_of_memory(self.config, error)) from error
                self.step += 1
                self._share_stop()
                stopped = self.stop.is_set() and self.step < total
                save_due = self.step % save_every == 0 or self.step == total or stopped
                if save_due or self.step % self.look_every == 0:
                    self._look()
                recent.append(output.terms)
                now = time.perf_counter()
                self.seconds, mark, elapsed = self.seconds + now - mark, now, elapsed + now - mark
                if self.step % train.log_every == 0 or self.step == total:
                    speed = len(recent) * train.batch_size / elapsed
                    self._report(log, bar, torch.stack(recent).mean(0), output.norm, speed)
                    recent, elapsed = [], 0.0
                if log and train.pictures_every and self.step % train.pictures_every == 0:
                    log.picture("train/poses", self.step, self._picture(batch, output.heatmaps))
                bar.update()
                if save_due:
                    path = self._save()
                    if stopped:
                        raise Interrupted(
                            f"stopped after step {self.step} of {total}; {path} is saved, "
                            "the same command with --resume goes on"
                        )
                evaluation_due = (
                    train.evaluate_every
                    and self.step % (self.per_epoch * train.evaluate_every) == 0
                )
                if evaluation_due and self.step < total:
                    self._evaluate(log)
                mark = time.perf_counter()
            return self._finish(log, total)
        finally:
            bar.close()
            if log:
                log.close()

    def _report(self, log: RunLog | None, bar: tqdm, terms: Tensor, norm: Tensor, speed: float):
        if log is None:
            return
        values = dict(zip(LOSS_TERMS, terms.tolist(), strict=True))
        bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:.1f} clips/s", refresh=False)
        log.write(
            "train",
            self.step,
            values
            | {
                "epoch": self.step / self.per_epoch,
                "lr": learning_rate(self.step - 1, self.per_epoch, self.config.train),
                "gradient_norm": float(norm),
                "clips_per_second": speed,
            },
        )

    def _picture(self, batch: dict[str, Tensor], heatmaps: Tensor):
        """Key frames of the last clips with predicted and true poses."""
        shown = min(8, len(heatmaps))
        heatmaps = heatmaps[-shown:].float().cpu()
        xy, scores = decode_heatmaps(
            heatmaps, self.config.data.decode, sigma=self.config.model.sigma
        )
        keypoints = to_crop(
            xy, self.core.heatmap_size, self.config.model.image_size, udp=self.config.data.udp
        )
        return montage(
            key_crops(batch, self.config.model, shown),
            keypoints.numpy(),
            scores.numpy(),
            batch["keypoints"][-shown:].numpy(),
            batch["visible"][-shown:].numpy(),
            skeleton=self.core.skeleton,
        )

    def _evaluate(self, log: RunLog | None) -> dict[str, Any]:
        self.model.eval()
        metrics = evaluate_model(
            whole_model(self.core).eval(),
            self.config,
            self.output,
            self.world,
            progress=self.progress,
        )
        self.model.train()
        if log:
            columns = metrics["ap"]["columns"]
            log.write("evaluate", self.step, {"box_source": metrics["box_source"]} | columns)
        return metrics

    def _finish(self, log: RunLog | None, total: int) -> dict[str, Any]:
        weights = gather(self.core.state_dict(), self.world)
        place = self.output / "model"
        if self.world.main:  # saved before the evaluation, which can fail for want of data
            checkpoint.save(
                self.output,
                place.name,
                weights,
                self.config,
                skeleton=self.core.skeleton,
                card=model_card(self.config),
            )
        metrics = self._evaluate(log)
        if self.world.main:
            metrics |= {
                "evaluation_seconds": metrics["seconds"],
                "evaluation_clips_per_second": metrics["clips_per_second"],
                "seconds": self.seconds,
                "clips_per_second": total * self.config.train.batch_size / max(self.seconds, 1e-9),
                "steps": total,
            }
            write_metrics(self.output, metrics)
            write_text(place / CARD, model_card(self.config, [metrics]))
        return metrics
