"""tools/toolkits.py with stand-ins for clang and ptxas; and the real ones where they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tools import toolkits

PTXAS = """#!/bin/sh
case "$1" in
--help) echo "Allowed values: 'compute_86','sm_75','sm_80','sm_100','sm_100a'";;
--version) echo "Cuda compilation tools, release 12.9, V12.9.86";;
-v) arch=${2#-arch=}; grep -q "sm_80" "$3" || exit 9
    echo "ptxas info    : Compiling entry function '_Z1kv' for '$arch'"
    echo "ptxas info    : Function properties for _Z1kv"
    echo "    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads"
    echo "ptxas info    : Used 40 registers";;
esac
"""
# It knows sm_80, and not sm_100.
CLANG = """#!/bin/sh
case "$*" in
*-print-supported-cpus*) echo "Available CPUs: sm_75 sm_80";;
*--offload-arch=sm_80*) for last; do :; done; echo ".target sm_80" > "$last";;
*--offload-arch=*) exit 7;;
*-fsyntax-only*broken.cu*) echo "broken.cu:1: error: missing"; exit 1;;
esac
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit as pip unpacks it, and sources, of which one is sound."""
    for part in toolkits.PARTS:
        (tmp_path / "cu12" / "nvidia" / part / "include").mkdir(parents=True)
    (tmp_path / "cu12/nvidia/cuda_nvcc/nvvm").mkdir()
    program(tmp_path / "cu12/nvidia/cuda_nvcc/bin/ptxas", PTXAS)
    program(tmp_path / "clang", CLANG)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "one.cu").touch()
    monkeypatch.setattr(toolkits, "CSRC", tmp_path / "csrc")
    return tmp_path / "cu12"


def test_what_clang_does_not_know_is_of_the_ptx_before(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert toolkits.main([str(folder), "--clang", str(folder.parent / "clang")]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row == "| 12.9.86 | sm_80, sm_100 | 1 | 40 | 2 |"


def test_what_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(folder), "--clang", str(folder.parent / "clang")]
    assert toolkits.main([str(folder), "--clang", "/nowhere/clang"]) == 1
    assert "/nowhere/clang: does not run: No such file" in capsys.readouterr().err
    (folder.parent / "csrc" / "broken.cu").touch()
    assert toolkits.main(command) == 1
    assert "broken.cu:1: error: missing" in capsys.readouterr().err
    shutil.rmtree(folder / "nvidia" / "cuda_cccl")
    assert toolkits.main(command) == 1
    expected = f"tools.toolkits: {folder}: has no nvidia/cuda_cccl; pip install --target it "
    assert capsys.readouterr().err.startswith(expected + "nvidia-cuda-cccl-cu12 (or -cu11)")


def test_a_real_toolkit(tmp_path: Path) -> None:
    """The smallest source, for every architecture of the toolkit that ``CMPOSE_TOOLKIT`` names."""
    named = os.environ.get("CMPOSE_TOOLKIT")
    if not named or shutil.which("clang++-19") is None:
        pytest.skip("needs clang++-19 and CMPOSE_TOOLKIT, a folder as tools.toolkits takes")
    root = toolkits.joined(Path(named).resolve(), tmp_path)
    rows = toolkits.compiled(root, "clang++-19", toolkits.CSRC / "unmerge_tokens.cu")
    assert {80, 86, 89, 90} <= {row.arch for row in rows}
    assert max(row.spill_stores + row.spill_loads for row in rows) == 0
