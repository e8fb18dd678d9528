"""tools/wheel.py: its compiler, its environment, and what it lets no wheel be."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tools import wheel
from tools.wheel import WheelError

SAID = 'x.whl is consistent with the following platform tag: "manylinux_2_27_x86_64".'


def test_zig_links_and_this_machines_compiler_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc's words reach both, but those that zig does not know."""
    for name in ("g++", "zig"):
        path = tmp_path / f"the {name}"
        path.write_text(f'#!/bin/sh\ncase "$2" in -print*) echo l.a;; *) echo {name} "$@";; esac\n')
        path.chmod(0o755)
    monkeypatch.setenv("CXX", f"ccache '{tmp_path}/the g++' -m64")
    script = wheel.compiler(tmp_path, tmp_path / "the zig")

    def said(*words: str) -> str:
        return subprocess.run([script, *words], capture_output=True, text=True, check=True).stdout

    assert said("-c", "a b.cpp", "-Xlinker") == "g++ -m64 -c a b.cpp -Xlinker\n"
    linked = said("a.o", "-shared", "-Xlinker", "--exclude-libs", "-Xlinker", "ALL", "-lrt")
    assert linked == (
        "zig cc -target x86_64-linux-gnu.2.28 -s a.o -shared -lrt l.a l.a -lm "
        f"-Wl,--version-script={tmp_path}/exports\n"
    )


def test_a_build_sees_few_variables() -> None:
    passed_on = {"PATH": "/bin", "CUDA_HOME": "/cuda", "PIP_INDEX_URL": "x", "https_proxy": "y"}
    unseen = {"PYTHONPATH": "/x", "CFLAGS": "-O0", "TORCH_CUDA_ARCH_LIST": "8.9", "CXX": "c++"}
    assert wheel.environment({**passed_on, **unseen}) == passed_on


def test_pip_of_a_trial_sees_no_cmpose_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would install none."""
    monkeypatch.setenv("PYTHONPATH", "/a checkout")
    assert wheel.ran("sh", "-c", 'echo "<$PYTHONPATH>"') == "<>\n"
    assert wheel.ran("sh", "-c", 'echo "<$A>"', env={"A": "b"}) == "<b>\n"


BACKEND = """
import sys, zipfile
def build_wheel(folder, *_):
    name = "cmpose-0.1.0-cp{}{}-none-any.whl".format(*sys.version_info[:2])
    with zipfile.ZipFile(f"{folder}/{name}", "w") as archive:
        at = "cmpose-0.1.0.dist-info"
        archive.writestr("cmpose/_C.so", sys.prefix)
        archive.writestr(f"{at}/WHEEL", "Wheel-Version: 1.0")
        fields = "Metadata-Version: 2.1", "Name: cmpose", "Version: 0.1.0"
        archive.writestr(f"{at}/METADATA", "\\n".join(fields))
        archive.writestr(f"{at}/RECORD", "")
    return name
"""
AUDITWHEEL = f"""#!/bin/sh
case $1 in repair) mkdir "$6" && cp "$7" "$6";; *) echo '{SAID}';; esac
"""


def test_a_python_without_pip_gets_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's are without."""
    python = tmp_path / "python" / "bin" / "python"
    venv.create(tmp_path / "python", with_pip=False)
    monkeypatch.setattr(wheel, "FOLDER", tmp_path)
    monkeypatch.setattr(wheel, "_zig", lambda bin: bin / "zig")
    monkeypatch.setattr(wheel, "compiler", lambda folder, zig: folder / "c++")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "auditwheel").write_text(AUDITWHEEL)
    for tool in (tmp_path / "bin").iterdir():
        tool.chmod(0o755)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "backend.py").write_text(BACKEND)
    (tmp_path / "source" / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    out = tmp_path / "out"
    out.mkdir()
    built = wheel.wheel(str(python), tmp_path / "bin", out)
    assert [built] == list(out.iterdir())
    with zipfile.ZipFile(built) as archive:
        assert archive.read("cmpose/_C.so").decode() == str(tmp_path / "python")


def written(path: Path, **sizes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cmpose/", "")  # auditwheel names folders too
        for name, size in sizes.items():
            archive.writestr(f"cmpose/{name}.so", bytes(size))
    return path


def test_what_a_wheel_may_not_be(tmp_path: Path) -> None:
    path = tmp_path / "cmpose-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"
    written(path, **{"_C.cpython-311": wheel.LARGEST_CORE})
    wheel.check(path, SAID)
    assert wheel.row(path) == "| cp311-cp311-manylinux_2_28_x86_64 | 0.01 | 8.00 | 1 |"
    with pytest.raises(WheelError, match=r"is not for manylinux_2_28_x86_64: .*2_35"):
        wheel.check(path, SAID.replace("_27", "_35"))
    with pytest.raises(WheelError, match=r"is not for manylinux_2_28_x86_64: nothing"):
        wheel.check(path, "nothing")
    written(path, **{"_C.cpython-311": wheel.LARGEST_CORE + 1})
    with pytest.raises(WheelError, match="its core has 8000001 bytes, more than 8000000"):
        wheel.check(path, SAID)
    written(path, **{"_C.cpython-311": 1, "libtorch": 1})
    with pytest.raises(WheelError, match="must have one library, the core, not "):
        wheel.check(path, SAID)
    written(path, other=1)
    with pytest.raises(WheelError, match="must have one library, the core, not "):
        wheel.check(path, SAID)


def test_a_command_that_fails_is_shown() -> None:
    with pytest.raises(WheelError, match=r"sh -c 'echo no; exit 3'\nno\n"):
        wheel.ran("sh", "-c", "echo no; exit 3")
