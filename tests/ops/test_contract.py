"""The op contract of docs/ops.md, points 1 to 11, for all ops and each of their backends.

Values by hand and against other formulations are in test_<op>.py; backends (point 12) in
test_backends.py; bad arguments (point 13) in test_arguments.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from cmpose import ops
from cmpose.ops import backends, library
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_fake_matches,
    assert_gradient_strides,
    assert_layout,
    assert_repeats,
    assert_same_bits,
    assert_writes_everything,
)
from tests.ops.support.cases import (
    CASES,
    DEVICE,
    OPTIONS,
    OpCase,
    clip_dimensions,
    differentiable,
    dtypes_of,
    gradients,
    leaves,
)


@pytest.fixture(autouse=True)
def auto_falls_back(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` runs the reference as a registered op here, as it does where nothing else can."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("backend") == "auto":
        for name, entry in backends._ENTRIES.items():
            monkeypatch.setitem(backends._ENTRIES, name, entry._replace(limits={}))


EPS_FP32 = torch.finfo(torch.float32).eps

DISCRETE = ("knn", "dpc_knn")
"""What they find has no rounding; test_<op>.py has their oracles."""

RUNS = [(case, backend) for case in (*CASES.values(), *OPTIONS) for backend in case.backends]
every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_run = pytest.mark.parametrize(
    ("case", "backend"), RUNS, ids=[f"{case.id}-{backend}" for case, backend in RUNS]
)
every_gradient = pytest.mark.parametrize(
    ("case", "backend"),
    [run for run in RUNS if run[0].gradients],
    ids=[f"{case.id}-{backend}" for case, backend in RUNS if case.gradients],
)


def precise(backend: str) -> torch.dtype:
    """The most precise dtype of a backend: kernels have no float64."""
    return torch.float32 if backend in ("triton", "cuda") else torch.float64


def arguments(
    case: OpCase,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The case's arguments where it runs, with gradients wanted where there are any."""
    kwargs = case.make(batch, dtype, **(case.kernel_sizes if sizes is None else sizes))
    kwargs = {name: value.to(DEVICE) for name, value in kwargs.items()}
    for name in case.gradients:
        kwargs[name].requires_grad_()
    return kwargs


