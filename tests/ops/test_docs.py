"""docs/ops.md: a section an op, the signatures as they are, and examples that run."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from cmpose import ops
from cmpose.ops import backends
from cmpose.ops.backends import OPS
from tests.ops.support import tcformer
from tests.shared_data import PROJECT

TEXT = (PROJECT / "docs" / "ops.md").read_text(encoding="utf-8")
README = (PROJECT / "README.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)}

TCFORMER = "In place of TCFormer's clustering"


def run_example(title: str) -> dict[str, Any]:
    """The names that a section's example leaves."""
    (example,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], flags=re.M | re.S)
    names: dict[str, Any] = {}
    exec(compile(example, f"docs/ops.md: {title}", "exec"), names)
    return names


def test_a_section_an_op() -> None:
    assert tuple(SECTIONS)[1:] == (*OPS, TCFORMER, "In a TimeSformer-style block")


@pytest.mark.parametrize("name", OPS)
def test_limits_are_stated(name: str) -> None:
    """One row an op, which has a CPU path and kernels where the op has."""
    ((cpu, kernels),) = re.findall(rf"^\| `{name}` \| (\w+) \| (.*?) \| .* \|$", TEXT, flags=re.M)
    limits = backends._ENTRIES[name].limits
    assert cpu == ("all" if "cpu" in limits else "none")
    assert set(re.findall(r"`(\w+)`", kernels)) == set(limits) - {"cpu"}
    (shown,) = re.findall(rf"^\| \[`{name}`\].* \| (.*?) \|$", README, flags=re.M)
    spelled = {"cpu": "CPU", "triton": "Triton", "cuda": "CUDA C++"}
    assert shown.split(", ") == ["reference", *(spelled[backend] for backend in limits)]


@pytest.mark.parametrize("title", SECTIONS)
def test_example(title: str) -> None:
    run_example(title)


@pytest.mark.parametrize("weighted", [True, False])
def test_tcformer_is_replaced_call_for_call(weighted: bool) -> None:
    """Two stages, against the algorithm as published without its noise, and their gradients."""
    torch.manual_seed(0)
    names = run_example(TCFORMER)
    x = torch.randn(3, 96, 40, dtype=torch.float64, requires_grad=True)
    score = torch.nn.Linear(40, 1).double()
    tokens = names["initial_tokens"](x) | {"map_size": [8, 12], "init_grid_size": [8, 12]}
    merged, index, share = x, tokens["idx_token"], tokens["agg_weight"]
    for cluster_num, k in ((24, 5), (6, 3)):
        assignment, count = names["cluster_dpc_knn"](tokens, cluster_num, k)
        with torch.no_grad():
            *_, expected = tcformer.cluster(merged, k, cluster_num)
        assert count == cluster_num
        assert torch.equal(assignment, expected)
        weight = score(tokens["x"]).exp() if weighted else None
        tokens = names["merge_tokens"](tokens, assignment, count, weight)
        weight = score(merged).exp() if weighted else torch.ones_like(merged[..., :1])
        merged, index, share = tcformer.merge(merged, weight, assignment, cluster_num, index, share)
        # The 1e-6 beside sums of weights, in each stage, and what follows from it.
        torch.testing.assert_close(tokens["x"], merged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tokens["agg_weight"], share, rtol=1e-4, atol=0)
        assert torch.equal(tokens["idx_token"], index)
        assert tokens["token_num"] == cluster_num
        assert tokens["init_grid_size"] == [8, 12]
    one, other = (torch.autograd.grad(t.square().sum(), x)[0] for t in (tokens["x"], merged))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_tcformer_with_a_mask() -> None:
    torch.manual_seed(1)
    names = run_example(TCFORMER)
    x = torch.randn(2, 20, 8, dtype=torch.float64)
    mask = torch.ones(2, 20)
    mask[:, [3, 11, 19]] = 0
    valid = mask[0].bool()
    assignment, _ = names["cluster_dpc_knn"]({"x": x}, 5, 4, mask)
    *_, expected = tcformer.cluster(x[:, valid], 4, 5)
    assert torch.equal(assignment[:, valid], expected)


@pytest.mark.parametrize("name", OPS)
def test_signature(name: str) -> None:
    documented = re.search(rf"`{name}\(([^)]*)\)`", SECTIONS[name])
    assert documented is not None
    parts = [part.split("=") for part in re.split(r",\s+", documented[1])]
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    first_keyword = next(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    star = parts.index(["*"])
    assert parts[star + 1][0] == first_keyword
    del parts[star]
    assert [part[0] for part in parts] == [p.name for p in parameters]
    for part, parameter in zip(parts, parameters, strict=True):
        default = part[1].replace("'", '"') if len(part) > 1 else None
        if default is None:
            assert parameter.default is parameter.empty
        elif default != "…":
            assert default == repr(parameter.default).replace("'", '"')
