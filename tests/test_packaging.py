"""Wheels, with and without the CUDA core: built without torch, with every part in them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cmpose import __version__
from tests.csrc import compile_check
from tests.csrc.compile_check import require_nvcc
from tests.shared_data import PROJECT, project_files

Command = Callable[..., "subprocess.CompletedProcess[str]"]

DECIDING = (
    "CMPOSE_BUILD_CUDA",
    "CMPOSE_CUDA_ARCHS",
    "CMPOSE_CUDA_LINEINFO",
    "TORCH_CUDA_ARCH_LIST",
    "CMPOSE_CUDA_ON_CPU",
)

NO_NVCC = {"CUDA_HOME": "/nowhere"}


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what decides on the core."""
    return {name: v for name, v in os.environ.items() if name not in DECIDING} | changes


def run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that must succeed."""
    done = subprocess.run(
        command, cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def pip(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "pip", *map(str, words)]


def copied(folder: Path) -> Path:
    """The sources as git has them, in a folder of their own."""
    for file in project_files():
        target = folder / file.relative_to(PROJECT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("source") / "cmpose")


HERE = "--no-build-isolation"
"""Builds with this environment's setuptools: pip's own takes as long as the rest."""


def wheel_of(source: Path, folder: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """Built in pip's own environment, in which there is no torch, unless :data:`HERE` is among the
    options; and what pip printed."""
    command = pip("wheel", "--verbose", "--no-deps", *options, "-w", folder, source)
    done = run(*command, cwd=folder, **variables)
    [built] = folder.glob("cmpose-*.whl")
    return built, done.stdout + done.stderr


# -- without nvcc ---------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[{"CMPOSE_BUILD_CUDA": "0"}, NO_NVCC],
    ids=["forbidden", "without nvcc"],
)
def pure(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[zipfile.ZipFile, str]:
    """A wheel without the core, and what pip printed."""
    built, printed = wheel_of(source, tmp_path_factory.mktemp("pure"), HERE, **request.param)
    return zipfile.ZipFile(built), printed


def test_every_part_is_in_the_pure_wheel(pure: tuple[zipfile.ZipFile, str]) -> None:
    wheel, printed = pure
    names = set(wheel.namelist())
    assert Path(wheel.filename or "").name == f"cmpose-{__version__}-py3-none-any.whl"
    for path in sorted((PROJECT / "cmpose").rglob("*.py")):
        assert str(path.relative_to(PROJECT)) in names
    assert {"cmpose/kernels/__init__.py", "cmpose/configs/demo.yaml", "cmpose/py.typed"} <= names
    for path in sorted((PROJECT / "cmpose" / "report" / "assets").iterdir()):
        assert str(path.relative_to(PROJECT)) in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"cmpose", next(t for t in tops if t.endswith(".dist-info"))}
    suffixes = {Path(n).suffix for n in names if n.startswith("cmpose/")}
    models = {".md", ".json", ".safetensors"}
    assert suffixes - {".txt"} == {".py", ".typed", ".yaml", ".css", ".html", ".js"} | models
    reason = "cmpose: without its CUDA core cmpose._C: "
    assert f"{reason}CMPOSE_BUILD_CUDA=0" in printed or (
        f"{reason}there is no bin/nvcc in CUDA_HOME=/nowhere" in printed
    )


def test_metadata(pure: tuple[zipfile.ZipFile, str]) -> None:
    [file] = [n for n in pure[0].namelist() if n.endswith("METADATA")]
    metadata = pure[0].read(file).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: torch>=2.9" in metadata
    assert "Requires-Dist: opencv-python-headless<5,>=4.8" in metadata


def test_doctor_says_how_to_get_the_core(pure: tuple[zipfile.ZipFile, str], tmp_path: Path) -> None:
    pure[0].extractall(tmp_path)
    done = run(sys.executable, "-m", "cmpose", "doctor", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    forbidden = "CMPOSE_BUILD_CUDA=0" in pure[1]
    why = (
        "install cmpose where nvcc is on PATH" if forbidden else "there is no bin/nvcc in CUDA_HOME"
    )
    assert f"\n_C      cmpose._C is not built: {why}" in done.stdout


def test_a_compiler_that_nvcc_refuses(source: Path, tmp_path: Path) -> None:
    """cmpose is built without its core and says why, unless the core is demanded."""
    require_nvcc()
    newer = tmp_path / "g++-99"
    newer.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    newer.chmod(0o755)
    command = (sys.executable, "setup.py", "--quiet", "build", "--build-base", str(tmp_path / "b"))
    variables = {**QUICK, "CXX": str(newer), "MAX_JOBS": "1"}
    run(*command, cwd=source, **variables)
    [reason] = tmp_path.glob("b/lib*/cmpose/_C.txt")
    assert "is newer; " in reason.read_text()
    assert list(reason.parent.glob("_C.*.so")) == []
    variables["CMPOSE_BUILD_CUDA"] = "1"
    done = subprocess.run(
        command, cwd=source, env=environment(**variables), capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "error: cmpose._C: nvcc " in done.stderr
    assert "is newer; " in done.stderr
    assert not reason.exists()


def test_the_core_is_demanded_without_nvcc(source: Path, tmp_path: Path) -> None:
    command = pip("wheel", "--no-deps", HERE, "-w", tmp_path, source)
    done = subprocess.run(
        command,
        env=environment(**NO_NVCC, CMPOSE_BUILD_CUDA="1"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    assert "error: cmpose._C: there is no bin/nvcc in CUDA_HOME=/nowhere; set it to" in done.stderr
    assert "CMPOSE_BUILD_CUDA=0 installs cmpose without its CUDA core" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wish_that_does_not_exist(source: Path) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=source,
        env=environment(CMPOSE_BUILD_CUDA="yes"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "error: CMPOSE_BUILD_CUDA=yes: must be 0 (no CUDA core), 1 (demand it)" in done.stderr


def test_the_build_never_imports_torch() -> None:
    for file in ("setup.py", "csrc/build.py", "csrc/toolkit.py"):
        tree = ast.parse((PROJECT / file).read_text())
        imported = {
            name.split(".")[0]
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        assert {"setuptools", "subprocess"} & imported
        assert not {"torch", "cmpose", "numpy"} & imported, file


# -- with nvcc ------------------------------------------------------------------------------------

ARCHS = compile_check.asks_for(compile_check.ARCHS)

QUICK = {"CMPOSE_CUDA_ARCHS": "8.9"}
"""For builds that are to fail: they leave the objects of :data:`ARCHS` alone."""


@pytest.fixture(scope="module")
def with_core(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with the core.

    The compile check's objects are copied with the sources. What is left is what pip's own
    environment may change: the bindings, and the link.
    """
    require_nvcc()
    plan = compile_check.plan_for(compile_check.ARCHS)
    compile_check.compile_all(plan)
    shutil.copytree(plan.folder, source / plan.folder.relative_to(PROJECT), dirs_exist_ok=True)
    built, printed = wheel_of(source, tmp_path_factory.mktemp("wheel"), **ARCHS)
    assert "cmpose._C: 8.0;8.9;9.0;12.0 + PTX 12.0, nvcc" in printed
    assert "c++ bindings.cpp" in printed
    assert not re.search(r"\] nvcc \w+\.cu", printed), "an object was compiled again"
    return built


