"""Binary files that were cut or have other bytes: read, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from hypothesis import note
from safetensors.torch import save_file

from cmpose import config as configuration
from cmpose.config import DataConfig
from cmpose.data.cache.build import build, source_of
from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.store import CacheError
from cmpose.data.clips import ClipDataset
from cmpose.data.pictures import FrameError, picture_size, read_picture
from cmpose.data.video import VideoError, open_video
from cmpose.models.weights.checkpoint import load_state
from cmpose.models.weights.folder import CheckpointError
from cmpose.models.weights.pretrained import read_weights
from tests.data import synthetic
from tests.fuzz.conftest import FACTOR
from tests.fuzz.damage import changed_bytes

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
TRUTH = synthetic.sequence(indices=(0, 1), people=2)
TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)}
TRIES = 12 if FACTOR == 1 else 25


class File(NamedTuple):
    """A kind of file.

    Attributes:
        name: of the file.
        write: a good one, given its path.
        read: it, given its path.
        error: what ``read`` documents to raise.
    """

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    error: type[Exception] = FrameError


def picture(name: str, pixels: np.ndarray = PIXELS, *options: int) -> File:
    def read(path: Path) -> None:
        width, height = picture_size(path)
        pixels = read_picture(path)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (height, width, 3), "the header told another size"

    return File(name, lambda path: cv2.imwrite(str(path), pixels, list(options)), read)


def video(name: str, codec: str) -> File:
    def write(path: Path) -> None:
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 25, (64, 48))
        for i in range(6):
            writer.write(np.full_like(PIXELS, 40 * i))
        writer.release()
        assert path.is_file(), f"OpenCV does not write {codec} here"

    def read(path: Path) -> None:
        with open_video(path) as opened:
            shape = (opened.info.height, opened.info.width, 3)
            numbers = []
            for frame in opened.frames():
                numbers.append(frame.number)
                assert frame.picture.shape == shape
                assert len(numbers) < 1000
            assert numbers == [*range(len(numbers))]

    return File(name, write, read, VideoError)


def read_weights_file(path: Path) -> None:
    for name, tensor in read_weights(path, TENSORS)[1].tensors.items():
        assert isinstance(name, str)
        assert isinstance(tensor, torch.Tensor)


FILES = {
    "JPEG": picture("a.jpg"),
    "PNG": picture("a.png"),
    "PNG, 16 bits": picture("a.png", PIXELS.astype(np.uint16) * 257),
    "PNG, grey": picture("a.png", PIXELS[..., 0]),
    "TIFF": picture("a.tif"),
    "TIFF, 16 bits": picture("a.tif", PIXELS.astype(np.uint16) * 257),
    "WebP": picture("a.webp"),
    "BMP": picture("a.bmp"),
    "PPM": picture("a.ppm"),
    "JPEG 2000": picture("a.jp2"),
    "MP4": video("a.mp4", "mp4v"),
    "AVI": video("a.avi", "MJPG"),
    "Matroska": video("a.mkv", "MJPG"),
    "WebM": video("a.webm", "VP80"),
    "safetensors": File(
        "a.safetensors", lambda path: save_file(TENSORS, path), read_weights_file, ValueError
    ),
    "PyTorch weights": File(
        "a.pth", lambda path: torch.save(TENSORS, path), read_weights_file, ValueError
    ),
    "training state": File(
        "state.pt",
        lambda path: torch.save({"step": 3, "optimizer": TENSORS}, path),
        lambda path: load_state(path.parent),
        CheckpointError,
    ),
    "recipe": File(
        "a.yaml",
        lambda path: path.write_text("model: {depth: 3, sigma: 2.0}\ndata:\n  root: x\n"),
        configuration.load,
        ValueError,
    ),
}


def check(path: Path, kind: File, data: bytes) -> None:
    """A file is read, or refused by its name."""
    note(repr(data[:5000]))
    path.write_bytes(data)
    try:
        kind.read(path)
    except kind.error as error:
        message = str(error)
        assert path.name in message, message
        assert len(message) < 2000, message[:300]


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_read_or_refused_by_name(name, hunt, tmp_path):
    kind = FILES[name]
    path = tmp_path / kind.name
    kind.write(path)
    kind.read(path)
    hunt(lambda data: check(path, kind, data), changed_bytes(path.read_bytes()), TRIES)


@pytest.mark.parametrize("stored", ["raw", "jpeg"])
@pytest.mark.parametrize("name", ["tiles.bin", "index.bin"])
def test_changed_bytes_of_a_cache_are_named(name, stored, hunt, tmp_path):
    """Of tiles, only ``verify`` compares all bytes; it must find every change."""
    synthetic.write_pictures(tmp_path, TRUTH)
    data = DataConfig(cache_format=stored)
    clips = ClipDataset([TRUTH], tmp_path, (64, 48), 1, data, train=True)
    build(clips, tmp_path / "store", progress=False)
    source, path = source_of(clips), tmp_path / "store" / name
    whole = path.read_bytes()

    def check_cache(changed: bytes) -> None:
        path.write_bytes(changed)
        try:
            problems = [*filter(None, TileCache(tmp_path / "store", source).verify())]
        except CacheError as error:
            problems = [str(error)]
        assert bool(problems) == (changed != whole)
        assert all(name in problem or "index.bin" in problem for problem in problems)

    hunt(check_cache, changed_bytes(whole), TRIES // 2)