def run(
    case: OpCase, backend: str, kwargs: dict[str, Any], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs and gradients; the output gradients are representable in ``dtype``."""
    result = case.call(**kwargs, backend=backend)
    if not case.gradients:
        return leaves(result), ()
    return leaves(result), gradients(
        differentiable(result), [kwargs[n] for n in case.gradients], dtype
    )


def everything(case: OpCase, backend: str, kwargs: dict[str, Any]) -> list[Tensor]:
    outputs, grads = run(case, backend, kwargs)
    return [*(out.detach() for out in outputs), *grads]


def test_every_op_has_a_case() -> None:
    assert tuple(CASES) == backends.OPS
    assert set(backends.OPS) <= set(ops.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


# -- 1: value and gradients -----------------------------------------------------------------------

PRECISION = [
    (case, backend, dtype)
    for case, backend in RUNS
    if case.floating and case.name not in DISCRETE
    for dtype in dtypes_of(backend)
]


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    PRECISION,
    ids=[f"{case.id}-{backend}-{str(dtype)[6:]}" for case, backend, dtype in PRECISION],
)
def test_value_and_gradients_are_as_close_as_eager(
    case: OpCase, backend: str, dtype: torch.dtype
) -> None:
    """The kernel's error against float64 is at most eager's, plus a computed allowance."""
    for sizes in (case.kernel_sizes, *case.other_sizes):
        kwargs = arguments(case, dtype=dtype, sizes=sizes)
        exact_made = {
            n: v.detach().double().requires_grad_(v.requires_grad) if n in case.floating else v
            for n, v in kwargs.items()
        }
        actual = run(case, backend, kwargs, dtype)
        eager = run(case, "reference", kwargs, dtype)
        exact = run(case, "reference", exact_made, dtype)
        for a, b, c in zip(
            [*actual[0], *actual[1]], [*eager[0], *eager[1]], [*exact[0], *exact[1]], strict=True
        ):
            if a.is_floating_point():
                # Beside the reference, attention rounds P (and dS) before the product that follows.
                roundings = 2 if "attention" in case.name else 1
                assert_as_close_as_eager(
                    a, b, c.double(), reduction=case.reduction, roundings=roundings
                )
            else:
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.floating and n not in DISCRETE])
def test_error_of_the_reference_is_that_of_rounding(name: str, dtype: torch.dtype) -> None:
    """Against float64 on the same, already rounded inputs; the yardstick itself is held here.

    All are summed in float32 and rounded once: half an ulp of the output and a float32 ulp a term.
    Attention also rounds its logits (their size times an ulp moves a weight by that share), its
    weights and q · d^-1/2; on a CPU in float32.
    """
    case, eps = CASES[name], torch.finfo(dtype).eps
    kwargs = arguments(case, dtype=dtype)
    exact = {n: v.double() if n in case.floating else v for n, v in kwargs.items()}
    actual = leaves(case.call(**kwargs, backend="reference"))[0]
    expected = leaves(case.call(**exact, backend="reference"))[0]
    scale = expected.abs().max()
    if "attention" in name:
        q, k, v = exact["qkv"].unbind(3)
        logit = (q.norm(dim=-1).max() * k.norm(dim=-1).max()) * q.shape[-1] ** -0.5
        inside = EPS_FP32 if DEVICE == "cpu" else eps
        allowed = (inside * (2 * logit + 2) + eps / 2) * v.abs().max()
    else:
        allowed = ((eps / 2 if case.follows else 0.0) + 16 * EPS_FP32) * scale
    assert (actual.double() - expected).abs().max() <= allowed


@every_run
def test_dtypes_and_layout(case: OpCase, backend: str) -> None:
    for dtype in (*dtypes_of(backend), precise(backend)):
        kwargs = arguments(case, dtype=dtype)
        outputs, grads = run(case, backend, kwargs)
        expected = dtype if case.follows else torch.promote_types(dtype, torch.float32)
        if case.name == "warp_clips":
            expected = torch.float32
        assert_layout(outputs[0], outputs[0].shape, expected)
        for out in outputs[1:]:
            assert_layout(out, out.shape, out.dtype)
        for name, grad in zip(case.gradients, grads, strict=True):
            assert grad.shape == kwargs[name].shape
            assert grad.dtype == kwargs[name].dtype
            assert grad.isfinite().all()


# -- 2: gradcheck ---------------------------------------------------------------------------------


GRADCHECK = [r for r in RUNS if r[0].gradients and precise(r[1]) == torch.float64]


@pytest.mark.parametrize(
    ("case", "backend"), GRADCHECK, ids=[f"{case.id}-{backend}" for case, backend in GRADCHECK]
)
def test_gradcheck(case: OpCase, backend: str) -> None:
    """``auto`` is the reference behind the op, with the backward written out."""
    clips = 2 if case.options else 1  # whose lengths differ
    kwargs = arguments(case, clips, torch.float64, sizes=case.gradcheck_sizes)
    inputs = [kwargs[n] for n in case.gradients]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = {**kwargs, **dict(zip(case.gradients, values, strict=True))}
        return tuple(differentiable(case.call(**replaced, backend=backend)))

    assert torch.autograd.gradcheck(function, inputs)


# -- 3: opcheck -----------------------------------------------------------------------------------


class _Calls(TorchDispatchMode):
    """Notes the calls of cmpose's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            # As they are before the call: an op may write to its arguments.
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func, tuple(copies)))
        return func(*args, **(kwargs or {}))


def registered_calls(case: OpCase, backend: str) -> list[tuple[Any, tuple[Any, ...]]]:
    with _Calls() as noted:
        run(case, backend, arguments(case))
    return noted.calls


