"""What a prediction writes: whole after any kill, named when it fails, by several at once."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cmpose.cli import main
from cmpose.config import Config
from cmpose.data.video import open_video
from cmpose.data.video_writer import video_writer
from cmpose.files import OutputError, claim_file
from cmpose.models.weights import checkpoint
from cmpose.predict.journal import FRAMES
from cmpose.predict.options import Options
from cmpose.predict.outputs import OutputsError, refuse_others
from cmpose.predict.predict import predict_video
from cmpose.predict.predictor import Predictor
from cmpose.predict.results import write_last_metrics
from tests.models.builders import build
from tests.small_disk import small_disk

LENGTH, SIZE = 24, (96, 64)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Weights, a video of noise, and two people in each of its frames."""
    folder = tmp_path_factory.mktemp("given")
    model = build(fine="off", num_keypoints=15)
    config = Config(model=model.config)
    config.train.precision = "fp32"
    checkpoint.save(folder / "weights", "model", model.state_dict(), config)
    rng = np.random.default_rng(0)
    with video_writer(folder / "clip.mp4", SIZE, 25) as writer:
        for _ in range(LENGTH):
            writer.write(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    boxes = [
        {"frame": n, "bbox": [20 * t + n, 5, 20, 50], "track_id": t}
        for n in range(LENGTH)
        for t in range(2)
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


def predict(inputs, out, video="clip.mp4", **options):
    options = {"detections": inputs / "boxes.json", "batch_size": 4, "progress": False, **options}
    return predict_video(inputs / video, inputs / "weights", out, device="cpu", **options)


def poses(out, name="clip"):
    return (out / "poses" / f"{name}.json").read_bytes()


def test_a_full_disk_is_named_and_gone_on_from(inputs, tmp_path):
    predict(inputs, tmp_path / "whole", outputs=["poses", "coco"])
    with small_disk(tmp_path) as disk:
        filler = disk / "filler"
        out, failed = disk / "out", []
        for room in range(0, 64, 4):
            filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - room * 1024))
            try:
                predict(inputs, out, outputs=["poses", "coco"])
            except OutputError as error:
                failed.append(str(error))
            filler.unlink()
        full = ": cannot be written: the disk is full; free some space"
        assert all(full in message for message in failed)
        # By the room there was, each of the files was the one that found none.
        names = {Path(message.partition(full)[0]).relative_to(out) for message in failed}
        journal = Path("journal", "clip")
        assert names == {
            *(journal / "settings.json", journal / FRAMES),
            *(Path("poses", "clip.json"), Path("coco", "clip.json")),
        }
        assert "the poses of 24 frames are kept in" in failed[-1]
        assert "the same command goes on from them" in failed[-1]
        predict(inputs, out, outputs=["poses", "coco"])
        assert poses(out) == poses(tmp_path / "whole")
        assert not list(disk.rglob(".*"))


