"""Several processes: DDP, shards and their checkpoints, compression, compiling, restarts.

The processes are gloo's, on the CPU. One pair of them makes all runs that tests compare.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from cmpose import config as configuration
from cmpose import distributed
from cmpose.config import TrainConfig
from cmpose.distributed import World
from cmpose.files import claim
from cmpose.models.weights import checkpoint
from cmpose.train.elastic import is_restart, mark_begun
from cmpose.train.parallel import check_parallel
from cmpose.train.train import train
from tests.recipes import FINE, recipe, write_recipe
from tests.train import several
from tests.train.test_train import lines, weights
from tests.zygote import Zygote

PLAIN = FINE | {"train.batch_size": 6, "train.epochs": 2, "train.lr": 0.3}
LEARN = FINE | {
    "model.drop_path": 0.2,
    "model.depth": 2,
    "train.epochs": 1,
    "train.batch_size": 4,
    "train.accumulate": 2,
    "train.checkpoint_every": 2,
}
"""Four steps of AdamW, with what else could differ between processes."""

SHARDS = {"train.distributed": "fsdp"}
RUNS = {
    "plain": PLAIN,
    "single precision": PLAIN | {"train.batch_size": 14, "train.epochs": 1, "data.warp": "device"},
    "compiled": {"train.epochs": 1, "train.lr": 0.3, "train.speed": "compile"},
    "ddp": LEARN,
    # Also recomputed: a block's weights are gathered once more for that.
    "fsdp": LEARN | SHARDS | {"model.checkpoint_activations": True},
    # One process is to draw what two do.
    "uninterrupted": LEARN | {"train.accumulate": 1, "model.drop_path_selection": "bernoulli"},
    "fails": SHARDS | {"train.lr": 1e30, "train.clip_norm": 0.0},
    "taken": {"train.epochs": 1},
}
HALFWAY = checkpoint.name_of(2)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def run_together(zygote: Zygote, root: Path, jobs: list[list]) -> list[int]:
    """The exit codes of two processes that go through the jobs, see ``tests/train/several.py``."""
    jobs = [[*job, port] for job, port in zip(jobs, free_ports(len(jobs)), strict=True)]
    with claim(root / "taken", "train", "--output"):
        ended = zygote.call(several.go_through, jobs, root)
    assert ended.status == 0, ended.output
    return json.loads((root / "codes.json").read_text())


def errors(root: Path) -> str:
    return "".join((root / f"errors{rank}").read_text() for rank in "01")


@pytest.fixture(scope="module")
def pair(zygote, rendered, tmp_path_factory):
    """The folder with what a pair of processes has made: RUNS by name, and more."""
    root = tmp_path_factory.mktemp("pair")
    files = {}
    for name, fields in RUNS.items():
        files[name] = str(write_recipe(root / f"{name}.yaml", recipe(rendered, **fields)))

    def run(kind, name, *more, output=None):
        return [kind, [files[name], str(root / (output or name)), *more]]

    jobs = [
        run("descend", "plain", "float64"),
        run("descend", "single precision", "float32"),
        run("descend", "compiled", "float64"),
        run("train", "ddp", "float64"),
        run("train", "fsdp", "float64"),
        run("train", "uninterrupted", "float32"),
        run("fail", "fails"),
        run("fail", "taken"),
        run(
            "train",
            "fsdp",
            "float64",
            str(root / "ddp" / "checkpoints" / HALFWAY),
            output="ddp-fsdp",
        ),
        run(
            "train",
            "ddp",
            "float64",
            str(root / "fsdp" / "checkpoints" / HALFWAY),
            output="fsdp-ddp",
        ),
        run("gradients", "plain", output="."),
    ]
    codes = run_together(zygote, root, jobs)
    if {-signal.SIGABRT, -signal.SIGSEGV} & {*codes}:
        # In one of some 60 runs torch's own threads broke a process's heap, at a place that neither
        # glibc's checks nor valgrind found in others. What fails each time fails here, too.
        warnings.warn(f"a process died of a signal ({codes}): {errors(root)}", stacklevel=1)
        for folder in filter(Path.is_dir, root.iterdir()):
            shutil.rmtree(folder)
        codes = run_together(zygote, root, jobs)
    assert codes == [0, 0], errors(root)
    return SimpleNamespace(root=root, files=files)


@pytest.mark.parametrize("name", ["single precision", "plain", "compiled"])
def test_two_processes_match_one(pair, tmp_path, name):
    """The same global batch on one and on two gloo processes, by plain gradient descent.

    AdamW would turn rounding in tiny gradients into whole steps, and in single precision a few
    steps of a deep network amplify rounding a thousandfold. So weights are compared after one
    step in float32, and after several in float64, where only a real difference could show.
    The two compiled processes are compared with one that is not.
    """
    single = name == "single precision"
    two, one = pair.root / name, tmp_path / "one"
    file = Path(pair.files[name])
    if name == "compiled":
        config = configuration.load(file, **{"train.speed": "eager"})
        file = write_recipe(tmp_path / "eager.yaml", config)
    several.descend(str(file), str(one), "float32" if single else "float64")
    assert len(lines(one)) == len(lines(two)) == (1 if single else 4)
    for a, b in zip(lines(one), lines(two), strict=True):
        for term in ("pose", "mask", "noise", "gradient_norm"):
            assert b[term] == pytest.approx(a[term], rel=1e-5), (a["step"], term)
    start, w1, w2 = load_file(one / "start.safetensors"), weights(one), weights(two)
    learnt = 0
    for key in (k for k in w1 if w1[k].is_floating_point()):
        moved = (w1[key] - start[key]).norm()
        learnt += bool(moved > 1e-4)
        rounding = 1e-9 + 2**-23 * w1[key].norm() if single else 1e-12
        assert (w1[key] - w2[key]).norm() <= rounding + (1e-3 if single else 1e-7) * moved, key
    assert learnt > len(w1) // 2
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, two)]
    assert metrics[0]["clips"] == metrics[1]["clips"]


def test_a_folder_in_use_is_refused_with_the_same_words(pair):
    """The main process alone meets the lock."""
    for rank in (0, 1):
        message = (pair.root / "taken" / f"message{rank}").read_text()
        assert re.search(r"taken: another cmpose train is writing there", message)


# -- shards ---------------------------------------------------------------------------------------


def same_in_double(run, other, since=0):
    """AdamW's runs in float64: losses from a step on, and weights, equal but for rounding."""
    log = [line for line in lines(run) if line["step"] > since]
    assert len(log) == 4 - since
    for a, b in zip(log, lines(other), strict=True):
        for term in ("loss", "pose", "mask", "noise", "selection", "gradient_norm"):
            assert b[term] == pytest.approx(a[term], rel=1e-6), (a["step"], term)  # kept in float32
    expected, actual = weights(run), weights(other)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, k=key: k + m
        )


