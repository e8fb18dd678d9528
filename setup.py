"""Build script of cmpose. It never imports torch, so `pip install .` works in any environment.

The folders ``kernels/`` and ``configs/`` at the top of the repository are installed as
``cmpose.kernels`` and ``cmpose.configs``. Where nvcc is found, the CUDA C++ core ``cmpose._C`` is
built from ``csrc/`` (see ``csrc/build.py``); ``CMPOSE_BUILD_CUDA=0`` forbids it, ``=1`` demands it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PROJECT = Path(__file__).resolve().parent
sys.path.insert(0, str(PROJECT))
from csrc import build as core  # noqa: E402

WISH = os.environ.get("CMPOSE_BUILD_CUDA", "")
if WISH not in ("", "0", "1"):
    raise SystemExit(
        f"error: CMPOSE_BUILD_CUDA={WISH}: must be 0 (no CUDA core), 1 (demand it), or unset"
    )


def why_not() -> str | None:
    """Why the core is not built, or None if it is, or if its build is to say why not."""
    if WISH:
        return "CMPOSE_BUILD_CUDA=0" if WISH == "0" else None
    try:
        core.plan()
    except core.NoToolkit as error:
        return str(error)
    except core.BuildError:
        return None
    return None


REASON = why_not()
SOURCES = [
    f"csrc/{path.name}" for path in [*sorted(core.CSRC.glob("*.cu")), core.CSRC / "bindings.cpp"]
]


def leave_out(package: Path, reason: str) -> None:
    """Says that a package is without its core, and lets it say so itself: pip hides what is
    printed."""
    print(f"cmpose: without its CUDA core cmpose._C: {reason}", flush=True)
    for stale in package.glob("_C.*.so"):
        stale.unlink()
    if WISH != "0":
        (package / core.NO_CORE).write_text(reason)


class BuildPython(build_py):
    """Removes what an earlier build left of the core, and says so when it is left out."""

    def run(self) -> None:
        super().run()
        package = PROJECT / "cmpose" if self.editable_mode else Path(self.build_lib) / "cmpose"
        (package / core.NO_CORE).unlink(missing_ok=True)
        if REASON is not None:
            leave_out(package, REASON)


class BuildCore(build_ext):
    """Builds the core with csrc/build.py, whose objects outlive pip's temporary folders."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            built = core.build(core.plan())
        except core.BuildError as error:
            if isinstance(error, core.NoToolkit) and not WISH:
                inplace = PROJECT / "cmpose" if self.editable_mode else target.parent
                return leave_out(inplace, str(error))
            # Not an error that setuptools knows: of an optional extension it would be a warning.
            raise SystemExit(
                f"error: cmpose._C: {error}\n"
                "CMPOSE_BUILD_CUDA=0 installs cmpose without its CUDA core."
            ) from None
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(built, target)


MODELS = find_namespace_packages(include=["cmpose.models.packaged.*"])  # by name

setup(
    packages=[
        *find_packages(include=["cmpose", "cmpose.*"]),
        "cmpose.kernels",
        "cmpose.configs",
        "cmpose.report.assets",
        *MODELS,
    ],
    package_dir={
        "cmpose": "cmpose",
        "cmpose.kernels": "kernels",
        "cmpose.configs": "configs",
    },
    package_data={
        "cmpose.configs": ["*.yaml"],
        "cmpose": ["py.typed"],
        **{model: ["*"] for model in MODELS},
        "cmpose.report.assets": ["*"],  # what cmpose report makes pages of
    },
    cmdclass={"build_ext": BuildCore, "build_py": BuildPython},
    ext_modules=[Extension("cmpose._C", SOURCES, optional=not WISH)] if REASON is None else [],
)
