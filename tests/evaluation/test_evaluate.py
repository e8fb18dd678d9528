"""Evaluation: shared among processes, merged annotation files, unreadable frames, crops made on the
host and on the device, the rules of flip test and causal hits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from cmpose import cli
from cmpose.config import Config
from cmpose.data.clips import ClipDataset, open_clips, resolve_warp
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.transforms import IMAGENET_MEAN, IMAGENET_STD, clean_box
from cmpose.evaluation.decode import flip_heatmaps
from cmpose.evaluation.evaluate import causal_hits, evaluate_checkpoint
from cmpose.evaluation.inference import clip_images, key_crops, move_pixels, predict_heatmaps
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from cmpose.train.train import train
from tests.data import synthetic
from tests.models.builders import build, clips
from tests.recipes import FINE, recipe, run_cli, write_recipe
from tests.shared_data import needs_opencv_4


@pytest.fixture(scope="module")
def trained(rendered, tmp_path_factory):
    """A run, and its recipe."""
    run = tmp_path_factory.mktemp("evaluated") / "run"
    config = recipe(rendered, **FINE, **{"train.epochs": 4})
    train(config, run, progress=False)
    return run, config


def test_two_processes_write_the_same_predictions(trained, zygote, tmp_path):
    run, config = trained
    file = str(write_recipe(tmp_path / "recipe.yaml", config))
    command = ["evaluate", "--checkpoint", str(run), "--config", file, "--output"]
    alone, together = tmp_path / "1", tmp_path / "2"
    ended = zygote.run(*command, alone)
    assert ended.status == 0, ended.output
    done = run_cli(*command, str(together), processes=2)
    assert done.returncode == 0, done.stderr
    written = []
    for out in (alone, together):
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


def test_what_no_evaluation_wrote_is_not_replaced(trained, tmp_path):
    run, config = trained
    out = tmp_path / "out"
    for name, text in {
        "metrics.json": '{"ap": {}, "steps": 3}',  # a training's
        "predictions/000007_a.json": "mine",
        "ground_truth/000007_a.json": "mine",
    }.items():
        (out / name).parent.mkdir(parents=True)
        (out / name).write_text(text)
        with pytest.raises(FileExistsError, match=r"out/[a-z_.]+: is there already and is not of "):
            evaluate_checkpoint(run, config.data, config.train, out)
        assert [path for path in out.rglob("*") if path.is_file()] == [out / name]
        shutil.rmtree(out)
    out.mkdir()
    (out / "predictions").symlink_to(tmp_path)
    with pytest.raises(FileExistsError, match=r"out/predictions: is a link, and predictions would"):
        evaluate_checkpoint(run, config.data, config.train, out)


def test_an_evaluations_own_files_are_replaced(trained, tmp_path):
    run, config = trained
    evaluate_checkpoint(run, config.data, config.train, tmp_path)
    [poses] = (tmp_path / "predictions").glob("*.json")
    whole = poses.read_bytes()
    # Killed while it wrote; and as versions before the mark left it.
    for lost in ("metrics.json", ".cmpose-evaluate"):
        (tmp_path / lost).unlink()
        poses.write_bytes(b"old")
        evaluate_checkpoint(run, config.data, config.train, tmp_path)
        assert poses.read_bytes() == whole


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
        "keypoints": torch.tensor([[[40.0, 20.0], [40.0, 20.0]]]),  # row 1, column 2
        "visible": torch.ones(1, 2),
    }
    assert causal_hits(output._replace(fine=fine), batch, 2, (64, 48)).tolist() == [1.0, 2.0]
    batch["visible"] = torch.tensor([[0.0, 1.0]])
    assert causal_hits(output._replace(fine=fine), batch, 2, (64, 48)).tolist() == [0.0, 1.0]


def noisy_people(folder):
    """People in pictures of white noise: inside, across each border, in a corner, far too large."""
    boxes = [
        (90, 60, 80, 100),
        (-40, 50, 90, 120),
        (270, 40, 90, 150),
        (100, -60, 70, 110),
        (120, 180, 60, 110),
        (0, 0, 12, 16),
        (300, 220, 19, 19),
        (-30, -20, 400, 300),
        (20, 100, 290, 30),
    ]
    item = synthetic.sequence(indices=(0, 1, 2), people=0)
    rng = np.random.default_rng(0)
    for frame in item.frames:
        frame.file_name = frame.file_name.replace(".jpg", ".png")
        path = folder / frame.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (240, 320, 3), np.uint8))
        for k, box in enumerate(boxes):
            who = synthetic.person(k)
            who.box = np.array(box, np.float64)
            x, y, w, h = clean_box(who.box, 320, 240)
            who.keypoints[:, :2] = rng.uniform((x, y), (x + w, y + h), (15, 2))
            frame.people.append(who)
    return item


def test_crops_made_on_the_device_are_the_hosts_within_half_a_grey_level(tmp_path):
    """On white noise, where a wrong pixel shows; turned, scaled, mirrored, half outside."""
    needs_opencv_4()
    item = noisy_people(tmp_path)
    config = recipe(tmp_path)
    worst = torch.zeros(3)
    flips = outside = 0
    places = {}
    for warp in ("host", "device"):
        data = replace(config.data, warp=warp)
        places[warp] = ClipDataset([item], tmp_path, (64, 48), 3, data, train=True, seed=2)
    assert len(places["host"]) == 27
    for epoch in range(4):
        images = {}
        for warp, dataset in places.items():
            dataset.set_epoch(epoch)
            batch = collate([dataset[i] for i in range(27)])
            images[warp] = clip_images(move_pixels(batch, torch.device("cpu")), config)
        assert images["host"].shape == images["device"].shape == (27, 3, 3, 64, 48)
        difference = (images["host"] - images["device"]).abs()
        worst = torch.maximum(worst, difference.amax((0, 1, 3, 4)))
        flips += int((torch.linalg.det(batch["matrix"][:, :, :2]) < 0).sum())
        black = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
        outside += int((images["host"] - black[:, None, None]).abs().amax(2).lt(1e-6).sum())
        part = clip_images(move_pixels(batch, torch.device("cpu")), config, slice(5, 9))
        assert torch.equal(part, images["device"][5:9])
        crops = key_crops(batch, config.model, 4)
        assert crops.dtype == np.uint8
        truth = key_crops(collate([places["host"][i] for i in range(23, 27)]), config.model, 4)
        assert np.abs(crops.astype(int) - truth).max() <= 1
    assert 30 < flips < 78
    assert outside > 30_000  # pixels, so that borders are seen
    half = 0.5 / 255 / torch.tensor(IMAGENET_STD)
    assert (worst <= half + 1e-5).all()
    assert (worst > 0.9 * half).all()  # cv2 rounds to whole levels, the device does not


def test_predictions_from_crops_made_on_the_device(trained, tmp_path):
    run, config = trained
    annotations = []
    for warp in ("host", "device"):
        data = replace(config.data, warp=warp, flip_test=True)
        metrics = evaluate_checkpoint(run, data, config.train, tmp_path / warp)
        assert metrics["causal_hit_rate"] is not None
        [poses] = (tmp_path / warp / "predictions").glob("*.json")
        annotations.append(json.loads(poses.read_text())["annotations"])
    assert len(annotations[0]) == len(annotations[1]) > 0
    scores = np.array([[a["scores"] for a in part] for part in annotations])
    np.testing.assert_allclose(scores[1], scores[0], rtol=0.02, atol=1e-3)
    assert not np.array_equal(scores[1], scores[0])
    joints = np.array([[a["keypoints"] for a in part] for part in annotations])
    # Where a heatmap is flat its maximum may lie elsewhere.
    assert np.median(np.abs(joints[1] - joints[0])) < 0.1


@pytest.mark.parametrize(
    ("warp", "device", "expected"),
    [
        ("auto", "cpu", "host"),
        ("auto", "cuda:1", "device"),
        ("host", "cuda", "host"),
        ("device", "cpu", "device"),
    ],
)
def test_where_crops_are_made(rendered, warp, device, expected):
    config = recipe(rendered, **{"data.warp": warp})
    assert resolve_warp(config.data, torch.device(device)) == expected
    dataset = open_clips(config, train=True, device=torch.device(device), quiet=True)
    assert dataset.data.warp == expected
    assert config.data.warp == warp
    assert ("frames" in dataset[0]) == (expected == "device")


def test_data_that_are_missing_are_told_with_the_recipe_that_names_them(tmp_path):
    model = build()
    config = Config(model=model.config)
    folder = checkpoint.save(tmp_path, "model", model.state_dict(), config)
    other = write_recipe(tmp_path / "r.yaml", config)
    for options, recipe_file in (([], folder / "config.json"), (["--config", str(other)], other)):
        with pytest.raises(SystemExit) as ended:
            cli.main(["evaluate", "--checkpoint", str(folder), *options])
        assert "annotations/val: no such file or folder" in str(ended.value)
        assert f"; {recipe_file} names the data where no option does" in str(ended.value)


def test_a_place_that_does_not_exist_is_named(rendered):
    with pytest.raises(ValueError, match=r"bad configuration: data\.warp"):
        recipe(rendered, **{"data.warp": "gpu"})


def test_evaluation_of_a_checkpoint_that_is_only_a_model(trained, tmp_path):
    run, config = trained
    model, loaded = checkpoint.load_model(run)
    checkpoint.save(tmp_path, "alone", model.state_dict(), Config(model=loaded.model))
    a = evaluate_checkpoint(tmp_path / "alone", config.data, config.train, tmp_path / "a")
    assert a["ap"] == evaluate_checkpoint(run, config.data, config.train, tmp_path / "b")["ap"]