def test_shards_learn_what_whole_weights_do(pair):
    """Gradients, their norm, AdamW, drop path, micro-batches, recomputed blocks, evaluation."""
    ddp, fsdp = pair.root / "ddp", pair.root / "fsdp"
    same_in_double(ddp, fsdp)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (ddp, fsdp)]
    assert metrics[0]["ap"] == metrics[1]["ap"]
    assert metrics[0]["causal_hit_rate"] == metrics[1]["causal_hit_rate"]


def test_checkpoints_hold_the_same_with_and_without_shards(pair):
    ddp, fsdp = (
        checkpoint.load_state(pair.root / name / "checkpoints" / HALFWAY)["optimizer"]
        for name in ("ddp", "fsdp")
    )
    assert ddp["param_groups"] == fsdp["param_groups"]
    assert ddp["state"].keys() == fsdp["state"].keys()
    for index, moments in ddp["state"].items():
        for name, value in moments.items():
            assert type(fsdp["state"][index][name]) is torch.Tensor
            torch.testing.assert_close(fsdp["state"][index][name], value, rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_with_shards_without_them_and_alone(pair, tmp_path):
    """From two processes' checkpoint to two otherwise, and to one: the batch is all processes'."""
    same_in_double(pair.root / "ddp", pair.root / "ddp-fsdp", since=2)
    same_in_double(pair.root / "ddp", pair.root / "fsdp-ddp", since=2)
    # Alone there is one micro-batch for two, so that batch norms see the same clips.
    file = write_recipe(
        tmp_path / "alone.yaml",
        configuration.load(pair.files["uninterrupted"], **{"train.device": "cpu"}),
    )
    whole = pair.root / "uninterrupted" / "checkpoints" / HALFWAY
    several.train(str(file), str(tmp_path / "alone"), "float32", str(whole))
    log = [line for line in lines(pair.root / "uninterrupted") if line["step"] > 2]
    for a, b in zip(log, lines(tmp_path / "alone"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4), a["step"]


def test_a_failure_over_shards_is_found_and_saved(pair):
    messages = [(pair.root / "fails" / f"message{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert re.match(r"step \d+: not finite \(loss ", messages[0])
    [folder] = (pair.root / "fails" / "checkpoints").glob("nonfinite-step-*")
    state = checkpoint.load_state(folder)
    assert state["step"] > 0
    assert len(state["clips"]) == 4
    weights_saved = checkpoint.load_weights(folder)
    assert all(weights_saved[key].isfinite().all() for key in weights_saved if "running" not in key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speed": "compile"}, r"train\.distributed='fsdp' .*train\.speed='compile' .*speed=eager"),
        ({"precision": "fp16"}, r"train\.distributed='fsdp' .*precision='fp16' .*precision=bf16"),
    ],
)
def test_what_cannot_be_in_shards_is_refused(fields, message):
    train_fields = TrainConfig(distributed="fsdp", **fields)
    with pytest.raises(ValueError, match=message):
        check_parallel(train_fields, World(0, 2, torch.device("cpu")))
    check_parallel(train_fields, World(0, 1, torch.device("cpu")))  # nothing is in shards then


def test_a_way_to_share_that_does_not_exist_is_named(rendered):
    for name in ("distributed", "gradient_compression"):
        with pytest.raises(ValueError, match=rf"train\.{name}"):
            recipe(rendered, **{f"train.{name}": "zip"})


# -- compression ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_compressed_gradients_differ_by_bfloat16s_rounding(pair, way):
    """Each process rounds its gradient once, the sum is rounded once: unit roundoff 2⁻⁸."""
    first, second = (load_file(pair.root / f"{rank}.safetensors") for rank in (0, 1))
    unit, names = 2.0**-8, [key[4:] for key in first if key.startswith("own/")]
    worst = 0.0
    for name in names:
        a, b = (own[f"own/{name}"].double() for own in (first, second))
        mean, size = (a + b) / 2, (a.abs() + b.abs()) / 2
        exact, rounded = (first[f"{way}.{kind}/{name}"] for kind in ("none", "bf16"))
        for kind in ("none", "bf16"):  # the same on both
            assert torch.equal(first[f"{way}.{kind}/{name}"], second[f"{way}.{kind}/{name}"])
        assert ((exact - mean).abs() <= 2.0**-23 * size).all(), name
        assert torch.equal(rounded, rounded.bfloat16().float()), name
        error = (rounded - mean).abs()
        # Rounded gradients that nearly cancel are rounded as large as they are.
        assert (error <= unit * (size + mean.abs() + unit * size) + 1e-37).all(), name
        worst = max(worst, float((error / size.clamp(min=1e-30)).max()))
    assert worst > unit / 4, "nothing was compressed"


# -- restarts -------------------------------------------------------------------------------------


def test_a_killed_process_costs_a_restart_and_nothing_else(zygote, pair, tmp_path):
    """SIGKILL before the first checkpoint, and again after one: bit for bit the same result."""
    output = tmp_path / "run"
    done = zygote.call(several.launch, pair.files["uninterrupted"], str(output))
    assert done.status == 0, done.output
    assert done.output.count("resuming from") == 1
    assert f"resuming from {output / 'checkpoints' / HALFWAY}" in done.output
    expected, actual = weights(pair.root / "uninterrupted"), weights(output)
    assert expected.keys() == actual.keys()
    assert [key for key in expected if not torch.equal(expected[key], actual[key])] == []
    free = ("time", "clips_per_second")
    logs = [
        [{k: v for k, v in line.items() if k not in free} for line in lines(run)]
        for run in (pair.root / "uninterrupted", output)
    ]
    assert logs[0] == logs[1], "a step's line is there once"


def test_restarts_on_several_nodes_need_a_store_each(monkeypatch):
    monkeypatch.setattr(distributed, "rendezvous", lambda _: iter([("store", 0, 4)]))
    values = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": "3", "RESTART_COUNT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"max-restarts=3 .*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed._meeting_point()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert distributed._meeting_point() == "store"


@pytest.mark.parametrize(
    ("before", "launch", "restarts", "again"),
    [
        ("none", "none", 1, True),
        ("none", "none", 0, False),  # another launch without an id
        ("job 7", "job 7", 1, True),
        ("job 7", "job 7", 0, True),  # a node that replaces another counts no restart
        ("job 7", "job 8", 1, False),
        ("", "none", 1, False),
        ("job 7", "", 0, False),  # not by torchrun
    ],
)
def test_only_the_launch_that_began_a_run_goes_on_by_itself(
    tmp_path, monkeypatch, before, launch, restarts, again
):
    alone = World(0, 1, torch.device("cpu"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", before)
    mark_begun(tmp_path, alone)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    assert is_restart(tmp_path, alone) is again
    # A launch that was refused is refused again after its restart.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts + 1))
    assert is_restart(tmp_path, alone) is again


def test_a_refused_launch_is_refused_after_its_restart_too(rendered, tmp_path, monkeypatch):
    config = recipe(rendered, **{"train.epochs": 1})
    train(config, tmp_path, progress=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for restarts in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        with pytest.raises(FileExistsError, match=r"already holds a run.*--resume"):
            train(config, tmp_path, progress=False)
