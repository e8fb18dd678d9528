"""train.speed: what eager, compile and graph share, and what a captured step must take care of.

Without a GPU the capture is a stand-in that repeats the recorded call: buffers, rates, seeds and
failures are then as in a CUDA graph, the capture itself is not. With a GPU the last tests capture.
"""

from __future__ import annotations

import functools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cmpose.evaluation.evaluate as evaluation
import cmpose.train.step as step_module
from cmpose import config as configuration
from cmpose.config import TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from cmpose.train import batches, state, trainer
from cmpose.train.step import (
    CapturedStep,
    FiniteWatch,
    LossModule,
    StepOutput,
    check_speed,
    settled_speed,
)
from cmpose.train.train import Interrupted, NonFiniteLoss, OutOfMemory, train
from tests.recipes import FINE, interrupt_after, recipe
from tests.train.test_train import lines, weights

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="captures a CUDA graph: no GPU"
)


class Repeat:
    """A capture that repeats the call into results that stay where they are."""

    def __init__(self) -> None:
        self.call, self.output, self.replays = None, None, 0

    def warm_up(self, call):
        return call()

    def record(self, call):
        assert self.call is None, "captured twice"
        self.call = call

    def replay(self):
        self.replays += 1
        output = self.call()
        if self.output is None:
            self.output = StepOutput(*(part.clone() for part in output))
        for buffer, part in zip(self.output, output, strict=True):
            buffer.copy_(part)
        return self.output


@pytest.fixture
def captures(monkeypatch):
    """Captured steps on a CPU, not compiled; gives the captures that were made."""
    captured: list[Repeat] = []

    def capture_on(device):
        captured.append(Repeat())
        return captured[-1]

    monkeypatch.setattr(step_module, "capture_on", capture_on)
    monkeypatch.setattr(trainer, "capture_on", capture_on)
    monkeypatch.setattr(state, "LossModule", lambda core, compiled: LossModule(core))
    return captured


def trained(rendered, folder, **fields):
    train(recipe(rendered, **fields), folder, progress=False)
    return weights(folder), lines(folder)


DEEP = FINE | {
    "model.drop_path": 0.2,
    "model.depth": 2,
    "train.accumulate": 2,
    "train.schedule": "one_cycle",
    "train.epochs": 3,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 100,
}


def test_a_compiled_run_learns_the_same(rendered, tmp_path, monkeypatch):
    """In double precision, where only a real difference shows; drop path and noise too."""
    monkeypatch.setattr(step_module, "COMPILER", "aot_eager")
    double = functools.partial(evaluation.clip_images, dtype=torch.float64)
    monkeypatch.setattr(batches, "clip_images", double)
    monkeypatch.setattr(evaluation, "clip_images", double)
    monkeypatch.setattr(state, "CMPose", lambda model: CMPose(model).double())
    torch._dynamo.reset()
    fields = DEEP | {"train.accumulate": 1}
    w, logs = trained(rendered, tmp_path / "eager", **fields)
    compiled, other = trained(
        rendered, tmp_path / "compile", **fields, **{"train.speed": "compile"}
    )
    for a, b in zip(logs, other, strict=True):
        for term in ("loss", "pose", "mask", "noise", "selection", "gradient_norm"):
            assert b[term] == pytest.approx(a[term], rel=1e-6), (a["step"], term)  # kept in float32
    for key, value in compiled.items():
        torch.testing.assert_close(value, w[key], rtol=1e-7, atol=1e-9, msg=lambda m, k=key: k + m)


def test_a_captured_run_learns_the_same_bit_for_bit(rendered, tmp_path, captures):
    """Noise, drop path and a rate that changes at every step reach the captured step."""
    w, logs = trained(rendered, tmp_path / "eager", **DEEP)
    captured, other = trained(rendered, tmp_path / "graph", **DEEP, **{"train.speed": "graph"})
    [capture] = [one for one in captures if one.call is not None]
    assert capture.replays == len(logs) - step_module.WARM_UP >= 2
    assert len({line["lr"] for line in logs}) == len(logs)
    free = ("time", "clips_per_second")
    for a, b in zip(logs, other, strict=True):
        assert {k: v for k, v in a.items() if k not in free} == {
            k: v for k, v in b.items() if k not in free
        }
    assert all(torch.equal(captured[key], w[key]) for key in w)


