"""A case for each op: arguments that fit it, for the tests that all ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmpose import ops

Arguments = dict[str, Any]


@dataclass(frozen=True)
class OpCase:
    """An op, how to call it and what its tensors are.

    Attributes:
        name: the op's.
        make: (batch, dtype, sizes) → its arguments by name, the same ones every time.
        call: arguments and a backend → result.
        gradients: arguments that take a gradient.
        floating: arguments of floating point.
        follows: the argument whose dtype the first output has; None: float32 at least.
        unbatched: arguments that all clips share.
        batch_first: whether the first output's first dimension is the clip.
        kernel_sizes: sizes that the kernels take; the small defaults are for the reference.
        other_sizes: sizes of 1, primes, the largest, ..., all of which the kernels take.
        gradcheck_sizes: sizes for gradcheck, which calls the op twice for each element.
        reduction: about how many terms are summed into one element of a result or gradient.
        options: what the case is called beside the op's name, if it is not the op's usual call.
    """

    name: str
    make: Callable[..., Arguments]
    call: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    follows: str | None = None
    unbatched: tuple[str, ...] = ()
    batch_first: bool = True
    kernel_sizes: dict[str, int] = field(default_factory=dict)
    other_sizes: tuple[dict[str, int], ...] = ()
    gradcheck_sizes: dict[str, int] = field(default_factory=dict)
    reduction: int = 1
    options: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.options}" if self.options else self.name

    @property
    def backends(self) -> tuple[str, ...]:
        """Ways to run it: all that can run here, and ``auto`` where it falls back."""
        can = [name for name, reason in ops.available(self.name, DEVICE).items() if not reason]
        if self.name == "spatial_attention":
            # 16-bit heads of 64 and 80: tests/csrc/test_spatial_attention.py.
            can = [name for name in can if name != "cuda"]
        return ("auto", *can) if len(can) > 1 else tuple(can)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where cases run. On the CPU Triton kernels run in the interpreter (tests/conftest.py)."""


def dtypes_of(backend: str) -> tuple[torch.dtype, ...]:
    """The dtypes to test. Triton's interpreter computes bfloat16 wrongly, without an error."""
    if backend == "triton" and DEVICE == "cpu":
        return torch.float32, torch.float16
    return torch.float32, torch.float16, torch.bfloat16


