"""Linear maps whose products are of 8-bit floating-point numbers, for training.

The scaling is dynamic and tensor-wise, as ``torchao.float8`` has it by default: a tensor X is
rounded to X₈ = fp8(X / s), where s is the least power of two with which the largest |X| is in
fp8's range, found anew at each call. So no state is kept, and a run resumes exactly. Activations
and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57344).

Of y = x Wᵀ + b all three products are in fp8:

    y = s_x s_w · x₈ W₈ᵀ + b,  dx = s_g s_w · g₈ W₈,  dW = s_g s_x · g₈ᵀ x₈,

and db is the sum of the gradient g as it came. A power of two scales without rounding: the numbers
s·X₈ are bfloat16 numbers, so an emulation in float32 takes the same products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

FORWARD = torch.float8_e4m3fn
"""Of activations and weights."""

BACKWARD = torch.float8_e5m2
"""Of gradients, which span more binades."""

ALIGNMENT = 16
"""What ``torch._scaled_mm`` wants channels, and the number of rows that it sums over, to be a
multiple of."""

_LEAST = 1e-30
"""Below this the largest number of a tensor counts as this, so that zeros have a scale."""

_EXPONENT = 0x7F800000
"""The bits of a float32 number's exponent."""


class Scaled(NamedTuple):
    """``values`` [M, C] in fp8, contiguous, and the ``scale`` [] float32 to multiply them by."""

    values: Tensor
    scale: Tensor


def quantize(x: Tensor, dtype: torch.dtype) -> Scaled:
    """x [M, C] as s · fp8(x / s).

    Each number is off by at most half a unit in its last place: |s·x₈ − x| ≤ max(u·|x|, s·t/2),
    with u = 2⁻⁴ and t = 2⁻⁹ for e4m3, u = 2⁻³ and t = 2⁻¹⁶ for e5m2. NaN and infinity make NaN.
    """
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).clamp(min=_LEAST)
    # 448 / |x| at its largest, cut to its power of two.
    factor = torch.finfo(dtype).max / largest
    factor = (factor.view(torch.int32) & _EXPONENT).view(torch.float32)
    return Scaled((x.float() * factor).to(dtype), factor.reciprocal())


def _turned(x: Tensor) -> Tensor:
    """xᵀ [C, M'] of x [M, C]; zeros fill it up to a whole number of ``ALIGNMENT``."""
    missing = -x.shape[0] % ALIGNMENT
    turned = x.view(torch.uint8).t()  # not every device fills fp8 up; a zero's bits are zeros
    if missing:  # it would be copied otherwise too
        turned = F.pad(turned, (0, missing))
    return turned.contiguous().view(x.dtype)


class _Products(NamedTuple):
    """How products are taken: by the card's fp8 units, or emulated in float32 of any device."""

    emulate: bool

    def __call__(
        self,
        a: Scaled,
        b: Scaled,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        *,
        fast: bool = False,
    ) -> Tensor:
        """a bᵀ + bias: a [M, C], b [N, C], bias [N] of ``dtype`` → [M, N] in ``dtype``.

        ``fast`` lets the card keep sums in its tensor cores' own, shorter format, which torchao
        does in the forward pass only.
        """
        if not self.emulate:
            return torch._scaled_mm(
                a.values,
                b.values.t(),
                scale_a=a.scale,
                scale_b=b.scale,
                bias=bias,
                out_dtype=dtype,
                use_fast_accum=fast,
            )
        product = a.values.float() @ b.values.float().t() * (a.scale * b.scale)
        return (product if bias is None else product + bias.float()).to(dtype)


class _Linears(torch.autograd.Function):
    """``F.linear(x, W, b)`` for several W and b, by products in fp8; x is rounded once.

    Kept for the backward pass are x and the weights in fp8: a byte a number.
    """

    @staticmethod
    def forward(ctx: Any, emulate: bool, x: Tensor, *parameters: Tensor | None) -> Any:
        weights, biases = parameters[::2], parameters[1::2]
        multiply = _Products(emulate)
        rows = quantize(x.flatten(0, -2), FORWARD)
        scaled = [quantize(weight, FORWARD) for weight in weights if weight is not None]
        outputs = []
        for weight, bias in zip(scaled, biases, strict=True):
            bias = None if bias is None else bias.to(x.dtype)
            y = multiply(rows, weight, x.dtype, bias, fast=True)
            outputs.append(y.view(*x.shape[:-1], y.shape[1]))
        ctx.multiply, ctx.dtypes = multiply, [None if p is None else p.dtype for p in parameters]
        ctx.save_for_backward(*rows, *(part for weight in scaled for part in weight))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x_values, x_scale, *flat = ctx.saved_tensors
        multiply = ctx.multiply
        columns = Scaled(_turned(x_values), x_scale)
        d_x: Tensor | None = None
        d_parameters: list[Tensor | None] = []
        for index, gradient in enumerate(gradients):
            weight_dtype, bias_dtype = ctx.dtypes[2 * index : 2 * index + 2]
            weight = Scaled(flat[2 * index].t().contiguous(), flat[2 * index + 1])
            rows = gradient.flatten(0, -2)
            g = quantize(rows, BACKWARD)
            part = multiply(g, weight, gradient.dtype)
            d_x = part if d_x is None else d_x + part
            d_parameters.append(multiply(Scaled(_turned(g.values), g.scale), columns, weight_dtype))
            d_parameters.append(None if bias_dtype is None else rows.sum(0, dtype=bias_dtype))
        assert d_x is not None, "a linear map has a weight"
        return None, d_x.view(*gradients[0].shape[:-1], -1), *d_parameters


def linears(
    x: Tensor, *parameters: tuple[Tensor, Tensor | None], emulate: bool
) -> tuple[Tensor, ...]:
    """``F.linear(x, W, b)`` of one x for each (W, b), by products in fp8.

    Args:
        x: [..., C] bfloat16 or float16, emulated also float32.
        parameters: W [E, C] and b [E] or None, float32.
        emulate: takes the same products of the same rounded numbers in float32, on any device.

    Returns:
        [..., E] for each, in x's dtype. The gradients of W and b are float32.
    """
    flat = [part for pair in parameters for part in pair]
    return _Linears.apply(emulate, x, *flat)
