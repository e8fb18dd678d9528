"""The ops as a folder of their own (``python -m tools.hub``), loaded without cmpose."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import cmpose
from cmpose import ops
from cmpose.ops import backends
from tests.ops.support.cases import DEVICE
from tests.shared_data import PROJECT
from tools import hub

KERNELS = Path(sys.prefix) / "kernels"
"""Where the Makefile installs Hugging Face's package of that name, apart from all else."""

TRITON_OPS = [op for op, entry in backends._ENTRIES.items() if "triton" in entry.limits]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    output = tmp_path_factory.mktemp("hub") / "cmpose-ops"
    assert hub.main([str(output)]) == 0
    return output


def metadata_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / hub.VARIANT / "metadata.json").read_text())


@contextmanager
def package_of_that_name() -> Iterator[ModuleType | None]:
    """The package ``kernels``, not this repository's folder; None where it is not installed."""
    ours = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "kernels"}
    for name in ours:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as patch:
        others = [p for p in sys.path if Path(p or ".").resolve() != PROJECT]
        patch.setattr(sys, "path", [str(KERNELS), *others])
        try:
            yield importlib.import_module("kernels")
        except ModuleNotFoundError as error:
            if error.name != "kernels":
                raise
            yield None
        finally:
            for name in [n for n in sys.modules if n.split(".")[0] == "kernels"]:
                del sys.modules[name]
            sys.modules.update(ours)


class Loaded(NamedTuple):
    package: ModuleType
    by_kernels: bool  # else by a loader of our own, which does the same


