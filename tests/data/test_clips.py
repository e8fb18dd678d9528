"""The clip data set: contents, determinism, borders, and what is left out or refused."""

from __future__ import annotations

import dataclasses
import re

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data import cutouts
from cmpose.data.clips import ClipDataset, worker_init
from cmpose.data.cutouts import collate, sampled_window
from cmpose.data.formats.posetrack import AnnotationError, load_annotations
from cmpose.data.pictures import FrameError
from cmpose.data.transforms import Augmentation, Region, apply_matrix, clip_matrix
from cmpose.ops.warp_clips import _inverse, _source
from tests.data import synthetic
from tests.shared_data import shared_data

SIZE = (64, 48)
PLAIN = DataConfig(augment=AugmentConfig(enabled=False))
SKIP = dataclasses.replace(PLAIN, on_error="skip")
DEVICE = DataConfig(warp="device")


def make(root, sequences, num_frames=3, data=PLAIN, **options):
    options = {"train": True} | options
    return ClipDataset(sequences, root, SIZE, num_frames, data, **options)


@pytest.fixture
def data(tmp_path):
    item = synthetic.sequence()
    synthetic.write_pictures(tmp_path, item)
    return tmp_path, item


def frame_numbers(dataset, index):
    """Which frames a clip shows, by their brightness at the crop's centre."""
    clip = dataset[index]["clip"].numpy()
    return [round((int(crop[32, 24, 0]) - 20) / 10) for crop in clip]


def test_item(data):
    root, item = data
    dataset = make(root, [item])
    assert len(dataset) == 8
    sample = dataset[3]
    assert {key: (value.dtype, tuple(value.shape)) for key, value in sample.items()} == {
        "clip": (torch.uint8, (3, 64, 48, 3)),
        "keypoints": (torch.float32, (15, 2)),
        "visible": (torch.float32, (15,)),
        "matrix": (torch.float64, (2, 3)),
        "index": (torch.int64, ()),
        "valid": (torch.bool, ()),
    }
    record = dataset.records[3]
    assert (record.sequence, record.frame, record.person) == (
        item,
        item.frames[1],
        item.frames[1].people[1],
    )
    assert (record.score, record.box_source, dataset.box_source) == (
        1.0,
        "ground truth",
        "ground truth",
    )
    np.testing.assert_array_equal(record.box, [50, 30, 209, 199])
    expected = apply_matrix(sample["matrix"].numpy(), record.person.keypoints[:, :2])
    visible = record.person.keypoints[:, 2] > 0
    np.testing.assert_allclose(sample["keypoints"][visible], expected[visible], rtol=1e-6)
    np.testing.assert_array_equal(sample["visible"], visible)
    # The box, widened to 209 × 278.67 and enlarged 1.25 times, fills the crop.
    assert sample["matrix"][0, 0].item() == pytest.approx(48 / (209 * 1.25))
    assert sample["index"] == 3
    assert sample["valid"]


def test_crops_are_rgb(tmp_path):
    item = synthetic.sequence(indices=(0,), people=1)
    path = tmp_path / item.frames[0].file_name
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.full((240, 320, 3), (10, 100, 250), np.uint8))
    r, g, b = make(tmp_path, [item], 1)[0]["clip"][0, 32, 24].tolist()
    assert r > 240
    assert 90 < g < 110
    assert b < 20


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (1, [[0], [1], [2], [3]]),
        (3, [[0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 3]]),
        (5, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]),
    ],
)
@pytest.mark.parametrize("first", [0, 1])
def test_borders(tmp_path, num_frames, expected, first):
    """PoseTrack18 and 21 count from 000000, PoseTrack17 from 00000001."""
    indices = tuple(range(first, first + 4))
    item = synthetic.sequence(indices=indices, people=1, digits=8 if first else 6)
    synthetic.write_pictures(tmp_path, item)
    dataset = make(tmp_path, [item], num_frames)
    shown = [frame_numbers(dataset, index) for index in range(4)]
    assert shown == [[number + first for number in clip] for clip in expected]
    assert not dataset.notes


