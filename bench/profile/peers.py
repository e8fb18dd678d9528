"""An op's stock choices, profiled as its own kernels are: bound and estimate, never measured.

What torch.compile writes for a peer of ``bench/OP.py`` is compiled for the card and counted; what
is counted how, and what not, says docs/profile.md. Inductor asks torch for the card's properties
and writes Triton kernels and a wrapper that launches them. The peer runs on tensors of the card,
which have no memory; its wrappers on tensors of the CPU in their place.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import math
import multiprocessing
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.harness.measure import call_of
from bench.harness.records import Record
from bench.harness.shapes import BOTH, FORWARD
from bench.harness.targets import bench_of
from bench.harness.workload import Workload, tensors, total_bytes
from bench.profile import model
from bench.profile.cards import Card
from bench.profile.counts import FEW_SAMPLES, Cheap, Counts, count
from cmpose import provenance
from cmpose.files import write_text
from cmpose.kernels import launch
from cmpose.provenance import PROJECT
from tests.ptx_on_cpu import triton_kernels
from tests.ptx_on_cpu.machine import built

FOLDER = PROJECT / "build" / "profile"

__path__ = [str(FOLDER)]
"""Generated kernels are modules below this one, so that the process that compiles imports them."""

UNMATCHED = 0.4
"""Share of a kernel's loads and stores that its SASS may lack: ptxas merges some that Inductor
writes. Sectors are counted in the PTX all the same; instructions are then roughly right."""

TINY = 1 << 16
"""Elements up to which a library's call is run, for what kernels after it read."""

LIBRARY = "error: its kernels are a library's, which torch for CPUs does not have"
"""Why the peers that torch does not compile have no figure."""

Answer: TypeAlias = tuple[Record | str, list[Tensor]]
"""A peer's record, or why there is none; its results, if they are small."""

_kept: list[torch.library.Library] = []
"""What is registered lasts as long as this."""


def _pretend(card: Card) -> None:
    """From here on torch and Triton speak of that card."""
    import torch._dynamo.device_interface as interface
    import torch._inductor.config as config
    import triton
    from triton.backends.compiler import GPUTarget

    warnings.simplefilter("ignore")
    # Or this process would wait for the one that compiles.
    Finalize(None, triton_kernels._process().shutdown, exitpriority=100)
    ctypes.CDLL(None).put_guard_in()  # of no_card.cpp, which is preloaded
    capability = divmod(card.arch, 10)
    properties = SimpleNamespace(
        name=card.name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=card.sms,
        regs_per_multiprocessor=card.registers,
        max_threads_per_multi_processor=32 * card.warps,
        gcnArchName="",
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.block_shared_bytes,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": properties,
        "get_device_capability": capability,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "is_bf16_supported": True,
        **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("synchronize", "_lazy_init", "set_device", "set_rng_state")),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    cuda: Any = interface.CudaInterface
    cuda.get_device_properties = torch.cuda.get_device_properties
    cuda.get_raw_stream = lambda _: 0
    torch._C._cuda_getCurrentRawStream = cuda.get_raw_stream
    target = GPUTarget("cuda", card.arch, 32)
    driver: Any = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    triton.runtime.driver.set_active(driver)
    # Patterns are found by examples, which need memory.
    _kept.append(torch.library.Library("aten", "IMPL"))
    on_cpu = {"layout": None, "device": "cpu", "pin_memory": None}
    empty = torch.ops.aten.empty_strided.default, torch.ops.aten.empty.memory_format
    for function in empty:
        _kept[-1].impl(function, lambda *a, f=function, **o: f(*a, **{**o, **on_cpu}), "CUDA")
    config.force_disable_caches = True
    config.compile_threads = 1
    config.shape_padding = False
    config.assert_indirect_indexing = False


