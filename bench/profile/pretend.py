"""The process in which torch and Triton believe that there is a card; see inductor.py.

Its answers are plans. Inductor decides some things by a race on the card: whether matrices are
padded (here never), and a kernel's configuration (here all of them are kept).
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import re
import sys
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness.shapes import BACKWARD, FORWARD
from bench.harness.targets import bench_of
from bench.harness.workload import Draw, Workload, tensors
from bench.profile import inductor
from bench.profile.cards import BY_ARCH
from bench.profile.inductor import FOLDER, Kernel, Library, Plan, View, operator
from cmpose.files import write_text
from cmpose.kernels import launch

_kept: list[torch.library.Library] = []
"""What is registered lasts as long as this."""


class _Compiled(Exception):
    """All graphs are made; nothing is to run."""


class _Bare:
    """Stands for the driver that Triton asks for its target."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0


def _pretend(arch: int) -> None:
    """From here on torch and Triton speak of the card that stands for ``arch``."""
    import torch._dynamo.device_interface as interface
    import torch._functorch.config
    import torch._inductor.config as config
    import triton

    card = BY_ARCH[arch]
    properties = SimpleNamespace(
        name=card.name,
        major=arch // 10,
        minor=arch % 10,
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
        "get_device_capability": (arch // 10, arch % 10),
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "synchronize": None,
        "_lazy_init": None,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "is_bf16_supported": True,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    cuda: Any = interface.CudaInterface
    cuda.get_device_properties = torch.cuda.get_device_properties
    cuda.get_raw_stream = lambda _: 0
    torch._C._cuda_getCurrentRawStream = cuda.get_raw_stream
    triton.runtime.driver.set_active(_Bare(arch))
    # Patterns are found by examples, which need memory.
    _kept.append(torch.library.Library("aten", "IMPL"))
    on_cpu = {"layout": None, "device": "cpu", "pin_memory": None}
    for name in ("empty_strided", "empty.memory_format"):
        function = operator(f"aten.{name if '.' in name else name + '.default'}")
        _kept[-1].impl(name, lambda *a, f=function, **o: f(*a, **{**o, **on_cpu}), "CUDA")
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.donated_buffer = False
    config.force_disable_caches = True
    config.compile_threads = 1
    config.shape_padding = False  # decided by a race
    config.assert_indirect_indexing = False


@dataclass
class _Graphs:
    """Inductor's wrappers, forward and, if there are gradients, backward."""

    codes: list[str] = field(default_factory=list)
    arguments: list[Tensor] = field(default_factory=list)  # tensors of the op's arguments
    given: list[Tensor] = field(default_factory=list)  # what the forward pass gets: views of them


def _graphs(workload: Workload, peer: str) -> _Graphs:
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    bench = bench_of(workload.op)
    made = _Graphs()

    def call(given: list[Tensor]) -> None:
        made.given = given
        raise _Compiled

    def keep(graph: GraphLowering) -> Any:
        made.codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=call, __file__="", runner=None)

    def on_card(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        size, stride = value.shape, value.stride()
        made.arguments.append(torch.empty_strided(size, stride, dtype=value.dtype, device="cuda"))
        return made.arguments[-1]

    GraphLowering._compile_to_module = keep  # type: ignore[method-assign, assignment]
    torch._dynamo.reset()
    arguments = bench.make(workload.shape, Draw(getattr(torch, workload.dtype), "meta"))
    with FakeTensorMode():
        arguments = pytree.tree_map(on_card, arguments)
        for name in bench.gradients:
            arguments[name].requires_grad_()
        try:
            bench.peers[peer].build(False)(**arguments)
        except _Compiled:
            return made
    raise RuntimeError(f"{peer}: torch.compile makes nothing of it")


class _Noted(torch.utils._python_dispatch.TorchDispatchMode):
    """Makes a plan of what a wrapper calls, on tensors without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = Plan()
        self.kept: list[Tensor] = []  # a storage's number is good as long as it lives

    def view(self, value: Any) -> Any:
        """A tensor as plain data."""
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        known = [tensor.untyped_storage()._cdata for tensor in self.kept]
        if storage._cdata not in known:
            self.kept.append(value)
            known.append(storage._cdata)
            self.plan.storages.append(storage.nbytes())
        return View(
            known.index(storage._cdata),
            value.dtype,
            tuple(value.shape),
            value.stride(),
            int(value.storage_offset()),
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = {k: v for k, v in (kwargs or {}).items() if k != "device"}
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return result
        if func.namespace == "aten" and not func._opname.startswith("empty"):
            new = () if any(r.alias_info for r in returns) else tensors(result)
            self.plan.steps.append(
                Library(
                    str(func),
                    pytree.tree_map(self.view, args),
                    pytree.tree_map(self.view, options),
                    tuple(map(self.view, new)),
                )
            )
        return result

    def kernel(self, name: str, source: str, *_: Any) -> Any:
        """A generated kernel: an object whose ``run`` notes the launch."""
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
        tuner = getattr(importlib.import_module(f"{inductor.__name__}.t_{key}"), name)
        names = [p.name for p in tuner.fn.params if not p.is_constexpr]

        def launched(*arguments: Any, **_: Any) -> None:
            candidates = []
            for config in tuner.configs:
                sizes = config_to_dict(config)
                every = [p.name for p in tuner.fn.params if p.name not in config.kwargs]
                extra = tuner.inductor_meta.get("extra_launcher_args", [])
                values = dict(zip([*every, *extra], arguments, strict=True))
                scope = {**values, **sizes}
                grid = GridExpr.from_meta(tuner.inductor_meta, config).eval_slow(scope)
                blocks = dict(config.kwargs)
                blocks |= {n: values[n] for n in every if n not in names}
                candidates.append(
                    (launch.Config(blocks, config.num_warps, config.num_stages), grid)
                )
            given = tuple(self.view(values[n]) for n in names)
            fusion = tuner.triton_meta.get("enable_fp_fusion", True)
            self.plan.steps.append(
                Kernel(f"{inductor.__name__}.k_{key}", name, given, tuple(candidates), fusion)
            )

        return SimpleNamespace(run=launched)


def _recorded(graphs: _Graphs, direction: str) -> Plan:
    """The calls that wrappers make; of a backward pass alone, those of the forward pass before."""
    import torch._dynamo.testing
    from torch._inductor.async_compile import AsyncCompile

    noted = _Noted()
    compiler: Any = AsyncCompile
    compiler.triton = lambda _, *given, **__: noted.kernel(*given)
    compiler.wait = lambda *_: None

    def empty(size: Any, stride: Any, dtype: torch.dtype, **_: Any) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="meta")

    def part(tensor: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
        return tensor.as_strided(size, stride, tensor.storage_offset() + offset)

    testing: Any = torch._dynamo.testing
    testing.rand_strided = empty
    replaced = {
        "empty_strided_cuda": empty,
        "reinterpret_tensor": part,
        "copy_if_misaligned": lambda tensor: tensor,
    }
    arguments = [empty(one.shape, one.stride(), one.dtype) for one in graphs.arguments]
    noted.plan.inputs = [noted.view(one) for one in arguments]
    whose = [one.untyped_storage()._cdata for one in graphs.arguments]
    given = []
    for one in graphs.given:
        if one.untyped_storage()._cdata not in whose:
            raise RuntimeError("operators outside of what is compiled make its inputs")
        argument = arguments[whose.index(one.untyped_storage()._cdata)]
        given.append(argument.as_strided(one.shape, one.stride(), one.storage_offset()))
    results: list[Tensor] = []
    for code in graphs.codes[: 1 if direction == FORWARD else 2]:
        scope: dict[str, Any] = {"__name__": "wrapper"}
        exec(compile(code, "wrapper", "exec"), scope)
        scope |= replaced
        if results:
            noted.plan.forward = len(noted.plan.steps) if direction == BACKWARD else 0
            given = scope["get_args"]()
            saved = len(given) - len(set(re.findall(r"\btangents_\d+", code)))
            given[:saved] = results[len(results) - saved :]
        with noted:
            results = list(scope["call"](list(given)))
    noted.plan.outputs = [noted.view(tensor) for tensor in results if tensor is not None]
    return noted.plan


def _answer(workload: Workload, peer: str) -> Plan | str:
    try:
        return _recorded(_graphs(workload, peer), workload.direction)
    except Exception as error:  # whatever the compiler raises is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not be taken for an answer
    warnings.simplefilter("ignore")
    asked, arch = pickle.load(sys.stdin.buffer)
    _pretend(arch)
    plans: list[Plan | str] = []
    for workload, peer in asked:
        plans.append(_answer(workload, peer))
    pickle.dump(plans, answers)


if __name__ == "__main__":
    _serve()
