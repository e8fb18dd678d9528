"""The model on every backend: the same training step and inference, compiled whole or not."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.models.cmpose import CMPose
from cmpose.models.losses import cmpose_loss
from tests.models.builders import build, clips, seed_tensor
from tests.ops.support.assertions import assert_as_close_as_eager
from tests.ops.support.cases import DEVICE

TRITON = (
    "spatial_attention",
    "temporal_attention",
    "corrupt_tokens",
    "reconstruction_loss",
    "heatmap_loss",
)
CUDA = ("select_tokens", "dpc_knn", "merge_clusters", "unmerge_tokens")
REGISTERED = {*TRITON, *CUDA} - {"dpc_knn", "merge_clusters"} | {"dpc_knn_merge"}
"""The operators in a training step's graph; the two that are missing run as dpc_knn_merge."""

REFUSED = ops.available(TRITON[0], DEVICE)["triton"]
KERNELS = pytest.param(
    "kernels", marks=pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))
)


def asking(backend: str) -> AbstractContextManager[None]:
    """``cuda`` asks for the CUDA C++ kernels of four ops, ``kernels`` for Triton's of five more."""
    if backend in ("kernels", "cuda"):
        triton = dict.fromkeys(TRITON, "triton") if backend == "kernels" else {}
        return ops.backend(**triton, **dict.fromkeys(CUDA, "cuda"))
    return ops.backend(backend) if backend != "auto" else nullcontext()


def batch_of(model: CMPose, batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Clips, seed, joints' centres and weights, with values that float32 holds in any dtype."""
    generator = torch.Generator().manual_seed(batch)
    K, (h, w) = model.config.num_keypoints, model.heatmap_size
    centers = torch.rand(batch, K, 2, generator=generator) * torch.tensor([w, h])
    weight = (torch.rand(batch, K, generator=generator) < 0.8).float()
    images = clips(batch, model.config)
    return tuple(
        t.to(DEVICE) for t in (images.to(dtype), seed_tensor(), centers.to(dtype), weight.to(dtype))
    )


def training_loss(model: CMPose, *batch: Tensor) -> Tensor:
    images, seed, centers, weight = batch
    return cmpose_loss(model(images, seed), centers, weight, model.config).total


def trained_step(model: CMPose, batch: tuple[Tensor, ...], loss: Any = training_loss) -> Any:
    """The loss and every weight's gradient."""
    model.zero_grad()
    total = loss(model, *batch)
    total.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total.detach(), gradients


@pytest.mark.parametrize("backend", ["auto", KERNELS])
def test_training_step_is_that_of_the_reference(backend: str) -> None:
    """Within the contract's rule, for the loss and every gradient, in float32."""
    model = build(num_frames=3).to(DEVICE).train()
    with asking(backend):
        loss, gradients = trained_step(model, batch_of(model, 2))
    with asking("reference"):
        eager_loss, eager = trained_step(model, batch_of(model, 2))
        exact_model = build(num_frames=3).to(DEVICE).train().double()
        exact_loss, exact = trained_step(exact_model, batch_of(model, 2, torch.float64))
    terms = 4 * model.backbone.width * 16  # of the longest sum, through as many layers
    assert_as_close_as_eager(loss, eager_loss, exact_loss, reduction=terms)
    assert set(gradients) == set(eager) == set(exact)
    assert len(gradients) == len(list(model.parameters()))
    for name, gradient in gradients.items():
        # The exact gradient of the keys' bias is 0; the terms that cancel in it are as large as in
        # its layer's weight.
        layer = exact.get(name.removesuffix("bias") + "weight")
        size = 0.0 if layer is None else float(layer.abs().max())
        assert_as_close_as_eager(gradient, eager[name], exact[name], reduction=terms, terms=size)


@pytest.mark.parametrize("backend", ["auto", KERNELS])
def test_inference_is_that_of_the_reference(backend: str) -> None:
    model = build().to(DEVICE).eval()
    images = batch_of(model, 2)[0]
    with torch.no_grad():
        with asking(backend):
            output = model(images)
        with asking("reference"):
            eager, exact = model(images), build().to(DEVICE).eval().double()(images.double())
    terms = 4 * model.backbone.width * 16
    for a, b, c in (
        (output.heatmaps, eager.heatmaps, exact.heatmaps),
        (output.coarse.tokens, eager.coarse.tokens, exact.coarse.tokens),
        (output.fine.selection.scores, eager.fine.selection.scores, exact.fine.selection.scores),
    ):
        assert_as_close_as_eager(a, b, c, reduction=terms)
    assert torch.equal(output.fine.selection.causal, eager.fine.selection.causal)
    assert torch.equal(output.fine.clusters.assignment, eager.fine.clusters.assignment)


def _compiled(backend: str, graphs: list[Any]) -> Any:
    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(training_loss, fullgraph=True, backend=count)


def _mark(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for index in (0, 2, 3):
        torch._dynamo.mark_dynamic(batch[index], 0)
    return batch


def _compare(model: CMPose, compiled: Any, sizes: tuple[int, ...], **tolerance: float) -> None:
    for size in sizes:
        expected, gradients = trained_step(model, batch_of(model, size))
        loss, compiled_gradients = trained_step(model, _mark(batch_of(model, size)), compiled)
        torch.testing.assert_close(loss, expected, **tolerance)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                compiled_gradients[name], gradient, **tolerance, msg=lambda m, n=name: n + m
            )


# Inductor takes minutes for all of a reference. Without g++ it cannot compile for the CPU.
INDUCTOR = "inductor" if shutil.which("g++") is not None else "aot_eager"


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [("auto", INDUCTOR), ("cuda", "aot_eager"), ("reference", "aot_eager")],
)
def test_training_step_compiles_whole(backend: str, compiler: str) -> None:
    """One graph, forward, losses and backward, and none more for other batch sizes."""
    # Inductor takes the stem with fewer kernels; the others are like the head's.
    stem = "patch" if compiler == "inductor" else "auto"
    model = build(stem=stem).to(DEVICE).train()
    graphs: list[Any] = []
    # Without vectors of its own g++ reads fewer headers for each of Inductor's kernels.
    with asking(backend), torch._inductor.config.patch("cpp.simdlen", 1):
        compiled = _compiled(compiler, graphs)
        _compare(model, compiled, (2, 3, 5), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    registered = {
        str(node.target)
        for part in graphs[0].modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
        if str(node.target).startswith("cmpose.")
    }
    expected = {f"cmpose.{op}.default" for op in REGISTERED} if backend != "reference" else set()
    assert {
        name for name in registered if "backward" not in name and "scale" not in name
    } == expected


def test_inference_compiles_whole() -> None:
    model = build().to(DEVICE).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = batch_of(model, 2)[0]
    with torch.no_grad():
        expected, actual = model(images), compiled(images)
    torch.testing.assert_close(actual.heatmaps, expected.heatmaps)
    assert torch.equal(actual.fine.clusters.assignment, expected.fine.clusters.assignment)
