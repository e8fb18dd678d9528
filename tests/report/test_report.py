"""Reports of training runs and of predictions: what is gathered, and what is missing."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose import config as configuration
from cmpose import files
from cmpose.cli import main
from cmpose.config import Config
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import read_picture
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.evaluation.posetrack_ap import COLUMNS
from cmpose.files import InUse, OutputError, claim_file
from cmpose.models.weights import checkpoint
from cmpose.predict.predict import predict_video
from cmpose.report.clips import measure
from cmpose.report.inputs import ReportError, read_metrics
from cmpose.report.log import log_charts, read_log
from cmpose.report.page import Clip, ClipFrame, render
from cmpose.report.report import gather, report, within_budget
from cmpose.report.samples import Sample, Samples, pick, rank, unit_size
from cmpose.train.train import train
from tests import browser
from tests.models.builders import build
from tests.recipes import FINE, recipe
from tests.small_disk import small_disk


@pytest.fixture(scope="module")
def run(rendered, tmp_path_factory):
    """Two epochs of the rendered clips, evaluated after each."""
    folder = tmp_path_factory.mktemp("trained") / "a run"
    # The kernels run slowly on a CPU, and have tests of their own.
    fields = FINE | {"train.evaluate_every": 1, "model.backend": "reference"}
    train(recipe(rendered, **fields), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def prediction(run, rendered, tmp_path_factory):
    """The held-out clip as a video, predicted with pictures of two frames."""
    [sequence] = load_annotations("annotations/val", rendered)
    folder = tmp_path_factory.mktemp("predicted")
    video = folder / "walk.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (256, 144))
    for frame in sequence.frames:
        writer.write(read_picture(rendered / frame.file_name))
    writer.release()
    boxes = [
        {"frame": i, "bbox": person.box.tolist(), "score": 1.0, "track_id": person.track_id}
        for i, frame in enumerate(sequence.frames)
        for person in frame.people
    ]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    predict_video(
        video,
        run,
        folder / "out",
        detections=folder / "boxes.json",
        explain=True,
        explain_frames=[1, 2],
        progress=False,
    )
    return folder / "out"


@pytest.fixture
def copied(run, tmp_path):
    """The run, to take things out of."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_file_that_is_no_page_is_not_replaced(prediction, tmp_path):
    """Pages are replaced, and nothing else."""
    page = tmp_path / "page.html"
    page.touch()
    for _ in range(2):
        report(prediction, page, 1)
    mine = prediction / "metrics.json"
    before = mine.read_bytes()
    with pytest.raises(
        ReportError, match=r"metrics\.json: is there already and is no page of cmpose"
    ):
        report(prediction, mine, 1)
    assert mine.read_bytes() == before


# -- which clips -----------------------------------------------------------------------------------


def person(x: float, track: int = 0, head: float = 30.0, missing: int = 0) -> Person:
    """Joints at (x, 0), the first ``missing`` ones not annotated; head box 3-4-5 × head / 5."""
    keypoints = np.zeros((15, 3))
    keypoints[missing:] = [x, 0, 1]
    box = np.array([0, 0, 0.6 * head, 0.8 * head])
    return Person(np.array([0.0, 0, 10, 10]), keypoints, box if head else None, track)


def sequence(*frames: list[Person]) -> Sequence:
    frame_list = [
        Frame(100 + i, f"s/{i:06d}.jpg", i, people=people) for i, people in enumerate(frames)
    ]
    return Sequence("s", "s", frame_list)


def test_errors_are_in_head_sizes():
    """Worked by hand: a head of diagonal 30 is 18 pixels large."""
    assert unit_size(person(0), "head") == pytest.approx(18)
    truth = sequence([person(0, 0, missing=5), person(100, 1)], [person(0, 0, head=0)], [])
    poses = sequence([person(136, 1), person(9, 0)], [person(3, 0)], [])
    samples = rank([truth], [poses], own_boxes=True)
    errors = [[sample.error for sample in track] for track in samples.tracks]
    assert errors == [[pytest.approx(0.5), None], [pytest.approx(2.0)]]
    assert samples.measured == 2
    assert samples.left_out() == " Not measured: 1 person without a head box."
    none = rank([truth], [], own_boxes=True)
    assert not none.ranked
    assert none.left_out() == ""


