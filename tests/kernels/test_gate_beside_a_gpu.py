"""The gates on a machine with a GPU: in a process that does not see it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.kernels import gate
from tests.ptx_on_cpu import machine
from tests.shared_data import PROJECT

FILES = ("tests/kernels/test_gate.py", "tests/csrc/test_gate.py")

ALL = torch.cuda.is_available()
"""Without a GPU the files run by themselves; here one test of one file then shows that they start
so."""


@pytest.mark.skipif(machine.compiler() is None, reason="needs g++")
@pytest.mark.parametrize("file", FILES if ALL else FILES[:1])
def test_the_gates_run(file: str) -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "TRITON_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        file,
    ]
    command += [] if ALL else ["-k", "what_is_worse and registers"]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout or (file == FILES[0] and not gate.has_their_triton())
