"""The model by hand: occupancy, what each resource needs, waves, bound and estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.harness.shapes import BF16, FP32
from bench.profile import model
from bench.profile.cards import A100, BY_ARCH, H200, L40, RTX_4090, RTX_5090, RTX_A5000, Card
from bench.profile.counts import Counts

NOTHING = Counts(
    kernel="kernel", arch=89, blocks=128, warps=4, registers=32, shared_bytes=0, instructions={},
    tensor_flops=0.0, sectors_read=0, sectors_written=0, distinct_read=0, distinct_written=0,
    access_bytes={}, shared_wavefronts=0, shared_conflicts=0, barriers=0, bytes_in_flight=0.0,
)  # fmt: skip


def counts(**changes: Any) -> Counts:
    return replace(NOTHING, **changes)


def a_copy(mb: int, arch: int = 89) -> Counts:
    """16 bytes a lane, four at a time; blocks of 128 threads."""
    sectors = mb * 1_000_000 // 32
    accesses = sectors // 16
    return counts(
        arch=arch, blocks=accesses // 16, sectors_read=sectors, sectors_written=sectors,
        distinct_read=sectors, distinct_written=sectors, access_bytes={16: 2 * accesses},
        bytes_in_flight=4 * 4 * 512.0,
        instructions={"memory": 2.0 * accesses, "alu": 2.0 * accesses},
    )  # fmt: skip


# -- occupancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "warps", "registers", "shared", "blocks", "limit"),
    [
        # 168 · 32 registers a warp: 12 warps of 65,536, three blocks of four.
        (RTX_4090, 4, 164, 24 * 1024, 3, "registers"),
        (RTX_4090, 8, 242, 78 * 1024, 1, "registers"),
        (RTX_4090, 4, 50, 0, 9, "registers"),
        (H200, 8, 115, 48 * 1024, 2, "registers"),
        (H200, 4, 48, 0, 10, "registers"),
        # 40 registers: 51 warps, of which 48 come in fours; that is what an SM holds too.
        (RTX_4090, 1, 40, 0, 24, "blocks"),
        (A100, 1, 80, 0, 24, "registers"),  # likewise 24 of 25
        (RTX_4090, 32, 32, 0, 1, "warps"),
        (H200, 32, 32, 0, 2, "warps"),
        # All 99 KB that a block may have, with the system's 1 KB, are the SM's 100 KB.
        (RTX_4090, 4, 64, 101_376, 1, "shared memory"),
        (RTX_4090, 4, 64, 50_176, 2, "shared memory"),
        (RTX_4090, 4, 64, 50_177, 1, "shared memory"),
        (A100, 4, 64, 50_176, 3, "shared memory"),
    ],
)
def test_blocks_an_sm(
    card: Any, warps: int, registers: int, shared: int, blocks: int, limit: str
) -> None:
    held = model.occupancy(
        counts(arch=card.arch, warps=warps, registers=registers, shared_bytes=shared), card
    )
    assert (held.blocks, held.limit) == (blocks, limit)


def test_a_block_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"kernel: no block fits an SM of RTX 4090: shared memory"):
        model.occupancy(counts(shared_bytes=101_377), RTX_4090)
    with pytest.raises(ValueError, match=r"registers \(32 warps, 255 registers a thread"):
        model.occupancy(counts(warps=32, registers=255), RTX_4090)


def test_waves_and_tail() -> None:
    one = model.occupancy(counts(blocks=128 * 3, registers=164), RTX_4090)
    assert (one.waves, one.tail) == (1.0, 0.0)
    quarter = model.occupancy(counts(blocks=128 * 3 * 5 // 4, registers=164), RTX_4090)
    assert (quarter.waves, quarter.tail) == (1.25, 0.375)


# -- resources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", BY_ARCH.values(), ids=lambda card: card.name)
def test_a_copy_is_bound_by_memory_at_the_cards_rate(card: Any) -> None:
    [launch] = model.profile([a_copy(1000, card.arch)], card, BF16, 2_000_000_000).launches
    assert launch.bound_by == "DRAM"
    assert launch.bound_us == pytest.approx(2e6 / card.dram_gb_s)
    assert launch.bound_us < launch.estimate_us < 1.2 * launch.bound_us


@pytest.mark.parametrize(("dtype", "rate"), [(BF16, 165.2e6), (FP32, 82.6e6)])
def test_products_alone_are_bound_by_the_tensor_cores(dtype: str, rate: float) -> None:
    """At the data sheet's TFLOP/s, operations a µs."""
    work = counts(blocks=128 * 30, tensor_flops=1e12, instructions={"tensor": 1e12 / 4096})
    [launch] = model.profile([work], RTX_4090, dtype, 0).launches
    assert launch.bound_by == "tensor"
    assert launch.bound_us == pytest.approx(1e12 / rate, rel=1e-3)


