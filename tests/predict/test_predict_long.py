"""Prediction in earnest: batches, interruption, full disks, live sources, constant memory."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
import tracemalloc

import cv2
import numpy as np
import pytest
import torch

from cmpose.data.video import Video, VideoFrame, VideoInfo, open_video
from cmpose.data.video_writer import VideoWriter, video_writer
from cmpose.files import Interrupted, InUse, OutputError
from cmpose.models.weights import checkpoint
from cmpose.predict import people
from cmpose.predict import predict as module
from cmpose.predict import results as predict_results
from cmpose.predict.detectors.detect import Detection
from cmpose.predict.journal import FRAMES, Journal, JournalError
from cmpose.predict.predict import predict_video
from cmpose.predict.predictor import Poses, Predictor
from tests.models.builders import build
from tests.predict.conftest import saved_model
from tests.recipes import command, one_thread
from tests.shared_data import PROJECT

LENGTH, SIZE = 60, (96, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("weights"), fine="off")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Noise that two boxes move over, one of them with gaps; frames 30 to 39 show nobody."""
    folder = tmp_path_factory.mktemp("clip")
    rng = np.random.default_rng(0)
    with video_writer(folder / "clip.mp4", SIZE, 25) as writer:
        for _ in range(LENGTH):
            noise = rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)
            writer.write(cv2.resize(noise, SIZE))
    boxes = []
    for n in [*range(30), *range(40, LENGTH)]:
        boxes.append({"frame": n, "bbox": [0.8 * n, 5, 20, 50], "score": 0.9})
        if n % 7 > 1:
            boxes.append({"frame": n, "bbox": [70 - 0.8 * n, 2, 22, 60], "score": 0.7})
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder / "clip.mp4", folder / "boxes.json"


def predict(clip, weights, out, **options):
    arguments = {"detections": clip[1], "progress": False, "bridge": 4, "batch_size": 5, **options}
    return predict_video(clip[0], weights, out, **arguments)


def results(out, name="clip"):
    """What must not depend on how a run went: the poses' files, and the video's pictures."""
    with open_video(out / f"{name}_poses.mp4") as video:
        pictures = np.stack([frame.picture for frame in video.frames()])
    return [(out / kind / f"{name}.json").read_bytes() for kind in ("poses", "coco")], pictures