def _permuted(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value.transpose(0, -1).contiguous().transpose(0, -1)


REGISTERED = [r for r in RUNS if r[1] != "reference"]


@pytest.mark.parametrize("layout", ["compact", "permuted"])
@pytest.mark.parametrize(
    ("case", "backend"), REGISTERED, ids=[f"{case.id}-{backend}" for case, backend in REGISTERED]
)
def test_opcheck(case: OpCase, backend: str, layout: str) -> None:
    """Schema, fake and dispatch of every registered op that a call and its backward go through."""
    calls = registered_calls(case, backend)
    assert {func.__name__.partition(".")[0] for func, _ in calls} >= {case.name}
    assert len(calls) == (2 if case.gradients else 1) + (case.name == "reconstruction_loss")
    for func, args in calls:
        if layout == "compact":
            torch.library.opcheck(func, args)
        else:  # what strides could change
            args = tuple(_permuted(a) for a in args)
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor"))
        if not func.__name__.partition(".")[0].endswith("_"):
            assert_fake_matches(func, args)


# -- 4: torch.compile -----------------------------------------------------------------------------


def compiler_of(case: OpCase, backend: str) -> str:
    """Inductor where that is quick: for what ``auto`` runs on a CPU, and the small references.

    g++ takes up to half a minute for the code of another reference. The training step goes through
    Inductor too (``tests/models/test_backends.py``).
    """
    small = ("select_tokens", "merge_clusters", "unmerge_tokens")
    quick = backend == "cpu" or (backend == "reference" and case.name in small)
    return "inductor" if quick and shutil.which("g++") is not None else "aot_eager"


@every_run
def test_compiles_in_one_graph(case: OpCase, backend: str) -> None:
    """Without graph breaks, and without another compilation at other batch sizes."""
    torch._dynamo.reset()
    compiler = torch._dynamo.lookup_backend(compiler_of(case, backend))
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compiler(graph, inputs)

    def call(**kwargs: Any) -> Any:
        return case.call(**kwargs, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=count)
    for batch in (2, 3):
        kwargs, again = arguments(case, batch), arguments(case, batch)
        for name, value in again.items():
            if name not in case.unbatched:
                torch._dynamo.mark_dynamic(value, 0)
        expected, expected_grads = run(case, backend, kwargs)
        result = compiled(**again)
        for a, b in zip(leaves(result), expected, strict=True):
            torch.testing.assert_close(a, b)
        if case.gradients:
            actual = gradients(differentiable(result), [again[n] for n in case.gradients])
            for a, b in zip(actual, expected_grads, strict=True):
                torch.testing.assert_close(a, b)
    assert len(graphs) == 1


# -- 5: hostile gradients -------------------------------------------------------------------------


@every_gradient
def test_hostile_gradients(case: OpCase, backend: str) -> None:
    """Expanded, permuted and sliced output gradients give what compact ones give."""
    kwargs = arguments(case, dtype=precise(backend))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        replaced = {**kwargs, **dict(zip(case.gradients, values, strict=True))}
        return tuple(leaves(case.call(**replaced, backend=backend)))

    assert_gradient_strides(function, [kwargs[n] for n in case.gradients])


# -- 6: uninitialised memory ----------------------------------------------------------------------


@every_run
def test_uninitialised_memory_is_not_read(case: OpCase, backend: str) -> None:
    assert_writes_everything(lambda: everything(case, backend, arguments(case)))


# -- 7: autocast ----------------------------------------------------------------------------------


@every_run
def test_autocast_does_not_reach_inside(case: OpCase, backend: str) -> None:
    expected = everything(case, backend, arguments(case))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = leaves(case.call(**arguments(case), backend=backend))
    assert_same_bits([out.detach() for out in outputs], expected[: len(outputs)])
    if backend != "reference":  # whose backward is torch's own
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            actual = everything(case, backend, arguments(case))
        assert_same_bits(actual, expected)


# -- 8: second derivatives ------------------------------------------------------------------------


@every_gradient
def test_second_derivatives_raise_or_are_right(case: OpCase, backend: str) -> None:
    """The reference has them; elsewhere first derivatives with create_graph work, second raise."""
    kwargs = arguments(case, 1, precise(backend))
    inputs = [kwargs[n] for n in case.gradients]
    result = differentiable(case.call(**kwargs, backend=backend))
    total = torch.stack([out.square().sum() for out in result]).sum()
    grads = torch.autograd.grad(total, inputs, create_graph=True)
    plain = torch.autograd.grad(
        torch.stack(
            [out.square().sum() for out in differentiable(case.call(**kwargs, backend="reference"))]
        ).sum(),
        inputs,
    )
    for a, b in zip(grads, plain, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-4, atol=1e-4)
    penalty = torch.stack([g.square().sum() for g in grads]).sum()
    if backend == "reference":
        assert all(g.isfinite().all() for g in torch.autograd.grad(penalty, inputs))
        return
    with pytest.raises(RuntimeError, match=rf"{case.name}: .*no second derivative.*'reference'"):
        (total + penalty).backward()


def _transformed(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """Derivatives of a scalar function by other ways than autograd's backward pass."""
    func, ones = torch.func, tuple(torch.ones_like(t) for t in inputs)
    numbers, stacked = tuple(range(len(inputs))), [torch.stack((t, t)) for t in inputs]

    def dual_level() -> Tensor | None:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, ones, strict=True)]
            return forward_ad.unpack_dual(function(*duals)).tangent

    def batched(*values: Tensor) -> Tensor:
        return func.vmap(function)(*[t[None] for t in values])[0]

    return {
        "jvp": lambda: func.jvp(function, inputs, ones)[1],
        "jvp of vmap": lambda: func.jvp(batched, inputs, ones)[1],
        "dual_level": dual_level,
        "jacfwd": lambda: func.jacfwd(function, numbers)(*inputs),
        "grad": lambda: func.grad(function, numbers)(*inputs),
        "vmap of grad": lambda: func.vmap(func.grad(function, numbers))(*stacked),
    }


