"""People detection and detection files."""

from __future__ import annotations

import json
import tracemalloc

import cv2
import numpy as np
import pytest

from cmpose.data.formats import reader
from cmpose.predict.detectors.detect import (
    Detection,
    detect_people,
    load_video_detections,
    suppress,
)
from tests.shared_data import shared_data


def read_frame(path, number):
    capture = cv2.VideoCapture(str(path))
    for _ in range(number + 1):
        ok, frame = capture.read()
        assert ok
    return frame


def at(x, y=0.0, w=40.0, h=100.0, score=0.9, track_id=-1):
    return Detection(np.array([x, y, w, h]), score, track_id)


@pytest.mark.shared_data
def test_hog_finds_the_two_people():
    frame = read_frame(shared_data("video", "two_people.mp4"), 0)
    people = detect_people(frame)
    assert len(people) == 2
    # Hand-read boxes of the two people in the first frame.
    for truth in ((880, 235, 270, 630), (560, 270, 320, 640)):
        best = max(people, key=lambda d: _iou(d.box, truth))
        assert _iou(best.box, truth) > 0.5
    assert people[0].score >= people[1].score
    for person in people:
        assert 0 < person.score < 1
        assert (person.box[:2] >= 0).all()
        assert (person.box[:2] + person.box[2:] <= (1920, 1080)).all()


@pytest.mark.shared_data
def test_hog_enlarges_small_frames():
    frame = read_frame(shared_data("video", "basketball.mp4"), 150)
    people = detect_people(frame)
    assert any(_iou(person.box, (160, 93, 52, 105)) > 0.5 for person in people)
    assert detect_people(frame, min_distance=50.0) == []


def test_hog_on_frames_without_people():
    assert detect_people(np.full((360, 640, 3), 128, np.uint8)) == []
    assert detect_people(np.zeros((10, 20, 3), np.uint8)) == []  # smaller than the window
    with pytest.raises(ValueError, match=r"frame must be uint8 \[H, W, 3\], got float32"):
        detect_people(np.zeros((360, 640, 3), np.float32))
    with pytest.raises(ValueError, match=r"got uint8 \(360, 640\)"):
        detect_people(np.zeros((360, 640), np.uint8))


def test_suppression_keeps_the_best_of_overlapping_and_nested_boxes():
    detections = [at(0, score=0.5), at(4, score=0.9), at(10, 20, 20, 50, 0.8), at(100, score=0.1)]
    kept = suppress(detections, 0.5, 0.8)
    assert [d.score for d in kept] == [0.9, 0.1]


def write(tmp_path, entries):
    path = tmp_path / "boxes.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_detections_file(tmp_path):
    path = write(
        tmp_path,
        [
            {"frame": 2, "bbox": [1, 2, 3, 4], "score": 0.5, "track_id": 1},
            {"frame": 2, "bbox": [5, 6, 7, 8], "score": 0.75, "track_id": 0},
            {"frame": 0, "bbox": [5, 6, 7, 8], "score": 0.1, "track_id": 0},
        ],
    )
    people = load_video_detections(path, 3, min_score=0.2)
    assert list(people) == [2]
    assert [(d.score, d.track_id) for d in people[2]] == [(0.75, 0), (0.5, 1)]
    assert people[2][1].box.tolist() == [1, 2, 3, 4]


def test_coco_results_file(tmp_path):
    entries = [
        {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]},
        {"image_id": 1, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.9},
    ]
    people = load_video_detections(write(tmp_path, entries), 2)
    assert [(d.score, d.track_id) for d in people[1]] == [(1.0, -1)]


@pytest.mark.parametrize("key", ["score", "confidence", "conf"])
def test_a_score_under_each_name_detectors_have_for_it(tmp_path, key):
    entries = [{"frame": 0, "bbox": [1, 2, 3, 4], key: score} for score in (0.1, 0.5)]
    people = load_video_detections(write(tmp_path, entries), 1, min_score=0.2)
    assert [d.score for d in people[0]] == [0.5]


