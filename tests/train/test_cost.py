"""A step's time on a card, from operators that are made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.profile import results
from cmpose.train.cards import RTX_4090, cards_for
from cmpose.train.cost import (
    COPY_SHARE,
    COUNTED,
    LAUNCH,
    OVER_MEMORY,
    fused,
    kernel_seconds,
    seconds_by,
)
from cmpose.train.trace import Call

A100, H200 = cards_for("a100-sxm-80-gb,h200-sxm")
MB = 1_000_000


def call(name: str, reads: list[int], *writes: int, flops: int = 0, **fields) -> Call:
    """An operator on values of 1 MB."""
    other_fields = {"ours": False, "part": "a", "backward": False, "bits": 16} | fields
    bytes_of = dict.fromkeys(reads, MB), dict.fromkeys(writes, MB)
    return Call(name, reads=bytes_of[0], writes=bytes_of[1], flops=flops, **other_fields)


def moved(calls: list[Call]) -> list[tuple[str, set[int], set[int]]]:
    return [(c.name, set(c.reads), set(c.writes)) for c in calls]


def test_neighbours_between_products_are_one_kernel():
    """What they hand on stays inside, what two of them read is read once."""
    calls = [
        call("mm", [0, 1], 2, flops=1),
        call("add", [2, 3], 4),
        call("mul", [4, 3], 5),
        call("mm", [5, 1], 6, flops=1),
    ]
    assert moved(fused(calls)) == [
        ("mm", {0, 1}, {2}),
        ("add", {2, 3}, set()),
        ("mul", set(), {5}),
        ("mm", {5, 1}, {6}),
    ]
    middle = [call("mul", [2], 3), call("add", [3], 4), call("neg", [4], 5)]
    names = [c.name for c in fused([calls[0], *middle, call("mm", [5], 6, flops=1)])]
    assert names == ["mm", "mul", "neg", "mm"]  # add reads and writes nothing any more


def test_what_the_backward_pass_reads_is_kept_and_gradients_are_written():
    calls = [
        call("mul", [0], 1),
        call("add", [1], 2),
        call("mm", [2], 3, flops=1),
        call("ne", [0], 9),  # nobody reads it
        call("mul", [1, 3], 4, backward=True),
        call("sum", [4], 5, backward=True),
    ]
    assert moved(fused(calls)) == [
        ("mul", {0}, {1}),
        ("add", set(), {2}),
        ("mm", {2}, {3}),
        ("mul", {1, 3}, set()),
        ("sum", set(), {5}),
    ]


def test_a_wider_copy_is_made_again_by_each_kernel_that_reads_it():
    """As fp8's scaling does of the bfloat16 tensor whose largest number it has looked for."""

    def widened(source: int, copy: int) -> Call:
        copied = call("_to_copy", [source], copy)
        return replace(copied, writes={copy: 2 * MB})

    calls = [
        call("mm", [0, 1], 2, flops=1),
        widened(2, 3),
        call("linalg_vector_norm", [2], 4),
        call("mul", [3, 4], 5),
        call("_scaled_mm", [5, 1], 6, flops=1),
    ]
    assert moved(fused(calls)) == [
        ("mm", {0, 1}, {2}),
        ("linalg_vector_norm", {2}, {4}),
        ("mul", {2, 4}, {5}),
        ("_scaled_mm", {5, 1}, {6}),
    ]
    assert fused(calls)[2].reads == {2: MB, 4: MB}
    # For a product it is written; what else reads the tensor reads the narrow one.
    for_product = [*calls[:2], call("mm", [3, 1], 7, flops=1), call("add", [3, 7], 8)]
    for_product.append(call("mm", [8], 9, flops=1))
    assert moved(fused(for_product))[1:4] == [
        ("_to_copy", {2}, {3}),
        ("mm", {3, 1}, {7}),
        ("add", {2, 7}, {8}),
    ]
    # A narrower one is smaller to read than what it is of, and a gradient is written.
    narrower = replace(call("_to_copy", [2], 3), reads={2: 2 * MB})
    last = replace(widened(5, 9), backward=True)
    assert moved(fused([calls[0], narrower, *calls[2:], last]))[1] == ("_to_copy", {2}, {3})
    assert moved(fused([*calls, last]))[-1] == ("_to_copy", {5}, {9})


