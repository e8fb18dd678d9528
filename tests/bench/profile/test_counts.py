"""Counts of hand-made kernels, which are known exactly, and of the project's own."""

from __future__ import annotations

import inspect
import struct

import pytest
import torch

from bench.profile import counts, executed, flight, sass
from bench.profile.main_loop import loops
from cmpose.kernels import philox
from tests.csrc.compile_check import require_nvcc
from tests.ptx_on_cpu import machine, parse
from tests.ptx_on_cpu.launches import Code, Counting, Launch

pytestmark = pytest.mark.skipif(machine.compiler() is None, reason="needs g++")

HEAD = """.version 8.7
.target sm_89
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p0, .param .u64 p1, .param .u32 p2)
{
.reg .pred %p<4>; .reg .b32 %r<40>; .reg .f32 %f<8>; .reg .b64 %rd<12>;
.loc 1 1 0
ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u32 %r9, [p2];
cvta.to.global.u64 %rd0, %rd0; cvta.to.global.u64 %rd1, %rd1;
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.u32 %r3, %r1, %r2, %r0;
"""
TAIL = '\nret;\n}\n.file 1 "/hand/made.py"\n'


def ran(
    body: str, *tensors: torch.Tensor, number: int = 0, blocks: int = 1, warps: int = 1
) -> tuple[Counting, executed.Executed, sass.Code]:
    """Counts a kernel of pointers p0, p1 and a number p2; %r3 is the thread in the launch."""
    ptx = HEAD + body + TAIL
    counting = Counting()
    parameters = struct.pack("QQI", *(t.data_ptr() for t in tensors), number)
    made = Code(ptx, 8192, parameters)
    kernel = Launch("k", "k", (blocks,), warps, tensors, lambda _: made).run(counting=counting)
    code = counts._code(ptx, 89)
    wanted = executed.wanted(kernel, counting, blocks * warps)
    return counting, executed.executed(code.blocks, wanted), code


def in_flight(
    body: str, counting: Counting, found: executed.Executed, code: sass.Code, warps: int = 1
) -> float:
    """Bytes that a warp has under way at the most."""
    share = flight.shares(parse.Kernel(HEAD + body + TAIL), counting, warps)
    return flight.most(code.blocks, found.times, share)


def times_of(code: sass.Code, found: executed.Executed, base: str) -> float:
    """How often a warp executes instructions of that name."""
    return sum(
        times
        for block, times in zip(code.blocks, found.times, strict=True)
        for one in block.instructions
        if one.base == base
    )


COPY = """
.loc 1 2 0
mul.lo.u32 %r4, %r3, {step}; mul.wide.u32 %rd2, %r4, 4; add.u64 %rd3, %rd0, %rd2;
ld.global.f32 %f0, [%rd3];
.loc 1 3 0
mul.wide.u32 %rd4, %r3, 4; add.u64 %rd5, %rd1, %rd4; st.global.f32 [%rd5], %f0;"""


