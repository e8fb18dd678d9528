"""The CUDA kernel of spatial attention: values, sizes, options, layouts, and the op contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import native, ops
from cmpose.ops import cuda, library
from cmpose.ops.spatial_attention import CUDA_TOKENS
from tests.ops import test_contract as contract
from tests.ops.support.assertions import assert_as_close_as_eager, assert_same_bits, poisoned_memory
from tests.ops.support.cases import CASES, DEVICE, Arguments, OpCase

pytestmark = pytest.mark.skipif(
    ops.available("spatial_attention", DEVICE)["cuda"] is not None,
    reason=str(ops.available("spatial_attention", DEVICE)["cuda"]),
)

SANITIZED = pytest.mark.sanitized
HALVES = (torch.bfloat16, torch.float16)


def projection(*sizes: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """qkv at sizes B, T, S, H, d."""
    B, T, S, H, d = sizes
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, T, S, 3, H, d, generator=generator).to(DEVICE, dtype)


def check(qkv: Tensor | tuple[Tensor, ...], **options: Any) -> tuple[Tensor, Tensor]:
    """The result and its log-sum-exp, held against the reference."""

    def attend(backend: str, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        operands: Any = qkv
        if dtype is not None:
            operands = qkv.to(dtype) if isinstance(qkv, Tensor) else [x.to(dtype) for x in qkv]
        return ops.spatial_attention(operands, return_lse=True, backend=backend, **options)

    out, lse = attend("cuda")
    eager, exact = attend("reference"), attend("reference", torch.float64)
    assert_as_close_as_eager(out, eager[0], exact[0], reduction=208, roundings=2)
    assert torch.equal(lse.isneginf(), exact[1].isneginf())
    finite = ~exact[1].isneginf()
    torch.testing.assert_close(lse[finite], exact[1][finite].float(), rtol=2e-6, atol=2e-6)
    return out, lse


HOLDS_ONE, HOLDS_TWO = 102_400, 233_472
"""Bytes of shared memory of an RTX 4090's multiprocessor, and of an H200's, which holds two
blocks."""


@pytest.mark.parametrize(
    ("dtype", "d", "shared"),
    [
        (torch.bfloat16, 64, HOLDS_ONE),
        (torch.float16, 80, HOLDS_ONE),
        (torch.bfloat16, 64, HOLDS_TWO),
    ],
    ids=str,
)
def test_the_model_s_frame(
    dtype: torch.dtype, d: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192 patches and 15 keypoints: 13 tiles of 16, the last of 15."""
    monkeypatch.setattr(cuda, "shared_bytes", lambda _: shared)
    check(projection(1, 1, 207, 2, d, dtype=dtype))


