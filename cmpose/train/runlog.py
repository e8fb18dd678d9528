"""A run's log: one JSON object a line, TensorBoard scalars and pictures, and metrics.json."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from cmpose.files import finite_or_none, write_text


def _step_of(line: str) -> float:
    """A log line's step; infinity for one that was cut when the process was killed."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class RunLog:
    """``log.jsonl`` and ``tensorboard/``.

    A run that goes on after ``step`` steps keeps its history up to there; what a killed run wrote
    after its last checkpoint is dropped, as those steps are taken again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "log.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """A line, and a scalar for every number in it."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        self._lines.write(json.dumps(finite_or_none(line)) + "\n")
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """An RGB picture, uint8 [H, W, 3]."""
        self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        self._lines.close()
        self._board.close()
