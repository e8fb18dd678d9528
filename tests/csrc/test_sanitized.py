"""The CUDA sources under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

The op contract's cases of backend cuda, and the tests that are marked ``sanitized``. An access out
of bounds, or undefined behaviour, ends that process; test_cuda_on_cpu.py plants both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import cuda_on_cpu
from tests.ops.cases import CASES
from tests.shared_data import PROJECT

CUDA_OPS = ("select_tokens", "dpc_knn", "merge_clusters", "unmerge_tokens")

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++")


def run(*arguments: str) -> int:
    """How many tests passed; all must."""
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
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    summary = done.stdout.strip().splitlines()[-1]
    found = re.match(r"(\d+) passed, \d+ deselected(, \d+ warnings?)? in", summary)
    assert found, summary
    return int(found[1])


def test_the_contract() -> None:
    """But for torch.compile, which calls the same kernels."""
    passed = run("tests/ops/test_contract.py", "-k", "cuda and not one_graph and not opcheck")
    assert passed >= 10 * sum(bool(CASES[op].gradients) for op in CUDA_OPS)


def test_what_is_marked() -> None:
    assert run("tests/csrc", "-m", "sanitized") > 80