@pytest.mark.parametrize(("d", "shared"), [(64, HOLDS_TWO), (80, HOLDS_ONE)])
@pytest.mark.parametrize("S", [1, pytest.param(17, marks=SANITIZED), 129, 208])
def test_sizes_and_options(S: int, d: int, shared: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One to four rounds; warps without queries; several items a block; lengths from 0 to S."""
    monkeypatch.setattr(cuda, "shared_bytes", lambda _: shared)
    B, T, H = (1, 2, 2) if S > 100 else (2, 3, 3)
    generator = torch.Generator().manual_seed(S)
    lengths = torch.randint(0, S + 1, (B, T), generator=generator).to(DEVICE)
    lengths[0, 0] = S
    qkv = projection(B, T, S, H, d, seed=S)
    out, _ = check(qkv, lengths=lengths, scale=-0.2)
    padding = torch.arange(S, device=DEVICE) >= lengths[..., None]
    assert not out[padding].any()
    # Whatever padding holds, nothing of it is seen.
    expected = out.clone()
    qkv[padding] = torch.nan
    assert_same_bits(
        [ops.spatial_attention(qkv, lengths=lengths, scale=-0.2, backend="cuda")], [expected]
    )


@pytest.mark.parametrize("d", [64, 80])
def test_no_order_of_threads_or_copies_changes_a_bit(
    d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = projection(1, 1, 133, 4, d)

    def attend() -> list[Tensor]:
        return list(ops.spatial_attention(qkv, return_lse=True, backend="cuda"))

    expected = attend()
    for order, copies in (("backward", "late"), ("7", "early")):
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        monkeypatch.setenv("CUDA_ON_CPU_COPIES", copies)
        with poisoned_memory():
            assert_same_bits(attend(), expected)
    monkeypatch.setattr(cuda, "MULTIPROCESSORS_ON_CPU", 5)  # blocks share items otherwise
    assert_same_bits(attend(), expected)


@SANITIZED
def test_layouts() -> None:
    """Views in which rows are not aligned, or lie far apart, and separate q, k and v."""
    qkv = projection(2, 2, 19, 2, 64)

    def attend(operands: Any) -> list[Tensor]:
        return [ops.spatial_attention(operands, backend="cuda")]

    expected = attend(qkv)
    shifted = torch.zeros(*qkv.shape[:-1], 65, dtype=qkv.dtype, device=DEVICE)[..., 1:]
    spread = torch.zeros(*qkv.shape, 2, dtype=qkv.dtype, device=DEVICE)[..., 0]
    frames_last = torch.zeros(19, 2, 2, 3, 2, 64, dtype=qkv.dtype, device=DEVICE)
    for view in (shifted, spread, frames_last.permute(2, 1, 0, 3, 4, 5)):
        view.copy_(qkv)
        assert_same_bits(attend(view), expected)
    q, k, v = qkv.unbind(3)
    assert_same_bits(
        attend((q, k.contiguous(), v.transpose(0, 1).clone().transpose(0, 1))), expected
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 300.0])
def test_hostile_values(value: float) -> None:
    """What is not finite stays in its frame and head, and is where it is in the reference; weights
    of 0 and 1, of logits of tens of thousands, are as in the reference."""
    qkv = projection(1, 2, 37, 2, 64)
    clean = ops.spatial_attention(qkv, backend="cuda")
    qkv[0, 0, 5, 1, 0, 3] = value
    qkv[0, 0, 6, 0, 0, :8] = 300.0
    actual = ops.spatial_attention(qkv, backend="cuda")
    exact = ops.spatial_attention(qkv.double(), backend="reference")
    assert torch.equal(actual.isnan(), exact.isnan())
    torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.02, equal_nan=True)
    assert torch.equal(actual[0, 0, :, 1], clean[0, 0, :, 1])
    assert torch.equal(actual[0, 1], clean[0, 1])


def test_the_log_sum_exp_is_written_where_it_is_asked_for() -> None:
    forward = library.IMPLEMENTATIONS["spatial_attention"]
    reasons = ops.available("spatial_attention", DEVICE)
    qkv = projection(1, 1, 20, 1, 64)
    for name, backend in forward.items():
        if name != "triton" and reasons[name] is None:
            for with_lse in (False, True):
                _, lse = backend(qkv, None, None, None, 0.1, with_lse)
                assert lse.shape == ((1, 1, 1, 20) if with_lse else (0,)), name


# -- the op contract ------------------------------------------------------------------------------


def _halved(batch: int, dtype: torch.dtype, **sizes: int) -> Arguments:
    """The op's case in bfloat16 where the contract asks for float32."""
    return CASES["spatial_attention"].make(
        batch, torch.bfloat16 if dtype == torch.float32 else dtype, **sizes
    )


CASE = replace(
    CASES["spatial_attention"],
    make=_halved,
    kernel_sizes={"d": 64},
    other_sizes=({"T": 1, "S": 1, "H": 1, "d": 64}, {"T": 1, "S": 67, "H": 1, "d": 80}),
)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_value_and_gradients(dtype: torch.dtype) -> None:
    contract.test_value_and_gradients_are_as_close_as_eager(CASE, "cuda", dtype)


@pytest.mark.parametrize(
    "point",
    [
        contract.test_compiles_in_one_graph,
        contract.test_hostile_gradients,
        contract.test_uninitialised_memory_is_not_read,
        contract.test_autocast_does_not_reach_inside,
        contract.test_bitwise_repeat,
        contract.test_empty_batch,
        contract.test_a_clip_does_not_depend_on_its_batch,
        contract.test_strided_inputs,
    ],
    ids=lambda point: point.__name__[5:],
)
def test_contract(point: Callable[[OpCase, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: torch.bfloat16)
    point(CASE, "cuda")


@pytest.mark.parametrize("layout", ["compact", "permuted"])
def test_opcheck(layout: str) -> None:
    contract.test_opcheck(CASE, "cuda", layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_logits(dtype: torch.dtype) -> None:
    """Of 10⁸, the largest that docs/ops.md calls safe."""
    lengths = torch.tensor([[50, 20]], device=DEVICE)
    check(projection(1, 2, 50, 2, 64, dtype=dtype), lengths=lengths, scale=3e6)


def test_a_scale_of_zero() -> None:
    """All weights are the same, beside masked keys too."""
    qkv = projection(1, 2, 50, 2, 64)
    lengths = torch.tensor([[50, 20]], device=qkv.device)
    out = ops.spatial_attention(qkv, lengths=lengths, scale=0.0, backend="cuda")
    for t, n in enumerate(lengths[0].tolist()):
        mean = qkv[:, t, :n, 2].double().mean(1, keepdim=True).expand(1, n, 2, 64)
        torch.testing.assert_close(out[:, t, :n].double(), mean, rtol=0.01, atol=0.01)
        assert (out[:, t, n:] == 0).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 1, 9, 3, 1, 64), torch.float32, "qkv is float32; .* take bfloat16 and float16"),
        ((1, 1, 9, 3, 1, 48), torch.float16, "the head dimension is 48; .* take 64 and 80"),
        ((1, 1, 209, 3, 1, 64), torch.float16, "a frame has 209 tokens; .* up to 208"),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], dtype: torch.dtype, reason: str) -> None:
    qkv = torch.empty(shape, dtype=dtype, device=DEVICE)
    assert native.module().MAX_ATTENTION_TOKENS == CUDA_TOKENS
    with pytest.raises(ops.BackendUnavailable, match=reason):
        ops.spatial_attention(qkv, backend="cuda")
    assert ops.explain("spatial_attention", qkv).backend != "cuda"