@pytest.fixture(scope="module")
def unpacked(with_core: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(with_core).extractall(folder)
    return folder


def core_in(folder: Path) -> Path:
    [core] = (folder / "cmpose").glob("_C*")
    return core


def facts_of(folder: Path, *python: str | Path) -> dict[str, Any]:
    """What the core in a folder was built as, asked by a Python without any package."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); from cmpose import native;"
        "assert native.unavailable() is None, native.unavailable();"
        "import cmpose._C; assert native.module() is cmpose._C and 'torch' not in sys.modules;"
        "print(json.dumps([native.module().__file__, native.info()]))"
    )
    bare = getattr(sys, "_base_executable", sys.executable)
    done = run(*(python or (bare, "-I")), "-c", code, str(folder), cwd=folder)
    file, facts = json.loads(done.stdout)
    assert Path(file) == core_in(folder)
    return facts


def test_the_core_is_in_the_wheel(with_core: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert with_core.name.startswith(f"cmpose-{__version__}-{tag}-{tag}-linux_")
    names = zipfile.ZipFile(with_core).namelist()
    [core] = [name for name in names if name.startswith("cmpose/_C")]
    assert core.endswith(".so")
    sources = (".cu", ".cuh", ".cpp", ".h", "csrc/build.py", ".o")
    assert not [n for n in names if n.endswith(sources)]


def test_what_the_core_links_to(unpacked: Path) -> None:
    """The system's libraries alone: any torch, and no CUDA runtime beside it."""
    text = run("readelf", "--dynamic", core_in(unpacked), cwd=unpacked).stdout
    needed = {
        line.split("[")[1].split(".so")[0] for line in text.splitlines() if "(NEEDED)" in line
    }
    system = {"libc", "libm", "libdl", "librt", "libpthread", "libstdc++", "libgcc_s"}
    assert "libc" in needed
    assert {name for name in needed if not name.startswith("ld-linux")} <= system
    assert "RPATH" not in text
    assert "RUNPATH" not in text


def test_the_core_loads_without_a_driver(unpacked: Path) -> None:
    facts = facts_of(unpacked)
    assert facts["archs"] == "8.0;8.9;9.0;12.0"
    assert facts["ptx"] == "12.0"
    assert facts["version"] == __version__
    assert facts["on_cpu"] is False
    assert facts["nvcc"].partition(".")[0].isdecimal()


def test_the_architectures_inside(unpacked: Path) -> None:
    """As cuobjdump sees them, which Triton brings."""
    tool = shutil.which("cuobjdump")
    if tool is None and importlib.util.find_spec("triton"):
        import triton

        tool = triton.knobs.nvidia.cuobjdump.path
    assert tool, "neither the CUDA toolkit nor Triton brings cuobjdump"
    cards = {f"sm_{arch}" for arch in compile_check.ARCHS}
    for option, ending, inside in (
        ("--list-elf", ".cubin", cards),
        ("--list-ptx", ".ptx", {"sm_120"}),
    ):
        lines = run(tool, option, core_in(unpacked), cwd=unpacked).stdout.splitlines()
        archs = {line.rsplit(".", 2)[1] for line in lines if line.endswith(ending)}
        assert archs == inside, lines


def test_doctor_describes_the_core(unpacked: Path) -> None:
    command = (sys.executable, "-m", "cmpose", "doctor")
    done = run(*command, cwd=unpacked, PYTHONPATH=str(unpacked))
    nvcc = facts_of(unpacked)["nvcc"]
    built = f"for 8.0;8.9;9.0;12.0 + PTX 12.0, built with nvcc {nvcc}"
    assert f"\n_C      {built}\n" in done.stdout
    assert "\nselect_tokens " in done.stdout


def test_editable(source: Path, with_core: Path, tmp_path: Path) -> None:
    """In place, in an environment without torch; and removed by an install that forbids it."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = pip("--python", python, "install", "--quiet", "--no-deps", "-e", source)
    run(*install, cwd=tmp_path, **ARCHS)
    assert core_in(source).suffix == ".so"
    assert facts_of(source, python)["archs"] == "8.0;8.9;9.0;12.0"
    where = "import cmpose._C; print(cmpose._C.__file__)"
    assert Path(run(python, "-c", where, cwd=tmp_path).stdout.strip()) == core_in(source)
    run(*install, cwd=tmp_path, CMPOSE_BUILD_CUDA="0")
    assert list((source / "cmpose").glob("_C*")) == []
    run(python, "-c", "import cmpose", cwd=tmp_path)


def test_a_failed_compile_shows_the_compilers_message(source: Path, tmp_path: Path) -> None:
    require_nvcc()
    sound = [(path, path.with_suffix(".sound")) for path in (source / "csrc").glob("*.cu")]
    for path, aside in sound:  # compiling them beside it takes a while
        path.rename(aside)
    broken = source / "csrc" / "broken.cu"
    broken.write_text("__global__ void broken_kernel(float* out) { out[0] = missing; }\n")
    try:
        done = subprocess.run(
            pip("wheel", "--no-deps", HERE, "-w", tmp_path, source),
            env=environment(**QUICK, MAX_JOBS="1"),  # what comes after it is not begun
            capture_output=True,
            text=True,
            timeout=600,
        )
    finally:
        broken.unlink()
        for path, aside in sound:
            aside.rename(path)
    assert done.returncode != 0
    assert "error: cmpose._C: the CUDA core does not compile:" in done.stderr
    assert 'broken.cu(1): error: identifier "missing" is undefined' in done.stderr
    assert "CMPOSE_BUILD_CUDA=0 installs cmpose without its CUDA core" in done.stderr


def test_the_source_distribution_holds_the_sources(source: Path, tmp_path: Path) -> None:
    """All that a wheel with the core is built from, even if packed where there is no nvcc."""
    code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=source, **NO_NVCC)
    [packed] = tmp_path.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"csrc/{path.name}" for path in (PROJECT / "csrc").iterdir() if path.is_file()}
    assert "csrc/bindings.cpp" in sources
    assert sources | {"setup.py", "kernels/__init__.py", "cmpose/native.py"} <= names
