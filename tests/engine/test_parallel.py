"""Several processes: DDP, shards and their checkpoints, compression, compiling, restarts.

The processes are gloo's, on the CPU. One pair of them makes all runs that tests compare.
"""

from __future__ import annotations


import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cmpose.config import TrainConfig
from cmpose.engine import checkpoint
from cmpose.engine.distributed import World
from cmpose.engine.parallel import check_parallel
from cmpose.engine.train import train
from tests.engine import several
from tests.engine.recipes import FINE, command, one_thread, recipe, write_recipe
from tests.engine.test_train import lines, weights
from tests.shared_data import PROJECT

LEARN = {
    "model.drop_path": 0.2,
    "model.depth": 2,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 100,
}
"""Six steps of AdamW, with what else could differ between processes."""

SHARDS = {"train.distributed": "fsdp"}
PLAIN = {"train.batch_size": 6, "train.epochs": 2, "train.lr": 0.3}
RUNS = {
    "plain": PLAIN,
    "plain.float32": PLAIN
    | {"train.batch_size": 14, "train.epochs": 1, "data.warp": "device"},
    "plain.compiled": PLAIN | {"train.speed": "compile"},
    "ddp": LEARN,
    # Also recomputed: a block's weights are gathered once more for that.
    "fsdp": LEARN | SHARDS | {"model.checkpoint_activations": True},
    "whole": LEARN | {"train.accumulate": 1},
    "fails": SHARDS | {"train.lr": 1e30, "train.clip_norm": 0.0},
}
HALFWAY = checkpoint.name_of(4)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def pair(rendered, tmp_path_factory):
    """The folder with what a pair of processes has made: RUNS by name, and more."""
    root = tmp_path_factory.mktemp("pair")
    files = {}
    for name, fields in RUNS.items():
        files[name] = str(
            write_recipe(root / f"{name}.yaml", recipe(rendered, **FINE, **fields))
        )

    def run(kind, name, *more, output=None):
        return [kind, [files[name], str(root / (output or name)), *more]]

    jobs = [
        run("descend", "plain", "float64"),
        run("descend", "plain.float32", "float32"),
        run("descend", "plain.compiled", "float64"),
        run("train", "ddp", "float64"),
        run("train", "fsdp", "float64"),
        run("train", "whole", "float32"),
        run("fail", "fails"),
        run("train", "fsdp", "float64", str(root / "ddp" / "checkpoints" / HALFWAY),
            output="ddp-fsdp"),
        run("train", "ddp", "float64", str(root / "fsdp" / "checkpoints" / HALFWAY),
            output="fsdp-ddp"),
        run("gradients", "plain", output="."),
    ]
    jobs = [[*job, port] for job, port in zip(jobs, free_ports(len(jobs)), strict=True)]
    (root / "jobs.json").write_text(json.dumps(jobs))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.engine.several", str(root / "jobs.json")],
            cwd=PROJECT,
            env=one_thread()
            | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            stdout=subprocess.DEVNULL,
            stderr=(root / f"errors{rank}").open("w"),
        )
        for rank in "01"
    ]
    codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0, 0], "".join((root / f"errors{rank}").read_text() for rank in "01")
    return SimpleNamespace(root=root, files=files)


def test_debug(pair):
    pass
