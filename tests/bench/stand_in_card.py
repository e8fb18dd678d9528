"""A card of 24 GB that is not there, for a rehearsal of ``make gpu``.

What is asked of torch for a card is answered here, and what is asked to lie on the card lies in the
machine's memory: every line of ``bench.gpu``, ``bench`` and ``bench.train_step`` runs as on a card,
at small sizes. Times and memory are no card's. It is for a process of its own, which
:func:`rehearse` changes for good.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo  # it looks at what is replaced here
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import __main__ as program
from bench import train_step
from bench.gpu import __main__ as gpu
from bench.gpu import items, stages
from bench.harness import measure, op_tests, timing
from bench.harness.workload import Draw, OpBench
from cmpose.config import ModelConfig
from cmpose.ops import backends
from cmpose.train import step as training
from cmpose.train.cards import RTX_4090

CARD = "NVIDIA GeForce RTX 4090, a stand-in"
FREE, WHOLE = 23_500_000_000, 25_250_627_584
OPS = ("select_tokens",)
"""With a CUDA C++ kernel; the rest would only take longer."""
TESTS = ("tests/ops/test_select_tokens.py",)
STEPS = ("base eager reference", "huge ours compiled in a CUDA graph, fp8")


# -- torch's part ---------------------------------------------------------------------------------


def here(device: Any) -> Any:
    """A device of the card as one of this machine; anything else as it is."""
    of_card = isinstance(device, torch.device) and device.type == "cuda"
    return torch.device("cpu") if of_card or device == "cuda" else device


class InMemory(TorchFunctionMode):
    """Tensors that are to lie on the card lie in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if "device" in given:
            given["device"] = here(given["device"])
        elif func in (Tensor.to, torch.device):
            args = [here(argument) for argument in args]
        return func(*args, **given)


TICKS = itertools.count(1)


def now() -> float:
    """Seconds: a look at the clock takes a tenth of a millisecond, and nothing else does."""
    return 1e-4 * next(TICKS)


class Stream:
    """Does at once what it is given."""

    device = torch.device("cuda")

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = now()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.seconds - self.seconds)


class Graph:
    """What is captured runs once, while it is captured; a replay does nothing."""

    def replay(self) -> None:
        pass