@every_gradient
def test_other_derivatives_raise_or_are_right(case: OpCase, backend: str) -> None:
    """Forward mode and torch.func: the reference has them, elsewhere they are never silently 0."""
    kwargs = arguments(case, 1, precise(backend))
    inputs = tuple(kwargs[n].detach() for n in case.gradients)
    kwargs = {n: v.detach() if isinstance(v, Tensor) else v for n, v in kwargs.items()}

    def function(*values: Tensor) -> Tensor:
        replaced = kwargs | dict(zip(case.gradients, values, strict=True))
        outputs = [
            o for o in leaves(case.call(**replaced, backend=backend)) if o.is_floating_point()
        ]
        return torch.stack([out.square().sum() for out in outputs]).sum()

    leaf = [t.clone().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(function(*leaf), leaf)
    for name, derive in _transformed(function, inputs).items():
        if backend != "reference":
            with pytest.raises(RuntimeError, match=rf"^{case.name}: .*backend='reference' has"):
                derive()
        elif name in ("jvp", "jvp of vmap", "dual_level"):
            total = torch.stack([g.sum() for g in exact]).sum()
            torch.testing.assert_close(derive(), total, rtol=1e-4, atol=1e-4)
        else:
            for actual, gradient in zip(derive(), exact, strict=True):
                actual = actual[0] if name == "vmap of grad" else actual
                torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


@every_gradient
def test_a_retained_graph_gives_its_gradients_again(case: OpCase, backend: str) -> None:
    kwargs = arguments(case, dtype=precise(backend))
    inputs = [kwargs[n] for n in case.gradients]
    outputs = differentiable(case.call(**kwargs, backend=backend))
    ones = [torch.ones_like(out) for out in outputs]
    first = torch.autograd.grad(outputs, inputs, ones, retain_graph=True)
    copies = [g.clone() for g in first]
    tripled = torch.autograd.grad(outputs, inputs, [3 * g for g in ones])
    for a, b, c in zip(first, copies, tripled, strict=True):
        assert torch.equal(a, b)  # a gradient that was returned does not change later
        torch.testing.assert_close(c, 3 * b)


# -- 9: bitwise repeat ----------------------------------------------------------------------------


@every_run
def test_bitwise_repeat(case: OpCase, backend: str) -> None:
    assert_repeats(lambda: everything(case, backend, arguments(case)), times=3)


# -- 10: sizes and strides ------------------------------------------------------------------------


@every_run
def test_empty_batch(case: OpCase, backend: str) -> None:
    full, _ = run(case, backend, arguments(case, 2))
    empty, grads = run(case, backend, arguments(case, 0))
    for a, b, clip in zip(empty, full, clip_dimensions(case, full), strict=True):
        assert a.dtype == b.dtype
        if clip is None:
            assert a == 0
        else:
            assert a.shape == b.narrow(clip, 0, 0).shape
    assert all(bool((g == 0).all()) for g in grads)


@every_run
def test_a_clip_does_not_depend_on_its_batch(case: OpCase, backend: str) -> None:
    kwargs = {n: v.detach() for n, v in arguments(case, 3, precise(backend)).items()}
    together = leaves(case.call(**kwargs, backend=backend))
    one = {n: v if n in case.unbatched else v[:1] for n, v in kwargs.items()}
    alone = leaves(case.call(**one, backend=backend))
    for a, b, clip in zip(alone, together, clip_dimensions(case, together), strict=True):
        if clip is not None:
            torch.testing.assert_close(a, b.narrow(clip, 0, 1))


@every_run
def test_strided_inputs(case: OpCase, backend: str) -> None:
    kwargs = arguments(case, dtype=precise(backend))
    expected = everything(case, backend, kwargs)

    def interleaved(value: Tensor) -> Tensor:
        return torch.stack((value, torch.zeros_like(value)), dim=-1)[..., 0]

    def backwards(value: Tensor) -> Tensor:
        return value.transpose(0, -1).contiguous().transpose(0, -1) if value.ndim else value

    for change in (interleaved, backwards):
        strided = {
            n: change(v.detach()).requires_grad_(v.requires_grad) if v.ndim > 1 else v
            for n, v in kwargs.items()
        }
        assert any(not v.is_contiguous() for v in strided.values())
        for a, b in zip(everything(case, backend, strided), expected, strict=True):
            torch.testing.assert_close(a, b)


# -- 11: device -----------------------------------------------------------------------------------


@every_run
def test_results_lie_where_the_inputs_do(case: OpCase, backend: str) -> None:
    kwargs = arguments(case)
    for result in everything(case, backend, kwargs):
        assert result.device == next(iter(kwargs.values())).device


def test_kernels_are_launched_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton takes the current device; the op makes the tensors' device the current one."""
    current = [0]
    devices: list[int] = []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_: Any) -> None:
            current[0] = self.before

    class OnCard:
        is_cuda = True

        def __init__(self, index: int) -> None:
            self.device = torch.device("cuda", index)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    run_on: Callable[..., Any] = library.on_device({"triton": lambda x: devices.append(current[0])})
    run_on(OnCard(1), "triton")
    run_on(OnCard(0), "triton")
    assert devices == [1, 0]
    assert current == [0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu() -> None:
    for case, backend in RUNS:
        kwargs = {n: v.detach() for n, v in arguments(case).items()}
        there = {n: v.to("cuda:1") for n, v in kwargs.items()}
        actual = leaves(case.call(**there, backend=backend))
        for a, b in zip(actual, leaves(case.call(**kwargs, backend=backend)), strict=True):
            assert a.device == torch.device("cuda:1")
            assert torch.equal(a.cpu(), b.cpu())
