"""Files are whole or absent, folders have one writer, failures have names, requests stop."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmpose import files
from cmpose.files import InUse, OutputError
from tests.shared_data import PROJECT
from tests.small_disk import small_disk


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# -- whole or not at all ----------------------------------------------------------------------


def test_what_is_written_has_the_umasks_mode_whichever_library_wrote_it(tmp_path):
    """safetensors makes files that only their owner may read."""
    tensors, target, link = {"a": torch.zeros(1)}, tmp_path / "folder" / "kept", tmp_path / "link"
    target.parent.mkdir()
    target.touch(0o600)
    before = os.umask(0o027)
    try:
        with files.whole_file(tmp_path / "one") as partial:
            save_file(tensors, partial)
        with files.whole_folder(tmp_path / "folder") as partial:
            save_file(tensors, partial / "two")
        files.write_text(tmp_path / "text", "a")
        with files.whole_file(tmp_path / "copy", keep_mode=True) as partial:
            partial.touch(0o600)
        with files.whole_file(link) as partial:
            partial.symlink_to(target)
    finally:
        os.umask(before)
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()
    }
    usual, own = 0o640, 0o600
    assert modes == {
        "one": usual, "two": usual, "text": usual, "kept": own, "copy": own, "link": own,
    }  # fmt: skip
    assert sorted(path.name for path in target.parent.iterdir()) == ["kept", "two"]


_REPLACE = """
import os, sys
from pathlib import Path
from cmpose import files

file, folder, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rename, count = files.rename, 0

def killed(old, new):
    global count
    if count == limit:
        os._exit(9)
    count += 1
    rename(old, new)

files.rename = killed
files.write_text(file, "new")
with files.whole_folder(folder) as partial:
    (partial / "a").write_text("new")
    (partial / "deep").mkdir()
    (partial / "deep" / "b").write_text("new")
