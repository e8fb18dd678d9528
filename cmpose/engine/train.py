"""Training: exact to resume, the same on one process or many."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from cmpose import config as configuration
from cmpose import ops
from cmpose.config import Config
from cmpose.data.clips import worker_init
from cmpose.data.cutouts import collate
from cmpose.data.transforms import heatmap_targets
from cmpose.engine import checkpoint
from cmpose.engine.distributed import World, synchronize_batch_norms, world
from cmpose.engine.evaluate import (
    autocast,
    clip_images,
    evaluate_model,
    key_crops,
    move_pixels,
    open_clips,
)
from cmpose.engine.runlog import RunLog, write_metrics
from cmpose.engine.schedule import (
    StepBatches,
    check_batch,
    learning_rate,
    parameter_groups,
    seed_of,
    steps_per_epoch,
)
from cmpose.evaluation.decode import decode_heatmaps, to_crop
from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.models.losses import cmpose_loss
from cmpose.models.pretrained import load_pretrained
from cmpose.viz.draw import montage

LOSS_TERMS = ("loss", "pose", "mask", "noise", "selection")

# Fields that may differ when a run is resumed: they do not change what is learnt.
_FREE_FIELDS = (
    "data.num_workers",
    "data.frame_cache_mb",
    "data.warp",  # what it comes to is compared: auto depends on the device
    "data.cache",  # likewise: a raw cache holds the frames' own pixels
    "data.cache_format",
    "data.cache_quality",
    "data.cache_detail",
    "train.device",
    "train.log_every",
    "train.pictures_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is NaN or infinite; the message names step, terms and state."""


class Interrupted(RuntimeError):
    """Training was asked to stop; the message names the checkpoint to resume from."""


