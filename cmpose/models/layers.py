"""torch's layers with float32 weights, computing in the dtype of their input.

The dtype of the clips is the dtype of the whole model: bfloat16 clips make bfloat16 products,
norms and residuals, and every weight is cast where it is used. The optimiser, checkpoints and
gradients keep float32 (the master weights). Autocast would instead promote norms, and with them
the residual stream, to float32. Batch norms need no layer here: torch's take float32 weights and
statistics beside input of any dtype.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from cmpose.models import fp8


def cast(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """``weight`` in the dtype of ``like``; None stays None."""
    return None if weight is None else weight.to(like.dtype)


class Linear(nn.Linear):
    """``nn.Linear`` in the input's dtype; while training, by products in fp8 if it is told to.

    ``fp8`` says how: on the card's fp8 units, or emulated (:mod:`cmpose.models.fp8`). Training
    sets it (``train.products``). It is no part of the model: nothing in a folder tells of it.
    """

    fp8: Literal["off", "card", "emulated"] = "off"

    @property
    def in_fp8(self) -> bool:
        """Whether products are taken in fp8 now."""
        return self.training and self.fp8 != "off"

    def forward(self, x: Tensor) -> Tensor:
        if self.in_fp8:
            pair = (self.weight, self.bias)
            return fp8.linears(x, pair, emulate=self.fp8 == "emulated")[0]
        return F.linear(x, self.weight.to(x.dtype), cast(self.bias, x))


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` in the input's dtype; its statistics are at least float32, as in torch's."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = cast(self.weight, x), cast(self.bias, x)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(x.dtype), cast(self.bias, x))


class ConvTranspose2d(nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` in the input's dtype, without an output size."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose2d(
            x,
            self.weight.to(x.dtype),
            cast(self.bias, x),
            self.stride,
            self.padding,  # type: ignore[arg-type]
        )


class MultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` in the input's dtype, batch first, without attention weights."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        attended, _ = F.multi_head_attention_forward(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            self.embed_dim,
            self.num_heads,
            cast(self.in_proj_weight, query),
            cast(self.in_proj_bias, query),
            None,
            None,
            False,
            0.0,
            self.out_proj.weight.to(query.dtype),
            cast(self.out_proj.bias, query),
            training=self.training,
            need_weights=False,
        )
        return attended.transpose(0, 1)
