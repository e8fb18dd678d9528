"""What frames and conversions leave when they are killed, stopped, out of space, or not alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose.cli import main
from cmpose.convert import frames as frames_module
from cmpose.convert.convert import convert
from cmpose.convert.frames import extract_frames
from cmpose.convert.options import ConvertOptions
from cmpose.data.formats.posetrack import AnnotationError
from cmpose.files import Interrupted, OutputError, claim_file


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 4 noisy frames, the frames, labels of two of them, and boxes."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    video = folder / "walk.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for _ in range(4):
        writer.write(rng.integers(0, 256, (120, 160, 3), np.uint8))
    writer.release()
    extract_frames(video, folder / "pictures" / "walk")
    rows = [f"walk,{n},0,{name},{40 + n},50" for n in (0, 2) for name in ("head", "tail")]
    (folder / "labels.csv").write_text("\n".join(["sequence,frame,track,keypoint,x,y", *rows]))
    boxes = [{"frame": n, "bbox": [20, 20, 60, 80], "track_id": 0} for n in (0, 2)]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


def arguments(source: Path, out: Path) -> list[str]:
    files = [str(source / "labels.csv"), str(out), "--images", str(source / "pictures")]
    return ["convert", *files, "--boxes", str(source / "boxes.json")]


# -- frames -----------------------------------------------------------------------------------


def test_frames_stop_when_asked_and_go_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = frames_module._write_jpeg

    def ask(path: Path, picture: np.ndarray, quality: int) -> None:
        write(path, picture, quality)
        if path.name == "000001.jpg":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(frames_module, "_write_jpeg", ask)
    with pytest.raises(Interrupted, match="stopped; 2 pictures are there: run the same command"):
        extract_frames(source / "walk.avi", tmp_path / "f")
    monkeypatch.undo()
    assert extract_frames(source / "walk.avi", tmp_path / "f").written == 2


def test_a_folder_of_frames_that_is_deleted_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(path: Path, picture: np.ndarray, quality: int) -> None:
        shutil.rmtree(path.parent)

    monkeypatch.setattr(frames_module, "_write_jpeg", delete)
    with pytest.raises(OutputError, match=r"frames\.json: is not there any more; run the same"):
        extract_frames(source / "walk.avi", tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_a_file_where_the_frames_should_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(OutputError, match="f: cannot be written: it is a file where a folder"):
        extract_frames(source / "walk.avi", tmp_path / "f")


def test_an_index_that_is_no_json(source: Path, tmp_path: Path) -> None:
    (tmp_path / "frames.json").write_text("[")
    with pytest.raises(FileExistsError, match=r"frames\.json: not valid JSON .*; give"):
        extract_frames(source / "walk.avi", tmp_path)


# -- convert ----------------------------------------------------------------------------------


def test_what_another_conversion_of_the_split_was_killed_at_is_removed(
    source: Path, tmp_path: Path
) -> None:
    main(arguments(source, tmp_path))
    whole = files_of(tmp_path)
    for name in ("images/train/walk/.9.jpg", "annotations/train/.a.json", "annotations/.train_"):
        ending = "boxes.json" if name.endswith("_") else ""
        (tmp_path / f"{name}{ending}.cmpose-part").write_text("half")
    command, *rest = arguments(source, tmp_path)
    main([command, "--overwrite", *rest])  # a flag, which takes nothing that follows it
    assert files_of(tmp_path) == whole


def test_splits_are_converted_at_the_same_time_and_one_split_is_not(
    source: Path, tmp_path: Path
) -> None:
    with claim_file(tmp_path / "train_report.json", "convert", "--split or folder"):
        main([*arguments(source, tmp_path), "--split", "val"])
        with pytest.raises(SystemExit, match=r"another cmpose convert is writing there; .*--split"):
            main(arguments(source, tmp_path))
    main(arguments(source, tmp_path))


def test_what_stands_in_the_way_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file is a file where a folder should be; move it"):
        main(arguments(source, tmp_path / "file" / "set"))
    (tmp_path / "images").write_text("")
    with pytest.raises(SystemExit, match=r"images is a file where a folder should be; move it"):
        main(arguments(source, tmp_path))


def test_a_link_is_replaced_and_never_what_it_points_to(source: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "set", source / "pictures"
    boxes = str(source / "boxes.json")
    convert(source / "labels.csv", out, images, ConvertOptions(place="link", boxes=boxes))
    stranger = tmp_path / "stranger.jpg"
    stranger.write_bytes(b"mine")
    link = out / "images/train/walk/000001.jpg"
    link.unlink()
    link.symlink_to(stranger)
    convert(source / "labels.csv", out, images, ConvertOptions(overwrite=True, boxes=boxes))
    assert stranger.read_bytes() == b"mine"
    placed = sorted((out / "images/train/walk").iterdir())
    assert not any(path.is_symlink() for path in placed), "place is copy by now"
    assert len(placed) == len(list((images / "walk").glob("*.jpg")))
    assert link.read_bytes() == (images / "walk/000001.jpg").read_bytes()


def test_nothing_is_copied_before_every_check_has_passed(source: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    text = (source / "labels.csv").read_text()
    labels.write_text(f"{text}\nother,0,0,head,1,1")
    with pytest.raises(AnnotationError, match="picture"):
        convert(labels, tmp_path / "set", source / "pictures")
    assert not (tmp_path / "set").exists()
