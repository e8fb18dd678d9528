"""People keep their track ids, gaps are bridged, boxes are steady; nothing looks far ahead."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cmpose.predict.detectors.detect import Detection, overlaps
from cmpose.predict.track import BoxTracker, steady_boxes
from cmpose.render.dataset import Difficulty, render_dataset


def at(x, y=0.0, w=40.0, h=100.0, score=0.9, track_id=-1):
    return Detection(np.array([x, y, w, h]), score, track_id)


def ids(people):
    return [d.track_id for d in people]


def test_crossing_people_keep_their_ids():
    tracker = BoxTracker()
    tracks = []
    for step in range(20):
        a, b = at(10 * step, 0), at(190 - 10 * step, 20)
        tracks.append(ids(tracker.update(step, [a, b] if step % 2 else [b, a])))
    assert {tuple(i[:: 1 if step % 2 else -1]) for step, i in enumerate(tracks)} == {(1, 0)}


def test_a_fast_person_is_followed_over_a_gap_at_their_speed():
    tracker = BoxTracker(bridge=3)
    assert [ids(tracker.update(n, [at(15 * n)])) for n in range(4)] == [[0]] * 4
    # Three frames later they have moved by more than their width.
    assert ids(tracker.update(7, [at(15 * 7)])) == [0]
    assert ids(tracker.update(12, [at(15 * 12)])) == [1], "four frames are not bridged"


def test_given_ids_are_kept_and_not_given_again():
    tracker = BoxTracker()
    assert ids(tracker.update(0, [at(0, track_id=7), at(200)])) == [7, 8]
    assert ids(tracker.update(1, [at(300, track_id=8), at(2), at(200)])) == [8, 7, 9]


def run(detections, **options):
    """Number → people of frames whose items are their numbers."""
    out = list(steady_boxes(iter(list(enumerate(detections))), **options))
    assert [number for number, _ in out] == list(range(len(detections))), "order and every frame"
    return [people for _, people in out]


def test_gaps_are_bridged_in_a_straight_line_and_longer_ones_are_not():
    people = run([[at(0, score=0.8)], None, [], [at(15, score=0.5)], [], [], [], [at(15)]],
                 bridge=2, smooth=0)  # fmt: skip
    assert [[d.box[0] for d in frame] for frame in people] == [
        *([0], [5], [10], [15]),
        *([], [], [], [15]),
    ]
    assert [d.score for frame in people[:4] for d in frame] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [d.interpolated for frame in people[:4] for d in frame] == [False, True, True, False]
    assert [ids(frame) for frame in people] == [[0], [0], [0], [0], [], [], [], [1]]


def test_smoothing_takes_jitter_out_and_leaves_steady_motion_alone():
    steady = run([[at(7.0 * n)] for n in range(12)], smooth=3)
    np.testing.assert_allclose([p[0].box[0] for p in steady], 7.0 * np.arange(12))
    rng = np.random.default_rng(0)
    jitter = rng.normal(0, 3, 200)
    detections = [[at(2.0 * n + jitter[n])] for n in range(200)]
    left = np.array([p[0].box[0] for p in run(detections, smooth=2)]) - 2.0 * np.arange(200)
    # Weights 1 2 3 2 1 of independent jitter: √19 / 9.
    assert left[2:-2].std() / jitter.std() == pytest.approx(19**0.5 / 9, rel=0.1)
    assert [p[0].box[0] for p in run(detections, smooth=0)] == [f[0].box[0] for f in detections]


def test_nothing_looks_further_ahead_than_it_says_and_nothing_is_kept():
    read = []

    def frames():
        for number in range(500):
            read.append(number)
            yield number, [at(0.1 * number)]

    bridge, smooth = 6, 2
    for number, people in steady_boxes(frames(), bridge=bridge, smooth=smooth):
        assert read[-1] - number <= bridge + smooth
        assert ids(people) == [0]


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """Boxes of rendered people, most of whom cross: sequences of frames of id → box."""
    root = tmp_path_factory.mktemp("crossing") / "data"
    render_dataset(
        root, videos=4, frames=40, seed=5, size=(144, 256), split="val", max_people=4,
        difficulty=Difficulty(crossing=1, occluders=0.3), progress=False,
    )  # fmt: skip
    sequences = []
    for file in sorted((root / "annotations" / "val").glob("*.json")):
        content = json.loads(file.read_text())
        frames = {image["id"]: {} for image in content["images"]}
        for a in content["annotations"]:
            frames[a["image_id"]][a["track_id"]] = np.array(a["bbox"], float)
        sequences.append(list(frames.values()))
    return sequences


def identity_switches(frames, people):
    """CLEAR MOT's identity switches, and the share of true boxes that have a box at all.

    A true person keeps their track while it overlaps them by half; who has none then gets the one
    that overlaps best of those that are free.
    """
    track_of, switches, covered, total = {}, 0, 0, 0
    for boxes, detections in zip(frames, people, strict=True):
        total += len(boxes)
        pairs = []
        for person, box in boxes.items():
            for d in detections:
                overlap = overlaps(d.box, box)[0]
                if overlap >= 0.5:
                    pairs.append((track_of.get(person) == d.track_id, overlap, person, d.track_id))
        matched = {}
        for _, _, person, track_id in sorted(pairs, reverse=True):
            if person not in matched and track_id not in matched.values():
                matched[person] = track_id
        covered += len(matched)
        switches += sum(track_of.get(person, i) != i for person, i in matched.items())
        track_of |= matched
    return switches, covered / total


@pytest.mark.parametrize(
    ("jitter", "miss", "every", "most", "least"),
    [(0.0, 0.0, 1, 0, 0.99), (0.03, 0.1, 1, 0, 0.98), (0.03, 0.1, 3, 10, 0.94)],
)
def test_identities_of_rendered_people(truth, jitter, miss, every, most, least):
    """Boxes without ids, shaken by a share of their size, missed and looked at now and then."""
    rng = np.random.default_rng(0)
    switches, covered = 0, []
    for frames in truth:
        detections = []
        for number, boxes in enumerate(frames):
            people = [
                Detection(box + rng.normal(0, jitter, 4) * np.tile(box[2:], 2), 0.9)
                for box in boxes.values()
                if rng.random() >= miss
            ]
            detections.append(None if number % every and number != len(frames) - 1 else people)
        wrong, share = identity_switches(frames, run(detections))
        switches += wrong
        covered.append(share)
    assert switches <= most
    assert np.mean(covered) > least
