"""One case an op: arguments that fit it, for the tests that all ten share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmpose import ops

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An op, how to call it and what its tensors are.

    Attributes:
        name: the op's.
        make: (batch, dtype) → its arguments by name, the same ones every time.
        call: arguments and a backend → result.
        gradients: arguments that take a gradient.
        floating: arguments of floating point.
        follows: the argument whose dtype the first output has; None: float32 at least.
        unbatched: arguments that all clips share.
        batch_first: whether the first output's first dimension is the clip.
    """

    name: str
    make: Callable[[int, torch.dtype], Arguments]
    call: Callable[..., Any]
    gradients: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    follows: str | None = None
    unbatched: tuple[str, ...] = ()
    batch_first: bool = True


def leaves(result: Any) -> list[Tensor]:
    """The tensors of an op's result."""
    return [result] if isinstance(result, Tensor) else list(result)


def clip_dimensions(case: Case, result: Any) -> list[int | None]:
    """For each output the dimension that is the clip; None for a scalar."""
    return [
        None if leaf.ndim == 0 else 0 if case.batch_first or i else 1
        for i, leaf in enumerate(leaves(result))
    ]


def differentiable(result: Any) -> list[Tensor]:
    """Those of them that carry a gradient."""
    return [leaf for leaf in leaves(result) if leaf.requires_grad]


def gradients(outputs: Iterable[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of Σ (weights · output), with weights that differ from element to element."""
    total = sum(
        (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
        for out in outputs
    )
    assert isinstance(total, Tensor)
    return torch.autograd.grad(total, inputs)


def _normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _attention(batch: int, dtype: torch.dtype) -> Arguments:
    return {"qkv": _normal(dtype, batch, 3, 5, 3, 2, 8)}


def _corrupt(batch: int, dtype: torch.dtype) -> Arguments:
    return {
        "tokens": _normal(dtype, batch, 3, 7, 10),
        "keypoint_tokens": _normal(dtype, 4, 10, seed=1),
        "position": _normal(dtype, 3, 11, 10, seed=2),
        "seed": torch.tensor(11),
    }


def _reconstruction(batch: int, dtype: torch.dtype) -> Arguments:
    return {
        "pred": _normal(dtype, batch, 3, 7, 5),
        "target": _normal(dtype, batch, 3, 7, 5, seed=1),
        "corrupted": _uniform(batch, 3, 7) < 0.5,
    }


def _heatmap(batch: int, dtype: torch.dtype) -> Arguments:
    return {
        "pred": _normal(dtype, batch, 4, 9, 7),
        "keypoints": (_uniform(batch, 4, 2, seed=1) * 8).float(),
        "visible": (_uniform(batch, 4, seed=2) < 0.7).float(),
    }


def _warp(batch: int, dtype: torch.dtype) -> Arguments:
    matrices = torch.tensor([[0.6, 0.2, -1.0], [-0.1, 0.7, 2.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return {
        "frames": torch.randint(
            0, 256, (batch, 3, 12, 10, 3), generator=generator, dtype=torch.uint8
        ),
        "matrices": (matrices + 0.05 * _normal(torch.float64, batch, 2, 3)).to(dtype),
    }


def _select(batch: int, dtype: torch.dtype) -> Arguments:
    return {"logits": _normal(dtype, batch, 3, 11)}


def _dpc(batch: int, dtype: torch.dtype) -> Arguments:
    return {"tokens": _normal(dtype, batch, 13, 6), "valid": _uniform(batch, 13) < 0.8}


def _merge(batch: int, dtype: torch.dtype) -> Arguments:
    return {
        "tokens": _normal(dtype, batch, 13, 6),
        "weights": (_uniform(batch, 13) + 0.1).to(dtype),
        "assignment": (_uniform(batch, 13, seed=1) * 4).long(),
    }


def _unmerge(batch: int, dtype: torch.dtype) -> Arguments:
    order = _uniform(batch, 11, seed=3).argsort(dim=1)
    return {
        "causal": _normal(dtype, batch, 4, 6),
        "merged": _normal(dtype, batch, 3, 6, seed=1),
        "causal_index": order[:, :4].sort(dim=1).values,
        "noncausal_index": order[:, 4:].sort(dim=1).values,
        "assignment": (_uniform(batch, 7, seed=2) * 3).long(),
    }


@dataclass(frozen=True)
class Split:
    """The least a selection is."""

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
        Case("spatial_attention", _attention, ops.spatial_attention, ("qkv",), ("qkv",), "qkv"),
        Case("temporal_attention", _attention, ops.temporal_attention, ("qkv",), ("qkv",), "qkv"),
        Case(
            "corrupt_tokens",
            _corrupt,
            ops.corrupt_tokens,
            ("tokens", "keypoint_tokens", "position"),
            ("tokens", "keypoint_tokens", "position"),
            "tokens",
            ("keypoint_tokens", "position", "seed"),
            batch_first=False,
        ),
        Case(
            "reconstruction_loss",
            _reconstruction,
            lambda **kw: ops.reconstruction_loss(**kw, detach_target=False),
            ("pred", "target"),
            ("pred", "target"),
        ),
        Case(
            "heatmap_loss", _heatmap, ops.heatmap_loss, ("pred",), ("pred", "keypoints", "visible")
        ),
        Case("warp_clips", _warp, lambda **kw: ops.warp_clips(size=(8, 6), **kw)),
        Case(
            "select_tokens",
            _select,
            lambda **kw: ops.select_tokens(n=2, **kw),
            ("logits",),
            ("logits",),
            "logits",
        ),
        Case(
            "dpc_knn",
            _dpc,
            lambda **kw: ops.dpc_knn(k=3, num_clusters=4, **kw),
            (),
            ("tokens",),
        ),
        Case(
            "merge_clusters",
            _merge,
            lambda **kw: ops.merge_clusters(num_clusters=4, **kw),
            ("tokens", "weights"),
            ("tokens", "weights"),
            "tokens",
        ),
        Case(
            "unmerge_tokens",
            _unmerge,
            _call_unmerge,
            ("causal", "merged"),
            ("causal", "merged"),
            "causal",
        ),
    )
}