def leaves(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else list(result)


def clip_dimensions(case: OpCase, result: Any) -> list[int | None]:
    """For each output the dimension that is the clip; None for a scalar."""
    return [
        None if leaf.ndim == 0 else 0 if case.batch_first or i else 1
        for i, leaf in enumerate(leaves(result))
    ]


def differentiable(result: Any) -> list[Tensor]:
    """The tensors of an op's result that carry a gradient."""
    return [leaf for leaf in leaves(result) if leaf.requires_grad]


def upstream(outputs: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output gradients that differ from element to element, representable in ``dtype``."""
    grads = []
    for out in outputs:
        ramp = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
        grads.append(ramp.to(dtype).to(out))
    return grads


def gradients(
    outputs: Iterable[Tensor], inputs: list[Tensor], dtype: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Gradients for output gradients that differ from element to element."""
    outputs = list(outputs)
    return torch.autograd.grad(outputs, inputs, upstream(outputs, dtype or torch.float32))


def _normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attention(
    batch: int, dtype: torch.dtype, T: int = 3, S: int = 5, H: int = 2, d: int = 8
) -> Arguments:
    return {"qkv": _normal(dtype, batch, T, S, 3, H, d)}


def _separate(
    batch: int, dtype: torch.dtype, T: int = 3, S: int = 5, H: int = 2, d: int = 8
) -> Arguments:
    """q, k and v that are no views of one projection, and lengths of which some are 0."""
    tensors = {n: _normal(dtype, batch, T, S, H, d, seed=i) for i, n in enumerate("qkv")}
    frame_lengths = (_uniform(batch, T, seed=3) * (S + 1)).long()
    clip_lengths = (_uniform(batch, seed=4) * (T + 1)).long()
    return tensors | {"frame_lengths": frame_lengths, "clip_lengths": clip_lengths}


def _call_spatial(
    q: Tensor, k: Tensor, v: Tensor, frame_lengths: Tensor, backend: str = "auto", **_: Tensor
) -> Any:
    out, lse = ops.spatial_attention(
        (q, k, v), lengths=frame_lengths, scale=0.1, return_lse=True, backend=backend
    )
    return out, lse.masked_fill(lse.isneginf(), 0.0)  # differences of infinities are NaN


def _call_temporal(
    q: Tensor, k: Tensor, v: Tensor, clip_lengths: Tensor, backend: str = "auto", **_: Tensor
) -> Any:
    return ops.temporal_attention((q, k, v), lengths=clip_lengths, causal=True, backend=backend)


def _corrupt(
    batch: int, dtype: torch.dtype, T: int = 3, N: int = 7, K: int = 4, D: int = 10
) -> Arguments:
    return {
        "tokens": _normal(dtype, batch, T, N, D),
        "keypoint_tokens": _normal(dtype, K, D, seed=1),
        "position": _normal(dtype, T, N + K, D, seed=2),
        "seed": torch.tensor(11),
    }


def _reconstruction(
    batch: int, dtype: torch.dtype, T: int = 3, N: int = 7, D: int = 5
) -> Arguments:
    return {
        "pred": _normal(dtype, batch, T, N, D),
        "target": _normal(dtype, batch, T, N, D, seed=1),
        "corrupted": _uniform(batch, T, N) < 0.5,
    }


def _heatmap(batch: int, dtype: torch.dtype, K: int = 4, h: int = 9, w: int = 7) -> Arguments:
    return {
        "pred": _normal(dtype, batch, K, h, w),
        "keypoints": (_uniform(batch, K, 2, seed=1) * 8).float(),
        "visible": (_uniform(batch, K, seed=2) < 0.7).float(),
    }


def _warp(batch: int, dtype: torch.dtype, T: int = 3, h: int = 12, w: int = 10) -> Arguments:
    matrices = torch.tensor([[0.6, 0.2, -1.0], [-0.1, 0.7, 2.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return {
        "frames": torch.randint(
            0, 256, (batch, T, h, w, 3), generator=generator, dtype=torch.uint8
        ),
        "matrices": (matrices + 0.05 * _normal(torch.float64, batch, 2, 3)).to(dtype),
    }


def _select(batch: int, dtype: torch.dtype, K: int = 3, N: int = 11) -> Arguments:
    return {"logits": _normal(dtype, batch, K, N)}


def _dpc(batch: int, dtype: torch.dtype, M: int = 13, D: int = 6) -> Arguments:
    return {"tokens": _normal(dtype, batch, M, D), "valid": _uniform(batch, M) < 0.8}


def _merge(batch: int, dtype: torch.dtype, M: int = 13, D: int = 6) -> Arguments:
    return {
        "tokens": _normal(dtype, batch, M, D),
        "weights": (_uniform(batch, M) + 0.1).to(dtype),
        "assignment": (_uniform(batch, M, seed=1) * 4).long(),
    }


def _unmerge(batch: int, dtype: torch.dtype, D: int = 6) -> Arguments:
    order = _uniform(batch, 11, seed=3).argsort(dim=1)
    return {
        "causal": _normal(dtype, batch, 4, D),
        "merged": _normal(dtype, batch, 3, D, seed=1),
        "causal_index": order[:, :4].sort(dim=1).values,
        "noncausal_index": order[:, 4:].sort(dim=1).values,
        "assignment": (_uniform(batch, 7, seed=2) * 3).long(),
    }


@dataclass(frozen=True)
class Split:
    """The two fields of a selection that unmerge_tokens reads."""

    causal: Tensor
    noncausal: Tensor


def _call_unmerge(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    backend: str = "auto",
) -> Tensor:
    selection = Split(causal_index, noncausal_index)
    return ops.unmerge_tokens(causal, merged, selection, assignment, backend=backend)


CASES = {
    case.name: case
    for case in (
        OpCase(
            "spatial_attention",
            _attention,
            ops.spatial_attention,
            ("qkv",),
            ("qkv",),
            "qkv",
            kernel_sizes={"d": 16},
            other_sizes=(
                {"T": 1, "S": 1, "H": 1, "d": 64},
                {"T": 1, "S": 67, "H": 1, "d": 80},
                {"T": 1, "S": 19, "H": 3, "d": 128},
            ),
            gradcheck_sizes={"S": 3, "d": 4},
            reduction=64,
        ),
        OpCase(
            "temporal_attention",
            _attention,
            ops.temporal_attention,
            ("qkv",),
            ("qkv",),
            "qkv",
            kernel_sizes={"d": 32},
            other_sizes=(
                {"T": 2, "S": 1, "H": 1, "d": 64},
                {"T": 5, "S": 7, "H": 3, "d": 80},
                {"T": 16, "S": 3, "H": 1, "d": 128},
            ),
            gradcheck_sizes={"S": 3, "d": 4},
            reduction=128,
        ),
        OpCase(
            "corrupt_tokens",
            _corrupt,
            ops.corrupt_tokens,
            ("tokens", "keypoint_tokens", "position"),
            ("tokens", "keypoint_tokens", "position"),
            "tokens",
            ("keypoint_tokens", "position", "seed"),
            batch_first=False,
            kernel_sizes={"T": 2, "N": 3, "K": 1, "D": 10},
            other_sizes=(
                {"T": 1, "N": 1, "K": 1, "D": 1},
                {"T": 3, "N": 13, "K": 2, "D": 80},
                {"T": 1, "N": 5, "K": 2, "D": 769},
            ),
            gradcheck_sizes={"T": 2, "N": 5, "K": 2, "D": 3},
            reduction=18,
        ),
        OpCase(
            "reconstruction_loss",
            _reconstruction,
            lambda **kw: ops.reconstruction_loss(**kw, detach_target=False),
            ("pred", "target"),
            ("pred", "target"),
            other_sizes=(
                {"T": 1, "N": 1, "D": 1},
                {"T": 2, "N": 37, "D": 80},
                {"T": 1, "N": 5, "D": 1031},
            ),
            reduction=210,
        ),
        OpCase(
            "heatmap_loss",
            _heatmap,
            ops.heatmap_loss,
            ("pred",),
            ("pred", "keypoints", "visible"),
            other_sizes=(
                {"K": 1, "h": 1, "w": 1},
                {"K": 17, "h": 11, "w": 13},
                {"K": 2, "h": 64, "w": 48},
            ),
            reduction=504,
        ),
        OpCase(
            "warp_clips",
            _warp,
            lambda **kw: ops.warp_clips(size=(8, 6), **kw),
            other_sizes=({"T": 1, "h": 1, "w": 1}, {"T": 5, "h": 37, "w": 40}),
        ),
        OpCase(
            "select_tokens",
            _select,
            lambda **kw: ops.select_tokens(n=2, **kw),
            ("logits",),
            ("logits",),
            "logits",
            other_sizes=({"K": 1, "N": 2}, {"K": 15, "N": 192}, {"K": 17, "N": 67}),
            reduction=192,
        ),
        OpCase(
            "dpc_knn",
            _dpc,
            lambda **kw: ops.dpc_knn(k=3, num_clusters=4, **kw),
            (),
            ("tokens",),
        ),
        OpCase(
            "merge_clusters",
            _merge,
            lambda **kw: ops.merge_clusters(num_clusters=4, **kw),
            ("tokens", "weights"),
            ("tokens", "weights"),
            "tokens",
            other_sizes=({"M": 1, "D": 1}, {"M": 67, "D": 80}, {"M": 1031, "D": 7}),
            reduction=1031,
        ),
        OpCase(
            "unmerge_tokens",
            _unmerge,
            _call_unmerge,
            ("causal", "merged"),
            ("causal", "merged"),
            "causal",
            other_sizes=({"D": 1}, {"D": 80}, {"D": 769}),
            reduction=7,
        ),
        OpCase(
            "knn",
            _dpc,
            lambda **kw: ops.knn(**{"k": 4, "radius": 2.5} | kw),
            (),
            ("tokens",),
        ),
    )
}

OPTIONS = (
    OpCase(
        "spatial_attention",
        _separate,
        _call_spatial,
        ("q", "k", "v"),
        ("q", "k", "v"),
        "q",
        kernel_sizes={"d": 16},
        other_sizes=({"T": 1, "S": 1, "H": 1, "d": 16}, {"T": 2, "S": 67, "H": 1, "d": 80}),
        gradcheck_sizes={"T": 2, "S": 3, "d": 3},
        reduction=80,
        options="options",
    ),
    OpCase(
        "temporal_attention",
        _separate,
        _call_temporal,
        ("q", "k", "v"),
        ("q", "k", "v"),
        "q",
        kernel_sizes={"d": 16},
        other_sizes=(
            {"T": 1, "S": 3, "H": 1, "d": 16},
            {"T": 4, "S": 7, "H": 3, "d": 48},
            {"T": 5, "S": 2, "H": 1, "d": 80},
            {"T": 32, "S": 2, "H": 1, "d": 128},
        ),
        gradcheck_sizes={"S": 2, "d": 3},
        reduction=128,
        options="options",
    ),
)
"""Calls with every option, which the contract holds for too."""