def test_bfloat16_stays_within_what_another_seed_changes(rendered, tmp_path):
    """The same loss curve: closer to float32's than two seeds' curves are to each other."""
    fields = {"train.epochs": 3}
    runs = {
        "float32": {},
        "seed": {"train.seed": 1},
        "bfloat16": {"train.precision": "bf16"},
    }
    curve = {}
    for name, more in runs.items():
        curve[name] = [
            line["loss"] for line in trained(rendered, tmp_path / name, **fields | more)[1]
        ]
    exact = np.array(curve["float32"])
    assert len(exact) >= 12
    noise = np.abs(np.array(curve["seed"]) - exact).mean()
    rounding = np.abs(np.array(curve["bfloat16"]) - exact).mean()
    assert 0 < rounding < 0.5 * noise
    assert exact[-4:].mean() < exact[:4].mean(), "it learns"


def test_a_captured_run_resumes_exactly(rendered, tmp_path, captures, monkeypatch):
    fields = DEEP | {"train.speed": "graph"}
    expected, _ = trained(rendered, tmp_path / "straight", **fields)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(Interrupted, match="stopped after step 4"):
            trained(rendered, tmp_path / "run", **fields)
    folder = checkpoint.training_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    groups = checkpoint.load_state(folder)["optimizer"]["param_groups"]
    assert {type(group["lr"]) for group in groups} == {float}
    shutil.copytree(tmp_path / "run", tmp_path / "eager")
    for folder, speed in (("run", "graph"), ("eager", "eager")):  # it may change in a run
        changed = recipe(rendered, **fields | {"train.speed": speed})
        train(changed, tmp_path / folder, resume=True, progress=False)
        actual = weights(tmp_path / folder)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)


class Broken(Repeat):
    """A capture that fails."""

    def record(self, call):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


def test_a_failed_capture_goes_on_without_it(rendered, tmp_path, captures, monkeypatch, capsys):
    expected, _ = trained(rendered, tmp_path / "eager", **DEEP)
    monkeypatch.setattr(trainer, "capture_on", lambda device: Broken())
    actual, _ = trained(rendered, tmp_path / "graph", **DEEP, **{"train.speed": "graph"})
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert printed.startswith(
        "train.speed=graph failed (operation not permitted when stream is capturing); training "
        "goes on with train.speed=eager"
    )
    assert checkpoint.load_config(tmp_path / "graph" / "model").train.speed == "eager"


def test_a_failed_compile_goes_on_without_it(rendered, tmp_path, monkeypatch, capsys):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler")

    fields = {"train.epochs": 1}
    expected, _ = trained(rendered, tmp_path / "eager", **fields)
    monkeypatch.setattr(step_module, "COMPILER", no_compiler)
    torch._dynamo.reset()
    actual, _ = trained(rendered, tmp_path / "compile", **fields, **{"train.speed": "compile"})
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert "train.speed=compile failed (" in capsys.readouterr().err


def test_an_error_of_the_step_itself_is_no_failed_compile(rendered, tmp_path, monkeypatch):
    def broken(self, batch):
        raise RuntimeError("a fault of the step")

    monkeypatch.setattr(trainer.TrainingStep, "__call__", broken)
    with pytest.raises(RuntimeError, match="a fault of the step"):
        trained(rendered, tmp_path / "run", **{"train.speed": "compile"})


@pytest.mark.parametrize(
    ("fields", "device", "processes", "speed"),
    [
        ({}, "cpu", 1, "eager"),
        ({}, "cuda", 1, "graph"),
        ({"precision": "fp16"}, "cuda", 1, "compile"),
        ({"products": "fp16_accumulate_emulated"}, "cuda", 1, "eager"),
        ({}, "cuda", 2, "compile"),
        ({"distributed": "fsdp"}, "cuda", 2, "eager"),
        ({"distributed": "fsdp"}, "cuda", 1, "graph"),
        ({"speed": "eager"}, "cuda", 1, "eager"),
        ({"speed": "graph"}, "cpu", 1, "graph"),
    ],
)
def test_what_auto_stands_for(fields, device, processes, speed):
    world = World(0, processes, torch.device(device))
    assert settled_speed(TrainConfig(**fields), world) == speed