@pytest.mark.parametrize("step", [1, 8])
def test_sectors(step: int) -> None:
    """n floats are n / 8 sectors; 8 apart, each is one."""
    n = 256
    source, out = torch.randn(step * n), torch.zeros(n)
    counting, found, code = ran(COPY.format(step=step), source, out, blocks=4, warps=2)
    assert torch.equal(out, source[::step])
    assert counting.rows["sectors"].sum() == n // 8 * step + n // 8
    assert counting.distinct.tolist() == [[n // 8 * step, 0], [0, n // 8]]
    assert counting.rows["accesses"].sum() == 2 * n // 32
    assert in_flight(COPY.format(step=step), counting, found, code, 2) == 128 * step
    assert found.unmatched < 1e-6
    assert times_of(code, found, "LDG") == pytest.approx(1.0)


@pytest.mark.parametrize(("step", "wavefronts"), [(0, 1), (1, 1), (2, 2), (32, 32), (33, 1)])
def test_bank_conflicts(step: int, wavefronts: int) -> None:
    """Lanes ``step`` words apart, written and read: as many passes as words share a bank."""
    body = f"""
    mul.lo.u32 %r4, %r0, {4 * step}; mov.u32 %r5, smem; add.u32 %r5, %r5, %r4;
    st.shared.u32 [%r5], %r9; bar.sync 0; ld.shared.u32 %r6, [%r5];
    mul.wide.u32 %rd2, %r3, 4; add.u64 %rd3, %rd1, %rd2; st.global.u32 [%rd3], %r6;"""
    counting, _, _ = ran(body, torch.zeros(1), torch.zeros(32), number=7)
    assert counting.rows["wavefronts"].sum() == 2 * wavefronts
    assert counting.rows["conflicts"].sum() == 2 * (wavefronts - 1)


def test_wide_shared_accesses() -> None:
    """16 bytes a lane are four passes, and that is no conflict."""
    body = """
    shl.b32 %r4, %r0, 4; mov.u32 %r5, smem; add.u32 %r5, %r5, %r4;
    st.shared.v4.u32 [%r5], {%r9, %r9, %r9, %r9};"""
    counting, _, _ = ran(body, torch.zeros(1), torch.zeros(1))
    assert counting.rows["wavefronts"].sum() == 4
    assert counting.rows["conflicts"].sum() == 0


LOOP = """
mov.f32 %f1, 0f00000000; mov.u32 %r10, 0; cvt.u64.u32 %rd9, %r3; shl.b64 %rd9, %rd9, 2;
add.u64 %rd3, %rd0, %rd9;
setp.eq.u32 %p2, %r9, 0; @%p2 bra $end;
$again:
.loc 1 5 0
ld.global.f32 %f0, [%rd3]; add.u64 %rd3, %rd3, 128;
.loc 1 6 0
fma.rn.f32 %f1, %f0, %f0, %f1;
.loc 1 7 0
add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, {end}; @%p1 bra $again;
$end:
.loc 1 8 0
add.u64 %rd5, %rd1, %rd9; st.global.f32 [%rd5], %f1;"""


@pytest.mark.parametrize("end", ["%r9", "24"])
@pytest.mark.parametrize("rounds", [1, 24])
def test_loops(end: str, rounds: int) -> None:
    """ptxas unrolls, by four with a remainder or altogether; what is executed is the same."""
    rounds = 24 if end == "24" else rounds
    given, out = torch.randn(32 * 24), torch.zeros(32)
    _, found, code = ran(LOOP.format(end=end), given, out, number=rounds)
    torch.testing.assert_close(out, given.view(24, 32)[:rounds].square().sum(0))
    assert found.unmatched < 1e-6
    assert times_of(code, found, "LDG") == pytest.approx(rounds, abs=1e-4)
    assert times_of(code, found, "FFMA") == pytest.approx(rounds, abs=1e-4)
    if rounds == 24:
        loads = [o for b in code.blocks for o in b.instructions if o.base == "LDG"]
        assert flight.most(code.blocks, found.times, {}) >= 4 * 128  # so many before the first use
        assert len(loads) > 4


@pytest.mark.parametrize("rounds", [64, 1024])
@pytest.mark.parametrize("load", ["", "ld.global.f32 %f0, [%rd3]; add.u64 %rd3, %rd3, 128;"])
def test_loops_without_a_remainder(load: str, rounds: int) -> None:
    """ptxas goes round in steps of a divisor, and nowhere has one round alone."""
    body = f"""
    mov.f32 %f1, 0f3F800000; mov.f32 %f0, 0f3F000000; mov.u32 %r10, 0; mov.u64 %rd3, %rd0;
    $again:
    .loc 1 5 0
    {load}
    .loc 1 6 0
    fma.rn.f32 %f1, %f1, %f0, %f0;
    .loc 1 7 0
    add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, {rounds}; @%p1 bra $again;
    .loc 1 8 0
    st.global.f32 [%rd1], %f1;"""
    _, found, code = ran(body, torch.rand(32 * rounds), torch.zeros(1))
    assert found.unmatched < 1e-6
    assert times_of(code, found, "FFMA") == pytest.approx(rounds, abs=1e-3)
    assert times_of(code, found, "LDG") == pytest.approx(rounds * bool(load), abs=1e-3)


@pytest.mark.parametrize("loading", [1, 4])
def test_bytes_in_flight_are_those_of_the_warps_that_load(loading: int) -> None:
    """Of four warps as many run the loop of loads; the others have none under way."""
    loop = LOOP.format(end="24")
    body = f"setp.ge.u32 %p1, %r0, {32 * loading}; @%p1 bra $none;{loop}\n$none:"
    counting, found, code = ran(body, torch.randn(32 * 27), torch.zeros(128), number=24, warps=4)
    every = flight.most(code.blocks, found.times, {})
    assert every >= 4 * 128
    loaded = in_flight(body, counting, found, code, 4)
    assert loaded == pytest.approx(every * loading / 4)


@pytest.mark.parametrize("waiting", [0, 1])
def test_copies_in_flight_are_those_of_the_groups_that_are_not_waited_for(waiting: int) -> None:
    """16 bytes a lane are asked for in each round, and all but ``waiting`` groups waited for."""
    body = f"""
    mul.wide.u32 %rd2, %r0, 16; add.u64 %rd3, %rd0, %rd2; mov.u32 %r10, 0;
    shl.b32 %r4, %r0, 4; mov.u32 %r5, smem; add.u32 %r5, %r5, %r4;
    $again:
    .pragma "nounroll";
    and.b32 %r6, %r10, 7; shl.b32 %r6, %r6, 9; add.u32 %r6, %r5, %r6;
    cp.async.cg.shared.global [%r6], [%rd3], 16; cp.async.commit_group;
    cp.async.wait_group {waiting};
    add.u32 %r10, %r10, 1; setp.lt.u32 %p1, %r10, %r9; @%p1 bra $again;"""
    counting, found, code = ran(body, torch.zeros(128), torch.zeros(1), number=6)
    assert in_flight(body, counting, found, code) == 512 * (waiting + 1)


def test_share_of_a_branch() -> None:
    """Two of eight blocks load and compute; the others store only."""
    body = """
    mov.f32 %f0, 0f3F800000; setp.ge.u32 %p1, %r1, 2; mul.wide.u32 %rd2, %r3, 4;
    .loc 1 4 0
    @%p1 bra $skip;
    .loc 1 5 0
    add.u64 %rd3, %rd0, %rd2; ld.global.f32 %f0, [%rd3]; lg2.approx.ftz.f32 %f0, %f0;
    ex2.approx.ftz.f32 %f0, %f0; lg2.approx.ftz.f32 %f0, %f0; ex2.approx.ftz.f32 %f0, %f0;
    $skip:
    .loc 1 6 0
    add.u64 %rd5, %rd1, %rd2; st.global.f32 [%rd5], %f0;"""
    counting, found, code = ran(body, torch.randn(256), torch.zeros(256), blocks=8)
    assert times_of(code, found, "LDG") <= 1.0
    assert times_of(code, found, "MUFU") == pytest.approx(4 * 2 / 8, abs=1e-4)
    assert times_of(code, found, "STG") == pytest.approx(1.0, abs=1e-4)
    # What is under way is that of a block that loads, not the mean over all eight.
    assert in_flight(body, counting, found, code) == 128


ALONE = """
mul.wide.u32 %rd2, %r3, 4; add.u64 %rd3, %rd0, %rd2; ld.global.f32 %f0, [%rd3];
add.u64 %rd5, %rd1, %rd2; setp.ne.u32 %p1, %r0, 0; setp.ne.u32 %p2, %r9, 0;
mov.u32 %r10, 0;
$again:
.loc 1 4 0
@%p1 bra $skip;
.loc 1 5 0
@!%p2 bra $plain;
div.rn.f32 %f1, 0f40400000, %f0; sqrt.rn.f32 %f0, %f1;
$plain:
.loc 1 6 0
@%p2 bra $store;
bra.uni $after;
$store:
st.global.f32 [%rd5], %f0;
$after:
.loc 1 7 0
add.f32 %f0, %f0, 0f3F800000; st.global.f32 [%rd5], %f0;
$skip:
.loc 1 8 0
add.u32 %r10, %r10, 1; setp.lt.u32 %p3, %r10, %r9; @%p3 bra $again;
"""


def test_lanes_that_part() -> None:
    """In each of five rounds the first lane alone divides, takes a root and stores twice: what the
    others skip is counted, whichever way the jumps of the two codes go."""
    _, found, code = ran(ALONE, torch.rand(32), torch.zeros(32), number=5)
    assert found.unmatched < 1e-6
    assert times_of(code, found, "STG") == pytest.approx(10, abs=1e-3)
    assert times_of(code, found, "FCHK") == pytest.approx(5, abs=1e-3)
    assert times_of(code, found, "MUFU") == pytest.approx(10, abs=1e-3)


def test_both_ways_of_a_branch() -> None:
    """Half of a warp's lanes go each way, and all of them on together."""

    def way(offset: int) -> str:
        return "".join(
            f"""ld.global.f32 %f0, [%rd3+{offset + 128 * n}]; lg2.approx.ftz.f32 %f0, %f0;
            ex2.approx.ftz.f32 %f0, %f0; lg2.approx.ftz.f32 %f0, %f0; ex2.approx.ftz.f32 %f0, %f0;
            st.global.f32 [%rd5+{offset + 128 * n}], %f0;\n"""
            for n in range(12)
        )

    body = f"""
    mul.wide.u32 %rd2, %r0, 4; add.u64 %rd3, %rd0, %rd2; add.u64 %rd5, %rd1, %rd2;
    setp.lt.u32 %p1, %r0, 16; @%p1 bra $low;
    {way(0)} bra.uni $end;
    $low:
    {way(1536)}
    $end:
    st.global.f32 [%rd5+3072], %f0;"""
    _, found, code = ran(body, torch.rand(768), torch.zeros(800))
    assert found.unmatched < 1e-6
    assert times_of(code, found, "STG") == pytest.approx(25, abs=1e-3)
    assert times_of(code, found, "MUFU") == pytest.approx(96, abs=1e-3)


LOTS = """
mul.wide.u32 %rd2, %r3, 4; add.u64 %rd3, %rd0, %rd2; add.u64 %rd5, %rd1, %rd2;
mov.f32 %f0, 0f00000000; mov.u32 %r10, 0; and.b32 %r4, %r0, 3; setp.eq.u32 %p3, %r9, 0;
.loc 1 4 0
@%p3 bra $end;
$again:
.loc 1 5 0
setp.eq.u32 %p1, %r10, %r4; @%p1 bra $found;
add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, %r9; @%p2 bra $again;
bra.uni $end;
$found:
.loc 1 6 0
ld.global.f32 %f0, [%rd3]; lg2.approx.f32 %f0, %f0;
$end:
.loc 1 7 0
st.global.f32 [%rd5], %f0;"""


def test_lots_of_lanes_that_leave_a_loop() -> None:
    """Of a warp a quarter of the lanes leaves in each of four rounds. Each lot does by itself what
    stands before the place where all come together, and waits there."""
    counting, found, code = ran(LOTS, torch.rand(32), torch.zeros(32), number=4)
    assert counting.rows["partings"].sum() == 3
    assert times_of(code, found, "LDG") == pytest.approx(4, abs=1e-3)
    assert times_of(code, found, "BSYNC") == pytest.approx(4, abs=1e-3)
    assert times_of(code, found, "STG") == pytest.approx(1, abs=1e-3)


def test_rounds_that_differ_between_lanes() -> None:
    """Lane i goes through a loop i times, of which ptxas makes one of 4 rounds at a time, then one
    of 2 and one of 1. Behind each the lanes that came one after another are one warp again."""
    body = """
    shl.b32 %r4, %r0, 2; mov.u32 %r5, smem; add.u32 %r4, %r5, %r4; mov.u32 %r10, 0;
    st.shared.u32 [%r4], %r9; bar.sync 0; setp.eq.u32 %p1, %r0, 0; mov.u32 %r6, 0;
    .loc 1 4 0
    @%p1 bra $end;
    $again:
    .loc 1 5 0
    ld.shared.u32 %r7, [%r5]; add.u32 %r5, %r5, 4; xor.b32 %r7, %r7, %r6; shl.b32 %r6, %r7, 1;
    .loc 1 6 0
    add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, %r0; @%p2 bra $again;
    $end:
    mul.wide.u32 %rd2, %r3, 4; add.u64 %rd5, %rd1, %rd2; st.global.u32 [%rd5], %r6;"""
    _, found, code = ran(body, torch.zeros(1), torch.zeros(256), number=5, warps=8)
    by_four = [
        times
        for block, times in zip(code.blocks, found.times, strict=True)
        if sum(one.base == "LDS" for one in block.instructions) == 4
    ]
    assert by_four == [pytest.approx(sum(range(7, 64, 8)) / 8, abs=0.5)]
    assert times_of(code, found, "BSSY") == pytest.approx(3, abs=1e-3)


def test_loads_that_ptxas_makes_one() -> None:
    """One of two branches' loads is left, with one of their lines; either may have been taken."""
    body = """
    mul.wide.u32 %rd2, %r3, 4; add.u64 %rd3, %rd0, %rd2; setp.eq.u32 %p1, %r9, 1; @%p1 bra $one;
    .loc 1 4 0
    ld.global.u16 %r4, [%rd3];
    .loc 1 5 0
    shl.b32 %r4, %r4, 16; mov.b32 %f0, %r4; bra.uni $end;
    $one:
    .loc 1 6 0
    ld.global.u16 %r4, [%rd3];
    .loc 1 7 0
    cvt.rn.f32.u32 %f0, %r4;
    $end:
    .loc 1 8 0
    add.u64 %rd5, %rd1, %rd2; st.global.f32 [%rd5], %f0;"""
    for number in (1, 2):
        _, found, code = ran(body, torch.rand(32), torch.zeros(32), number=number)
        assert found.unmatched < 1e-6
        assert times_of(code, found, "LDG") == pytest.approx(1, abs=1e-3)


def block(*instructions: str, to: tuple[int, ...] = (), exits: bool = False) -> sass.Block:
    """Of instructions such as ``LDG.E R2 7``: opcode, operands if any, number."""
    parts = [one.split() for one in instructions]
    found = [
        sass.Instruction(opcode, " ".join(operands), False, int(number))
        for opcode, *operands, number in parts
    ]
    return sass.Block(found, list(to), exits=exits)


def test_a_load_that_ptxas_puts_behind_a_branch() -> None:
    """A guard before it becomes a branch around it."""
    blocks = [
        block("ISETP 9", "CS2R 14", "BRA 14", to=(1, 2)),
        block("LDG.E.64 14", to=(2,)),
        block("STG.E.64 16", "EXIT 17", exits=True),
    ]
    anchors = {("load", 14): 0.5, ("store", 16): 0.5}
    wanted = executed.Wanted(dict.fromkeys((9, 14, 16, 17), 1.0), anchors, {})
    found = executed.executed(blocks, wanted)
    assert found.times == pytest.approx([1, 1, 1])
    assert found.unmatched == pytest.approx(0)


def test_the_example_of_executed() -> None:
    """A loop of 25 rounds, four of which are one of the first of two loops; its counter is in each
    of them once."""
    blocks = [
        block("MOV 1", to=(1,)),
        block(*["LDG.E.64 7"] * 4, *["IADD3 8"] * 8, "IADD3 9", "BRA 10", to=(1, 2)),
        block("LDG.E.64 7", "IADD3 8", "IADD3 8", "IADD3 9", "BRA 10", to=(2, 3)),
        block("EXIT 11", exits=True),
    ]
    visits = {1: 1.0, 7: 25.0, 8: 25.0, 9: 25.0, 10: 25.0, 11: 1.0}
    found = executed.executed(blocks, executed.Wanted(visits, {("load", 7): 12.5}, {}))
    assert found.times == pytest.approx([1, 6, 1, 1])
    assert found.unmatched == 0


def test_what_comes_last_has_all_before_it_come() -> None:
    """Two loads, a use of the second, and two more: never three under way."""
    code = block("LDG.E R2 1", "LDG.E R4 2", "FADD R4 3", "LDG.E R6 4", "LDG.E R8 5", exits=True)
    assert flight.most([code], [1.0], {}) == 2 * 32 * 4


def test_sampled_blocks() -> None:
    """Few blocks all; of many, an equal share of each remainder modulo 12."""
    assert counts.sampled(2 * counts.SAMPLES, counts.SAMPLES) is None
    for blocks in (2 * counts.SAMPLES + 1, 2496, 13824, 99991):
        chosen = counts.sampled(blocks, counts.SAMPLES)
        assert chosen is not None
        assert len(set(chosen)) == counts.SAMPLES
        assert 0 <= min(chosen) <= max(chosen) < blocks
        shares = torch.bincount(torch.tensor(chosen) % 12, minlength=12)
        assert set(shares.tolist()) == {counts.SAMPLES // 12}


def test_an_opcode_without_a_pipe_is_named() -> None:
    with pytest.raises(sass.UnknownOpcode, match="HYPERMMA"):
        sass.Instruction("HYPERMMA.1", "", False).pipe  # noqa: B018


@pytest.mark.parametrize(
    ("opcode", "matrices"),
    [("STSM.16.M88", 1), ("LDSM.16.M88.2", 2), ("LDSM.16.MT88.4", 4), ("LDS.128", 0)],
)
def test_matrices_of_an_access(opcode: str, matrices: int) -> None:
    assert sass.Instruction(opcode, "", False).matrices == matrices


def test_a_kernel_whose_codes_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SASS of a kernel that loads twice as often is refused."""
    one = counts.launches_of_op("temporal_attention", 89, {"B": 1, "N": 4}, "forward")[0]
    made = counts._code(one.code(89).ptx, 89, one.code(89).flags)
    blocks = [sass.Block(2 * b.instructions, b.next, b.call, b.exits) for b in made.blocks]
    code = sass.Code(made.registers, made.shared, blocks)
    monkeypatch.setattr(counts, "_code", lambda *_: code)
    with pytest.raises(counts.Unmatched, match=r"temporal_attention_rows_forward for sm_89: \d"):
        counts.count([one], 89)


@pytest.mark.parametrize("arch", [89, 90])
def test_spatial_attention(arch: int) -> None:
    """Against what its shapes say; on sm_90 by wgmma, whose SASS names no line."""
    (found,) = counts.counts_of_op("spatial_attention", arch, {"B": 1}, backend="triton")
    pairs = 3 * 3 * 12  # of sequence and head
    rows, keys, tokens, d = 256, 208, 207, 64
    assert found.tensor_flops == pytest.approx(2 * 2 * pairs * rows * keys * d, rel=1e-4)
    one = pairs * tokens * d * 2 // 32
    assert found.distinct_read == 3 * one
    assert found.distinct_written == pytest.approx(one, rel=0.04)  # and the log-sum-exp
    assert found.instructions["mufu"] * 32 >= pairs * rows * keys
    assert found.blocks * found.warps * 1000 < sum(found.instructions.values())
    assert (found.shared_conflicts, min(found.access_bytes)) == (0, 4)


def test_a_kernel_whose_blocks_share_the_items() -> None:
    """Of as many blocks as the card has multiprocessors some run; 208 keys are 13 tiles of 16."""
    require_nvcc()
    (found,) = counts.counts_of_op("spatial_attention", 89, {"B": 2}, backend="cuda")
    pairs, tokens, d = 2 * 3 * 3 * 12, 207, 64
    assert (found.blocks, found.shared_conflicts, min(found.access_bytes)) == (128, 0, 16)
    # Two of the four blocks that run have one item more than all have on average.
    assert found.tensor_flops == pytest.approx(2 * 2 * pairs * 208 * 208 * d, rel=0.2)
    assert found.distinct_read == pytest.approx(3 * pairs * tokens * d * 2 // 32, rel=0.2)
    matrix = tokens * d * 2
    assert 2 * matrix < found.bytes_in_flight < 3 * matrix  # the third is another item's, if any


@pytest.mark.parametrize("arch", [89, 90, 120])
def test_a_loop_without_accesses(arch: int) -> None:
    """The permutation of corrupt_tokens: twelve rounds by four, of integer arithmetic alone."""
    one = counts.launches_of_op("corrupt_tokens", arch, {"B": 1}, "forward")[0]
    made, counting = one.code(arch), Counting([0])
    blocks = counts._code(made.ptx, arch, made.flags).blocks
    kernel = one.run(arch, counting=counting)
    found = executed.executed(blocks, executed.wanted(kernel, counting, one.warps))
    text, start = inspect.getsourcelines(philox.permuted.fn)
    line = start + next(at for at, row in enumerate(text) if "swap = " in row)
    numbers = {row.number for row in kernel.rows if row.source.endswith(f"philox.py:{line}")}
    heads = [
        head
        for head, body in loops([block.next for block in blocks]).items()
        if numbers & {one.number for at in body for one in blocks[at].instructions}
    ]
    assert [found.times[head] for head in heads] == pytest.approx([3], abs=1e-3)


def test_kernels_of_csrc_are_matched() -> None:
    """Theirs part lanes, have loops with remainders, and branches by dtype: all of it is found."""
    require_nvcc()
    for op in ("dpc_knn", "merge_clusters"):
        direction = "forward" if op == "dpc_knn" else "backward"
        launches = counts.launches_of_op(op, 90, {"B": 1}, direction)
        assert counts.count(launches, 90, whole=True, unmatched=1e-3)


def test_a_batch_has_the_clips_work() -> None:
    """Also where its blocks are as many as the card has SMs."""
    require_nvcc()
    (one,) = counts.counts_of_op("merge_clusters", 89, {"B": 1}, "backward")
    (batch,) = counts.counts_of_op("merge_clusters", 89, {"B": 4}, "backward")
    assert batch == counts.scaled(one, 4, 4 * one.blocks)
    few = counts.scaled(one, 4, 2 * one.blocks)
    assert few.instructions == batch.instructions
    assert few.barriers == batch.barriers
    assert few.blocks == batch.blocks / 2


@pytest.mark.parametrize(
    ("op", "direction", "options", "kinds"),
    [
        # q, k and v, the lengths and the result; backward also the gradients
        ("temporal_attention", "forward", ["separate", "lengths"], 5),
        ("temporal_attention", "backward", ["strides", "lengths", "scale", "causal"], 8),
        ("spatial_attention", "forward", ["strides", "lengths", "lse"], 6),
    ],
)
def test_options_reach_the_launch(op: str, direction: str, options: list[str], kinds: int) -> None:
    (one,) = counts.launches_of_op(op, 89, {"B": 1}, direction, "triton", options=options)
    assert len(one.tensors) == kinds
    (plain,) = counts.launches_of_op(op, 89, {"B": 1}, direction, "triton")
    assert len(plain.tensors) < kinds


def test_a_loss_with_its_gradient() -> None:
    """Forward writes the gradient for an upstream one of 1, which backward then leaves as it is."""
    shape = {"B": 1, "K": 2}
    (alone, _) = counts.counts_of_op("heatmap_loss", 89, shape)
    forward, _, scale = counts.counts_of_op("heatmap_loss", 89, shape, "forward_backward")
    assert alone.kernel == forward.kernel == "forward_kernel"
    written = 2 * 64 * 48 * 2 // 32
    assert forward.sectors_written - alone.sectors_written == pytest.approx(written, rel=0.5)
    assert (scale.kernel, scale.sectors_written) == ("scale_kernel", 0)


def test_what_has_no_such_direction() -> None:
    with pytest.raises(ValueError, match=r"warp_clips: direction 'backward'"):
        counts.counts_of_op("warp_clips", 89, {"B": 1}, "backward")
