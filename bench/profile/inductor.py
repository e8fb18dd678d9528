"""The process in which torch and Triton believe that there is a card; see docs/profile.md.

torch.compile asks torch for the card's properties and writes Triton kernels, FlexAttention's
template among them, and a wrapper that launches them. Here tensors of the card have no memory, so
that nothing is run while it compiles; then the wrapper is run on tensors of the CPU: its kernels
are counted as ours are, and a library's call is noted with its bound. What Inductor decides by a
race on the card is decided otherwise: matrices are never padded, and of a kernel's configurations
the one with the least estimate is taken.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import math
import os
import pickle
import re
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench.harness.records import Record
from bench.harness.shapes import BACKWARD, FORWARD
from bench.harness.targets import bench_of
from bench.harness.workload import Draw, Workload, size_in_memory, tensors, total_bytes
from bench.profile import model
from bench.profile.cards import Card
from bench.profile.counts import Cheap, Counts, count
from bench.profile.peers import FOLDER, Answer
from cmpose.files import write_text
from cmpose.kernels import launch
from tests.ptx_on_cpu import triton_kernels

__path__ = [str(FOLDER)]
"""Generated kernels are modules below this one, so that the process that compiles imports them."""

SAMPLES = 24
"""Blocks of a large launch that run: those of a generated kernel are alike."""

UNMATCHED = 0.4
"""Share of a kernel's loads and stores that its SASS may lack: ptxas merges some that Inductor
writes. Sectors are counted in the PTX all the same; instructions are then roughly right."""

TINY = 1 << 16
"""Elements up to which a library's call is run, for what kernels after it read."""

_kept: list[torch.library.Library] = []
"""What is registered lasts as long as this."""


class _Compiled(Exception):
    """All graphs are made; nothing is to run."""


def _pretend(card: Card) -> None:
    """From here on torch and Triton speak of that card."""
    import torch._dynamo.device_interface as interface
    import torch._functorch.config
    import torch._inductor.config as config
    import triton
    from triton.backends.compiler import GPUTarget

    capability = divmod(card.arch, 10)
    properties = SimpleNamespace(
        name=card.name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=card.sms,
        regs_per_multiprocessor=card.registers,
        max_threads_per_multi_processor=32 * card.warps,
        max_threads_per_block=1024,
        warp_size=32,
        gcnArchName="",
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=card.block_shared_bytes,
        L2_cache_size=int(card.l2_mb * 2**20),
        total_memory=24 * 2**30,
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
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.donated_buffer = False
    config.force_disable_caches = True
    config.compile_threads = 1
    config.shape_padding = False
    config.assert_indirect_indexing = False


def _compiled(workload: Workload, peer: str) -> tuple[list[str], list[Tensor], list[Tensor]]:
    """Inductor's wrappers, forward and, if there are gradients, backward; the tensors of the op's
    arguments; and what the forward pass gets, which are views of them."""
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    bench = bench_of(workload.op)
    codes: list[str] = []
    taken: list[Tensor] = []

    def call(given: list[Tensor]) -> None:
        taken[:] = given
        raise _Compiled

    def keep(graph: GraphLowering) -> Any:
        codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=call, __file__="", runner=None)

    def on_card(one: Tensor) -> Tensor:
        return torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device="cuda")

    GraphLowering._compile_to_module = keep
    torch._dynamo.reset()
    arguments = bench.make(workload.shape, Draw(getattr(torch, workload.dtype), "meta"))
    with FakeTensorMode():
        arguments = pytree.tree_map_only(Tensor, on_card, arguments)
        for name in bench.gradients:
            arguments[name].requires_grad_()
        try:
            bench.peers[peer].build(False)(**arguments)
        except _Compiled:
            return codes, tensors(arguments), taken
    raise RuntimeError(f"{peer}: torch.compile makes nothing of it")


