"""The messages of the shared checks, and that nothing stalls a device or a compiled graph."""

from __future__ import annotations

import math

import pytest
import torch

from cmpose import ops
from cmpose.ops import checks


def test_tensor_binds_sizes_across_arguments() -> None:
    sizes: checks.Sizes = {}
    checks.tensor("a", torch.zeros(2, 5), "B N", sizes)
    checks.tensor("b", torch.zeros(3, 2), "K B", sizes)
    checks.tensor("c", torch.zeros(8), "N+K", sizes)
    assert sizes == {"B": 2, "N": 5, "K": 3}
    with pytest.raises(ValueError, match=r"^d must have shape \[N, K\] with N=5 as .*got \[4, 3\]"):
        checks.tensor("d", torch.zeros(4, 3), "N K", sizes)
    with pytest.raises(ValueError, match=r"^e must have shape \[B, 3\], got \[2, 4\]"):
        checks.tensor("e", torch.zeros(2, 4), "B 3", sizes)
    with pytest.raises(ValueError, match=r"^f must have shape \[N\+K\] with N\+K=8 .*got \[7\]"):
        checks.tensor("f", torch.zeros(7), "N+K", sizes)
    with pytest.raises(ValueError, match=r"^g must have shape \[B\], got \[\]"):
        checks.tensor("g", torch.tensor(1.0), "B", sizes)


def test_types() -> None:
    with pytest.raises(TypeError, match=r"^a must be a torch.Tensor, got list"):
        checks.tensor("a", [1.0], "B", {})
    with pytest.raises(TypeError, match=r"^a must be of dtype bool, got uint8"):
        checks.tensor("a", torch.zeros(1, dtype=torch.uint8), "B", {}, checks.BOOL)
    with pytest.raises(TypeError, match=r"^a must be of dtype float32, float64, .*got complex64"):
        checks.tensor("a", torch.zeros(1, dtype=torch.complex64), "B", {})


def test_between_refuses_nan() -> None:
    checks.between("a", 1, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"^a must be between 1.0 and 2.0 \(why\), got nan"):
        checks.between("a", math.nan, 1.0, 2.0, "why")


def test_values_are_read_on_the_cpu_only() -> None:
    assert checks.readable(torch.zeros(1))
    assert not checks.readable(torch.zeros(1, device="meta"))
    checks.finite("a", torch.zeros(1, device="meta"))
    checks.indices("a", torch.zeros(1, device="meta", dtype=torch.int64), 1, "things")
    checks.indices("a", torch.zeros(0, dtype=torch.int64), 1, "things")


def test_compiled_graphs_do_not_look_at_values() -> None:
    """A check that read a value would break the graph; the shapes are checked all the same."""
    compiled = torch.compile(
        lambda t: ops.dpc_knn(t, 2, 2).assignment, fullgraph=True, backend="eager"
    )
    tokens = torch.full((1, 4, 2), math.nan)
    assert ((compiled(tokens) >= 0) & (compiled(tokens) < 2)).all()
    with pytest.raises(Exception, match=r"k must be between 1 and 1"):
        compiled(tokens[:, :1])


def test_accumulator() -> None:
    low, single, double = (torch.zeros(1, dtype=d) for d in (torch.half, torch.float, torch.double))
    assert checks.accumulator(low) == checks.accumulator(low, single) == torch.float32
    assert checks.accumulator(low, double) == torch.float64


def test_values_are_not_looked_at_on_request():
    tokens = torch.full((1, 4, 2), float("nan"))
    with pytest.raises(ValueError, match="tokens must be finite"):
        ops.dpc_knn(tokens, 2, 2)
    with ops.without_value_checks():
        result = ops.dpc_knn(tokens, 2, 2)
        with pytest.raises(ValueError, match="k must"):
            ops.dpc_knn(tokens, 9, 2)
    assert result.assignment.min() >= 0
    assert result.assignment.max() < 2
    with pytest.raises(ValueError, match="tokens must be finite"):
        ops.dpc_knn(tokens, 2, 2)
