"""The machine that runs PTX: its arithmetic, and every kind of fault, planted and caught."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx_on_cpu import machine, parse
from tests.ptx_on_cpu.launches import Code, Fault, Launch

pytestmark = pytest.mark.skipif(machine.compiler() is None, reason="needs g++")

Array = np.ndarray


def run(
    body: str, *tensors: torch.Tensor, warps: int = 1, shared: int = 0, blocks: int = 1
) -> None:
    """Runs a kernel whose parameters are ``tensors``, in %rd0, %rd1, ...; %r0 is the thread."""
    names = ", ".join(f".param .u64 p{n}" for n in range(len(tensors)))
    loads = "\n".join(f"ld.param.u64 %rd{n}, [p{n}];" for n in range(len(tensors)))
    ptx = f""".version 8.7
.target sm_89
.extern .shared .align 16 .b8 smem[];
.global .align 4 .b8 table[8] = {{1, 0, 0, 0, 5}};
.visible .entry k({names})
{{
.reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<64>; .reg .f32 %f<8>; .reg .b64 %rd<20>;
mov.u32 %r0, %tid.x;
{loads}
{body}
ret;
}}"""
    parameters = b"".join(struct.pack("Q", t.data_ptr()) for t in tensors)
    made = Code(ptx, shared, parameters)
    Launch("k", "k", (blocks,), warps, tensors, lambda _: made).run()


def test_braces_of_inline_assembly_end_no_kernel() -> None:
    result = torch.zeros(1, dtype=torch.int32)
    inner = "{\n.reg .b32 own;\nmov.u32 own, 7;\nmov.u32 %r1, own;\n}\n"
    run(inner + "st.global.u32 [%rd0], %r1;", result)
    assert result.item() == 7


def test_variables_are_aligned() -> None:
    result = torch.ones(1, dtype=torch.int32)
    variables = ".shared .b8 one[3];\n.shared .align 16 .b8 many[16];\n"
    run(variables + "mov.u32 %r1, many;\nst.shared.v4.b32 [%r1], {%r0, %r0, %r0, %r0};\n", result)
    run(variables + "mov.u32 %r1, many;\nst.global.u32 [%rd0], %r1;", result)
    assert result.item() == 16


# -- arithmetic -----------------------------------------------------------------------------------

HARD = [0, 1, 2, 3, 7, 31, 32, 33, 255, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x12345678, 0x7FFFFFFF]
HARD += [0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF, 0xDEADBEEF]

U, S = np.uint32, np.int32

INTEGERS: dict[str, Callable[[int, int], int]] = {
    "add.s32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "mul.lo.s32": lambda a, b: a * b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "mul.hi.s32": lambda a, b: int(S(U(a))) * int(S(U(b))) >> 32,
    "min.s32": lambda a, b: min(int(S(U(a))), int(S(U(b)))),
    "min.relu.s32": lambda a, b: max(0, min(int(S(U(a))), int(S(U(b))))),
    "max.u32": max,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b if b < 32 else 0,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b: int(S(U(a))) >> min(b, 31),
    "div.s32": lambda a, b: int(np.trunc(int(S(U(a))) / int(S(U(b))))) if b else -1,
    "rem.u32": lambda a, b: a % b if b else a,
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    pairs = [(a, b) for a in HARD for b in HARD]
    pairs += [(0, 0)] * (-len(pairs) % 32)
    given = torch.tensor(np.array(pairs, dtype=U).view(S))
    out = torch.zeros(len(pairs), dtype=torch.int32)
    body = f"""
    mov.u32 %r1, %ctaid.x;
    mad.lo.u32 %r1, %r1, 32, %r0;
    mad.wide.u32 %rd2, %r1, 8, %rd0;
    ld.global.v2.b32 {{%r2, %r3}}, [%rd2];
    {name} %r4, %r2, %r3;
    mad.wide.u32 %rd3, %r1, 4, %rd1;
    st.global.b32 [%rd3], %r4;"""
    run(body, given, out, blocks=len(pairs) // 32)
    expected = np.array([INTEGERS[name](a, b) & 0xFFFFFFFF for a, b in pairs], dtype=U)
    assert np.array_equal(out.numpy().view(U), expected)


def lanes(body: str, *given: torch.Tensor, out: torch.dtype = torch.int32) -> torch.Tensor:
    """``body`` computes %r9 from %r1, %r2, ..., a lane's words of ``given``; 32 words."""
    result = torch.zeros(32, dtype=out)
    tensors = [g.contiguous() for g in given]
    loads = "".join(
        f"mad.wide.u32 %rd9, %r0, 4, %rd{n};\nld.global.b32 %r{n + 1}, [%rd9];\n"
        for n in range(len(tensors))
    )
    store = f"mad.wide.u32 %rd9, %r0, 4, %rd{len(tensors)};\nst.global.b32 [%rd9], %r9;"
    run(loads + body + store, *tensors, result)
    return result


def wide_lanes(body: str, *given: torch.Tensor, out: torch.dtype = torch.int64) -> torch.Tensor:
    """``body`` computes %rd10, 32 numbers of 64 bits; else as :func:`lanes`."""
    halves = [lanes(body + f"mov.b64 {{{to}}}, %rd10;", *given) for to in ("%r9, _", "_, %r9")]
    return torch.stack(halves, 1).view(out).flatten()


