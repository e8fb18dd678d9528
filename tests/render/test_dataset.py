"""The rendered data set: the same bytes every time, PoseTrack18's layout, people that are drawn
where their joints say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose.cli import main
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.skeleton import CATEGORY, JOINTS, LIMBS
from cmpose.render import dataset as rendered
from cmpose.render.body import Body
from cmpose.render.dataset import Difficulty, render_dataset
from cmpose.render.draw import Layer
from cmpose.render.kinematics import Build
from cmpose.render.look import Look
from cmpose.render.montage import main as montage_main
from cmpose.render.montage import write_montage
from cmpose.render.motion import MOTIONS, perform
from cmpose.render.plan import Stage, plan_actor, plan_video

SMALL = {"size": (144, 256), "progress": False}
HARD = Difficulty(occluders=1, defocus=1, crossing=1, motion_blur=1)


def files_of(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rendered") / "set"
    render_dataset(root, videos=10, frames=8, seed=3, difficulty=HARD, **SMALL)
    return root


# ------------------------------------------------------------------ the same bytes


def test_bytes_follow_from_the_seed_whatever_the_workers(tmp_path: Path) -> None:
    one = render_dataset(tmp_path / "a", videos=3, frames=2, seed=7, **SMALL)
    two = render_dataset(tmp_path / "b", videos=3, frames=2, seed=7, workers=2, **SMALL)
    assert one.rendered == two.rendered == 3
    assert one.frames == 6
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_video_does_not_depend_on_the_others(tmp_path: Path) -> None:
    render_dataset(tmp_path / "a", videos=3, frames=2, seed=7, **SMALL)
    render_dataset(tmp_path / "b", videos=1, frames=2, seed=7, first_video=2, **SMALL)
    whole, part = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert part.items() <= whole.items()
    assert len(part) == 2 + 1 + 1  # frames, annotation, settings


def test_splits_and_seeds_share_no_sequence(tmp_path: Path) -> None:
    for split in ("train", "val"):
        render_dataset(tmp_path / "a", videos=2, frames=1, seed=7, split=split, **SMALL)
    render_dataset(tmp_path / "b", videos=2, frames=1, seed=8, **SMALL)
    pictures = [
        data
        for root in (tmp_path / "a", tmp_path / "b")
        for name, data in files_of(root).items()
        if name.endswith(".jpg")
    ]
    assert len(pictures) == len(set(pictures)) == 6
    train = load_annotations(tmp_path / "a/annotations/train", tmp_path / "a")
    val = load_annotations(tmp_path / "a/annotations/val", tmp_path / "a")
    assert not {s.name for s in train} & {s.name for s in val}
    ids = [f.image_id for s in train + val for f in s.frames]
    assert len(set(ids)) == len(ids)


# ------------------------------------------------------------------ PoseTrack18's layout


def test_layout_is_posetrack18s(dataset: Path) -> None:
    sequences = load_annotations(dataset / "annotations/val", dataset)
    assert len(sequences) == 10
    for sequence in sequences:
        assert sequence.name == sequence.file_stem
        assert sequence.name.endswith("_mpii_test")
        assert [f.index for f in sequence.frames] == list(range(8))
        for frame in sequence.frames:
            assert frame.file_name == f"images/val/{sequence.name}/{frame.index:06d}.jpg"
            picture = cv2.imread(str(dataset / frame.file_name))
            assert picture.shape == (144, 256, 3)
            assert (frame.height, frame.width) == (144, 256)
            assert frame.labeled
    assert sum(len(f.people) for s in sequences for f in s.frames) > 100


def test_raw_fields_and_the_box_rule(dataset: Path) -> None:
    for path in (dataset / "annotations/val").iterdir():
        raw = json.loads(path.read_text())
        assert raw["categories"] == [CATEGORY]
        for image in raw["images"]:
            assert image["vid_id"] == path.name[:6]
            assert image["nframes"] == 8
            assert (
                image["id"]
                == image["frame_id"]
                == 10**10 + int(path.name[:6]) * 10**4 + int(image["file_name"][-10:-4])
            )
            assert len(image["ignore_regions_x"]) == len(image["ignore_regions_y"])
        for annotation in raw["annotations"]:
            slots = np.array(annotation["keypoints"]).reshape(17, 3)
            assert not slots[[3, 4]].any()  # the ears
            assert set(slots[:, 2]) <= {0, 1}
            assert not slots[slots[:, 2] == 0].any()
            visible = slots[slots[:, 2] > 0, :2]
            assert len(visible) >= 3
            assert (visible >= 0).all()
            assert (visible <= [255, 143]).all()
            low, high = visible.min(0), visible.max(0)
            centre, size = (low + high) / 2, 1.3 * (high - low)
            np.testing.assert_allclose(annotation["bbox"], [*(centre - size / 2), *size], atol=1e-9)
            assert len(annotation["bbox_head"]) == 4
            assert annotation["category_id"] == 1


def test_head_boxes_measure_what_posetracks_do(dataset: Path) -> None:
    """In PoseTrack18 head_bottom to head_top is 0.7 of the head box's diagonal."""
    ratios, heights = [], []
    for path in (dataset / "annotations/val").iterdir():
        for annotation in json.loads(path.read_text())["annotations"]:
            x = annotation["keypoints"]
            if sum(x[2::3]) == 15:
                diagonal = math.hypot(*annotation["bbox_head"][2:])
                ratios.append(math.dist(x[3:5], x[6:8]) / diagonal)
                heights.append(diagonal / (annotation["bbox"][3] / 1.3))
    assert np.median(ratios) == pytest.approx(0.7, abs=0.03)
    assert 0.2 < np.median(heights) < 0.32


