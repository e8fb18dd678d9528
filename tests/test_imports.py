"""Imports go one way: cli → engine → models / evaluation / viz → ops / data → kernels, native."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared_data import PROJECT

# Higher layers may import lower ones, never the other way or sideways.
LAYERS = {
    "cli": 5,
    "__main__": 6,
    "doctor": 4,
    "engine": 4,
    "models": 3,
    "evaluation": 3,
    "viz": 3,
    "ops": 2,
    "data": 2,
    "config": 1,
    "kernels": 0,
    "native": 0,
    "provenance": 0,
    "_version": 0,
}


def modules() -> list[Path]:
    return sorted((PROJECT / "cmpose").rglob("*.py")) + sorted((PROJECT / "kernels").rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PROJECT)
    return "kernels" if relative.parts[0] == "kernels" else Path(relative.parts[1]).stem


def imported_parts(source: str) -> set[str]:
    """The parts of cmpose that a module's source imports, anywhere in it."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    found = {name.split(".")[1] for name in names if name.startswith("cmpose.")}
    return {name for name in found if name != "__version__"}


def misdirected(part: str, source: str) -> set[str]:
    return {
        other for other in imported_parts(source) if other != part and LAYERS[other] >= LAYERS[part]
    }


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PROJECT)))
def test_nothing_imports_upward(path):
    part = part_of(path)
    if part == "__init__":
        assert imported_parts(path.read_text()) <= {"_version"}
        return
    assert misdirected(part, path.read_text()) == set()


def test_a_planted_upward_import_is_caught():
    assert misdirected("ops", "from cmpose.models.vit import Block") == {"models"}
    assert misdirected("data", "def f():\n    from cmpose import ops") == {"ops"}
    assert misdirected("viz", "import cmpose.evaluation.decode") == {"evaluation"}
    assert (
        misdirected("engine", "from cmpose.models import vit\nfrom cmpose import config") == set()
    )


def test_import_initialises_no_cuda_and_is_lean():
    """``import cmpose`` loads neither torch nor anything of the system's graphics driver."""
    code = (
        "import sys, cmpose; heavy = {'torch', 'cv2', 'triton', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy; from cmpose import ops; import torch;"
        "assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'cmpose._C'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
