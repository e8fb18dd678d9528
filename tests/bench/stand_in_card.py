"""A card of 24 GB that is not there, for a rehearsal of ``make gpu``.

What is asked of torch for a card is answered here, and what is asked to lie on the card lies in the
machine's memory: every line of ``bench.gpu``, ``bench`` and ``bench.train_step`` runs as on a card,
at small sizes. Times and memory are no card's. It is for a process of its own, which
:func:`rehearse` changes for good.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

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
        "racecheck select_tokens", "targets", "grid", "base eager reference",
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


class Event(Mock):
    """From one event to the next is a tenth of a millisecond."""

    ticks = itertools.count(1)

    def record(self) -> None:
        self.time = next(self.ticks)

    def elapsed_time(self, end: Any) -> float:
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
        "is_current_stream_capturing": False,
        # What is captured runs once, while it is captured; a replay does nothing.
        "Stream": Mock(), "current_stream": Mock(), "CUDAGraph": Mock(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, Mock(return_value=answer))
    torch.cuda.stream = torch.cuda.graph = lambda *_, **__: nullcontext()
    torch.cuda.Event = Event
    # Optimizers ask it, or, before torch 2.13, what is answered above; a torch built for CUDA would
    # look for a driver.
    stream = SimpleNamespace(is_capturing=lambda: False)
    torch.accelerator.current_stream = lambda device=None: stream
    # Compiling for a CPU takes long, and is no card's code.
    torch.compile = lambda function, **options: function


def as_here(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is told of this machine's CPU where it is asked about the card."""
    return lambda *args, **kwargs: function(*map(here, args), **kwargs)


def make_it_run_here() -> None:
    """Kernels that run on this machine's CPU for tests count as those of the card."""
    backends._WITHOUT["cuda"] = as_here(backends._WITHOUT["cuda"])
    for owner, name in (
        (measure, "kernel_names"), (measure, "check_ran"), (timing, "profile"),
        (train_step, "seconds_by_part"), (Draw, "__init__"),
    ):  # fmt: skip
        setattr(owner, name, as_here(getattr(owner, name)))
    # Steps that wait for other processes here would be 0.0 % of the real card's rate.
    train_step.card_of = lambda name: replace(RTX_4090, flops_16=1e9)
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
    for stage in ("tests", "sanitize", "bench", "train"):
        setattr(items, stage, partial(small_items, getattr(items, stage)))


def small_items(stage: Callable[[Any], list[Item]], options: Any) -> list[Item]:
    return [item for item in stage(options) if item.name in KEPT]


def run_here(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]
) -> int:
    """``python -m MODULE ...`` in this process, also behind compute-sanitizer."""
    python = command.index(sys.executable)
    module, *arguments = command[python + 2 :]
    if module == "csrc.build":  # takes a minute, and would put a core into the checkout
        return int(environment["CMPOSE_CUDA_ARCHS"] != "8.9")
    torch.set_num_threads(1)  # pytest leaves two; at these sizes the second costs more than it does
    main = {"bench": program.main, "bench.train_step": train_step.main, "pytest": pytest.main}
    with (
        log.open("w") as output,
        redirect_stdout(output),
        patch.dict(os.environ, environment),
        patch.object(sys, "argv", [module, *arguments]),
        InMemory(),  # which is a thread's own
    ):
        return int(main[module](arguments))


def rehearse(work: Path, *options: str) -> None:
    """``make gpu`` on the card; exits as it does.

    Args:
        work: folder that gets logs, state and results.
        options: of ``python -m bench.gpu``.
    """
    put_a_card_in()
    make_it_run_here()
    make_it_small()
    stages.run_process = run_here
    op_tests.subprocess = SimpleNamespace(
        run=lambda command, *, env, timeout, **_: run_here(command, Path(os.devnull), timeout, env),
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    items.shutil = SimpleNamespace(which=lambda name: f"/bin/{name}")
    gc.freeze()  # of what is imported nothing has to be collected
    # Items share this process, so they run one at a time.
    arguments = ["--work", str(work), "--results", str(work / "results.json"), "--workers", "1"]
    sys.exit(gpu.main([*arguments, *options]))


if __name__ == "__main__":
    os.environ.setdefault("CMPOSE_CUDA_ON_CPU", str(cuda_on_cpu.build()))
    rehearse(Path(sys.argv[1]), *sys.argv[2:])
