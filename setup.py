"""Build script of cmpose. It never imports torch, so `pip install .` works in any environment.

The folders ``kernels/`` and ``configs/`` at the top of the repository are installed as
``cmpose.kernels`` and ``cmpose.configs``. Where nvcc is found, the CUDA C++ core ``cmpose._C`` is
built from ``csrc/`` (see ``csrc/build.py``); ``CMPOSE_BUILD_CUDA=0`` forbids it, ``=1`` demands it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
sys.path.insert(0, str(CSRC))
import build as core  # noqa: E402


def why_not() -> str | None:
    """Why the core is not built, or None if it is."""
    wish = os.environ.get("CMPOSE_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(
            f"error: CMPOSE_BUILD_CUDA={wish}: must be 0 (no CUDA core), 1 (demand it), or unset"
        )
    if wish:
        return "CMPOSE_BUILD_CUDA=0" if wish == "0" else None
    try:
        core.find_nvcc()
    except core.BuildError as error:
        return str(error)
    return None


REASON = why_not()
SOURCES = [f"csrc/{path.name}" for path in [*sorted(CSRC.glob("*.cu")), CSRC / "bindings.cpp"]]


class BuildPython(build_py):
    """Says so when the core is left out, and leaves none from an earlier editable install."""

    def run(self) -> None:
        super().run()
        if REASON is None:
            return
        print(f"cmpose: without its CUDA core cmpose._C: {REASON}", flush=True)
        if self.editable_mode:
            for stale in (CSRC.parent / "cmpose").glob("_C.*.so"):
                stale.unlink()


class BuildCore(build_ext):
    """Builds the core with csrc/build.py, whose objects outlive pip's temporary folders."""

    def build_extension(self, ext: Extension) -> None:
        try:
            built = core.build(core.plan())
        except core.BuildError as error:
            raise CompileError(
                f"cmpose._C: {error}\nCMPOSE_BUILD_CUDA=0 installs cmpose without its CUDA core."
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


setup(
    packages=[
        *find_packages(include=["cmpose", "cmpose.*"]),
        "cmpose.kernels",
        "cmpose.configs",
        "cmpose.report.assets",
    ],
    package_dir={
        "cmpose": "cmpose",
        "cmpose.kernels": "kernels",
        "cmpose.configs": "configs",
    },
    package_data={
        "cmpose.configs": ["*.yaml"],
        "cmpose": ["py.typed"],
        "cmpose.models": ["packaged/*/*"],  # models by name
        "cmpose.report.assets": ["*"],  # what cmpose report makes pages of
    },
    cmdclass={"build_ext": BuildCore, "build_py": BuildPython},
    ext_modules=[Extension("cmpose._C", SOURCES)] if REASON is None else [],
)
