"""Memory that runs out, and processes that die of it, are told in words with what to do."""

from __future__ import annotations

import os
import signal

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cmpose.cli import main
from cmpose.evaluation import posetrack_ap
from cmpose.memory import OutOfMemory, is_out_of_memory, shortage


def by_torch():
    torch.empty(1 << 56)


def by_numpy():
    np.empty(1 << 56)


def by_opencv():
    raise cv2.error("OpenCV(5.0.0) error: (-4:Insufficient memory) Failed to allocate 9 bytes")


def by_python():
    raise MemoryError


def in_a_loader():
    for _ in DataLoader(Large(), num_workers=1):
        pass


class Large:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return np.empty(1 << 56)


class Killed(Large):
    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        (by_torch, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 28823037615"),
        (by_numpy, "Unable to allocate"),
        (by_opencv, "Failed to allocate"),
        (by_python, "MemoryError"),
        (in_a_loader, "Unable to allocate"),
    ],
)
def test_it_is_recognised_whoever_tells_of_it(allocate, message):
    with pytest.raises(Exception) as raised:
        allocate()
    assert is_out_of_memory(raised.value)
    text = shortage(raised.value)
    assert text.startswith("memory ran out (")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("error", [ValueError("MemoryError"), RuntimeError("x"), OSError(2, "y")])
def test_other_failures_are_none(error):
    assert shortage(error) == ""
    assert shortage(OutOfMemory("memory: CUDA out of memory")) == "", "it says what to do already"


def test_a_killed_loader_is_named():
    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(Killed(), num_workers=1))
    text = shortage(raised.value)
    assert text.startswith("a process that loads pictures ended (DataLoader worker (pid")
    assert "the system kills one when memory, or /dev/shm, is full" in text


def test_the_command_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(posetrack_ap, "score_folders", lambda *_, **__: by_numpy())
    with pytest.raises(SystemExit, match=r"^cmpose score: memory ran out \(Unable .*; free some"):
        main(["score", str(tmp_path), str(tmp_path)])
