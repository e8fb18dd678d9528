"""csrc/build.py: its choice of compiler and architectures, what it compiles again, its errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build
from csrc.build import BuildError, Nvcc, choose_target, parse_archs
from tests.csrc.compile_check import require_nvcc

DEFAULT = frozenset({(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)})
NVCC = Nvcc(Path("/cuda/bin/nvcc"), "13.0", "13.0.88", DEFAULT | {(7, 5), (8, 7), (10, 0)})


def nvcc_in(folder: Path, script: str = "") -> Path:
    """A program in a toolkit's folder that answers as nvcc does."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# -- the compiler ---------------------------------------------------------------------------------


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, on_path, default = (
        nvcc_in(tmp_path / name) for name in ("home", "path", "on_path", "default")
    )
    monkeypatch.setattr(build, "_DEFAULT_CUDA", tmp_path / "default")
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": f"/nowhere:{on_path.parent}",
    }
    for expected, variable in (
        (home, "CUDA_HOME"),
        (path, "CUDA_PATH"),
        (on_path, "PATH"),
        (default, None),
    ):
        assert build.find_nvcc(environ) == expected
        environ.pop(variable, None)


def test_no_nvcc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_DEFAULT_CUDA", tmp_path)
    with pytest.raises(BuildError, match=r"no nvcc on PATH nor in .*/bin; install NVIDIA's"):
        build.find_nvcc({"PATH": "/nowhere"})
    nvcc_in(tmp_path)
    message = r"no bin/nvcc in CUDA_HOME=/nowhere; set it to where"
    with pytest.raises(BuildError, match=message):  # a variable that is set hides the others
        build.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": str(tmp_path / "bin")})


def test_what_nvcc_is(tmp_path: Path) -> None:
    script = (
        'if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.8, V12.8.93";\n'
        "else echo compute_75; echo compute_90; echo compute_120; fi"
    )
    found = build.read_nvcc(nvcc_in(tmp_path / "a", script))
    assert found[1:] == ("12.8", "12.8.93", frozenset({(7, 5), (9, 0), (12, 0)}))
    with pytest.raises(BuildError, match=r"nvcc --version fails: no licence"):
        build.read_nvcc(nvcc_in(tmp_path / "b", "echo no licence >&2; exit 3"))
    with pytest.raises(BuildError, match=r"does not answer as nvcc does: hello"):
        build.read_nvcc(nvcc_in(tmp_path / "c", "echo hello"))
    path = nvcc_in(tmp_path / "d")
    path.chmod(0o644)
    with pytest.raises(BuildError, match=r"nvcc does not run: .*Permission denied"):
        build.read_nvcc(path)


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "archs", "ptx"),
    [
        ("8.9", ((8, 9),), ()),
        ("8.0;8.6;12.0+PTX", ((8, 0), (8, 6), (12, 0)), ((12, 0),)),
        ("9.0, 8.9", ((8, 9), (9, 0)), ()),
        (" 8.0 8.9+PTX  9.0+ptx ; ", ((8, 0), (8, 9), (9, 0)), ((8, 9), (9, 0))),
        ("9.0a 9.0", ((9, 0),), ()),
    ],
)
def test_lists_of_architectures(value: str, archs: tuple, ptx: tuple) -> None:
    assert parse_archs("X", value) == (archs, ptx, ())


@pytest.mark.parametrize("word", ["89", "sm_89", "8.9+SASS", "Ada", "8.", "-8.9", "8.9PTX"])
@pytest.mark.parametrize("variable", build.ARCH_VARIABLES)
def test_a_list_that_is_none(word: str, variable: str) -> None:
    with pytest.raises(BuildError) as error:
        choose_target(NVCC, {variable: f"8.0;{word}"})
    assert str(error.value) == (
        f"{variable}=8.0;{word}: {word!r} is no compute capability; give a list such as 8.9 or "
        "8.6;8.9;9.0+PTX"
    )


def test_the_default_architectures() -> None:
    target = choose_target(NVCC, {"CMPOSE_CUDA_ARCHS": " "})
    assert target == (((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)), ((12, 0),), ())
    assert str(target) == "8.0;8.6;8.9;9.0;12.0 + PTX 12.0"


