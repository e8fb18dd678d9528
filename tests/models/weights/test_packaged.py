"""Packaged models are found by name, by every command, and nothing is written beside them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import cmpose
from cmpose.cli import main
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint, packaged
from cmpose.models.weights.folder import CheckpointError, remove_model
from tests.models.builders import build


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packaged models with one that is called tiny; the current folder is empty."""
    build().save_pretrained(tmp_path / "shelf" / "tiny", half=True)
    (tmp_path / "shelf" / "notes.txt").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "shelf")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shelf"


def test_found_by_name(shelf: Path) -> None:
    assert packaged.names() == ["tiny"]
    assert checkpoint.find("tiny") == shelf / "tiny"
    assert CMPose.from_pretrained("tiny").source == str(shelf / "tiny" / "model.safetensors")
    assert cmpose.load("tiny").predictor.folder == shelf / "tiny"


def test_a_folder_of_ones_own_comes_first(shelf: Path) -> None:
    own = build(seed=1).save_pretrained("tiny")
    assert checkpoint.find("tiny") == own


@pytest.mark.parametrize("load", [cmpose.load, CMPose.from_pretrained])
def test_an_unknown_name_lists_the_names(shelf: Path, load) -> None:
    with pytest.raises(CheckpointError, match=r"tyny.* or the name of a packaged model \(tiny\)"):
        load("tyny")


def test_without_any_a_checkpoint_is_asked_for(shelf: Path) -> None:
    remove_model(shelf / "tiny")
    cv2.imwrite("a.png", np.zeros((64, 48, 3), np.uint8))
    with pytest.raises(SystemExit, match="predict: --checkpoint: give the folder of a run or of a"):
        main(["predict", "a.png"])
    with pytest.raises(CheckpointError, match=r"no checkpoint at tiny: .* a model\.safetensors$"):
        cmpose.load("tiny")


def test_nothing_is_written_beside_it(shelf: Path) -> None:
    before = sorted(shelf.rglob("*"))
    with pytest.raises(SystemExit, match=r"--output: tiny is a packaged model, .* give a folder"):
        main(["evaluate", "--checkpoint", "tiny"])
    assert sorted(shelf.rglob("*")) == before


def test_predict_takes_it_and_says_so(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cv2.imwrite("a.png", np.zeros((64, 48, 3), np.uint8))
    Path("boxes.json").write_text('[{"frame": 0, "bbox": [4, 4, 40, 50], "score": 1.0}]')
    options = ["--detections", "boxes.json", "--outputs", '["coco"]', "--device", "cpu"]
    main(["predict", "a.png", "--out", "out", *options])
    card = shelf / "tiny" / "README.md"
    assert f"model: tiny, which comes with the package ({card})\n" in capsys.readouterr().out
    assert card.is_file()
    [person] = json.loads(Path("out/coco/a.json").read_text())
    assert np.isfinite(person["keypoints"]).all()
