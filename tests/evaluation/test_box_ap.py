"""The measure for keypoints that are not PoseTrack's: the same AP, distances in boxes."""

from __future__ import annotations

import copy

import pytest

from cmpose.data.skeleton import CATEGORY, SLOTS17
from cmpose.evaluation.posetrack_ap import score_sequences

THREE = {"id": 1, "keypoints": ["head", "left_paw", "right_paw"], "flip_pairs": []}


def document(people, category=THREE, **fields):
    """One frame; people are lists of (x, y), or None where a keypoint is absent."""
    annotations = []
    for k, points in enumerate(people):
        flat = [v for p in points for v in ((*p, 1) if p else (0, 0, 0))]
        annotations.append(
            {"image_id": 1, "track_id": k, "keypoints": flat, "bbox": [0, 0, 40, 100]} | fields
        )
    images = [{"id": 1, "file_name": "a/000000.jpg"}]
    return {"images": images, "annotations": annotations, "categories": [category]}


def score(truth, guess, **options):
    return score_sequences({"a": truth}, {"a": guess}, **options)


def test_a_tenth_of_the_longer_side_decides():
    truth = document([[(10, 10), (20, 20), None]])
    guess = document([[(20, 10), (20, 30.1), (5, 5)]], scores=[0.9, 0.8, 0.7])
    result = score(truth, guess)
    assert result.ap[:2].tolist() == [100.0, 0.0]
    assert result.ap[2] != result.ap[2], "nobody annotated it: no AP"
    assert result.mean == 50.0
    assert result.columns == {"Mean": 50.0}
    written = result.to_json()
    assert written["joints"] == THREE["keypoints"]
    assert written["ap"] == [100.0, 0.0, None]
    assert "not PoseTrack's AP" in written["metric"]
    first, *_ = result.table("gt").splitlines()
    assert first.endswith("longer side (not PoseTrack's AP), in per cent (boxes: gt)")
    assert "PCKh" not in result.table()


def test_a_keypoint_without_predictions_counts_as_missed():
    truth = document([[(10, 10), (20, 20), (30, 30)]])
    guess = document([[(10, 10), None, None]], scores=[1, 1, 1])
    assert score(truth, guess).ap.tolist() == [100.0, 0.0, 0.0]


def test_the_names_of_both_files_decide():
    truth = document([[(10, 10), (20, 20), (30, 30)]])
    other = {**THREE, "keypoints": ["right_paw", "left_paw", "head"]}
    guess = document([[(30, 30), (20, 20), (10, 10)]], category=other, scores=[1, 1, 1])
    assert score(truth, guess).mean == 100.0
    lacking = {**THREE, "keypoints": ["head", "left_paw"]}
    with pytest.raises(ValueError, match=r"lacks right_paw; the ground truth's keypoint names"):
        score(truth, document([[(1, 1), (2, 2)]], category=lacking))
    with pytest.raises(ValueError, match="a PoseTrack17 annolist knows PoseTrack's joints alone"):
        score(truth, {"annolist": []})
    with pytest.raises(ValueError, match=r"the ground truth before it has head, left_paw"):
        score_sequences({"a": truth, "b": guess}, {"a": truth, "b": guess})


def test_posetracks_joints_keep_the_official_measure_unless_asked():
    person = [(float(10 * j + 1), 50.0) for j in range(len(SLOTS17))]
    truth = document([person], category=CATEGORY, bbox_head=[0, 0, 30, 40])
    guess = copy.deepcopy(truth)
    guess["annotations"][0]["scores"] = [1.0] * 17
    guess["annotations"][0]["keypoints"][1] += 14.0  # nose: 15 is half of 0.6 · 50, 10 of the box
    official, own = score(truth, guess), score(truth, guess, reference="box")
    nose = official.skeleton.keypoints.index("nose")
    assert official.metric == "PoseTrack AP, PCKh 0.5"
    assert "metric" not in official.to_json()
    assert (official.ap[nose], own.ap[nose]) == (100.0, 0.0)
    assert own.columns["Ankle"] == 100.0
    assert "official" not in own.table()


def test_what_cannot_be_measured_is_named():
    truth = document([[(10, 10), (20, 20), (30, 30)]])
    guess = copy.deepcopy(truth)
    with pytest.raises(ValueError, match=r"reference='head': PoseTrack's AP is of its own 15"):
        score(truth, guess, reference="head")
    with pytest.raises(ValueError, match="reference must be 'head' or 'box', got 'oks'"):
        score(truth, guess, reference="oks")
    del truth["annotations"][0]["bbox"]
    with pytest.raises(ValueError, match=r"frame 0 .* has a person with joints but no box"):
        score(truth, guess)
