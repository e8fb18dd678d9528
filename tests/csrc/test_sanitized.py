"""The CUDA sources under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

The op contract's cases of backend cuda, and the tests that are marked ``sanitized``. An access out
of bounds, or undefined behaviour, ends that process; test_cuda_on_cpu.py plants both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import cuda_on_cpu
from tests.ops.support.cases import CASES
from tests.shared_data import PROJECT

CUDA_OPS = ("select_tokens", "dpc_knn", "merge_clusters", "unmerge_tokens")

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++")


def test_kernels_under_sanitizers(tmp_path: Path) -> None:
    """All run in one process, because it takes long to start. Tests of the contract that call
    torch.compile are left out: they run the same kernels."""
    module = cuda_on_cpu.build(sanitize=True)
    environment = (
        os.environ
        | cuda_on_cpu.sanitizer_settings()
        | {
            "CMPOSE_CUDA_ON_CPU": str(module),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # a card would be tested instead
        }
    )
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]  # of a parallel run that this test is part of
    report = tmp_path / "found.xml"
    marked = "sanitized and not test_sanitized"  # a mark, not this file
    contract = "test_contract and cuda and not one_graph and not opcheck"
    chosen = f"({marked}) or ({contract})"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("tests/ops/test_contract.py", "tests/csrc", "-k", chosen, f"--junitxml={report}"),
        ],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    cases = list(ElementTree.parse(report).iter("testcase"))
    assert not [case for case in cases if len(case)], "none may be skipped"
    files = Counter(case.get("classname", "").partition(".test_")[0] for case in cases)
    assert files["tests.ops"] >= 10 * sum(bool(CASES[op].gradients) for op in CUDA_OPS)
    assert files["tests.csrc"] > 80
