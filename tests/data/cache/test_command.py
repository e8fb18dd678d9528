"""``cmpose cache`` as it is run, killed and continued, and training from what it leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cmpose.cli import main
from cmpose.data.cache import store
from cmpose.train.train import train
from tests.recipes import command, one_thread, recipe, write_recipe
from tests.shared_data import PROJECT


def run(tmp_path, config, *arguments):
    main(["cache", "--config", str(write_recipe(tmp_path / "r.yaml", config)), *arguments])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_make_verify_and_make_anew(rendered, tmp_path, capsys):
    config = recipe(rendered, **{"data.cache": str(tmp_path / "cache"), "data.num_workers": 1})
    run(tmp_path, config, "--split", "both")
    out = capsys.readouterr()
    for split in ("train", "val"):
        assert f"{tmp_path / 'cache' / split}: " in out.out
    assert out.out.count(" MB; ") == out.out.count(" s\n") == 2
    assert out.err == ""  # a bar is for a terminal
    run(tmp_path, config, "--split", "both", "--verify")
    assert capsys.readouterr().out.count("tiles match their checksums, and the frames\n") == 2
    run(tmp_path, config)  # nothing left to do
    assert "; 0 written in" in capsys.readouterr().out

    tiles = tmp_path / "cache" / "train" / "tiles.bin"
    content = bytearray(tiles.read_bytes())
    content[len(content) // 2] ^= 1
    tiles.write_bytes(content)
    message = r"cmpose cache: .*: 1 of \d+ tiles are damaged: tile \d+ \(images.* --overwrite"
    with pytest.raises(SystemExit, match=message):
        run(tmp_path, config, "--verify")
    run(tmp_path, config, "--overwrite")
    run(tmp_path, config, "--verify")


@pytest.mark.parametrize("format", ["raw", "jpeg"])
def test_a_picture_that_was_replaced_with_its_time_kept_is_told_by_verify(
    rendered, tmp_path, format
):
    """Its size is the same too: the copy is padded behind the picture's end."""
    root = tmp_path / "data"
    shutil.copytree(rendered, root)
    options = {"data.cache": str(tmp_path / "cache"), "data.cache_format": format}
    config = recipe(root, **options)
    run(tmp_path, config)
    run(tmp_path, config, "--verify")
    first, *_, last = sorted(root.glob("images/train/*/*.jpg"), key=lambda p: -p.stat().st_size)
    before = first.stat()
    content = last.read_bytes()
    first.write_bytes(content + bytes(before.st_size - len(content)))
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    message = r"stale: 1 frames are other pictures .* sizes and times are the same; the first is .*"
    with pytest.raises(SystemExit, match=message + first.name):
        run(tmp_path, config, "--verify")


def test_without_a_folder(rendered, tmp_path):
    with pytest.raises(SystemExit, match=r"data\.cache: name the folder of the cache"):
        run(tmp_path, recipe(rendered))


def test_an_unfinished_cache_is_not_verified(rendered, tmp_path):
    config = recipe(rendered, **{"data.cache": str(tmp_path / "cache")})
    run(tmp_path, config)
    (tmp_path / "cache" / "train" / "complete.json").unlink()
    with pytest.raises(SystemExit, match="unfinished: run the same cmpose cache command again"):
        run(tmp_path, config, "--verify")


SLOWLY = """
import sys, time
from cmpose.cli import main
from cmpose.data.cache import build as cache_build, writer
real = cache_build.read_frame
cache_build.read_frame = lambda *frame: (time.sleep(0.1), real(*frame))[1]
writer._COMMIT_SECONDS = 0.0
main(sys.argv[1:])
"""


