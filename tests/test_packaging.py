"""The wheel: built without torch, with every part in it."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile

import pytest

from tests.shared_data import PROJECT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in pip's own environment, in which there is no torch."""
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "cmpose"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).is_file():
            target.write_bytes((PROJECT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True, timeout=300)
    [built] = out.glob("cmpose-*.whl")
    return zipfile.ZipFile(built)


def test_every_part_is_in_the_wheel(wheel):
    names = set(wheel.namelist())
    for path in sorted((PROJECT / "cmpose").rglob("*.py")):
        assert str(path.relative_to(PROJECT)) in names
    assert {"cmpose/kernels/__init__.py", "cmpose/configs/demo.yaml", "cmpose/py.typed"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cmpose", next(t for t in tops if t.endswith(".dist-info"))}


def test_metadata(wheel):
    [file] = [n for n in wheel.namelist() if n.endswith("METADATA")]
    metadata = wheel.read(file).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.9" in metadata
    assert "Requires-Dist: opencv-python-headless<5,>=4.8" in metadata


def test_setup_never_imports_torch():
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse((PROJECT / "setup.py").read_text()))
        for alias in getattr(node, "names", [])
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    modules = {
        (node.module or "").split(".")[0]
        for node in ast.walk(ast.parse((PROJECT / "setup.py").read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    assert "torch" not in imported | modules