def test_frames_that_the_annotation_does_not_list(tmp_path):
    """As in DCPose's PoseTrack17, where only labelled frames are listed."""
    item = synthetic.sequence(indices=(3,), people=1)
    item.nframes = 6
    synthetic.write_pictures(tmp_path, item, extra=(0, 1, 2, 4, 5))
    dataset = make(tmp_path, [item], 5)
    assert frame_numbers(dataset, 0) == [1, 2, 3, 4, 5]
    assert not dataset.notes


def test_video_longer_than_the_files_on_disk(tmp_path):
    item = synthetic.sequence(indices=(0,), people=2)
    item.nframes = 140
    synthetic.write_pictures(tmp_path, item)
    dataset = make(tmp_path, [item])
    assert frame_numbers(dataset, 0) == [0, 0, 0]
    assert dataset.notes == {"support frame beyond the files on disk, a nearer one repeated": 2}
    assert "kept: 2 × support frame beyond the files on disk" in dataset.report()


def test_each_file_is_decoded_once_an_item(data, monkeypatch):
    from cmpose.data import pixels

    root, item = data
    reads = []
    real = pixels.read_frame
    monkeypatch.setattr(pixels, "read_frame", lambda path, *a: reads.append(path) or real(path, *a))
    make(root, [item], 5, dataclasses.replace(PLAIN, frame_cache_mb=0))[0]
    assert [path.rsplit("/")[-1] for path in reads] == ["000000.jpg", "000001.jpg", "000002.jpg"]


# --- randomness ----------------------------------------------------------------------------


def equal(left, right):
    return all(torch.equal(left[key], right[key]) for key in left)


def test_items_depend_on_seed_epoch_and_index_only(data):
    root, item = data
    config = DataConfig()
    dataset = make(root, [item], data=config, seed=5)
    forward = [dataset[index] for index in range(8)]
    backward = [dataset[index] for index in reversed(range(8))][::-1]
    assert all(map(equal, forward, backward))
    dataset.set_epoch(1)
    other = [dataset[index] for index in range(8)]
    assert not any(map(equal, forward, other))
    fresh = make(root, [item], data=config, seed=5)  # a resumed run
    fresh.set_epoch(1)
    assert all(equal(fresh[index], other[index]) for index in (6, 2))
    assert not equal(make(root, [item], data=config, seed=6)[0], forward[0])


def test_workers_give_the_same_items_and_see_the_epoch(data):
    root, item = data
    dataset = make(root, [item], data=DataConfig(), seed=5)
    here = {}
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        here[epoch] = [dataset[index] for index in range(8)]
    dataset.set_epoch(0)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, persistent_workers=True, worker_init_fn=worker_init
    )
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert all(map(equal, here[epoch], loader))


def test_evaluation_is_not_augmented(data):
    root, item = data
    plain = make(root, [item])
    for dataset in (
        make(root, [item], data=DataConfig(), train=False),
        make(root, [item], data=DataConfig(augment=AugmentConfig(flip=0.0)), train=False),
    ):
        assert equal(dataset[0], plain[0])


def test_plain_joints_are_those_of_the_unaugmented_items(data):
    root, item = data
    matrices, points, visible = make(root, [item], data=DataConfig()).plain_joints()
    plain = make(root, [item])
    assert matrices.shape == (8, 2, 3)
    for index in range(8):
        sample = plain[index]
        np.testing.assert_array_equal(matrices[index], sample["matrix"])
        np.testing.assert_array_equal(points[index].astype(np.float32), sample["keypoints"])
        np.testing.assert_array_equal(visible[index], sample["visible"])


