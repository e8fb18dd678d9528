"""Evaluation: shared among processes, merged annotation files, unreadable frames, the rules of
flip test and causal hits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from cmpose.config import Config
from cmpose.data.posetrack import load_annotations
from cmpose.engine import checkpoint
from cmpose.engine.evaluate import causal_hits, evaluate_checkpoint, predict_heatmaps
from cmpose.engine.train import train
from cmpose.evaluation.decode import flip_heatmaps
from cmpose.models.cmpose import CMPose
from tests.engine.recipes import FINE, recipe, run_cli, write_recipe
from tests.models.builders import build, clips


@pytest.fixture(scope="module")
def trained(rendered, tmp_path_factory):
    """A run, and its recipe."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    config = recipe(rendered, **FINE, **{"train.epochs": 4})
    train(config, run, progress=False)
    return run, config


def test_two_processes_write_the_same_predictions(trained, tmp_path):
    run, config = trained
    file = str(write_recipe(tmp_path / "recipe.yaml", config))
    written = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run_cli(
            "evaluate",
            "--checkpoint",
            str(run),
            "--config",
            file,
            "--output",
            str(out),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        [poses] = (out / "predictions").glob("*.json")
        written.append(json.loads(poses.read_text())["annotations"])
    assert len(written[0]) == len(written[1]) > 0
    for a, b in zip(*written, strict=True):
        assert a["track_id"] == b["track_id"]
        assert b["keypoints"] == pytest.approx(a["keypoints"], abs=1e-3)
        assert b["scores"] == pytest.approx(a["scores"], abs=1e-5)


def test_a_merged_annotation_file_gives_the_same_ap(trained, tmp_path):
    run, config = trained
    data = tmp_path / "data"
    shutil.copytree(config.data.root, data)
    [file] = (data / "annotations" / "val").glob("*.json")
    file.rename(data / "merged.json")
    merged = recipe(data, **{"data.val_annotations": "merged.json"})
    apart = evaluate_checkpoint(run, config.data, config.train, tmp_path / "apart")
    together = evaluate_checkpoint(run, merged.data, config.train, tmp_path / "together")
    assert together["ap"] == apart["ap"]


def test_unreadable_frames_get_no_prediction_and_are_counted(trained, tmp_path):
    run, config = trained
    data = tmp_path / "data"
    shutil.copytree(config.data.root, data)
    frames = load_annotations("annotations/val", data)[0].frames
    (data / frames[0].file_name).write_bytes(b"rubbish")
    skipping = recipe(data, **{"data.on_error": "skip"})
    with pytest.warns(UserWarning, match="clip left out"):
        metrics = evaluate_checkpoint(run, skipping.data, config.train, tmp_path / "out")
    # Frame 0 is also the neighbour of frame 1.
    lost = len(frames[0].people) + len(frames[1].people)
    assert metrics["skipped"]["frame unreadable"] == lost
    [poses] = (tmp_path / "out" / "predictions").glob("*.json")
    ids = {a["image_id"] for a in json.loads(poses.read_text())["annotations"]}
    assert ids == {frame.image_id for frame in frames[2:] if frame.people}
    for frame in frames[1:]:
        (data / frame.file_name).write_bytes(b"rubbish")
    with (
        pytest.warns(UserWarning, match="clip left out"),
        pytest.raises(ValueError, match="no pose to score: the frames of all"),
    ):
        evaluate_checkpoint(run, skipping.data, config.train, tmp_path / "none")


def test_flip_test_is_the_mean_with_the_mirrored_clip():
    model = CMPose(recipe(".", **FINE).model).eval()
    images = clips(2, model.config)
    data = recipe(".", **{"data.flip_test": True, "data.udp": True}).data
    with torch.no_grad():
        once = predict_heatmaps(model, images, data).heatmaps
        mirrored = predict_heatmaps(model, images.flip(-1), data).heatmaps
    # Mirroring the input mirrors the answer, left and right joints swapped.
    torch.testing.assert_close(flip_heatmaps(mirrored, udp=True), once, rtol=1e-4, atol=1e-6)


def test_causal_hits_count_visible_joints_with_a_token_within_a_cell():
    model = build().eval()
    output = model(clips(1, model.config))
    scores = torch.zeros(1, 2, 12)
    scores[0, 0, [0, 1]] = 1.0  # row 0, columns 0 and 1 of the 4×3 grid
    scores[0, 1, [9, 10]] = 1.0  # row 3, columns 0 and 1
    fine = output.fine._replace(selection=output.fine.selection._replace(scores=scores))
    batch = {
        "clip": torch.zeros(1, 3, 64, 48, 3, dtype=torch.uint8),
        "keypoints": torch.tensor([[[40.0, 20.0], [40.0, 20.0]]]),  # row 1, column 2
        "visible": torch.ones(1, 2),
    }
    assert causal_hits(output._replace(fine=fine), batch, 2).tolist() == [1.0, 2.0]
    batch["visible"] = torch.tensor([[0.0, 1.0]])
    assert causal_hits(output._replace(fine=fine), batch, 2).tolist() == [0.0, 1.0]


def test_evaluation_of_a_checkpoint_that_is_only_a_model(trained, tmp_path):
    run, config = trained
    model, loaded = checkpoint.load_model(run)
    checkpoint.save(tmp_path, "alone", model.state_dict(), Config(model=loaded.model))
    a = evaluate_checkpoint(tmp_path / "alone", config.data, config.train, tmp_path / "a")
    assert a["ap"] == evaluate_checkpoint(run, config.data, config.train, tmp_path / "b")["ap"]
