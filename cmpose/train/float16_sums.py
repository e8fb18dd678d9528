"""Matrix products summed in float16, emulated: what GeForce cards do at twice the rate.

With ``torch.backends.cuda.matmul.allow_fp16_accumulation`` cuBLAS adds up float16 products in
float16, as ``mma.sync.m16n8k16`` with float16 accumulators does. PTX says little of how: sums are
taken with at least the precision of the accumulator, in no stated order. Measured on cards
(Fasi et al. 2021, doi:10.7717/peerj-cs.330; Khattak and Mikaitis, arXiv:2510.15884, GeForce's too):
products are exact, some are summed together with the accumulator in more digits than it has,
subnormal numbers count, and the sum is rounded to the nearest float16 number. So here

    s₀ = 0,   sᵢ₊₁ = float16(sᵢ + Σ of the next STEP of a_k b_k),   a b = s at the end,

with k in ascending order. Assumed, as not documented for cuBLAS's kernels: that a rounding comes
after every 8 of k, the half of an instruction's 16 and so the more roundings of the two that can
be; and that one accumulator goes through all of k. Where cuBLAS splits k over blocks of threads,
each sums less, and float16 loses less. The sum within a step is float32's here, 13 bits longer
than float16's; cards cut off digits beyond some 24 bits there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

STEP = 8
"""Products that are summed with the accumulator before it is rounded."""

_aten = torch.ops.aten


def product(a: Tensor, b: Tensor, *, step: int | None = STEP) -> Tensor:
    """a b, summed in float16.

    Args:
        a: [M, K] or [B, M, K] float16.
        b: [K, N] or [B, K, N] float16.
        step: products between two roundings; None sums all in float32 and rounds once.

    Returns:
        [M, N] or [B, M, N] float16; infinite where a sum leaves float16's range.

    Raises:
        ValueError: for another dtype.
    """
    if a.dtype != torch.float16 or b.dtype != torch.float16:
        raise ValueError(f"a is {a.dtype}, b is {b.dtype}: sums in float16 are of float16 products")
    add = torch.addmm if a.dim() == 2 else torch.baddbmm
    rounded = a.new_zeros(*a.shape[:-1], b.shape[-1])
    sums = rounded.float()
    a, b = a.float(), b.float()
    step = step or max(1, a.shape[-1])
    for start in range(0, a.shape[-1], step):
        part = slice(start, start + step)
        add(sums, a[..., part], b[..., part, :], out=sums)
        sums.copy_(rounded.copy_(sums))
    return rounded


def _plus(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, step: int | None = STEP
) -> Tensor:
    """beta c + alpha a b; the sum of products is a float16 number before c is added."""
    return (alpha * product(a, b, step=step).float() + beta * c.float()).half()


def _plus_(c: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    return c.copy_(_plus(c, a, b, **options))


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    _aten.mm.default: product,
    _aten.bmm.default: product,
    _aten.addmm.default: _plus,
    _aten.baddbmm.default: _plus,
    _aten.addmm_.default: _plus_,
    _aten.baddbmm_.default: _plus_,
}
"""What calls cuBLAS's matrix products on a card, as the dispatcher sees it."""

CONVOLUTIONS = (_aten.convolution.default, _aten.convolution_backward.default)


class Float16Sums(TorchDispatchMode):
    """Within it every float16 matrix product is summed in float16, in backward passes too.

    That is what torch's switch reaches. Ops of cmpose are one operator to the dispatcher, whatever
    they do inside. Convolutions stay as they are; on a CPU they are computed of float32 copies and
    rounded once, as a card sums them, which takes a fraction of the time of a CPU's float16 ones.

    Args:
        step: as for :func:`product`. None makes the plain products of a card.
    """

    def __init__(self, step: int | None = STEP) -> None:
        super().__init__()
        self.step = step

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float16:
            if func in PRODUCTS:
                return PRODUCTS[func](*args, **kwargs, step=self.step)
            if func in CONVOLUTIONS and first.device.type == "cpu":
                return _in_float32(func, args)
        return func(*args, **kwargs)


def _in_float32(func: Any, args: tuple[Any, ...]) -> Any:
    wide = [value.float() if isinstance(value, Tensor) else value for value in args]
    result = func(*wide)
    if isinstance(result, Tensor):
        return result.half()
    return tuple(None if value is None else value.half() for value in result)