def test_recomputed_activations_change_no_bit_and_may_change_in_a_run(rendered, tmp_path):
    fields = FINE | {"model.drop_path": 0.3, "model.depth": 2, "train.epochs": 1}
    a, _ = trained(rendered, tmp_path / "kept", **fields)
    recomputed = fields | {"model.checkpoint_activations": True}
    b, _ = trained(rendered, tmp_path / "again", **recomputed)
    assert all(torch.equal(a[key], b[key]) for key in a)
    recomputed |= {"model.drop_path_selection": "bernoulli"}  # which frames are left out may too
    train(recipe(rendered, **recomputed), tmp_path / "kept", resume=True, progress=False)


# -- failures -------------------------------------------------------------------------------------


def test_a_failure_found_late_is_the_same_failure(rendered, tmp_path):
    """Looking every step or at the end: step, terms, clips and the weights before it are equal."""
    messages, states, saved = [], [], []
    for name, every in (("each", 1), ("late", 1000)):
        fields = {"train.lr": 1e30, "train.clip_norm": 0.0, "train.log_every": every}
        with pytest.raises(NonFiniteLoss) as raised:
            train(recipe(rendered, **FINE, **fields), tmp_path / name, progress=False)
        messages.append(str(raised.value).partition("; the state")[0])
        [folder] = (tmp_path / name / "checkpoints").glob("nonfinite-step-*")
        states.append(checkpoint.load_state(folder))
        saved.append(checkpoint.load_weights(folder))
    assert re.match(r"step \d+: not finite \(loss ", messages[0])
    assert messages[0] == messages[1]
    assert states[0]["step"] == states[1]["step"] > 0
    assert states[0]["clips"] == states[1]["clips"]
    trainable = [key for key in saved[0] if "running" not in key and "batches" not in key]
    assert all(torch.equal(saved[0][key], saved[1][key]) for key in trainable)
    assert all(saved[1][key].isfinite().all() for key in trainable)
    first, second = (state["optimizer"]["state"] for state in states)
    for index, moments in first.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key], second[index][key])


def observe(watch, step, loss, norm=1.0, norm_counts=True):
    terms = torch.tensor([loss, 1.0, 2.0, 3.0, 4.0])
    watch.observe(torch.tensor(step), terms, torch.tensor(norm), norm_counts=norm_counts)


def test_the_watch_keeps_the_first_failure_and_holds_the_optimiser():
    watch = FiniteWatch(CPU)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    optimizer.found_inf = watch.halted
    for step, loss in enumerate((1.0, float("nan"), 5.0, float("inf"))):
        before = weight.detach().clone()
        observe(watch, step, loss)
        weight.grad = torch.full((3,), loss)
        optimizer.step()
        assert torch.equal(weight, before) is (step > 0)
        assert (watch.read() is None) is (step == 0)
    step, terms, norm = watch.read()
    assert (step, norm) == (1, 1.0)
    assert terms["loss"] != terms["loss"]
    assert terms["pose"] == 1.0
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.parametrize(("counts", "failed"), [(True, True), (False, False)])
def test_an_infinite_gradient_fails_unless_losses_are_scaled(counts, failed):
    watch = FiniteWatch(CPU)
    observe(watch, 7, 1.0, norm=float("inf"), norm_counts=counts)
    assert (watch.read() is not None) is failed


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0"),
            "CUDA ou",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate 9 bytes"
            ),
            "DefaultCPUAllocator: can't allocate 9 bytes",
        ),
    ],
)
def test_out_of_memory_names_the_fields(error, reason, rendered, tmp_path, monkeypatch):
    def full(self, batch):
        raise error

    monkeypatch.setattr(trainer.Trainer, "step", full)
    message = (
        r"does not hold a step of train\.batch_size=4 in train\.accumulate=1 part\(s\) "
        rf"\(.*{reason}.*\): set train\.precision=bf16, then "
        r"model\.checkpoint_activations=true, then train\.accumulate=2, then a smaller "
        r"train\.batch_size; `cmpose train --dry-run`"
    )
    with pytest.raises(OutOfMemory, match=message):
        train(recipe(rendered), tmp_path / "run", progress=False)


# -- the captured step's bookkeeping --------------------------------------------------------------


def batch_of(value: float, size: int = 2) -> dict[str, torch.Tensor]:
    return {
        "images": torch.full((size, 3), value),
        "seed": torch.tensor([int(value) << 40]),
    }