class _Run(TorchDispatchMode):
    """A peer's run, and what is counted in it.

    Each tensor of the card stands for one of the CPU: :meth:`to_card` makes the one for the other,
    :meth:`to_cpu` finds that again, for views too. As a mode this is on while a wrapper of
    Inductor's runs, whose calls of libraries it notes.
    """

    def __init__(self, workload: Workload, card: Card) -> None:
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.graph import GraphLowering
        from torch._subclasses.fake_tensor import FakeTensorMode

        super().__init__()
        self.workload, self.card = workload, card
        self.without_memory = FakeTensorMode()
        self.counting = False  # not in the forward pass of a backward pass
        self.kernels: list[Counts] = []
        self.calls: list[tuple[str, int, float]] = []  # name, bytes moved, clocks of one SM
        self.held = 0  # bytes of all tensors
        # By the address of a storage on the card, which a tensor's views share: the tensor, so that
        # the address is not given to another, and that of the CPU.
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.results: list[Tensor] = []  # of the last wrapper
        lowering: Any = GraphLowering
        lowering._compile_to_module = lambda graph: self.module(graph)
        compiler: Any = AsyncCompile
        compiler.triton = lambda _, *named, **__: self.kernel(*named)
        compiler.wait = lambda *_: None

    def zeros(self, size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        """Memory of which the system gives only the pages that are touched."""
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        self.held += span * dtype.itemsize
        with _disable_current_modes():
            return torch.zeros(span, dtype=dtype).as_strided(size, stride)

    def to_card(self, one: Tensor) -> Tensor:
        """A tensor of the card that stands for one of the CPU."""
        fake = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")
        self.memory[fake.untyped_storage()._cdata] = fake, one
        return fake

    def to_cpu(self, fake: Tensor, copied: bool = False) -> Tensor:
        """What a tensor of the card stands for; zeros if it is of nothing that is known.

        Args:
            copied: then a copy made it, which is noted as a call.
        """
        storage = fake.untyped_storage()
        if storage._cdata not in self.memory:
            size = storage.nbytes() // fake.itemsize
            self.memory[storage._cdata] = fake, self.zeros([size], [1], fake.dtype)
            if copied and self.counting:
                self.calls.append(("a copy", 2 * storage.nbytes(), 0))
        held = self.memory[storage._cdata][1]
        offset = held.storage_offset() + fake.storage_offset()
        return held.as_strided(fake.shape, fake.stride(), offset)

    def module(self, graph: Any) -> Any:
        """In place of the module that Inductor makes of a graph's wrapper."""
        scope: dict[str, Any] = {"__name__": "wrapper"}
        exec(compile(graph.codegen()[0].value, "wrapper", "exec"), scope)
        scope |= {"empty_strided_cuda": self.zeros, "copy_if_misaligned": lambda one: one}

        def call(fakes: list[Tensor]) -> list[Tensor]:
            with _disable_current_modes():
                given = [self.to_cpu(one, not graph.is_backward) for one in fakes]
                with self:
                    results = list(scope["call"](given))
                self.results = tensors(results)
            with self.without_memory:
                return pytree.tree_map_only(Tensor, self.to_card, results)

        return SimpleNamespace(call=call, __file__="", runner=None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """A library's call: noted, and not made if it is large."""
        options = {k: "cpu" if k == "device" else v for k, v in (kwargs or {}).items()}
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if is_view or func.namespace != "aten" or func._opname.startswith("empty"):
            return func(*args, **options)
        given = tensors((args, options))
        if max((one.numel() for one in given), default=0) <= TINY:
            results = func(*args, **options)
        else:
            with self.without_memory:
                fakes = pytree.tree_map_only(Tensor, self.to_card, (args, kwargs or {}))
                made = func(*fakes[0], **fakes[1])
            results = pytree.tree_map_only(Tensor, self.to_cpu, made)
        if self.counting:
            seen = {one.data_ptr(): one for one in (*given, *tensors(results))}
            product = func._opname in ("mm", "bmm")
            flops = 2 * math.prod(given[0].shape) * given[1].shape[-1] if product else 0
            clocks = flops / self.card.tensor.get(str(given[0].dtype)[6:], math.inf)
            self.calls.append((f"aten.{func._opname}", total_bytes(list(seen.values())), clocks))
        return results

    def kernel(self, name: str, source: str, *_: Any) -> Any:
        """A generated kernel: an object whose ``run`` counts the launch."""
        from torch._inductor.runtime.triton_heuristics import GridExpr, config_to_dict

        # The process that compiles imports it too: it has no driver, and wants the kernel alone.
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        source += f"\n\ntuner = {name}\n{name} = tuner.fn\n"
        module = f"k_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_text(FOLDER / f"{module}.py", source)
        importlib.invalidate_caches()
        tuner = importlib.import_module(f"{__name__}.{module}").tuner
        parameters = tuner.fn.params
        extra = tuner.inductor_meta.get("extra_launcher_args", [])
        fusion = tuner.triton_meta.get("enable_fp_fusion", True)

        def launched(config: Any, arguments: tuple[Any, ...]) -> launch.Launch:
            names = [p.name for p in parameters if p.name not in config.kwargs]
            values = dict(zip([*names, *extra], arguments, strict=True)) | config_to_dict(config)
            grid = GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(values)
            constants = {p.name: values[p.name] for p in parameters if p.is_constexpr}
            given = tuple(values[p.name] for p in parameters if not p.is_constexpr)
            sizes = launch.Config(constants, config.num_warps, config.num_stages)
            return launch.Launch(tuner.fn, grid, given, constants, sizes, fusion)

        def run(*arguments: Any, **_: Any) -> None:
            candidates = [launched(config, arguments) for config in tuner.configs]
            # Of a forward pass that is not counted only what makes indices is looked at.
            if not self.counting and max(math.prod(one.grid) for one in candidates) > 1:
                return
            with _disable_current_modes():
                launches = map(triton_kernels.of, candidates)
                counts = count(launches, self.card.arch, False, FEW_SAMPLES, UNMATCHED)
            if self.counting:
                self.kernels.append(min(counts, key=self.estimate))

        return SimpleNamespace(run=run)

    def estimate(self, counts: Counts) -> float:
        return model.profile([counts], self.card, self.workload.dtype, 0).estimate_us

    def bound(self, moved: int, clocks: float) -> float:
        """The least time of a library's call: its bytes', or a product's at the full rate."""
        card = self.card
        in_l2 = self.held <= card.l2_mb * 1e6
        rate = card.l2_bytes * card.sms * card.clock_ghz if in_l2 else card.dram_gb_s
        return max(moved / rate, clocks / card.sms / card.clock_ghz) / 1e3

    def record(self, moved: int) -> Record:
        """What all of it takes, as a record holds it; ``moved``: bytes that the workload must."""
        profile = model.profile(self.kernels, self.card, self.workload.dtype, 0)
        calls = [(name, self.bound(moved, flops)) for name, moved, flops in self.calls]
        launches = sum(max(us, self.card.launch_us) for _, us in calls)
        floor = moved / (self.card.dram_gb_s * 1e3)
        return {
            "kernels": [(one.counts.kernel, one.estimate_us) for one in profile.launches],
            "calls": calls,
            "bound_us": max(floor, profile.bound_us + sum(us for _, us in calls)),
            "estimate_us": max(floor / model.COPY_SHARE, profile.estimate_us + launches),
        }


def _profiled(workload: Workload, card: Card, peer: str) -> tuple[Record, list[Tensor]]:
    """Compiles a peer and runs it: its record, and its results."""
    torch._dynamo.reset()
    bench, run = bench_of(workload.op), _Run(workload, card)
    draw = Cheap(getattr(torch, workload.dtype), "cpu")
    arguments = bench.make(workload.shape, draw)
    run.held = total_bytes(arguments)
    with run.without_memory:
        on_card = pytree.tree_map_only(Tensor, run.to_card, arguments)
        for name in bench.gradients:
            on_card[name].requires_grad_()
        function = bench.peers[peer].build(False)
        call = call_of(function, on_card, bench, workload.direction)
        if workload.direction == BOTH:  # that has called it once, for its results' shapes
            run.held = total_bytes(arguments)
        run.counting = True
        call()
    if not run.results:
        raise RuntimeError(f"{peer}: torch.compile makes nothing of it")
    moved = bench.bytes_of(workload)
    if workload.direction == FORWARD:  # our losses write their gradient, which a peer need not
        seen = {id(one): one for one in (*tensors(arguments), *run.results)}
        moved = min(moved, total_bytes(list(seen.values())))
    return run.record(moved), [one for one in run.results if one.numel() <= TINY]


def _answer(workload: Workload, card: Card, peer: str) -> Answer:
    """A peer, compiled for the card and counted."""
    try:
        return _profiled(workload, card, peer)
    except Exception as error:  # whatever the compiler or the count raises is the answer
        return f"error: {type(error).__name__}: {error}".strip().splitlines()[0], []


def compiled(workload: Workload, names: Sequence[str], card: Card) -> list[Answer]:
    """What torch.compile makes of some peers for a card, each counted."""
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("no_card.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
    command = ["g++", *flags, f"-Wl,-rpath,{root}/lib", str(source), "-lc10", "-ltorch_cpu"]
    library = built(FOLDER / "no_card.so", command, [source], torch.__version__)
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, LD_PRELOAD=str(library)):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(1, spawn, _pretend, (card,)) as process:
            return list(process.map(partial(_answer, workload, card), names))


def record(workload: Workload, card: Card, ours_us: float) -> Record:
    """Every peer of a workload on a card beside our estimate, as a record holds it."""
    peers = bench_of(workload.op).peers
    names = [name for name, peer in peers.items() if peer.compiled]
    answers = compiled(workload, names, card)
    known = {name: answer for name, (answer, _) in zip(names, answers, strict=True)}
    return {
        **asdict(workload),
        "card": card.name,
        "estimate_us": ours_us,
        "peers": known | {name: LIBRARY for name in peers if name not in known},
        "provenance": provenance.provenance(),
    }
