"""The machine's wgmma: products of matrices in every layout, and every kind of fault, planted."""

from __future__ import annotations

import re

import pytest
import torch

from tests.ptx_on_cpu import machine
from tests.ptx_on_cpu.launches import Fault
from tests.ptx_on_cpu.test_machine import run

pytestmark = pytest.mark.skipif(machine.compiler() is None, reason="needs g++")

WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Of the swizzle modes, the bytes of a row that lie together."""


def laid_out(matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """A matrix of 16-bit numbers as it lies in shared memory: one panel of columns after another,
    a panel's rows one after another, and in lines of 128 bytes a row's pieces of 16 bytes change
    places by the number of the line, modulo the pieces of a row."""
    pieces = WIDTHS[mode] // 16
    panels = matrix.unflatten(1, (-1, pieces, 8)).transpose(0, 1).contiguous()
    rows = torch.arange(matrix.shape[0])
    line = rows * WIDTHS[mode] // 128 % pieces
    places = torch.arange(pieces)[None] ^ line[:, None]
    swizzled = torch.empty_like(panels)
    swizzled[:, rows[:, None], places] = panels
    return swizzled.flatten()


def descriptor(start: int, rows: int, mode: int, transposed: bool) -> int:
    """Of a matrix of so many rows in shared memory: its start, the bytes from one panel to the
    next, and from 8 rows to the next 8. Without a swizzle these change their places if it is
    transposed."""
    panel, eight = rows * WIDTHS[mode], 8 * WIDTHS[mode]
    if mode == 0 and transposed:
        panel, eight = eight, panel
    return start >> 4 | panel >> 4 << 16 | eight >> 4 << 32 | mode << 62


SIGNS = "1, -1"
FILL = "".join(
    f"""
    add.u32 %r1, %r0, {128 * piece}; shl.b32 %r1, %r1, 4; cvt.u64.u32 %rd3, %r1;
    add.u64 %rd3, %rd3, %rd0; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3];
    st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};"""
    for piece in range(9)
)
"""18 KB from parameter 0 to shared memory, by 128 threads."""

STORE = "".join(
    f"mad.wide.u32 %rd4, %r0, 64, %rd1; st.global.b32 [%rd4+{4 * n}], %r{20 + n};"
    for n in range(16)
)
"""A thread's 16 registers of the product."""


def product(second: str, first: str = "%rd10", added: str = "0", more: str = "") -> str:
    results = ", ".join(f"%r{20 + n}" for n in range(16))
    return (
        "wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n32k16.f32.TYPE.TYPE "
        f"{{{results}}}, {first}, {second}, {added}, {more or f'{SIGNS}, 0, 0'};"
    )


SHOW = "fence.proxy.async.shared::cta; bar.sync 0; "
COMMIT = "wgmma.commit_group.sync.aligned; "
WAIT = "wgmma.wait_group.sync.aligned 0; "