def test_records_tell_occluded_and_defocused_frames_apart(dataset: Path) -> None:
    records = [
        frame.extra["cmpose"]
        for sequence in load_annotations(dataset / "annotations/val", dataset)
        for frame in sequence.frames
    ]
    for key in ("occluder", "crossing"):
        assert {r[key] for r in records} == {True, False}
    assert {r["defocus_sigma"] > 0 for r in records} == {True, False}
    assert any(r["motion_blur"] > 0 for r in records)
    for r in records:
        counted = sum(len(p["occluded_joints"]) for p in r["people"])
        assert counted <= r["occluded_joints"]  # people left out are counted there only
        assert bool(r["occluded_joints"]) == (r["occluder"] or r["crossing"])


def test_annotated_people_show_and_hidden_joints_have_a_neighbour_that_shows(
    dataset: Path,
) -> None:
    hidden_but_told = 0
    for sequence in load_annotations(dataset / "annotations/val", dataset):
        for frame in sequence.frames:
            records = frame.extra["cmpose"]["people"]
            for person, record in zip(frame.people, records, strict=True):
                assert person.track_id == record["track_id"]
                hidden = np.isin(JOINTS, record["occluded_joints"])
                shows = (person.keypoints[:, 2] > 0) & ~hidden
                assert shows.sum() >= 3
                for j in np.flatnonzero((person.keypoints[:, 2] > 0) & hidden):
                    hidden_but_told += 1
                    assert any(shows[a + b - j] for a, b in LIMBS if j in (a, b))
    assert hidden_but_told > 50


def test_the_nearer_person_is_drawn_over_the_farther() -> None:
    crossings = 0
    for key in range(12):
        options = {"frames": 2, "size": (144, 256), "fps": 25, "max_people": 2}
        easy = Difficulty(occluders=0, crossing=1)
        one, two = (plan_video([key], **options, difficulty=easy) for _ in range(2))
        if len(one.actors) < 2:
            continue
        two.actors.reverse()  # the order of the list means nothing
        nearer = int(np.argmax([actor.scale[1] for actor in one.actors]))
        drawn, again = (list(video.draw("000001_mpii_test", 0, "")) for video in (one, two))
        for (a, _), (b, _) in zip(drawn, again, strict=True):
            np.testing.assert_array_equal(a, b)
        for person in drawn[1][1].extra["cmpose"]["people"]:
            crossings += len(person["occluded_joints"])
            assert person["track_id"] != nearer or not person["occluded_joints"]
    assert crossings > 10


