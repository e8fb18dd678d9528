"""The cache of tiles: the same crops as from the frames; nothing stale, half or damaged is read."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data.cache import build as cache_build
from cmpose.data.cache import store as cache
from cmpose.data.cache import writer as cache_writer
from cmpose.data.cache.build import build, source_of
from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.store import CacheError
from cmpose.data.cache.tiles import shrink_factor
from cmpose.data.clips import ClipDataset, worker_init
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import FrameError
from cmpose.files import Interrupted, InUse, OutputError, claim
from cmpose.ops import warp_clips
from tests.data import synthetic
from tests.shared_data import needs_opencv_4, shared_data

SIZE = (64, 48)
DATA = DataConfig()


def make(root, sequences, data=DATA, num_frames=3, size=SIZE, **options):
    return ClipDataset(sequences, root, size, num_frames, data, **{"train": True} | options)


def cached(root, sequences, folder, data=DATA, **options):
    """The clips with a cache that is made here."""
    plain = make(root, sequences, data, **options)
    build(plain, Path(folder) / ("train" if plain.train else "val"), progress=False)
    return make(root, sequences, dataclasses.replace(data, cache=str(folder)), **options)


@pytest.fixture
def data(tmp_path):
    """8 clips of 4 frames with noise, so that no two pixels are alike."""
    item = synthetic.sequence()
    rng = np.random.default_rng(0)
    for frame in item.frames:
        path = tmp_path / "data" / frame.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 256, (synthetic.HEIGHT, synthetic.WIDTH, 3)).astype(np.uint8)
        assert cv2.imwrite(str(path), noise)
        for number, who in enumerate(frame.people):
            who.box = np.array([60.0 + 90 * number + frame.index, 60, 50, 70])
    return tmp_path / "data", [item]


def worst(plain, other, epochs=3):
    """Largest difference of pixels, and its root mean square; all else must be equal."""
    most, squares, count = 0, 0.0, 0
    for epoch in range(epochs):
        for index in range(len(plain)):
            a, b = plain[epoch, index], other[epoch, index]
            assert a.keys() == b.keys()
            for key in a.keys() - {"clip", "frames"}:
                assert torch.equal(a[key], b[key]), key
            for key in a.keys() & {"clip", "frames"}:
                off = (a[key].int() - b[key].int()).abs()
                most = max(most, int(off.max()))
                squares += float((off.double() ** 2).sum())
                count += off.numel()
    return most, (squares / count) ** 0.5


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


# --- the same crops ------------------------------------------------------------------------


@pytest.mark.parametrize("warp", ["host", "device"])
@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(sampling="dcpose")])
def test_raw_tiles_give_the_crops_of_the_frames(rendered, tmp_path, warp, augment):
    data = DataConfig(warp=warp, augment=augment)
    sequences = load_annotations("annotations/train", rendered)
    plain = make(rendered, sequences, data)
    other = cached(rendered, sequences, tmp_path, data)
    assert other.pixels == plain.pixels == "frames"
    most, _ = worst(plain, other, epochs=2)
    assert most <= (1 if warp == "host" else 0)


@pytest.mark.shared_data
@pytest.mark.parametrize("warp", ["host", "device"])
def test_raw_tiles_of_real_frames(tmp_path, warp):
    root = shared_data("posetrack18")
    sequences = load_annotations("annotations/val", root)
    data = DataConfig(warp=warp)
    plain = make(root, sequences, data, size=(256, 192))
    other = cached(root, sequences, tmp_path, data, size=(256, 192))
    most, _ = worst(plain, other, epochs=1)
    assert most <= (1 if warp == "host" else 0)


def test_clips_at_the_borders_and_evaluation(data, tmp_path):
    root, sequences = data
    sequences[0].frames[0].people[0].box = np.array([-20.0, -10, 60, 90])
    sequences[0].frames[3].people[1].box = np.array([280.0, 200, 90, 90])
    for train in (True, False):
        for warp in ("host", "device"):
            config = DataConfig(warp=warp)
            folder = tmp_path / warp
            plain = make(root, sequences, config, train=train)
            most, _ = worst(plain, cached(root, sequences, folder, config, train=train))
            assert most <= 1


def test_jpeg_tiles_are_near(rendered, tmp_path):
    """How near, ``python -m bench.input`` measures; here that nothing is shifted or swapped."""
    sequences = load_annotations("annotations/train", rendered)
    plain = make(rendered, sequences)
    rms = {}
    for quality in (60, 95):
        config = dataclasses.replace(DATA, cache_format="jpeg", cache_quality=quality)
        other = cached(rendered, sequences, tmp_path / str(quality), config)
        rms[quality] = worst(plain, other)[1]
        assert other.pixels == f"frames as JPEG of quality {quality}"
    assert 0 < rms[95] < 2.5
    assert rms[95] < rms[60] < 8


@pytest.mark.parametrize("warp", ["host", "device"])
def test_shrunk_tiles_give_the_crops_of_shrunk_frames(rendered, tmp_path, warp):
    """Against frames that are shrunk whole, and matrices put together in another way."""
    if warp == "device":
        needs_opencv_4()
    sequences = load_annotations("annotations/train", rendered)
    config = DataConfig(warp=warp, cache_detail=0.8)
    other = cached(rendered, sequences, tmp_path, config)
    assert other.pixels == "frames shrunk to data.cache_detail=0.8"
    factors = set()
    for index, record in enumerate(other.records):
        factor = shrink_factor(record, SIZE, config)
        factors.add(factor)
        sample = other[index]
        if warp == "host":
            shown = sample["clip"].double()
        else:
            batch = collate([sample])
            shown = warp_clips(
                batch["frames"][None], batch["frames_matrix"], SIZE, mean=(0.0,) * 3,
                std=(1 / 255,) * 3,
            )[0].movedim(1, -1)  # fmt: skip
        grow = np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])
        matrix = sample["matrix"].numpy() @ grow
        for file, crop in zip(record.files, shown, strict=True):
            picture = cv2.imread(file)
            height, width = (-(-side // factor) for side in picture.shape[:2])
            missing = (height * factor - picture.shape[0], width * factor - picture.shape[1])
            picture = np.pad(picture, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
            blocks = picture.reshape(height, factor, width, factor, 3).astype(float).mean((1, 3))
            expected = cv2.warpAffine(np.rint(blocks).astype(np.uint8), matrix, SIZE[::-1])
            off = np.abs(crop.numpy() - expected[..., ::-1])
            assert off.max() <= 1.5, (index, factor)
    assert {2, 3} <= factors


def test_shrinking_moves_nothing(data, tmp_path):
    """On a picture that rises evenly, means of blocks say what pixels say."""
    root, sequences = data
    ys, xs = np.mgrid[: synthetic.HEIGHT, : synthetic.WIDTH]
    ramp = np.stack([xs * 0.7, ys * 0.9, 255 - xs * 0.4 - ys * 0.4], -1)
    for frame in sequences[0].frames:
        frame.file_name = frame.file_name.replace(".jpg", ".png")
        cv2.imwrite(str(root / frame.file_name), np.rint(ramp).astype(np.uint8))
        for who in frame.people:  # far from the borders: outside is black
            who.box = np.array([120.0, 80, 60, 80])
    whole = DataConfig(augment=AugmentConfig(half_body=0.0))
    plain = make(root, sequences, whole)
    for detail, factor in ((0.7, 2), (0.5, 3)):
        config = dataclasses.replace(whole, cache_detail=detail)
        other = cached(root, sequences, tmp_path / str(detail), config)
        assert {row[1] for row in other.cache.plan.tiles} == {factor}
        most, rms = worst(plain, other)
        assert most <= 2
        assert rms < 0.7


def test_people_of_the_crops_size_are_not_shrunk(data, tmp_path):
    root, sequences = data
    config = dataclasses.replace(DATA, cache_detail=0.9)
    other = cached(root, sequences, tmp_path, config)
    assert worst(make(root, sequences), other)[0] <= 1


def test_workers_and_pickles_read_the_same(data, tmp_path):
    root, sequences = data
    config = dataclasses.replace(DATA, warp="device")
    other = cached(root, sequences, tmp_path, config)
    here = [other[i] for i in range(len(other))]
    copy = pickle.loads(pickle.dumps(other))
    loader = DataLoader(other, batch_size=None, num_workers=2, worker_init_fn=worker_init)
    for index, item in enumerate(loader):
        for left in (item, copy[index]):
            assert all(torch.equal(left[key], here[index][key]) for key in left)


def test_each_frame_is_decoded_once(data, tmp_path, monkeypatch):
    root, sequences = data
    reads = []
    real = cache_build.read_frame
    monkeypatch.setattr(
        cache_build, "read_frame", lambda p, *a: reads.append(Path(p).name) or real(p, *a)
    )
    other = cached(root, sequences, tmp_path)
    assert reads == ["000000.jpg", "000001.jpg", "000002.jpg", "000003.jpg"]
    shutil.move(root / "images", root / "elsewhere")  # and none is read for crops
    other[0]


def test_tiles_are_few_and_no_larger_than_the_frames(rendered, tmp_path):
    sequences = load_annotations("annotations/train", rendered)
    other = cached(rendered, sequences, tmp_path)
    tiles, frames = other.cache.plan.tiles, other.cache.plan.files
    assert len(tiles) < 3 * len(other)
    size = (tmp_path / "train" / "tiles.bin").stat().st_size
    assert size <= len(frames) * 144 * 256 * 3


def test_a_crop_beyond_the_margin_is_an_error_never_black(data, tmp_path):
    root, sequences = data
    other = cached(root, sequences, tmp_path, DataConfig(augment=AugmentConfig(enabled=False)))
    other[0]
    other.data = dataclasses.replace(other.data, augment=AugmentConfig())
    with pytest.raises(CacheError, match=r"no tile of images/.* holds the pixels .* sampled from"):
        worst(other, other)


def test_reports_say_where_pixels_come_from(data, tmp_path):
    root, sequences = data
    other = cached(root, sequences, tmp_path)
    assert f"pixels: {tmp_path / 'train'}" in other.report()
    assert "pixels" not in make(root, sequences).report()
    # Evaluation without a store of its own reads the frames.
    held_out = make(root, sequences, other.data, train=False)
    assert "pixels: frames" in held_out.report()
    assert worst(make(root, sequences, train=False), held_out)[0] == 0


# --- interrupted and continued -------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_after(monkeypatch, frames):
    """Builds stop when they come to read another frame than the first ``frames`` of theirs."""
    real, reads = cache_build.read_frame, []

    def read(path, *size):
        if len(reads) == frames:
            raise Stopped
        reads.append(Path(path).name)
        return real(path, *size)

    monkeypatch.setattr(cache_build, "read_frame", read)
    return reads


@pytest.mark.parametrize("fields", [{}, {"cache_format": "jpeg", "cache_detail": 0.5}])
def test_an_interrupted_run_goes_on(data, tmp_path, monkeypatch, fields):
    root, sequences = data
    config = dataclasses.replace(DATA, **fields)
    plain = make(root, sequences, config)
    whole = build(plain, tmp_path / "whole" / "train", progress=False)
    folder = tmp_path / "cut" / "train"
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            build(plain, folder, progress=False)
    cut = dataclasses.replace(config, cache=str(tmp_path / "cut"))
    with pytest.raises(CacheError, match=r"is unfinished: run the same cmpose cache command again"):
        make(root, sequences, cut)
    with monkeypatch.context() as patch:
        reads = stop_after(patch, 99)
        rest = build(plain, folder, progress=False)
    assert reads == ["000002.jpg", "000003.jpg"]
    assert 0 < rest.written < rest.tiles == whole.tiles == whole.written
    assert "tiles were there" in str(rest)
    assert files_of(folder) == files_of(tmp_path / "whole" / "train")
    again = build(plain, folder, progress=False)
    assert (again.written, again.tiles, again.bytes) == (0, whole.tiles, whole.bytes)


def test_whatever_was_not_yet_written_when_the_power_went(data, tmp_path, monkeypatch):
    """Tiles and index cut off anywhere, and rubbish behind: never read, made again."""
    root, sequences = data
    plain = make(root, sequences)
    folder = tmp_path / "train"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            build(plain, folder, progress=False)
    before = files_of(folder)
    build(plain, folder, progress=False)
    expected = files_of(folder)
    rng = np.random.default_rng(0)
    for trial in range(12):
        for name, content in before.items():
            (folder / name).write_bytes(content)
        (folder / "complete.json").unlink()
        name = ("tiles.bin", "index.bin")[trial % 2]
        length = int(rng.integers(0, len(before[name])))
        rubbish = rng.integers(0, 256, int(rng.integers(0, 200)), dtype=np.uint8).tobytes()
        (folder / name).write_bytes(before[name][:length] + rubbish)
        build(plain, folder, progress=False)
        assert files_of(folder) == expected, (trial, name, length)


def test_workers_write_the_same_store(data, tmp_path):
    root, sequences = data
    plain = make(root, sequences)
    for workers in (0, 2):
        build(plain, tmp_path / str(workers), workers=workers, progress=False)
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_two_runs_do_not_write_at_once(data, tmp_path):
    root, sequences = data
    with (
        claim(tmp_path / "train", "cache", "data.cache"),
        pytest.raises(InUse, match=r"train: another cmpose cache is writing there; wait"),
    ):
        build(make(root, sequences), tmp_path / "train", progress=False)


def test_a_run_that_is_asked_to_stop_keeps_what_it_has_and_goes_on(data, tmp_path, monkeypatch):
    root, sequences = data
    plain = make(root, sequences)
    whole = build(plain, tmp_path / "whole", progress=False)
    real, reads = cache_build.read_frame, []

    def read(path, *size):
        reads.append(Path(path).name)
        if len(reads) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(path, *size)

    with monkeypatch.context() as patch:
        patch.setattr(cache_build, "read_frame", read)
        message = r"stopped; run the same command again: it goes on from the (\d+) of (\d+) tiles"
        with pytest.raises(Interrupted, match=message) as caught:
            build(plain, tmp_path / "cut", progress=False)
    assert len(reads) == 2
    present, total = map(int, re.search(message, str(caught.value)).groups())
    assert 0 < present < total == whole.tiles
    assert build(plain, tmp_path / "cut", progress=False).written == total - present
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["tiles.bin", "index.bin", "complete.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_no_cache_are_kept(data, tmp_path, name, overwrite):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / name).write_text("somebody's")
    message = rf"{name}: would be replaced, but no plan\.json beside it says.*: move it"
    with pytest.raises(CacheError, match=message):
        build(make(*data), tmp_path / "train", overwrite=overwrite, progress=False)
    assert (tmp_path / "train" / name).read_text() == "somebody's"


def test_what_stands_in_the_way_is_named(data, tmp_path):
    root, sequences = data
    plain = make(root, sequences)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/train: cannot be written: .*file is a file where"):
        build(plain, tmp_path / "file" / "train", progress=False)
    (tmp_path / "train" / "tiles.bin").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"train: cannot be written: .*where a file should be"):
        build(plain, tmp_path / "train", progress=False)


# --- a full disk ---------------------------------------------------------------------------


def test_a_disk_that_fills_up(data, tmp_path, monkeypatch):
    root, sequences = data
    plain = make(root, sequences)
    whole = build(plain, tmp_path / "whole", progress=False)
    left = [int(0.6 * whole.bytes)]

    def write_all(file, content):
        file.write(content[: left[0]])  # as much as there is room for
        if len(content) > left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(content)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_write_all", write_all)
        message = (
            r"tiles\.bin: cannot be written: the disk is full; free some space, then run the same "
            r"command again: it goes on from the (\d+) of (\d+) tiles \(.* MB\) that are written"
        )
        with pytest.raises(OutputError, match=message) as caught:
            build(plain, tmp_path / "cut", progress=False)
    present, total = map(int, re.search(message, str(caught.value)).groups())
    assert 0 < present < total == whole.tiles
    rest = build(plain, tmp_path / "cut", progress=False)
    assert rest.written == total - present
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_tiles_that_did_not_reach_the_disk_are_not_kept(data, tmp_path, monkeypatch):
    """Some file systems tell of a full disk only when they are asked to sync."""
    root, sequences = data
    plain = make(root, sequences)
    build(plain, tmp_path / "whole", progress=False)
    real, synced = os.fsync, []

    def fsync(descriptor):
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name == "tiles.bin":
            synced.append(descriptor)
            if len(synced) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "_COMMIT_SECONDS", 0.0)
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OutputError, match=r"the disk is full; .* the (\d+) of \d+ tiles"):
            build(plain, tmp_path / "cut", progress=False)
    assert len(synced) == 3  # it is not asked again: the second answer would be a lie
    rows = np.frombuffer((tmp_path / "cut" / "index.bin").read_bytes(), cache.ROW)
    _, _, (frame, *_) = (cache.read_plan(tmp_path / "cut")[0].tiles[i] for i in (0, 1, 2))
    assert 0 < cache.whole_rows(rows) <= 2 * (frame + 1)
    build(plain, tmp_path / "cut", progress=False)
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_what_cannot_fit_is_not_begun(data, tmp_path, monkeypatch):
    root, sequences = data
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    message = r"GB are needed there and 0\.00 GB are free: give another data\.cache, or .*jpeg"
    with pytest.raises(OutputError, match=message):
        build(make(root, sequences), tmp_path / "train", progress=False)
    jpeg = dataclasses.replace(DATA, cache_format="jpeg")  # its size is not known before
    build(make(root, sequences, jpeg), tmp_path / "jpeg", progress=False)


# --- stale ---------------------------------------------------------------------------------


STALE = [
    ({"size": (96, 48)}, {}, r"model\.image_size was \[64, 48\], is \[96, 48\]"),
    ({"num_frames": 5}, {}, r"model\.num_frames was 3, is 5"),
    ({}, {"box_enlarge": 1.1}, r"data\.box_enlarge was 1\.25, is 1\.1"),
    ({}, {"augment": AugmentConfig(scale=0.1)}, r"largest scale of data\.augment was 1\.35, is 1"),
    ({}, {"augment": AugmentConfig(rotation=50)}, r"largest rotation .* was 45\.0, is 50"),
    ({}, {"augment": AugmentConfig(half_body=0)}, r"half bodies of more joints than was 8, is No"),
    ({}, {"cache_format": "jpeg"}, r"data\.cache_format was raw, is jpeg"),
    ({}, {"cache_detail": 1.5}, r"data\.cache_detail was 0\.0, is 1\.5"),
]


@pytest.mark.parametrize(("options", "fields", "message"), STALE)
def test_other_settings_make_it_stale(data, tmp_path, options, fields, message):
    root, sequences = data
    config = cached(root, sequences, tmp_path).data
    changed = dataclasses.replace(config, **fields)
    message = rf"the cache is stale: .*{message}.*cmpose cache --overwrite"
    with pytest.raises(CacheError, match=message):
        make(root, sequences, changed, **options)
    # Nor does another run go on with it, unless it is told to throw it away.
    plain = make(root, sequences, dataclasses.replace(changed, cache=""), **options)
    with pytest.raises(CacheError, match=message):
        build(plain, tmp_path / "train", progress=False)
    build(plain, tmp_path / "train", overwrite=True, progress=False)
    make(root, sequences, changed, **options)[0]


def test_settings_that_decide_nothing_do_not(data, tmp_path):
    root, sequences = data
    config = cached(root, sequences, tmp_path).data
    free = dataclasses.replace(
        config, udp=True, warp="device", augment=AugmentConfig(flip=0.1), cache_quality=50
    )
    make(root, sequences, free)[0]


def move_box(item):
    item.frames[1].people[0].box += 1


def move_joint(item):
    item.frames[1].people[0].keypoints[0, 0] += 1


def drop_person(item):
    del item.frames[2].people[1]


@pytest.mark.parametrize("change", [move_box, move_joint, drop_person])
def test_other_annotations_make_it_stale(data, tmp_path, change):
    root, sequences = data
    config = cached(root, sequences, tmp_path).data
    change(sequences[0])
    with pytest.raises(CacheError, match=r"stale: the annotations' people, boxes or frames have"):
        make(root, sequences, config)


def test_changed_frames_make_it_stale(data, tmp_path):
    root, sequences = data
    config = cached(root, sequences, tmp_path / "cache").data
    shutil.copytree(root, tmp_path / "moved")  # keeps times
    make(tmp_path / "moved", sequences, config)[0]
    synthetic.write_picture(root / sequences[0].frames[2].file_name, 9)
    message = r"stale: 1 frames have another size or time .* first is .*000002\.jpg\. Run cmpose"
    with pytest.raises(CacheError, match=message):
        make(root, sequences, config)
    plain = make(root, sequences)
    with pytest.raises(CacheError, match=message):
        build(plain, tmp_path / "cache" / "train", progress=False)


def test_frames_that_change_while_a_run_is_interrupted(data, tmp_path, monkeypatch):
    root, sequences = data
    plain = make(root, sequences)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped):
            build(plain, tmp_path / "train", progress=False)
    os.utime(root / sequences[0].frames[3].file_name)  # not in it yet
    synthetic.write_picture(root / sequences[0].frames[0].file_name, 9)
    with pytest.raises(CacheError, match=r"1 frames have another size .*000000\.jpg"):
        build(plain, tmp_path / "train", progress=False)


def test_names_of_frames():
    assert cache.relative_name("/d/images/a.jpg", Path("/d")) == "images/a.jpg"
    assert cache.relative_name("images/a.jpg", Path(".")) == "images/a.jpg"
    assert cache.relative_name("/e/a.jpg", Path("/d")) == "/e/a.jpg"


def test_no_cache_there(data, tmp_path):
    root, sequences = data
    with pytest.raises(CacheError, match=r"train: no cache there; make it: cmpose cache"):
        make(root, sequences, dataclasses.replace(DATA, cache=str(tmp_path)))


# --- damaged -------------------------------------------------------------------------------


def test_a_corrupted_byte_is_found(data, tmp_path):
    root, sequences = data
    other = cached(root, sequences, tmp_path)
    store = TileCache(tmp_path / "train", source_of(other))
    assert not any(store.verify())
    path = tmp_path / "train" / "tiles.bin"
    content = bytearray(path.read_bytes())
    position = int(store.rows["offset"][2]) + 1234
    content[position] ^= 4
    path.write_bytes(content)
    checked = list(TileCache(tmp_path / "train", source_of(other)).verify())
    assert [i for i, text in enumerate(checked) if text] == [2]
    assert re.search(
        r"tile 2 \(images/.*\.jpg; bytes \d+ to \d+ of tiles\.bin\) does not", checked[2]
    )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (
            "plan.json",
            lambda b: b[:-1],
            r"plan\.json: not valid JSON .*; the cache is damaged: ",
        ),
        ("plan.json", lambda b: b.replace(b"000001.jpg", b"000000.jpg"), r"index\.bin: damaged"),
        ("plan.json", lambda b: b.replace(b'"version": 1', b'"version": 9'), r"of layout 9, .* 1:"),
        ("index.bin", lambda b: b[:9] + bytes([b[9] ^ 1]) + b[10:], r"index\.bin: damaged"),
        ("tiles.bin", lambda b: b[:-1], r"tiles\.bin: damaged \(\d+ bytes, there were \d+\)"),
        (
            "complete.json",
            lambda b: b[:5],
            r"complete\.json: not valid JSON .*; the cache is damaged: ",
        ),
    ],
)
def test_damaged_files_are_not_read(data, tmp_path, name, damage, message):
    root, sequences = data
    config = cached(root, sequences, tmp_path).data
    path = tmp_path / "train" / name
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(CacheError, match=message + r".*cmpose cache --overwrite"):
        make(root, sequences, config)


def test_a_jpeg_tile_that_does_not_decode(data, tmp_path):
    root, sequences = data
    jpeg = dataclasses.replace(DATA, cache_format="jpeg")
    other = cached(root, sequences, tmp_path, jpeg)
    path = tmp_path / "train" / "tiles.bin"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(CacheError, match=r"tiles\.bin: damaged \(tile \d+ does not decode\)"):
        make(root, sequences, other.data)[0]


# --- unreadable frames, wrong arguments ----------------------------------------------------


def test_a_frame_of_another_size_is_named_with_its_annotation_file(data, tmp_path):
    root, sequences = data
    path = root / sequences[0].frames[3].file_name
    cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint8))
    named = re.escape(sequences[0].source)
    message = rf"000003\.jpg: is 30×20 pixels, but {named} or the sequence's other frames say"
    with pytest.raises(FrameError, match=message):
        build(make(root, sequences), tmp_path / "train", progress=False)


def test_an_unreadable_frame_stops_or_is_left_out(data, tmp_path):
    root, sequences = data
    path = root / sequences[0].frames[3].file_name
    path.write_bytes(path.read_bytes()[:20000])
    plain = make(root, sequences)
    for workers in (0, 1):
        message = r"^\S*000003\.jpg: the JPEG is cut off .*data\.on_error=skip leaves such frames"
        with pytest.raises(FrameError, match=message):
            build(plain, tmp_path / "train", workers=workers, progress=False)
    skip = dataclasses.replace(DATA, on_error="skip")
    summary = build(make(root, sequences, skip), tmp_path / "train", progress=False)
    assert summary.unreadable == 1
    assert "1 frames unreadable" in str(summary)
    without = make(root, sequences, skip)
    other = make(root, sequences, dataclasses.replace(skip, cache=str(tmp_path)))
    with pytest.warns(UserWarning, match="clip left out"):
        assert worst(without, other, epochs=1)[0] <= 1
    assert other.skipped == without.skipped
    assert other.skipped["frame unreadable"] > 0
    strict = make(root, sequences, dataclasses.replace(DATA, cache=str(tmp_path)))
    with pytest.raises(FrameError, match=r"000003\.jpg: could not be read when the cache was made"):
        strict[-1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_quality": 0}, r"data\.cache_quality: expected 1 to 100, got 0"),
        ({"cache_detail": -1.0}, r"data\.cache_detail: expected a number from 0 on, got -1"),
        ({"cache_detail": float("nan")}, r"data\.cache_detail: expected a number from 0 on, got n"),
    ],
)
def test_arguments(data, tmp_path, fields, message):
    root, sequences = data
    with pytest.raises(ValueError, match=message):
        build(make(root, sequences, dataclasses.replace(DATA, **fields)), tmp_path / "train")
