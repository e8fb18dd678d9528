"""Good inputs that are said in unusual ways: the right result, by a second reading of them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from cmpose.convert.convert import convert
from cmpose.convert.options import ConvertOptions
from cmpose.data.formats.posetrack import load_annotations
from cmpose.evaluation.posetrack_ap import score_sequences
from cmpose.predict.detectors.detect import load_video_detections
from tests.convert.test_convert import NAMES
from tests.data import synthetic
from tests.evaluation.oracle import slow_ap
from tests.evaluation.test_posetrack_ap import random_sequence
from tests.fuzz.damage import rewritten
from tests.fuzz.test_readers import READERS, prepare

IN_ONE_DOCUMENT = [name for name, reader in READERS.items() if not reader.lines]


def plain(value: Any) -> Any:
    """Plain data that is equal where results are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(plain, value)]
    if hasattr(value, "__struct_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if hasattr(value, "tolist"):
        return repr(value.tolist())
    slots = getattr(value, "__dict__", None)
    return plain(slots) if slots else repr(value)


@pytest.mark.parametrize("name", IN_ONE_DOCUMENT)
def test_the_order_of_keys_blanks_and_a_mark_do_not_matter(name, hunt, tmp_path):
    reader = READERS[name]
    path = prepare(tmp_path, reader)
    synthetic.write_json(path, reader.document)
    expected = plain(reader.read(tmp_path))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        assert plain(reader.read(tmp_path)) == expected

    hunt(check, rewritten(reader.document), 3)


def test_ap_is_that_of_a_slow_second_reading(hunt):
    def check(case: tuple[int, bool]) -> None:
        rng = np.random.default_rng(case[0])
        cases = {f"{s:06d}.json": random_sequence(rng, s, case[1]) for s in range(2)}
        result = score_sequences(
            {name: truth for name, (truth, _) in cases.items()},
            {name: guess for name, (_, guess) in cases.items()},
        )
        expected = [math.nan if ap is None else ap for ap in slow_ap(cases.values())]
        np.testing.assert_allclose(result.ap, expected, rtol=0, atol=1e-9, equal_nan=True)

    hunt(check, st.tuples(st.integers(0, 2**63), st.booleans()), 5)


PICTURES = [*(f"walk/{n:04d}.jpg" for n in range(4)), "one/a.jpg", "two/a.jpg", "0.jpg"]
INSIDE = st.tuples(
    st.integers(0, 63) | st.floats(0.25, 63), st.integers(0, 47) | st.floats(0.25, 47)
).filter(lambda point: max(point) > 2)
"""A point in a picture. Keypoints all within a pixel would be refused as shares of the picture."""


@st.composite
def own_labels(draw: Any) -> dict[str, Any]:
    """COCO keypoints of some of ``PICTURES``, ids and order as they come."""
    files = draw(st.lists(st.sampled_from(PICTURES), min_size=1, unique=True))
    ids = draw(st.lists(st.integers(0, 2**53), min_size=8, max_size=8, unique=True))
    images = [
        {"id": number, "file_name": file, "width": 64, "height": 48}
        for number, file in zip(ids, files, strict=False)
    ]
    annotations, tracks = [], itertools.count(draw(st.integers(0, 9)))
    for number, image in enumerate(images):
        for _ in range(draw(st.integers(number == 0, 2))):
            points = draw(st.lists(INSIDE, min_size=3, max_size=3))
            visible = draw(st.lists(st.sampled_from((0, 1, 2)), min_size=3, max_size=3))
            triples = [(*xy, v) if v else (0, 0, 0) for xy, v in zip(points, visible, strict=True)]
            person = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": 3}
            person |= {"bbox": [1, 2, 60, 44], "keypoints": [*itertools.chain(*triples)]}
            annotations.append(person | {"track_id": next(tracks)})
    category = {"id": 3, "name": "cat", "keypoints": NAMES}
    return {
        "images": draw(st.permutations(images)),
        "annotations": draw(st.permutations(annotations)),
        "categories": [category],
    }


def test_converted_labels_are_those_that_were_given(hunt, tmp_path):
    """Every labelled person is found again in the picture of the same bytes."""
    for number, name in enumerate(PICTURES):
        synthetic.write_picture(tmp_path / "pics" / name, number, (64, 48))

    def check(document: dict[str, Any]) -> None:
        source = synthetic.write_json(tmp_path / "own.json", document)
        out = tmp_path / f"out{next(numbers)}"
        convert(source, out, tmp_path / "pics", ConvertOptions(group="still"))
        expected: dict[bytes, list[Any]] = {}
        for image in document["images"]:
            people = [a for a in document["annotations"] if a["image_id"] == image["id"]]
            content = (tmp_path / "pics" / image["file_name"]).read_bytes()
            expected[content] = sorted(
                (a["track_id"], np.reshape(a["keypoints"], (3, 3)).tolist()) for a in people
            )
        actual = {}
        for sequence in load_annotations(out / "annotations/train"):
            for frame in sequence.frames:
                people = [(p.track_id, p.keypoints.tolist()) for p in frame.people]
                actual[(out / frame.file_name).read_bytes()] = sorted(people)
        for people in expected.values():
            for _, keypoints in people:
                for triple in keypoints:
                    triple[2] = min(triple[2], 1)
        assert actual == expected

    numbers = itertools.count()
    hunt(check, own_labels(), 5)


BOX = st.fixed_dictionaries(
    {
        "frame": st.integers(0, 4),
        "bbox": st.tuples(st.integers(-5, 50), st.integers(-5, 40), st.integers(2, 20), st.just(9)),
    },
    optional={
        "score": st.floats(0, 1) | st.integers(0, 1),
        "category_id": st.sampled_from((1, "person", " Person", 2, 17, "car")),
    },
)


def test_boxes_of_a_video_are_used_or_counted(hunt, tmp_path):
    """Those used are people of enough score, the best of a frame first; the others are counted."""
    path = tmp_path / "boxes.json"

    def is_used(box: dict[str, Any]) -> bool:
        person = str(box.get("category_id", 1)).strip().lower() in ("1", "person")
        return person and box.get("score", 1) >= 0.3

    def check(boxes: list[dict[str, Any]]) -> None:
        synthetic.write_json(path, boxes)
        used = [box for box in boxes if is_used(box)]
        if not used:
            with pytest.raises(ValueError, match=r"boxes\.json"):
                load_video_detections(path, 5, min_score=0.3)
            return
        detections = load_video_detections(path, 5, min_score=0.3)
        for frame, actual in detections.items():
            expected = [box for box in used if box["frame"] == frame]
            expected.sort(key=lambda box: -box.get("score", 1))
            assert [d.score for d in actual] == [box.get("score", 1) for box in expected]
            assert [d.box.tolist() for d in actual] == [[*map(float, b["bbox"])] for b in expected]
        assert sum(map(len, detections.values())) == len(used)
        assert sum(detections.counts.left_out.values()) == len(boxes) - len(used)

    hunt(check, st.lists(BOX, max_size=12), 20)