def words_of(numbers: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of 32 numbers of 32 or 64 bits: the words of each, the lower one first."""
    return numbers.view(torch.int32).view(32, -1).unbind(1)


NORMAL = torch.randn(32, generator=torch.Generator().manual_seed(0))
NORMAL[:6] = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-40, -3e38])
LANE = torch.arange(32, dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("s8", torch.int8), ("s16", torch.int16), ("u8", torch.uint8)]
)
def test_loads_into_wider_registers(kind: str, dtype: torch.dtype) -> None:
    words = 0x1357 * (LANE - 16)
    body = f"mad.wide.u32 %rd9, %r0, 4, %rd0; ld.global.{kind} %r9, [%rd9];"
    assert torch.equal(lanes(body, words), words.to(dtype).int())


def test_what_inductors_kernels_use() -> None:
    """Funnel shifts, 16-bit high products, exponentials' steps, sums in memory."""
    words = torch.tensor([HARD[n % len(HARD)] for n in range(32)], dtype=torch.int64)
    a, b = words.to(torch.int32), words.flip(0).to(torch.int32)
    both = [int(low) | int(high) << 32 for low, high in zip(words, words.flip(0), strict=True)]
    left = lanes("shf.l.wrap.b32 %r9, %r1, %r2, 37;", a, b)  # 37 counts as 5
    right = lanes("shf.r.wrap.b32 %r9, %r1, %r2, 5;", a, b)
    assert [int(n) & 0xFFFFFFFF for n in left] == [n << 5 >> 32 & 0xFFFFFFFF for n in both]
    assert [int(n) & 0xFFFFFFFF for n in right] == [n >> 5 & 0xFFFFFFFF for n in both]
    high = "cvt.u16.u32 %h1, %r1; cvt.u16.u32 %h2, %r2; mul.hi.u16 %h3, %h1, %h2; "
    found = lanes(high + "cvt.u32.u16 %r9, %h3;", a, b)
    assert torch.equal(found, ((words & 0xFFFF) * (words.flip(0) & 0xFFFF) >> 16).int())
    kept = lanes("cvt.ftz.sat.f32.f32 %r9, %r1;", NORMAL, out=torch.float32)
    assert torch.equal(kept, torch.where(NORMAL > 1e-38, NORMAL.clamp(max=1), 0.0))
    found = lanes("cvt.rmi.ftz.f32.f32 %r9, %r1;", -NORMAL, out=torch.float32)
    flushed = torch.where(NORMAL == 1e-40, -0.0, -NORMAL)
    torch.testing.assert_close(found, flushed.floor(), rtol=0, atol=0, equal_nan=True)
    found = lanes("cvt.rni.ftz.s32.f32 %r9, %r1;", 10 * torch.where(NORMAL.abs() < 9, NORMAL, 1))
    assert torch.equal(found, (10 * torch.where(NORMAL.abs() < 9, NORMAL, 1)).round().int())
    down = "fma.rm.ftz.f32 %r9, %r1, %r2, 0f3F800000;"
    small = torch.full((32,), 2.0**-13)
    found = lanes(down, -small, small, out=torch.float32)
    assert torch.equal(found, torch.nextafter(torch.ones(32), torch.zeros(32)))
    sums = torch.zeros(1)
    run("cvt.rn.f32.u32 %f1, %r0; atom.global.gpu.relaxed.add.f32 %f2, [%rd0], %f1;", sums)
    assert sums.item() == sum(range(32))
    next_one = torch.zeros(1, dtype=torch.int32)  # each lane finds what the one before it wrote
    run("add.u32 %r1, %r0, 1; atom.relaxed.gpu.global.cas.b32 %r2, [%rd0], %r0, %r1;", next_one)
    assert next_one.item() == 32
    halves = torch.zeros(2, dtype=torch.bfloat16)
    odd = "cvt.rn.f32.u32 %f1, %r0; cvt.rn.bf16.f32 %h1, %f1; cvt.rn.bf16.f32 %h2, 0f3F800000; "
    run(odd + "atom.global.gpu.relaxed.add.noftz.v2.bf16 {_, %h3}, [%rd0], {%h1, %h2};", halves)
    assert halves.tolist() == [492, 32]  # each sum is rounded
    wide = "mad.lo.cc.u32 %r4, %r1, %r2, %r1; madc.hi.u32 %r9, %r1, %r2, %r2;"
    factors = zip(words.tolist(), words.flip(0).tolist(), strict=True)
    exact = [(x * y + x + (y << 32)) >> 32 & 0xFFFFFFFF for x, y in factors]
    assert [int(n) & 0xFFFFFFFF for n in lanes(wide, a, b)] == exact


def test_a_number_loaded_again_is_moved() -> None:
    """ptxas loads once what nothing has changed since; the counts must not have it twice."""
    again = "ld.global.b32 %r5, [%rd0]; ld.global.b32 %r6, [%rd0]; "
    body = again + "st.global.b32 [%rd0], %r0; ld.global.b32 %r7, [%rd0];"
    text = f".visible .entry k(.param .u64 p) {{ .reg .b32 %r<9>; .reg .b64 %rd<2>; {body} ret;\n}}"
    names = [row.name for row in parse.Kernel(text).rows]
    assert names == ["ld.global.b32", "mov.b32", "st.global.b32", "ld.global.b32", "ret"]
    pair, out = torch.tensor([3, 4], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    loads = "ld.global.v2.b32 {%r1, %r2}, [%rd0]; ld.global.v2.b32 {%r3, %r4}, [%rd0]; "
    run(loads + "st.global.v2.b32 [%rd1], {%r3, %r4};", pair, out)
    assert torch.equal(out, pair)


def test_a_number_is_loaded_again_where_it_must_be() -> None:
    """Its register, or the one that the address was in, has something else by then."""
    three, out = torch.tensor([3], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    loads = "ld.global.b32 %r5, [%rd0]; add.s32 %r5, %r5, 1; ld.global.b32 %r6, [%rd0]; "
    run(loads + "st.global.v2.b32 [%rd1], {%r5, %r6};", three, out)
    assert out.tolist() == [4, 3]
    chain, end = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    chain[:] = torch.tensor([chain.data_ptr() + 8, 7])
    run(2 * "ld.global.b64 %rd0, [%rd0]; " + "st.global.b64 [%rd1], %rd0;", chain, end)
    assert end.item() == 7


def test_local_memory_is_a_lanes_own_and_tables_are_read() -> None:
    """Words n and 2 n are kept; the first or second of the lane's and of the table is added up."""
    body = """.local .align 4 .b8 own[8];
    st.local.b32 [own], %r1; add.u32 %r2, %r1, %r1; st.local.b32 [own+4], %r2;
    and.b32 %r3, %r1, 1; shl.b32 %r3, %r3, 2; mov.b64 %rd10, table; mov.b32 %r4, own;
    cvt.u64.u32 %rd11, %r3; add.u64 %rd10, %rd10, %rd11; ld.global.nc.b32 %r5, [%rd10];
    add.u32 %r4, %r4, %r3; ld.local.b32 %r6, [%r4]; add.u32 %r9, %r5, %r6;"""
    expected = torch.where(LANE % 2 == 0, LANE + 1, 2 * LANE + 5)
    assert torch.equal(lanes(body, LANE), expected.int())


DTYPES = {
    **{"bf16": torch.bfloat16, "f16": torch.float16},
    **{"f32": torch.float32, "f64": torch.float64},
}
HALVES = ("bf16", "f16")
KINDS = [f"{kind}{bits}" for bits in (8, 16, 32, 64) for kind in "us"]


@pytest.mark.parametrize("name", HALVES)
def test_halves(name: str) -> None:
    """Conversions round to nearest, to even; packed sums are those of the halves."""
    dtype = DTYPES[name]
    found = lanes(f"cvt.rn.{name}x2.f32 %r9, %r1, %r2;", NORMAL, NORMAL.flip(0))
    low, high = found.view(dtype)[0::2], found.view(dtype)[1::2]
    torch.testing.assert_close(high, NORMAL.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(low, NORMAL.flip(0).to(dtype), rtol=0, atol=0, equal_nan=True)
    found = lanes(
        f"mov.b32 {{%h1, %h2}}, %r1; cvt.f32.{name} %r9, %h2;",
        torch.stack((low, high), 1).view(torch.int32).flatten(),
        out=torch.float32,
    )
    torch.testing.assert_close(found, high.float(), rtol=0, atol=0, equal_nan=True)
    words, more = found.view(torch.int32), NORMAL.flip(0).contiguous()
    mixed = f"cvt.rn.{name}.f32 %h1, %r1; fma.rn.f32.{name} %r9, %h1, %h1, %r2;"
    found = lanes(mixed, words, more.view(torch.int32), out=torch.float32)
    exact = (words.view(torch.float32).to(dtype).double().square() + more.double()).float()
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)
    compared = (
        f"cvt.rn.{name}.f32 %h1, %r1; cvt.rn.{name}.f32 %h2, %r2; setp.gt.{name} %p1, %h1, %h2;"
    )
    greater = lanes(compared + "selp.b32 %r9, 1, 0, %p1;", NORMAL, more)
    assert torch.equal(greater.bool(), NORMAL.to(dtype) > more.to(dtype))
    if dtype == torch.float16:
        a, b = (torch.randn(64, generator=torch.Generator().manual_seed(n)).half() for n in (1, 2))
        found = lanes("add.f16x2 %r9, %r1, %r2;", a.view(torch.int32), b.view(torch.int32))
        assert torch.equal(found.view(dtype), a + b)


# Products that are a tie in the half, and sums that float32 would make that tie again.
TIES = {
    "bf16": [
        (9, 29, 0, 260),
        (9, 29, 2**-30, 262),
        (-9, 29, 2**-30, -260),
        (-9, 29, -(2**-30), -262),
    ],
    "f16": [(33, 63, 0, 2080), (33, 63, -(2**-24), 2078), (33, -63, 2**-24, -2078), (1, 1, 1, 2)],
}


@pytest.mark.parametrize("name", HALVES)
def test_fused_halves_are_rounded_once(name: str) -> None:
    a, b, c, expected = torch.tensor(TIES[name], dtype=torch.float64).to(DTYPES[name]).T
    words = [one.repeat(16).view(torch.int32) for one in (a, b, c)]
    found = lanes(f"fma.rn.{name}x2 %r9, %r1, %r2, %r3;", *words)
    assert torch.equal(found.view(DTYPES[name]), expected.repeat(16))
    hard = torch.tensor([math.nan, math.inf, -math.inf, 3e4], dtype=DTYPES[name])
    a, b, c = torch.cartesian_prod(hard, hard, hard).T.contiguous()
    words = [one.view(torch.int32) for one in (a, b, c)]
    found = lanes(f"fma.rn.{name}x2 %r9, %r1, %r2, %r3;", *words).view(DTYPES[name])
    exact = (a.double() * b.double() + c.double()).to(DTYPES[name])
    torch.testing.assert_close(found, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", HALVES)
def test_comparisons_of_pairs(name: str) -> None:
    """Of each hard number with each; predicates of lanes that are off stay as they are."""
    hard = [math.nan, -math.inf, -1, -0.0, 0, 1e-7, 1, math.inf]
    numbers = torch.tensor(hard, dtype=DTYPES[name])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    a, b = numbers.repeat_interleave(8)[order], numbers.repeat(8)[order]
    ordered, off = ~(a.isnan() | b.isnan()), torch.arange(64) >= 2 * 24
    expected = {"num": ordered, "nan": ~ordered}
    for plain in ("eq", "ne", "lt", "le", "gt", "ge"):
        expected[plain] = getattr(torch, plain)(a, b) & ordered
        expected[f"{plain}u"] = expected[plain] | ~ordered
    before = "setp.lt.u32 %p0, %r0, 24; mov.pred %p1, 1; mov.pred %p2, 1; "
    # %r0 is the thread again: a result that is for nobody is in no other register either.
    after = "mov.u32 %r0, %tid.x; selp.b32 %r9, 1, 0, %p1; @%p2 add.u32 %r9, %r9, 0x10000;"
    for comparison, holds in expected.items():
        setp = f"@%p0 setp.{comparison}.{name}x2"
        for both in (f"{setp} %p1|%p2, A; ", f"{setp} %p1|_, A; {setp} _|%p2, A; "):
            body = before + both.replace("A", "%r1, %r2") + after
            actual = lanes(body, a.view(torch.int32), b.view(torch.int32)).view(torch.int16)
            assert torch.equal(actual.bool(), holds | off), both


def rounded(number: int, bits: int) -> float:
    """To so many bits, a tie to even."""
    step = 1 << max(abs(number).bit_length() - bits, 0)
    return float(round(Fraction(number, step)) * step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HALVES)
def test_integers_become_halves_in_one_rounding(name: str, kind: str) -> None:
    """Ties, and what is next to them and would be a tie in float32, or in float64."""
    bits, kept = int(kind[1:]), {"bf16": 8, "f16": 11}[name]
    ties = [(1 << kept) + 1 << shift for shift in range(63 - kept, -1, -3)]  # down, to even
    ties += [(2 << kept) - 1 << shift for shift in range(63 - kept, -1, -3)]  # up
    near = [tie + beside for tie in (0, *ties) for beside in (-1, 0, 1)]
    numbers = [sign * n % (1 << 64) for n in (65519, 65520, *near) for sign in (1, -1)]
    source = {8: "own", 16: "%h2", 32: "%r1", 64: "%rd10"}[bits]
    body = f"""{{ .reg.b8 own; mov.b64 %rd10, {{%r1, %r2}}; mov.b32 {{%h2, _}}, %r1;
    mov.b16 {{own, _}}, %h2; cvt.rn.{name}.{kind} %h1, {source}; cvt.u32.u16 %r9, %h1; }}"""
    for start in range(0, len(numbers) - 31, 32):
        some = np.array(numbers[start : start + 32], np.uint64).view(np.int64)
        actual = lanes(body, *words_of(torch.tensor(some))).to(torch.int16).view(DTYPES[name])
        type_ = np.dtype(f"{kind[0].replace('s', 'i')}{bits // 8}")
        exact = [rounded(int(n), kept) for n in some.astype(type_)]
        assert torch.equal(actual, torch.tensor(exact, dtype=torch.float64).to(DTYPES[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DTYPES)
def test_floats_become_integers(name: str, kind: str) -> None:
    """Held to the range. NaN is 0; where one of the two has 64 bits, the first bit alone.

    8 bits go to a register of 32, of bfloat16 to one of 8: nvcc's are so.
    """
    bits, signed, largest = int(kind[1:]), kind[0] == "s", torch.finfo(DTYPES[name]).max
    some = [0.25, 0.5, 0.75, 1.5, 2.5, 126.5, 127.5, 128.5, 254.5, 255.5, 1e3, 6e4, largest]
    numbers = [sign * n for n in (0.0, *some, math.inf, math.nan) for sign in (1, -1)]
    given = torch.tensor(numbers, dtype=DTYPES[name])
    words = words_of(given if name == "f64" else given.float())
    load, source = {
        "f64": ("mov.b64 %rd11, {%r1, %r2};", "%rd11"),
        "f32": ("mov.b32 %f1, %r1;", "%f1"),
    }.get(name, (f"cvt.rn.{name}.f32 %h1, %r1;", "%h1"))
    low = -(1 << bits - 1) if signed else 0
    high = low + (1 << bits) - 1
    nan = (low if signed else 1 << bits - 1) if "64" in name + kind else 0
    to, width = {8: ("%r3", 32), 16: ("%h2", 16), 32: ("%r3", 32), 64: ("%rd10", 64)}[bits]
    if (name, bits) == ("bf16", 8):
        to, width = "own", 8
    functions = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}
    for how, function in functions.items():
        body = f"""{{ .reg.b8 own; {load} cvt.{how}.{kind}.{name} {to}, {source};
        cvt.{kind[0]}64.{kind[0]}{width} %rd10, {to}; }}"""
        actual = wide_lanes(body, *words).tolist()
        limited = [n if math.isnan(n) else min(max(n, -1e30), 1e30) for n in given.tolist()]
        exact = [nan if math.isnan(n) else min(max(function(n), low), high) for n in limited]
        assert [n % (1 << 64) for n in actual] == [n % (1 << 64) for n in exact], how


@pytest.mark.parametrize("name", HALVES)
def test_halves_are_added_in_memory(name: str) -> None:
    """Alone and in pairs: each lane's sum is rounded, and small numbers are not flushed."""
    start, tiny = {"bf16": 259, "f16": 2051}[name], torch.finfo(DTYPES[name]).smallest_normal / 4
    memory = torch.tensor([start, tiny, start, tiny, math.nan, tiny], dtype=DTYPES[name])
    added = torch.tensor([[n, n * tiny] for n in range(32)], dtype=DTYPES[name])
    before = torch.zeros(32, 4, dtype=DTYPES[name])
    body = f"""
    mad.wide.u32 %rd3, %r0, 4, %rd1; ld.global.b32 %r1, [%rd3]; mov.b32 {{%h1, %h2}}, %r1;
    atom.global.gpu.acq_rel.add.noftz.{name} %h3, [%rd0], %h1;
    atom.global.gpu.relaxed.add.noftz.{name} %h4, [%rd0 + 2], %h2;
    atom.global.add.noftz.{name}x2 %r2, [%rd0 + 4], %r1;
    atom.global.add.noftz.{name}x2 _, [%rd0 + 8], %r1;
    mad.wide.u32 %rd4, %r0, 8, %rd2; mov.b32 %r3, {{%h3, %h4}};
    st.global.v2.b32 [%rd4], {{%r3, %r2}};"""
    run(body, memory, added, before)
    sums = [torch.tensor([start, tiny], dtype=DTYPES[name])]
    for pair in added:
        sums.append(sums[-1] + pair)
    assert torch.equal(before, torch.stack(sums[:-1]).repeat(1, 2))
    expected = torch.cat((sums[-1], sums[-1], torch.tensor([math.nan]), sums[-1][1:]))
    torch.testing.assert_close(memory, expected.to(memory), rtol=0, atol=0, equal_nan=True)


def test_bytes_of_an_access() -> None:
    names = {"atom.global.add.bf16x2": 4, "atom.global.add.f16": 2, "atom.global.add.v4.bf16": 8}
    names |= {"ld.global.b32": 4, "ld.global.v4.f32": 16, "st.global.v2.u64": 16}
    for name, expected in names.items():
        assert parse.Row(name, [], "", "", "", 1, name).bytes == expected


def test_floats() -> None:
    a, b, c = (torch.randn(32, generator=torch.Generator().manual_seed(n)) for n in range(3))
    found = lanes("fma.rn.f32 %r9, %r1, %r2, %r3;", a, b, c, out=torch.float32)
    assert torch.equal(found, (a.double() * b.double() + c.double()).float())
    pairs = "mov.b64 %rd10, {%r1, %r2}; fma.rn.f32x2 %rd10, %rd10, %rd10, %rd10; "
    found = lanes(pairs + "mov.b64 {_, %r9}, %rd10;", a, b, out=torch.float32)
    assert torch.equal(found, (b.double() * b.double() + b.double()).float())
    down = lanes("fma.rm.f32 %r9, %r1, %r2, %r3;", a, b, c, out=torch.float32)
    exact = a.double() * b.double() + c.double()
    assert ((down <= exact) & (torch.nextafter(down, torch.tensor(9.0)) > exact)).all()
    found = lanes("div.full.f32 %r9, %r1, %r2;", a, b, out=torch.float32)
    assert torch.equal(found, a / b)
    found = lanes("max.f32 %r9, %r1, %r2;", NORMAL, torch.zeros(32), out=torch.float32)
    assert found[3] == 0  # the number, not NaN
    found = lanes("max.f32 %r9, %r1, %r2, %r3;", a, b, c, out=torch.float32)
    assert torch.equal(found, a.max(b).max(c))
    found = lanes("max.NaN.f32 %r9, %r1, %r2;", NORMAL, torch.zeros(32), out=torch.float32)
    assert found[3].isnan()
    assert lanes("mul.ftz.f32 %r9, %r1, 0f3F800000;", NORMAL, out=torch.float32)[4] == 0


@pytest.mark.parametrize(
    ("name", "function", "ulps"),
    [
        # The bounds of the PTX manual, or 2 ulp where it gives none for the whole range.
        ("ex2.approx.ftz.f32", torch.exp2, 2),
        ("rcp.approx.ftz.f32", torch.reciprocal, 1),
        ("sqrt.approx.ftz.f32", torch.sqrt, 1),
        ("lg2.approx.f32", torch.log2, 2),
    ],
)
def test_approximations(
    name: str, function: Callable[[torch.Tensor], torch.Tensor], ulps: int
) -> None:
    x = torch.linspace(0.1, 30, 32)
    found = lanes(f"{name} %r9, %r1;", x, out=torch.float32)
    exact = function(x.double())
    assert ((found - exact).abs() <= ulps * torch.finfo(torch.float32).eps * exact.abs()).all()


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("f32", 2**-22.9), ("ftz.f32", 2**-22.9), ("f64", 2**-52), ("ftz.f64", 2**-19)],
)
def test_reciprocal_square_roots(kind: str, bound: float) -> None:
    """Of every sort of number. That of float64 with ftz has no lower half."""
    dtype, x = DTYPES[kind[-3:]], torch.linspace(0.1, 30, 32).to(DTYPES[kind[-3:]])
    small = torch.finfo(dtype).smallest_normal / 4
    hard = [small, -small, 0.0, -0.0, math.inf, -math.inf, math.nan, -1.0]
    x[:8] = torch.tensor(hard, dtype=dtype)
    exact = x.double().rsqrt()
    if "ftz" in kind:
        exact[:2] = torch.tensor([math.inf, -math.inf])
    if dtype == torch.float32:
        actual = lanes(f"rsqrt.approx.{kind} %r9, %r1;", *words_of(x), out=dtype)
    else:
        body = f"mov.b64 %rd11, {{%r1, %r2}}; rsqrt.approx.{kind} %rd10, %rd11; "
        actual = wide_lanes(body, *words_of(x), out=dtype)
    torch.testing.assert_close(actual.double(), exact, rtol=bound, atol=0, equal_nan=True)
    if kind == "ftz.f64":
        low, high = words_of(actual)
        assert not low.any()
        assert (high[5:8] == 0x7FFFFFFF).all()  # NaN


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shfl.sync.bfly.b32 %r9, %r1, 5, 31, -1;", [n ^ 5 for n in range(32)]),
        ("shfl.sync.idx.b32 %r9, %r1, 3, 0x181f, -1;", [n // 8 * 8 + 3 for n in range(32)]),
        ("shfl.sync.up.b32 %r9, %r1, 4, 0, -1;", [max(n - 4, n % 4) for n in range(32)]),
        (
            "shfl.sync.down.b32 %r9|%p1, %r1, 30, 31, -1; @!%p1 mov.b32 %r9, 99;",
            [30, 31] + [99] * 30,
        ),
        ("redux.sync.add.s32 %r9, %r1, -1;", [496] * 32),
        ("setp.gt.u32 %p1, %r1, 29; vote.sync.ballot.b32 %r9, %p1, -1;", [3 << 30] * 32),
        (
            "prmt.b32 %r9, %r1, 0x7766, 0x0045;",
            [0x66 << 8 | 0x77 | n * 0x1010000 for n in range(32)],
        ),
        ("prmt.b32 %r9, 0x80, 0x7F00, 0x00D8;", [0x808000FF] * 32),
        ("min.f32 %r9, 0f80000000, 0f00000000;", [0x80000000] * 32),
        ("min.f32 %r9, 0f00000000, 0f80000000;", [0x80000000] * 32),
        ("max.f32 %r9, 0f80000000, 0f00000000;", [0] * 32),
        ("dp2a.lo.u32.u32 %r9, 0x20003, 0x09080706, %r1;", [3 * 6 + 2 * 7 + n for n in range(32)]),
        ("dp2a.hi.u32.u32 %r9, 0x20003, 0x09080706, %r1;", [3 * 8 + 2 * 9 + n for n in range(32)]),
        ("bfe.u32 %r9, %r1, 1, 3;", [n >> 1 & 7 for n in range(32)]),
    ],
)
def test_between_lanes_and_bits(body: str, expected: list[int]) -> None:
    found = lanes(body, LANE).numpy().view(U)
    assert found.tolist() == [n & 0xFFFFFFFF for n in expected]


def test_lanes_that_return_keep_nobody_waiting() -> None:
    """Four lanes of one side of a branch return; all others are together behind it."""
    body = """
    setp.ge.u32 %p1, %r0, 16; setp.lt.u32 %p2, %r0, 4;
    @%p1 bra $ELSE;
    @%p2 bra $OUT;
    mov.u32 %r1, 7;
    bra.uni $REST;
$ELSE:
    mov.u32 %r1, 8;
$REST:
    shfl.sync.idx.b32 %r1, %r1, 4, 31, 0xfffffff0;
    mad.wide.u32 %rd1, %r0, 4, %rd0;
    st.global.u32 [%rd1], %r1;
    bra.uni $END;
$OUT:
    ret;
$END:
    """
    result = torch.zeros(32, dtype=torch.int32)
    run(body, result)
    assert result.tolist() == [0] * 4 + [7] * 28


def test_divergence() -> None:
    """Each lane goes round as often as its number says; even ones skip; all meet again."""
    body = """
    mov.u32 %r9, 0; mov.u32 %r3, 0;
$LOOP:
    setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra $DONE;
    add.u32 %r3, %r3, 1;
    and.b32 %r4, %r3, 1;
    setp.eq.u32 %p2, %r4, 0;
    @%p2 bra $LOOP;
    add.u32 %r9, %r9, %r3;
    bra.uni $LOOP;
$DONE:
    shfl.sync.bfly.b32 %r9, %r9, 0, 31, -1;
    """
    odd = [sum(range(1, n + 1, 2)) for n in range(32)]
    assert lanes(body, LANE).tolist() == odd


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_product(dtype: torch.dtype) -> None:
    """Copied asynchronously, loaded by ldmatrix, multiplied: a · b with a 16×16 and b 16×8."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, n, generator=generator).to(dtype) for n in (16, 8))
    out = torch.zeros(16, 8)
    body = f"""
    mad.wide.u32 %rd3, %r0, 16, %rd0; shl.b32 %r1, %r0, 4;
    cp.async.cg.shared.global [%r1], [%rd3], 16;
    and.b32 %r2, %r0, 15; mad.wide.u32 %rd4, %r2, 16, %rd1; shl.b32 %r3, %r2, 4;
    setp.lt.u32 %p1, %r0, 16;
    @%p1 cp.async.cg.shared.global [%r3 + 512], [%rd4], 16;
    cp.async.commit_group; cp.async.wait_group 0;
    shr.u32 %r4, %r0, 4; shl.b32 %r4, %r4, 4; mad.lo.u32 %r4, %r2, 32, %r4;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r4];
    ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {{%r14, %r15}}, [%r3 + 512];
    mov.b32 %f0, 0f00000000;
    mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32
      {{%f1, %f2, %f3, %f4}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%f0, %f0, %f0, %f0}};
    mad.wide.u32 %rd5, %r0, 8, %rd2;
    st.global.v2.b32 [%rd5], {{%f1, %f2}}; st.global.v2.b32 [%rd5 + 256], {{%f3, %f4}};"""
    run(body, a, b, out, shared=768)
    exact = a.double() @ b.double()
    terms = a.double().abs() @ b.double().abs()
    assert ((out - exact).abs() <= 2 * torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_stored_as_they_are_loaded(trans: str) -> None:
    given = torch.arange(256, dtype=torch.int16)
    out = torch.zeros(256, dtype=torch.int16)
    body = f"""
    mad.wide.u32 %rd3, %r0, 16, %rd0; shl.b32 %r1, %r0, 4;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3]; st.shared.v4.b32 [%r1], {{%r2, %r3, %r4, %r5}};
    ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r1];
    stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r1+512], {{%r2, %r3, %r4, %r5}};
    ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1+512];
    mad.wide.u32 %rd4, %r0, 16, %rd1; st.global.v4.b32 [%rd4], {{%r2, %r3, %r4, %r5}};"""
    run(body, given, out, shared=1024)
    assert torch.equal(out, given)


# -- faults ---------------------------------------------------------------------------------------

OWN = "shl.b32 %r1, %r0, 2; "  # the thread's word of shared memory
OTHER = "xor.b32 %r2, %r1, 128; "  # the same thread's of the other warp
FIRST = "setp.lt.u32 %p1, %r0, 32; "  # whether it is of the first warp
COPY = "shl.b32 %r3, %r0, 4; cp.async.cg.shared.global [%r3], [%rd0], 16; cp.async.commit_group; "
WAIT = "cp.async.wait_group 0; "
FAULTS = {
    "unwritten": (
        OWN + "ld.shared.b32 %r4, [%r1];",
        "shared address 0x0 is read, and nobody wrote it",
    ),
    "read after write": (
        FIRST + OWN + OTHER + "st.shared.b32 [%r1], %r0; bar.sync 0; "
        "@%p1 st.shared.b32 [%r1], %r0; @!%p1 ld.shared.b32 %r4, [%r2];",
        "one warp reads what another writes between the same barriers",
    ),
    "write after read": (
        FIRST + OWN + OTHER + "st.shared.b32 [%r1], %r0; bar.sync 0; "
        "@%p1 ld.shared.b32 %r4, [%r2]; @!%p1 st.shared.b32 [%r1], %r0;",
        "one warp writes what another reads between the same barriers",
    ),
    "two writes": (
        "mov.b32 %r1, smem; st.shared.b32 [%r1], %r0;",
        "two warps write it between the same barriers",
    ),
    "behind a tensor": (
        "ld.global.b32 %r4, [%rd0 + 256];",
        "an access of 4 bytes outside the tensors: 0 bytes behind tensor 0",
    ),
    "before a tensor": (
        "ld.global.b32 %r4, [%rd0 + -4];",
        "an access of 4 bytes outside the tensors: 4 bytes before tensor 0",
    ),
    "behind local memory": (
        ".local .align 4 .b8 own[8]; ld.local.b32 %r4, [own+8];",
        "local address 0x8 is no multiple of the 4 bytes, or outside the lane's 8",
    ),
    "in a gap": (
        "ld.global.b32 %r4, [%rd1 + 4];",
        "outside the tensors: between the elements of tensor 1",
    ),
    "a null pointer": (
        "mov.b64 %rd2, 0; st.global.b32 [%rd2], %r0;",
        "outside the tensors: nowhere near one",
    ),
    "outside shared memory": (
        OWN + "st.shared.b32 [%r1 + 2048], %r0;",
        "shared address 0x800 is outside the block's 2048 bytes",
    ),
    "misaligned": (
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0 + 8];",
        "is no multiple of the 16 bytes",
    ),
    "misaligned, shared": (
        "st.shared.v2.b32 [smem + 4], {%r0, %r0};",
        "shared address 0x4 is no multiple of the 8 bytes",
    ),
    "a barrier for one warp": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $L; ret;\n$L: bar.sync 0;",
        "a barrier that only 1 of 2 warps reach",
    ),
    "two barriers": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $L; bar.sync 0; bra $M;\n$L: bar.sync 0;\n$M:",
        "warps of a block wait at different barriers",
    ),
    "a barrier for some lanes": (
        "setp.lt.u32 %p1, %r0, 40; @%p1 bra $L; bar.sync 0;\n$L:",
        "lanes 0xffffff00 are here, lanes 0xffffffff must be",
    ),
    "a shuffle for some lanes": (
        "setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;",
        "lanes 0xffff are here, lanes 0xffffffff must be",
    ),
    "no wait": (
        COPY + "ld.shared.b32 %r4, [%r3];",
        "is read before the asynchronous copy to it is waited for",
    ),
    "a wait for the group before": (
        COPY + "cp.async.wait_group 1; ld.shared.b32 %r4, [%r3];",
        "is read before the asynchronous copy to it is waited for",
    ),
    "no barrier behind the wait": (
        FIRST + COPY + WAIT + "xor.b32 %r4, %r3, 512; @!%p1 ld.shared.b32 %r4, [%r4];",
        "one warp reads what another writes between the same barriers",
    ),
    "a copy over what is read": (
        FIRST
        + COPY
        + WAIT
        + "bar.sync 0; xor.b32 %r4, %r3, 512; @%p1 ld.shared.b32 %r4, [%r4]; "
        + COPY,
        "an asynchronous copy overwrites what another warp uses between the same barriers",
    ),
    "a write under a copy": (
        COPY + "st.shared.b32 [%r3], %r0;",
        "is written before the asynchronous copy to it is waited for",
    ),
    "a copy of what is partly in a gap": (
        "cp.async.cg.shared.global [0], [%rd1], 16, 8;",
        "an access of 8 bytes outside the tensors: between the elements of tensor 1",
    ),
    "a copy of too much": (
        "cp.async.cg.shared.global [0], [%rd0], 16, 32;",
        "an asynchronous copy of more than its size",
    ),
    "a copy over a copy": (COPY + COPY, "an asynchronous copy to where another is under way"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name: str) -> None:
    body, message = FAULTS[name]
    values = torch.arange(64, dtype=torch.int32)
    gaps = torch.arange(64, dtype=torch.int32)[::2]
    with pytest.raises(Fault) as caught:
        run(body, values, gaps, warps=2, shared=2048)
    assert message in str(caught.value)
    assert "block (0, 0, 0), warp " in str(caught.value)


def test_without_a_fault() -> None:
    """The same accesses with barriers and waits where they belong."""
    body = f"""{OWN}{OTHER}
    st.shared.b32 [%r1 + 1024], %r0; bar.sync 0; ld.shared.b32 %r5, [%r2 + 1024];
    {COPY}{WAIT} bar.sync 0; xor.b32 %r4, %r3, 512; ld.shared.b32 %r6, [%r4]; bar.sync 0;
    {COPY}{WAIT}
    add.u32 %r5, %r5, %r6; mad.wide.u32 %rd2, %r0, 4, %rd1; st.global.b32 [%rd2], %r5;"""
    values, out = torch.full((4,), 7, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    run(body, values, out, warps=2, shared=2048)
    assert torch.equal(out, 7 + (torch.arange(64, dtype=torch.int32) ^ 32))


def test_a_generic_address_is_one_of_global_memory() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    run("mul.wide.u32 %rd2, %r0, 4; add.u64 %rd2, %rd2, %rd0; st.u32 [%rd2], %r0;", out)
    assert out.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frob.b32 %r1, %r0;", r"'frob.b32 %r1, %r0'"),
        ("tcgen05.fence;", r"'tcgen05.fence'"),
        ("ld.const.b32 %r1, [%r0];", r"memory other than param, global, shared, local"),
        ("bar.sync 1;", r"'bar.sync 1' of k: a barrier other than bar.sync 0"),
        ("add.s32 %r1, %r0, %r2, %r3;", r"4 operands where 3 are meant"),
        ("add.s32 %r1, %r0, %rd0;", r"'add.s32 %r1, %r0, %rd0' of k: %rd0 has 8 bytes where 4 are"),
        ("cvt.rzi.s64.f32 %r1, %f1;", r"registers of unequal size, or too small"),
        ("ld.global.b32 %h1, [%rd0];", r"registers of unequal size, or too small"),
        ("mov.b32 %r1, nothing;", r"'mov.b32 %r1, nothing' of k: the operand nothing"),
    ],
)
def test_what_is_unknown_is_named(body: str, message: str) -> None:
    with pytest.raises(machine.Unknown, match=message):
        run(body, torch.zeros(1))
