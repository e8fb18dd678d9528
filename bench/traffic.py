"""Bytes that an op must move, and those that plain PyTorch moves: ``python -m bench.traffic``.

Counted, not timed, so the same on every machine. Plain PyTorch is each op's reference with
autograd on meta tensors, or what one would write with torch's own generator (corrupt_tokens) and
grid_sample (warp_clips): every ATen call that is not a view reads its inputs and writes its
outputs once (an expanded dimension counts once). The fused op reads each input element that it
needs once and writes each output once. Shapes are the reference shape of docs/performance.md:
32 clips, 3 frames, 192 tokens, 15 keypoints, 768 channels, 12 heads, bfloat16, three branches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cmpose import ops

B, T, N, K, D, H = 32, 3, 192, 15, 768, 12
S, BRANCHES, HEATMAP = N + K, 3, (64, 48)
RATIO = 0.45
BF16, FP32, UINT8 = 2, 4, 1


def size_in_memory(tensor: Tensor) -> int:
    """Bytes, an expanded dimension counted once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Counts the bytes and the calls of every ATen operator that moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and func is not torch.ops.aten.detach.default:
            inputs = {id(t): t for t in pytree.tree_leaves((args, kwargs)) if _is_tensor(t)}
            outputs = [t for t in pytree.tree_leaves(result) if _is_tensor(t)]
            moved = sum(map(size_in_memory, [*inputs.values(), *outputs]))
            self.bytes += moved
            self.calls += moved > 0
        return result


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class Case:
    """An op at the reference shape.

    Attributes:
        op: its name.
        call: its arguments → result, in plain PyTorch.
        arguments: on the meta device.
        forward, backward: bytes that the fused op moves.
    """

    op: str
    call: Callable[..., Any]
    arguments: dict[str, Tensor]
    forward: int
    backward: int


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=grad)


def _plain_corruption(
    tokens: Tensor, keypoint_tokens: Tensor, position: Tensor, seed: Tensor
) -> Tensor:
    """As one would write it, with torch's generator; Philox addressed by token costs more."""
    masked, noised = (
        (torch.rand(B, T * N, device=tokens.device).argsort(1) < round(RATIO * T * N)).view(B, T, N)
        for _ in range(2)
    )
    noise = torch.randn_like(tokens)
    branches = (
        tokens,
        tokens.masked_fill(masked[..., None], 0.0),
        torch.where(noised[..., None], tokens + noise, tokens),
    )
    keypoints = keypoint_tokens.expand(B, T, K, D)
    return torch.stack([torch.cat((branch, keypoints), dim=2) for branch in branches]) + position


def _plain_warp(frames: Tensor, matrices: Tensor) -> Tensor:
    """As one would write it: frames to floats, then grid_sample; the matrices as they need be."""
    grid = torch.nn.functional.affine_grid(
        matrices.repeat_interleave(T, 0), [B * T, 3, 256, 192], align_corners=False
    )
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    crops = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    mean, std = (torch.empty(3, 1, 1, device=frames.device) for _ in range(2))
    return ((crops - mean) / std).to(torch.bfloat16)