def test_augmented_joints_follow_the_picture(tmp_path):
    """Soft dots at two joints, found again in flipped, turned and scaled crops."""
    item = synthetic.sequence(indices=(0,), people=1)
    who = item.frames[0].people[0]
    who.keypoints[:] = 0
    who.keypoints[6] = [110, 90, 1]
    who.keypoints[11] = [190, 150, 1]
    picture = np.zeros((synthetic.HEIGHT, synthetic.WIDTH, 3), np.uint8)
    picture[..., 2] = synthetic.dot(*who.keypoints[6, :2], 12)  # red: the right wrist
    picture[..., 1] = synthetic.dot(*who.keypoints[11, :2], 12)  # green: the left wrist
    path = (tmp_path / item.frames[0].file_name).with_suffix(".png")
    item.frames[0].file_name = item.frames[0].file_name.replace(".jpg", ".png")
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), picture)
    dataset = make(tmp_path, [item], 1, DataConfig())
    flips = checked = 0
    for epoch in range(60):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        flipped = np.linalg.det(sample["matrix"].numpy()[:, :2]) < 0
        flips += flipped
        for joint, channel in ((6, 0), (11, 1)):
            # In a mirrored picture the red wrist is a left one.
            shown = sample["clip"][0, :, :, 1 - channel if flipped else channel].double()
            x, y = sample["keypoints"][joint].tolist()
            if not (5 < x < SIZE[1] - 5 and 5 < y < SIZE[0] - 5):
                continue
            checked += 1
            ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(48.0), indexing="ij")
            centre = ((xs * shown).sum() / shown.sum(), (ys * shown).sum() / shown.sum())
            np.testing.assert_allclose([float(v) for v in centre], (x, y), atol=0.03)
    assert 15 < flips < 45
    assert checked > 60


# --- crops to be made elsewhere ------------------------------------------------------------


def test_cut_out_item(data):
    root, item = data
    dataset, host = (
        make(root, [item], data=DEVICE, seed=5),
        make(root, [item], data=DataConfig(), seed=5),
    )
    for index in range(8):
        sample, other = dataset[index], host[index]
        frames, frames_matrix = sample.pop("frames"), sample.pop("frames_matrix")
        del other["clip"]
        assert equal(other, sample)
        assert (frames.dtype, frames_matrix.dtype) == (torch.uint8, torch.float64)
        assert frames.shape[0] == 3
        # Where the cut-out begins in the picture, from the two matrices: a whole pixel.
        matrix = sample["matrix"].numpy()
        begin = np.linalg.solve(matrix[:, :2], (frames_matrix.numpy() - matrix)[:, 2])
        np.testing.assert_allclose(begin, begin.round(), rtol=0, atol=1e-9)
        assert begin[1] > -1e-9
        assert begin[1] + frames.shape[1] < synthetic.HEIGHT + 1e-9
        assert equal(make(root, [item], data=DEVICE, seed=5)[index], dataset[index])


def test_cut_outs_are_rgb_and_black_outside_the_picture(tmp_path):
    item = synthetic.sequence(indices=(0,), people=1)
    path = tmp_path / item.frames[0].file_name
    path.parent.mkdir(parents=True)
    cv2.imwrite(str(path), np.full((240, 320, 3), (10, 100, 250), np.uint8))
    item.frames[0].people[0].box = np.array([-40.0, 20, 120, 200])
    plain = dataclasses.replace(PLAIN, warp="device")
    sample = make(tmp_path, [item], 1, data=plain)[0]
    frames = sample["frames"][0].numpy().astype(int)
    moved = sample["frames_matrix"][0, 2] - sample["matrix"][0, 2]
    outside = round((moved / sample["matrix"][0, 0]).item())
    assert outside < -10  # the cut-out starts left of the picture
    assert not frames[:, :-outside].any()
    assert np.abs(frames[:, -outside:] - (250, 100, 10)).max() < 12


def test_sampled_window_holds_every_pixel_that_counts():
    """By the positions that sampling computes, in random crops; and it is not much larger."""
    rng = np.random.default_rng(0)
    for _ in range(100):
        region = Region(rng.uniform(-50, 350, 2), rng.uniform(20, 400) * np.array([0.75, 1.0]))
        augmentation = Augmentation(region, rng.uniform(-180, 180), bool(rng.random() < 0.5))
        matrix = clip_matrix(augmentation, SIZE)
        window = sampled_window(matrix, SIZE, (320, 240))
        x, y = _source(_inverse(torch.from_numpy(matrix)[None]), SIZE)
        columns, rows = (x >> 5).numpy(), (y >> 5).numpy()
        assert window.left <= columns.min()
        assert columns.max() + 1 < window.right
        assert window.right - window.left <= columns.max() + 1 - columns.min() + 4
        inside = rows[(rows >= -1) & (rows < 240)]
        if inside.size:
            assert window.top <= max(inside.min(), 0)
            assert min(inside.max() + 1, 239) < window.bottom
        assert 0 <= window.top < window.bottom <= 240


