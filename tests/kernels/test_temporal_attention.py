from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.kernels import launch, temporal_attention
from tests.kernels.losses import DTYPES, random, spread
from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_repeats,
    assert_writes_everything,
    hostile_gradients,
)
from tests.shared_data import PROJECT

temporal_attention_reference = partial(ops.temporal_attention, backend="reference")

SHAPES = [
    (2, 2, 3, 3, 32),
    (1, 2, 5, 2, 128),
    (2, 3, 7, 3, 64),
    (1, 3, 5, 5, 80),
    (1, 4, 3, 5, 80),
    (1, 4, 11, 1, 64),
    (1, 5, 3, 3, 80),
    (1, 5, 2, 3, 128),
    (2, 6, 1, 3, 32),
    (1, 7, 3, 1, 80),
    (1, 8, 2, 1, 64),
    (1, 11, 1, 2, 128),
    (1, 13, 2, 1, 80),
    (1, 16, 3, 1, 64),
]
"""B, T, S, H, d: frames for both kernels, items that do and do not fill the last program."""

BOTH = [(1, 3, 2, 3, 64), (1, 4, 1, 3, 80), (1, 9, 2, 1, 64), (1, 6, 1, 2, 80)]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """qkv, and the gradient of the output."""
    B, T, S, H, d = shape
    qkv = random(B, T, S, 3, H, d, seed=1, dtype=dtype)
    return qkv.to(device), random(*shape, seed=2, dtype=dtype).to(device)


def gradient(qkv: Tensor, grad: Tensor) -> Tensor:
    leaf = qkv.detach().requires_grad_()
    return torch.autograd.grad(temporal_attention_reference(leaf), leaf, grad)[0]


def check(qkv: Tensor, grad: Tensor) -> None:
    """Value and gradient against the reference in float64 and in qkv's own dtype."""
    frames, width = qkv.shape[1], qkv.shape[-1]
    # The tensor cores' operands P and dS have the dtype of the inputs.
    roundings = 2 if frames > temporal_attention.ROW_FRAMES else 1
    precision = {"reduction": max(frames, width), "roundings": roundings}
    out = temporal_attention.forward(qkv)
    assert out.is_contiguous()
    assert_as_close_as_eager(
        out,
        temporal_attention_reference(qkv),
        temporal_attention_reference(qkv.double()),
        **precision,
    )
    dqkv = temporal_attention.backward(grad, qkv)[0]
    assert dqkv.is_contiguous()
    exact = gradient(qkv.double(), grad.double())
    assert_as_close_as_eager(dqkv, gradient(qkv, grad), exact, **precision)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(*inputs(shape, device, dtype))


@pytest.mark.parametrize("shape", [(0, 3, 2, 1, 64), (1, 3, 0, 1, 64), (1, 9, 2, 0, 64)])
def test_nothing_in_nothing_out(shape: tuple[int, ...], device: str) -> None:
    qkv, grad = inputs(shape, device, torch.float32)
    assert temporal_attention.forward(qkv).shape == shape
    assert temporal_attention.backward(grad, qkv)[0].shape == qkv.shape


@pytest.mark.parametrize("frames", [3, 9])
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_flat_and_peaked_softmax(frames: int, scale: float, device: str) -> None:
    qkv, grad = inputs((1, frames, 2, 2, 64), device, torch.float32)
    qkv[:, :, :, :2] *= scale
    check(qkv, grad)


def test_scores_beyond_float16(device: str) -> None:
    """q·k is larger than 65,504, which eager avoids because it scales q first."""
    for frames in (3, 6):
        qkv, grad = inputs((1, frames, 2, 1, 64), device, torch.float16)
        qkv[:, :, :, :2] = 36 + 4 * qkv[:, :, :, :2]
        assert (qkv[:, :, :, 0].double() * qkv[:, :, :, 1].double()).sum(-1).max() > 65504
        check(qkv, grad)


def sparse(tensor: Tensor) -> Tensor:
    """Its values with a NaN after each, which shows in the result if a kernel reads it."""
    apart = torch.full((*tensor.shape, 2), math.nan, dtype=tensor.dtype, device=tensor.device)
    apart[..., 0] = tensor
    return apart[..., 0]