class _Wrapper(TorchDispatchMode):
    """Runs Inductor's wrappers on tensors of the CPU and counts what they launch and call."""

    def __init__(self, workload: Workload, card: Card) -> None:
        super().__init__()
        self.workload, self.card = workload, card
        self.counting = True  # not in the forward pass of a backward pass
        self.kernels: list[Counts] = []
        self.calls: list[tuple[str, int, float]] = []  # name, bytes moved, clocks of one SM
        self.held = 0  # bytes of all tensors

    def zeros(self, size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        """Memory of which the system gives only the pages that are touched."""
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        self.held += span * dtype.itemsize
        with _disable_current_modes():
            return torch.zeros(span, dtype=dtype).as_strided(size, stride)

    def run(self, codes: list[str], given: list[Tensor]) -> list[Tensor]:
        """The wrappers' results, of the last one; a backward pass gets what the forward kept."""
        import torch._dynamo.testing as testing
        from torch._inductor.async_compile import AsyncCompile

        compiler: Any = AsyncCompile
        compiler.triton = lambda _, *named, **__: self.kernel(*named)
        compiler.wait = lambda *_: None
        testing.rand_strided = self.zeros
        results: list[Tensor] = []
        for at, code in enumerate(codes):
            self.counting = at == len(codes) - 1 or self.workload.direction != BACKWARD
            scope: dict[str, Any] = {"__name__": "wrapper"}
            exec(compile(code, "wrapper", "exec"), scope)
            scope |= {"empty_strided_cuda": self.zeros, "copy_if_misaligned": lambda one: one}
            if at:
                given = scope["get_args"]()
                saved = len(given) - len(set(re.findall(r"\btangents_\d+", code)))
                given[:saved] = results[len(results) - saved :]
            with self:
                results = list(scope["call"](list(given)))
        return results

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
            shadows = {id(one): one.to("meta") for one in given}
            originals = {id(shadows[id(one)]): one for one in given}

            def real(one: Tensor) -> Tensor:
                known = originals.get(id(one))
                return self.zeros(one.shape, one.stride(), one.dtype) if known is None else known

            shadow = pytree.tree_map_only(Tensor, lambda one: shadows[id(one)], (args, options))
            results = pytree.tree_map_only(Tensor, real, func(*shadow[0], **shadow[1]))
        if self.counting:
            seen = {id(one): one for one in (*given, *tensors(results))}
            product = func._opname in ("mm", "bmm")
            flops = 2 * math.prod(given[0].shape) * given[1].shape[-1] if product else 0
            clocks = flops / self.card.tensor.get(str(given[0].dtype)[6:], math.inf)
            self.calls.append((f"aten.{func._opname}", total_bytes(list(seen.values())), clocks))
        return results

    def kernel(self, name: str, source: str, *_: Any) -> Any:
        """A generated kernel: an object whose ``run`` counts the launch."""
        from torch._inductor.runtime.triton_heuristics import GridExpr, config_to_dict

        # Alone it needs neither the card nor Inductor's launcher.
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        head, decorated = source.split("@triton_heuristics", 1)
        bare = head + decorated[decorated.index("@triton.jit") :]
        key = hashlib.sha256(bare.encode()).hexdigest()[:16]
        FOLDER.mkdir(parents=True, exist_ok=True)
        for kind, text in (("k", bare), ("t", source)):
            write_text(FOLDER / f"{kind}_{key}.py", text)
        importlib.invalidate_caches()
        tuner, function = (
            getattr(importlib.import_module(f"{__name__}.{kind}_{key}"), name) for kind in "tk"
        )
        names = [p.name for p in tuner.fn.params if not p.is_constexpr]
        extra = tuner.inductor_meta.get("extra_launcher_args", [])
        fusion = tuner.triton_meta.get("enable_fp_fusion", True)

        def launched(config: Any, arguments: tuple[Any, ...]) -> launch.Launch:
            every = [p.name for p in tuner.fn.params if p.name not in config.kwargs]
            values = dict(zip([*every, *extra], arguments, strict=True))
            scope = {**values, **config_to_dict(config)}
            grid = GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(scope)
            blocks = {**config.kwargs, **{n: values[n] for n in every if n not in names}}
            sizes = launch.Config(blocks, config.num_warps, config.num_stages)
            given = tuple(values[n] for n in names)
            return launch.Launch(function, grid, given, blocks, sizes, fusion)

        def run(*arguments: Any, **_: Any) -> None:
            candidates = [launched(config, arguments) for config in tuner.configs]
            # Of a forward pass that is not counted only what makes indices is looked at.
            if not self.counting and max(math.prod(one.grid) for one in candidates) > 1:
                return
            with _disable_current_modes():
                every: list[list[Counts]] = [
                    count([triton_kernels.of(one)], self.card.arch, False, SAMPLES, UNMATCHED)
                    for one in candidates
                ]
            if self.counting:
                best: list[Counts] = min(every, key=self.estimate)
                self.kernels += best

        return SimpleNamespace(run=run)

    def estimate(self, counts: list[Counts]) -> float:
        return model.profile(counts, self.card, self.workload.dtype, 0).estimate_us

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


def _profiled(workload: Workload, peer: str, card: Card) -> tuple[Record, list[Tensor]]:
    """Compiles a peer and runs it: its record, and its results."""
    codes, fakes, taken = _compiled(workload, peer)
    wrapper = _Wrapper(workload, card)
    draw = Cheap(getattr(torch, workload.dtype), "cpu")
    arguments = tensors(bench_of(workload.op).make(workload.shape, draw))
    wrapper.held += total_bytes(arguments)
    of = {fake.untyped_storage()._cdata: one for fake, one in zip(fakes, arguments, strict=True)}
    given = []
    for one in taken:
        argument = of.get(one.untyped_storage()._cdata)
        if argument is None:  # a copy that is made before what is compiled
            given.append(wrapper.zeros(one.shape, one.stride(), one.dtype))
            wrapper.calls.append(("a copy", 2 * size_in_memory(one), 0))
        else:
            given.append(argument.as_strided(one.shape, one.stride(), one.storage_offset()))
    results = wrapper.run(codes[: 1 if workload.direction == FORWARD else 2], given)
    moved = bench_of(workload.op).bytes_of(workload)
    if workload.direction == FORWARD:  # our losses write their gradient, which a peer need not
        seen = {id(one): one for one in (*arguments, *tensors(results))}
        moved = min(moved, total_bytes(list(seen.values())))
    return wrapper.record(moved), [one for one in tensors(results) if one.numel() <= TINY]


def _answer(workload: Workload, peer: str, card: Card) -> Answer:
    try:
        return _profiled(workload, peer, card)
    except Exception as error:  # whatever the compiler or the count raises is the answer
        return f"error: {type(error).__name__}: {error}".strip().splitlines()[0], []


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not be taken for an answer
    warnings.simplefilter("ignore")
    workload, peers, card = pickle.load(sys.stdin.buffer)
    ctypes.CDLL(None).put_guard_in()  # of no_card.cpp, which is preloaded
    _pretend(card)
    pickle.dump([_answer(workload, peer, card) for peer in peers], answers)


if __name__ == "__main__":
    importlib.import_module("bench.profile.inductor")._serve()
