"""What one sees of a run while it trains: log, TensorBoard, progress bar, pictures, speed."""

from __future__ import annotations

import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cmpose.evaluation.decode import decode_heatmaps, to_crop
from cmpose.evaluation.inference import key_crops
from cmpose.files import OutputError
from cmpose.train.runlog import RunLog
from cmpose.train.schedule import learning_rate
from cmpose.train.state import TrainingState
from cmpose.train.step import LOSS_TERMS, StepOutput
from cmpose.train.trainer import Trainer
from cmpose.viz.draw import montage


class Monitor:
    """Watches a run; on every process, though only the main one writes and shows.

    Args:
        trainer: of the run.
        output: the run's folder.
        progress: shows a bar.
    """

    def __init__(self, trainer: Trainer, output: Path, *, progress: bool) -> None:
        self.trainer, self.state = trainer, trainer.state
        main, step = self.state.world.main, self.state.step
        self.progress = progress and main
        self._log = RunLog(output, step) if main else None
        self._bar = tqdm(
            total=trainer.total_steps,
            initial=step,
            unit="step",
            disable=None if self.progress else True,
            smoothing=0.1,
        )
        self._terms: list[Tensor] = []  # loss terms of each step since the last line
        self._elapsed = 0.0  # seconds that these steps took
        self._mark = 0.0

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.close()
        if self._log:
            # What ended the run says more than that the log's last lines could not be written.
            with suppress(OutputError) if error else nullcontext():
                self._log.close()

    def start_clock(self) -> None:
        """From here on time counts as training, until the next :meth:`step_taken`."""
        self._mark = time.perf_counter()

    def step_taken(self, batch: dict[str, Tensor], output: StepOutput) -> None:
        """Notes a step: its time, and when it is due a line, a picture."""
        train, step = self.state.config.train, self.state.step
        now = time.perf_counter()
        self.state.seconds += now - self._mark
        self._elapsed += now - self._mark
        self._mark = now
        self._terms.append(output.terms)
        if step % train.log_every == 0 or step == self.trainer.total_steps:
            self._write_line(output.norm)
        if self._log and train.pictures_every and step % train.pictures_every == 0:
            picture = pose_picture(self.state, batch, output.heatmaps)
            self._log.picture("train/poses", step, picture)
        self._bar.update()

    def evaluated(self, metrics: dict[str, Any]) -> None:
        """Logs an evaluation."""
        if self._log:
            labels = {"box_source": metrics["box_source"]}
            if "metric" in metrics["ap"]:  # where it is not PoseTrack's AP
                labels["metric"] = metrics["ap"]["metric"]
            self._log.write("evaluate", self.state.step, labels | metrics["ap"]["columns"])

    def _write_line(self, norm: Tensor) -> None:
        state, per_epoch = self.state, self.trainer.steps_per_epoch
        if self._log:
            speed = len(self._terms) * state.config.train.batch_size / self._elapsed
            terms = torch.stack(self._terms).mean(0).tolist()
            values = dict(zip(LOSS_TERMS, terms, strict=True))
            shown = f"loss {values['loss']:.3f}, {speed:.1f} clips/s"
            self._bar.set_postfix_str(shown, refresh=False)
            values |= {
                "epoch": state.step / per_epoch,
                "lr": learning_rate(state.step - 1, per_epoch, state.config.train),
                "gradient_norm": float(norm),
                "clips_per_second": speed,
            }
            self._log.write("train", state.step, values)
        self._terms, self._elapsed = [], 0.0


def pose_picture(state: TrainingState, batch: dict[str, Tensor], heatmaps: Tensor) -> np.ndarray:
    """Key frames of a batch's last clips with predicted and true poses, RGB uint8 [H, W, 3].

    Args:
        state: of the run.
        batch: from the loader.
        heatmaps: [b, K, h, w], predicted for the batch's last clips.
    """
    data, model = state.config.data, state.config.model
    count = min(8, len(heatmaps))
    heatmaps = heatmaps[-count:].float().cpu()
    xy, scores = decode_heatmaps(heatmaps, data.decode, sigma=model.sigma)
    keypoints = to_crop(xy, state.model.heatmap_size, model.image_size, udp=data.udp)
    return montage(
        key_crops(batch, model, count),
        keypoints.numpy(),
        scores.numpy(),
        batch["keypoints"][-count:].numpy(),
        batch["visible"][-count:].numpy(),
        skeleton=state.model.skeleton,
    )
