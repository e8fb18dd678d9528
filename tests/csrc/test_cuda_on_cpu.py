"""Each kind of fault that running CUDA sources on the CPU should catch is planted and caught."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests import cuda_on_cpu
from tests.shared_data import PROJECT

PLANTED = cuda_on_cpu.HERE / "planted"
ORDERS = ("forward", "backward", "7")

pytestmark = pytest.mark.skipif(cuda_on_cpu.compiler() is None, reason="needs g++")


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def planted() -> ModuleType:
    return load(cuda_on_cpu.build(source=PLANTED, includes=(cuda_on_cpu.CSRC,)))


def run(planted: ModuleType, name: str, fault: int = 0) -> torch.Tensor:
    values = torch.arange(80.0)
    out = torch.full((64,), -1.0)
    planted.planted(name, values.data_ptr(), out.data_ptr(), fault)
    return out


def ring() -> torch.Tensor:
    """What copy_ring gives."""
    i = torch.arange(64.0)
    return 4 * ((i + 1) % 64) + 4 * (0 + 1 + 2 + 3)


@pytest.mark.parametrize("copies", ["late", "early"])
@pytest.mark.parametrize("order", ORDERS)
def test_without_a_fault(
    planted: ModuleType, order: str, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", copies)
    assert torch.equal(run(planted, "copy_ring"), ring())
    i = torch.arange(64.0)
    assert torch.equal(run(planted, "rotate"), i.roll(-1))
    assert torch.equal(run(planted, "reverse_twice"), i.flip(0))
    assert torch.equal(run(planted, "divergent_barrier"), torch.ones(64))
    swapped = i[:32].reshape(16, 2).flip(1).flatten()
    assert torch.equal(run(planted, "shuffle")[:32], swapped)
    assert torch.equal(run(planted, "copy"), i)
    assert torch.equal(run(planted, "out_of_bounds"), torch.ones(64))


def test_a_missing_barrier_reads_what_is_not_there(planted: ModuleType) -> None:
    """In the default order each thread reads its neighbour's value before it is written: NaN."""
    out = run(planted, "rotate", planted.MISSING_BARRIER)
    assert out[:63].isnan().all()


