"""Loading the CUDA C++ core: whose file it is, what it serves, and every way it can fail."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

import cmpose
from cmpose import __version__, native

FACTS = {"archs": "8.0;8.6;9.0", "ptx": "9.0", "nvcc": "13.0", "on_cpu": False}


@pytest.fixture(autouse=True)
def forgetting(monkeypatch: pytest.MonkeyPatch):
    """Each test finds the core, or none, by itself."""
    monkeypatch.delenv(native.ON_CPU, raising=False)
    before = sys.modules.get(native.NAME)
    native.forget()
    yield
    monkeypatch.undo()
    native.forget()
    sys.modules.pop(native.NAME, None)
    if before is not None:
        sys.modules[native.NAME] = before


def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Makes ``source`` the module that is found as cmpose._C."""
    (tmp_path / "_C.py").write_text(source)
    monkeypatch.setattr(cmpose, "__path__", [str(tmp_path)])
    sys.modules.pop(native.NAME, None)


def module_text(**changes: object) -> str:
    return f"def build_info(): return {FACTS | {'version': __version__} | changes!r}"


def refused() -> str:
    """Why there is no core; every function must say the same."""
    reason = native.unavailable()
    assert reason is not None
    for function in (native.module, native.info, lambda: native.card_unavailable(8, 9, "card")):
        with pytest.raises(ImportError) as error:
            function()
        assert str(error.value) == reason
    assert not native.on_cpu()
    return reason


def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmpose, "__path__", [str(tmp_path)])
    assert refused() == (
        "cmpose._C is not built: install cmpose where nvcc is on PATH or CUDA_HOME is set "
        "(CMPOSE_BUILD_CUDA=1 demands it)"
    )
    native.forget()
    (tmp_path / native.NOT_BUILT).write_text("nvcc 11.0 is too old")
    assert refused() == "cmpose._C is not built: nvcc 11.0 is too old"


def test_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core(tmp_path, monkeypatch, module_text())
    assert native.unavailable() is None
    assert native.info() == FACTS | {"version": __version__}
    assert native.module() is sys.modules[native.NAME]
    assert native.module().__file__ == str(tmp_path / "_C.py")
    assert not native.on_cpu()


def test_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's own message is shown, once the loader has been asked: a failure is kept."""
    core(tmp_path, monkeypatch, "raise ImportError('undefined symbol: cudaSomething')")
    assert refused() == "cmpose._C does not load: undefined symbol: cudaSomething"
    (tmp_path / "_C.py").write_text(module_text())
    assert refused() == "cmpose._C does not load: undefined symbol: cudaSomething"


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    file.write_bytes(b"no library")
    monkeypatch.setattr(cmpose, "__path__", [str(tmp_path)])
    sys.modules.pop(native.NAME, None)
    assert refused().startswith(f"cmpose._C does not load: {file}: ")


def test_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core(tmp_path, monkeypatch, module_text(version="0.0.9"))
    assert refused() == (
        f"cmpose._C ({tmp_path / '_C.py'}) was built for cmpose 0.0.9, this is {__version__}: "
        "install cmpose again"
    )


# -- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "served"),
    [
        ((8, 0), True),
        ((8, 6), True),
        ((8, 9), True),  # by the code for 8.6
        ((9, 0), True),
        ((10, 0), True),  # by the PTX
        ((12, 1), True),
        ((7, 5), False),
    ],
)
def test_cards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], served: bool
) -> None:
    core(tmp_path, monkeypatch, module_text())
    assert (native.card_unavailable(*card, "card") is None) == served


@pytest.mark.parametrize(
    ("archs", "ptx", "card", "inside"),
    [
        ("8.9", "", (8, 6), "8.9"),
        ("8.9", "", (9, 0), "8.9"),
        ("8.9;9.0", "9.0", (8, 6), "8.9;9.0 and PTX of 9.0"),
    ],
)
def test_a_card_that_is_not_served(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    archs: str,
    ptx: str,
    card: tuple[int, int],
    inside: str,
) -> None:
    core(tmp_path, monkeypatch, module_text(archs=archs, ptx=ptx))
    capability = f"{card[0]}.{card[1]}"
    assert native.card_unavailable(*card, "RTX") == (
        f"RTX has compute capability {capability}; cmpose._C was built for {inside}; "
        f"build it with CMPOSE_CUDA_ARCHS={capability}"
    )