def test_nothing_in_the_way_when_asked_for_nothing(tmp_path: Path) -> None:
    easy = Difficulty(0, 0, 0, 0, 0, 0, 0, 0)
    render_dataset(tmp_path, videos=4, frames=2, seed=3, difficulty=easy, max_people=1, **SMALL)
    for sequence in load_annotations(tmp_path / "annotations/val", tmp_path):
        for frame in sequence.frames:
            record = frame.extra["cmpose"]
            assert len(frame.people) == 1
            assert not record["occluder"]
            assert not record["crossing"]
            assert record["defocus_sigma"] == record["background_defocus_sigma"] == 0
            assert record["motion_blur"] == 0


def test_defocus_blurs_the_picture() -> None:
    video = plan_video(
        [1], frames=3, size=(144, 256), fps=25, max_people=1, difficulty=Difficulty(noise=0)
    )
    sharpness = []
    for sigma in (0.0, 1.0, 3.0):
        video.lens.defocus = np.full(3, sigma)
        picture, frame = next(video.draw("000001_mpii_test", 0, "images/val"))
        assert frame.extra["cmpose"]["defocus_sigma"] == sigma
        sharpness.append(cv2.Laplacian(picture, cv2.CV_32F).std())
    assert sharpness[0] > 1.5 * sharpness[1] > 2 * sharpness[2]


def test_who_hardly_shows_becomes_an_ignore_region() -> None:
    video = plan_video(
        [4],
        frames=1,
        size=(144, 256),
        fps=25,
        max_people=1,
        difficulty=Difficulty(occluders=0, closeup=0),
    )
    counts = set()
    for _ in range(60):
        video.views[:, 1, 2] += 3  # the camera looks up until the person has left the picture
        _, frame = next(video.draw("000001_mpii_test", 0, "images/val"))
        counts.add((len(frame.people), len(frame.ignore_regions)))
        for region in frame.ignore_regions:
            assert (region >= 0).all()
            assert (region <= [255, 143]).all()
    assert (1, 0) in counts
    assert (0, 1) in counts
    assert counts <= {(1, 0), (0, 1), (0, 0)}


# ------------------------------------------------------------------ bodies


STAGE = Stage(middle=320.0, width=640, horizon=100.0, eye=1.5, focal=500.0)