def test_a_missing_barrier_depends_on_the_order(
    planted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In reverse order the neighbours have written: the fault shows because the orders differ."""
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", "backward")
    out = run(planted, "rotate", planted.MISSING_BARRIER)
    assert torch.equal(out[:63], torch.arange(1.0, 64.0))
    assert out[63].isnan()


@pytest.mark.parametrize("order", ORDERS)
def test_a_buffer_used_again_without_a_barrier(
    planted: ModuleType, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    out = run(planted, "reverse_twice", planted.MISSING_SECOND_BARRIER)
    assert not torch.equal(out, torch.arange(64.0).flip(0))


def test_what_was_never_written_is_nan(planted: ModuleType) -> None:
    out = run(planted, "rotate", planted.LATE_WRITE)
    assert out.isnan().nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize(
    ("name", "fault", "message"),
    [
        ("divergent_barrier", "DIVERGENT_BARRIER", "threads of a block wait at different barriers"),
        ("divergent_barrier", "HALF_AT_BARRIER", "not all threads reach a barrier"),
        ("shuffle", "LANE_OUTSIDE_MASK", "a lane is not in the mask of its warp collective"),
        ("shuffle", "LANE_MISSING", "not all threads reach a warp collective"),
        ("shuffle", "UNEQUAL_MASKS", "lanes of a warp collective have unequal masks"),
        ("shuffle", "SOURCE_OUTSIDE_MASK", "a shuffle reads a lane outside its mask"),
        ("copy", "UNALIGNED_COPY", "cp.async from an unaligned address"),
        ("copy", "TOO_MUCH_SHARED", "asks for 101380 bytes of shared memory and may have 101376"),
    ],
)
def test_faults_are_named(planted: ModuleType, name: str, fault: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=rf"planted: .*{message}"):
        run(planted, name, getattr(planted, fault))
    assert torch.equal(run(planted, "copy"), torch.arange(64.0))  # the next launch is sound


def test_a_copy_that_is_not_waited_for(planted: ModuleType) -> None:
    assert run(planted, "copy", planted.MISSING_WAIT).isnan().all()


@pytest.mark.parametrize("order", ["forward", "7"])
def test_a_buffer_that_a_copy_refills_too_early(
    planted: ModuleType, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that arrive late hide it; those that arrive at once overwrite what is still read.

    (Not backward: there the threads that copy come last.)
    """
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    monkeypatch.setenv("CUDA_ON_CPU_COPIES", "early")
    assert not torch.equal(run(planted, "copy_ring", planted.MISSING_RING_BARRIER), ring())


# -- with sanitizers, which end the process -------------------------------------------------------

SANITIZED = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_C", sys.argv[1])
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)
values, out = np.arange(80, dtype=np.float32), np.zeros(64, np.float32)
fault = getattr(planted, sys.argv[2]) if sys.argv[2] != "NONE" else 0
planted.planted("out_of_bounds", values.ctypes.data, out.ctypes.data, fault)
print("ended", out.sum().item())
"""


def sanitized(fault: str) -> subprocess.CompletedProcess[str]:
    module = cuda_on_cpu.build(sanitize=True, source=PLANTED, includes=(cuda_on_cpu.CSRC,))
    return subprocess.run(
        [sys.executable, "-c", SANITIZED, str(module), fault],
        env=os.environ | cuda_on_cpu.sanitizer_settings(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("GLOBAL_OUT_OF_BOUNDS", "heap-buffer-overflow"),
        ("SHARED_OUT_OF_BOUNDS", "use-after-poison"),
        ("OVERFLOW", "signed integer overflow"),
    ],
)
def test_sanitizers_end_the_process(fault: str, message: str) -> None:
    done = sanitized(fault)
    assert done.returncode != 0
    assert message in done.stderr
    assert "planted.cu" in done.stderr
    assert "ended" not in done.stdout


def test_sanitizers_are_content_with_what_is_sound() -> None:
    done = sanitized("NONE")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ended 64.0\n"


def test_a_module_is_compiled_once_for_all_processes() -> None:
    """Its key is the same in each, whatever order sets of strings have there."""
    command = [sys.executable, "-m", "tests.cuda_on_cpu"]
    paths = {
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.PIPE, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(paths) == 1


# -- the sources ----------------------------------------------------------------------------------


def test_shared_memory_is_declared_in_one_place() -> None:
    """Elsewhere, on the CPU, ``__shared__`` would silently be a variable of each thread."""
    for path in [*cuda_on_cpu.CSRC.glob("*.cu*"), *PLANTED.glob("*.cu")]:
        text = re.sub(r"//.*", "", path.read_text())
        expected = 1 if path.name == "device.cuh" else 0
        assert text.count("__shared__") == expected, path.name


def test_nothing_waits_for_the_device_or_allocates() -> None:
    """They only launch kernels, so that a call can be captured in a CUDA graph."""
    allowed = {
        "cudaError_t",
        "cudaFuncAttributeMaxDynamicSharedMemorySize",
        "cudaFuncSetAttribute",
        "cudaGetErrorString",
        "cudaLaunchConfig_t",
        "cudaLaunchKernelEx",
        "cudaStream_t",
        "cudaSuccess",
    }
    for path in [*cuda_on_cpu.CSRC.glob("*.cu*"), *cuda_on_cpu.CSRC.glob("*.[ch]*")]:
        text = re.sub(r"//.*", "", path.read_text())
        used = set(re.findall(r"\bcuda[A-Z]\w*", text))
        assert used <= allowed, f"{path.relative_to(PROJECT)}: {used - allowed}"
        assert not re.search(r"\batomic(Add|Exch|CAS)|\b(malloc|new)\b", text), path.name