@pytest.mark.parametrize(
    ("driver", "card", "reason"),
    [
        ((13, 1), (8, 9), None),
        ((13, 0), (10, 0), None),
        (None, (8, 9), None),
        ((12, 8), (8, 9), ": install a newer driver, or build it with nvcc 12.8"),
        (
            (12, 8),
            (10, 0),
            ", and has only PTX for RTX: install a newer driver, or build it with nvcc 12.8 and "
            "CMPOSE_CUDA_ARCHS=10.0",
        ),
    ],
)
def test_a_driver_that_is_too_old(tmp_path, monkeypatch, driver, card, reason) -> None:
    """Its own major version it serves, but compiles no PTX of a newer minor one."""
    core(tmp_path, monkeypatch, module_text(nvcc="13.0"))
    monkeypatch.setattr(native, "driver", lambda: driver)
    begin = "NVIDIA's driver serves CUDA 12.8, cmpose._C was built with nvcc 13.0"
    assert native.card_unavailable(*card, "RTX") == (reason and begin + reason)


def test_a_driver_of_the_same_major_version(tmp_path, monkeypatch) -> None:
    core(tmp_path, monkeypatch, module_text(nvcc="13.2"))
    monkeypatch.setattr(native, "driver", lambda: (13, 0))
    assert native.card_unavailable(8, 9, "RTX") is None
    assert "only PTX for RTX: install a newer driver" in (
        native.card_unavailable(10, 0, "RTX") or ""
    )


@pytest.mark.parametrize(
    ("returns", "version"),
    [("0", (12, 4)), ("100", None), ("", None)],
    ids=["there", "fails", "none"],
)
def test_the_driver_is_asked(tmp_path, monkeypatch, returns, version) -> None:
    library = tmp_path / "libcuda.so.1"
    if returns:
        source = tmp_path / "driver.c"
        source.write_text(f"int cuDriverGetVersion(int* v) {{ *v = 12040; return {returns}; }}")
        subprocess.run(["cc", "-shared", "-o", str(library), str(source)], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    assert native.driver() == version


# -- the CUDA sources compiled for the CPU --------------------------------------------------------

EXTENSION = """
#include <Python.h>

static PyObject* build_info(PyObject*, PyObject*) {
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:O}", "archs", "", "ptx", "", "nvcc", "", "version",
                       VERSION, "on_cpu", ON_CPU ? Py_True : Py_False);
}

static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory):
    """on_cpu, version → a real extension module."""

    def make(on_cpu: bool, version: str) -> Path:
        folder = tmp_path_factory.mktemp("core")
        (folder / "core.cpp").write_text(EXTENSION)
        out = folder / f"core{sysconfig.get_config_var('EXT_SUFFIX')}"
        command = ["g++", "-shared", "-fPIC", f'-DVERSION="{version}"', f"-DON_CPU={int(on_cpu)}"]
        command += ["-I", sysconfig.get_paths()["include"], "core.cpp", "-o", str(out)]
        subprocess.run(command, cwd=folder, check=True, timeout=120)
        return out

    return make


def test_on_the_cpu(compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiled(True, __version__)
    monkeypatch.setenv(native.ON_CPU, str(path))
    assert native.unavailable() is None
    assert native.on_cpu()
    loaded = native.module()
    assert isinstance(loaded, ModuleType)
    assert loaded.__file__ == str(path)
    assert native.info()["version"] == __version__


def test_on_the_cpu_wrong_modules(
    compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failure_of(path: Path) -> str:
        monkeypatch.setenv(native.ON_CPU, str(path))
        native.forget()
        reason = refused()
        assert reason.startswith(f"CMPOSE_CUDA_ON_CPU={path}")
        return reason.removeprefix(f"CMPOSE_CUDA_ON_CPU={path}")

    assert failure_of(tmp_path / "none.so") == ": there is no such file"
    (tmp_path / "text.so").write_text("no library")
    assert failure_of(tmp_path / "text.so").startswith(" is no extension module: ")
    (tmp_path / "core.txt").write_text("no library")
    assert failure_of(tmp_path / "core.txt").startswith(" is no extension module: its name")
    expected = " is not the CUDA sources compiled for the CPU"
    assert failure_of(compiled(False, __version__)) == expected
    (tmp_path / "other.py").write_text("value = 3")
    assert failure_of(tmp_path / "other.py") == expected
    built = " was built for cmpose 0.0.9, this is "
    assert failure_of(compiled(True, "0.0.9")) == f"{built}{__version__}: compile it again"


def test_it_imports_no_torch() -> None:
    code = (
        "import sys; from cmpose import native; native.unavailable();"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
