"""Without pytest-benchmark the timed tests of this folder are skipped; ``python -m bench`` runs."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark() -> None:
        pytest.skip("pytest-benchmark is not installed; python -m bench measures without it")