def test_the_first_variable_wins() -> None:
    environ = {"CMPOSE_CUDA_ARCHS": "8.9", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    assert choose_target(NVCC, environ) == (((8, 9),), (), ())
    del environ["CMPOSE_CUDA_ARCHS"]
    assert choose_target(NVCC, environ) == (((9, 0),), ((9, 0),), ())


def test_an_nvcc_that_is_too_old() -> None:
    """What nvcc does not know is left out of the default list and refused in a given one."""
    old = NVCC._replace(version="12.0", archs=DEFAULT - {(12, 0)})
    target = choose_target(old, {})
    assert target.archs == ((8, 0), (8, 6), (8, 9), (9, 0))
    assert target.ptx == ((9, 0),)
    assert target.notes == ("nvcc 12.0 does not know 12.0, left out",)
    for variable in build.ARCH_VARIABLES:
        message = rf"{variable}=8\.9;12\.0: nvcc 12\.0 \(/cuda/bin/nvcc\) does not compile for 12"
        with pytest.raises(BuildError, match=message):
            choose_target(old, {variable: "8.9;12.0"})
    with pytest.raises(BuildError, match=r"nvcc 12\.0 compiles for none of 8\.0;"):
        choose_target(old._replace(archs=frozenset({(5, 0)})), {})


def test_cards_that_are_too_old() -> None:
    """They are left out of torch's list, which other packages use too; ours may not name them."""
    with pytest.raises(BuildError, match=r"CMPOSE_CUDA_ARCHS=7\.5;8\.9: the kernels need 8\.0"):
        choose_target(NVCC, {"CMPOSE_CUDA_ARCHS": "7.5;8.9"})
    target = choose_target(NVCC, {"TORCH_CUDA_ARCH_LIST": "7.5;8.9"})
    assert target.archs == ((8, 9),)
    assert target.notes == (
        "TORCH_CUDA_ARCH_LIST=7.5;8.9: 7.5 left out, the kernels need 8.0 or more",
    )
    with pytest.raises(BuildError, match=r"TORCH_CUDA_ARCH_LIST=7\.5: the kernels need 8\.0"):
        choose_target(NVCC, {"TORCH_CUDA_ARCH_LIST": "7.5"})


# -- compiling ------------------------------------------------------------------------------------

KERNEL = """
#include "shared.h"
__global__ void {name}_kernel(float* out) {{ out[threadIdx.x] = kValue; }}
void {name}(float* out) {{ {name}_kernel<<<1, 32>>>(out); }}
"""
BINDINGS = """
#include <Python.h>
#include "shared.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddStringConstant(module, "facts",
                             CMPOSE_CUDA_ARCHS_BUILT "|" CMPOSE_CUDA_PTX_BUILT
                             "|" CMPOSE_NVCC_VERSION "|" CMPOSE_VERSION);
  return module;
}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> build.BuildPlan:
    """Two small sources, compiled, in folders with spaces in their names."""
    require_nvcc()
    source = tmp_path_factory.mktemp("the sources")
    (source / "shared.h").write_text("#pragma once\nconstexpr float kValue = 1;\n")
    (source / "bindings.cpp").write_text(BINDINGS)
    for name in ("first", "second"):
        (source / f"{name}.cu").write_text(KERNEL.format(name=name))
    nvcc = build.read_nvcc(build.find_nvcc())
    target = parse_archs("test", "8.9+PTX")
    made = build.BuildPlan(source, source / "kept objects", nvcc, target, "1.2.3")
    assert sorted(build.run(made, [made.module]))[:3] == [
        "c++ bindings.cpp",
        f"link {made.module.name}",
        "nvcc first.cu",
    ]
    return made


def touch(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


def test_only_what_changed_is_compiled_again(plan: build.BuildPlan) -> None:
    link = f"link {plan.module.name}"
    assert build.run(plan, [plan.module]) == []
    touch(plan.source / "second.cu")
    assert build.run(plan, [plan.module]) == ["nvcc second.cu", link]
    touch(plan.source / "bindings.cpp")
    assert build.run(plan, [plan.module]) == ["c++ bindings.cpp", link]
    touch(plan.source / "shared.h")
    ran = build.run(plan, [plan.module])
    assert sorted(ran) == ["c++ bindings.cpp", link, "nvcc first.cu", "nvcc second.cu"]
    assert build.run(plan, [plan.module], threads=3) == []
    report = plan.objects[0].with_name("first.cu.o.log")
    before = report.read_text()
    assert "Compiling entry function" in before
    report.unlink()
    assert build.run(plan, [plan.module]) == ["nvcc first.cu", link]
    assert report.read_text().count("registers") == before.count("registers") == 1


def test_facts_reach_the_bindings_alone(plan: build.BuildPlan) -> None:
    newer = plan._replace(version="1.2.4")
    assert build.run(newer, [newer.module]) == ["c++ bindings.cpp", f"link {plan.module.name}"]
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "print(importlib.util.module_from_spec(spec).facts)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(newer.module)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"8.9|8.9|{plan.nvcc.version}|1.2.4"


def test_flags(plan: build.BuildPlan) -> None:
    """All in one place, where none makes results less exact than plain PyTorch's."""
    text = (plan.folder / "build.ninja").read_text()
    [command] = [line for line in text.splitlines() if "Xptxas=-v" in line]
    assert {"-O3", "-std=c++17", "-lineinfo"} <= set(command.split())
    assert "-gencode=arch=compute_89,code=sm_89" in command
    assert "-gencode=arch=compute_89,code=compute_89" in command
    for loose in ("fast_math", "fast-math", "-ftz=true", "-prec-div=false", "-prec-sqrt=false"):
        assert loose not in text


def test_a_broken_source_shows_the_compilers_message(plan: build.BuildPlan) -> None:
    path = plan.source / "second.cu"
    sound = path.read_text()
    path.write_text(sound.replace("kValue", "kMissing"))
    try:
        with pytest.raises(BuildError) as error:
            build.run(plan, [plan.module])
    finally:
        path.write_text(sound)
    assert str(error.value).startswith("the CUDA core does not compile:\n")
    assert 'second.cu(3): error: identifier "kMissing" is undefined' in str(error.value)


def test_what_else_is_missing(
    plan: build.BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BuildError, match=r"the CUDA sources are not in "):
        build.run(plan._replace(source=tmp_path), [plan.module])
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(BuildError, match=r"MAX_JOBS=many: must be a number"):
        build.run(plan, [plan.module])
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(BuildError, match=r"there is no C\+\+ compiler /nowhere/c\+\+; install it"):
        build.run(plan, [plan.module])


def test_a_compiler_behind_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache g++ -m64")
    assert build._compiler() == ["g++", "-m64"]
    monkeypatch.delenv("CXX")
    assert build._compiler() == ["g++"]


def test_the_program(tmp_path: Path) -> None:
    """``--nvcc`` says where nvcc is; without one it fails and says so."""
    command = [sys.executable, str(build.CSRC / "build.py"), "--nvcc"]
    nvcc = nvcc_in(tmp_path)
    environ = {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == str(nvcc)
    environ = {"CUDA_HOME": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("csrc/build.py: there is no bin/nvcc in CUDA_HOME=/nowhere")