def test_what_stands_in_the_way_is_named(inputs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file where a folder should be; move it, or give anot"):
        predict(inputs, tmp_path / "file")
    out = tmp_path / "out"
    out.mkdir()
    (out / "poses").write_text("")
    with pytest.raises(OutputError, match=r"poses is a file where a folder .* 24 frames are kept"):
        predict(inputs, out)
    (out / "poses").unlink()
    (out / "clip_poses.part.mp4").mkdir()
    (out / "clip_poses.mp4").unlink()
    arguments = ["predict", str(inputs / "clip.mp4"), "--checkpoint", str(inputs / "weights")]
    arguments += ["--detections", str(inputs / "boxes.json"), "--batch_size", "4"]
    with pytest.raises(SystemExit, match=r"cmpose predict: .*clip_poses\.mp4: cannot be written"):
        main([*arguments, "--out", str(out), "--device", "cpu"])


def test_a_folder_that_is_deleted_meanwhile_is_noticed(inputs, tmp_path, monkeypatch):
    batch = Predictor.poses

    def deleting(self, *arguments):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return batch(self, *arguments)

    monkeypatch.setattr(Predictor, "poses", deleting)
    message = (
        r"frames\.jsonl: cannot be written: its folder .* is not there \(any more\); make the fo"
    )
    with pytest.raises(OutputError, match=message) as caught:
        predict(inputs, tmp_path / "out", outputs=["poses"])
    assert "kept" not in str(caught.value), "nothing is"


def test_several_videos_into_one_folder_at_once(inputs, tmp_path, monkeypatch):
    shutil.copy(inputs / "clip.mp4", inputs / "other.mp4")
    batch, begun = Predictor.poses, []

    def nested(self, *arguments):
        if not begun:
            begun.append(1)
            predict(inputs, tmp_path, "other.mp4")
            assert json.loads((tmp_path / "metrics.json").read_text())["video"] == "other.mp4"
        return batch(self, *arguments)

    monkeypatch.setattr(Predictor, "poses", nested)
    predict(inputs, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["video"] == "clip.mp4"
    assert len(poses(tmp_path)) > 9000
    assert len(poses(tmp_path, "other")) > 9000


def test_the_one_file_that_videos_share_is_waited_for(tmp_path):
    with claim_file(tmp_path / "metrics.json", "predict", "--out"):
        waiting = threading.Thread(target=write_last_metrics, args=(tmp_path, {"frames": 1}))
        waiting.start()
        time.sleep(0.05)
        assert waiting.is_alive()
        assert not (tmp_path / "metrics.json").exists()
    waiting.join(10)
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.parametrize(
    "name",
    ["clip_poses.mp4", "poses/clip.json", "coco/clip.json", "metrics.json"]
    + ["clip_poses.part.mp4", "journal/clip/frames.jsonl"],
)
def test_what_predict_did_not_write_is_not_replaced(inputs, tmp_path, name):
    mine = tmp_path / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"ap": 1}')
    message = rf"{name}: is there already and is not of cmpose predict: move it, or give another"
    with pytest.raises(OutputsError, match=message):
        predict(inputs, tmp_path)
    assert mine.read_text() == '{"ap": 1}'
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    if name == "metrics.json":  # a training's, which no earlier prediction has left
        with pytest.raises(OutputsError, match=message):
            predict(inputs, tmp_path, overwrite=True)


def test_other_files_stay_and_overwrite_replaces(inputs, tmp_path):
    (tmp_path / "poses").mkdir()
    for name in ("clip", "clip2"):
        (tmp_path / "poses" / f"{name}.json").write_text("mine")
    (tmp_path / "metrics.json").write_text('{"video": "other.mp4"}')
    predict(inputs, tmp_path, outputs=["poses"], max_frames=2, overwrite=True)
    assert len(poses(tmp_path)) > 100
    assert poses(tmp_path, "clip2") == b"mine"
    assert json.loads((tmp_path / "metrics.json").read_text())["video"] == "clip.mp4"


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_input_and_a_link_are_never_replaced(inputs, tmp_path, overwrite):
    boxes = tmp_path / "coco" / "clip.json"
    boxes.parent.mkdir()
    shutil.copy(inputs / "boxes.json", boxes)
    before = boxes.read_bytes()
    with pytest.raises(OutputsError, match=r"coco/clip\.json: is an input, and a result would be"):
        predict(inputs, tmp_path, detections=boxes, overwrite=overwrite)
    assert boxes.read_bytes() == before
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / "clip.json").symlink_to(boxes)
    with pytest.raises(OutputsError, match=r"poses/clip\.json: is a link, and a result would be"):
        predict(inputs, tmp_path, outputs=["poses"], overwrite=overwrite)
    assert boxes.read_bytes() == before
    assert not (tmp_path / "journal").exists()


@pytest.mark.parametrize("name", ["poses", "coco", "journal", "journal/clip"])
def test_nothing_is_written_behind_a_linked_folder(inputs, tmp_path, name):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(OutputsError, match=rf"out/{name}: is a link, and results would be written"):
        predict(inputs, tmp_path / "out", overwrite=True)
    assert not os.listdir(tmp_path / "theirs")
    # The output folder itself may be one.
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    predict(inputs, tmp_path / "link", outputs=["poses"], max_frames=1)


def test_a_missing_result_is_not_done(inputs, tmp_path):
    few = {"outputs": ["poses", "coco"], "max_frames": 2}
    metrics = predict(inputs, tmp_path, **few)
    (tmp_path / "metrics.json").unlink()
    assert predict(inputs, tmp_path, **few) == metrics
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    (tmp_path / "poses" / "clip.json").unlink()
    with pytest.raises(
        OutputsError, match=r"poses/clip\.json: is missing.*--overwrite does it anew"
    ):
        predict(inputs, tmp_path, **few)
    predict(inputs, tmp_path, **few, overwrite=True)
    assert len(poses(tmp_path)) > 100


def test_explaining_pictures_of_others_are_not_replaced(inputs, tmp_path):
    with open_video(inputs / "clip.mp4") as video:
        info = video.info
    options = Options(outputs=("poses",), explain_frames=(1,))
    (tmp_path / "explain").mkdir()
    for name in ("clip_000001_0.txt", "clip2_000001_0.png"):
        (tmp_path / "explain" / name).touch()
    refuse_others(tmp_path, info, options, [], overwrite=False)
    (tmp_path / "explain" / "clip_000001_0.png").touch()
    with pytest.raises(OutputsError, match=r"explain/clip_000001_0\.png: is there already"):
        refuse_others(tmp_path, info, options, [], overwrite=False)
