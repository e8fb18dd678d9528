"""Prediction files: read back by the evaluator; the mean pose; bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import SLOT_OF_JOINT, SLOTS17
from cmpose.evaluation.mean_pose import mean_pose, mean_pose_in_images
from cmpose.evaluation.posetrack_ap import score_folders
from cmpose.evaluation.predictions import predicted_sequences, write_predictions
from tests.shared_data import shared_data


def video(frames=3):
    return Sequence(
        name="000001_mpii_test",
        file_stem="000001_mpii_test",
        frames=[
            Frame(100 + i, f"images/val/000001_mpii_test/{i:06d}.jpg", i) for i in range(frames)
        ],
    )


def record(sequence, frame, score=0.5, track_id=None, box=(1.0, 2.0, 30.0, 60.0)):
    box = np.array(box)
    person = None if track_id is None else Person(box, track_id=track_id)
    return SimpleNamespace(
        sequence=sequence, frame=sequence.frames[frame], person=person, box=box, score=score
    )


@pytest.mark.shared_data
@pytest.mark.parametrize("source", ["annotations/val", "annotations/val_merged.json"])
def test_ground_truth_as_predictions_scores_100(tmp_path, source):
    """Written with the same joints left out, real ground truth comes back whole."""
    root = shared_data("posetrack18")
    sequences = load_annotations(source, root)
    written = tmp_path / "pred"
    people = [(s, f, p) for s in sequences for f in s.frames for p in f.people]
    records = [
        SimpleNamespace(sequence=s, frame=f, person=p, box=p.box, score=1.0) for s, f, p in people
    ]
    keypoints = np.stack([p.keypoints[:, :2] for _, _, p in people])
    scores = np.stack([p.keypoints[:, 2] for _, _, p in people])  # unannotated ones rank last
    paths = write_predictions(written, sequences, records, keypoints, scores)
    assert sorted(path.name for path in paths) == sorted(
        path.name for path in (root / "annotations/val").iterdir()
    )
    result = score_folders(root / "annotations" / "val", written)
    np.testing.assert_allclose(result.ap, 100.0)  # guesses of score 0 come after full recall
    assert result.num_predictions >= 14


def test_file_layout(tmp_path):
    sequence = video()
    records = [record(sequence, 1, 0.5, 7), record(sequence, 1, 0.25, 7), record(sequence, 2)]
    keypoints = np.arange(90.0).reshape(3, 15, 2) - 20  # some outside the image
    keypoints[0, 4] = 0.0
    scores = np.full((3, 15), 0.8)
    (path,) = write_predictions(tmp_path / "new" / "folder", [sequence], records, keypoints, scores)
    assert [entry.name for entry in path.parent.iterdir()] == ["000001_mpii_test.json"]
    data = json.loads(path.read_text())
    assert [(im["id"], im["file_name"]) for im in data["images"]] == [
        (frame.image_id, frame.file_name) for frame in sequence.frames
    ]
    first, second, third = data["annotations"]
    assert (first["image_id"], second["image_id"], third["image_id"]) == (101, 101, 102)
    assert (first["track_id"], second["track_id"], third["track_id"]) == (7, 0, 0)
    assert (first["score"], first["category_id"], first["bbox"]) == (0.5, 1, [1, 2, 30, 60])
    assert len({a["id"] for a in data["annotations"]}) == 3
    slots = np.reshape(first["keypoints"], (17, 3))
    np.testing.assert_array_equal(slots[list(SLOT_OF_JOINT), :2], keypoints[0])
    assert slots[list(SLOT_OF_JOINT), 2].tolist() == [1.0] * 15  # (0, 0) too
    assert slots[3:5].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert first["scores"] == [0.0 if slot in (3, 4) else 0.4 for slot in range(17)]
    assert data["categories"][0]["keypoints"] == list(SLOTS17)


def test_score_rules():
    sequence = video()
    arrays = np.zeros((1, 15, 2)), np.full((1, 15), 0.8)
    for rule, expected in (("heatmap_box", 0.2), ("heatmap", 0.8)):
        (out,) = predicted_sequences([sequence], [record(sequence, 0, 0.25)], *arrays, rule)
        person = out.frames[0].people[0]
        np.testing.assert_allclose(person.joint_scores, expected)
        assert person.score == 0.25


def test_bad_predictions():
    sequence, other = video(), video(frames=9)
    good = np.zeros((1, 15, 2)), np.ones((1, 15))

    def predict(records, keypoints, scores, rule="heatmap"):
        return predicted_sequences([sequence], records, keypoints, scores, rule)

    with pytest.raises(ValueError, match=r"keypoints must have shape \(2, 15, 2\) for 2 records"):
        predict([record(sequence, 0)] * 2, *good)
    with pytest.raises(ValueError, match=r"scores must have shape \(1, 15\)"):
        predict([record(sequence, 0)], good[0], np.ones((1, 17)))
    with pytest.raises(ValueError, match=r"000008.jpg of sequence .* no such frame \(image id 108"):
        predict([record(other, 8)], *good)
    nan = good[0].copy()
    nan[0, 13, 1] = np.nan
    with pytest.raises(ValueError, match=r"nose is not finite: position \[0.0, nan\].*heatmaps"):
        predict([record(sequence, 0)], nan, good[1])
    with pytest.raises(ValueError, match=r"box \[.*\] or its score nan is not finite"):
        predict([record(sequence, 0, score=np.nan)], *good)
    with pytest.raises(ValueError, match="rule must be 'heatmap_box' or 'heatmap', got 'mean'"):
        predict([record(sequence, 0)], *good, "mean")


def test_mean_pose_by_hand():
    keypoints = np.array([[[10, 20], [30, 40], [9, 9]], [[20, 40], [90, 90], [9, 9]]], float)
    visible = np.array([[1, 1, 0], [1, 0, 0]])
    mean = mean_pose(keypoints, visible, (200, 100))
    np.testing.assert_allclose(mean[:2], [[0.15, 0.15], [0.30, 0.20]])
    np.testing.assert_allclose(mean[2], [0.225, 0.175])  # nobody has it: amid the others
    double = np.array([[[2.0, 0, 5], [0, 2, -3]]])  # a crop of half the size, scaled and moved
    placed = mean_pose_in_images(mean, double, (100, 50))
    np.testing.assert_allclose(placed[0, 0], [(0.15 * 50 - 5) / 2, (0.15 * 100 + 3) / 2])
    assert mean_pose_in_images(mean, np.empty((0, 2, 3)), (100, 50)).shape == (0, 3, 2)


def test_bad_mean_pose():
    with pytest.raises(ValueError, match=r"visible \[P, K\], got \(2, 3, 2\) and \(3, 2\)"):
        mean_pose(np.zeros((2, 3, 2)), np.ones((3, 2)), (8, 8))
    with pytest.raises(ValueError, match="none of the 6 joints is"):
        mean_pose(np.zeros((2, 3, 2)), np.zeros((2, 3)), (8, 8))
    with pytest.raises(ValueError, match=r"matrices must be \[P, 2, 3\]"):
        mean_pose_in_images(np.zeros((3, 2)), np.zeros((2, 3)), (8, 8))
    with pytest.raises(ValueError, match=r"matrices\[0\] cannot be inverted"):
        mean_pose_in_images(np.zeros((3, 2)), np.zeros((1, 2, 3)), (8, 8))