def test_a_batch_of_cut_outs_is_a_strip(data):
    root, item = data
    dataset = make(root, [item], data=DEVICE)
    samples = [dataset[index] for index in range(8)]
    assert len({tuple(s["frames"].shape) for s in samples}) > 1
    batch = collate([dict(s) for s in samples])
    strip = batch["frames"]
    assert strip.shape[0] == 3
    assert strip.shape[1] % 16 == strip.shape[2] % 16 == 0
    left = 0
    for i, sample in enumerate(samples):
        frames = sample["frames"]
        _, height, width, _ = frames.shape
        part = strip[:, :, left : left + width]
        assert torch.equal(part[:, :height], frames)
        assert not part[:, height:].any()
        at = np.array([[left, 0.0], [left + 3.25, 7.5]])
        np.testing.assert_allclose(
            apply_matrix(batch["frames_matrix"][i].numpy(), at),
            apply_matrix(sample["frames_matrix"].numpy(), at - [left, 0]),
            rtol=0,
            atol=1e-9,
        )
        for key in ("keypoints", "visible", "matrix", "index", "valid"):
            assert torch.equal(batch[key][i], sample[key])
        left += width
    assert not strip[:, :, left:].any()
    loader = DataLoader(
        dataset, batch_size=8, num_workers=1, collate_fn=collate, worker_init_fn=worker_init
    )
    assert equal(next(iter(loader)), batch)


def test_a_strip_that_would_be_too_wide(data, monkeypatch):
    root, item = data
    dataset = make(root, [item], data=DEVICE)
    monkeypatch.setattr(cutouts, "MAX_WIDTH", 300)
    message = r"a batch of 2 clips are \d+ pixels wide together, more than 300: use a smaller"
    with pytest.raises(ValueError, match=message):
        collate([dataset[0], dataset[1]])


def test_host_crops_are_collated_as_ever(data):
    root, item = data
    dataset = make(root, [item])
    batch = collate([dataset[0], dataset[3]])
    assert torch.equal(batch["clip"][1], dataset[3]["clip"])
    assert batch["index"].tolist() == [0, 3]


def test_where_crops_are_made_is_checked(data):
    root, item = data
    with pytest.raises(ValueError, match=r"data\.warp: expected auto, host or device, got 'gpu'"):
        make(root, [item], data=dataclasses.replace(PLAIN, warp="gpu"))


# --- what is left out ----------------------------------------------------------------------


def test_people_without_keypoints_and_boxes_outside_are_counted(data):
    root, item = data
    item.frames[0].people[0].keypoints[:] = 0
    item.frames[1].people[0].box = np.array([-50.0, 10, 40, 40])
    item.frames[1].people[1].box = np.array([10.0, 10, 0, 40])
    item.frames[2].labeled = False
    item.frames[3].people[0].box = np.array([1.0, 1, 20, 20])
    item.skipped["broken annotation"] = 4
    for train in (True, False):
        dataset = make(root, [item], train=train)
        assert len(dataset) == 2
        assert dataset.skipped == {
            "person without keypoints": 1,
            "box empty or outside the image": 2,
            "frame not labelled": 2,
            "box holds none of the person's joints": 1,
            "broken annotation": 4,
        }
        assert "1 × person without keypoints" in dataset.report()


def test_nothing_left(data):
    root, item = data
    for frame in item.frames:
        frame.people = frame.people[:1]
        frame.people[0].keypoints[:] = 0
    message = "no clip to train on in 1 sequences; left out: 4 × person without keypoints"
    with pytest.raises(ValueError, match=message):
        make(root, [item])
    with pytest.raises(ValueError, match="no clip to evaluate in 0 sequences; left out: nothing"):
        make(root, [], train=False)


