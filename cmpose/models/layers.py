"""torch's layers with float32 weights, computing in the dtype of their input.

The dtype of the clips is the dtype of the whole model: bfloat16 clips make bfloat16 products,
norms and residuals, and every weight is cast where it is used. The optimiser, checkpoints and
gradients keep float32 (the master weights). Autocast would instead promote norms, and with them
the residual stream, to float32. Batch norms need no layer here: torch's take float32 weights and
statistics beside input of any dtype.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def cast(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """``weight`` in the dtype of ``like``; None stays None."""
    return None if weight is None else weight.to(like.dtype)


class Linear(nn.Linear):
    """``nn.Linear`` in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
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
