"""Scores enlarged by two products: what bilinear interpolation gives, without its scatter."""

from __future__ import annotations

import pytest
import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch.fx import GraphModule

from cmpose.models.fine import score_heatmaps

SIZES = [
    ((16, 12), (64, 48)),
    ((4, 3), (16, 12)),
    ((1, 1), (3, 5)),
    ((5, 7), (5, 7)),
    ((9, 4), (4, 9)),
]


@pytest.mark.parametrize(("grid", "size"), SIZES)
def test_it_is_the_bilinear_interpolation(grid: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, grid[0] * grid[1], dtype=torch.float64, generator=generator)
    scores.requires_grad_()
    actual = score_heatmaps(scores, grid, size)
    expected = torch.nn.functional.interpolate(
        scores.unflatten(-1, grid), size=size, mode="bilinear"
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
    grads = [torch.autograd.grad(out, scores, upstream)[0] for out in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    scores = torch.rand(1, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: score_heatmaps(s, (4, 3), (7, 5)), [scores])


def test_no_scatter_in_the_compiled_graphs() -> None:
    torch._dynamo.reset()
    targets: list[str] = []

    def note(graph: GraphModule, inputs: list[torch.Tensor]) -> GraphModule:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def backend(graph: GraphModule, inputs: list[torch.Tensor]) -> object:
        from torch._inductor.decomposition import decompositions

        return aot_module_simplified(
            graph, inputs, fw_compiler=note, bw_compiler=note, decompositions=decompositions
        )

    def enlarged(function):
        scores = torch.rand(2, 3, 12, requires_grad=True)
        torch.compile(function, fullgraph=True, backend=backend)(scores).sum().backward()

    enlarged(lambda s: score_heatmaps(s, (4, 3), (16, 12)))
    assert any("mm" in t for t in targets)
    assert not [t for t in targets if "index_put" in t or "scatter" in t]
    targets.clear()
    torch._dynamo.reset()
    enlarged(
        lambda s: torch.nn.functional.interpolate(
            s.unflatten(-1, (4, 3)), size=(16, 12), mode="bilinear"
        )
    )
    assert [t for t in targets if "index_put" in t or "scatter" in t]  # what is watched for