def surrounded(tensor: Tensor) -> Tensor:
    """Its values, amid NaN on every side of every dimension."""
    wide = torch.full(
        [n + 3 for n in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device
    )
    inner = wide[tuple(slice(1, n + 1) for n in tensor.shape)]
    return inner.copy_(tensor)


def turned(tensor: Tensor) -> Tensor:
    """Its values, the first dimension innermost."""
    every = [*reversed(range(tensor.dim()))]
    return tensor.permute(every).contiguous().permute(every)


def heads_first(tensor: Tensor) -> Tensor:
    """Its values as [H, B, T, S, ...], as a module gives them that splits the heads first."""
    return tensor.movedim(-2, 0).contiguous().movedim(0, -2)


@pytest.mark.parametrize("shape", BOTH)
@pytest.mark.parametrize("layout", [sparse, surrounded, turned, heads_first])
def test_strides(shape: tuple[int, ...], layout: Callable[[Tensor], Tensor], device: str) -> None:
    qkv, grad = inputs(shape, device, torch.float16)
    check(layout(qkv), layout(grad))


@pytest.mark.parametrize("frames", [3, 6])
def test_an_expanded_batch(frames: int, device: str) -> None:
    qkv, grad = inputs((1, frames, 2, 2, 64), device, torch.float32)
    check(qkv.expand(3, *qkv.shape[1:]), grad.expand(3, *grad.shape[1:]))


@pytest.mark.parametrize("shape", [(2, 3, 2, 2, 32), (1, 6, 2, 1, 32)])
def test_hostile_gradients(shape: tuple[int, ...], device: str) -> None:
    qkv, like = inputs(shape, device, torch.float32)
    gradients = list(hostile_gradients(shape, like))
    assert len(gradients) > 7
    for name, grad in gradients:
        exact = gradient(qkv.double(), grad.double())
        # A sum's gradient cancels in q and k.
        actual, eager = temporal_attention.backward(grad, qkv)[0], gradient(qkv, grad)
        try:
            assert_as_close_as_eager(actual, eager, exact, reduction=32, terms=1.0)
        except AssertionError as error:
            raise AssertionError(f"gradient {name}: {error}") from None


@pytest.mark.parametrize("shape", BOTH)
def test_writes_everything_and_repeats(shape: tuple[int, ...], device: str) -> None:
    qkv, grad = inputs(shape, device, torch.float16)

    def both() -> tuple[Tensor, Tensor]:
        return temporal_attention.forward(qkv), temporal_attention.backward(grad, qkv)[0]

    assert_writes_everything(both)
    assert_repeats(both, times=3)


@pytest.mark.parametrize("shape", BOTH)
def test_writes_nothing_else(
    shape: tuple[int, ...], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv, grad = inputs(shape, device, torch.float32)
    margin, buffers = 4096, []

    def empty(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = math.prod(size)
        buffers.append(torch.full((count + 2 * margin,), 7.0, dtype=dtype, device=device))
        return buffers[-1][margin : margin + count].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        temporal_attention.forward(qkv)
        temporal_attention.backward(grad, qkv)
    assert len(buffers) == 2
    for buffer in buffers:
        assert (buffer[:margin] == 7).all()
        assert (buffer[-margin:] == 7).all()
        assert (buffer[margin:-margin] != 7).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("frames", [3, 6])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_at_its_position_and_head(frames: int, value: float, device: str) -> None:
    shape = (2, frames, 2, 2, 32)
    for part in range(4):
        qkv, grad = inputs(shape, device, torch.float32)
        if part < 3:
            qkv[1, 1, 0, part, 1, 5] = value
        else:
            grad[1, 1, 0, 1, 5] = value
        out, dqkv = temporal_attention.forward(qkv), temporal_attention.backward(grad, qkv)[0]
        elsewhere = torch.ones(2, 2, 2, dtype=torch.bool, device=device)
        elsewhere[1, 0, 1] = False
        assert out.isfinite().all(dim=(1, 4))[elsewhere].all()
        assert dqkv.isfinite().all(dim=(1, 3, 5))[elsewhere].all()
        assert torch.equal(out.isnan(), temporal_attention_reference(qkv).isnan())
        assert torch.equal(dqkv.isnan(), gradient(qkv, grad).isnan())


@pytest.mark.parametrize("frames", [3, 6])
@pytest.mark.parametrize("dim", range(6))
def test_offsets_beyond_31_bits(dim: int, frames: int, device: str) -> None:
    """Each stride fits 32 bits; its products with the dimension's indices do not."""
    shape = [1, frames, 1, 3, 1, 32]
    shape[dim] = max(shape[dim], 3)
    qkv, grad = inputs((*shape[:3], *shape[4:]), device, torch.float16)
    check(spread(qkv, dim, 2**31 // (qkv.shape[dim] - 1) + 64), grad)
    if dim != 3:
        dim -= dim > 3
        check(qkv, spread(grad, dim, 2**31 // (grad.shape[dim] - 1) + 64))


@pytest.mark.parametrize("frames", [3, 6])
@pytest.mark.parametrize("clips", [1, 2])
def test_results_beyond_31_bits(clips: int, frames: int, device: str) -> None:
    """As if S were so large that the result of the last frame is beyond 2³¹ elements.

    With one clip that is the frame's index times its stride, with two the clip's.
    """
    qkv, grad = inputs((clips, frames, 2, 2, 32), device, torch.float16)

    def backward(*arguments: Tensor) -> Tensor:
        return temporal_attention.backward(*arguments)[0]

    calls = ((1, 10, temporal_attention.forward, (qkv,)), (2, 16, backward, (grad, qkv)))
    for at, stride, call, arguments in calls:
        expected = call(*arguments)
        with launch.recording(launch.INTERPRETER_ARCH) as launches:
            call(*arguments)
        [launched] = launches
        passed = [*launched.arguments]
        assert passed[at].shape == expected.shape
        assert passed[stride] == expected.stride(1)
        far = 2**31 // (clips * frames - 1) // 16 * 16 + 64
        passed[at] = torch.empty(clips * frames * far, dtype=qkv.dtype, device=device)
        passed[stride] = far
        launch.launch(
            launched.kernel,
            launched.grid,
            *passed,
            config=launched.config._replace(blocks={}),
            **launched.constants,
        )
        actual = passed[at].as_strided(expected.shape, (frames * far, far, *expected.stride()[2:]))
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("frames", "kind"), [(2, "rows"), (5, "rows"), (6, "tile"), (16, "tile")])
def test_one_launch_along_x_without_copies(frames: int, kind: str) -> None:
    qkv = torch.empty(70000, 64, 3, 3, 12, frames, device="meta").permute(0, 5, 2, 3, 4, 1)
    grad = torch.empty(1, device="meta").expand(70000, frames, 3, 12, 64)
    for arguments, name in (((qkv,), "forward"), ((grad, qkv), "backward")):
        with launch.recording(90) as launches:
            getattr(temporal_attention, name)(*arguments)
        [launched] = launches
        assert launched.kernel.__name__ == f"temporal_attention_{kind}_{name}"
        assert len(launched.grid) == 1
        for mine, passed in zip(arguments, launched.arguments, strict=False):
            assert passed is mine


OPTIONS = {
    "one frame": (1, 16, {"lengths"}),
    "clips of different length": (3, 64, {"lengths", "separate"}),
    "causal": (3, 80, {"causal"}),
    "all, rows": (5, 112, {"lengths", "causal", "scale", "separate"}),
    "clips of different length, tile": (6, 96, {"lengths", "separate"}),
    "causal, tile": (7, 48, {"causal", "scale"}),
    "32 frames": (32, 112, set()),
    "all, 32 frames": (17, 16, {"lengths", "causal", "scale", "separate"}),
}
"""Frames, head dimension and what is given."""


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, device: str) -> None:
    """Lengths from 0 to T in one program; whatever the padding holds, it reaches nothing."""
    frames, d, chosen = OPTIONS[case]
    qkv, grad = inputs((3, frames, 2, 1, d), device, torch.float32)
    lengths = torch.tensor([frames, frames // 2, 0], device=device)
    options: dict[str, Any] = {"causal": "causal" in chosen}
    options["lengths"] = lengths if "lengths" in chosen else None
    options["scale"] = -0.3 if "scale" in chosen else None
    poisoned, padding = (qkv.clone(), grad.clone()), []
    if "lengths" in chosen:
        for b, n in enumerate(lengths.tolist()):
            for tensor in poisoned:
                tensor[b, n:] = math.nan
            padding.append((b, n))

    def run(backend: str, qkv: Tensor, grad: Tensor) -> list[Tensor]:
        parts = [turned(x) if i else x for i, x in enumerate(qkv.unbind(3))]
        leaves = [x.detach().requires_grad_() for x in (parts if "separate" in chosen else [qkv])]
        operands = leaves if "separate" in chosen else leaves[0]
        out = ops.temporal_attention(operands, **options, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    actual = run("triton", *poisoned)
    exact = run("reference", qkv.double(), grad.double())
    eager = run("reference", qkv, grad)
    for a, b, c in zip(actual, eager, exact, strict=True):
        assert_as_close_as_eager(a, b, c, reduction=max(frames, d), roundings=2)
        assert all((a[b, n:] == 0).all() for b, n in padding)


def test_lengths_outside_the_clip_count_as_the_nearer(device: str) -> None:
    """Also those beyond 32 bits; on a GPU nothing looks at them before."""
    for frames in (3, 6):
        qkv, _ = inputs((4, frames, 2, 1, 16), device, torch.float32)
        far = torch.tensor([-1, frames + 1, 2**32 + 1, -(2**32) + 1], device=device)
        near = torch.tensor([0, frames, frames, 0], device=device)
        actual = temporal_attention.forward(qkv, lengths=far)
        assert torch.equal(actual, temporal_attention.forward(qkv, lengths=near))


def test_float32_is_exact_unless_tf32_is_allowed() -> None:
    def precision(dtype: torch.dtype) -> str:
        qkv = torch.empty(1, 9, 1, 3, 1, 64, device="meta", dtype=dtype)
        with launch.recording(90) as launches:
            temporal_attention.forward(qkv)
            temporal_attention.backward(qkv[:, :, :, 0], qkv)
        [constant] = {launched.constants["PRECISION"] for launched in launches}
        return constant

    assert precision(torch.float32) == "ieee"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert precision(torch.float32) == "tf32"
        assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert precision(torch.float32) == "ieee"


_COUNT_ACCESSES = """
import collections, json, re, torch
from cmpose import ops
from cmpose.kernels import launch, temporal_attention
from tests.kernels import compile_check

def empty(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

counts = {}
for frames, width in ((3, 64), (3, 80), (16, 64)):
    qkv, grad = empty(32, frames, 207, 3, 12, width), empty(32, frames, 207, 12, width)
    for name, arguments in (("forward", (qkv,)), ("backward", (grad, qkv))):
        with launch.recording(89) as launches:
            getattr(temporal_attention, name)(*arguments)
        ptx = compile_check.build(launches[0], 89).asm["ptx"]
        accesses = collections.Counter(re.findall(r"(?:ld|st)[.]global[^ ]*", ptx))
        counts[f"{name} {frames} {width}"] = accesses
print(json.dumps(counts))
"""


def test_every_element_is_loaded_once_and_16_bytes_at_a_time() -> None:
    """Counts a thread's memory accesses in the compiled kernels.

    In ``rows`` kernels 4 warps of 16 bytes a thread cover a frame of ROWS items at once: one access
    for each frame and tensor. In ``tile`` kernels one warp takes 4 accesses for the 16 · 64
    elements of a tensor.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_ACCESSES],
        cwd=PROJECT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    for case in ("3 64", "3 80"):
        assert counts[f"forward {case}"] == {"ld.global.v4.b32": 9, "st.global.v4.b32": 3}
        assert counts[f"backward {case}"] == {"ld.global.v4.b32": 12, "st.global.v4.b32": 9}
    assert counts["forward 16 64"] == {"ld.global.v4.b32": 12, "st.global.v4.b32": 4}
    assert counts["backward 16 64"] == {"ld.global.v4.b32": 16, "st.global.v4.b32": 12}
