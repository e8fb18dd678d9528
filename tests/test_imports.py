"""The house's order: imports go one way between folders, and no two modules import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.shared_data import PROJECT

# A folder (or a module at the top of the package) may import those on lower lines, and itself.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"demo"},
    {"study", "report"},
    {"train", "predict"},
    {"render", "convert", "evaluation", "doctor", "starter"},
    {"models", "viz"},
    {"ops", "data"},
    {"command"},
    {"config", "distributed"},
    {"kernels", "native", "files", "help_text", "memory", "provenance", "usage", "_version"},
)
LEVEL = {part: len(LAYERS) - line for line, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted((PROJECT / "cmpose").rglob("*.py")) + sorted((PROJECT / "kernels").rglob("*.py"))


def name_of(path: Path) -> str:
    """``cmpose.ops.dpc_knn``; ``kernels/`` is installed as ``cmpose.kernels``."""
    parts = path.relative_to(PROJECT).with_suffix("").parts
    parts = ("cmpose", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imported_modules(source: str) -> Iterator[str]:
    """The modules of cmpose that a module's source imports, anywhere in it, for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in NAMES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in NAMES:
                    yield whole
                elif node.module in NAMES:
                    yield node.module


def misdirected(module: str, source: str) -> set[str]:
    """What a module imports although it lies higher, or beside its own folder."""
    part = module.split(".")[1]
    others = {name.split(".")[1] for name in imported_modules(source) if "." in name}
    return {other for other in others if other != part and LEVEL[other] >= LEVEL[part]}


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a ring; empty if there are none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_nothing_imports_upward(path):
    if name_of(path) == "cmpose":
        allowed = {
            "cmpose._version",
            "cmpose.predict.pose_model",
        }  # the second when it is asked for
        assert set(imported_modules(path.read_text())) <= allowed
        return
    assert misdirected(name_of(path), path.read_text()) == set()


def test_no_modules_import_each_other():
    # A package's own __init__ may gather its modules; they may not go through it.
    imports = {
        name_of(p): set(imported_modules(p.read_text())) - {"cmpose", name_of(p)} for p in MODULES
    }
    assert circle(imports) == []


def test_a_planted_upward_import_is_caught():
    assert misdirected("cmpose.ops.x", "from cmpose.models.vit import Block") == {"models"}
    assert misdirected("cmpose.data.x", "def f():\n    from cmpose import ops") == {"ops"}
    assert misdirected("cmpose.viz.x", "import cmpose.evaluation.decode") == {"evaluation"}
    assert misdirected("cmpose.train.x", "from cmpose.models import vit") == set()


def test_a_planted_circle_is_caught():
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cmpose.data import {}"
    imports = {
        f"cmpose.data.{a}": set(imported_modules(typed.format(b)))
        for a, b in (("video", "frames"), ("frames", "clips"), ("clips", "video"))
    }
    assert len(circle(imports)) == 4


def test_import_initialises_no_cuda_and_is_lean():
    """``import cmpose`` loads neither torch nor anything of the system's graphics driver."""
    code = (
        "import sys, cmpose; heavy = {'torch', 'cv2', 'triton', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy; from cmpose import ops; import torch;"
        "assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'cmpose._C'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_model_is_built_with_torch_alone():
    """On a machine where nothing can be installed, kernels and the network still run."""
    code = (
        "import sys; from cmpose.config import ModelConfig;"
        "from cmpose.models.cmpose import CMPose;"
        "CMPose(ModelConfig(backbone='tiny', image_size=(64, 48), fine='off'));"
        "import cmpose.models.losses; from cmpose import ops;"
        "more = {'msgspec', 'safetensors', 'jsonargparse', 'shapely', 'yaml'} & set(sys.modules);"
        "assert not more, more"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
