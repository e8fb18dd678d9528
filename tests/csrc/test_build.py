"""csrc/build.py and toolkit.py: compilers, architectures, what is compiled again, errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from csrc import build, toolkit
from csrc.toolkit import BuildError, NoToolkit, Nvcc, choose_target, parse_archs
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


def answers(version: str, root: Path = Path("/cuda")) -> str:
    """The script of an nvcc whose nvcc.profile names NVIDIA's own folders."""
    release = f"Cuda compilation tools, release {version}, V{version}.93"
    libraries = f'"-L{root}/bin/..//lib64/stubs" "-L{root}/bin/..//lib64"'
    return f"""case "$1" in
        --version) echo "{release}";;
        --list-gpu-arch) echo compute_75; echo compute_90; echo compute_120;;
        --dryrun) echo '#$ TOP={root}/bin/..' >&2
            echo '#$ INCLUDES="-I{root}/bin/..//include"  ' >&2
            echo '#$ LIBRARIES=  {libraries}' >&2;;
        esac"""


# -- the compiler ---------------------------------------------------------------------------------


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, path, on_path, conda, pip13, pip12, default = (
        nvcc_in(tmp_path / name)
        for name in (
            *("home", "path", "on_path", "conda", "site/nvidia/cu13", "site/nvidia/cuda_nvcc"),
            "default",
        )
    )
    monkeypatch.setattr(toolkit, "_DEFAULT_CUDA", tmp_path / "default")
    environ = {
        "CUDA_HOME": str(tmp_path / "home"),
        "CUDA_PATH": str(tmp_path / "path"),
        "PATH": f"/nowhere:{on_path.parent}",
        "CONDA_PREFIX": str(tmp_path / "conda"),
    }
    for expected, variable in (
        (home, "CUDA_HOME"),
        (path, "CUDA_PATH"),
        (on_path, "PATH"),
        (conda, "CONDA_PREFIX"),
        (pip13, None),
        (pip12, None),
        (default, None),
    ):
        assert toolkit.find_nvcc(environ, tmp_path / "site") == expected
        environ.pop(variable, None)
        if variable is None:
            expected.unlink()


def test_no_nvcc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "_DEFAULT_CUDA", tmp_path)
    with pytest.raises(BuildError, match=r"no nvcc on PATH nor in .*/bin; install NVIDIA's"):
        toolkit.find_nvcc({"PATH": "/nowhere"}, tmp_path)
    nvcc_in(tmp_path)
    message = r"no bin/nvcc in CUDA_HOME=/nowhere; set it to where"
    with pytest.raises(BuildError, match=message):  # a variable that is set hides the others
        toolkit.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": str(tmp_path / "bin")})


def test_what_nvcc_is(tmp_path: Path) -> None:
    nvcc = toolkit.read_nvcc(nvcc_in(tmp_path / "a", answers("12.8")))
    assert nvcc[1:] == ("12.8", "12.8.93", frozenset({(7, 5), (9, 0), (12, 0)}), ())
    message = r"nvcc 11\.7 \(.*\) is too old: the kernels need CUDA 11\.8 or newer; install one"
    with pytest.raises(NoToolkit, match=message):
        toolkit.read_nvcc(nvcc_in(tmp_path / "old", answers("11.7")))
    with pytest.raises(BuildError, match=r"nvcc --version fails: no licence"):
        toolkit.read_nvcc(nvcc_in(tmp_path / "b", "echo no licence >&2; exit 3"))
    with pytest.raises(BuildError, match=r"does not answer as nvcc does: hello"):
        toolkit.read_nvcc(nvcc_in(tmp_path / "c", "echo hello"))
    path = nvcc_in(tmp_path / "d")
    path.chmod(0o644)
    with pytest.raises(BuildError, match=r"nvcc does not run: .*Permission denied"):
        toolkit.read_nvcc(path)


PARTS = {
    "pip's of CUDA 13": (
        "cu13",
        {"cu13/include": toolkit._HEADERS, "cu13/lib": toolkit._LIBRARIES},
    ),
    "pip's of CUDA 12": (
        "cuda_nvcc",
        {
            "cuda_nvcc/include": ("crt/host_config.h",),
            "cuda_runtime/include": ("cuda_runtime.h", "cuda_fp16.h"),
            "cuda_cccl/include": ("nv/target",),
            "cuda_runtime/lib": toolkit._LIBRARIES,
        },
    ),
    "conda's": (
        "env",
        {
            "env/targets/x86_64-linux/include": toolkit._HEADERS,
            "env/targets/x86_64-linux/lib": toolkit._LIBRARIES,
        },
    ),
    "NVIDIA's": ("cuda", {"cuda/include": toolkit._HEADERS, "cuda/lib64": toolkit._LIBRARIES}),
}