@pytest.fixture(scope="module")
def whole(clip, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return predict(clip, weights, out), results(out)


def assert_same(out, whole):
    files, pictures = results(out)
    assert files == whole[1][0]
    np.testing.assert_array_equal(pictures, whole[1][1])


def test_counts(whole):
    metrics = whole[0]
    assert metrics["frames"] == LENGTH
    assert metrics["frames_without_people"] == 10
    assert metrics["boxes_interpolated"] > 10
    assert metrics["tracks"] == 4, "both people are new after ten frames of nobody"
    assert len(whole[1][1]) == LENGTH
    parts = metrics["seconds_by_part"]
    assert {"decode", "crop", "model", "draw", "encode", "journal", "write results"} <= set(parts)
    assert sum(parts.values()) == pytest.approx(metrics["seconds"])
    assert all(seconds >= 0 for seconds in parts.values()), "no part is counted in two"
    assert parts["model"] > parts["explain"], "nothing is explained here"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_go_over_frames_and_change_nothing(clip, weights, whole, tmp_path, batch_size):
    sizes = []
    poses = Predictor.poses

    def counted(self, clips, matrices):
        sizes.append(len(clips))
        return poses(self, clips, matrices)

    patch = pytest.MonkeyPatch()
    patch.setattr(Predictor, "poses", counted)
    predict(clip, weights, tmp_path, batch_size=batch_size, outputs=["poses"])
    patch.undo()
    assert max(sizes) <= batch_size
    assert np.mean(sizes[:-1]) > {1: 0.99, 3: 1.4, 64: 40}[batch_size]
    written = json.loads((tmp_path / "poses" / "clip.json").read_text())["annotations"]
    expected = json.loads(whole[1][0][0])["annotations"]
    assert [(a["image_id"], a["track_id"]) for a in written] == [
        (a["image_id"], a["track_id"]) for a in expected
    ]
    np.testing.assert_allclose(
        [a["keypoints"] for a in written], [a["keypoints"] for a in expected], atol=2e-3
    )
    assert not (tmp_path / "clip_poses.mp4").exists()
    assert not (tmp_path / "coco").exists()


class Cut(Exception):
    pass


def cut_after(monkeypatch, calls, cut=Cut):
    """The model fails, or the process is asked to stop, at a batch."""
    poses, count = Predictor.poses, [0]

    def failing(self, clips, matrices):
        count[0] += 1
        if count[0] == calls:
            if cut is not Cut:
                os.kill(os.getpid(), cut)
            else:
                raise Cut
        return poses(self, clips, matrices)

    monkeypatch.setattr(Predictor, "poses", failing)


def cheap_poses(self, clips, matrices):
    """In place of the network: told by picture, box, and, as in earnest, by the whole batch."""
    offset = clips.flatten(1).mean(1).numpy() + matrices[:, 0, 2] + 0.01 * len(clips)
    keypoints = offset[:, None, None] + np.arange(30).reshape(15, 2)
    return Poses(keypoints, np.full(keypoints.shape[:2], 0.5), None, matrices)


def found_in(picture):
    """Two people whose places tell the picture, so that a wrong frame would be noticed."""
    shift = float(picture.mean()) % 8
    boxes = np.array([20.0 + shift, 4, 20, 50]), np.array([60.0 - shift, 4, 20, 50])
    return [Detection(boxes[0], 0.9), Detection(boxes[1], 0.5)]


@pytest.fixture
def cheap(clip, weights, tmp_path, monkeypatch):
    """Predicts without the network; without results, it leaves a whole journal."""
    monkeypatch.setattr(Predictor, "poses", cheap_poses)
    monkeypatch.setattr(people, "detect_people", found_in)

    def run(*, write=True, **options):
        with monkeypatch.context() as patch:
            if write:
                metrics = predict(clip, weights, tmp_path, outputs=["poses", "coco"], **options)
                files = [(tmp_path / kind / "clip.json").read_bytes() for kind in ("poses", "coco")]
                return metrics, files
            patch.setattr(predict_results, "write_posetrack18_frames", full_disk)
            with pytest.raises(OutputError):
                predict(clip, weights, tmp_path, outputs=["poses", "coco"], **options)
        return tmp_path / "journal" / "clip" / FRAMES

    return run


@pytest.mark.parametrize("options", [{}, {"detections": None}])
def test_a_run_killed_at_any_line_of_a_bridged_gap_goes_on_to_the_same_bytes(cheap, options):
    """A box of the file is missing in frames 14 and 15; the detector runs in every third frame."""
    journal = cheap(write=False, **options)
    lines = journal.read_bytes().splitlines(keepends=True)
    assert b'"interpolated": true' in lines[14]
    _, expected = cheap(**options)
    for whole_lines in (14, 15):
        (journal.parent / "finished.json").unlink()
        journal.write_bytes(b"".join(lines[:whole_lines]) + lines[whole_lines][:40])
        metrics, written = cheap(**options)
        assert whole_lines - 5 < metrics["resumed_at_frame"] <= whole_lines
        assert written == expected, whole_lines


def test_a_changed_digit_in_the_journal_does_not_reach_the_poses(cheap, capsys):
    journal = cheap(write=False)
    lines = journal.read_bytes().splitlines(keepends=True)
    _, expected = cheap()
    (journal.parent / "finished.json").unlink()
    at = lines[20].index(b'"box": [') + 8
    digit = b"%d" % ((int(lines[20][at : at + 1]) + 1) % 10)
    lines[20] = lines[20][:at] + digit + lines[20][at + 1 :]
    journal.write_bytes(b"".join(lines))
    metrics, written = cheap(progress=True)
    assert 15 < metrics["resumed_at_frame"] <= 20
    notes = [line for line in capsys.readouterr().out.splitlines() if "frames.jsonl" in line]
    assert len(notes) == 1
    first = metrics["resumed_at_frame"] + 1
    assert f"line 21 is not as it was written: lines {first} to 61 are dropped" in notes[0]
    assert written == expected


@pytest.mark.parametrize("outputs", [["video", "poses", "coco"], ["poses", "coco"]])
def test_a_run_that_fails_goes_on_to_the_same_results(
    clip, weights, whole, tmp_path, monkeypatch, outputs
):
    for calls in (3, 5):
        with monkeypatch.context() as patch:
            cut_after(patch, calls)
            with pytest.raises(Cut):
                predict(clip, weights, tmp_path, outputs=outputs)
    if "video" in outputs:
        with open_video(tmp_path / "clip_poses.part.mp4") as video:
            assert 10 < len(list(video.frames())) < LENGTH
    metrics = predict(clip, weights, tmp_path, outputs=outputs)
    assert 10 < metrics["resumed_at_frame"] < LENGTH
    for key in ("frames", "people", "tracks", "boxes_interpolated", "frames_without_people"):
        assert metrics[key] == whole[0][key], key
    if "video" in outputs:
        assert_same(tmp_path, whole)
        assert not (tmp_path / "clip_poses.part.mp4").exists()
    else:
        assert [(tmp_path / k / "clip.json").read_bytes() for k in outputs] == whole[1][0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    clip, weights, whole, tmp_path, monkeypatch, number
):
    with monkeypatch.context() as patch:
        cut_after(patch, 3, number)
        with pytest.raises(Interrupted) as caught:
            predict(clip, weights, tmp_path)
    done = len((tmp_path / "journal" / "clip" / FRAMES).read_text().splitlines())
    assert f"stopped after {done} of {LENGTH} frames; their poses are kept in" in str(caught.value)
    assert "the same command goes on from them; what is drawn of the video is in" in str(
        caught.value
    )
    assert predict(clip, weights, tmp_path)["resumed_at_frame"] == done
    assert_same(tmp_path, whole)


def test_a_killed_process_goes_on_to_the_same_results(clip, weights, tmp_path):
    arguments = [str(clip[0]), "--checkpoint", str(weights), "--detections", str(clip[1])]
    arguments += ["--batch_size", "2", "--bridge", "4", "--device", "cpu"]
    arguments += ["--outputs", "[poses]"]
    journal = tmp_path / "cut" / "journal" / "clip" / FRAMES
    run = command("predict", *arguments, "--out", str(tmp_path / "cut"))
    process = subprocess.Popen(run, cwd=PROJECT, env=one_thread(), stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > 9000):
            time.sleep(0.005)
        assert process.poll() is None, "it is killed in the middle"
    finally:
        process.kill()
        process.wait()
    with open(journal, "ab") as file:
        file.write(b'{"frame": 99, "peo')  # as a power cut may leave it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        options = {"batch_size": 2, "outputs": ["poses"], "device": "cpu"}
        metrics = predict(clip, weights, tmp_path / "cut", **options)
        predict(clip, weights, tmp_path / "whole", **options)
    finally:
        torch.set_num_threads(threads)
    assert 0 < metrics["resumed_at_frame"] < LENGTH
    first, second = (tmp_path / k / "poses" / "clip.json" for k in ("cut", "whole"))
    assert first.read_bytes() == second.read_bytes()


def test_the_detector_goes_on_as_if_it_had_not_been_cut(weights, clip, tmp_path, monkeypatch):
    """Boxes that the detector found are replayed into the tracker, not found again."""
    looked = []

    def one_person(frame):
        looked.append(1)
        at = float(frame.mean()) % 7  # of the picture, and nothing else
        return [Detection(np.array([20 + at, 4.0, 20, 50]), 0.5 + at / 20)]

    monkeypatch.setattr(people, "detect_people", one_person)
    options = {"detections": None, "detect_every": 4, "batch_size": 4}
    whole = predict(clip, weights, tmp_path / "whole", **options)
    expected = len(looked)
    assert expected == LENGTH // 4 + 1, "every fourth, and the last"
    assert whole["frames_without_people"] == 0
    assert whole["box_source"] == "OpenCV HOG people detector"
    looked.clear()
    with monkeypatch.context() as patch:
        cut_after(patch, 6)
        with pytest.raises(Cut):
            predict(clip, weights, tmp_path / "cut", **options)
    before = len(looked)
    assert predict(clip, weights, tmp_path / "cut", **options)["resumed_at_frame"] == 20
    assert len(looked) - before == expected - 5
    assert_same(tmp_path / "cut", (whole, results(tmp_path / "whole")))


def test_other_settings_are_named_and_overwrite_starts_anew(
    clip, weights, whole, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            predict(clip, weights, tmp_path)
    boxes = tmp_path / "other.json"
    boxes.write_text(json.dumps([{"frame": 0, "bbox": [1, 2, 30, 40]}]))
    for options, message in (
        ({"min_score": 0.5}, "--min_score was 0.2, is 0.5"),
        ({"batch_size": 6}, "--batch_size was 5, is 6"),
        ({"detections": boxes}, "--detections was '"),
        ({"outputs": ["poses"]}, r"--outputs was \['video', 'poses', 'coco'\], is \['poses'\]"),
    ):
        with pytest.raises(JournalError, match=message + r".*another --out, or --overwrite"):
            predict(clip, weights, tmp_path, **options)
    model = build(seed=1, fine="off", num_keypoints=15)
    config = checkpoint.load_config(checkpoint.find(weights))
    checkpoint.save(tmp_path / "w", "model", model.state_dict(), config)
    with pytest.raises(JournalError, match="checkpoint's weights was '"):
        predict(clip, tmp_path / "w", tmp_path)
    assert predict(clip, weights, tmp_path, overwrite=True)["resumed_at_frame"] == 0
    assert_same(tmp_path, whole)
    again = predict(clip, weights, tmp_path, progress=True)
    assert again == json.loads((tmp_path / "metrics.json").read_text())
    assert "clip.mp4 is done already, in" in capsys.readouterr().out


def test_two_runs_do_not_write_at_once(clip, weights, tmp_path, monkeypatch):
    poses = Predictor.poses

    def nested(self, *arguments):
        with pytest.raises(InUse, match="another cmpose predict is writing there"):
            predict(clip, weights, tmp_path)
        return poses(self, *arguments)

    monkeypatch.setattr(Predictor, "poses", nested)
    predict(clip, weights, tmp_path, max_frames=2)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_keeps_what_is_done(clip, weights, whole, tmp_path, monkeypatch):
    """At the journal, which takes half a line; at the video; at the poses' file."""
    written = [0]

    class Full:
        """A disk with room for 5000 bytes of the journal."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            if written[0] + len(data) <= 5000:
                written[0] += self.file.write(data)
                return len(data)
            if written[0] < 5000:
                part = 5000 - written[0]
                written[0] = 5000
                return self.file.write(data[:part])
            full_disk()

        def __getattr__(self, name):
            return getattr(self.file, name)

    with monkeypatch.context() as patch:
        make = Journal.__init__

        def limited(self, folder):
            make(self, folder)
            self._file = Full(self._file)

        patch.setattr(Journal, "__init__", limited)
        with pytest.raises(
            OutputError,
            match=r"frames\.jsonl: cannot be written: the disk is full; free some space; the poses "
            r"of \d+ frames are kept in .*, the same command goes on from them",
        ):
            predict(clip, weights, tmp_path)
    journal = tmp_path / "journal" / "clip" / FRAMES
    assert 0 < journal.stat().st_size < 5000
    assert journal.read_bytes().endswith(b"}\n"), "half a line is taken back"
    for owner, name, file in (
        (VideoWriter, "_check_room", "clip_poses.mp4"),
        (predict_results, "write_posetrack18_frames", "poses/clip.json"),
        (predict_results, "write_coco_results", "coco/clip.json"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full_disk)
            with pytest.raises(OutputError, match=rf"{file}: .*the disk is full.*are kept in"):
                predict(clip, weights, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "poses", None)  # every pose is in the journal by now
        predict(clip, weights, tmp_path)
    assert_same(tmp_path, whole)


class Camera:
    """Four seconds of noise, and a Ctrl-C in the middle."""

    asks_at = 25

    def __init__(self, address):
        assert address == 0
        self.number = -1

    def read(self):
        self.number += 1
        if self.number == self.asks_at:
            os.kill(os.getpid(), signal.SIGINT)
        noise = np.random.default_rng(self.number).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        return True, noise

    def get(self, prop):
        return 15.0 if prop == cv2.CAP_PROP_FPS else -1.0

    def release(self):
        pass


def people_everywhere(frame):
    return [Detection(np.array([20.0, 4.0, 20, 50]), 0.5)]


def test_a_camera_ends_by_ctrl_c_or_max_frames(weights, tmp_path, monkeypatch):
    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda w, *a: Camera(w) if w == 0 else real(w, *a))
    monkeypatch.setattr(people, "detect_people", people_everywhere)
    metrics = predict_video("0", weights, tmp_path / "a", progress=False)
    assert 25 <= metrics["frames"] <= 27
    assert metrics["people"] == metrics["frames"]
    assert metrics["frames_missing"] == 0
    assert len(results(tmp_path / "a", "camera0")[1]) == metrics["frames"]
    assert predict_video("0", weights, tmp_path / "b", max_frames=8, progress=False)["frames"] == 8
    with monkeypatch.context() as patch:
        patch.setattr(Camera, "asks_at", -1)
        cut_after(patch, 2)
        with pytest.raises(Cut):
            predict_video("0", weights, tmp_path / "c", progress=False)
    metrics = predict_video("0", weights, tmp_path / "c", progress=False)
    poses = json.loads((tmp_path / "c" / "poses" / "camera0.json").read_text())
    assert len(poses["images"]) == metrics["frames"] == metrics["resumed_at_frame"] == 16
    boxes = tmp_path / "boxes.json"
    boxes.write_text('[{"frame": 0, "bbox": [1, 2, 30, 40]}]')
    with pytest.raises(ValueError, match=r"--detections .*boxes\.json: 0 is live"):
        predict_video("0", weights, tmp_path / "d", detections=boxes)


def test_a_folder_of_pictures_is_scored_by_name(rendered, weights, tmp_path):
    """The frames' own names are kept, so that PoseTrack's evaluation finds them."""
    [annotation] = (rendered / "annotations" / "val").glob("*.json")
    truth = json.loads(annotation.read_text())
    folder = (rendered / truth["images"][0]["file_name"]).parent
    boxes = tmp_path / "boxes.json"
    numbers = {image["id"]: n for n, image in enumerate(truth["images"])}
    boxes.write_text(
        json.dumps(
            [{"frame": numbers[a["image_id"]], "bbox": a["bbox"]} for a in truth["annotations"]]
        )
    )
    predict_video(folder, weights, tmp_path / "out", detections=boxes, progress=False)
    poses = json.loads((tmp_path / "out" / "poses" / f"{folder.name}.json").read_text())
    assert [i["file_name"].split("/")[-2:] for i in poses["images"]] == [
        i["file_name"].split("/")[-2:] for i in truth["images"]
    ]


def test_an_unreadable_picture_stops_and_what_was_done_is_kept(weights, clip, tmp_path, capsys):
    folder = tmp_path / "seq"
    folder.mkdir()
    with open_video(clip[0]) as video:
        for frame in video.frames():
            cv2.imwrite(str(folder / f"{frame.number}.png"), frame.picture)
    good = (folder / "45.png").read_bytes()
    (folder / "45.png").write_bytes(good[:99])
    source = folder, clip[1]
    with pytest.raises(
        RuntimeError, match=r"45\.png: the PNG is damaged, or cut off after 99 bytes"
    ):
        predict(source, weights, tmp_path / "out")
    done = len((tmp_path / "out" / "journal" / "seq" / FRAMES).read_text().splitlines())
    assert 20 < done < 45
    metrics = predict(source, weights, tmp_path / "skip", on_error="skip", progress=True)
    assert metrics["frames_unreadable"] == 1
    assert metrics["frames_without_people"] == 11
    assert "1 pictures were unreadable, and skipped" in capsys.readouterr().out


def test_a_video_that_is_cut_off_is_done_as_far_as_it_goes(weights, clip, tmp_path, capsys):
    whole = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(whole), cv2.VideoWriter.fourcc(*"MJPG"), 10, SIZE)
    with open_video(clip[0]) as video:
        for frame in video.frames():
            writer.write(frame.picture)
    writer.release()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    metrics = predict((cut, clip[1]), weights, tmp_path / "out", progress=True)
    assert 20 < metrics["frames"] < 45
    assert metrics["frames"] + metrics["frames_missing"] == LENGTH
    out = capsys.readouterr().out
    assert f"{metrics['frames']} frames can be decoded of about {LENGTH}" in out
    assert "cut.avi is cut off" in metrics["notes"][0]
    assert "× frame behind the last one predicted" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"max_frames": 0}, "--max_frames 0: must be at least 1"),
        ({"smooth": -1}, "--smooth -1: must be 0 to 250"),
        ({"outputs": ["gif"]}, r"--outputs \['gif'\]: some of \['video', 'poses', 'coco', 'csv'\]"),
        ({"outputs": []}, r"--outputs \[\]: some of"),
        (
            {"detections": None, "detect_every": 9},
            "--bridge 4: the detector runs every 9 frames, so 8 frames must be bridged at least",
        ),
        ({"detect_every": 2}, r"--detect_every 2: no detector runs beside --detections .*boxes"),
        ({"fps": 30.0, "outputs": ["coco"]}, r"--fps 30\.0: is the drawn video's, which --outp"),
    ],
)
def test_options_that_cannot_be(clip, weights, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        predict(clip, weights, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


class Long(Video):
    """Hours of one picture."""

    def __init__(self, frames):
        self.info = VideoInfo("long", "long", 96, 64, 25.0, frames)

    def frames(self, skip=0):
        picture = np.zeros((64, 96, 3), np.uint8)
        return (VideoFrame(n, picture.copy()) for n in range(self.info.frames))

    def signature(self):
        return {}


class Cheap:
    """A model that answers at once, in place of the network."""

    def __init__(self, num_keypoints):
        self.answer = np.random.default_rng(0).uniform(0, 60, (num_keypoints, 2))

    def crops(self, window, boxes):
        return torch.zeros(len(boxes), 1), np.zeros((len(boxes), 2, 3))

    def poses(self, clips, matrices):
        keypoints = np.tile(self.answer, (len(clips), 1, 1))
        return Poses(keypoints, np.full(keypoints.shape[:2], 0.5), None, matrices)


def test_memory_does_not_grow_with_the_length(weights, tmp_path, monkeypatch):
    """Peaks of allocated memory, over two lengths of which one is five times the other."""
    peaks = {}
    cheap = Cheap(15)
    for name in ("crops", "poses"):
        monkeypatch.setattr(Predictor, name, lambda self, *a, name=name: getattr(cheap, name)(*a))
    monkeypatch.setattr(people, "detect_people", people_everywhere)
    for frames in (20, 150, 750):  # the first warms up
        monkeypatch.setattr(module, "open_video", lambda *_, n=frames, **__: _Opened(Long(n)))
        tracemalloc.start()
        metrics = predict_video(
            "long", weights, tmp_path / str(frames), outputs=["poses", "coco"], progress=False
        )
        peaks[frames] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert metrics["people"] == metrics["frames"] == frames
    assert peaks[750] < 1.02 * peaks[150] + 50_000, peaks


class _Opened:
    def __init__(self, video):
        self.video = video

    def __enter__(self):
        return self.video

    def __exit__(self, *_):
        pass
