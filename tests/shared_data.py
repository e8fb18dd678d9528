"""What tests need of a machine and skip without: sample data, git's list of files, OpenCV 4."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]


def shared_data(*parts: str) -> Path:
    """Path below the sample-data folder; skips the test when a user has none.

    ``CMPOSE_SHARED_DATA`` names the folder (default ``../shared/data`` from the project's root);
    ``CMPOSE_REQUIRE_SHARED_DATA=1``, which CI sets, turns its absence into a failure.
    """
    root = Path(os.environ.get("CMPOSE_SHARED_DATA", PROJECT.parent / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        message = f"no sample data at {path}: set CMPOSE_SHARED_DATA to the folder that holds it"
        if os.environ.get("CMPOSE_REQUIRE_SHARED_DATA") == "1":
            pytest.fail(message)
        pytest.skip(message)
    return path


def project_files(*patterns: str) -> list[Path]:
    """The checkout's files, those too that are not added yet; skips the test in a copy without git.

    Args:
        patterns: git's; none: all files.
    """
    needs_git()
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z", *patterns]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return [PROJECT / name for name in done.stdout.split("\0") if (PROJECT / name).is_file()]


def needs_git() -> None:
    """Skips the test in a copy of the project without git."""
    if not (PROJECT / ".git").exists():
        pytest.skip(f"{PROJECT} is no git checkout")


def needs_opencv_4() -> None:
    """Skips the test with OpenCV 5, which pyproject.toml refuses: its warps do not take 4's steps
    of 1/32 pixel, which those of tensors take too."""
    import cv2  # which ops and kernels do without

    if not cv2.__version__.startswith("4."):
        pytest.skip(f"pyproject.toml asks for OpenCV 4, this is {cv2.__version__}")