def as_rows(stored: torch.Tensor) -> torch.Tensor:
    """What 128 threads have stored, 16 registers each, as the product's 64 rows of 32."""
    by_lane = stored.view(4, 8, 4, 4, 2, 2)  # warp, row, pair of columns; columns of 8, rows of 8
    return by_lane.permute(0, 4, 1, 3, 2, 5).reshape(64, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("mode", WIDTHS)
def test_products(mode: int, transposed: bool, dtype: torch.dtype) -> None:
    """−a · b of both matrices in shared memory, then a' · b added with a' in registers."""
    generator = torch.Generator().manual_seed(mode)
    a, b = (torch.randint(-4, 5, (n, 64), generator=generator).to(dtype) for n in (64, 32))
    if transposed:  # 16 of 64 rows are multiplied, else 16 of 64 columns
        a, b = (torch.randint(-4, 5, (64, n), generator=generator).to(dtype) for n in (64, 64))
    step, width = 3, WIDTHS[mode]  # the last of four products of 16
    image = torch.zeros(9 * 128 * 8, dtype=dtype)
    image[: a.numel()] = laid_out(a, mode)
    image[4096 : 4096 + b.numel()] = laid_out(b, mode)
    rows = 64 if transposed else 32  # of b's panels

    def start(panel_rows: int) -> int:
        if transposed:
            return 16 * step * width
        return 32 * step % width + 32 * step // width * panel_rows * width

    order = "1, 1" if transposed else "0, 0"
    body = f"""{FILL}{SHOW}
    mov.b64 %rd10, {descriptor(start(64), 64, mode, transposed)};
    mov.b64 %rd11, {descriptor(8192 + start(rows), rows, mode, transposed)};
    {product("%rd11", more=f"1, -1, {order}")}
    mov.b32 %r6, HALVES; {product("%rd11", "{%r6, %r6, %r6, %r6}", "1", f"1, 1, {order[0]}")}
    {COMMIT}{WAIT}{STORE}"""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    ones = {torch.bfloat16: "0x3F803F80", torch.float16: "0x3C003C00"}[dtype]
    found = torch.zeros(128, 16)
    run(body.replace("TYPE", name).replace("HALVES", ones), image, found, warps=4, shared=18432)
    part = slice(16 * step, 16 * step + 16)
    left, right = (a[part].T, b[part, :32]) if transposed else (a[:, part], b[:, part].T)
    expected = -left.float() @ right.float() + right.float().sum(0)
    assert torch.equal(as_rows(found), expected)


A, B = descriptor(0, 64, 1, False), descriptor(8192, 32, 1, False)
SET = f"mov.b64 %rd10, {A}; mov.b64 %rd11, {B}; "
ONE = "setp.lt.u32 %p1, %r0, 32; "  # whether it is of the first warp
A_COMPUTED = "{%r20, %r21, %r22, %r23}"
OVER = "@%p1 st.shared.b32 [8192], %r0; "
COPY = "@%p1 cp.async.cg.shared.global [8192], [%rd0], 16; "
ODD = "and.b32 %r7, %r0, 1; setp.eq.u32 %p1, %r7, 1; "  # whether the lane is
OWN_ROWS = """shr.u32 %r7, %r0, 5; shl.b32 %r7, %r7, 11; mov.u32 %r8, 1; st.shared.b32 [%r7], %r8;
fence.proxy.async.shared::cta; """
FAULTS = {
    "no fence": (
        FILL + "bar.sync 0; " + SET + product("%rd11"),
        "no fence.proxy.async between its write and this read",
    ),
    "a fence before the write": (
        "fence.proxy.async.shared::cta; " + FILL + "bar.sync 0; " + SET + product("%rd11"),
        "no fence.proxy.async between its write and this read",
    ),
    "no barrier before it": (
        FILL + "fence.proxy.async.shared::cta; " + SET + product("%rd11"),
        "is read, and nobody wrote it",
    ),
    "no wait before a write": (
        ONE + FILL + SHOW + SET + product("%rd11") + COMMIT + OVER,
        "is written before the wgmma that reads it is waited for",
    ),
    "no wait but a barrier": (
        ONE + FILL + SHOW + SET + product("%rd11") + COMMIT + "bar.sync 0; " + OVER,
        "is written before the wgmma that reads it is waited for",
    ),
    "a wait before the commit": (
        ONE + FILL + SHOW + SET + product("%rd11") + WAIT + "bar.sync 0; " + OVER,
        "is written before the wgmma that reads it is waited for",
    ),
    "no barrier behind the wait": (
        ONE.replace("lt", "ge") + FILL + SHOW + SET + product("%rd11") + COMMIT + WAIT + OVER,
        "one warp writes what another reads between the same barriers",
    ),
    "a use before the wait": (
        FILL + SHOW + SET + product("%rd11") + COMMIT + "add.u32 %r1, %r35, %r35;",
        "it uses what a wgmma computes before the wait for that",
    ),
    "a use of the last group, the one before is waited for": (
        FILL + SHOW + SET + product("%rd11") + COMMIT + WAIT.replace("0", "1") + STORE,
        "it uses what a wgmma computes before the wait for that",
    ),
    "a copy over what is read": (
        ONE + FILL + SHOW + SET + product("%rd11") + COMMIT + "bar.sync 0; " + COPY,
        "an asynchronous copy over what a wgmma may still read",
    ),
    "a fence by some lanes": (
        ODD + FILL + "@%p1 " + SHOW + SET + product("%rd11"),
        "no fence.proxy.async between its write and this read",
    ),
    "a fence by one of two writers, the other has made more": (
        ONE + FILL + SHOW + SET + "@%p1 fence.proxy.async.shared::cta; st.shared.b32 [8192], 0; "
        "@!%p1 fence.proxy.async.shared::cta; bar.sync 0; " + product("%rd11"),
        "no fence.proxy.async between its write and this read",
    ),
    "a fence of global memory": (
        FILL + "fence.proxy.async.global; bar.sync 0; " + SET + product("%rd11"),
        "no fence.proxy.async between its write and this read",
    ),
    "each warp writes its rows of the first matrix": (
        FILL + SHOW + SET + OWN_ROWS + product("%rd11") + COMMIT + WAIT,
        "one warp writes what another reads between the same barriers",
    ),
    "each warp writes its rows behind its own wait": (
        FILL + SHOW + SET + product("%rd11") + COMMIT + WAIT + OWN_ROWS,
        "one warp reads what another writes between the same barriers",
    ),
    "a first matrix that a wgmma computes": (
        FILL + SHOW + SET + product("%rd11") + product("%rd11", A_COMPUTED, "0", "1, 1, 0"),
        "it uses what a wgmma computes before the wait for that",
    ),
    "one warp only": (
        ONE + FILL + SHOW + SET + "@!%p1 bra END; " + product("%rd11") + "END:",
        "a wgmma that not all four warps of a group reach",
    ),
    "one warp's other descriptor": (
        ONE + FILL + SHOW + SET + "@%p1 add.s64 %rd11, %rd11, 2; " + product("%rd11"),
        "other warps of its group are at another wgmma, or give other descriptors",
    ),
    "some lanes' other descriptor": (
        ODD + FILL + SHOW + SET + "@%p1 add.s64 %rd11, %rd11, 2; " + product("%rd11"),
        "lanes give different descriptors",
    ),
    "a commit by some lanes": (
        ODD + FILL + SHOW + SET + product("%rd11") + "@%p1 " + COMMIT,
        "lanes 0xaaaaaaaa are here, lanes 0xffffffff must be",
    ),
    "a wait by some lanes": (
        ODD + FILL + SHOW + SET + product("%rd11") + COMMIT + "@%p1 " + WAIT,
        "lanes 0xaaaaaaaa are here, lanes 0xffffffff must be",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str) -> None:
    body, message = FAULTS[name]
    given = torch.zeros(9 * 128 * 8, dtype=torch.bfloat16)
    with pytest.raises(Fault, match=re.escape(message)):
        run(body.replace("TYPE", "bf16"), given, warps=4, shared=18432)


EARLY = """setp.lt.u32 %p1, %r0, 32; @%p1 st.shared.b32 [8192], %r0;
@!%p1 fence.proxy.async.shared::cta; bar.sync 0; setp.lt.u32 %p2, %r0, 128; @%p2 bra END; """
"""A warp writes without a fence; the group that multiplies fences before the barrier."""


def test_warps_may_write_the_same() -> None:
    """Each of two warps fences after its own write, the first before the second writes."""
    body = FILL + SHOW + SET + product("%rd11")
    given = torch.zeros(10 * 128 * 8, dtype=torch.bfloat16)
    run(body.replace("TYPE", "bf16"), given, warps=8, shared=20480)


def test_a_readers_fence_is_behind_a_barrier() -> None:
    body = FILL + SHOW + EARLY + SET + product("%rd11") + "END:"
    given = torch.zeros(10 * 128 * 8, dtype=torch.bfloat16)
    with pytest.raises(Fault, match=r"no fence.proxy.async between its write and this read"):
        run(body.replace("TYPE", "bf16"), given, warps=8, shared=20480)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("m64n32k8.f32.tf32.tf32", "the machine does not have it"),
        ("m64n32k16.f16.f16.f16", "the machine does not have it"),
    ],
)
def test_other_products_are_refused(shape: str, message: str) -> None:
    with pytest.raises(machine.Unknown, match=message):
        run(product("%rd11").replace("m64n32k16.f32.TYPE.TYPE", shape))


def test_a_base_offset_is_refused() -> None:
    body = FILL + SHOW + SET.replace(f"{B}", f"{B | 1 << 49}") + product("%rd11")
    with pytest.raises(Fault, match="a matrix descriptor with a base offset"):
        run(body.replace("TYPE", "f16"), torch.zeros(9216).half(), warps=4, shared=18432)