def outputs(batch):
    total = batch["images"].sum() + (batch["seed"] >> 40)
    return StepOutput(total, batch["images"].max(), batch["images"] * 2)


def test_a_captured_step_reads_each_batch_from_the_same_buffers():
    capture = Repeat()
    step = CapturedStep(outputs, capture, warm_up=2)
    inputs = [batch_of(value) for value in (1.0, 2.0, 3.0, 4.0, 5.0)]
    results, places = [], set()
    for batch in inputs:
        results.append(step(batch))
        places.add(tuple(buffer.data_ptr() for buffer in step.buffers.values()))
    assert len(places) == 1
    assert inputs[0]["images"].data_ptr() not in next(iter(places))
    assert capture.replays == 3
    for batch, result in zip(inputs, results, strict=True):  # none was written over by a later one
        for actual, expected in zip(result, outputs(batch), strict=True):
            assert torch.equal(actual, expected)


def test_a_captured_step_has_one_shape():
    step = CapturedStep(outputs, Repeat())
    step(batch_of(1.0))
    message = (
        r"train\.speed='graph': images is \[1, 3\] .*captured for \[2, 3\].*train\.speed=compile"
    )
    with pytest.raises(ValueError, match=message):
        step(batch_of(1.0, size=1))
    with pytest.raises(ValueError, match=r"images is .*float64.*float32"):
        step({name: value.double() for name, value in batch_of(1.0).items()})


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({}, World(0, 1, CPU), r"train\.speed='graph' captures a CUDA graph, but .* is cpu"),
        ({}, World(0, 2, torch.device("cuda", 0)), r"one process, there are 2: .*compile"),
        (
            {"precision": "fp16"},
            World(0, 1, torch.device("cuda", 0)),
            r"train\.speed='graph' cannot scale losses.*train\.precision=bf16",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(monkeypatch, fields, world, message):
    monkeypatch.setattr(step_module, "CudaCapture", lambda device: SimpleNamespace())
    with pytest.raises(ValueError, match=message):
        check_speed(TrainConfig(speed="graph", **fields), world)
    for speed in ("eager", "compile"):
        check_speed(TrainConfig(speed=speed, **fields), world)


def test_a_graph_on_a_cpu_is_refused_before_anything_runs(rendered, tmp_path):
    with pytest.raises(ValueError, match=r"train\.speed='graph'.*use train\.speed=eager"):
        train(recipe(rendered, **{"train.speed": "graph"}), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_speed_that_does_not_exist_is_named(rendered):
    with pytest.raises(ValueError, match=r"train\.speed"):
        recipe(rendered, **{"train.speed": "warp"})
    values = configuration.to_dict(recipe(rendered, **{"train.speed": "graph"}))
    assert configuration.from_dict(values).train.speed == "graph"


# -- on a card ------------------------------------------------------------------------------------


@needs_gpu
def test_a_captured_run_on_a_card_learns_what_eager_does(rendered, tmp_path):
    """The same losses step by step: fresh noise and drop path, rates that change, no NaN."""
    logs = []
    for speed in ("eager", "compile", "graph"):
        fields = DEEP | {"train.speed": speed, "train.device": "cuda", "train.epochs": 5}
        train(recipe(rendered, **fields), tmp_path / speed, progress=False)
        logs.append(lines(tmp_path / speed))
    assert len(logs[0]) > step_module.WARM_UP + 2
    for other in logs[1:]:
        for a, b in zip(logs[0], other, strict=True):
            for term in ("pose", "mask", "noise", "selection"):  # AdamW enlarges rounding
                assert b[term] == pytest.approx(a[term], rel=3e-2), (a["step"], term)


@needs_gpu
def test_a_failure_on_a_card_is_found_in_a_graph(rendered, tmp_path):
    fields = {"train.lr": 1e30, "train.clip_norm": 0.0, "train.device": "cuda"}
    config = recipe(rendered, **FINE, **fields, **{"train.speed": "graph", "train.epochs": 5})
    with pytest.raises(NonFiniteLoss, match=r"step \d+: not finite"):
        train(config, tmp_path / "run", progress=False)
    [folder] = (tmp_path / "run" / "checkpoints").glob("nonfinite-step-*")
    assert load_file(folder / "model.safetensors")