def test_missing_key_frame(data):
    root, item = data
    missing = root / item.frames[2].file_name
    missing.unlink()
    item.source = "val/a.json"
    message = re.escape(f"{missing}: no such file, but val/a.json names it (file_name 'images")
    with pytest.raises(FrameError, match=message):
        make(root, [item], 1)
    other = missing.with_suffix(".JPG")
    other.touch()
    with pytest.raises(FrameError, match=rf"{other.name}' differs from it in upper case or"):
        make(root, [item], 1)
    other.unlink()
    dataset = make(root, [item], data=SKIP)
    assert len(dataset) == 6
    assert dataset.skipped == {"key frame missing": 2}
    assert frame_numbers(dataset, 2) == [0, 1, 1]
    assert dataset.notes == {"support frame missing, a nearer one repeated": 4}


def test_missing_folder(data):
    _, item = data
    with pytest.raises(FrameError, match="is the root nowhere right"):
        make("nowhere", [item])


@pytest.mark.parametrize("listed", [True, False])
def test_missing_support_frame(tmp_path, listed):
    """In the middle it never passes silently, listed or not; the annotated border may."""
    item = synthetic.sequence(indices=(0, 1, 2, 3) if listed else (1, 3), people=1)
    synthetic.write_pictures(tmp_path, item, extra=(0, 2))
    (tmp_path / item.frames[0].file_name).with_name("000002.jpg").unlink()
    if listed:
        item.frames[2].people = []  # no key frame itself
    message = r"000002\.jpg: no such file, but images/val/.*/000001\.jpg needs it as a neighbour"
    with pytest.raises(FrameError, match=message):
        make(tmp_path, [item])
    dataset = make(tmp_path, [item], data=SKIP)
    shown = [frame_numbers(dataset, index) for index in range(len(dataset))]
    assert shown[-2:] == [[0, 1, 1], [3, 3, 3]]
    assert dataset.notes == {"support frame missing, a nearer one repeated": 2}


def test_two_files_with_one_number(data):
    root, item = data
    synthetic.write_picture(root / "images/val/000007_mpii_test/01.jpg", 1)
    with pytest.raises(FrameError, match=r"000001\.jpg and 01\.jpg both are frame 1"):
        make(root, [item])
    with pytest.raises(ValueError, match="left out: 8 × frame number ambiguous"):
        make(root, [item], data=SKIP)


def test_unreadable_frame(data):
    root, item = data
    broken = root / item.frames[3].file_name
    broken.write_bytes(broken.read_bytes()[:-200])
    dataset = make(root, [item])
    with pytest.raises(FrameError, match=re.escape(str(broken))):
        dataset[7]
    with pytest.raises(FrameError, match=re.escape(str(broken))):
        list(DataLoader(dataset, batch_size=None, num_workers=1))

    train = make(root, [item], data=SKIP)
    with pytest.warns(UserWarning, match="clip left out: .*cut off"):
        sample = train[7]
    assert sample["index"] == 0  # the next readable one
    assert equal(sample, train[0])
    # 4 to 7 show frame 3; what a worker finds is counted here too, and once.
    assert [int(item["index"]) for item in DataLoader(train, batch_size=None, num_workers=2)] == [
        *range(4),
        *[0] * 4,
    ]
    assert train.skipped == {"frame unreadable": 4}

    evaluate = make(root, [item], data=SKIP, train=False)
    with pytest.warns(UserWarning, match="clip left out"):
        sample = evaluate[7]
    assert (sample["index"], sample["valid"]) == (7, False)
    assert not sample["clip"].any()
    assert not sample["visible"].any()
    assert evaluate.skipped == {"frame unreadable": 1}

    cut = make(root, [item], data=dataclasses.replace(SKIP, warp="device"), train=False)
    with pytest.warns(UserWarning, match="clip left out"):
        sample = cut[7]
    assert (sample["index"], sample["valid"]) == (7, False)
    assert sample["frames"].shape == cut[0]["frames"].shape[:1] + sample["frames"].shape[1:]
    assert not sample["frames"].any()
    assert len(collate([cut[0], sample])["index"]) == 2


def test_every_frame_unreadable(data):
    root, item = data
    for frame in item.frames:
        (root / frame.file_name).write_bytes(b"")
    dataset = make(root, [item], data=SKIP)
    with (
        pytest.warns(UserWarning, match="clip left out"),
        pytest.raises(FrameError, match="none of the clips has readable frames"),
    ):
        dataset[0]


