"""Poses that hold still, poses as tables, and the angles of joints."""

from __future__ import annotations

import csv
import json
import sys
import types

import numpy as np
import pytest

import cmpose
from cmpose.data.skeleton import JOINTS, POSETRACK, Skeleton
from cmpose.predict.frame import PredictedFrame, PredictedPerson
from cmpose.predict.one_euro import KeypointSmoother
from cmpose.predict.predict import predict_video
from cmpose.predict.table import angle_joints, joint_angles

FPS, SIZE = 25.0, 200.0


@pytest.fixture(scope="module")
def model(weights):
    return cmpose.load(weights)


def frames_of(keypoints, track_ids=None, numbers=None):
    """Frames of one person whose keypoints are [F, K, 2]."""
    box = np.array([0, 0, 80, SIZE])
    for i, points in enumerate(keypoints):
        person = PredictedPerson(
            track_ids[i] if track_ids else 0, 1.0, box, points, np.ones(len(points))
        )
        yield PredictedFrame(numbers[i] if numbers else i, np.zeros((0, 0, 3), np.uint8), [person])


def smoothed(strength, keypoints, **options):
    out = map(KeypointSmoother(strength, FPS), frames_of(keypoints, **options))
    return np.array([frame.people[0].keypoints for frame in out])


def test_who_stands_is_held_still_and_who_moves_does_not_lag():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2, (100, 5, 2))
    still = smoothed(1, 50 + noise)[25:]
    jitter = np.abs(np.diff(still, axis=0)).mean() / np.abs(np.diff(noise, axis=0)).mean()
    assert jitter < 0.4
    assert np.abs(still - 50).mean() < 0.7 * np.abs(noise).mean()
    assert (
        np.abs(np.diff(smoothed(4, 50 + noise)[25:], axis=0)).mean()
        < np.abs(np.diff(still, axis=0)).mean()
    )
    # At two sizes a second, a wrist of a throw, it lags by less than the way of one frame.
    step = 2 * SIZE / FPS
    fast = np.arange(100)[:, None, None] * np.array([step, 0]) + np.zeros((1, 5, 1))
    assert np.abs(smoothed(1, fast) - fast)[50:].max() < step


def test_the_filter_is_the_papers():
    """Two steps by hand: min_cutoff 1 Hz, speed in sizes of the person a second."""
    path = np.array([[[0.0, 0.0]], [[8.0, 0.0]], [[8.0, 6.0]]])
    dt, expected, speed = 1 / FPS, [np.zeros(2)], np.zeros(2)

    def share(cutoff):
        return 1 / (1 + 1 / (2 * np.pi * cutoff * dt))

    for now in path[1:, 0]:
        a = share(1.0)
        speed = a * (now - expected[-1]) / SIZE / dt + (1 - a) * speed
        a = share(1.0 + 20 * np.hypot(*speed))
        expected.append(a * now + (1 - a) * expected[-1])
    np.testing.assert_allclose(smoothed(1, path)[:, 0], expected, atol=1e-4)


