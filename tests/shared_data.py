"""Real sample data for tests: where it lies, and what happens when it is not there."""

from __future__ import annotations

import os
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