def test_killed_and_continued(rendered, tmp_path):
    """SIGKILL in mid-run; the next run goes on, and leaves what one run would have left."""
    config = recipe(rendered, **{"data.cache": str(tmp_path / "whole")})
    run(tmp_path, config)
    config = recipe(rendered, **{"data.cache": str(tmp_path / "cut")})
    arguments = ["cache", "--config", str(write_recipe(tmp_path / "c.yaml", config))]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *arguments],
        cwd=PROJECT,
        env=one_thread(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "cut" / "train"

    def written() -> int:
        if not (folder / store.INDEX).exists():
            return 0
        content = (folder / store.INDEX).read_bytes()
        whole = len(content) // store.ROW.itemsize * store.ROW.itemsize
        return store.whole_rows(np.frombuffer(content[:whole], store.ROW)) if whole else 0

    deadline = time.monotonic() + 60
    while written() < 2:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    present = written()
    assert not (folder / store.COMPLETE).exists()
    training = recipe(rendered, **{"data.cache": str(tmp_path / "cut")})
    with pytest.raises(store.CacheError, match="unfinished"):
        train(training, tmp_path / "run", progress=False)

    done = subprocess.run(
        command(*arguments),
        cwd=PROJECT,
        env=one_thread(),
        capture_output=True,
        text=True,
        check=True,
    )
    total = len(json.loads((folder / store.PLAN).read_text())["tiles"])
    assert 2 <= present < total
    assert f", {present} tiles were there; {total - present} written in" in done.stdout
    assert contents(folder) == contents(tmp_path / "whole" / "train")


def test_a_file_that_may_not_grow(rendered, tmp_path):
    """A write that the system refuses half-way, by a limit on the size of files."""
    config = recipe(rendered, **{"data.cache": str(tmp_path / "cache")})
    arguments = ["cache", "--config", str(write_recipe(tmp_path / "r.yaml", config))]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 300 && exec "$@"', "bash", *command(*arguments)],
        cwd=PROJECT,
        env=one_thread(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cmpose cache: ")
    assert "tiles.bin: cannot be written: File too large; " in last
    assert "then run the same command again: it goes on from the " in last
    assert " the 0 of " not in last
    main(arguments)
    main([*arguments, "--verify"])


def losses(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(("warp", "workers"), [("host", 0), ("device", 2)])
def test_training_from_a_cache_is_the_same(rendered, tmp_path, warp, workers):
    """Raw tiles hold the frames' own pixels, so losses agree but for rounding of crops."""
    fields = {"data.warp": warp, "data.num_workers": workers}
    train(recipe(rendered, **fields), tmp_path / "frames", progress=False)
    fields["data.cache"] = str(tmp_path / "cache")
    config = recipe(rendered, **fields)
    run(tmp_path, config)
    metrics = train(config, tmp_path / "cached", progress=False)
    first, second = losses(tmp_path / "frames"), losses(tmp_path / "cached")
    assert len(first) == len(second) > 3
    assert second == pytest.approx(first, rel=1e-4)
    assert metrics["clips"] > 0  # evaluated on frames: there is no store of the val split


def test_resuming_with_other_pixels_is_refused(rendered, tmp_path):
    """From frames to a raw cache and back changes nothing; a lossy cache does."""
    config = recipe(rendered, **{"train.epochs": 1})
    train(config, tmp_path / "run", progress=False)
    raw = recipe(rendered, **{"train.epochs": 1, "data.cache": str(tmp_path / "raw")})
    run(tmp_path, raw)
    train(raw, tmp_path / "run", resume=True, progress=False)
    fields = {"data.cache": str(tmp_path / "jpeg"), "data.cache_format": "jpeg"}
    jpeg = recipe(rendered, **{"train.epochs": 1}, **fields)
    run(tmp_path, jpeg)
    message = r"made from frames, .* make them from frames as JPEG of quality 95; set data\.cache"
    with pytest.raises(ValueError, match=message):
        train(jpeg, tmp_path / "run", resume=True, progress=False)
    reduced = recipe(rendered, **{"train.epochs": 1, "data.reduced_decode": True})
    message = r"from frames, .* from frames decoded at reduced scale; .* data\.reduced_decode, as"
    with pytest.raises(ValueError, match=message):
        train(reduced, tmp_path / "run", resume=True, progress=False)
