"""A recipe small enough for tests of training, and how to run the command line and end it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.train.step import StepOutput
from cmpose.train.trainer import Trainer
from tests.shared_data import PROJECT


def recipe(root: Path, **fields) -> Config:
    """Seconds of training on the ``rendered`` fixture; dotted ``fields`` come on top."""
    values: dict = {
        "model": {
            "backbone": "tiny",
            "depth": 1,
            "image_size": [64, 48],
            "mlp_ratio": 1.25,
            "tokens_per_keypoint": 0,
            "fine": "off",
            "head_channels": 8,
        },
        "data": {"root": str(root), "num_workers": 0},
        "train": {
            "epochs": 2,
            "batch_size": 4,
            "lr": 1e-3,
            "warmup_steps": 0,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
            "pictures_every": 0,
            "evaluate_every": 0,
        },
    }
    for dotted, value in fields.items():
        section, name = dotted.split(".", 1)
        values[section][name] = value
    return configuration.from_dict(values)


FINE = {
    "model.image_size": [64, 64],
    "model.fine": "full",
    "model.tokens_per_keypoint": 1,
    "model.num_clusters": 1,
    "model.neighbors": 1,
}
"""Fields that put Fine Token Enhancement into the recipe (16 tokens: 15 causal, 1 merged)."""


def run_cli(
    *arguments: str, threads: int = 1, processes: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``cmpose ...`` in a process of its own, or in several by ``torchrun``."""
    return subprocess.run(
        command(*arguments, processes=processes),
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def command(*arguments: str, processes: int = 1) -> list[str]:
    """The command line of ``cmpose ...``."""
    if processes == 1:
        return [sys.executable, "-m", "cmpose", *arguments]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "-m",
        "cmpose",
        *arguments,
    ]


def one_thread() -> dict[str, str]:
    """The environment with one OpenMP thread, so that sums have one order."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def write_recipe(path: Path, config: Config) -> Path:
    """Writes a recipe as YAML (JSON is YAML)."""
    path.write_text(json.dumps(configuration.to_dict(config)))
    return path


def interrupt_after(
    monkeypatch: pytest.MonkeyPatch, steps: int, number: int = signal.SIGINT
) -> None:
    """The signal comes in the last of so many training steps, until ``monkeypatch`` is undone."""
    original = Trainer.step

    def interrupting(self: Trainer, batch: dict[str, Tensor]) -> StepOutput:
        if self.state.step == steps - 1:
            signal.raise_signal(number)
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", interrupting)


def children_of(pid: int) -> list[str]:
    """The processes that a process has started and that are there, on Linux."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def is_alive(pid: str) -> bool:
    """Whether a process is there and no zombie."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return not re.search(r"^State:\s+Z", status, re.MULTILINE)