def test_people_are_filtered_apart_and_begin_anew_after_a_second():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 2, (2, 6, 3, 2))
    both = np.stack([a, b], 1).reshape(12, 3, 2)
    ids, numbers = [0, 1] * 6, [i // 2 for i in range(12)]
    together = smoothed(1, both, track_ids=ids, numbers=numbers)
    np.testing.assert_array_equal(together[::2], smoothed(1, a))
    np.testing.assert_array_equal(together[1::2], smoothed(1, b))
    late = smoothed(1, a, numbers=[0, 1, 2, 28, 29, 30])
    np.testing.assert_array_equal(late[3], a[3])
    assert (smoothed(1, a, numbers=[0, 1, 2, 27, 28, 29])[3] != a[3]).any()
    np.testing.assert_array_equal(smoothed(0, a), a)


def test_smoothing_is_in_all_results_and_in_no_journal(model, clip, weights, tmp_path):
    """A run that is gone on with smooths as one that was not stopped: the journal has no trace."""
    video, boxes, count, _ = clip
    options = {"boxes": boxes, "smooth_keypoints": 2.0}
    whole = model.predict(video, **options)
    whole.save(tmp_path / "whole", outputs=["coco", "csv"], progress=False)
    one = {"detections": boxes, "smooth_keypoints": 2.0, "progress": False, "batch_size": 2}
    with pytest.raises(KeyError):
        stop_after(1, clip, weights, tmp_path / "out", **one)
    metrics = predict_video(video, weights, tmp_path / "out", outputs=["coco"], **one)
    assert 0 < metrics["resumed_at_frame"] < count
    with pytest.raises(RuntimeError, match=r"--smooth_keypoints was 2.0, is None"):
        model.predict(video, boxes=boxes).save(tmp_path / "whole", outputs=["coco", "csv"])
    plain = [frame.keypoints for frame in model.predict(video, boxes=boxes)]
    frames = list(whole)
    assert any((a != f.keypoints).any() for a, f in zip(plain, frames, strict=True))
    results = [
        json.loads((tmp_path / d / f"coco/{video.stem}.json").read_text()) for d in ("whole", "out")
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a["keypoints"], b["keypoints"], atol=2e-3)
    nose = np.array([r["keypoints"][:2] for r in results[0]])
    expected = np.concatenate([f.keypoints[:, JOINTS.index("nose")] for f in frames])
    np.testing.assert_allclose(nose, expected, atol=1e-3)


def stop_after(batches, clip, weights, out, **options):
    from cmpose.predict.predictor import Predictor

    predictor, calls = Predictor.load(weights), []
    poses = predictor.poses

    def failing(*arguments):
        calls.append(1)
        if len(calls) > batches:
            raise KeyError
        return poses(*arguments)

    predictor.poses = failing
    predict_video(clip[0], predictor, out, outputs=["coco"], **options)


def test_keypoints_of_low_scores_are_not_drawn_and_that_is_said(model, clip, tmp_path, capsys):
    video, boxes, *_ = clip
    frames = list(model.predict(video, boxes=boxes))
    scores = np.concatenate([frame.scores for frame in frames])
    values = np.unique(scores)
    limit = float(values[len(values) // 2])
    prediction = model.predict(video, boxes=boxes, keypoint_score=limit)
    metrics = prediction.save(tmp_path, outputs=["video"])
    low = int((scores < limit).sum())
    assert (metrics["keypoints"], metrics["keypoints_not_drawn"]) == (scores.size, low)
    note = f"note: {low} of {scores.size} keypoints have a score below --keypoint-score {limit:g}"
    assert low > 0
    assert note in capsys.readouterr().out
    fewer = next(iter(prediction)).plot()
    more = next(iter(model.predict(video, boxes=boxes, keypoint_score=-1))).plot()
    assert (fewer != frames[0].picture).sum() < (more != frames[0].picture).sum()
    for name, value in (("keypoint_score", 2), ("smooth_keypoints", -1)):
        with pytest.raises(ValueError, match=rf"--{name} {value}: must be "):
            model.predict(video, **{name: value})


def test_angles_are_in_degrees_by_name():
    keypoints = np.zeros((2, 15, 2))
    for person, (name, xy) in enumerate([("left_wrist", (20, 10)), ("left_wrist", (10, 20))]):
        keypoints[person, JOINTS.index("left_elbow")] = 10, 10
        keypoints[person, JOINTS.index("left_shoulder")] = 0, 10
        keypoints[person, JOINTS.index(name)] = xy
    scores = np.ones((2, 15))
    angles = joint_angles(keypoints, scores, POSETRACK)
    assert list(angles) == [
        *("left_elbow", "left_shoulder", "left_hip", "left_knee"),
        *("right_elbow", "right_shoulder", "right_hip", "right_knee"),
    ]
    np.testing.assert_allclose(angles["left_elbow"], [180, 90])
    assert np.isnan(angles["right_knee"]).all(), "its joints lie on one another"
    scores[1, JOINTS.index("left_wrist")] = 0.05
    np.testing.assert_array_equal(
        np.isnan(joint_angles(keypoints, scores, POSETRACK, 0.1)["left_elbow"]), [False, True]
    )
    limbs = ((0, 1), (1, 2), (2, 3), (2, 4))
    paw = Skeleton(("hip", "stifle", "hock", "toe", "claw"), limbs)
    assert angle_joints(paw) == {"stifle": (0, 1, 2)}


def test_a_table_has_every_pose(model, clip, tmp_path, monkeypatch):
    video, boxes, *_ = clip
    prediction = model.predict(video, boxes=boxes, keypoint_score=-1, max_frames=3)
    prediction.save(tmp_path, outputs=["csv"], progress=False)
    with open(tmp_path / "csv" / f"{video.stem}.csv", newline="") as file:
        table = list(csv.DictReader(file))
    frames = list(prediction)
    assert len(table) == sum(len(frame.ids) for frame in frames)
    rows = iter(table)
    for frame in frames:
        for p, track in enumerate(frame.ids):
            row = next(rows)
            assert (int(row["frame"]), int(row["track_id"])) == (frame.number, track)
            assert float(row["seconds"]) == pytest.approx(frame.number / 10)
            x, y, width, height = (float(row[name]) for name in ("x", "y", "width", "height"))
            np.testing.assert_allclose([x, y, x + width, y + height], frame.boxes[p])
            for k, name in enumerate(model.skeleton.keypoints):
                actual = [float(row[f"{name}_{what}"]) for what in ("x", "y", "score")]
                np.testing.assert_array_equal(actual, [*frame.keypoints[p, k], frame.scores[p, k]])
            angle = frame.angles["left_knee"][p]
            actual = row["left_knee_angle"]
            assert (
                (actual == "")
                if np.isnan(angle)
                else float(actual) == pytest.approx(angle, abs=0.01)
            )
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pandas: is not installed: pip install pandas; or save"):
        prediction.to_pandas()
    pandas = types.SimpleNamespace(DataFrame=lambda rows, columns: (rows, columns))
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    lines, names = prediction.to_pandas()
    assert names == list(table[0])
    assert [str(row[2]) for row in lines] == [row["track_id"] for row in table]
