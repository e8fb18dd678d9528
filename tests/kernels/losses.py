"""What the tests of the two loss kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from cmpose.kernels.launch import launch
from tests.ops.support.assertions import assert_same_bits

HALVES = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)
DTYPES = (torch.float32, *HALVES)
"""Triton's interpreter cannot compute in bfloat16."""

NORMALIZERS = {
    "float32": torch.tensor([2.75]),
    "float64": torch.tensor(2.75, dtype=torch.float64),
    "float16": torch.tensor([[2.75]], dtype=torch.float16),
    "int64": torch.tensor(7),
    "int16": torch.tensor([7], dtype=torch.int16),
    "bool": torch.tensor(True),
    "tiny": torch.tensor(1e-30),
    "negative": torch.tensor(-3.0),
    "zero": torch.tensor(0.0),
    "integer zero": torch.tensor(0),
    "infinite": torch.tensor(torch.inf),
    "nan": torch.tensor(torch.nan),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def spread(values: Tensor, dim: int, stride: int) -> Tensor:
    """A copy of ``values`` whose dimension ``dim`` has ``stride``; pages between are not touched.

    The stride fits in 32 bits, its product with the last index does not.
    """
    strides: list[int] = []
    step = 1
    for d, size in reversed([*enumerate(values.shape)]):
        strides.insert(0, stride if d == dim else step)
        step *= 1 if d == dim else size
    assert stride < 2**31 < (values.shape[dim] - 1) * stride
    size = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    buffer = torch.empty(size, device=values.device, dtype=values.dtype)
    return buffer.as_strided(values.shape, strides).copy_(values)


@contextmanager
def only_the_first_program(module: ModuleType) -> Iterator[None]:
    """Within it the launchers of ``module`` run a kernel's first program only.

    With outputs of which a single program sees offsets beyond 2^31, that tests their offsets.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "launch", lambda kernel, grid, *a, **k: launch(kernel, (1,), *a, **k))
        yield


def layouts(values: Tensor) -> dict[str, Tensor]:
    """``values`` in other layouts: each order of dimensions reversed or rotated, and slices."""
    results = {}
    dims = values.dim()
    for name, order in {
        "reversed": [*reversed(range(dims))],
        "rotated": [*range(1, dims), 0],
        "first two swapped": [1, 0, *range(2, dims)],
    }.items():
        back = [order.index(d) for d in range(dims)]
        results[name] = values.permute(order).contiguous().permute(back)
    for dim in range(dims):
        wide = torch.cat([values, torch.full_like(values, torch.nan)], dim)
        results[f"slice of {dim}"] = wide.narrow(dim, 0, values.shape[dim])
    results["every second element"] = values.repeat_interleave(2, -1)[..., ::2]
    return results


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str = "") -> None:
    """The same gradients bit for bit; the loss may be summed in another order on a GPU."""
    assert_same_bits(actual[1:], expected[1:], what)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=0, msg=what or None)


def assert_scales_in_place(
    scale: Callable[[Tensor, Tensor], None], shape: Sequence[int], counted: Tensor, device: str
) -> None:
    """``scale(gradient, upstream)`` multiplies what is counted, and for 1 touches nothing.

    That nothing is touched shows in signalling NaNs: arithmetic makes them quiet.

    Args:
        counted: bool, as many dimensions as ``shape`` and broadcastable to it.
    """
    counted = counted.expand(*shape)
    for dtype in DTYPES:
        before = random(*shape, seed=3, dtype=dtype).to(device)
        before[~counted] = torch.nan
        for upstream in (0.375, -2.0, 0.0):
            gradient = before.clone()
            scale(gradient, torch.tensor([upstream], device=device))
            assert torch.equal(gradient[counted], (before.float() * upstream).to(dtype)[counted])
            assert gradient[~counted].isnan().all()

    signalling = torch.full(tuple(shape), 0x7FA00000, dtype=torch.int32, device=device)
    one, two = (signalling.clone().view(torch.float32) for _ in range(2))
    scale(one, torch.ones((), device=device))
    assert_same_bits(one.view(torch.int32), signalling)
    scale(two, torch.full((), 2.0, device=device))
    assert ((two.view(torch.int32) != signalling) == counted).all()