@contextmanager
def _stop_requests():
    """Turns SIGINT and SIGTERM into a flag, so that a step is finished and saved first.

    A second signal does what it always does.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, old[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        old[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


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
        resume: goes on from the newest checkpoint in ``output``; starts when there is none.
        progress: shows a progress bar.

    Raises:
        ValueError: for a recipe that cannot work.
        FileExistsError: if ``output`` holds a run and ``resume`` is False.
        NonFiniteLoss: when the loss or gradient is not finite; the state is saved first.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    with ExitStack() as stack:
        place = stack.enter_context(world(config.train.device))
        stop = stack.enter_context(_stop_requests())
        return _Run(config, Path(output), place, progress, stop).run(resume)


class _Run:
    def __init__(
        self, config: Config, output: Path, place: World, progress: bool, stop: threading.Event
    ) -> None:
        check_batch(config.train, place.size)
        if config.train.epochs < 1:
            raise ValueError(f"train.epochs={config.train.epochs}: must be at least 1")
        self.config, self.output, self.world, self.stop = config, output, place, stop
        self.progress = progress and place.main
        self.checkpoints = output / "checkpoints"
        torch.manual_seed(config.train.seed)
        self.clips = open_clips(config, train=True, device=place.device, quiet=not place.main)
        self.per_epoch = steps_per_epoch(len(self.clips), config.train)
        model = CMPose(config.model)
        if config.model.pretrained:
            report = load_pretrained(model, config.model.pretrained)
            if place.main:
                print(report)
        self.core = model.to(place.device)
        self.model: nn.Module = self.core
        if place.size > 1:
            self.core = synchronize_batch_norms(self.core, place.device)  # type: ignore[assignment]
            self.model = DistributedDataParallel(
                self.core,
                device_ids=[place.device.index] if place.device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                # The one case in which weights take no gradient: nothing teaches the scores.
                find_unused_parameters=config.model.fine == "causal_only"
                and config.model.selection_weight == 0,
            )
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.core, config.train), lr=config.train.lr, fused=True
        )
        self.scaler = torch.amp.GradScaler(
            place.device.type, enabled=config.train.precision == "fp16"
        )
        self.step = 0
        self.seconds = 0.0

    # -- state ------------------------------------------------------------------------------

    def _save(self, name: str | None = None, **extra: Any) -> Path:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "warp": self.clips.data.warp,
            "pixels": self.clips.pixels,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        } | extra
        path = self.checkpoints / (name or checkpoint.name_of(self.step))
        if self.world.main:
            checkpoint.save(self.checkpoints, path.name, self.core.state_dict(), self.config, state)
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
        changed = {k: v for k, v in changed.items() if k not in _FREE_FIELDS}
        if changed:
            listed = "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise ValueError(
                f"cannot resume {folder} with another recipe ({listed}): "
                "give the same fields, or another --output"
            )
        checkpoint.load_into(self.core, checkpoint.load_weights(folder), folder)
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
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.world.main:
            print(f"resuming from {folder}")

    # -- a step -----------------------------------------------------------------------------

    def _step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, CMPoseOutput]:
        """One optimiser step; returns the global loss terms, the gradient norm, an output."""
        train, device = self.config.train, self.world.device
        seed = torch.tensor([seed_of(train.seed, self.step)], dtype=torch.int64, device=device)
        torch.manual_seed(seed_of(train.seed, self.step, 1 + self.world.rank))  # drop path
        pixels = move_pixels(batch, device)
        centers, weight = heatmap_targets(
            batch["keypoints"].to(device),
            batch["visible"].to(device),
            image_size=self.config.model.image_size,
            heatmap_size=self.core.heatmap_size,
            sigma=self.config.model.sigma,
            unannotated=self.config.data.unannotated,
            udp=self.config.data.udp,
        )
        parts = train.accumulate * self.world.size
        joints = self.world.sum(weight.sum()).clamp(min=1.0) / parts
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.per_epoch, train) * group["scale"]

        count = len(batch["index"])
        size = count // train.accumulate
        first = self.world.rank * count
        terms = torch.zeros(len(LOSS_TERMS), device=device)
        for part in range(train.accumulate):
            window = slice(part * size, (part + 1) * size)
            last = part == train.accumulate - 1
            wait = isinstance(self.model, DistributedDataParallel) and not last
            with self.model.no_sync() if wait else nullcontext():  # type: ignore[operator]
                # NaN is for _check_finite to report, not for the first op that meets it.
                with autocast(device, train.precision), ops.without_value_checks():
                    images = clip_images(pixels, self.config, window)
                    output = self.model(images, seed, first + window.start)
                losses = cmpose_loss(
                    output, centers[window], weight[window], self.config.model, joints=joints
                )
                self.scaler.scale(losses.total / train.accumulate).backward()
            terms += torch.stack([term.detach() for term in losses])
        # The pose term is already a share of the global sum; every term is a mean over parts.
        asked = torch.tensor([float(self.stop.is_set())], device=device)
        shared = self.world.sum(torch.cat([terms / parts, asked]))
        if shared[-1] > 0:
            self.stop.set()
        terms = shared[:-1]
        self.scaler.unscale_(self.optimizer)
        limit = train.clip_norm if train.clip_norm > 0 else float("inf")
        norm = nn.utils.clip_grad_norm_(self.core.parameters(), limit)
        self._check_finite(terms, norm, batch["index"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return terms, norm, output

    def _check_finite(self, terms: Tensor, norm: Tensor, index: Tensor) -> None:
        # With loss scaling an infinite gradient is normal: the scaler skips that step.
        checked = terms if self.scaler.is_enabled() else torch.cat([terms, norm.detach()[None]])
        if bool(torch.isfinite(checked).all()):
            return
        indices = [i for part in self.world.gather(index.tolist()) for i in part]
        path = self._save(f"nonfinite-{checkpoint.name_of(self.step)}", clips=indices)
        values = dict(zip(LOSS_TERMS, terms.tolist(), strict=True))
        listed = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        raise NonFiniteLoss(
            f"step {self.step}: not finite ({listed}, gradient norm {float(norm):.6g}); the state "
            f"before this step and the indices of its clips are in {path}. Lower train.lr, set "
            "train.clip_norm, or train.precision=fp32; then resume from the last checkpoint"
        )

    # -- the run ----------------------------------------------------------------------------

    def run(self, resume: bool) -> dict[str, Any]:
        self._restore(resume)
        main, train = self.world.main, self.config.train
        total = self.per_epoch * train.epochs
        log = RunLog(self.output, self.step) if main else None
        if main:
            checkpoint.write_text(
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
                terms, norm, output = self._step(batch)
                self.step += 1
                recent.append(terms)
                now = time.perf_counter()
                self.seconds, mark, elapsed = self.seconds + now - mark, now, elapsed + now - mark
                if self.step % train.log_every == 0 or self.step == total:
                    speed = len(recent) * train.batch_size / elapsed
                    self._report(log, bar, torch.stack(recent).mean(0), norm, speed)
                    recent, elapsed = [], 0.0
                if log and train.pictures_every and self.step % train.pictures_every == 0:
                    log.picture("train/poses", self.step, self._picture(batch, output))
                bar.update()
                stopped = self.stop.is_set() and self.step < total
                if self.step % save_every == 0 or self.step == total or stopped:
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

    def _picture(self, batch: dict[str, Tensor], output: CMPoseOutput):
        """Key frames of the first clips with predicted and true poses."""
        shown = min(8, len(output.heatmaps))
        heatmaps = output.heatmaps[-shown:].detach().float().cpu()
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
        )

    def _evaluate(self, log: RunLog | None) -> dict[str, Any]:
        self.model.eval()
        metrics = evaluate_model(
            self.core, self.config, self.output, self.world, progress=self.progress
        )
        self.model.train()
        if log:
            columns = metrics["ap"]["columns"]
            log.write("evaluate", self.step, {"box_source": metrics["box_source"]} | columns)
        return metrics

    def _finish(self, log: RunLog | None, total: int) -> dict[str, Any]:
        if self.world.main:
            checkpoint.save(self.output, "model", self.core.state_dict(), self.config)
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
        return metrics