def _attention(op: str, tokens: int, saved: int) -> Case:
    one = BRANCHES * B * T * tokens * D * BF16
    return Case(
        op,
        getattr(ops, op),
        {"qkv": _meta(BRANCHES * B, T, tokens, 3, H, D // H, grad=True)},
        4 * one + saved,  # q, k, v → out
        7 * one + saved,  # q, k, v, d out → d q, d k, d v
    )


def cases() -> list[Case]:
    """The ops that have kernels."""
    patches, slots, position = B * T * N * D * BF16, B * T * S * D * BF16, T * S * D * BF16
    rows, flags = round(RATIO * T * N) * B, B * T * N * UINT8
    heatmaps = B * K * HEATMAP[0] * HEATMAP[1] * BF16
    crops = B * T * 3 * 256 * 192
    return [
        # The log-sum-exp of each row and head is written, and read again.
        _attention("spatial_attention", S, BRANCHES * B * T * S * H * FP32),
        _attention("temporal_attention", N, 0),
        Case(
            "corrupt_tokens",
            _plain_corruption,
            {
                "tokens": _meta(B, T, N, D, grad=True),
                "keypoint_tokens": _meta(K, D, grad=True),
                "position": _meta(T, S, D, grad=True),
                "seed": _meta(1, dtype=torch.int64),
            },
            patches + K * D * BF16 + position + BRANCHES * slots + 2 * flags,
            BRANCHES * slots + flags + patches + K * D * BF16 + position,
        ),
        Case(
            "reconstruction_loss",
            ops.reconstruction_loss,
            {
                "pred": _meta(B, T, N, D, grad=True),
                "target": _meta(B, T, N, D),
                "corrupted": _meta(B, T, N, dtype=torch.bool),
            },
            2 * rows * D * BF16 + flags + patches,  # the gradient is written in the forward pass
            2 * rows * D * BF16 + flags,  # nothing if the upstream gradient is 1
        ),
        Case(
            "heatmap_loss",
            ops.heatmap_loss,
            {
                "pred": _meta(B, K, *HEATMAP, grad=True),
                "keypoints": _meta(B, K, 2, dtype=torch.float32),
                "visible": _meta(B, K, dtype=torch.float32),
            },
            2 * heatmaps,
            2 * heatmaps,  # nothing if the upstream gradient is 1
        ),
        Case(
            "warp_clips",
            _plain_warp,
            {
                "frames": _meta(B, T, 720, 1280, 3, dtype=torch.uint8),
                "matrices": _meta(B, 2, 3, dtype=torch.float32),
            },
            crops * UINT8 + crops * BF16,  # at scale 1: a source pixel for each of the crop's
            0,
        ),
    ]


@dataclass(frozen=True)
class Count:
    """Bytes and calls of plain PyTorch beside the fused op's bytes."""

    op: str
    direction: str
    plain_bytes: int
    plain_calls: int
    fused_bytes: int


def count() -> list[Count]:
    """Every case, forward and backward."""
    found = []
    for case in cases():
        with ops.backend("reference"), Traffic() as forward:
            result = case.call(**case.arguments)
        found.append(Count(case.op, "forward", forward.bytes, forward.calls, case.forward))
        if case.backward:
            out = result if isinstance(result, Tensor) else result[0]
            inputs = [t for t in case.arguments.values() if t.requires_grad]
            ones = torch.empty_like(out)
            with Traffic() as backward:
                torch.autograd.grad(out, inputs, ones)
            found.append(Count(case.op, "backward", backward.bytes, backward.calls, case.backward))
    return found


def table(found: list[Count]) -> str:
    """As a Markdown table."""
    lines = [
        "| op | direction | plain PyTorch, MB | in calls | fused, MB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for c in found:
        plain, fused = c.plain_bytes / 1e6, c.fused_bytes / 1e6
        lines.append(
            f"| `{c.op}` | {c.direction} | {plain:,.1f} | {c.plain_calls} | {fused:,.1f} | "
            f"{plain / fused:.1f}× |"
        )
    return "\n".join(lines)


def sentences(found: list[Count]) -> dict[str, str]:
    """For each op what docs/ops.md says of it."""
    said = {}
    for op in dict.fromkeys(c.op for c in found):
        forward, *backward = [c for c in found if c.op == op]
        plain = f"{forward.plain_bytes / 1e6:,.0f} MB in {forward.plain_calls} calls"
        fused = f"{forward.fused_bytes / 1e6:,.0f} MB"
        if backward:
            plain = f"{plain} forward and {backward[0].plain_bytes / 1e6:,.0f} MB in "
            plain += f"{backward[0].plain_calls} backward"
            fused = f"{fused} and {backward[0].fused_bytes / 1e6:,.0f} MB"
        said[op] = f"Traffic: plain PyTorch {plain}; fused {fused}."
    return said


if __name__ == "__main__":
    counted = count()
    print(table(counted))
    print()
    for op, sentence in sentences(counted).items():
        print(f"{op}: {sentence}")