@pytest.mark.parametrize("name", ["index_put_", "sort", "convolution", "linalg_vector_norm"])
def test_some_fuse_with_nothing(name):
    calls = [call("mul", [0], 1), call(name, [1], 2), call("add", [2], 3), call("mm", [3], 4)]
    calls[-1] = call("mm", [3], 4, flops=1)
    assert moved(fused(calls)) == moved(calls)


def test_a_product_takes_the_longer_of_its_operations_and_its_bytes():
    bytes_alone = 3 * MB / RTX_4090.bandwidth / COPY_SHARE
    small = call("mm", [0, 1], 2, flops=1000)
    assert kernel_seconds(small, RTX_4090) == pytest.approx(bytes_alone)
    work = 10**12
    for card, bits, sums, rate in (
        (RTX_4090, 32, False, 82.6e12),
        (RTX_4090, 16, False, 165.2e12),
        (RTX_4090, 16, True, 330.4e12),
        (RTX_4090, 8, False, 330.4e12),
        (H200, 16, True, 989e12),
        (H200, 8, False, 1978e12),
        (A100, 8, False, 312e12),  # it has no such products
    ):
        product = call("mm", [0, 1], 2, flops=work, bits=bits)
        seconds = kernel_seconds(product, card, float16_sums=sums)
        assert seconds == pytest.approx(work / rate / card.sustained), (card.name, bits, sums)
    for name, ours in (("convolution", False), ("spatial_attention", True)):
        other = call(name, [0, 1], 2, flops=work, ours=ours)
        plain = kernel_seconds(other, RTX_4090)
        assert kernel_seconds(other, RTX_4090, float16_sums=True) == plain


def test_an_op_takes_its_kernels_time_by_the_card_that_is_counted():
    op = call("dpc_knn", [0], 1, ours=True)
    for card in cards_for("rtx-4090,rtx-3090,h200-sxm,a100-sxm-80-gb"):
        factor = OVER_MEMORY["dpc_knn"][COUNTED.index(card.kernels)]
        assert kernel_seconds(op, card) == pytest.approx(2 * MB * factor / card.bandwidth)
    copy = 2 * MB / H200.bandwidth / COPY_SHARE
    assert kernel_seconds(call("dpc_knn", [0], 1), H200) == pytest.approx(copy)  # another's op
    assert kernel_seconds(call("knn", [0], 1, ours=True), H200) == pytest.approx(copy)


def test_parts_add_up_with_a_launch_for_each_operator():
    calls = [call("mul", [0], 1), call("add", [1], 2, part="b"), call("neg", [2], 3)]
    one = kernel_seconds(calls[0], H200) + LAUNCH
    assert seconds_by(lambda c: c.part, calls, H200) == {
        "a": pytest.approx(2 * one),
        "b": pytest.approx(one),
    }


def test_the_factors_of_kernels_are_those_of_the_record():
    """At the reference shape; the warp of crops is not in the model."""
    factors_of: dict[str, dict[str, float]] = {}
    for record in results.load(results.TARGETS, "profiles"):
        if record["op"] == "warp_clips" or record["shape"].get("M", 192) != 192:
            continue
        name = record["op"] + "_backward" * (record["direction"] == "backward")
        factor = record["estimate_us"] / record["floor_us"]
        factors_of.setdefault(name, {})[record["card"]] = factor
    factors_of["merge_clusters_backward"] = factors_of["merge_clusters"]  # recorded as one
    assert set(factors_of) == set(OVER_MEMORY)
    for name, factors in OVER_MEMORY.items():
        recorded = tuple(factors_of[name][card] for card in COUNTED)
        assert factors == pytest.approx(recorded, rel=5e-3), name