def test_what_each_resource_needs_by_hand() -> None:
    work = counts(
        arch=90, blocks=132, warps=4, sectors_read=4000, sectors_written=1000, distinct_read=1000,
        distinct_written=1000, access_bytes={16: 300, 2: 100}, shared_wavefronts=5000,
        bytes_in_flight=512.0,
        instructions={"fma": 13200.0, "alu": 1320.0, "mufu": 1320.0, "fp64": 132.0},
    )  # fmt: skip
    times = model.resources(work, H200, BF16)
    clocks = {name: us * 1830 for name, us in times.items()}
    assert times["DRAM"] == pytest.approx(2000 * 32 / 4.8e6)
    assert clocks["L2"] == pytest.approx(5000 * 32 / 132 / H200.l2_bytes)
    # A warp's 16 bytes a lane are four passes, its 2 bytes half a pass, which takes a whole one.
    assert clocks["shared"] == pytest.approx((5000 + 4 * 300 + 100) / 132)
    assert clocks["fma"] == pytest.approx(100 * 32 / 128)
    assert clocks["alu"] == pytest.approx(10 * 32 / 64)
    assert clocks["mufu"] == pytest.approx(10 * 32 / 16)
    assert clocks["fp64"] == pytest.approx(32 / 64)
    assert clocks["issue"] == pytest.approx((100 + 10 + 10 + 1) / 4)
    # 4000 · 32 / 132 bytes a block in pieces of 512; a quarter of the sectors come from DRAM.
    trip = 0.25 * H200.dram_cycles + 0.75 * H200.l2_cycles
    assert clocks["latency"] == pytest.approx(4000 * 32 / 132 / 512 * trip)


def test_little_s_law_bounds_a_copy_with_too_little_in_flight() -> None:
    starved = replace(a_copy(1000), bytes_in_flight=256.0, registers=255)
    [launch] = model.profile([starved], RTX_4090, BF16, 0).launches
    assert launch.bound_by == "latency"
    # Two blocks of four warps an SM, 256 bytes each, 542 clocks a trip.
    assert launch.bound_us == pytest.approx(1e9 / (128 * 2 * 256) * 542 / 2520, rel=0.01)


def test_the_busiest_sm_and_its_quarters_decide() -> None:
    """129 blocks on 128 SMs take as long as 256; a lone warp has a quarter of its SM."""
    work = {"fma": 1000.0}
    even = model.resources(counts(blocks=256, instructions={"fma": 2000.0}), RTX_4090, BF16)
    odd = model.resources(
        counts(blocks=129, instructions={"fma": 2000.0 * 129 / 256}), RTX_4090, BF16
    )
    assert odd["fma"] == pytest.approx(even["fma"])
    four = model.resources(counts(instructions=work), RTX_4090, BF16)
    one = model.resources(counts(warps=1, instructions=work), RTX_4090, BF16)
    assert one["fma"] == pytest.approx(4 * four["fma"])


# -- bound and estimate ---------------------------------------------------------------------------


