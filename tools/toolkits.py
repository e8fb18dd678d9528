"""Compiles the CUDA sources with older toolkits: ``python -m tools.toolkits FOLDER ...``.

Pip has every toolkit's headers and ptxas, but nvcc itself only from CUDA 13 on. So clang takes
nvcc's place: it compiles the sources against a toolkit's headers, host code and device code, and
the toolkit's own ptxas makes machine code for every architecture that it knows. A folder is what
``pip install --target FOLDER --no-deps`` has made of ``nvidia-cuda-nvcc-cu12``,
``nvidia-cuda-runtime-cu12`` and ``nvidia-cuda-cccl-cu12``, or of the same of cu11. Nothing is kept.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from csrc.build import CSRC
from tests.csrc.compile_check import Row, parse

ARCHS = (80, 86, 89, 90, 100, 120)
PARTS = ("cuda_nvcc", "cuda_runtime", "cuda_cccl")


class ToolkitError(Exception):
    """A toolkit is not whole, or the sources do not compile with it."""


def joined(folder: Path, root: Path) -> Path:
    """Pip's packages of a toolkit in the one folder that clang's ``--cuda-path`` wants.

    Raises:
        ToolkitError: a package is missing.
    """
    for part in PARTS:
        source = folder / "nvidia" / part
        if not (source / "include").is_dir():
            package = f"nvidia-{part.replace('_', '-')}-cu12 (or -cu11)"
            raise ToolkitError(f"{folder}: has no nvidia/{part}; pip install --target it {package}")
        shutil.copytree(source / "include", root / "include", dirs_exist_ok=True, symlinks=True)
    nvcc = folder / "nvidia" / "cuda_nvcc"
    (root / "bin").symlink_to(nvcc / "bin")
    (root / "nvvm").symlink_to(nvcc / "nvvm")
    # Clang includes cuRAND's header, for its own sake: no source of ours uses it.
    (root / "include" / "curand_mtgp32_kernel.h").touch()
    return root


def ran(command: Sequence[str | Path]) -> str:
    """What a command printed.

    Raises:
        ToolkitError: it failed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolkitError(f"{words[0]}: does not run: {error.strerror}") from None
    if done.returncode:
        raise ToolkitError(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(root: Path, clang: str, source: Path) -> list[Row]:
    """A source's kernels on each architecture that clang and the toolkit know.

    Raises:
        ToolkitError: host code or device code does not compile.
    """
    ptxas = root / "bin" / "ptxas"
    of_ptxas = {int(arch) for arch in re.findall(r"'sm_(\d+)'", ran([ptxas, "--help"]))}
    flags: list[str | Path] = [
        clang,
        "-xcuda",
        f"--cuda-path={root}",
        "-std=c++17",
        "-O3",
        "-I",
        CSRC,
        "-w",
    ]
    ran([*flags, "--cuda-host-only", "-fsyntax-only", source])
    targets = ran([clang, "--target=nvptx64-nvidia-cuda", "-print-supported-cpus"])
    of_clang = {int(arch) for arch in re.findall(r"\bsm_(\d+)\b", targets)}
    ptx = root / f"{source.stem}.ptx"
    rows = []
    for arch in ARCHS:
        if arch not in of_ptxas:
            continue
        # What is newer than clang gets machine code of the PTX before it, as from the driver.
        if arch in of_clang:
            ran(
                [*flags, "--cuda-device-only", f"--offload-arch=sm_{arch}", "-S", source, "-o", ptx]
            )
        resources = ran([ptxas, "-v", f"-arch=sm_{arch}", ptx, "-o", root / "cubin"])
        rows += parse(source.stem, resources)
    return rows


def line(version: str, rows: list[Row]) -> str:
    """A toolkit's row of the table."""
    archs = sorted({row.arch for row in rows})
    spilled = sum(row.spill_stores + row.spill_loads > 0 for row in rows)
    kernels = len({row.kernel for row in rows})
    return (
        f"| {version} | {', '.join(f'sm_{arch}' for arch in archs)} | {kernels} | "
        f"{max(row.registers for row in rows)} | {spilled} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.toolkits", description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--clang", default="clang++-19", help="clang with CUDA's mode")
    options = parser.parse_args(argv)
    print("| CUDA | machine code for | kernels | most registers | kernels that spill |")
    print("|---|---|---|---|---|")
    for folder in options.folders:
        with tempfile.TemporaryDirectory() as scratch:
            try:
                root = joined(folder.resolve(), Path(scratch))
                text = ran([root / "bin" / "ptxas", "--version"])
                version = re.search(r"V([\d.]+)", text)
                rows = []
                for source in sorted(CSRC.glob("*.cu")):
                    rows += compiled(root, options.clang, source)
            except ToolkitError as error:
                print(f"tools.toolkits: {error}", file=sys.stderr)
                return 1
        print(line(version[1] if version else "?", rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
