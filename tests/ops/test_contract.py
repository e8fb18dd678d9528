"""What holds for all ten ops; their values are tested in test_<op>.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import backends
from tests.ops.cases import CASES, Case, clip_dimensions, differentiable, gradients, leaves

EPS = {d: torch.finfo(d).eps for d in (torch.float16, torch.bfloat16, torch.float32)}

every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_differentiable_op = pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if c.gradients],
    ids=[n for n, c in CASES.items() if c.gradients],
)


def arguments(case: Case, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The case's arguments, with gradients wanted where there are any."""
    made = case.make(batch, dtype)
    for name in case.gradients:
        made[name].requires_grad_()
    return made


def run(case: Case, made: dict[str, Any]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Outputs and gradients."""
    result = case.call(**made)
    outputs = differentiable(result)
    grads = gradients(outputs, [made[n] for n in case.gradients]) if case.gradients else ()
    return leaves(result), grads


def test_every_op_has_a_case() -> None:
    assert tuple(CASES) == backends.OPS
    assert set(backends.OPS) <= set(ops.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


@every_op
def test_bitwise_repeat(case: Case) -> None:
    first, second = run(case, arguments(case)), run(case, arguments(case))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@every_op
def test_compiles_in_one_graph(case: Case) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        made, again = arguments(case, batch), arguments(case, batch)
        expected, expected_grads = run(case, made)
        result = compiled(**again)
        for a, b in zip(leaves(result), expected, strict=True):
            torch.testing.assert_close(a, b)
        if case.gradients:
            found = gradients(differentiable(result), [again[n] for n in case.gradients])
            for a, b in zip(found, expected_grads, strict=True):
                torch.testing.assert_close(a, b)


@every_op
def test_empty_batch(case: Case) -> None:
    full, _ = run(case, arguments(case, 2))
    empty, grads = run(case, arguments(case, 0))
    for a, b, clip in zip(empty, full, clip_dimensions(case, full), strict=True):
        assert a.dtype == b.dtype
        if clip is None:
            assert a == 0
        else:
            assert a.shape == b.narrow(clip, 0, 0).shape
    assert all(bool((g == 0).all()) for g in grads)


@every_op
def test_a_clip_does_not_depend_on_its_batch(case: Case) -> None:
    made = case.make(3, torch.float64)
    together = leaves(case.call(**made))
    alone = leaves(case.call(**{n: v if n in case.unbatched else v[:1] for n, v in made.items()}))
    for a, b, clip in zip(alone, together, clip_dimensions(case, together), strict=True):
        if clip is not None:
            torch.testing.assert_close(a, b.narrow(clip, 0, 1))


@every_op
def test_strided_inputs(case: Case) -> None:
    made = case.make(2, torch.float64)
    expected = leaves(case.call(**made))
    strided = {}
    for name, value in made.items():
        wide = torch.stack((value, torch.zeros_like(value)), dim=-1)
        strided[name] = wide[..., 0] if value.ndim else value
        if value.ndim > 1:
            assert not strided[name].is_contiguous()
    for a, b in zip(leaves(case.call(**strided)), expected, strict=True):
        torch.testing.assert_close(a, b)
    backwards = {
        n: v.transpose(0, -1).contiguous().transpose(0, -1) for n, v in made.items() if v.ndim
    }
    for a, b in zip(leaves(case.call(**{**made, **backwards})), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers."""
    torch.use_deterministic_algorithms(True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@every_op
def test_uninitialised_memory_is_not_read(case: Case, poisoned_memory: None) -> None:
    outputs, grads = run(case, arguments(case))
    poisoned = [*outputs, *grads]
    torch.use_deterministic_algorithms(False)
    outputs, grads = run(case, arguments(case))
    for a, b in zip(poisoned, [*outputs, *grads], strict=True):
        assert torch.equal(a, b)


@every_op
def test_autocast_does_not_reach_inside(case: Case) -> None:
    expected = leaves(case.call(**case.make(2, torch.float32)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = leaves(case.call(**case.make(2, torch.float32)))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@every_op
@pytest.mark.parametrize("dtype", [*EPS, torch.float64], ids=str)
def test_dtypes(case: Case, dtype: torch.dtype) -> None:
    made = arguments(case, dtype=dtype)
    outputs, grads = run(case, made)
    at_least_32 = torch.float64 if dtype == torch.float64 else torch.float32
    if case.name == "warp_clips":
        assert outputs[0].dtype == torch.float32
    else:
        assert outputs[0].dtype == (dtype if case.follows else at_least_32)
    for name, grad in zip(case.gradients, grads, strict=True):
        assert grad.dtype == made[name].dtype
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.floating and n != "dpc_knn"])
def test_error_is_that_of_rounding(name: str, dtype: torch.dtype) -> None:
    """Against float64 on the same, already rounded inputs.

    Everything but attention is summed in float32 and rounded once: half an ulp of the output and
    a float32 ulp a term. Attention also rounds its logits (their size times an ulp moves a weight
    by that share), its weights and q · d^-1/2.
    """
    case = CASES[name]
    made = case.make(2, dtype)
    exact = {n: v.double() if n in case.floating else v for n, v in made.items()}
    found, truth = leaves(case.call(**made))[0], leaves(case.call(**exact))[0]
    scale = truth.abs().max()
    if "attention" in name:
        q, k, v = exact["qkv"].unbind(3)
        logit = (q.norm(dim=-1).max() * k.norm(dim=-1).max()) * q.shape[-1] ** -0.5
        allowed = EPS[dtype] * (2 * logit + 2) * v.abs().max()
    else:
        out = EPS[dtype] / 2 if case.follows else 0.0
        allowed = (out + 16 * EPS[torch.float32]) * scale
    assert (found.double() - truth).abs().max() <= allowed


@every_differentiable_op
def test_gradcheck(case: Case) -> None:
    made = arguments(case, 1, torch.float64)
    inputs = [made[n] for n in case.gradients]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        result = case.call(**{**made, **dict(zip(case.gradients, values, strict=True))})
        return tuple(differentiable(result))

    assert torch.autograd.gradcheck(function, inputs)


@every_differentiable_op
def test_hostile_gradients(case: Case) -> None:
    """Expanded, permuted and sliced output gradients give what compact ones give."""
    made = arguments(case, dtype=torch.float64)
    inputs = [made[n] for n in case.gradients]
    for out in differentiable(case.call(**made)):
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
        hostile = [torch.ones((), dtype=out.dtype).expand(out.shape)]
        if out.ndim:
            hostile.append(weights.transpose(0, -1).contiguous().transpose(0, -1))
            hostile.append(torch.stack((weights, weights + 1), dim=-1)[..., 0])
        for grad in hostile:
            expected = torch.autograd.grad(out, inputs, grad.contiguous(), retain_graph=True)
            found = torch.autograd.grad(out, inputs, grad, retain_graph=True)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)


@every_op
def test_unknown_backend_raises(case: Case) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*'opencl'"):
        case.call(**case.make(2, torch.float32), backend="opencl")


def _tensors(case: Case) -> list[str]:
    return [n for n, v in case.make(2, torch.float32).items() if isinstance(v, Tensor)]


ARGUMENTS = [(case, name) for case in CASES.values() for name in _tensors(case)]
every_argument = pytest.mark.parametrize(
    ("case", "name"), ARGUMENTS, ids=[f"{case.name}-{name}" for case, name in ARGUMENTS]
)


def _shown(name: str) -> str:
    """What a message calls an argument."""
    return {
        "causal_index": r"selection\.causal",
        "noncausal_index": r"selection\.noncausal",
    }.get(name, name)


@every_argument
def test_not_a_tensor(case: Case, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = 3
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be .*[Tt]ensor.* got int"):
        case.call(**made)


@every_argument
def test_wrong_dtype(case: Case, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = made[name].to(torch.int32)
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be of dtype .*got int32"):
        case.call(**made)


@every_argument
def test_wrong_shape(case: Case, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = torch.stack([made[name]] * 2)
    with pytest.raises(ValueError, match=rf"^{_shown(name)} must "):
        case.call(**made)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in ("seed", *_tensors(c)[:1])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_sizes_that_disagree(case: Case, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = torch.cat([made[name], made[name][-1:]])
    with pytest.raises(ValueError, match=r"^[\w.]+ must have shape .* got \["):
        case.call(**made)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in _tensors(c)[:1]],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_wrong_device(case: Case, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = made[name].to("meta")
    first = _tensors(case)[0]
    with pytest.raises(
        ValueError, match=rf"^{_shown(name)} must be on {first}'s device cpu, got meta"
    ):
        case.call(**made)