@pytest.fixture(scope="module")
def hub_ops(folder: Path) -> Loaded:
    """The folder's package, loaded by the package ``kernels`` where that is installed."""
    with package_of_that_name() as kernels:
        if kernels is not None:
            return Loaded(kernels.get_local_kernel(folder), True)
    name = metadata_of(folder)["id"]
    spec = importlib.util.spec_from_file_location(name, folder / hub.VARIANT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return Loaded(module, False)


@pytest.fixture(scope="module")
def loaded(hub_ops: Loaded) -> ModuleType:
    return hub_ops.package


# -- the folder -----------------------------------------------------------------------------------


def test_it_imports_torch_triton_and_the_standard_library_only(folder: Path) -> None:
    allowed = {"torch", "triton", "__future__"} | set(sys.stdlib_module_names)
    files = sorted((folder / hub.VARIANT).rglob("*.py"))
    assert len(files) > 40
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {n.split(".")[0] for n in names} <= allowed, f"{file}: {names}"


def test_its_digest_names_every_file_and_its_namespace_every_change(folder: Path) -> None:
    metadata = metadata_of(folder)
    files = {
        path.relative_to(folder / hub.VARIANT).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in (folder / hub.VARIANT).rglob("*.py")
    }
    assert metadata["digest"] == {"algorithm": "sha256", "files": files}
    assert hub.variant() == hub.variant()
    library = (folder / hub.VARIANT / "ops" / "library.py").read_text()
    assert f'NAMESPACE = "{metadata["id"][1:]}"' in library


def test_the_namespace_changes_with_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = hub._sources()
    before = json.loads(hub.variant()["metadata.json"])["id"]
    changed = sources | {"native.py": sources["native.py"] + "\n# changed\n"}
    monkeypatch.setattr(hub, "_sources", lambda: changed)
    assert json.loads(hub.variant()["metadata.json"])["id"] != before


@pytest.mark.parametrize(
    ("name", "line", "becomes"),
    [
        ("ops/knn.py", "from cmpose.ops import checks", "from . import checks"),
        ("ops/knn.py", "from cmpose import native", "from .. import native"),
        ("ops/knn.py", "from cmpose.ops.cpu import knn as cpu", "from .cpu import knn as cpu"),
        ("ops/cpu/knn.py", "from cmpose.ops import checks", "from .. import checks"),
        ("ops/cpu/knn.py", "from cmpose.ops.cpu.bags import x", "from .bags import x"),
        ("kernels/knn.py", "    from cmpose.kernels.launch import x", "    from .launch import x"),
        ("kernels/knn.py", "from torch import Tensor", "from torch import Tensor"),
    ],
)
def test_imports_become_relative(name: str, line: str, becomes: str) -> None:
    text = "if True:\n" + ("" if line[0] == " " else "    ") + line
    assert hub.relative(name, text).splitlines()[1].strip() == becomes.strip()


def test_an_import_that_has_no_relative_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ops/knn.py: line 1: .*from cmpose"):
        hub.relative("ops/knn.py", "import cmpose.native")


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert hub.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        f"hub: {tmp_path}: holds something already; give an empty folder\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


# -- loaded ---------------------------------------------------------------------------------------


def test_the_package_kernels_loads_it(folder: Path, hub_ops: Loaded) -> None:
    if not hub_ops.by_kernels:
        assert not KERNELS.exists(), f"{KERNELS}: what make installed there does not load"
        pytest.skip("the package 'kernels' is not installed; make venv installs it")
    data = importlib.import_module("kernels_data")
    path = folder / hub.VARIANT
    metadata = data.Metadata.read_from_file(path / "metadata.json")
    metadata.digest.validate(data.Digest.hash_variant(metadata.digest.algorithm, path))
    assert hub_ops.package.__name__ == metadata.id == metadata_of(folder)["id"]


def test_it_computes_what_cmpose_does(loaded: ModuleType) -> None:
    qkv = torch.randn(1, 3, 5, 3, 2, 32, device=DEVICE)
    reasons = loaded.available("temporal_attention")
    for backend in [name for name, reason in reasons.items() if reason is None]:
        actual = loaded.temporal_attention(qkv, backend=backend)
        assert torch.equal(actual, ops.temporal_attention(qkv, backend=backend))


def test_it_offers_what_cmpose_ops_does(loaded: ModuleType) -> None:
    assert loaded.__all__ == ops.__all__
    for name in loaded.__all__:
        assert getattr(loaded, name).__module__.startswith(loaded.__name__)
    registered = getattr(torch.ops, loaded.__name__[1:])
    assert registered.temporal_attention is not torch.ops.cmpose.temporal_attention
    assert {m.split(".")[0] for m in vars(loaded) if "cmpose" in m} == set()


def test_it_says_where_the_cuda_kernels_are(loaded: ModuleType) -> None:
    assert loaded.available("dpc_knn")["cuda"] == (
        "this folder has the Triton kernels only; the CUDA C++ kernels are in the package cmpose"
    )
    with pytest.raises(loaded.BackendUnavailable, match="in the package cmpose"):
        loaded.dpc_knn(torch.randn(1, 9, 4), k=2, num_clusters=2, backend="cuda")


# -- the op contract, from there ------------------------------------------------------------------

REFUSED = ops.available(TRITON_OPS[0], DEVICE)["triton"]
needs_triton = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@pytest.fixture(scope="module")
def contract(loaded: ModuleType) -> Iterator[ModuleType]:
    """``tests/ops/test_contract.py`` and its cases once more, of the folder's ops."""
    before = dict(sys.modules)
    for name in [n for n in before if n.startswith("tests.ops.")]:
        del sys.modules[name]
    sys.modules |= {
        name.replace(loaded.__name__, "cmpose", 1): module
        for name, module in before.items()
        if name.startswith(f"{loaded.__name__}.ops")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cmpose, "ops", loaded.ops)
        try:
            module = importlib.import_module("tests.ops.test_contract")
        finally:
            for name in [n for n in sys.modules if n.startswith(("tests.ops.", "cmpose.ops"))]:
                sys.modules.pop(name)
            sys.modules.update(before)
    assert loaded.__name__[1:] == module.library.NAMESPACE
    return module


@needs_triton
@pytest.mark.parametrize("op", TRITON_OPS)
def test_its_triton_kernels_keep_the_op_contract(contract: ModuleType, op: str) -> None:
    case = replace(contract.CASES[op], other_sizes=())  # those are tested in cmpose
    contract.test_value_and_gradients_are_as_close_as_eager(case, "triton", torch.float32)
    contract.test_opcheck(case, "triton", "permuted")
    contract.test_bitwise_repeat(case, "triton")
    contract.test_empty_batch(case, "triton")
    if case.gradients:
        contract.test_second_derivatives_raise_or_are_right(case, "triton")


@needs_triton
def test_it_compiles_in_one_graph(contract: ModuleType) -> None:
    contract.test_compiles_in_one_graph(contract.CASES["heatmap_loss"], "triton")


@pytest.mark.parametrize("op", [op for op in backends.OPS if op not in TRITON_OPS])
def test_its_other_ops_keep_the_op_contract(contract: ModuleType, op: str) -> None:
    case = contract.CASES[op]
    for backend in case.backends:
        contract.test_bitwise_repeat(case, backend)
        contract.test_empty_batch(case, backend)
