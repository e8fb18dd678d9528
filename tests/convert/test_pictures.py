"""Which picture belongs to which label, and what labels of turned pictures lie on."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose.config import DataConfig
from cmpose.convert.convert import convert
from cmpose.convert.options import ConvertOptions
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import FrameError, look, read_picture, turn_box, turn_points
from cmpose.data.sequence import AnnotationError
from tests.convert.test_convert import coco, pictures, run
from tests.data import synthetic
from tests.data.test_pictures import blocks, encode
from tests.shared_data import shared_data

TRACKED = [(n, 7) for n in range(3)]


# Which picture -----------------------------------------------------------------------------------


def test_a_label_that_names_a_folder_gets_no_picture_of_another(tmp_path):
    """The fault as filed: ``--images img/walk`` with labels of ``run/000000.jpg``."""
    pictures(tmp_path / "pics", ["000000.jpg", "000001.jpg"])
    document = coco(["run/000000.jpg", "run/000001.jpg"], TRACKED[:2])
    with pytest.raises(
        AnnotationError,
        match=r"images\[0\]: 'run/000000\.jpg' is not below .*pics; there is a 000000\.jpg in "
        r"--images itself, but it need not be the same picture: name the folder",
    ):
        run(tmp_path, document)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_nearly_the_name_is_told(tmp_path):
    pictures(tmp_path / "pics", ["Run/000000.jpg"])
    message = r"'run/000000\.jpg' is not below .*pics; 'Run/000000\.jpg' differs from it in upper"
    with pytest.raises(AnnotationError, match=message):
        run(tmp_path, coco(["run/000000.jpg"], TRACKED[:1]))


@pytest.mark.parametrize("other", ["v/0.jpg", "./v/0.jpg", "v//0.jpg", "w/0.jpg"])
@pytest.mark.parametrize("group", ["auto", "still"])
def test_two_labels_of_one_file_are_refused(tmp_path, other, group):
    pictures(tmp_path / "pics", ["v/0.jpg"])
    (tmp_path / "pics/w").symlink_to("v")
    document = coco(["v/0.jpg", other], people=((0, None), (1, None)))
    with pytest.raises(AnnotationError, match=r"images\[1\]: .*0\.jpg is also at .*images\[0\]"):
        run(tmp_path, document, group=group)


@pytest.mark.parametrize("name", ["../x/0.jpg", "v/../../x/0.jpg", "/{}/x/0.jpg", "link/0.jpg"])
def test_names_that_lead_out_of_the_folder_are_refused_unless_allowed(tmp_path, name):
    pictures(tmp_path, ["x/0.jpg", "pics/v/1.jpg"])
    (tmp_path / "pics/link").symlink_to(tmp_path / "x")
    document = coco([name.format(str(tmp_path).strip("/"))])
    with pytest.raises(
        AnnotationError, match=r"images\[0\]: '.*0\.jpg' leads out of .*pics; .*--outside true"
    ):
        run(tmp_path, document)
    report, [sequence] = run(tmp_path, document, outside=True)
    assert len(sequence.frames) == report.facts["listed_frames"] == 1
    document["images"].append({"id": 99, "file_name": "v/1.jpg"})
    document["annotations"].append(document["annotations"][0] | {"id": 1, "image_id": 99})
    report, _ = run(tmp_path, document, split="skipped", on_error="skip")
    assert list(report.left_out) == ["picture outside of --images"]


@pytest.mark.parametrize("name", ["C:/x/0.jpg", "v/0.jpg\0.png", "v\\..\\..\\x\\0.jpg", "a" * 9999])
def test_names_of_no_file_are_one_error(tmp_path, name):
    pictures(tmp_path, ["pics/v/0.jpg"])
    with pytest.raises(AnnotationError, match=r"images\[0\]: '.*(leads out of|is not below)"):
        run(tmp_path, coco([name]))


def test_links_inside_the_folder_and_equal_frames_stored_once_are_fine(tmp_path):
    pictures(tmp_path / "pics", ["store/a.jpg", "v/0.jpg", "v/1.jpg"])
    (tmp_path / "pics/v/2.jpg").symlink_to("../store/a.jpg")
    (tmp_path / "pics/v/3.jpg").symlink_to("../store/a.jpg")
    _, [sequence] = run(tmp_path, coco(["v/2.jpg", "v/3.jpg"], TRACKED[:2]))
    assert [frame.index for frame in sequence.frames] == [2, 3]


# Frame numbers -----------------------------------------------------------------------------------

HASHED = ["0000_jpg.rf.8a7f.jpg", "0001_jpg.rf.0b12.jpg", "0002_jpg.rf.77aa.jpg"]


@pytest.mark.parametrize(
    "names",
    [
        [f"frame000{n}_cam1.jpg" for n in range(3)],
        HASHED,
        [f"{n}_1280x720.jpg" for n in (9, 10, 11)],
    ],
)
@pytest.mark.parametrize("tracked", [True, False])
def test_a_number_before_another_one_makes_a_video(tmp_path, names, tracked):
    pictures(tmp_path / "pics/cam", names)
    for n, name in enumerate(names):
        synthetic.write_picture(tmp_path / "pics/cam" / name, n, (64, 48))
    people = [(n, 7 if tracked else None) for n in range(3)]
    report, [sequence] = run(tmp_path, coco([f"cam/{name}" for name in names], people))
    assert [frame.extra["source"] for frame in sequence.frames] == [f"cam/{n}" for n in names]
    assert [frame.index for frame in sequence.frames] == [0, 1, 2]
    assert not report.warnings
    data = DataConfig()
    clips = ClipDataset([sequence], tmp_path / "out", (64, 48), 3, data, train=False)
    means = [float(frame.float().mean()) for frame in clips[1]["clip"]]
    assert means == sorted(set(means)), "three different frames, in order"


def test_boxes_by_frame_number_fit_such_names(tmp_path):
    names = [f"cam/frame000{n}_cam1.jpg" for n in range(3)]
    pictures(tmp_path / "pics", names)
    document = coco(names, TRACKED)
    del document["annotations"][2]["bbox"]
    boxes = synthetic.write_json(tmp_path / "b.json", [{"frame": 2, "bbox": [1, 2, 33, 44]}])
    _, [sequence] = run(tmp_path, document, boxes=str(boxes))
    assert sequence.frames[2].people[0].box.tolist() == [1, 2, 33, 44]


@pytest.mark.parametrize(
    ("names", "entry", "message"),
    [
        (["v/0.jpg", "w/0.jpg"], {"image_name": "0.jpg"}, r"image_name '0\.jpg' .*v/0.* or .*w/0"),
        (["v/0.jpg", "w/1.jpg"], {"frame": 0}, "frame 1 could be of .*0.jpg or .*1.jpg"),
        (["v/cam1_0.jpg", "v/cam2_0.jpg"], {"frame": 0}, "frame 0 could be of .*cam1.* or .*cam2"),
    ],
)
def test_boxes_that_could_be_of_two_pictures_are_refused(tmp_path, names, entry, message):
    pictures(tmp_path / "pics", [*names, "v/cam1_1.jpg", "v/cam2_1.jpg"])
    boxes = [entry | {"bbox": [1, 2, 33, 44]}, {"frame": 1, "bbox": [1, 2, 33, 44]}]
    file = synthetic.write_json(tmp_path / "b.json", boxes)
    document = coco(names, [(0, None), (1, None)])
    with pytest.raises(
        AnnotationError, match=message + r".*; give image_name as the source has it"
    ):
        run(tmp_path, document, boxes=str(file))


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["a.jpg", "b.jpg", "c.jpg"], {}),
        (["a1.jpg", "b2.jpg", "c3.jpg"], {}),
        (["a1.jpg", "b2.jpg", "c3.jpg"], {"group": "video"}),
    ],
)
def test_frames_of_a_video_that_would_come_out_one_by_one_are_an_error(tmp_path, names, options):
    pictures(tmp_path / "pics", names)
    people = TRACKED if not options else [(n, None) for n in range(3)]
    with pytest.raises(
        AnnotationError,
        match=r"pics: 3 pictures are frames of a video by .*one frame.*--group still if they are",
    ):
        run(tmp_path, coco(names, people), **options)
    _, sequences = run(tmp_path, coco(names, people), group="still")
    assert len(sequences) == 3


def test_a_number_in_doubt_is_an_error(tmp_path):
    names = [f"frame{n:04d}_cam{c}.jpg" for n in range(3) for c in (1, 2)]
    pictures(tmp_path / "pics", names)
    document = coco(names, [(n, None) for n in range(6)])
    with pytest.raises(AnnotationError, match=r"cam1\.jpg: both 0000 and 1 could be the frame num"):
        run(tmp_path, document)
    assert len(run(tmp_path, document, group="still")[1]) == 6


def test_a_frame_number_twice_is_an_error(tmp_path):
    names = ["1_jpg.rf.8a7f.jpg", "1_jpg.rf.11ff.jpg", "2_jpg.rf.22ff.jpg"]
    pictures(tmp_path / "pics", names)
    with pytest.raises(AnnotationError, match=r"both are frame 1; keep one of them, or --group st"):
        run(tmp_path, coco(names, TRACKED))


def test_hidden_files_are_no_frames(tmp_path):
    pictures(tmp_path / "pics/v", [f"{n}.jpg" for n in range(4)])
    for name in ("._1.jpg", "._9.jpg", ".DS_Store", "Thumbs.db", ".4.jpg"):
        (tmp_path / "pics/v" / name).write_bytes(b"no picture")
    _, [sequence] = run(tmp_path, coco(["v/1.jpg", "v/2.jpg"], TRACKED[:2]))
    assert sequence.nframes == 4
    source = tmp_path / "l.csv"
    source.write_text("sequence,frame,keypoint,x,y\nv,1,a,3,4\nv,1,b,13,24\n")
    convert(source, tmp_path / "csv", tmp_path / "pics")
    assert len(list((tmp_path / "csv/images/train/v").iterdir())) == 4


def test_leaving_out_a_frame_shifts_no_other(tmp_path):
    pictures(tmp_path / "pics/v", [f"{n}.jpg" for n in (0, 1, 3, 4)])
    for n in (0, 1, 3, 4):
        synthetic.write_picture(tmp_path / f"pics/v/{n}.jpg", n, (64, 48))
    source = tmp_path / "l.csv"
    rows = [f"v,{n},{k},{x},{n}\n" for n in (0, 3, 4) for k, x in (("a", 3), ("b", 13))]
    rows = [row.replace(f"13,{row[2]}", "13,30") for row in rows]
    source.write_text("sequence,frame,keypoint,x,y\n" + "".join(rows))
    convert(source, tmp_path / "out", tmp_path / "pics")
    for sequence in load_annotations(tmp_path / "out/annotations/train"):
        for frame in sequence.frames:
            number = frame.people[0].keypoints[0, 1]
            shown = read_picture(tmp_path / "out" / frame.file_name).mean()
            assert shown == pytest.approx(20 + 10 * number, abs=2)


# What labels of turned pictures lie on -----------------------------------------------------------

SIZE = 48, 32
POINTS = np.array([[4.0, 6.0], [20.0, 9.0], [11.0, 27.0]])
BOX = np.array([2.0, 3.0, 24.0, 28.0])


def tagged(tmp_path, orientation, size=SIZE, suffix=".jpg", stated="none", labelled="turned"):
    """A source of one picture with a tag, labelled either way, and the labels that are right."""
    path = tmp_path / "pics" / f"a{suffix}"
    path.parent.mkdir(exist_ok=True)
    format = {".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".tif": "TIFF"}[suffix]
    path.write_bytes(encode(blocks(*size), format, orientation))
    document = coco([path.name])
    upright = size[::-1] if orientation >= 5 else size
    for key, value in zip(
        ("width", "height"), size if stated == "stored" else upright, strict=True
    ):
        document["images"][0][key] = value
        if stated == "none":
            del document["images"][0][key]
    annotation = document["annotations"][0]
    annotation["bbox"] = BOX.tolist()
    annotation["keypoints"] = np.insert(POINTS, 2, 2, axis=1).ravel().tolist()
    points, box = POINTS, BOX
    if labelled == "unturned":
        points, box = turn_points(points, orientation, size), turn_box(box, orientation, size)
        if orientation in (2, 4, 5, 7):
            points = points[[0, 2, 1]]  # left and right paw
    return document, points, box


def check(tmp_path, sequence, points, box):
    """The labels are right, and the picture is upright without a tag."""
    [frame] = sequence.frames
    [person] = frame.people
    np.testing.assert_allclose(person.keypoints[:, :2], points)
    np.testing.assert_allclose(person.box, box)
    [source] = (tmp_path / "pics").iterdir()
    placed = tmp_path / "out" / frame.file_name
    assert look(placed).orientation == 1
    assert not placed.is_symlink()
    assert look(placed).size == (frame.width, frame.height) == look(source).size
    difference = np.abs(read_picture(placed).astype(int) - read_picture(source))
    assert difference.mean() < (4 if placed.suffix == ".jpg" else 1e-9)
    clips = ClipDataset([sequence], tmp_path / "out", (64, 48), 3, DataConfig(), train=False)
    assert clips[0]["valid"]


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize("labelled", ["turned", "unturned"])
def test_labels_of_either_kind_are_converted_when_it_is_said(tmp_path, orientation, labelled):
    document, points, box = tagged(tmp_path, orientation, labelled=labelled)
    with pytest.raises(
        AnnotationError,
        match=rf"images\[0\]: .*a\.jpg has the orientation tag {orientation}, and its size does "
        "not tell what was labelled: give --exif turned .* or --exif unturned",
    ):
        run(tmp_path, document)
    assert not (tmp_path / "out").exists()
    report, [sequence] = run(tmp_path, document, exif=labelled)
    check(tmp_path, sequence, points, box)
    assert report.warnings["orientation tag: written upright, without it"]


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_upright_pictures_of_other_formats_lose_nothing(tmp_path, suffix):
    document, points, box = tagged(tmp_path, 6, suffix=suffix)
    check(tmp_path, run(tmp_path, document, exif="turned", place="link")[1][0], points, box)


def test_a_size_that_tells_what_was_labelled_is_believed(tmp_path):
    document, points, box = tagged(tmp_path, 6, stated="turned")
    check(tmp_path, run(tmp_path, document)[1][0], points, box)
    with pytest.raises(AnnotationError, match=r"--exif unturned is given, but .*32×48 are turned"):
        run(tmp_path, document, split="b", exif="unturned")
    document, points, box = tagged(tmp_path, 6, stated="stored", labelled="unturned")
    with pytest.raises(AnnotationError, match=r"48×32 are of the pixels as they are stored; --e"):
        run(tmp_path, document, split="c")
    with pytest.raises(AnnotationError, match=r"--exif turned is given, but .*48×32 are unturned"):
        run(tmp_path, document, split="d", exif="turned")
    shutil.rmtree(tmp_path / "out")
    check(tmp_path, run(tmp_path, document, exif="unturned")[1][0], points, box)


@pytest.mark.parametrize(("orientation", "size"), [(3, SIZE), (2, SIZE), (6, (32, 32))])
def test_a_size_that_does_not_tell_is_asked_about(tmp_path, orientation, size):
    """The faults as filed: half turns and squares passed in silence."""
    document, _, _ = tagged(tmp_path, orientation, size, stated="turned")
    with pytest.raises(AnnotationError, match="its size does not tell what was labelled"):
        run(tmp_path, document)
    assert run(tmp_path, document, exif="turned")[1]


def test_detected_boxes_and_regions_turn_along(tmp_path):
    document, points, box = tagged(tmp_path, 7, labelled="unturned")
    crowd = {"id": 1, "image_id": 50, "category_id": 3, "iscrowd": 1, "bbox": [0, 0, 9, 9]}
    corners = [[1.0, 2.0], [30.0, 2.0], [30.0, 20.0]]
    document["annotations"].append(crowd | {"segmentation": [np.ravel(corners).tolist()]})
    document["annotations"][0]["bbox_head"] = [3, 4, 5, 6]
    del document["annotations"][0]["bbox"]
    boxes = synthetic.write_json(
        tmp_path / "b.json", [{"image_name": "a.jpg", "bbox": BOX.tolist()}]
    )
    before = copy.deepcopy(document)
    _, [sequence] = run(tmp_path, document, exif="unturned", boxes=str(boxes))
    check(tmp_path, sequence, points, box)
    assert document == before
    [frame] = sequence.frames
    np.testing.assert_allclose(frame.ignore_regions[0], turn_points(np.array(corners), 7, SIZE))
    np.testing.assert_allclose(frame.people[0].head_box, turn_box(np.array([3, 4, 5, 6]), 7, SIZE))


def test_neighbours_are_turned_and_pictures_in_place_are_left_alone(tmp_path):
    folder = tmp_path / "pics/v"
    folder.mkdir(parents=True)
    for n, orientation in enumerate((1, 3, 1)):
        (folder / f"{n:06d}.jpg").write_bytes(encode(blocks(), "JPEG", orientation))
    document = coco(["v/000000.jpg"], TRACKED[:1])
    document["images"][0] |= {"width": 48, "height": 32}
    run(tmp_path, document)
    placed = [read_picture(tmp_path / f"out/images/train/v/{n:06d}.jpg") for n in range(3)]
    np.testing.assert_allclose(placed[1].astype(int), placed[0][::-1, ::-1], atol=24)
    inside = tmp_path / "in/images/train"
    shutil.copytree(folder, inside / "v")
    source = synthetic.write_json(tmp_path / "own.json", document)
    before = (inside / "v/000001.jpg").read_bytes()
    with pytest.raises(AnnotationError, match=r"already lie where they .* or not upright; move"):
        convert(source, tmp_path / "in", inside, ConvertOptions())
    assert (inside / "v/000001.jpg").read_bytes() == before


def test_training_refuses_a_tagged_picture_that_nothing_proves(tmp_path):
    pictures(tmp_path / "pics", ["v/0.jpg"])
    _, [sequence] = run(tmp_path, coco(["v/0.jpg"]))
    path = tmp_path / "out" / sequence.frames[0].file_name
    path.write_bytes(encode(blocks(64, 48), "JPEG", 3))
    clips = ClipDataset([sequence], tmp_path / "out", (64, 48), 3, DataConfig(), train=False)
    with pytest.raises(FrameError, match=r"has the orientation tag 3, and nothing proves"):
        clips[0]
    sequence.frames[0].width = None
    with pytest.raises(FrameError, match=r"has the orientation tag 3, and nothing proves"):
        ClipDataset([sequence], tmp_path / "out", (64, 48), 3, DataConfig(), train=False)


def test_training_refuses_frames_whose_number_is_not_the_last(tmp_path):
    truth = synthetic.sequence(indices=(1,))
    truth.nframes = None
    for n in range(3):
        synthetic.write_picture(tmp_path / f"images/frame{n}_cam1.jpg", n)
    truth.frames[0].file_name = "images/frame1_cam1.jpg"
    with pytest.raises(FrameError, match=r"frame1_cam1\.jpg: its frame number is the last number"):
        ClipDataset([truth], tmp_path, (64, 48), 3, DataConfig(), train=True)


@pytest.mark.parametrize("name", ["../a/000001.jpg", "{}/a/000001.jpg", "images/../../000001.jpg"])
def test_training_refuses_names_that_lead_out_of_the_root(tmp_path, name):
    synthetic.write_picture(tmp_path / "a/000001.jpg", 1)
    truth = synthetic.sequence(indices=(1,))
    truth.frames[0].file_name = name.format(tmp_path)
    with pytest.raises(FrameError, match=r"000001\.jpg' leads out of the root .*; set data\.root"):
        ClipDataset([truth], tmp_path / "root", (64, 48), 3, DataConfig(), train=True)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("case", "labels", "images", "message"),
    [
        ("exif_180", "labels.json", "img", "its size does not tell what was labelled"),
        ("exif_180", "labels_nosize.json", "img", "its size does not tell what was labelled"),
        ("exif_180", "labels_sq.json", "img", "its size does not tell what was labelled"),
        ("wrong_folder_base_name", "labels.json", "img/walk", "is not below"),
        ("wrong_folder_base_name", "two.json", "img/walk", "is not below"),
        ("number_then_suffix", "labels.json", "img", ""),
    ],
)
def test_faults_as_filed(tmp_path, case, labels, images, message):
    root = shared_data(f"reports/{case}")
    if message:
        with pytest.raises(AnnotationError, match=message):
            convert(root / labels, tmp_path, root / images)
        return
    convert(root / labels, tmp_path, root / images)
    [sequence] = load_annotations(tmp_path / "annotations/train")
    assert (len(sequence.frames), sequence.nframes) == (4, 6)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_picture_that_is_cut_off_is_named_or_left_out(tmp_path, suffix):
    pictures(tmp_path / "pics", [f"a{suffix}", "b.jpg"])
    path = tmp_path / "pics" / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:-40])
    document = coco([path.name, "b.jpg"], people=((0, None), (1, None)))
    with pytest.raises(AnnotationError, match=rf"a\{suffix}: .*extract it again"):
        run(tmp_path, document)
    report, [sequence] = run(tmp_path, document, on_error="skip")
    assert list(report.left_out) == ["picture unreadable"]
    assert sequence.frames[0].extra["source"] == "b.jpg"


def test_a_picture_that_cannot_be_written_upright_is_named(tmp_path):
    document, _, _ = tagged(tmp_path, 6)
    Path(tmp_path / "pics/a.jpg").rename(tmp_path / "pics/a.mpo")
    document["images"][0]["file_name"] = "a.mpo"
    with pytest.raises(AnnotationError, match=r"a\.mpo: .* cannot be written upright as \.mpo;"):
        run(tmp_path, document, exif="turned")
    assert cv2.imencode(".jpg", np.zeros((4, 4, 3), np.uint8))[0]
