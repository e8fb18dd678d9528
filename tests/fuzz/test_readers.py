"""Damaged documents: every reader takes them or refuses them by name, never with a traceback."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import currently_in_test_context, note
from hypothesis import strategies as st

from cmpose import config as configuration
from cmpose.config import Config, DataConfig
from cmpose.convert.boxes import OwnBoxes
from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import read_coco_drafts
from cmpose.convert.table import read_csv_drafts
from cmpose.data.cache.build import build, source_of
from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.store import CacheError, read_plan
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.posetrack import load_annotations, load_detections
from cmpose.data.formats.skeleton import read_skeleton
from cmpose.data.sequence import AnnotationError
from cmpose.evaluation.posetrack_ap import score_folders
from cmpose.evaluation.subsets import subsets_of
from cmpose.models.export import evaluations_of
from cmpose.models.weights.folder import CheckpointError, load_config, load_skeleton
from cmpose.predict.detectors.detect import load_video_detections
from cmpose.predict.journal import FORMAT, JournalError, open_journal, with_checksum
from cmpose.report.inputs import ReportError, read_metrics
from cmpose.report.log import read_log
from cmpose.study.ablate import check_settings
from cmpose.study.grid import Study
from cmpose.study.presets import preset_recipe
from cmpose.study.report import CALLS, read_calls
from cmpose.study.runs import finished_results, learnt_fields, run_config
from cmpose.viz.record import RecordError, read_record
from tests.data import synthetic
from tests.fuzz.conftest import FACTOR
from tests.fuzz.damage import (
    HOSTILE,
    changed_bytes,
    changed_text,
    damaged,
    dump,
    dump_lines,
    nodes_of,
)
from tests.viz.samples import record

STEM = "000007_mpii_test"
TRUTH = synthetic.sequence(indices=(0, 1), people=2)
SETTINGS = {"--min_score": 0.2, "video": "a.mp4", "size": [64, 48]}
STORED_SETTINGS = {"journal": FORMAT} | SETTINGS
RECIPE = preset_recipe("cpu")
STUDY = Study(RECIPE, ("table5",), seeds=1)
SKELETON = {
    "id": 1,
    "name": "cat",
    "keypoints": ["head", "left_paw", "right_paw"],
    "skeleton": [[1, 2], ["head", "right_paw"]],
    "flip_pairs": [["left_paw", "right_paw"]],
    "upper_body": ["head"],
    "lower_body": ["left_paw", "right_paw"],
}


class Reader(NamedTuple):
    """A reader of files from outside.

    Attributes:
        file: what it reads, below the folder that it is given.
        document: a valid one.
        read: of the folder.
        error: what it documents to raise.
        lines: the file holds a document a line.
        share: of the tries that others get; a slow one gets fewer.
    """

    file: str
    document: Any
    read: Callable[[Path], Any]
    error: type[Exception] = AnnotationError
    lines: bool = False
    share: float = 1.0


def own_keypoints() -> dict[str, Any]:
    document = synthetic.posetrack18(TRUTH)
    for annotation in document["annotations"]:
        annotation["keypoints"] = [1.0, 2.0, 1.0] * 3
    return document | {"categories": [SKELETON]}


def coco() -> dict[str, Any]:
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4], "keypoints": [1, 2, 2] * 3}
        for i in range(2)
    ]
    annotations[0]["attributes"] = {"track_id": 3}
    crowd = {"id": 9, "image_id": 0, "category_id": 1, "iscrowd": 1}
    crowd["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    images = [
        {"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48, "video_id": 5, "frame_id": i}
        for i in range(2)
    ]
    return {
        "images": images,
        "annotations": [*annotations, crowd],
        "categories": [SKELETON],
        "videos": [{"id": 5, "name": "walk"}],
    }


def boxes(**more: Any) -> list[dict[str, Any]]:
    return [
        {"bbox": [1.0, 2, 30, 40], "score": 0.9, "category_id": 1, "track_id": k} | more
        for k in range(2)
    ]


def predicted(document: dict[str, Any]) -> dict[str, Any]:
    for annotation in document.get("annotations", ()):
        annotation["scores"] = [0.5] * 17
    return document


def score(folder: Path) -> Any:
    return score_folders(folder / "truth", folder / "guess")


def journal(folder: Path) -> list[str]:
    with open_journal(folder, SETTINGS) as opened:
        return [] if opened.finished is not None else [*map(repr, opened.frames())]


def journal_lines() -> list[dict[str, Any]]:
    person = {"track_id": 0, "score": 0.5, "box": [1.0, 2, 3, 4], "interpolated": True}
    person |= {"keypoints": [[1.0, 2.0]] * 3, "scores": [0.1] * 3}
    line = {"people": [person], "found": [[1.0, 2, 3, 4, 0.5]], "unreadable": True}
    frames = [{"frame": i} | line | {"explained": ["a.png"]} for i in range(3)]
    return [*frames, {"end": 3}]


def metrics() -> dict[str, Any]:
    ap = {"joints": ["nose", "head_top"], "ap": [10.0, None], "columns": {"Head": 5.0, "Mean": 3}}
    numbers = {"clips": 3, "steps": 9, "seconds": 1.5, "people": 4, "frames": 2}
    parts = {"seconds_by_part": {"model": 1.0}, "causal_hit_rate": None}
    return {"ap": ap, "box_source": "ground truth", "video": "a.mp4"} | numbers | parts


def log() -> list[dict[str, Any]]:
    train = {"kind": "train", "loss": 3.5, "lr": 1e-3, "gradient_norm": None, "time": 5.0}
    return [
        *({"step": i} | train for i in range(3)),
        {"kind": "evaluate", "step": 3, "box_source": "x", "Mean": 12.5},
    ]


def result() -> dict[str, Any]:
    subset = {"ap": 40.0, "pckh": 50, "error": None, "frames": 9, "joints": 90}
    origin = {"gpu": None, "cpu": "a", "commit": "01", "dirty": False, "torch": "2"}
    config = run_config(RECIPE, STUDY.settings()["full"], 0)
    return {
        **{"name": "full", "seed": 0, "recipe": learnt_fields(config)},
        **{"subsets": {"all": subset}, "box_source": "gt", "clips": 20, "steps": 7},
        **{"training_seconds": 3.0, "evaluation_seconds": 1.0, "threads": 1},
        "provenance": origin | {"python": "3", "utc": "2026"},
    }


READERS = {
    "PoseTrack18": Reader(
        f"{STEM}.json", synthetic.posetrack18(TRUTH), lambda f: load_annotations(f / f"{STEM}.json")
    ),
    "PoseTrack18, skipping": Reader(
        f"{STEM}.json",
        synthetic.posetrack18(TRUTH),
        lambda f: load_annotations(f / f"{STEM}.json", on_error="skip"),
    ),
    "PoseTrack21": Reader("a.json", synthetic.posetrack21(TRUTH), load_annotations),
    "COCO-style PoseTrack17": Reader("a.json", synthetic.detect_and_track(TRUTH), load_annotations),
    "PoseTrack17": Reader("a.json", synthetic.annolist(TRUTH), load_annotations),
    "PoseTrack17, skipping": Reader(
        "a.json", synthetic.annolist(TRUTH), lambda f: load_annotations(f, on_error="skip")
    ),
    "own keypoints": Reader("a.json", own_keypoints(), load_annotations),
    "detections": Reader(
        "boxes.json",
        boxes(image_id=10_000_070_001),
        lambda f: load_detections(f / "boxes.json", [TRUTH]),
    ),
    "detections, skipping": Reader(
        "boxes.json",
        boxes(image_name=TRUTH.frames[0].file_name),
        lambda f: load_detections(f / "boxes.json", [TRUTH], on_error="skip"),
    ),
    "score's ground truth": Reader("truth/a.json", synthetic.posetrack18(TRUTH), score, ValueError),
    "score's predictions": Reader(
        "guess/a.json", predicted(synthetic.posetrack18(TRUTH)), score, ValueError
    ),
    "score's annolist": Reader("guess/b.json", synthetic.annolist(TRUTH), score, ValueError),
    "a video's detections": Reader(
        "v.json",
        boxes(frame=0),
        lambda f: load_video_detections(f / "v.json", 2, size=(64, 48)),
        ValueError,
    ),
    "conversion from COCO": Reader(
        "c.json", coco(), lambda f: read_coco_drafts(f / "c.json", ConvertReport("raise"))
    ),
    "conversion's boxes": Reader(
        "b.json", boxes(frame=3), lambda f: OwnBoxes(f / "b.json", ConvertReport())
    ),
    "skeleton": Reader("s.json", SKELETON, lambda f: read_skeleton(f / "s.json")),
    "record": Reader("r.json", record(1), lambda f: read_record(f / "r.json"), RecordError),
    "metrics": Reader("m.json", metrics(), lambda f: read_metrics(f / "m.json"), ReportError),
    "log": Reader("log.jsonl", log(), lambda f: read_log(f / "log.jsonl"), ReportError, lines=True),
    "model's recipe": Reader(
        "config.json", configuration.to_dict(Config()), load_config, CheckpointError, share=0.1
    ),
    "model's skeleton": Reader(
        "skeleton.json", SKELETON, lambda f: load_skeleton(f, 3), CheckpointError
    ),
    "model's metrics": Reader(
        "evaluation/metrics.json", metrics(), evaluations_of, CheckpointError
    ),
    "journal's settings": Reader("settings.json", STORED_SETTINGS, journal, JournalError),
    "journal's end": Reader("finished.json", metrics(), journal, JournalError),
    "study's settings": Reader(
        "settings.json",
        learnt_fields(RECIPE),
        lambda f: check_settings(f, RECIPE, None),
        ValueError,
    ),
    "study's result": Reader(
        "runs/full-seed0.json", result(), lambda f: finished_results(STUDY, f), ValueError
    ),
    "study's calls": Reader(
        CALLS, [{"seconds": 1.0, "command": "x"}] * 3, read_calls, ValueError, lines=True
    ),
}
TRIES = 25 if FACTOR == 1 else 50


def prepare(folder: Path, reader: Reader) -> Path:
    """The folder with everything but the file itself."""
    path = folder / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if reader.read is score:
        for name in ("truth", "guess"):
            synthetic.write_json(folder / name / path.name, predicted(synthetic.posetrack18(TRUTH)))
    if reader.error is JournalError:
        synthetic.write_json(folder / "settings.json", STORED_SETTINGS)
    return path


def check(path: Path, reader: Reader, data: bytes, folder: Path) -> None:
    """A file is read, or refused by its name."""
    if currently_in_test_context():
        note(repr(data[:5000]))
    path.write_bytes(data)
    try:
        with np.errstate(all="ignore"):
            reader.read(folder)
    except reader.error as error:
        message = str(error)
        assert path.name in message or reader.file in message, message
        assert len(message) < 2000, message[:300]
        assert "\ud800" not in message, "cannot be printed"


def with_long_texts(reader: Reader) -> Iterator[bytes]:
    """The document with a name, or a text for a value, of 5,000 letters at every name once.

    Of a slow reader's names only some.
    """
    first = {}
    for i, (_, key) in enumerate(nodes_of(reader.document)):
        if isinstance(key, str):
            first.setdefault(key, i)
    for key, i in itertools.islice(first.items(), None, None, round(1 / reader.share)):
        for rename in (True, False):
            document = copy.deepcopy(reader.document)
            container, _ = next(itertools.islice(nodes_of(document), i, None))
            value = container.pop(key) if rename else "x" * 5000
            container["k" * 5000 if rename else key] = value
            yield (dump_lines if reader.lines else dump)(document)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_by_name(name, hunt, tmp_path):
    reader = READERS[name]
    path = prepare(tmp_path, reader)
    path.write_bytes((dump_lines if reader.lines else dump)(reader.document))
    reader.read(tmp_path)
    for data in with_long_texts(reader):
        check(path, reader, data, tmp_path)
    inputs = damaged(reader.document, reader.lines)
    hunt(lambda data: check(path, reader, data, tmp_path), inputs, int(TRIES * reader.share))


def test_a_journal_is_cut_at_the_first_line_that_was_changed(hunt, tmp_path):
    """What is read of it is never another pose."""
    path = tmp_path / "frames.jsonl"
    synthetic.write_json(tmp_path / "settings.json", STORED_SETTINGS)
    whole = b"".join(map(with_checksum, journal_lines()))
    path.write_bytes(whole)
    frames = journal(tmp_path)
    assert len(frames) == 3

    def check_journal(data: bytes) -> None:
        path.write_bytes(data)
        read = journal(tmp_path)
        assert read == frames[: len(read)]

    hunt(check_journal, changed_text(whole) | changed_bytes(whole), TRIES)


def test_lines_of_a_journal_that_another_program_wrote_are_refused_by_name(hunt, tmp_path):
    """Their checksums are right, so only what they say is wrong."""
    reader = Reader("frames.jsonl", journal_lines(), journal, JournalError, lines=True)
    path = prepare(tmp_path, reader)

    def sealed(data: bytes) -> bytes:
        texts = [line.removesuffix(b"}") for line in data.split(b"\n")]
        return b"".join(b'%s, "crc32": "%08x"}\n' % (text, zlib.crc32(text)) for text in texts)

    inputs = damaged(reader.document, lines=True).map(sealed)
    hunt(lambda data: check(path, reader, data, tmp_path), inputs, TRIES)


@pytest.mark.parametrize("name", ["plan.json", "complete.json"])
def test_a_damaged_index_of_a_cache_is_refused_by_name(name, hunt, tmp_path):
    synthetic.write_pictures(tmp_path, TRUTH)
    clips = ClipDataset([TRUTH], tmp_path, (64, 48), 1, DataConfig(), train=True)
    build(clips, tmp_path / "store", progress=False)
    source, path = source_of(clips), tmp_path / "store" / name
    document = json.loads(path.read_bytes())

    def read(folder: Path) -> None:
        read_plan(folder / "store")  # before checksums show that something has changed
        TileCache(folder / "store", source)

    reader = Reader("store", document, read, CacheError)
    hunt(lambda data: check(path, reader, data, tmp_path), damaged(document), TRIES)


@st.composite
def damaged_table(draw, text: str) -> bytes:
    """CSV with up to two cells changed, or bytes."""
    rows = [line.split(",") for line in text.splitlines()]
    values = [
        "",
        "nan",
        "1e999",
        "9" * 5000,
        '"',
        "\x00",
        "-1",
        *(cell for row in rows for cell in row),
    ]
    for _ in range(draw(st.integers(0, 2))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        row[draw(st.integers(0, len(row) - 1))] = draw(st.sampled_from(values) | st.text())
    data = "\n".join(",".join(row) for row in rows).encode("utf-8", "surrogatepass")
    return draw(changed_text(data)) if draw(st.booleans()) else data


def test_damaged_tables_are_read_or_refused_by_name(hunt, tmp_path):
    text = "image,track,keypoint,x,y,visible\na.jpg,0,head,1,2,2\na.jpg,1,head,1,2,\nb,0,head,,,\n"

    def read(folder: Path) -> None:
        read_csv_drafts(folder / "c.csv", ConvertReport("raise"))

    path, reader = tmp_path / "c.csv", Reader("c.csv", text, read)
    hunt(lambda data: check(path, reader, data, tmp_path), damaged_table(text), TRIES)


@pytest.mark.parametrize("value", HOSTILE[:40], ids=lambda value: repr(value)[:20])
def test_what_hides_a_rendered_person_is_checked(value):
    """``Frame.extra`` is kept as it is; the subsets read a part of it."""
    frame = synthetic.sequence(indices=(0,)).frames[0]
    for extra in ({"cmpose": value}, {"cmpose": {"occluded_joints": value}}):
        frame.extra, message = extra, frame.file_name
        with contextlib.suppress(AnnotationError):
            subsets_of(frame)
            continue
        with pytest.raises(AnnotationError, match=re.escape(message)):
            subsets_of(frame)
