"""What is written of a rendered data set when it is killed, stopped, or shares its folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cmpose.files import Interrupted, InUse, OutputError, claim_file
from cmpose.render import dataset as rendered
from cmpose.render.dataset import render_dataset
from tests.render.test_dataset import SMALL, files_of
from tests.shared_data import PROJECT
from tests.zygote import KILLED, Zygote

ASK = {"videos": 2, "frames": 2, "seed": 5, **SMALL}
COMMAND = ["--videos", "2", "--frames", "2", "--seed", "5", "--size", "[144,256]"]
COMMAND += ["--split", "val", "--workers", "0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("whole")
    render_dataset(root, **ASK)
    return files_of(root)


def test_a_kill_while_a_sequence_is_replaced(
    zygote: Zygote, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    for number in range(3):  # the old folder, the new one, the annotation
        root = tmp_path / str(number)
        render_dataset(root, **ASK)
        (root / "images/val/500001_mpii_test/000001.jpg").unlink()
        assert zygote.run("render", root, *COMMAND, kill_at=number).status == KILLED
        render_dataset(root, **ASK)
        assert files_of(root) == whole


def test_what_a_user_put_among_the_frames_stays(tmp_path: Path, whole: dict[str, bytes]) -> None:
    root = tmp_path / "set"
    render_dataset(root, **ASK)
    frames = root / "images/val/500001_mpii_test"
    (frames / "000001.jpg").unlink()
    mine = {"000007.jpg": b"mine", "notes.txt": b"mine", "deep/000000.jpg": b"mine"}
    (frames / "deep").mkdir()
    for name, content in mine.items():
        (frames / name).write_bytes(content)
    render_dataset(root, **ASK)
    folder = frames.relative_to(root)
    assert files_of(root) == whole | {f"{folder}/{name}": text for name, text in mine.items()}


def test_frames_are_not_written_through_a_link(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "set", tmp_path / "mine"
    render_dataset(root, **ASK)
    frames = root / "images/val/500001_mpii_test"
    frames.rename(elsewhere)
    frames.symlink_to(elsewhere)
    (elsewhere / "000001.jpg").unlink()
    (elsewhere / "000000.jpg").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"500001_mpii_test: is a link, which is not followed"):
        render_dataset(root, **ASK)
    assert {p.name: p.read_bytes() for p in elsewhere.iterdir()} == {"000000.jpg": b"mine"}


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    root = tmp_path / "set"
    code = [sys.executable, "-m", "cmpose", "render", str(root)]
    options = ["--videos", "4", "--frames", "400", "--seed", "5", "--size", "[144,256]"]
    parent = subprocess.Popen([*code, *options], cwd=PROJECT, stderr=subprocess.PIPE)
    assert parent.stderr is not None
    deadline = time.monotonic() + 60
    while len(parts := list(root.glob("images/train/.*/000003.jpg"))) < 2:
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.stderr.read()  # ends when the workers, which hold it open too, are gone
    parent.wait()
    assert len({part.parent for part in parts}) == 2
    before = files_of(root)
    time.sleep(0.3)
    assert files_of(root) == before


def test_splits_are_rendered_at_the_same_time_and_one_split_is_not(tmp_path: Path) -> None:
    with claim_file(tmp_path / "set" / "rendered_val.json", "render", "folder"):
        train = render_dataset(tmp_path / "set", **ASK, split="train")
        assert train.rendered == 2
        with pytest.raises(InUse, match=r"rendered_val\.json: another cmpose render is writing"):
            render_dataset(tmp_path / "set", **ASK)
    assert render_dataset(tmp_path / "set", **ASK).rendered == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_to_stop_ends_it_between_sequences(
    tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    update = rendered.tqdm.update

    def ask(self: object, n: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        update(self, n)

    monkeypatch.setattr(rendered.tqdm, "update", ask)
    with pytest.raises(Interrupted, match=r"stopped after 1 of 2 val sequences; run the same"):
        render_dataset(tmp_path, **ASK, workers=workers)
    monkeypatch.undo()
    assert render_dataset(tmp_path, **ASK).kept >= 1
    assert files_of(tmp_path) == whole


def test_what_stands_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "rendered_train.json").write_text("{}")
    (tmp_path / "images").write_text("")
    with pytest.raises(OutputError, match=r"images is a file where a folder should be; move it"):
        render_dataset(tmp_path, **ASK)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file is a file where a folder should be; move it"):
        render_dataset(tmp_path / "file" / "set", **ASK)


def test_a_killed_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendered, "end_with_parent", os.abort)
    with pytest.raises(RuntimeError, match=r"set: a worker process was killed.*fewer --workers; r"):
        render_dataset(tmp_path / "set", **ASK, workers=2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_request_to_all_processes_ends_them_quietly(
    tmp_path: Path, workers: str, number: int
) -> None:
    """Also while workers start: they are asked as soon as there is more than one process."""
    code = [sys.executable, "-m", "cmpose", "render", str(tmp_path), "--videos", "40"]
    command = [*code, "--frames", "4", "--size", "[144,256]", "--workers", workers]
    process = subprocess.Popen(
        command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "rendered_train.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    os.killpg(process.pid, number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    assert "train sequences; run the same command again: complete sequences are kept" in shown


def test_a_folder_that_is_deleted_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = rendered.tqdm.update

    def delete(self: object, n: int) -> None:
        shutil.rmtree(tmp_path / "set")
        update(self, n)

    monkeypatch.setattr(rendered.tqdm, "update", delete)
    with pytest.raises(OutputError, match=r"rendered_val\.json: is not there any more; run the"):
        render_dataset(tmp_path / "set", **ASK)
    assert not (tmp_path / "set").exists()
