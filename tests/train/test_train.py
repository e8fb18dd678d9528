"""Training: exact resume, interruptions, and what a run leaves behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmpose.models.weights import checkpoint
from cmpose.train import train as training
from cmpose.train.train import Interrupted, NonFiniteLoss, train
from tests.recipes import FINE, interrupt_after, recipe, write_recipe
from tests.zygote import KILLED


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def lines(run, kind="train"):
    parsed = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in parsed if line["kind"] == kind]


def test_a_run_learns_and_leaves_everything_behind(rendered, tmp_path):
    config = recipe(rendered, **{"train.epochs": 12, "train.pictures_every": 5})
    metrics = train(config, tmp_path / "run", progress=False)
    losses = [line["pose"] for line in lines(tmp_path / "run")]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(written["ap"]) == {"columns", "joints", "ap"}
    assert written["box_source"] == "ground truth"
    assert written["seconds"] > 0
    assert written["clips_per_second"] > 0
    assert written["ap"]["columns"] == metrics["ap"]["columns"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"checkpoints", "model", "predictions", "tensorboard", "log.jsonl"} <= names
    assert len(checkpoint.training_checkpoints(tmp_path / "run" / "checkpoints")) == 3
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert f"| Steps | {metrics['steps']} |" in card
    assert "/annotations/val` | ground truth |" in card
    model, loaded = checkpoint.load_model(tmp_path / "run")
    assert loaded.model == config.model
    assert not model.training
    first = lines(tmp_path / "run")[0]
    assert {"loss", "pose", "mask", "noise", "lr", "gradient_norm", "clips_per_second"} <= set(
        first
    )


def test_same_seed_same_weights_other_seed_other_weights(rendered, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = recipe(rendered, **{"train.seed": seed, "train.epochs": 1})
        train(config, tmp_path / name, progress=False)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_in_mid_epoch_and_resumed_is_bit_identical(zygote, rendered, tmp_path, workers):
    """SIGKILL after a checkpoint in the middle of an epoch, with drop path and augmentation on."""
    config = recipe(
        rendered,
        **FINE,
        **{
            "model.drop_path": 0.2,
            "model.depth": 2,
            "data.num_workers": workers,
            "train.epochs": 3,
            "train.batch_size": 3,
            "train.checkpoint_every": 2,
            "train.keep_checkpoints": 100,
        },
    )
    file = write_recipe(tmp_path / "recipe.yaml", config)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ("train", "--config", file, "--output")
    done = zygote.run(*command, whole)
    assert done.status == 0, done.output
    steps = json.loads((whole / "metrics.json").read_text())["steps"]
    per_epoch = steps // 3
    assert per_epoch % 2 == 1, "the recipe must put checkpoints inside epochs"

    killed = zygote.run(*command, cut, kill_at=done.renames // 3)
    assert killed.status == KILLED, killed.output
    assert not (cut / "model").exists()
    last = checkpoint.training_checkpoints(cut / "checkpoints")[-1]
    assert 0 < int(last.name[-8:]) < steps
    assert int(last.name[-8:]) % per_epoch, "it was to be killed inside an epoch"

    again = zygote.run(*command, cut, "--resume")
    assert again.status == 0, again.output
    assert f"resuming from {last}" in again.output
    expected, actual = weights(whole), weights(cut)
    assert expected.keys() == actual.keys()
    different = [key for key in expected if not torch.equal(expected[key], actual[key])]
    assert different == []
    a, b = (checkpoint.training_checkpoints(run / "checkpoints")[-1] for run in (whole, cut))
    first, second = checkpoint.load_state(a)["optimizer"], checkpoint.load_state(b)["optimizer"]
    for index, state in first["state"].items():
        assert torch.equal(state["exp_avg_sq"], second["state"][index]["exp_avg_sq"])


def test_accumulation_divides_the_batch(rendered, tmp_path):
    """Without batch norm in train mode the pose loss of two halves is that of the whole."""
    logs = []
    for name, parts in (("whole", 1), ("halves", 2)):
        config = recipe(
            rendered,
            **{
                "model.head": "token",
                "model.stem": "patch",
                "train.accumulate": parts,
                "train.epochs": 1,
            },
        )
        train(config, tmp_path / name, progress=False)
        logs.append(lines(tmp_path / name))
    for a, b in zip(*logs, strict=True):
        assert b["pose"] == pytest.approx(a["pose"], rel=1e-3)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-2)


@pytest.mark.parametrize("fine", [False, True])
def test_nan_stops_with_step_terms_and_a_saved_state(rendered, tmp_path, fine):
    fields = FINE if fine else {}
    config = recipe(rendered, **fields, **{"train.lr": 1e30, "train.clip_norm": 0.0})
    with pytest.raises(NonFiniteLoss, match=r"step \d+: not finite \(loss .*pose .*mask .*noise"):
        train(config, tmp_path / "run", progress=False)
    [saved] = (tmp_path / "run" / "checkpoints").glob("nonfinite-step-*")
    state = checkpoint.load_state(saved)
    assert len(state["clips"]) == 4
    assert state["step"] == int(saved.name[-8:])
    assert checkpoint.load_weights(saved)


def test_interrupt_saves_and_resume_goes_on(rendered, tmp_path, monkeypatch):
    config = recipe(rendered)
    interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match=r"stopped after step 3 .*--resume"):
        train(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume"):
        train(config, tmp_path / "run", progress=False)
    train(config, tmp_path / "run", resume=True, progress=False)
    train(config, tmp_path / "straight", progress=False)
    a, b = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_crops_made_on_the_device_teach_the_same(rendered, tmp_path):
    """Pixels differ by half a grey level at most, and hardly at all in the mean."""
    logs = []
    for where in ("host", "device"):
        config = recipe(
            rendered,
            **FINE,
            **{
                "data.warp": where,
                "train.accumulate": 2,
                "train.pictures_every": 1,
                "train.epochs": 1,
            },
        )
        train(config, tmp_path / where, progress=False)
        logs.append(lines(tmp_path / where))
    assert len(logs[0]) == len(logs[1]) > 2
    first, second = (log[0] for log in logs)
    assert first["loss"] != second["loss"]
    for term in ("loss", "pose", "mask", "noise"):
        assert second[term] == pytest.approx(first[term], rel=1e-4), term
    for a, b in zip(*logs, strict=True):  # AdamW makes small differences larger
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-2), a["step"]


@pytest.mark.parametrize("workers", [0, 2])
def test_crops_made_on_the_device_resume_exactly(rendered, tmp_path, monkeypatch, workers):
    fields = {"data.warp": "device", "data.num_workers": workers}
    config = recipe(rendered, **fields)
    train(config, tmp_path / "straight", progress=False)

    interrupt_after(monkeypatch, 3)
    with pytest.raises(Interrupted, match="stopped after step 3"):
        train(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    for other in ("host", "auto"):  # auto is the host on a CPU
        message = r"its crops were made on the device, .* on the host, .* set data\.warp=device"
        changed = recipe(rendered, **fields | {"data.warp": other})
        with pytest.raises(ValueError, match=message):
            train(changed, tmp_path / "run", resume=True, progress=False)
    train(config, tmp_path / "run", resume=True, progress=False)
    a, b = weights(tmp_path / "run"), weights(tmp_path / "straight")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_nothing_to_evaluate_on_is_said_before_the_first_step(rendered, tmp_path, monkeypatch):
    """It was found out after the last one."""
    monkeypatch.setattr(training, "take_steps", lambda *_: pytest.fail("a step was taken"))
    missing = recipe(rendered, **{"data.val_annotations": "annotations/none"})
    named = r"^data\.val_annotations='annotations/none': .* is not there, .*evaluate_every=0 too"
    with pytest.raises(FileNotFoundError, match=named):
        train(missing, tmp_path / "run", progress=False)
    broken = recipe(rendered, **{"data.boxes": "no_boxes.json"})
    with pytest.raises(FileNotFoundError, match=r"no_boxes\.json"):
        train(broken, tmp_path / "run", progress=False)


def test_resume_with_another_recipe_is_refused(rendered, tmp_path):
    train(recipe(rendered, **{"train.epochs": 1}), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=r"train\.lr was 0\.001, is 0\.01"):
        train(
            recipe(rendered, **{"train.epochs": 1, "train.lr": 0.01}),
            tmp_path / "run",
            resume=True,
            progress=False,
        )


def test_resume_where_auto_comes_to_the_same(rendered, tmp_path):
    """Neither the word nor its absence, in a run from before there was a choice, matters."""
    for before, after in (("auto", "host"), ("host", "auto")):
        run = tmp_path / before
        train(recipe(rendered, **{"train.epochs": 1, "data.warp": before}), run, progress=False)
        again = recipe(rendered, **{"train.epochs": 1, "data.warp": after})
        [folder] = checkpoint.training_checkpoints(run / "checkpoints")
        state = checkpoint.load_state(folder)
        assert state.pop("warp") == "host"
        torch.save(state, folder / checkpoint.STATE)
        train(again, run, resume=True, progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.batch_size": 9999}, r"train\.batch_size=9999 is more than the \d+ clips"),
        ({"train.accumulate": 3}, r"train\.batch_size=4 cannot be cut evenly.*multiple of 3"),
        ({"train.epochs": 0}, r"train\.epochs=0"),
        ({"train.device": "cuda"}, r"train\.device='cuda', but torch sees no GPU"),
        ({"train.device": "gpu"}, r"train\.device='gpu' is no device"),
        ({"model.pretrained": "/nowhere"}, r"model\.pretrained='/nowhere'"),
        ({"data.train_annotations": "nowhere"}, r"nowhere: no such file or folder"),
        ({"data.train_sequences": 593}, r"2 sequences.*593"),
        ({"data.boxes": "nowhere.json"}, r"nowhere\.json"),
    ],
)
def test_a_recipe_that_cannot_work_is_named(rendered, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        train(recipe(rendered, **fields), tmp_path / "run", progress=False)


def test_pretrained_takes_what_fits(rendered, tmp_path, capsys):
    train(recipe(rendered, **{"train.epochs": 1}), tmp_path / "first", progress=False)
    config = recipe(
        rendered,
        **{
            "train.epochs": 1,
            "train.lr": 0.0,
            "model.head_channels": 16,
            "model.pretrained": str(tmp_path / "first" / "model"),
        },
    )
    train(config, tmp_path / "second", progress=False)
    assert "tensors taken" in capsys.readouterr().out
    a, b = weights(tmp_path / "first"), weights(tmp_path / "second")
    assert torch.equal(a["coarse.keypoint_tokens"], b["coarse.keypoint_tokens"])
    assert a["head.final_layer.weight"].shape != b["head.final_layer.weight"].shape


def test_mixed_precision_keeps_fp32_weights(rendered, tmp_path):
    metrics = train(
        recipe(rendered, **FINE, **{"train.precision": "bf16", "train.epochs": 1}),
        tmp_path / "run",
        progress=False,
    )
    assert metrics["steps"] > 0
    assert {w.dtype for w in weights(tmp_path / "run").values()} == {torch.float32, torch.int64}
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
