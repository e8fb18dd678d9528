"""A card of 24 GB that is not there, for a rehearsal of ``make gpu``.

What is asked of torch for a card is answered here, and what is asked to lie on the card lies in the
machine's memory: every line of ``bench.gpu``, ``bench`` and ``bench.train_step`` runs as on a card,
at small sizes. Times and memory are no card's. It is for a process of its own, which
:func:`rehearse` changes for good.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.thread import _threads_queues
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch._dynamo  # it looks at what is replaced here
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import __main__ as program
from bench import select_tokens, train_step
from bench.gpu import __main__ as gpu
from bench.gpu import items, stages
from bench.gpu.stages import Item
from bench.harness import measure, op_tests, timing
from bench.harness.workload import Draw
from cmpose.ops import backends
from cmpose.train import step as training
from cmpose.train.cards import RTX_4090
from tests import cuda_on_cpu
from tests.bench.samples import tiny

CARD = "NVIDIA GeForce RTX 4090, a stand-in"
KEPT = ("tests/ops/test_select_tokens.py", "compute-sanitizer", "memcheck select_tokens",
        "racecheck select_tokens", "base eager reference",
        "huge ours compiled in a CUDA graph, fp8")  # fmt: skip
"""Items of stages; the rest would only take longer."""


def here(value: Any) -> Any:
    """A device of the card, or its name, as this machine's; anything else as it is."""
    of_card = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return type(value)("cpu") if of_card else value


class InMemory(TorchFunctionMode):
    """Tensors that are to lie on the card lie in memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.to, torch.device):
            args = map(here, args)
        return func(*args, **{name: here(value) for name, value in (kwargs or {}).items()})


class Event:
    """From one event to the next is a tenth of a millisecond."""

    ticks = itertools.count(1)

    synchronize = Mock()

    def __init__(self, enable_timing):
        self.time = 0

    def record(self):
        self.time = next(self.ticks)

    def elapsed_time(self, end):
        return 0.1 * (end.time - self.time)


def put_a_card_in() -> None:
    """Answers for torch and the driver."""
    # A small cache, so that few sets of inputs are cold.
    card = SimpleNamespace(name=CARD, major=8, minor=9, total_memory=25_250_627_584,
                           L2_cache_size=1024, multi_processor_count=128)  # fmt: skip
    answers = {
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "synchronize", "_sleep")),
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": CARD,
        "get_device_capability": (8, 9), "get_device_properties": card, "memory_allocated": 0,
        "max_memory_allocated": 1_000_000, "mem_get_info": (23_500_000_000, card.total_memory),
        # What is captured runs once, while it is captured; a replay does nothing.
        "Stream": Mock(), "current_stream": Mock(), "CUDAGraph": Mock(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, Mock(return_value=answer))
    torch.cuda.stream = torch.cuda.graph = lambda *_, **__: nullcontext()
    torch.cuda.Event = Event
    # Optimizers ask it; a torch built for CUDA would look for a driver.
    stream = SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda device=None: stream
    # Compiling for a CPU takes long, and is no card's code.
    torch.compile = lambda function, **options: function


def make_it_run_here() -> None:
    """Kernels that run on this machine's CPU for tests count as those of the card."""

    def take_as_here(owner: Any, name: str) -> None:
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: function(*map(here, args), **kwargs))

    without_cuda = backends._WITHOUT["cuda"]
    backends._WITHOUT["cuda"] = lambda device: without_cuda(here(device))
    take_as_here(measure, "kernel_names")
    take_as_here(measure, "check_ran")
    take_as_here(timing, "profile")
    take_as_here(train_step, "seconds_by_part")
    take_as_here(Draw, "__init__")
    train_step.card_of = lambda name: RTX_4090
    training.capture_on = training.CudaCapture


def make_it_small() -> None:
    """Every size, and how often it is measured."""
    setting = measure.Setting(turns=1, seconds=0.0, compiled=False)
    measure.setting_of = lambda *given: setting
    timing.measure_rates = partial(timing.measure_rates, side=32, copied=4096)
    program.OPS = items.OPS = ("select_tokens",)  # with a CUDA C++ kernel
    select_tokens.BENCH = replace(select_tokens.BENCH, shapes=[select_tokens.BENCH.small])
    train_step.model_config = lambda backbone: tiny()
    train_step.BATCH.update(base=2, huge=2)
    train_step.GROUPS["cuda"] = (1, 1)
    of_op = op_tests.command
    op_tests.command = lambda op: [*of_op(op)[:-1], f"{op} and test_empty"]
    items.SANITIZED = "test_empty"
    for stage in ("tests", "sanitize", "train"):
        setattr(items, stage, partial(kept, getattr(items, stage)))


def kept(stage: Callable[[Any], list[Item]], options: Any) -> list[Item]:
    return [item for item in stage(options) if item.name in KEPT]


class Forked(multiprocessing.get_context("fork").Process):
    """In place of ``subprocess.Popen``: a Python module in a process forked from this one."""

    def __init__(self, command: list[str], *, env: dict, stdout: Any = None, **_: Any) -> None:
        with open(os.devnull, "w") as nowhere:
            output = (stdout or nowhere).fileno()
            super().__init__(target=run_module, args=(command, env, output))
            self.start()

    def wait(self, timeout: float | None = None) -> int | None:
        self.join(timeout)
        if self.is_alive():
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return self.exitcode


def run_module(command: list[str], environment: dict[str, str], output: int) -> None:
    """``python -m MODULE ...`` or ``python -c CODE``, also behind compute-sanitizer."""
    os.setsid()
    _threads_queues.clear()  # of the pool that has forked; those threads are not in this process
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment)
    python = command.index(sys.executable)
    option, module, *arguments = command[python + 1 :]
    print("ran:", command[:python], module, *arguments, flush=True)
    if option == "-c":
        exec(module, {})
    elif module == "csrc.build":  # takes a minute, and would put a core into the checkout
        sys.exit(os.environ["CMPOSE_CUDA_ARCHS"] != "8.9")
    else:
        sys.argv = [module, *arguments]
        main = {"bench": program.main, "bench.train_step": train_step.main, "pytest": pytest.main}
        with InMemory():  # which is a thread's own
            sys.exit(int(main[module](arguments)))


def rehearse(work: Path, *options: str) -> None:
    """``make gpu`` on the card; exits as it does.

    Args:
        work: folder that gets logs, state and results.
        options: of ``python -m bench.gpu``.
    """
    torch.set_num_threads(1)  # a forked process has no other thread
    torch._dynamo.reset()  # imports what each forked process would
    put_a_card_in()
    make_it_run_here()
    make_it_small()
    forked = {"Popen": Forked, "run": lambda *a, timeout, **kw: Forked(*a, **kw).wait(timeout)}
    stages.subprocess = op_tests.subprocess = SimpleNamespace(**vars(subprocess) | forked)
    items.shutil = SimpleNamespace(which=lambda name: f"/bin/{name}")
    gc.freeze()  # forked processes need not look through all of this
    given = ["--work", str(work), "--results", str(work / "results.json"), "--workers", "64"]
    sys.exit(gpu.main([*given, *options]))


if __name__ == "__main__":
    os.environ.setdefault("CMPOSE_CUDA_ON_CPU", str(cuda_on_cpu.build()))
    rehearse(Path(sys.argv[1]), *sys.argv[2:])
