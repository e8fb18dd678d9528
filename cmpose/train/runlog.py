"""A run's log: one JSON object a line, and TensorBoard's scalars and pictures."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from cmpose.data.formats.reader import convert, parse
from cmpose.data.formats.run import LogLine
from cmpose.files import finite_or_none, write_text, writing
from cmpose.train.state import RESUME


def _step_of(line: str) -> float:
    """The step of a log line; infinity for a line that a killed process has cut off."""
    try:
        return convert(parse(line.encode(), "", ValueError), LogLine, "", ValueError).step
    except ValueError:
        return math.inf


class RunLog:
    """``log.jsonl`` and ``tensorboard/`` in a run's folder.

    Args:
        folder: of the run.
        step: how many steps have been taken. Lines of later steps are dropped: a killed run wrote
            them after its last checkpoint, and these steps are taken again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._path = folder / "log.jsonl"
        if self._path.is_file():
            lines = [
                line
                for line in self._path.read_text(errors="replace").splitlines()
                if _step_of(line) <= step
            ]
            write_text(self._path, "".join(f"{line}\n" for line in lines), RESUME)
        self._excepthook = threading.excepthook
        threading.excepthook = self._without_tensorboards_failures
        with writing(self._path, RESUME):
            self._lines = self._path.open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def _without_tensorboards_failures(self, args: threading.ExceptHookArgs) -> None:
        """Prints no traceback when TensorBoard's thread cannot write: :meth:`write` raises then."""
        tensorboards = type(args.thread).__module__.startswith("tensorboard")
        if not (tensorboards and isinstance(args.exc_value, OSError)):
            self._excepthook(args)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes a line, and a scalar for every number in it.

        Args:
            kind: ``train`` or ``evaluate``.
            step: how many steps have been taken.
            values: by name.

        Raises:
            OutputError: when it cannot be written.
        """
        line = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        with writing(self._path, RESUME):
            self._lines.write(json.dumps(finite_or_none(line)) + "\n")
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, picture: np.ndarray) -> None:
        """Shows an RGB picture, uint8 [H, W, 3], in TensorBoard."""
        with writing(self._path, RESUME):
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is left."""
        try:
            with writing(self._path, RESUME):
                self._lines.close()
                self._board.close()
        finally:
            threading.excepthook = self._excepthook