"""


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_kill_at_any_rename_leaves_the_old_or_the_new(tmp_path, kill_at):
    file, folder = tmp_path / "file.json", tmp_path / "folder"
    file.write_text("old")
    folder.mkdir()
    (folder / "a").write_text("old")
    done = python(_REPLACE, file, folder, kill_at)
    assert done.returncode == (9 if kill_at < 3 else 0), done.stderr
    assert file.read_text() == ("old" if kill_at == 0 else "new")
    with files.claim(tmp_path, "test", "folder"):
        assert sorted(os.listdir(tmp_path)) == [files._LOCK, "file.json", "folder"]
    assert (folder / "a").read_text() == ("new" if kill_at == 3 else "old")
    assert (folder / "deep" / "b").exists() == (kill_at == 3)


def test_what_a_user_put_into_a_folder_outlives_its_replacement(tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name in ("ours-1", "ours-2", "notes", "both", "deep/a", ".hidden"):
        (folder / name).write_text("old")
    (folder / "link").symlink_to("nowhere")
    with files.whole_folder(folder, is_ours=lambda path: path.name.startswith("ours")) as partial:
        (partial / "ours-1").write_text("new")
        (partial / "both").write_text("new")
    texts = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert texts == {"ours-1": "new", "both": "new"} | dict.fromkeys(
        ("notes", "deep/a", ".hidden"), "old"
    )
    assert os.readlink(folder / "link") == "nowhere"


def test_a_failed_block_leaves_nothing_and_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    for whole in (files.whole_file, files.whole_folder):
        path = tmp_path / whole.__name__.removeprefix("whole_")
        with pytest.raises(KeyboardInterrupt):  # noqa: SIM117, PT012
            with whole(path) as partial:
                (partial / "a" if partial.is_dir() else partial).write_text("new")
                raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path / "folder") == []


def test_only_our_own_leftovers_are_removed(tmp_path):
    for name in (".bashrc.old", ".notes.tmp", "film.part.mp4", "x.cmpose-part"):
        (tmp_path / name).write_text("a user's")
    (tmp_path / ".gone.cmpose-part").write_text("half")
    with files.claim(tmp_path, "test", "folder"):
        pass
    assert sorted(os.listdir(tmp_path)) == [
        ".bashrc.old",
        ".notes.tmp",
        "film.part.mp4",
        "x.cmpose-part",
    ]


def test_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    files.write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"
    with files.claim_file("/dev/null", "test", "file"):
        files.write_text("/dev/null", "text")
    assert Path("/dev/null").is_char_device()
    # python() reads what is written through a pipe, which has no path of its own.
    code = "from cmpose import files; files.write_text('/dev/stdout', 'text')"
    done = python(code)
    assert (done.returncode, done.stdout) == (0, "text"), done.stderr


def test_what_was_printed_before_a_file_goes_to_the_output_stays(tmp_path):
    code = (
        "from cmpose import files; print('table')\n"
        "for name in ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1'):\n"
        "    with files.claim_file(name, 'score', '--json'): files.write_text(name, 'text\\n')"
    )
    with open(tmp_path / "out.txt", "w") as file:
        subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == "table\n" + 3 * "text\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_a_place_without_a_name_is_refused():
    for path in (".", "/"):
        with (
            pytest.raises(OutputError, match=rf"^{re.escape(path)}: cannot be replaced; give a n"),
            files.claim_file(path, "score", "--json"),
        ):
            pass


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": float("inf")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.5], "b": None}


# -- one writer -------------------------------------------------------------------------------

_HOLD = """
import sys
from cmpose import files
with getattr(files, sys.argv[1])(sys.argv[2], "train", "--output"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("claim", ["claim", "claim_file"])
def test_a_second_writer_is_refused_until_the_first_ends_or_is_killed(tmp_path, claim):
    output = tmp_path / "run"
    for end in ("close", "kill"):
        with subprocess.Popen(
            [sys.executable, "-c", _HOLD, claim, str(output)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with (
                pytest.raises(
                    InUse, match=r"run: another cmpose train is writing.*give another --output"
                ),
                getattr(files, claim)(output, "train", "--output"),
            ):
                pass
            if end == "kill":
                holder.kill()
        with getattr(files, claim)(output, "train", "--output"):
            pass
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_second_writer_in_the_same_process_is_refused(tmp_path):
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    with files.claim(run, "train", "--output"):
        for name in (run, link):
            with pytest.raises(InUse), files.claim(name, "train", "--output"):
                pass
        # The refusal has not let go of the first one's lock.
        code = _HOLD.replace("sys.stdin.read()", "")
        assert "InUse" in python(code, "claim", run).stderr
    assert python(code, "claim", run).returncode == 0


_PARENT = """
import multiprocessing, sys, time

def work():
    from cmpose import files
    files.end_with_parent()
    print("works", flush=True)
    time.sleep(1)
    print("goes on", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=work).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("start", ["fork", "forkserver", "spawn"])
def test_a_worker_ends_with_its_killed_parent(tmp_path, start):
    (tmp_path / "parent.py").write_text(_PARENT)
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", start],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    ) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(2)] == [b"works\n", b"goes on\n"]
        parent.kill()
        assert parent.stdout.read() == b""  # at once: the worker, which held it open, is gone


# -- failures have names ----------------------------------------------------------------------


def test_a_full_disk_has_the_same_message_from_every_library(tmp_path):
    with small_disk(tmp_path) as disk:
        noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
        tensors = {"a": torch.from_numpy(noise)}

        writers = {
            "text": lambda p: (p / "a").write_bytes(noise.tobytes()),
            "torch": lambda p: torch.save(tensors, p / "a.pt"),
            "safetensors": lambda p: save_file(tensors, p / "a.safetensors"),
            "array": lambda p: noise.tofile(p / "a"),
        }
        for name, write in writers.items():
            with (
                pytest.raises(
                    OutputError,
                    match=r"model: cannot be written: the disk is full; free some space, then "
                    r"go on with --resume$",
                ),
                files.whole_folder(disk / "model", "go on with --resume") as partial,
            ):
                write(partial)
            assert os.listdir(disk) == [], name


def test_what_stands_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"x: .*/file is a file where a folder should be"):
        files.write_text(tmp_path / "file" / "x", "")
    with pytest.raises(OutputError, match=r"folder: .* it is a folder where a file should be"):
        files.write_text(tmp_path / "folder", "")
    with (
        pytest.raises(OutputError, match=r"file: .* it is a file where a folder should be"),
        files.claim(tmp_path / "file", "train", "--output"),
    ):
        pass
    with (
        pytest.raises(OutputError, match=r"file: .* it is a file where a folder should be"),
        files.whole_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OutputError, match=r"its folder .*/gone is not there \(any more\)"):  # noqa: SIM117
        with files.writing(tmp_path / "gone" / "log"):
            (tmp_path / "gone" / "log").open("a")
    with pytest.raises(OutputError, match=r"its folder .*/gone is not there \(any more\)"):  # noqa: SIM117
        with files.writing(tmp_path / "gone" / "a.pt"):
            torch.save({}, tmp_path / "gone" / "a.pt")


def test_a_name_that_is_too_long_is_named(tmp_path):
    message = "cannot be written: a name in it is longer than the file system takes; give a shorter"
    # The second is short enough by itself, but not while it is not whole.
    long = tmp_path / ("x" * 300)
    for path in (long, tmp_path / ("x" * 250), long / "a"):
        with pytest.raises(OutputError, match=message):
            files.write_text(path, "")
        with pytest.raises(OutputError, match=message), files.whole_folder(path):
            pass
    with pytest.raises(OutputError, match=message), files.claim(long, "train", ""):
        pass


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_place_is_named(tmp_path, number):
    with pytest.raises(OutputError, match=r"log: .* it is read-only for you; give a path") as met:  # noqa: SIM117
        with files.writing(tmp_path / "log"):
            raise OSError(number, os.strerror(number), str(tmp_path / "log"))
    assert met.value.errno == number


def test_failures_about_something_else_pass(tmp_path):
    with pytest.raises(FileNotFoundError, match="/none/input"), files.writing(tmp_path / "log"):
        Path("/none/input").read_text()
    with pytest.raises(RuntimeError, match="shapes"), files.writing(tmp_path / "log"):
        raise RuntimeError("shapes do not match")


# -- asked to stop ----------------------------------------------------------------------------

_ASK_AT_IMPORT = """
import os, signal, sys
import cmpose.__main__ as start

module, number = sys.argv[1], getattr(signal, sys.argv[2])

class AskAtImport:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, AskAtImport())
sys.argv = ["cmpose", "doctor"]
start.main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["cmpose.cli", "jsonargparse", "cmpose.doctor", "torch"])
def test_a_request_during_start_up_ends_it_quietly(module, number):
    done = python(_ASK_AT_IMPORT, module, number)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr


_ASK_AND_HANDLE = """
import os, signal, sys
import cmpose.__main__ as start
from cmpose import cli

class AskAtTheEnd:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def main():
    start.still_there = AskAtTheEnd()
    try:
        exec("import signal; signal.raise_signal(signal.SIGINT)")
    except KeyboardInterrupt:
        print("cleaned up")
        sys.exit(130)

cli.main = main
start.main()
"""


def test_the_status_of_a_request_is_130_whatever_was_interrupted():
    """Python itself ends by SIGINT if one interrupted code made of a string, handled or not."""
    done = python(_ASK_AND_HANDLE)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")


def test_a_request_sets_a_flag_and_a_second_one_acts():
    with files.stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_threads_spin_less_unless_the_user_has_said(variables, expected, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import os, cmpose.__main__ as start, cmpose.cli as cli;"
        "cli.main = lambda: print(os.environ.get('GOMP_SPINCOUNT')); start.main()"
    )
    assert python(code, **variables).stdout == f"{expected}\n"