def put_a_card_in() -> None:
    """Answers for torch and the driver."""
    card = SimpleNamespace(
        name=CARD, major=8, minor=9, total_memory=WHOLE, L2_cache_size=1 << 12,
        multi_processor_count=128,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: CARD,
        "get_device_capability": lambda device=None: (8, 9),
        "get_device_properties": lambda device=None: card,
        "mem_get_info": lambda device=None: (FREE, WHOLE),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1_000_000,
        "reset_peak_memory_stats": lambda device=None: None,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, **options: contextlib.nullcontext(),
        "_sleep": lambda cycles: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # Optimizers ask it; a torch built for CUDA would look for a driver.
    torch.accelerator.current_stream = lambda device=None: SimpleNamespace(
        is_capturing=lambda: False
    )
    # Compiling for a CPU takes long, and is no card's code.
    torch.compile = lambda function, **options: function


# -- the project's part ---------------------------------------------------------------------------


def kernels_run_here() -> None:
    """Kernels that run on this machine's CPU for tests count as those of the card."""
    for name in ("triton", "cuda"):
        without = backends._WITHOUT[name]
        backends._WITHOUT[name] = lambda device, without=without: without(here(device))
    names, check, profile = measure.kernel_names, measure.check_ran, timing.profile
    measure.kernel_names = lambda call, device: names(call, "cpu")
    measure.check_ran = lambda peer, found, device: check(peer, found, "cpu")
    start, draw = timing.Clock.__init__, Draw.__init__
    timing.Clock.__init__ = lambda clock: start(clock, now)
    Draw.__init__ = lambda self, dtype, device, seed=0: draw(self, dtype, here(device), seed)
    train_step.card_of = lambda name: RTX_4090
    training.capture_on = training.CudaCapture
    parts = train_step.seconds_by_part
    train_step.seconds_by_part = lambda events, device: parts(events, "cpu")
    timing.profile = lambda call, device, **options: profile(call, "cpu", **options)


def make_it_small() -> None:
    """Every size, and how often it is measured."""
    measure.setting_of = lambda full, device, peers: measure.Setting(
        full=full, turns=1, seconds=0.0, peers=peers, compiled=False
    )
    rates = timing.measure_rates
    timing.measure_rates = lambda device: rates(device, side=32, copied=4096)
    program.OPS = items.OPS = OPS
    arguments = OpBench.arguments

    def small(bench: OpBench, workload: Any, device: str, seed: int = 0) -> Any:
        return arguments(bench, measure.replace(workload, shape=bench.small), device, seed)

    OpBench.arguments = small
    cases = program.wanted_workloads
    program.wanted_workloads = lambda *given: cases(*given)[:3]
    train_step.model_config = lambda backbone: ModelConfig(
        backbone="tiny", depth=1, image_size=(64, 48), num_keypoints=2, tokens_per_keypoint=2,
        num_clusters=3, neighbors=2, head_channels=8,
    )  # fmt: skip
    train_step.BATCH.update(base=2, huge=2)
    train_step.GROUPS["cuda"] = (1, 1)
    of_op = op_tests.command
    op_tests.command = lambda op: [*of_op(op)[:-1], f"{op} and test_empty"]
    tests, sanitize, train = items.tests, items.sanitize, items.train
    items.tests = lambda options: [i for i in tests(options) if i.name in TESTS]
    items.train = lambda options: [i for i in train(options) if i.name in STEPS]
    items.SANITIZED = "test_empty"
    items.sanitize = lambda options: [i for i in sanitize(options) if "tests/csrc" not in i.name]


class Forked:
    """In place of ``subprocess.Popen``: a Python module in a process forked from this one."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> None:
        self.began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
                os.environ.clear()
                os.environ.update(env)
                with InMemory():  # which is a thread's own
                    status = run_module(command)
            finally:
                sys.stdout.flush()
                os._exit(status)

    def wait(self, timeout: float = 100.0) -> int:
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() - self.began > timeout:
                raise subprocess.TimeoutExpired("forked", timeout)
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(ended[1])


def run_module(command: list[str]) -> int:
    """``python -m MODULE ...``, also behind compute-sanitizer: its exit status."""
    if sys.executable not in command:
        raise FileNotFoundError(command[0])
    python = command.index(sys.executable)
    if command[python + 1] == "-c":
        exec(command[python + 2], {})
        return 0
    module, *arguments = command[python + 2 :]
    print("ran:", command[:python], module, *arguments, flush=True)
    if module == "csrc.build":  # takes a minute, and would put a core into the checkout
        return 0 if os.environ["CMPOSE_CUDA_ARCHS"] == "8.9" else 1
    sys.argv = [module, *arguments]
    main = {"bench": program.main, "bench.train_step": train_step.main, "pytest": pytest.main}
    try:
        return int(main[module](arguments))
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        return 1


def forked_run(command: list[str], *, env: dict[str, str], **_: Any) -> None:
    with open(os.devnull, "w") as nowhere:
        Forked(command, env=env, stdout=nowhere).wait()


def rehearse(work: Path, *options: str) -> None:
    """``make gpu`` on the card; exits as it does.

    Args:
        work: folder that gets logs, state and results.
        options: of ``python -m bench.gpu``.
    """
    warnings.filterwarnings("ignore")
    put_a_card_in()
    kernels_run_here()
    make_it_small()
    pieces = {"TimeoutExpired": subprocess.TimeoutExpired, "STDOUT": subprocess.STDOUT}
    stages.subprocess = SimpleNamespace(Popen=Forked, **pieces)
    op_tests.subprocess = SimpleNamespace(run=forked_run, **pieces)
    items.shutil = SimpleNamespace(which=lambda name: f"/bin/{name}")
    given = ["--work", str(work), "--results", str(work / "results.json"), "--workers", "64"]
    sys.exit(gpu.main([*given, *options]))


if __name__ == "__main__":
    rehearse(Path(sys.argv[1]), *sys.argv[2:])
