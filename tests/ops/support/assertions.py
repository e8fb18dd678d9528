"""Assertions shared by the tests of ops and kernels; test_assertions.py plants faults for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

EPS_FP32 = torch.finfo(torch.float32).eps


def _element(tensor: Tensor, flat: int) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), tensor.shape))


# Long: nearly half of it is the formula and what it can see.
def assert_as_close_as_eager(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    reduction: int = 1,
    roundings: int = 1,
    terms: float = 0.0,
) -> None:
    """``actual`` errs no more than plain PyTorch does in the same precision.

    With e = actual − exact in float64, four measures must each satisfy

        measure(actual) ≤ measure(eager)
            + (√reduction · ε₃₂ + (roundings − 1) · ε/2) · max(scale, terms) + ε/2 · scale + ν/2

    - worst, max |e|, with scale max |exact|;
    - mean, mean |e|, with scale mean |exact|;
    - bias, |mean e|, with scale mean |exact|;
    - gain, |Σ e·exact| / √(n · Σ exact²), with scale √(mean exact²),

    where ε₃₂ is float32's spacing at 1 (sums are kept in float32: a random walk of ``reduction``
    roundings), ε that of the output's dtype and ν its smallest subnormal.

    It catches any factor of 1 % on the whole in float32, float16 and bfloat16 (gain: eager's
    roundings cancel in it, a factor does not), a constant added everywhere (bias) and a single
    element that is off by more than eager's worst error and the allowance: together 0.8 % of the
    largest element in bfloat16, 0.1 % in float16, if eager only rounds its result. It cannot see
    1 % on a few elements that are small beside the largest: that is less than what eager does to
    the largest.

    Args:
        actual: what is tested, float32, float16 or bfloat16.
        eager: the reference on the same inputs in the same dtype.
        exact: the reference in float64 on the same, already rounded inputs.
        reduction: how many terms are summed into one element; of stages one after another the
            largest.
        roundings: how often a number is rounded to the output's dtype on its way. 1 is the result
            alone; 2 for a kernel that rounds the factors of a second matrix product.
        terms: the size of what is summed, for results in which it cancels (softmax's gradient
            over a single key is 0).

    Raises:
        AssertionError: a measure is too large, NaN or infinity where ``exact`` (rounded to the
            dtype) has none or the other way round, or another shape or dtype.
    """
    assert exact.dtype == torch.float64, f"exact must be float64, got {exact.dtype}"
    assert actual.dtype == eager.dtype, f"dtype {actual.dtype}, eager has {eager.dtype}"
    assert actual.is_floating_point(), f"compare {actual.dtype} with torch.equal"
    assert actual.shape == eager.shape == exact.shape, (
        f"shape {list(actual.shape)}, eager {list(eager.shape)}, exact {list(exact.shape)}"
    )
    kind = torch.finfo(actual.dtype)
    f, e = (t.detach().to(exact).flatten() for t in (actual, eager))
    # A value that rounds to infinity in the dtype counts as infinite.
    x = exact.detach().to(actual.dtype).to(exact).flatten()
    odd = ~(f.isfinite() & x.isfinite())
    wrong = (odd & (f != x) & ~(f.isnan() & x.isnan())).nonzero().flatten()
    if len(wrong):
        at = int(wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {f.numel()} elements are not finite where exact is, or the other "
            f"way round; the first is {_element(actual, at)}: found {float(f[at])}, exact "
            f"{float(x[at])}"
        )
    x = exact.detach().flatten()[~odd]
    if len(x) == 0:
        return
    inside = reduction**0.5 * EPS_FP32 + (roundings - 1) * kind.eps / 2
    subnormal = kind.tiny * kind.eps / 2
    # Where eager overflows on its way, it is taken as exact: its error would allow anything.
    errors = [f[~odd] - x, torch.where(e[~odd].isfinite(), e[~odd] - x, 0)]
    rms = float(x.square().mean().sqrt())
    scales = {"worst": float(x.abs().max())}
    scales |= {"mean": float(x.abs().mean()), "bias": float(x.abs().mean()), "gain": rms}
    measures = [
        {
            "worst": float(error.abs().max()),
            "mean": float(error.abs().mean()),
            "bias": abs(float(error.mean())),
            "gain": abs(float((error * x).mean())) / rms if rms else 0.0,
        }
        for error in errors
    ]
    failed, lines = [], []
    for name, scale in scales.items():
        ours, eagers = measures[0][name], measures[1][name]
        allowance = inside * max(scale, terms) + kind.eps / 2 * scale + subnormal
        lines.append(f"{name}: {ours:.3e} ≤ eager {eagers:.3e} + allowance {allowance:.3e}")
        if not ours <= eagers + allowance:
            failed.append(name)
            lines[-1] = f"{name}: {ours:.3e} > eager {eagers:.3e} + allowance {allowance:.3e}"
    if failed:
        at = int((~odd).nonzero().flatten()[errors[0].abs().argmax()])
        whole = float(exact.flatten()[at])
        raise AssertionError(
            f"{', '.join(failed)} error too large ({actual.dtype}, reduction {reduction}); the "
            f"worst element is {_element(actual, at)}: found {float(f[at]):.9g}, eager "
            f"{float(e[at]):.9g}, exact {whole:.9g}\n  " + "\n  ".join(lines)
        )


def _strides(tensor: Tensor) -> list[int | None]:
    """Its strides; None where they mean nothing: in dimensions of size 1 and empty tensors."""
    empty = tensor.numel() == 0
    return [
        None if empty or n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def assert_layout(
    actual: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    strides: Sequence[int] | None = None,
) -> None:
    """``actual`` has this shape and dtype and these strides; None: it is contiguous.

    Raises:
        AssertionError: it has not.
    """
    assert list(actual.shape) == list(shape), f"shape {list(actual.shape)}, not {list(shape)}"
    assert actual.dtype == dtype, f"dtype {actual.dtype}, not {dtype}"
    expected = torch.empty(tuple(shape), device="meta")
    if strides is not None:
        expected = torch.empty_strided(tuple(shape), tuple(strides), device="meta")
    assert _strides(actual) == _strides(expected), (
        f"strides {list(actual.stride())} of shape {list(shape)}, not {list(expected.stride())}"
    )


def assert_fake_matches(op: Callable[..., Any], args: Sequence[Any]) -> None:
    """The fake of ``op`` promises what ``op`` returns: structure, shapes, strides, dtype, device.

    ``torch.compile`` plans memory by the fake; where it is wrong, results are wrong silently.

    Args:
        op: an OpOverload, or any function that FakeTensorMode can run.
        args: real ones.

    Raises:
        AssertionError: a promise is not kept.
    """
    with torch.no_grad():
        real, form = pytree.tree_flatten(op(*args))
        with FakeTensorMode() as mode:
            fake_args = pytree.tree_map_only(Tensor, mode.from_tensor, list(args))
            fake, fake_form = pytree.tree_flatten(op(*fake_args))
    assert form == fake_form, f"returns {form}, the fake {fake_form}"
    for index, (r, f) in enumerate(zip(real, fake, strict=True)):
        if not isinstance(r, Tensor):
            assert r == f, f"result {index} is {r!r}, the fake's {f!r}"
            continue
        for name, ours, promised in (
            ("shape", list(r.shape), list(f.shape)),
            ("strides", _strides(r), _strides(f)),
            ("offset", r.storage_offset(), f.storage_offset()),
            ("dtype", r.dtype, f.dtype),
            ("device", r.device, f.device),
        ):
            assert ours == promised, f"result {index} has {name} {ours}, its fake {promised}"


def hostile_gradients(shape: Sequence[int], like: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Named gradients that are not contiguous, as autograd makes them.

    Read as if it were contiguous, each gives other numbers, but stays inside its memory.

    Args:
        shape: of the output.
        like: gives dtype and device.
    """
    n = torch.Size(shape).numel()
    if n == 0:
        return
    ramp = torch.linspace(-1, 2, 2 * n, dtype=torch.float64).to(like)
    weights = ramp[:n].reshape(tuple(shape))
    one = ramp[n // 2 :][:1].view([1] * len(shape))
    yield "of a sum: one number expanded", one.expand(torch.Size(shape))
    for dim, size in enumerate(shape):
        if size < 2:
            continue
        first = weights.narrow(dim, 0, 1)
        yield f"of a sum over dimension {dim}: expanded", first.expand(*shape)
        wide = torch.cat([ramp[n:].reshape(tuple(shape)).narrow(dim, 0, 1), weights], dim)
        yield f"of a cat along dimension {dim}: a part", wide.narrow(dim, 1, size)
        turned = weights.transpose(0, dim).contiguous().transpose(0, dim)
        if not turned.is_contiguous():
            yield f"of a transpose of 0 and {dim}: permuted", turned
    if shape:
        yield "of a slice: every second one", ramp.reshape(*shape, 2)[..., 0]
        every = list(reversed(range(len(shape))))
        turned = weights.permute(every).contiguous().permute(every)
        if not turned.is_contiguous():
            yield "of a permute: all dimensions reversed", turned


def assert_gradient_strides(function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """The gradients of ``function`` do not depend on the strides of the output gradient.

    Each output that carries a gradient gets those of :func:`hostile_gradients` and their
    contiguous copies. The results may differ by rounding: by ε of their dtype times the largest
    element, and √n · ε₃₂ times it for sums in another order (in float64 its own ε).

    Args:
        function: ``inputs`` → a tensor or a tuple.
        inputs: at least one requires a gradient.

    Raises:
        AssertionError: a gradient depends on strides; or nothing was compared.
    """
    outputs = pytree.tree_leaves(function(*inputs))
    leaves = [i for i in inputs if i.requires_grad]
    compared = 0
    for index, out in enumerate(outputs):
        if not (isinstance(out, Tensor) and out.requires_grad):
            continue
        gradients_of = partial(
            torch.autograd.grad, out, leaves, retain_graph=True, allow_unused=True
        )
        results: list[tuple[Tensor, tuple[Tensor, ...]]] = []  # half of the copies are equal
        for name, grad in hostile_gradients(out.shape, out):
            compact = grad.clone(memory_format=torch.contiguous_format)
            expected = next((b for a, b in results if torch.equal(a, compact)), None)
            if expected is None:
                expected = gradients_of(grad_outputs=compact)
                results.append((compact, expected))
            actual = gradients_of(grad_outputs=grad)
            for position, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert (a is None) == (b is None), f"output {index}, gradient {name}: {a}, {b}"
                if a is None or a.numel() == 0:
                    continue
                compared += 1
                eps = torch.finfo(a.dtype).eps
                sums = out.numel() ** 0.5 * (eps if a.dtype == torch.float64 else EPS_FP32)
                allowed = (eps + sums) * float(b.abs().max())
                off = (a.double() - b.double()).abs()
                at = int(off.argmax())
                assert float(off.flatten()[at]) <= allowed, (
                    f"output {index}'s gradient {name}, strides {list(grad.stride())}: input "
                    f"{position}'s gradient has {float(a.flatten()[at]):.9g} at {_element(a, at)}, "
                    f"{float(b.flatten()[at]):.9g} when contiguous (allowed {allowed:.3e} off)"
                )
    assert compared or all(i.numel() == 0 for i in leaves), "no output carries a gradient"


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Tensors, or nested tuples of them, agree bit for bit; NaN equals the same NaN.

    Raises:
        AssertionError: they do not.
    """
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for index, (a, b) in enumerate(pairs):
        if not isinstance(a, Tensor):
            assert a == b, f"{what}result {index}: {a!r}, not {b!r}"
            continue
        assert_layout(a, b.shape, b.dtype, b.stride())
        size = a.element_size()
        bits = [t.detach().contiguous().flatten().view(torch.uint8).view(-1, size) for t in (a, b)]
        differ = (bits[0] != bits[1]).any(dim=1).nonzero().flatten()
        if len(differ):
            at = int(differ[0])
            raise AssertionError(
                f"{what}result {index}: {len(differ)} of {a.numel()} elements have other bits; "
                f"the first is {_element(a, at)}: {a.flatten()[at].item()!r}, not "
                f"{b.flatten()[at].item()!r}"
            )


def assert_repeats(function: Callable[[], Any], times: int = 5) -> Any:
    """``function`` gives the same bits each of ``times`` times; returns its result.

    Raises:
        AssertionError: it does not.
    """
    first = function()
    for call in range(1, times):
        assert_same_bits(function(), first, f"call {call} of {times} differs from the first, ")
    return first


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within it ``torch.empty`` gives NaN, the largest integers and True, on every device.

    What a function leaves unwritten, or reads before it is written, shows in its result.
    """
    state = torch.are_deterministic_algorithms_enabled()
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Only warn: cuBLAS, which a reference may call, wants an environment variable otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(1).isnan(), "torch does not fill uninitialised memory"
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(state, warn_only=warn)


def assert_writes_everything(function: Callable[[], Any]) -> None:
    """``function`` gives the same bits whether fresh memory is poisoned or not.

    Raises:
        AssertionError: it does not: it leaves memory unwritten, or reads it before it writes it.
    """
    expected = function()
    with poisoned_memory():
        actual = function()
    assert_same_bits(actual, expected, "in poisoned memory, ")
