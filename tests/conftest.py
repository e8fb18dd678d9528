"""Fixtures that several parts share."""

from __future__ import annotations

import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cmpose.ops.backends import OPS
from tests import cuda_on_cpu
from tests.ops.support import interpreter
from tests.zygote import Zygote

# Two processes of two threads each would wait for one another on two cores; so would the commands
# that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # Inductor would start processes beside these, each of which imports torch.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    # Going through all of torch's and sympy's objects took a tenth of the time of what compiles.
    gc.set_threshold(700, 10, 100)
else:
    torch.set_num_threads(2)

# A shell that starts the tests in the background has them, and the commands that they start, ignore
# this signal, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Convolutions of float32 are TF32's otherwise, which are no measure for float32.
if torch.cuda.is_available():
    torch.backends.cudnn.allow_tf32 = False

# Without a GPU the Triton kernels run in Triton's interpreter. It must be asked for before Triton
# is imported, so for the whole test process.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        interpreter.quicken()
    # The CUDA kernels are compiled for the CPU; without g++ the other backends are tested.
    if "CMPOSE_CUDA_ON_CPU" not in os.environ and cuda_on_cpu.compiler() is not None:
        os.environ["CMPOSE_CUDA_ON_CPU"] = str(cuda_on_cpu.build())


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """Of what the files before have imported nothing has to be collected: hunts and benchmarks
    collect again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def rendered(tmp_path_factory) -> Path:
    """A rendered data set: 2 training and 1 held-out sequence of 4 small frames."""
    from cmpose.render.dataset import render_dataset  # OpenCV, which ops and kernels do without

    root = tmp_path_factory.mktemp("rendered") / "data"
    for split, videos in (("train", 2), ("val", 1)):
        render_dataset(
            root, videos=videos, frames=4, seed=3, size=(144, 256), split=split, progress=False
        )
    return root


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs commands that are killed or held at a rename, see ``tests/zygote.py``."""
    started = Zygote()
    yield started
    started.close()


# Of two processes none should be left alone with a long file at the end.
_LONGEST = (
    "ops/test_contract.py",
    "test_demo.py",
    "train/test_real_people.py",
    "models/test_backends.py",
    "test_outputs.py",
    "train/test_parallel.py",
    "csrc/test_dpc_knn.py",
    "csrc/test_sanitized.py",
    "csrc/test_compile_check.py",  # CI compiles before and beside the tests
    "kernels/test_compile_check.py",
    "test_packaging.py",
    "train/test_train.py",
    "study/test_ablate.py",
    "train/test_speed.py",
    "bench/test_gpu.py",
    "models/test_export.py",
    # Of middle length, but last in the alphabet.
    "test_readme.py",
    "tools/test_hub.py",
    "train/test_prediction.py",
    "train/test_products.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts with the files that take longest."""
    rank = {f"tests/{file}": position for position, file in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


_CONTRACT = ("tests/ops/test_contract.py", "tests/ops/test_arguments.py")
_passed: Counter[str] = Counter()
_compiled: list[str] = []
_tried: dict[str, int] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts the op contract's cases, what the compile checks compiled, and the hunts' inputs.

    Here, not beside those tests: of a parallel run the reporting process loads this file only.
    """
    if report.when == "call":
        _compiled.extend(str(v) for name, v in report.user_properties if name == "compiled")
        for name, value in report.user_properties:
            if name == "inputs tried":
                test = report.nodeid.removeprefix("tests/")
                _tried[test] = _tried.get(test, 0) + int(str(value))
    file, _, parameters = report.nodeid.partition("[")
    op = next((op for op in OPS if op in parameters), None)
    if op and file.startswith(_CONTRACT) and report.when == "call" and report.passed:
        _passed[op] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _passed:
        terminalreporter.section("op contract: cases that passed")
        for op in OPS:
            terminalreporter.line(f"{op:22} {_passed[op]}")
    if _compiled:
        terminalreporter.section("kernels compiled by the compile checks")
        for line in sorted(_compiled):
            terminalreporter.line(line)
    if _tried:
        terminalreporter.section("inputs that the hunts tried")
        for test in sorted(_tried):
            terminalreporter.line(f"{_tried[test]:7} {test}")
        terminalreporter.line(f"{sum(_tried.values()):7} in all")
