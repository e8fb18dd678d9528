"""Checkpoints are written whole or not at all, found by any of their paths, and refused by name."""

from __future__ import annotations

import os

import pytest
import torch

from cmpose.config import Config
from cmpose.files import OutputError
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from tests.models.builders import build, small_config


@pytest.fixture
def saved(tmp_path):
    model = build()
    config = Config(model=model.config)
    state = {"step": 3, "optimizer": {"state": {}}}
    path = checkpoint.save(
        tmp_path / "run" / "checkpoints", checkpoint.name_of(3), model.state_dict(), config, state
    )
    return model, path


def test_round_trip(saved):
    model, path = saved
    loaded, config = checkpoint.load_model(path)
    assert config.model == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert checkpoint.load_state(path)["step"] == 3


def test_found_by_run_folder_and_file(saved, tmp_path):
    _, path = saved
    for location in (tmp_path / "run", tmp_path / "run" / "checkpoints", path, path / "state.pt"):
        assert checkpoint.find(location) == path
    # The exported model is preferred to a training checkpoint.
    exported = checkpoint.save(tmp_path / "run", "model", saved[0].state_dict(), Config())
    assert checkpoint.find(tmp_path / "run") == exported


def test_no_checkpoint(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint at .*give a run's folder"):
        checkpoint.find(tmp_path)


def test_saving_again_replaces_and_leaves_no_rubbish(saved):
    model, path = saved
    with torch.no_grad():
        model.coarse.keypoint_tokens.zero_()
    checkpoint.save(path.parent, path.name, model.state_dict(), Config(model=model.config), {})
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert not checkpoint.load_weights(path)["coarse.keypoint_tokens"].any()


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    model, path = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OutputError, match=r"step-00000003: .*the disk is full"):
        checkpoint.save(path.parent, path.name, model.state_dict(), Config(), {"step": 4})
    monkeypatch.undo()
    assert checkpoint.load_state(path)["step"] == 3
    assert checkpoint.training_checkpoints(path.parent) == [path]


def test_prune_keeps_the_newest(tmp_path):
    for name in (*map(checkpoint.name_of, (1, 2, 3, 10)), "nonfinite-step-00000005"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.pt").touch()
    notes = tmp_path / "step-00000001" / "notes.txt"
    notes.write_text("the user's")
    checkpoint.prune(tmp_path, 2)
    expected = ["nonfinite-step-00000005", "step-00000001", "step-00000003", "step-00000010"]
    assert sorted(p.name for p in tmp_path.iterdir()) == expected
    assert os.listdir(notes.parent) == [notes.name]
    assert [p.name for p in checkpoint.training_checkpoints(tmp_path)] == expected[2:]


def test_evaluations_lie_outside_of_what_is_pruned_and_published(saved, monkeypatch):
    model, path = saved
    run = path.parents[1]
    expected = run / "evaluations" / path.name
    assert checkpoint.evaluation_folder(path) == expected
    checkpoint.save(run, "model", model.state_dict(), Config())
    checkpoint.save(run, "other", model.state_dict(), Config())
    assert checkpoint.evaluation_folder(run / "other") == run / "evaluations" / "other"
    assert checkpoint.evaluation_folder(run / "model") == run / "evaluations" / "model"
    (run / "config.json").touch()  # now it is a run's, whose last checkpoint has these weights
    assert checkpoint.evaluation_folder(run / "model") == expected
    monkeypatch.chdir(run / "model")
    assert checkpoint.evaluation_folder(checkpoint.find(".")) == expected
    expected.mkdir(parents=True)
    checkpoint.discard(run)
    assert expected.is_dir()


def test_a_runs_weights_are_discarded_and_nothing_else(saved):
    model, path = saved
    run = path.parents[1]
    checkpoint.save(run, "model", model.state_dict(), Config())
    (run / "model" / "evaluation").mkdir()
    (run / "log.jsonl").touch()
    checkpoint.discard(run)
    assert sorted(str(p.relative_to(run)) for p in run.rglob("*")) == [
        "log.jsonl",
        "model",
        "model/evaluation",
    ]


def test_damaged_files_are_named(saved):
    _, path = saved
    (path / "state.pt").write_bytes(b"rubbish")
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt cannot be read.*delete"):
        checkpoint.load_state(path)
    (path / "state.pt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"has no state\.pt"):
        checkpoint.load_state(path)
    (path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors cannot be read"):
        checkpoint.load_weights(path)
    (path / "config.json").write_text('{"model": {"backbone": "vast"}}')
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json: .*backbone"):
        checkpoint.load_config(path)
    (path / "config.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"has no config\.json"):
        checkpoint.load_config(path)


def test_state_never_runs_code(saved):
    _, path = saved

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"step": Evil()}, path / "state.pt")
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.pt cannot be read"):
        checkpoint.load_state(path)


def test_what_torch_says_of_a_damaged_state_is_told_in_a_short_line(saved):
    """torch's own words are six lines, with terminal colours, that end in the file's own bytes."""
    _, path = saved
    torch.save({"step": 3}, path / "state.pt", _use_new_zipfile_serialization=False)
    whole = (path / "state.pt").read_bytes()
    strange = b"\x80\x02c" + b"\t" * 5000 + b"\n" + b"name\n."
    (path / "state.pt").write_bytes(whole.replace(whole[whole.index(b"}q") - 2 :], strange))
    with pytest.raises(checkpoint.CheckpointError) as refused:
        checkpoint.load_state(path)
    message = str(refused.value)
    assert "state.pt cannot be read (Unsupported global" in message
    assert len(message) < 600
    assert message.isprintable()


def test_weights_that_do_not_fit(saved):
    model, path = saved
    other = CMPose(small_config(head_channels=16))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"does not fit.*head.*instead of.*and \d+ more"
    ):
        checkpoint.load_into(other, checkpoint.load_weights(path), path)
    without = CMPose(small_config(fine="off"))
    with pytest.raises(checkpoint.CheckpointError, match=r"fine\.\w+.*: unknown"):
        checkpoint.load_into(without, model.state_dict(), path)