@pytest.mark.parametrize("layout", PARTS)
def test_where_the_toolkits_parts_are(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nvcc does not look for itself is given to it, each folder once; the rest is not."""
    monkeypatch.setattr(toolkit.platform, "machine", lambda: "x86_64")
    root, parts = PARTS[layout]
    for folder, names in parts.items():
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
    nvcc = toolkit.read_nvcc(nvcc_in(tmp_path / root, answers("13.0", tmp_path / root)))
    own = {f"{root}/include", f"{root}/lib64"}
    expected: list[str] = []
    for folder in parts:
        if folder not in own:
            expected += ["-L" if "/lib" in folder else "-isystem", str(tmp_path / folder)]
    assert list(nvcc.options) == expected


def test_a_host_compiler_that_nvcc_refuses(tmp_path: Path) -> None:
    output = (
        "/cuda/include/crt/host_config.h:151:2: error: #error -- unsupported GNU version! gcc "
        "versions later than 13 are not supported! The nvcc flag '-allow-unsupported-compiler' ..."
    )
    sentence = "nvcc 13.0 takes g++ up to 13, g++ is newer; "
    none = toolkit.refusal(NVCC, output, {"PATH": str(tmp_path)})
    assert none == f"{sentence}install g++-13 and set CXX=g++-13"
    (tmp_path / "g++-12").touch(0o755)
    assert toolkit.refusal(NVCC, output, {"PATH": str(tmp_path)}) == f"{sentence}set CXX=g++-12"
    output = "#error -- unsupported clang version! clang version must be less than 21 and ..."
    assert toolkit.refusal(NVCC, output, {"CXX": "clang++"}) == (
        "nvcc 13.0 refuses clang++ (clang version must be less than 21 and ...); set CXX=g++"
    )
    assert toolkit.refusal(NVCC, "error: expected a ';'", {}) is None


@pytest.mark.parametrize(
    ("output", "part"),
    [
        ("a.cu:1:10: fatal error: cuda_fp16.h: No such file or directory", "cuda_fp16.h"),
        ("crt/host_config.h: No such file or directory", "crt/host_config.h"),
        ("/usr/bin/ld: cannot find -lcudart_static: No such file or directory", "cudart_static"),
        ("sh: 1: cicc: not found", "cicc"),
    ],
)
def test_a_toolkit_without_a_part(output: str, part: str) -> None:
    advice = toolkit.refusal(NVCC, f"nvcc first.cu\n{output}\n", {})
    assert advice is not None
    assert advice.startswith(f"nvcc 13.0 (/cuda/bin/nvcc) is there without {part}; pip install ")


# -- architectures --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "archs", "ptx"),
    [
        ("8.9", ((8, 9),), ()),
        ("8.0;8.6;12.0+PTX", ((8, 0), (8, 6), (12, 0)), ((12, 0),)),
        ("9.0, 8.9", ((8, 9), (9, 0)), ()),
        (" 8.0 8.9+PTX  9.0+ptx ; ", ((8, 0), (8, 9), (9, 0)), ((8, 9), (9, 0))),
        ("9.0a 9.0", ((9, 0),), ()),
        ("8.6(8.0)", ((8, 6),), ()),
        ("Ampere;ada", ((8, 0), (8, 6), (8, 9)), ((8, 6), (8, 9))),
        ("Hopper+PTX Ampere+Tegra", ((8, 7), (9, 0)), ((9, 0),)),
        ("Blackwell", ((10, 0), (10, 3), (12, 0), (12, 1)), ((12, 1),)),
        ("Common", ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0)), ((12, 0),)),
        ("All", ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)), ((12, 0),)),
    ],
)
def test_lists_of_architectures(value: str, archs: tuple, ptx: tuple) -> None:
    assert parse_archs("X", value, NVCC) == (archs, ptx, ())


@pytest.mark.parametrize("word", ["89", "sm_89", "8.9+SASS", "Rubin", "8.", "-8.9", "8.9PTX"])
@pytest.mark.parametrize("variable", toolkit.ARCH_VARIABLES)
def test_a_list_that_is_none(word: str, variable: str) -> None:
    with pytest.raises(BuildError) as error:
        choose_target(NVCC, {variable: f"8.0;{word}"})
    assert str(error.value) == (
        f"{variable}=8.0;{word}: {word!r} is no compute capability; give a list such as 8.9 or "
        "8.6;8.9;9.0+PTX, or names such as Ada;Hopper, All, Common, native"
    )
    # Torch's list is made for other packages: it does not stop the installation.
    assert isinstance(error.value, NoToolkit) == (variable == "TORCH_CUDA_ARCH_LIST")


def test_native_is_what_the_cards_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolkit, "native_archs", lambda: [(9, 0), (8, 9), (9, 0)])
    for word in ("native", "Auto"):
        target = choose_target(NVCC, {"TORCH_CUDA_ARCH_LIST": word})
        assert target == (((8, 9), (9, 0)), ((9, 0),), ())
    monkeypatch.setattr(toolkit, "native_archs", lambda: [(12, 1)])  # newer than nvcc
    target = choose_target(NVCC, {"CMPOSE_CUDA_ARCHS": "native"})
    assert target[:2] == (((12, 0),), ((12, 0),))
    monkeypatch.setattr(toolkit, "native_archs", list)
    target = choose_target(NVCC, {"TORCH_CUDA_ARCH_LIST": "native"})
    assert target[:2] == choose_target(NVCC, {})[:2]
    assert target.notes == (
        "TORCH_CUDA_ARCH_LIST=native: no card is seen here, so that native is Common",
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
    """What nvcc does not know is left out, for what serves such cards; only numbers in our own
    variable are held to."""
    old = NVCC._replace(version="12.0", archs=DEFAULT - {(12, 0)})
    target = choose_target(old, {})
    assert target.archs == ((8, 0), (8, 6), (8, 9), (9, 0))
    assert target.ptx == ((9, 0),)
    assert target.notes == ("the default: 12.0 left out, nvcc 12.0 does not know it",)
    target = choose_target(old, {"TORCH_CUDA_ARCH_LIST": "8.9;12.0"})
    assert target == (
        ((8, 9), (9, 0)),
        ((9, 0),),
        ("TORCH_CUDA_ARCH_LIST=8.9;12.0: 12.0 left out, nvcc 12.0 does not know it",),
    )
    # 12.0's code serves a card of 12.1, whose PTX was not asked for.
    assert choose_target(NVCC, {"TORCH_CUDA_ARCH_LIST": "12.1"})[:2] == (((12, 0),), ())
    assert choose_target(old, {"CMPOSE_CUDA_ARCHS": "Blackwell"})[:2] == (((9, 0),), ((9, 0),))
    message = r"CMPOSE_CUDA_ARCHS=8\.9;12\.0: nvcc 12\.0 \(/cuda/bin/nvcc\) does not compile for 12"
    with pytest.raises(BuildError, match=message):
        choose_target(old, {"CMPOSE_CUDA_ARCHS": "8.9;12.0"})
    with pytest.raises(NoToolkit, match=r"the default: nvcc 12\.0 .* does not compile for 8\.0;"):
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
    nvcc = toolkit.read_nvcc(toolkit.find_nvcc())
    target = parse_archs("test", "8.9+PTX")
    build_plan = build.BuildPlan(source, source / "kept objects", nvcc, target, "1.2.3")
    assert sorted(build.run(build_plan, [build_plan.module]))[:3] == [
        "c++ bindings.cpp",
        f"link {build_plan.module.name}",
        "nvcc first.cu",
    ]
    return build_plan


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
    small = "--compress-mode=size" if plan.nvcc.release >= (13, 0) else "-Xfatbin=-compress-all"
    assert {"-O3", "-std=c++17", small} <= set(command.split())
    assert "-lineinfo" not in text
    assert " -lineinfo " in build._ninja_file(plan._replace(line_info=True))
    old = plan._replace(nvcc=plan.nvcc._replace(version="12.9"))
    assert "-Xfatbin=-compress-all" in build._ninja_file(old)
    assert "-gencode=arch=compute_89,code=[sm_89]" in command
    assert "-gencode=arch=compute_89,code=compute_89" in command
    for loose in ("fast_math", "fast-math", "-ftz=true", "-prec-div=false", "-prec-sqrt=false"):
        assert loose not in text


def test_one_front_end_for_what_it_compiles_alike() -> None:
    """Up to 9.0; the sources must then not tell these architectures apart."""
    assert build.front_ends(DEFAULT) == {
        (8, 0): [(8, 0), (8, 6), (8, 9), (9, 0)],
        (12, 0): [(12, 0)],
    }
    assert build.front_ends([(10, 0), (12, 0)]) == {(10, 0): [(10, 0)], (12, 0): [(12, 0)]}
    sources = [path for path in build.CSRC.glob("*.*") if path.suffix != ".py"]
    assert len(sources) > 10
    assert [path.name for path in sources if "__CUDA_ARCH" in path.read_text()] == []


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


def test_nvcc_refuses_a_newer_compiler(
    plan: build.BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc's own header says so, of a g++ that gives itself out as one of the future."""
    newer = tmp_path / "g++-99"
    newer.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    newer.chmod(0o755)
    monkeypatch.setenv("CXX", str(newer))
    other = plan._replace(folder=tmp_path / "objects")
    message = r"nvcc .* takes g\+\+ up to \d+, .*g\+\+-99 is newer; .*CXX="
    with pytest.raises(NoToolkit, match=message):
        build.run(other, other.objects[:1])


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
    assert toolkit.cxx() == ["g++", "-m64"]
    monkeypatch.delenv("CXX")
    assert toolkit.cxx() == ["g++"]


def test_the_program(tmp_path: Path) -> None:
    """``--nvcc`` says where nvcc is; without one it fails and says so."""
    command = [sys.executable, "-m", "csrc.build", "--nvcc"]
    nvcc = nvcc_in(tmp_path)
    environ = {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    assert done.stdout.strip() == str(nvcc)
    environ = {"CUDA_HOME": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("csrc.build: there is no bin/nvcc in CUDA_HOME=/nowhere")
