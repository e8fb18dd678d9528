"""Bytes that an op must move, and those that plain PyTorch moves: ``python -m bench.traffic``.

Counted, not timed, so the same on every machine. Plain PyTorch is each op's reference with
autograd on meta tensors, or what one would write with torch's own generator (corrupt_tokens) and
grid_sample (warp_clips): every ATen call that is not a view reads its inputs and writes its
outputs once (an expanded dimension counts once). The fused op reads each input element that it
needs once and writes each output once. Shapes are the reference shape of docs/performance.md:
32 clips, 3 frames, 192 tokens, 15 keypoints, 768 channels, 12 heads, bfloat16, three branches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bench import corrupt_tokens, heatmap_loss, reconstruction_loss, warp_clips
from bench.cases import BACKWARD, BRANCHES, FORWARD, PERCENT, total_bytes
from cmpose import ops

B, T, N, K, D, H = 32, 3, 192, 15, 768, 12
S, HEATMAP = N + K, (64, 48)
BF16 = 2
"""Bytes."""


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
            moved = total_bytes([*inputs.values(), *outputs])
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


def _warp(frames: Tensor, matrices: Tensor) -> Tensor:
    return warp_clips.plain(frames, matrices, (256, 192), torch.bfloat16)


_SHAPE = {"B": B, "T": T, "N": N, "K": K, "H": H, "d": D // H, "p": PERCENT}
_HEATMAPS = {"B": B, "K": K, "h": HEATMAP[0], "w": HEATMAP[1]}


def _attention(op: str, tokens: int) -> Case:
    bench = importlib.import_module(f"bench.{op}").BENCH
    forward, backward = (bench.bytes(_SHAPE, BF16, way) for way in (FORWARD, BACKWARD))
    qkv = _meta(BRANCHES * B, T, tokens, 3, H, D // H, grad=True)
    return Case(op, getattr(ops, op), {"qkv": qkv}, forward, backward)


def cases() -> list[Case]:
    """The ops that have kernels; what the fused op moves is said by its own bench file."""
    loss = reconstruction_loss.moved(_SHAPE, BF16)
    heatmaps = heatmap_loss.moved(_HEATMAPS, BF16)
    crop = {"B": B, "T": T, "crop_h": 256, "crop_w": 192}
    return [
        _attention("spatial_attention", S),
        _attention("temporal_attention", N),
        Case(
            "corrupt_tokens",
            corrupt_tokens.plain,
            {
                "tokens": _meta(B, T, N, D, grad=True),
                "keypoint_tokens": _meta(K, D, grad=True),
                "position": _meta(T, S, D, grad=True),
                "seed": _meta(1, dtype=torch.int64),
            },
            corrupt_tokens.BENCH.bytes(_SHAPE, BF16, FORWARD),
            corrupt_tokens.BENCH.bytes(_SHAPE, BF16, BACKWARD),
        ),
        Case(
            "reconstruction_loss",
            ops.reconstruction_loss,
            {
                "pred": _meta(B, T, N, D, grad=True),
                "target": _meta(B, T, N, D),
                "corrupted": _meta(B, T, N, dtype=torch.bool),
            },
            loss["with gradient"],
            loss["scaled"],  # nothing if the upstream gradient is 1
        ),
        Case(
            "heatmap_loss",
            ops.heatmap_loss,
            {
                "pred": _meta(B, K, *HEATMAP, grad=True),
                "keypoints": _meta(B, K, 2, dtype=torch.float32),
                "visible": _meta(B, K, dtype=torch.float32),
            },
            heatmaps,
            heatmaps,  # nothing if the upstream gradient is 1
        ),
        Case(
            "warp_clips",
            _warp,
            {
                "frames": _meta(B, T, 720, 1280, 3, dtype=torch.uint8),
                "matrices": _meta(B, 2, 3, dtype=torch.float32),
            },
            warp_clips.moved(crop, BF16),
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