def walker(heading: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    return plan_actor(rng, STAGE, np.arange(25) / 25, 0.0, 100.0, heading)


@pytest.mark.parametrize("seed", range(5))
def test_left_is_the_persons_own_left(seed: int) -> None:
    for pair in ("shoulder", "hip", "ankle", "wrist"):
        front, back, right = (walker(h, seed) for h in (0.0, math.pi, math.pi / 2))
        left, own_right = f"left_{pair}", f"right_{pair}"
        # Seen from the front the person's right is at smaller x, from behind at larger x.
        assert (front.flat[own_right][:, 0].mean()) < front.flat[left][:, 0].mean()
        assert (back.flat[own_right][:, 0].mean()) > back.flat[left][:, 0].mean()
        # Who walks to the picture's right has the right side nearer to the camera.
        assert right.depth[own_right].mean() < right.depth[left].mean()
    assert (right.flat["nose"][:, 0] > right.flat["head_bottom"][:, 0]).mean() > 0.8
    assert right.ground[-1, 0] > right.ground[0, 0] + 30
    assert front.scale[-1] > front.scale[0]  # walks towards the camera: grows


def test_joints_lie_on_the_drawn_body_in_all_views() -> None:
    on = total = 0
    for k, motion in enumerate(MOTIONS):
        for turn in range(8):
            rng = np.random.default_rng([k, turn])
            build = Build.draw(rng)
            body = Body(build, Look.draw(rng, build))
            posed = perform([motion], build, np.arange(10) / 25, rng)
            yaw = turn * math.pi / 4
            c, s = math.cos(yaw), math.sin(yaw)
            to_camera = np.array([[c, 0, s], [0, 1, 0], [s, 0, -c]])
            at = {name: to_camera @ p[5] for name, p in posed.points.items()}
            flat = {name: np.array([128 + 90 * p[0], 230 - 90 * p[1]]) for name, p in at.items()}
            depth = {name: float(p[2]) for name, p in at.items()}
            layer = Layer(np.full((260, 256, 3), 128, np.uint8))
            axes = (to_camera @ a[5] for a in (posed.chest, posed.head))
            body.draw(layer, 1, flat, depth, *axes, 90.0, np.array([0.0, -0.3, 0.5, 0.5]))
            assert layer.image.std() > 1
            for name in JOINTS:
                x, y = np.rint(flat[name]).astype(int)
                # A pixel of play: the crown is on the outline itself.
                on += bool(layer.owner[y - 1 : y + 2, x - 1 : x + 2].any())
                total += 1
    assert on / total > 0.995


@pytest.mark.parametrize("name", MOTIONS)
def test_motions_bend_no_bones_and_stay_on_the_ground(name: str) -> None:
    rng = np.random.default_rng(11)
    build = Build.draw(rng)
    times = np.arange(75) / 25
    posed = perform([name], build, times, rng)
    at = posed.points
    for a, b in (("hip", "knee"), ("knee", "ankle"), ("shoulder", "elbow"), ("elbow", "wrist")):
        for side in ("left", "right"):
            length = np.linalg.norm(at[f"{side}_{a}"] - at[f"{side}_{b}"], axis=1)
            np.testing.assert_allclose(length, length[0], rtol=1e-9)
    soles = np.stack([at[f"{s}_{p}"][:, 1] for s in ("left", "right") for p in ("heel", "toe")])
    assert (soles.min(0) > 0).all()
    assert soles.min() < 0.03 * build.stature
    steps = np.abs(np.diff(np.stack([at[j] for j in JOINTS]), axis=1))
    assert steps.max() < 0.45  # metres in 1/25 s: nothing leaps
    assert np.ptp(np.stack([at[j] for j in JOINTS]), axis=1).max() > 0.02  # something moves


def test_the_standing_foot_of_a_walker_stays_where_it_is() -> None:
    rng = np.random.default_rng(2)
    build = Build.draw(rng)
    posed = perform(["walk"], build, np.arange(100) / 50, rng)
    travel = np.stack([posed.travel[:, 0], np.zeros(100), posed.travel[:, 1]], 1)
    feet = np.stack([posed.points[f"{side}_ankle"] + travel for side in ("left", "right")])
    lower = feet[:, :, 1].argmin(0)
    speed = np.linalg.norm(np.diff(feet[:, :, [0, 2]], axis=1), axis=-1) * 50
    same_foot = lower[1:] == lower[:-1]
    standing = speed[lower[1:], np.arange(99)][same_foot]
    walking = np.linalg.norm(posed.travel[-1] - posed.travel[0]) / 1.98
    assert 0.5 < walking < 2.5  # metres a second
    assert np.median(standing) < 0.25 * walking


# ------------------------------------------------------------------ unfinished and foreign folders


def test_an_interrupted_render_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = {"videos": 3, "frames": 3, "seed": 5, **SMALL}
    render_dataset(tmp_path / "whole", **ask)
    write, written = rendered.write_posetrack18, []

    def stop_at_the_second(path: Path, sequence: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, sequence)

    monkeypatch.setattr(rendered, "write_posetrack18", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        render_dataset(tmp_path / "cut", **ask)
    monkeypatch.undo()
    annotations = list((tmp_path / "cut/annotations/val").iterdir())
    assert annotations == written
    stale = tmp_path / "cut/images/val/.500003_mpii_test.cmpose-part"
    stale.mkdir()
    (stale / "000000.jpg").write_bytes(b"half a frame")
    before = annotations[0].stat().st_mtime_ns
    summary = render_dataset(tmp_path / "cut", **ask)
    assert (summary.kept, summary.rendered) == (1, 2)
    assert annotations[0].stat().st_mtime_ns == before
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    # A lost frame counts as unfinished; a finished set is left alone; more videos extend it.
    (tmp_path / "cut/images/val/500002_mpii_test/000001.jpg").unlink()
    assert render_dataset(tmp_path / "cut", **ask).rendered == 1
    assert render_dataset(tmp_path / "cut", **ask).rendered == 0
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    assert render_dataset(tmp_path / "cut", **(ask | {"videos": 4})).rendered == 1


def test_other_settings_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    ask = {"videos": 1, "frames": 1, "seed": 5, **SMALL}
    render_dataset(tmp_path / "set", **ask)
    before = files_of(tmp_path / "set")
    for change, message in (
        ({"seed": 6}, "seed 5 there, 6 asked"),
        ({"frames": 2}, "frames 1 there, 2 asked"),
        ({"size": (160, 256)}, r"size \[144, 256\] there, \[160, 256\] asked"),
        ({"difficulty": HARD}, "difficulty"),
    ):
        with pytest.raises(ValueError, match=f"out: .*other settings.*{message}"):
            render_dataset(tmp_path / "set", **(ask | change))
    assert files_of(tmp_path / "set") == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match=r"out: .* is not empty and was not rendered here"):
        render_dataset(foreign, **ask)
    assert files_of(foreign) == {"thesis.tex": b"dear"}
    (tmp_path / "set/images/train").mkdir()
    with pytest.raises(ValueError, match="was not rendered here"):
        render_dataset(tmp_path / "set", **(ask | {"split": "train"}))
    with pytest.raises(ValueError, match=r"out: .* is a file"):
        render_dataset(foreign / "thesis.tex", **ask)
    (tmp_path / "set/rendered_val.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"rendered_val\.json: not valid JSON .*; name a new folder"
    ):
        render_dataset(tmp_path / "set", **ask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"videos": 0}, ValueError, "videos: 0 is not between 1"),
        ({"videos": 2.0}, TypeError, "videos: expected an integer, got 2.0"),
        ({"frames": 0}, ValueError, "frames: 0 is not between 1 and 9999"),
        ({"frames": 10_000}, ValueError, "frames: 10000"),
        ({"seed": -1}, ValueError, "seed: -1"),
        ({"size": (145, 256)}, ValueError, "size: height 145 is not an even number"),
        ({"size": (144, 64)}, ValueError, "size: width 64 is not an even number from 96"),
        ({"size": (144,)}, TypeError, r"size: expected \(height, width\)"),
        ({"split": "test"}, ValueError, "split: 'test' is not one of train, val"),
        ({"first_video": -1}, ValueError, "first_video: -1"),
        ({"max_people": 0}, ValueError, "max_people: 0"),
        ({"quality": 101}, ValueError, "quality: 101"),
        ({"fps": 0.0}, ValueError, "fps: 0.0"),
        ({"workers": -1}, ValueError, "workers: -1"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        render_dataset(tmp_path / "x", **({"videos": 1, "frames": 1, "seed": 0, **SMALL} | change))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("occluders", 1.5, "probability"), ("noise", -1, "strength"), ("defocus", math.nan, "prob")],
)
def test_bad_difficulty_is_named(field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"difficulty.{field}: .*{message}"):
        Difficulty(**{field: value})


# ------------------------------------------------------------------ command


def test_command_renders_and_tells_its_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    montage = tmp_path / "montage.png"
    shape = ["--videos", "9", "--frames", "1", "--workers", "0", "--difficulty.occluders", "0"]
    main(["render", str(tmp_path / "set"), "--split", "val", *shape])
    montage_main([str(tmp_path / "set"), str(montage)])
    out = capsys.readouterr().out
    assert "9 val sequences rendered, 0 kept; 9 frames in" in out
    assert "frames/s" in out
    assert cv2.imread(str(montage)).shape == (378, 672, 3)
    settings = json.loads((tmp_path / "set/rendered_val.json").read_text())
    assert settings["difficulty"]["occluders"] == 0
    with pytest.raises(ValueError, match="has 0 train sequences, a montage needs 9"):
        write_montage(tmp_path / "set", montage, split="train")


def test_long_walks_stay_near_the_picture() -> None:
    rng = np.random.default_rng(0)
    actor = plan_actor(rng, STAGE, np.arange(200) / 25, 0.0, 100.0, math.pi / 2)
    assert np.abs(actor.ground[:, 0] - 320).max() < 640
    assert np.ptp(actor.ground[:, 0]) > 100
