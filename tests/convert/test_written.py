"""What a conversion may replace and remove: what its own earlier report lists, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cmpose.convert.convert import convert
from cmpose.convert.options import ConvertOptions
from cmpose.convert.report import ConvertReport
from cmpose.data.sequence import AnnotationError
from tests.convert.test_convert import coco, pictures
from tests.data import synthetic

FILES = [f"v/{n}.jpg" for n in range(4)]


def run(tmp_path: Path, files, **options) -> ConvertReport:
    source = synthetic.write_json(tmp_path / "own.json", coco(files))
    return convert(source, tmp_path / "out", tmp_path / "pics", ConvertOptions(**options))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A data set of four pictures."""
    pictures(tmp_path / "pics", FILES)
    run(tmp_path, FILES)
    return tmp_path / "out"


def files_of(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


def test_the_report_lists_every_file_beside_itself(out):
    listed = json.loads((out / "train_report.json").read_text())["files"]
    assert sorted([*listed, "train_report.json"]) == files_of(out)


def test_files_that_no_conversion_wrote_stay_and_are_named(out, tmp_path):
    mine = ["images/train/v/notes.txt", "images/train/v/000003.png", "images/train/v/deep/a.jpg"]
    mine += ["annotations/train/mine.json", "annotations/train/.hidden", "annotations/a.json"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(name)
    os.unlink(tmp_path / "pics/v/3.jpg")
    report = run(tmp_path, FILES[:3], overwrite=True)
    assert [(out / name).read_text() for name in mine] == mine
    assert not (out / "images/train/v/000003.jpg").exists(), "but this one was the conversion's"
    assert sorted(report.warnings["file that no conversion wrote: it stays"]) == [
        "annotations/train/mine.json",
        "images/train/v/000003.png",
        "images/train/v/deep",
        "images/train/v/notes.txt",
    ]


def test_a_sequence_that_is_no_more_leaves_nothing(out, tmp_path):
    boxes = synthetic.write_json(
        tmp_path / "boxes.json", [{"image_name": "v/0.jpg", "bbox": [1, 2, 30, 40]}]
    )
    run(tmp_path, FILES, overwrite=True, boxes=str(boxes))
    assert (out / "annotations/train_boxes.json").exists()
    pictures(tmp_path / "pics", ["w/0.jpg"])
    run(tmp_path, ["w/0.jpg"], overwrite=True)
    names = ["annotations/train/w.json", "images/train/w/000000.jpg"]
    assert files_of(out) == [*names, "train_report.json", "train_report.txt"]
    assert not (out / "images/train/v").exists()


@pytest.mark.parametrize("name", ["images/train/v/000000.jpg", "annotations/train/v.json"])
def test_a_file_in_the_way_is_refused_before_anything_is_written(name, tmp_path):
    pictures(tmp_path / "pics", FILES)
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"{name}: is there already.*move it, or give anoth"):
        run(tmp_path, FILES, overwrite=True)
    assert files_of(tmp_path / "out") == [name]
    assert mine.read_text() == "mine"


def test_a_folder_that_was_linked_elsewhere_keeps_its_files(out, tmp_path):
    """They have the names of what the conversion wrote."""
    folder, elsewhere = out / "images/train/v", tmp_path / "holiday"
    folder.rename(elsewhere)
    (elsewhere / "000000.jpg").write_text("another picture")
    folder.symlink_to(elsewhere)
    before = {name: (elsewhere / name).read_bytes() for name in os.listdir(elsewhere)}
    with pytest.raises(FileExistsError, match=r"000000\.jpg: is there already.*a link leads there"):
        run(tmp_path, FILES, overwrite=True)
    pictures(tmp_path / "pics", ["w/0.jpg"])
    report = run(tmp_path, ["w/0.jpg"], overwrite=True)
    assert {name: (elsewhere / name).read_bytes() for name in os.listdir(elsewhere)} == before
    kind = "file of an earlier conversion, now linked or a source: it stays"
    assert len(report.warnings[kind]) == 4


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/hosts",
        "images/train/../../../x",
        "images/train/v/../../../../000.jpg",
        "images/val/v/000000.jpg",
        "annotations/train/v/../../../../x.json",
        "images/train/v/notes.txt",
        "images/train//000000.jpg",
        "x",
        "",
        "train_report.json",
    ],
)
def test_a_report_that_names_anything_else_is_refused(name, out, tmp_path):
    report = out / "train_report.json"
    document = json.loads(report.read_text())
    report.write_text(json.dumps(document | {"files": [*document["files"], name]}))
    (tmp_path / "x").write_text("mine")
    before = files_of(tmp_path)
    with pytest.raises(
        AnnotationError, match=r"train_report\.json: files\[6\]: .* is no file that"
    ):
        run(tmp_path, FILES[:1], overwrite=True)
    assert files_of(tmp_path) == before


def test_a_damaged_report_is_named(out, tmp_path):
    (out / "train_report.json").write_text("[")
    with pytest.raises(
        AnnotationError, match=r"train_report\.json: not valid JSON.*mend it, or mo"
    ):
        run(tmp_path, FILES, overwrite=True)


@pytest.mark.parametrize("place", ["copy", "link"])
def test_pictures_of_the_data_set_itself_are_not_removed(place, out, tmp_path):
    """Its own pictures may be the source of the next conversion, under another name."""
    names = [f"images/train/v/00000{n}.jpg" for n in range(4)]
    source = synthetic.write_json(tmp_path / "again.json", coco(names))
    for _ in range(2):
        convert(source, out, out, ConvertOptions(overwrite=True, place=place))
        assert [name for name in names if not (out / name).is_file()] == []


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_in_the_reports_place_is_not_replaced(linked, tmp_path):
    pictures(tmp_path / "pics", FILES)
    report = tmp_path / "out" / "train_report.json"
    report.parent.mkdir()
    mine = tmp_path / "mine.json" if linked else report
    mine.write_text('{"accuracy": 1, "left_out": {}}' if linked else '{"accuracy": 1}')
    if linked:
        report.symlink_to(mine)
    before = mine.read_text()
    with pytest.raises(FileExistsError, match=r"train_report\.json: is there already and is no"):
        run(tmp_path, FILES)
    assert mine.read_text() == before
    assert files_of(tmp_path / "out") == ["train_report.json"]


def test_a_report_of_an_earlier_version_is_one(out, tmp_path):
    path = out / "train_report.json"
    report = json.loads(path.read_text())
    del report["files"]
    path.write_text(json.dumps(report))
    with pytest.raises(FileExistsError, match="the report of the split lists no such file"):
        run(tmp_path, FILES[1:], overwrite=True)