def test_pipes_add_up_inside_an_sm_and_memory_runs_beside_them() -> None:
    nothing = dict.fromkeys(("DRAM", "L2", "latency", "shared", *H200.lanes, "tensor"), 0.0)
    tensor = {**nothing, "tensor": 80.0}
    alone = model.estimated(tensor, 99.0, H200)
    assert alone == pytest.approx(H200.launch_us + 80 / 0.8)
    with_softmax = model.estimated({**tensor, "mufu": 30.0, "fma": 20.0}, 99.0, H200)
    assert with_softmax == pytest.approx(alone + model.SERIAL * 50)
    beside = model.estimated({**tensor, "DRAM": 90.0}, 0.0, H200)
    assert beside == pytest.approx(H200.launch_us + 100 * 2**0.25)
    few_warps = model.estimated(tensor, 150.0, H200)
    assert few_warps == pytest.approx(H200.launch_us + 150)


@pytest.mark.parametrize(
    ("blocks", "registers", "beside", "rounds"),
    [
        (128, 32, 4, 1),  # one block on an SM, whatever there is room for
        (128 * 12, 32, 48, 1),
        (128 * 12, 255, 8, 6),
        (128 * 12 + 1, 255, 8, 6.5),
    ],
)
def test_warps_wait_for_themselves(blocks: int, registers: int, beside: int, rounds: float) -> None:
    """A warp issues once in so many clocks, whichever pipe; what fills the gaps lies beside it."""
    work = counts(
        blocks=blocks,
        registers=registers,
        instructions={"fma": 3000.0 * blocks, "control": 1000.0 * blocks},
    )
    us = 1000 * rounds * model.APART / 2520
    assert model.of_warps(work, RTX_4090, 0.0) == pytest.approx(us)
    assert model.of_warps(work, RTX_4090, 7.0) == pytest.approx(us + 7 * model.LOADED)
    [launch] = model.profile([work], RTX_4090, BF16, 0).launches
    assert launch.warps_us == pytest.approx(us)
    # An estimate, no bound: eight warps leave most of the slots of issue empty.
    assert launch.bound_us == pytest.approx(us * beside / 4 / model.APART)
    assert launch.estimate_us == pytest.approx(RTX_4090.launch_us + max(us, launch.bound_us))


def test_later_launches_find_in_l2_what_fits_there() -> None:
    small = model.profile([a_copy(10), a_copy(10)], RTX_4090, BF16, 0)
    first, second = small.launches
    assert first.bound_by == "DRAM"
    assert second.us["DRAM"] == 0
    assert first.bound_us == pytest.approx(10e6 / 1008e3)  # what is written stays in the cache
    more = model.profile([a_copy(5), a_copy(20)], RTX_4090, BF16, 0).launches[1]
    assert more.us["DRAM"] == pytest.approx(10e6 / 1008e3)
    assert small.bound_us == first.bound_us + second.bound_us
    large = model.profile([a_copy(20), a_copy(20)], RTX_4090, BF16, 80_000_000)
    assert {launch.bound_by for launch in large.launches} == {"DRAM"}


def test_no_bound_is_below_the_floor() -> None:
    """A kernel that reads less than it must has skipped something."""
    found = model.profile([a_copy(1)], RTX_4090, BF16, 1_008_000_000)
    assert found.floor_us == found.bound_us == pytest.approx(1000)
    assert found.bound_by == "floor"
    assert found.estimate_us == pytest.approx(1000 / model.COPY_SHARE)


def test_what_cannot_be_profiled_is_said() -> None:
    with pytest.raises(ValueError, match="launches: expected at least one, got none"):
        model.profile([], RTX_4090, BF16, 0)
    with pytest.raises(ValueError, match="kernel: counted for sm_89; H200 SXM is sm_90"):
        model.profile([counts()], H200, BF16, 0)


# -- cards ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "tflops"),
    [(RTX_4090, 165.2), (H200, 989), (A100, 312), (RTX_A5000, 111), (RTX_5090, 209.5),
     (L40, 181)],
    ids=lambda value: getattr(value, "name", ""),
)  # fmt: skip
def test_a_cards_clock_sms_and_tensor_cores_give_its_data_sheets_rate(
    card: Card, tflops: float
) -> None:
    assert card.sms * card.clock_ghz * card.tensor[BF16] / 1e3 == pytest.approx(tflops, rel=5e-3)
    assert card.sources
