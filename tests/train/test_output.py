"""A run's folder: one writer, leftovers of a killed run, a full disk, workers of a killed run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch import Tensor

from cmpose import files
from cmpose.files import InUse, OutputError, claim
from cmpose.models.weights import checkpoint
from cmpose.train.step import StepOutput
from cmpose.train.train import train
from cmpose.train.trainer import Trainer
from tests.recipes import (
    children_of,
    command,
    is_alive,
    one_thread,
    recipe,
    write_recipe,
)
from tests.shared_data import PROJECT
from tests.small_disk import small_disk


def test_a_second_training_in_a_folder_is_refused(rendered, tmp_path):
    config, run = recipe(rendered, **{"train.epochs": 1}), tmp_path / "run"
    with (
        claim(run, "train", "--output"),
        pytest.raises(InUse, match=r"run: another cmpose train .*give another --output"),
    ):
        train(config, run, progress=False)
    train(config, run, progress=False)


def test_a_replaced_model_comes_back_after_a_kill(rendered, tmp_path):
    """Between the two renames of a folder that is replaced there is none of that name."""
    config, run = recipe(rendered, **{"train.epochs": 1}), tmp_path / "run"
    train(config, run, progress=False)
    newest = checkpoint.training_checkpoints(run / "checkpoints")[-1]
    newest.rename(newest.with_name(f".{newest.name}{files._REPLACED}"))
    train(config, run, resume=True, progress=False)
    assert newest.is_dir()


def test_a_full_disk_stops_a_run_and_resume_goes_on(rendered, tmp_path):
    """Whichever file it is that does not fit: the message names it and says to free space."""
    config = recipe(rendered, **{"train.epochs": 1})
    with small_disk(tmp_path) as disk:
        message = (
            r"checkpoints/step-\d+: cannot be written: the disk is full; free some space, then go "
            r"on with --resume"
        )
        with pytest.raises(OutputError, match=message):
            train(config, disk / "run", progress=False)
        assert not list((disk / "run" / "checkpoints").iterdir())
        with (disk / "rest").open("wb", buffering=0) as rest, suppress(OSError):
            while rest.write(bytes(4096)):
                pass
        with pytest.raises(OutputError, match=r"cannot be written: the disk is full"):
            train(config, disk / "other", progress=False)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks at processes in /proc")
def test_loader_processes_end_with_a_killed_run(rendered, tmp_path):
    config = recipe(rendered, **{"data.num_workers": 2, "train.epochs": 100_000})
    file = str(write_recipe(tmp_path / "recipe.yaml", config))
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", "--config", file, "--output", str(run)),
        cwd=PROJECT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not ((run / "log.jsonl").is_file() and (run / "log.jsonl").read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = children_of(process.pid)
    assert len(children) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    while alive := [pid for pid in children if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)
    with claim(run, "train", "--output"):
        pass


@pytest.mark.parametrize("replaced", [True, False])
def test_a_folder_that_was_deleted_meanwhile_is_named(rendered, tmp_path, monkeypatch, replaced):
    config, run = recipe(rendered, **{"train.epochs": 1}), tmp_path / "run"
    original = Trainer.step

    def step(self: Trainer, batch: dict[str, Tensor]) -> StepOutput:
        if self.state.step == 1:
            os.rename(run, tmp_path / "moved")
            if replaced:
                run.write_text("a file in its place")
        return original(self, batch)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(OutputError, match=r"config\.json: is not there any more: put the run's fo"):
        train(config, run, progress=False)
    assert run.exists() == replaced, "a part of it would pass for the run"


def test_resuming_where_there_is_no_run_says_that_it_starts_anew(rendered, tmp_path, capsys):
    config = recipe(rendered, **{"train.epochs": 1})
    train(config, tmp_path / "run", resume=True, progress=False)
    note = f"{tmp_path / 'run'} holds no checkpoint to resume from: training starts anew"
    assert capsys.readouterr().out.count(note) == 1
    train(config, tmp_path / "run", resume=True, progress=False)
    assert note not in capsys.readouterr().out