def test_people_without_head_boxes_are_measured_in_their_boxes():
    """As their AP is; keypoints of one's own have no head box either."""
    truth = sequence([person(0, 0, head=0), person(100, 1, head=0)])
    truth.frames[0].people[1].box[2:] = 0
    poses = sequence([person(3, 0), person(100, 1)])
    samples = rank([truth], [poses], own_boxes=True)
    assert [[s.error for s in track] for track in samples.tracks] == [[pytest.approx(0.3)], [None]]
    assert "in box lengths (the longer side of the person's box; the AP lets 0.1" in measure(
        samples
    )
    assert "Not measured: 1 person without a box." in measure(samples)
    truth.frames[0].people[0].box[2:] = 0
    nothing = measure(rank([truth], [poses], own_boxes=True))
    assert "no pose can be measured" in nothing
    assert "2 people without a box" in nothing
    assert "no predictions yet" in measure(rank([truth], [], own_boxes=True))


def test_detected_poses_are_those_nearest():
    """Their track ids say nothing about whom they show."""
    truth = sequence([person(0, 0), person(100, 1)])
    poses = sequence([person(91, 0), person(9, 1)])
    [[first], [second]] = rank([truth], [poses], own_boxes=False).tracks
    assert first.pose is poses.frames[0].people[1]
    assert second.pose is poses.frames[0].people[0]
    [[first], [second]] = rank([truth], [poses], own_boxes=True).tracks
    assert first.error == pytest.approx(91 / 18)
    assert rank([truth], [sequence([])], own_boxes=False).unpredicted == 2


def sample(error: float | None, track: int) -> Sample:
    frame = Frame(0, "s/0.jpg", 0)
    return Sample(Sequence("s", "s", [frame]), frame, person(0, track), None, error, 18.0)


def test_a_person_is_shown_once():
    errors = [[0.1, 3.0], [0.2, 0.4], [None, 2.0], [0.3], [None]]
    samples = Samples([[sample(e, i) for e in track] for i, track in enumerate(errors)])
    worst, best = pick(samples, 2)
    assert [s.error for s in worst] == [3.0, 2.0]
    assert [s.error for s in best] == [0.2, 0.3]
    worst, best = pick(samples, 9)  # more than there are: half and half
    assert [s.error for s in worst + best] == [3.0, 2.0, 0.2, 0.3]
    unknown = Samples([[sample(None, 0), sample(None, 0), sample(None, 0)]])
    assert pick(unknown, 1) == ([unknown.tracks[0][1]], [])


# -- a training run --------------------------------------------------------------------------------


def test_what_a_training_run_has(run, rendered):
    gathered = gather(run, clips=1)
    assert gathered.title == "a run"
    metrics = json.loads((run / "metrics.json").read_text())
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    charts = {chart.title: chart for chart in gathered.charts}
    assert list(charts) == ["Loss", "AP by step", "Learning rate", "Gradient norm"]
    named = {line.name: line.points for line in charts["Loss"].lines}
    assert set(named) == {"loss", "pose", "mask", "noise", "selection"}
    steps = [line for line in lines if line["kind"] == "train"]
    assert named["loss"] == [(line["step"], line["loss"]) for line in steps]
    evaluated = [line for line in lines if line["kind"] == "evaluate"]
    assert len(evaluated) == 2
    assert charts["AP by step"].lines[0].points == [(e["step"], e["Mean"]) for e in evaluated]
    # A column whose joints nobody has in this small set has no AP.
    columns = [c for c in ("Mean", *COLUMNS) if any(e[c] is not None for e in evaluated)]
    assert [line.name for line in charts["AP by step"].lines] == columns

    by_joint, by_column, by_kind = gathered.tables
    assert [row[1][0] for row in by_joint.rows] == metrics["ap"]["ap"]
    assert dict(by_column.rows)["Mean"] == [metrics["ap"]["columns"]["Mean"]]
    kinds = {kind: [values["ap"]] for kind, values in metrics["subsets"].items()}
    assert dict(by_kind.rows) == kinds
    assert f"PoseTrack AP {metrics['ap']['columns']['Mean']:.1f} % after" in gathered.lead
    assert any(f"boxes: ground truth, {metrics['clips']} clips" in n for n in gathered.table_notes)
    assert any(f"{rendered}: annotations/val" in note for note in gathered.table_notes)

    assert len(gathered.worst) == 1
    assert "head sizes" in gathered.worst[0].heading
    assert gathered.worst[0].picture.startswith("data:image/jpeg;base64,")
    assert not gathered.absent
    for clip in gathered.clips:
        assert 1 <= len(clip.frames) <= 4
        for frame in clip.frames:
            assert frame.record["tokens"]["assignment"] is not None
            assert frame.record["truth"] is not None
            assert frame.size > 0