def test_frame_of_another_size(data):
    """A picture that was resized after annotation would be cropped at the wrong place."""
    root, item = data
    item.source = "val/a.json"
    path = root / item.frames[1].file_name
    synthetic.write_picture(path, 1, (160, 120))
    message = re.escape(f"{path}: is 160×120 pixels, but val/a.json or")
    with pytest.raises(FrameError, match=message):
        make(root, [item])[0]
    for frame in item.frames:
        frame.width = frame.height = None
    with pytest.raises(FrameError, match="say 320×240; the boxes would not fit it"):
        make(root, [item])[0]


def test_size_from_the_header_when_the_file_does_not_say(data):
    root, item = data
    expected = make(root, [item])
    for frame in item.frames:
        frame.width = frame.height = None
    assert equal(make(root, [item])[2], expected[2])
    (root / item.frames[0].file_name).write_bytes(b"no picture")
    with pytest.raises(FrameError, match="not a readable picture"):
        make(root, [item])
    assert make(root, [item], data=SKIP).skipped == {"frame unreadable": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 2}, "num_frames: expected an odd number of frames, got 2"),
        ({"num_frames": 0}, "num_frames: expected an odd number of frames, got 0"),
        ({"seed": -1}, "seed: expected ≥ 0, got -1"),
    ],
)
def test_arguments(data, options, message):
    root, item = data
    with pytest.raises(ValueError, match=message):
        make(root, [item], **options)
    dataset = make(root, [item])
    with pytest.raises(IndexError, match="index: 8 is outside the 8 clips"):
        dataset[8]


# --- detections ----------------------------------------------------------------------------


def test_detections(data):
    root, item = data
    item.frames[1].labeled = False
    entries = [
        {"bbox": [60, 40, 100, 120], "score": 0.8, "image_id": item.frames[1].image_id},
        {"bbox": [900, 40, 100, 120], "score": 0.7, "image_id": item.frames[1].image_id},
        {"bbox": [60, 40, 100, 120], "score": 0.1, "image_id": item.frames[1].image_id},
        {"bbox": [60, 40, 100, 120], "score": 0.6, "image_id": item.frames[3].image_id},
    ]
    synthetic.write_json(root / "boxes.json", entries)
    config = dataclasses.replace(PLAIN, boxes="boxes.json")
    dataset = make(root, [item], data=config, train=False)
    assert [(record.frame.index, record.score) for record in dataset.records] == [
        (1, 0.8),
        (3, 0.6),
    ]
    assert {record.box_source for record in dataset.records} == {"boxes.json"}
    assert dataset.box_source == "boxes.json"
    assert dataset.records[0].person is None
    assert dataset.skipped == {"score below 0.2": 1, "box empty or outside the image": 1}
    assert not dataset[0]["visible"].any()
    assert frame_numbers(dataset, 0) == [0, 1, 2]
    assert make(root, [item], data=config).box_source == "ground truth"  # training
    synthetic.write_json(root / "boxes.json", [entries[0] | {"image_id": 3}])
    with pytest.raises(AnnotationError, match="none of the 1 detections"):
        make(root, [item], data=config, train=False)


@pytest.mark.shared_data
def test_real_sample():
    root = shared_data("posetrack18")
    sequences = load_annotations("annotations/val", root)
    dataset = ClipDataset(sequences, root, (128, 96), 3, PLAIN, train=True)
    assert len(dataset) == 14
    assert not dataset.skipped
    assert dataset.notes == {"support frame beyond the files on disk, a nearer one repeated": 14}
    for index, record in enumerate(dataset.records):
        sample = dataset[index]
        assert torch.equal(sample["clip"][0], sample["clip"][1])
        # The 1.25× crop of PoseTrack18's 1.3× box holds every annotated joint.
        assert record.person is not None
        assert int(sample["visible"].sum()) == record.person.num_visible
    config = dataclasses.replace(PLAIN, boxes="annotations/val_detections.json")
    detected = ClipDataset(sequences, root, (128, 96), 3, config, train=False)
    assert len(detected) == 186
    assert detected.box_source == "val_detections.json"
    assert detected.skipped == {"score below 0.2": 92}
    assert detected[185]["clip"].any()
