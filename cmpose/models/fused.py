"""What the network computes in another order than its equations are written, for speed.

Every function states the plain formula that it equals; ``tests/models/test_fused.py`` holds it to
that formula in float64. What each saves is in ``docs/decisions.md``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from cmpose.models import fp8
from cmpose.models.layers import Linear
from cmpose.models.rows import Distinct, Read, everything, spread
from cmpose.models.vit import NORM_EPS, Block, BlockStack, call_recomputing


class _TwoProjections(torch.autograd.Function):
    """``F.linear(x, a, a_bias), F.linear(x, b, b_bias)`` by one product.

    x [..., D], the weights [E, D], the biases [E]; the results are two views [..., E] of one
    tensor. The backward pass is written out because autograd would first join the two gradients
    in one tensor [..., 2E], which moves more bytes than the single product saves. Here the second
    gradient's product is added into the first's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, a_bias: Tensor, b: Tensor, b_bias: Tensor) -> Any:
        ctx.save_for_backward(x, a, b)
        both = F.linear(x, torch.cat([a, b]), torch.cat([a_bias, b_bias]))
        first, second = both.split(len(a), dim=-1)
        return first, second

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        rows = [gradient.flatten(0, -2) for gradient in gradients]
        # These casts do nothing, unless autocast around the model changed the outputs' dtype.
        x_rows = x.flatten(0, -2).to(rows[0].dtype)
        weights = [weight.to(rows[0].dtype) for weight in weights]
        d_x = (rows[0] @ weights[0]).addmm_(rows[1], weights[1])
        d_parameters = [part for g in rows for part in (g.t() @ x_rows, g.sum(0))]
        return d_x.view_as(x), *d_parameters


def shared_projections(x: Tensor, a: Block, b: Block) -> tuple[Tensor, Tensor]:
    """``block.attn.qkv(block.norm1(x))`` of two blocks, by one norm and one product.

    With x̂ = (x − mean) / std, the norms of the blocks differ in scale γ and shift β only, which
    move into the projection: W (γ ⊙ x̂ + β) + b = (W ⊙ γ) x̂ + (W β + b). So x is normalised once,
    x̂ is kept once for the backward pass, and one product with a weight [6D, D] reads it once. In
    fp8 x̂ is rounded once, and each block's weight has a scale and a product of its own.

    Args:
        x: [B, T, S, D].
        a: a block, whatever its attention.
        b: another one.

    Returns:
        Two [B, T, S, 3·D], views of one tensor.
    """
    normal = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    folded: list[Tensor] = []
    for block in (a, b):
        weight, bias = block.attn.qkv.weight, block.attn.qkv.bias
        folded += [weight * block.norm1.weight, torch.mv(weight, block.norm1.bias) + bias]
    qkv = a.attn.qkv
    if qkv.in_fp8:
        pairs = ((folded[0], folded[1]), (folded[2], folded[3]))
        first, second = fp8.linears(normal, *pairs, emulate=qkv.fp8 == "emulated")
        return first, second
    # Folded in the weights' own precision, then rounded once.
    first, second = _TwoProjections.apply(normal, *(part.to(x.dtype) for part in folded))
    return first, second


def block_from_qkv(block: Block, x: Tensor, qkv: Tensor, read: Read = everything) -> Tensor:
    """``block(x, read=read)``, where ``qkv`` is ``block.attn.qkv(block.norm1(x))``."""
    x = read(x) + block.attn.proj(read(block.attn.attend_heads(qkv)))
    return x + block.mlp(block.norm2(x))


def both_stacks(
    a: BlockStack,
    b: BlockStack,
    x: Tensor,
    read_a: Read = everything,
    distinct: Distinct | None = None,
) -> tuple[Tensor, Tensor]:
    """``a(x, read=read_a), b(x)``.

    The first blocks of both read the same x, so their projections are shared. With ``distinct``
    they are computed for the tokens of x that differ.
    """
    first_a, first_b = cast(Block, a[0]), cast(Block, b[0])
    read_first = read_a if len(a) == 1 else everything

    def first_blocks(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        qkv_a, qkv_b = shared_projections(tokens, first_a, first_b)
        if distinct is not None:
            qkv_a, qkv_b = spread(qkv_a, distinct), spread(qkv_b, distinct)
        return block_from_qkv(first_a, x, qkv_a, read_first), block_from_qkv(first_b, x, qkv_b)

    tokens = x if distinct is None else distinct.tokens
    x_a, x_b = call_recomputing(first_blocks, a.recompute, x, tokens)
    return a(x_a, start=1, read=read_a), b(x_b, start=1)


def linear_of_concat(a: Tensor, b: Tensor, linear_a: Linear, linear_b: Linear) -> Tensor:
    """Linear(a ⊕ b) = ``linear_a(a) + linear_b(b)``; the second has no bias.

    The second product is added into the first's output: neither a ⊕ b nor a separate sum is
    written to memory. Products in fp8 add to nothing, so there the sum is.
    """
    if linear_b.in_fp8:
        return linear_a(a) + linear_b(b)
    out = linear_a(a).flatten(0, -2)
    weight = linear_b.weight.to(out.dtype)
    return out.addmm_(b.flatten(0, -2), weight.t()).view_as(a)