def test_the_model_run_again_gives_the_evaluated_poses(run, rendered):
    """The page's records hold the poses that were written, ranked and scored."""
    gathered = gather(run, clips=1)
    [written] = load_annotations(run / "predictions")
    clip = gathered.clips[gathered.worst[0].clip]
    start = clip.frames[clip.start]
    error = float(gathered.worst[0].heading.split()[0])
    record = start.record
    truth = np.array([point or [np.nan] * 2 for point in record["truth"]])
    # In crop pixels and at float32, what was ranked in image pixels from the files.
    [original] = load_annotations("annotations/val", rendered)
    who = int(gathered.worst[0].detail.split("person ")[1].split(",")[0])
    frame = next(f for f in original.frames if start.label == f"frame {f.index}")
    annotated = next(p for p in frame.people if p.track_id == who)
    visible = annotated.keypoints[:, 2] > 0
    distance = np.linalg.norm(truth - np.array(record["keypoints"]), axis=1)[visible]
    assert distance.mean() / start.size == pytest.approx(error, abs=0.02)
    assert len(written.frames) == 4


def test_logs_of_killed_and_resumed_runs(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = [
        {"kind": "train", "step": step, "loss": loss} for step, loss in ((1, 9), (2, 8), (2, 7))
    ]
    log.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "train", "st')
    assert [(line["step"], line["loss"]) for line in read_log(log)] == [(1, 9), (2, 7)]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [("clips_per_second", "fast", r"clips_per_second: .*'fast'"), ("loss", True, "loss: ")],
)
def test_a_log_with_text_in_place_of_a_number_is_refused(tmp_path, field, value, named):
    line = {"kind": "train", "step": 1, "loss": 9.0, field: value}
    (tmp_path / "log.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ReportError, match=r"log\.jsonl: line 1: " + named):
        read_log(tmp_path / "log.jsonl")


def test_evaluations_with_other_boxes_are_compared_and_chosen_from(copied):
    """Each has its own AP, worst and best clips; one of other data has no clips here."""
    metrics = json.loads((copied / "metrics.json").read_text())
    last = checkpoint.evaluation_folder(copied / "model").relative_to(copied)
    other = metrics | {"box_source": "val_boxes.json", "ap": metrics["ap"] | {"ap": [12.5] * 15}}
    del other["steps"]
    elsewhere = other | {"annotations": "elsewhere: annotations/val"}
    for subfolder, content in ((last, other), (Path("model/evaluation"), elsewhere)):
        (copied / subfolder).mkdir(parents=True)
        (copied / subfolder / "metrics.json").write_text(json.dumps(content))
    shutil.copytree(copied / "predictions", copied / last / "predictions")
    gathered = gather(copied, clips=1)
    [table] = gathered.tables
    names = ["ground truth", f"val_boxes.json ({last})", "val_boxes.json (model/evaluation)"]
    assert [name for name, _ in table.rows] == names
    assert table.columns[0] == "Mean"
    assert [part.title for part in gathered.sources] == names
    own, detected, apart = gathered.sources
    assert [row[1] for row in detected.tables[0].rows] == [[12.5]] * 15
    assert own.tables[0].rows != detected.tables[0].rows
    assert "boxes: val_boxes.json" in detected.table_notes[1]
    for part in (own, detected):
        assert part.worst
        assert part.clips
    assert "checkpoints/step-" in detected.clips_intro
    assert "Its poses are of elsewhere: annotations/val" in apart.absent["clips"]
    assert not apart.worst
    text = render(gathered)
    assert text.count("<option value=") == 3
    assert f"val_boxes.json ({last})" in text


def test_a_run_without_an_evaluation(copied):
    """The first people are shown, unranked."""
    (copied / "metrics.json").unlink()
    shutil.rmtree(copied / "predictions")
    log = copied / "log.jsonl"
    train_only = [line for line in log.read_text().splitlines() if '"evaluate"' not in line]
    log.write_text("\n".join(train_only) + "\n")
    gathered = gather(copied, clips=2)
    assert gathered.absent["ap"].startswith("This run has not been evaluated")
    assert gathered.groups == ("Clips", "")
    assert gathered.worst
    assert not gathered.best
    assert "nothing is ranked" in gathered.measure
    assert gathered.clips
    assert "not evaluated" in gathered.lead


def test_a_run_that_has_not_ended(copied):
    """Its log knows the AP of its last evaluation."""
    (copied / "metrics.json").unlink()
    gathered = gather(copied, clips=1)
    [table] = gathered.tables
    assert table.rows[-1][0] == "Mean"
    assert "the run has not ended" in gathered.table_notes[1]
    assert gathered.worst


def test_data_that_was_moved_away(copied, tmp_path, rendered):
    config = json.loads((copied / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "gone")
    (copied / "config.json").write_text(json.dumps(config))
    gathered = gather(copied)
    assert gathered.tables
    assert gathered.charts
    for part in ("clips", "tokens"):
        assert "the annotations cannot be read" in gathered.absent[part]
        assert str(tmp_path / "gone") in gathered.absent[part]
    (tmp_path / "gone").mkdir()  # the annotations are there, the frames are not
    shutil.copytree(rendered / "annotations", tmp_path / "gone" / "annotations")
    gathered = gather(copied)
    assert "its frames cannot be read" in gathered.absent["clips"]
    assert not gathered.worst
    report(copied)


def test_a_run_whose_weights_are_gone(copied):
    for folder in ("model", "checkpoints"):
        shutil.rmtree(copied / folder)
    gathered = gather(copied, clips=1)
    assert "The model cannot be run again: no checkpoint at" in gathered.absent["tokens"]
    assert gathered.worst[0].clip is None
    assert not gathered.clips


def test_a_model_without_fine_token_enhancement(copied):
    config = json.loads((copied / "config.json").read_text())
    config["model"] |= {"fine": "off", "tokens_per_keypoint": 0}
    model = build(fine="off", num_keypoints=15, image_size=(64, 64), tokens_per_keypoint=0)
    recipe_of = configuration.from_dict(config)
    shutil.rmtree(copied / "model")
    saved = Config(model=model.config, data=recipe_of.data, train=recipe_of.train)
    checkpoint.save(copied, "model", model.state_dict(), saved)
    (copied / "config.json").write_text(json.dumps(configuration.to_dict(saved)))
    gathered = gather(copied, clips=1)
    assert gathered.clips[0].frames[0].record["tokens"] is None
    assert ("Fine Token Enhancement", "model.fine=off") in gathered.facts


def test_a_run_that_has_logged_nothing(copied):
    (copied / "log.jsonl").write_text("")
    gathered = gather(copied, clips=1)
    assert "train.log_every = 1 steps" in gathered.absent["curves"]


# -- a prediction ----------------------------------------------------------------------------------


def test_what_a_prediction_has(prediction):
    gathered = gather(prediction, clips=2)
    metrics = json.loads((prediction / "metrics.json").read_text())
    poses = json.loads((prediction / "poses" / "walk.json").read_text())["annotations"]
    assert gathered.kind == "Prediction"
    assert gathered.title == "walk.mp4"
    assert f"{metrics['people']} poses in 4 frames (boxes: boxes.json)" in gathered.lead
    assert "ap" not in gathered.absent  # there is no truth, so there is no such part
    scores = gathered.charts[0]
    assert scores.title == "Score by frame"
    drawn = sorted(y for line in scores.lines for _, y in line.points)
    slots = [0, 1, 2, *range(5, 17)]  # all but the ears
    assert drawn == pytest.approx(sorted(np.array(p["scores"])[slots].mean() for p in poses))
    assert gathered.groups == ("Lowest score", "Highest score")
    lowest = min(drawn)
    assert gathered.worst[0].heading == f"score {lowest:.2f}"
    tracks = {p["track_id"] for p in poses}
    assert {clip.name for clip in gathered.clips} == {f"person {t}" for t in tracks}
    assert [f.label for f in gathered.clips[0].frames] == ["frame 1", "frame 2"]
    for tile in gathered.worst + gathered.best:
        start = gathered.clips[tile.clip].frames[gathered.clips[tile.clip].start].label
        assert tile.shown == (start == tile.detail.split(",")[0])
        assert tile.large.startswith("data:image/jpeg;base64,")


def test_several_videos_have_a_part_each(prediction, tmp_path):
    """In one folder, of which metrics.json is of the last one, or in folders of their own."""
    both = Path(shutil.copytree(prediction, tmp_path / "both"))
    document = json.loads((both / "poses" / "walk.json").read_text())
    (both / "poses" / "run.json").write_text(json.dumps(document))
    shutil.copytree(both / "journal" / "walk", both / "journal" / "run")
    finished = both / "journal" / "run" / "finished.json"
    mine = json.loads(finished.read_text()) | {"video": "run.mov", "people": 77}
    finished.write_text(json.dumps(mine))
    gathered = gather(both, clips=1)
    assert [part.title for part in gathered.sources] == ["run.mov", "walk.mp4"]
    run, walk = gathered.sources
    assert ("Poses", "77") in run.facts
    assert run.lead.startswith("77 poses")
    assert not run.clips
    assert "not here or cannot be read" in run.absent["clips"]  # run_poses.mp4 is not
    assert walk.clips
    assert walk.facts[1:] == gather(prediction, clips=1).facts[1:]
    apart = tmp_path / "apart"
    shutil.copytree(prediction, apart / "a")
    shutil.copytree(both, apart / "b")
    titles = [part.title for part in gather(apart, clips=1).sources]
    assert titles == ["a: walk.mp4", "b: run.mov", "b: walk.mp4"]


def test_a_prediction_without_pictures(prediction, tmp_path):
    out = Path(shutil.copytree(prediction, tmp_path / "out"))
    shutil.rmtree(out / "explain")
    (out / "walk_poses.mp4").unlink()
    gathered = gather(out)
    assert "cmpose predict --explain writes one beside each" in gathered.absent["tokens"]
    assert "cut out of NAME_poses.mp4, which is not here" in gathered.absent["clips"]
    shutil.rmtree(out / "poses")
    gathered = gather(out)
    assert "Nobody was found" in gathered.absent["curves"]
    report(out)


# -- the page --------------------------------------------------------------------------------------


def test_both_pages_in_a_browser(run, prediction, tmp_path, capsys):
    browser.require_browser()
    main(["report", str(prediction), "--clips", "1"])
    assert "report.html: " in capsys.readouterr().out
    pages = [report(run, tmp_path / "training.html", 1), prediction / "report.html"]
    with browser.open_browser() as chromium:
        for page in pages:
            with browser.open_page(chromium, page, viewport={"width": 390, "height": 844}) as (
                tab,
                watch,
            ):
                tab.wait_for_selector("#explorer[data-shown]")
                assert tab.locator(".chart polyline").count() >= 2
                assert tab.evaluate("document.documentElement.scrollWidth") <= 390
                before = tab.get_attribute("#explorer", "data-shown")
                tab.locator("#keypoints button").nth(7).click()
                tab.wait_for_function(
                    "old => document.getElementById('explorer').dataset.shown !== old", arg=before
                )
                assert watch.messages == []
                assert watch.requests == []
            assert page.stat().st_size < 2_000_000


def test_a_page_stays_small():
    record = {"crop": "x" * 1000}
    clips = [
        Clip("a", [ClipFrame(str(i), record) for i in range(7)], 3),
        Clip("b", [ClipFrame("0", record)]),
    ]
    assert not within_budget(clips, 10_000)
    assert within_budget(clips, 5_000)
    assert len(clips[1].frames) == 1
    assert clips[0].frames[clips[0].start].label == "3"
    assert sum(len(json.dumps(f.record)) for clip in clips for f in clip.frames) <= 5_000
    assert within_budget(clips, 10)  # a frame a clip is kept
    assert [len(clip.frames) for clip in clips] == [1, 1]


def test_folders_that_are_no_run(tmp_path, run):
    expected = (
        r"give the folder of a training run \(it holds config.json and log.jsonl\) or the out"
    )
    with pytest.raises(ReportError, match=rf"none: no such folder; {expected}"):
        report(tmp_path / "none")
    with pytest.raises(ReportError, match=rf"nothing to report on; {expected}"):
        report(tmp_path)
    with pytest.raises(ReportError, match="--clips 0: must be at least 1"):
        report(run, clips=0)
    with pytest.raises(ReportError, match=r"--out .*: is a folder; name a file, such as"):
        report(run, tmp_path)


def test_a_page_has_one_writer_and_is_whole_or_absent(copied, tmp_path, monkeypatch):
    page = copied / "report.html"
    with claim_file(page, "report", "--out"), pytest.raises(InUse, match="another cmpose report"):
        report(copied, clips=1)
    report(copied, clips=1)
    before = page.read_bytes()
    with small_disk(tmp_path) as disk:
        (disk / "filler").write_bytes(b"x" * shutil.disk_usage(disk).free)
        with pytest.raises(OutputError, match=r"page\.html: cannot be written: the disk is full"):
            report(copied, disk / "page.html", 1)
        assert os.listdir(disk) == ["filler"]
    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            report(copied, clips=1)
    assert page.read_bytes() == before
    assert not [path for path in copied.iterdir() if path.name.startswith(".")]
    with pytest.raises(ReportError):
        report(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_broken_files_are_named(copied, prediction, tmp_path):
    (copied / "metrics.json").write_text("{")
    with pytest.raises(
        ReportError, match=r"metrics\.json: not valid JSON at line 1, .*; mend it, or del"
    ):
        gather(copied)
    (copied / "metrics.json").unlink()
    next((copied / "predictions").glob("*.json")).write_text("[]")
    with pytest.raises(ReportError, match=r"predictions/.*; evaluate again, or delete"):
        gather(copied)
    (copied / "config.json").write_text("{")
    with pytest.raises(ReportError, match=r"config\.json"):
        gather(copied)
    out = Path(shutil.copytree(prediction, tmp_path / "out"))
    next((out / "explain").glob("*.json")).write_text("{}")
    with pytest.raises(ReportError, match=r"version None, this cmpose reads 1; write it again"):
        gather(out)
    next((out / "poses").glob("*.json")).write_text("{}")
    with pytest.raises(ReportError, match="predict again"):
        gather(out)


def leaves(value, path=()):
    """The paths of all values of a document, those of lists by their first item."""
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))


@pytest.mark.parametrize("of", ["copied", "prediction"])
def test_a_value_of_another_type_anywhere_in_metrics_is_named(of, request, tmp_path):
    document = json.loads((request.getfixturevalue(of) / "metrics.json").read_text())
    file = tmp_path / "metrics.json"
    for path in leaves(document):
        damaged = copy.deepcopy(document)
        inner = damaged
        for key in path[:-1]:
            inner = inner[key]
        if path:
            inner[path[-1]] = [{"x": 1}]
        file.write_text(json.dumps(damaged if path else [1]))
        with pytest.raises(ReportError, match=r"metrics\.json: .*mend it, or delete it"):
            read_metrics(file)
    document.setdefault("ap", {"joints": ["a"]})["ap"] = []
    file.write_text(json.dumps(document))
    with pytest.raises(ReportError, match=r"metrics\.json: ap: expected a number of each of the"):
        read_metrics(file)


def test_a_name_is_not_a_program(copied):
    (copied / "detected<img src=x>").mkdir()
    shutil.copy(copied / "metrics.json", copied / "detected<img src=x>" / "metrics.json")
    text = report(copied, clips=1).read_text(encoding="utf-8")
    assert "<img src=x>" not in text
    assert "detected&lt;img src=x&gt;" in text


def test_terms_that_are_off_are_not_drawn():
    log = [
        {"kind": "train", "step": s, "loss": 2.0, "pose": 2.0, "mask": 0.0, "lr": 1e-3}
        for s in (1, 2)
    ]
    [loss, rate] = log_charts(log)
    assert [line.name for line in loss.lines] == ["loss", "pose"]
    assert rate.title == "Learning rate"