GOOD = {"frame": 0, "bbox": [1, 2, 3, 4], "score": 0.5}
BAD = {
    "malformed": ('[{"frame": 0,', "boxes.json: not valid JSON: .*, after 0 whole items"),
    "no list": (
        {"frame": 0},
        r"boxes.json: expected a list, got {'frame': 0}; an entry is {\"frame\": 0, \"bbox\"",
    ),
    "empty list": ([], "has no detections; leave the file out"),
    "empty file": ("", "not valid JSON"),
    "no object": ([3], r"\[0\]: expected an object, got 3"),
    "no frame": ([{"bbox": [1, 2, 3, 4]}], r"\[0\]: has no 'frame' \(nor 'image_id'\)"),
    "outside": (
        [GOOD, *({**GOOD, "frame": i} for i in (9, 3, 3))],
        "3 of 4 detections are of frames that the video does not have, e.g. 3, 9; .* 0 to 2",
    ),
    "other size": (
        [GOOD, {**GOOD, "bbox": [300, 20, 50, 90]}],
        r"1 of 2 boxes have their centre outside of the video's 256×144 pixels, e.g. bbox "
        r"\[300.0, 20.0, 50.0, 90.0\] in frame 0; were they found in a video of another size",
    ),
    "no comma": ('[{"frame": 0, "bbox": [1, 2, 3, 4]} {}]', "delimiter, after 1 whole items"),
    "more behind": ('[{"frame": 0, "bbox": [1, 2, 3, 4]}] []', "Extra data, after 1 whole"),
    "negative": (
        [{**GOOD, "frame": -1}],
        r"\[0\]\.frame: expected an integer of at least 0, got -1; .*counted from 0",
    ),
    "fraction": ([{**GOOD, "frame": 0.5}], r"\[0\]\.frame: expected an integer, got 0\.5"),
    "short box": (
        [{**GOOD, "bbox": [1, 2, 3]}],
        r"\[0\]\.bbox: expected 4 values, got 3: .*\"bbox\": \[x, y, width, height\]",
    ),
    "no box": ([{"frame": 0}], r"\[0\]: missing key 'bbox'; it has \['frame'\]"),
    "flat box": ([{**GOOD, "bbox": [1, 2, 0, 4]}], "has no area"),
    "text box": (
        [{**GOOD, "bbox": ["a", 2, 3, 4]}],
        r"\[0\]\.bbox\[0\]: expected a number, got 'a'",
    ),
    "NaN score": (
        '[{"frame": 0, "bbox": [1, 2, 3, 4], "score": NaN}]',
        r"\[0\]\.score: expected a finite number, got nan",
    ),
    "list score": ([{**GOOD, "score": [1]}], r"\[0\]\.score: expected a number, got \[1\]"),
    "text track": ([{**GOOD, "track_id": "a"}], r"\[0\]\.track_id: expected an integer, got 'a'"),
    "same track": ([{**GOOD, "track_id": 1}] * 2, "track_id 1 is twice in frame 0"),
    "some tracks": ([GOOD, {**GOOD, "track_id": 1}], "1 of 2 detections have a track_id"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_detection_files(tmp_path, case):
    entries, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        load_video_detections(write(tmp_path, entries), 3, size=(256, 144))


def test_a_file_longer_than_a_piece_is_read_piece_by_piece(tmp_path, monkeypatch):
    entries = [
        {"frame": i // 2, "bbox": [i, 2.5, 3, 4], "score": 1 - i / 1000, "note": "é,]{" * (i % 5)}
        for i in range(200)
    ]
    path = tmp_path / "boxes.json"
    for indent in (None, 1):
        path.write_text(json.dumps(entries, indent=indent, ensure_ascii=False), encoding="utf-8")
        for piece in (1, 7, 1000):
            monkeypatch.setattr(reader, "_PIECE", piece)
            people = load_video_detections(path, 100)
            assert list(people) == list(range(100))
            assert [d.box[0] for i in people for d in people[i]] == list(range(200))
            assert 100 not in people


def test_many_detections_take_little_memory(tmp_path):
    path = tmp_path / "boxes.json"
    line = ',\n{"frame": %d, "bbox": [100.25, 50.5, 40.125, 90.75], "score": 0.875}'
    with open(path, "w") as file:
        file.write("[" + line[2:] % 0)
        file.writelines(line % (i // 2) for i in range(1, 20_000))
        file.write("]")
    tracemalloc.start()
    people = load_video_detections(path)
    held_bytes, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(people) == 10_000
    assert held_bytes < 20_000 * 64
    assert peak < 20_000 * 64 * 2 + (4 << 20)


def test_missing_detection_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.json does not exist"):
        load_video_detections(tmp_path / "none.json")


def _iou(a, b):
    ax, ay, aw, ah = a
    bx, by, bw, bh = b
    w = min(ax + aw, bx + bw) - max(ax, bx)
    h = min(ay + ah, by + bh) - max(ay, by)
    inter = max(0, w) * max(0, h)
    return inter / (aw * ah + bw * bh - inter)
