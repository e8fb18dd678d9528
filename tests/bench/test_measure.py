"""One case: errors, failing peers, the record; what is done when a card is lost."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from bench import __main__ as program
from bench.harness import measure, records, timing
from bench.harness.measure import Run, Setting
from bench.harness.records import Journal
from bench.harness.shapes import BACKWARD, BOTH, FORWARD, FP32
from bench.harness.targets import TARGETS, bench_of
from bench.harness.timing import Rates
from bench.harness.workload import Peer, Workload
from cmpose.ops.backends import OPS
from tests.bench.samples import ORIGIN, PASSED, RATES

LEAST = Setting(turns=2, seconds=0.0)
CPU = ORIGIN | {"gpu": None}


class Steady(timing.Clock):
    """Every call takes a tenth of a millisecond, and so does a look at the clock."""

    def __init__(self, *timers):
        self.ticks = itertools.count(1)
        self.timers = itertools.chain(timers, itertools.repeat("graph"))

    def prepare(self, setup) -> timing.Pass:
        return super().prepare(setup)._replace(run=lambda: None, timer=next(self.timers))

    def seconds(self, ready):
        return 1e-4 * ready.calls

    def now(self):
        return 1e-4 * next(self.ticks)


def bench_with(**peers):
    bench = bench_of("reconstruction_loss")
    return replace(bench, peers={"eager": bench.peers["eager"], **peers})


def tried(bench, direction=FORWARD, **options):
    values = {"clock": Steady(), "origin": dict(CPU), "setting": LEAST} | options
    case = Workload(bench.op, direction, bench.small, FP32)
    return measure.measure(case, bench, ["auto"], Run(Rates(**RATES), **values))


def measured(bench, direction=FORWARD, **options):
    [record], faults = tried(bench, direction, **options)
    assert faults == {}
    return record


def test_a_record_is_whole_and_says_where_it_is_from():
    bench = bench_with()
    result = measured(bench, BOTH)
    assert result["us"] == {"p20": 100.0, "p50": 100.0, "p80": 100.0}
    assert result["peers"] == {"eager": 100.0}
    assert result["best_peer"] == "eager"
    assert result["error_vs_fp64"] < 1e-6
    assert result["peers_error_vs_fp64"]["eager"] < 1e-6
    assert result["bytes"] == bench.bytes(bench.small, 4, BOTH)
    assert result["bound_us"] == pytest.approx(result["bytes"] / 4e6, abs=1e-4)
    assert result["peak_bytes"] > 0
    assert result["wall_us"] == pytest.approx(100.0)
    assert any("cmpose::" in name for name in result["kernels"]["ours"])
    assert result["note"] == records.NOT_A_RESULT
    assert result["speedup_vs_best_peer"] is None


def test_a_speed_up_needs_passed_tests_and_a_card():
    failed = PASSED | {"status": "failed", "failed": 1}
    for op_tests, gpu, speedup in (
        ({"auto": PASSED}, "Card", 1.0),
        ({"auto": PASSED}, None, None),
        ({"auto": failed}, "Card", None),
        ({"cuda": PASSED}, "Card", None),  # another backend's
    ):
        options = {"op_tests": {"reconstruction_loss": op_tests}, "origin": ORIGIN | {"gpu": gpu}}
        assert measured(bench_with(), **options)["speedup_vs_best_peer"] == speedup


def broken(*_, **arguments):
    raise RuntimeError("an illegal\n memory access was encountered")


ILLEGAL = "error: RuntimeError: an illegal memory access was encountered"


def broken_unless_exact(backend, **arguments):
    own = bench_of("reconstruction_loss").call
    return broken() if backend == "auto" else own(**arguments, backend=backend)


def test_a_peer_that_fails_or_computes_something_else_is_recorded_with_a_message():
    own = bench_of("reconstruction_loss").peers["eager"].build
    bench = bench_with(
        broken=Peer(lambda full: broken),
        liar=Peer(own, ran={"cpu": "flash"}),
        other=Peer(lambda full: lambda **arguments: 1.2 * own(full)(**arguments)),
        nothing=Peer(lambda full: lambda **arguments: float("nan") * own(full)(**arguments)),
        slow=Peer(own, compiled=True),
    )
    result = measured(bench, setting=LEAST._replace(compiled=False))
    for name, start in {
        "eager": "100.0",
        "broken": ILLEGAL,
        "liar": "error: NotWhatRan: no kernel matches 'flash'",
        "other": "error: WrongResult: its result is off by 0.2 of the exact",
        "nothing": "error: WrongResult: its result is off by nan",
        "slow": "error: left out: compiling takes long on a CPU",
    }.items():
        assert str(result["peers"][name]).startswith(start)
    assert set(result["peers_timer"]) == {"eager"}
    # Ours is no peer: that it fails is an error.
    assert tried(replace(bench, call=broken_unless_exact)) == ([], {"auto": ILLEGAL})


def test_the_order_of_turns_rotates():
    orders = ["".join(measure.in_turn(list("abc"), turn)) for turn in range(4)]
    assert orders == ["abc", "cba", "bca", "acb"]


def test_a_peer_that_fails_in_the_race_is_out_of_it():
    """Ours and the peer are timed; then the peer, which cannot be captured any more, and ours."""
    peers = measured(bench_with(), clock=Steady("graph", "graph", "events"))["peers"]
    assert peers == {"eager": "error: RuntimeError: was timed by graph, then by events"}


def test_a_card_that_is_lost_is_told_at_once(monkeypatch):
    """On a card a failure is followed by a synchronisation; if that fails too, it is lost."""
    on_card = SimpleNamespace(device="cuda", run=Mock(), workload="a workload")
    first, second = (measure.Entrant(name, Mock()) for name in ("first", "second"))
    monkeypatch.setattr(torch.cuda, "synchronize", Mock(side_effect=[None, RuntimeError]))
    monkeypatch.setattr(torch.cuda, "empty_cache", Mock())
    measure._Measurement.attempt(on_card, broken, first)
    assert first.failure == ILLEGAL
    with pytest.raises(measure.Lost) as caught:
        measure._Measurement.attempt(on_card, broken, second)
    assert caught.value.args == ("second", ILLEGAL)


def test_backward_is_timed_on_a_graph_that_is_kept():
    bench = bench_of("unmerge_tokens")
    arguments = bench.arguments(Workload("unmerge_tokens", FORWARD, bench.small, FP32), "cpu")
    function = Mock(side_effect=partial(bench.call, backend="auto"))
    backward = measure.call_of(function, arguments, bench, BACKWARD)
    forwards = function.call_count
    first, second = backward(), backward()
    assert function.call_count == forwards
    assert [g.shape for g in first] == [arguments[n].shape for n in bench.gradients]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    measure.call_of(function, arguments, bench, BOTH)()
    assert function.call_count == forwards + 2


def test_targets_come_first_and_every_op_early():
    cases, targets, grid = (
        program.wanted_workloads(list(OPS), small=False, only=only)
        for only in ("all", "targets", "grid")
    )
    assert [*targets, *grid] == cases
    assert cases[: len(TARGETS)] == [t.workload for t in TARGETS]
    assert {c.op for c in cases[: len(TARGETS) + 8]} == set(OPS)
    assert len(set(map(str, cases))) == len(cases)


def test_the_command_writes_records_and_goes_on(tmp_path, capsys):
    results, journal = tmp_path / "r.json", tmp_path / "journal.json"
    command = ["unmerge_tokens", "--json", str(results), "--journal", str(journal)]
    assert program.main([*command, "--no-peers", "--seconds", "1e-9"]) == 3
    assert "time is up" in capsys.readouterr().out
    assert program.main(command) == 0
    assert records.NOT_A_RESULT in capsys.readouterr().out
    written = records.load(results)["records"]
    assert [r["note"] for r in written] == [records.NOT_A_RESULT] * 4
    assert program.main(command) == 0
    assert "µs" not in capsys.readouterr().out  # nothing is measured twice
    state = json.loads(journal.read_text())
    assert (state["running"], len(state["done"])) == (None, 4)


@pytest.mark.parametrize(
    ("outcome", "status", "failures"),
    [
        # make gpu starts another process where a command ends with 3.
        ({"side_effect": measure.Lost("sdpa_flash", ILLEGAL)}, 3, {"sdpa_flash": ILLEGAL}),
        # A workload that is outside of a backend's limits is no fault of it.
        ({"return_value": ([], {"cuda": "error: BackendUnavailable: 17 frames"})}, 0, {}),
        ({"return_value": ([], {"cuda": "error: RuntimeError: no"})}, 1, {}),
    ],
)
def test_what_failed_is_the_exit_status(tmp_path, monkeypatch, capsys, outcome, status, failures):
    """Whoever comes after a process that lost the card knows what not to run again."""
    monkeypatch.setattr(measure, "measure", Mock(**outcome))
    journal = tmp_path / "journal.json"
    assert program.main(["unmerge_tokens", "--journal", str(journal)]) == status
    assert "error: " in capsys.readouterr().out
    case = program.wanted_workloads(["unmerge_tokens"], small=True, only="targets")[0]
    assert Journal(journal).failures(case) == failures


def test_a_process_that_died_twice_in_a_peer_blames_it(tmp_path):
    """Once, it may have been stopped for lack of time. What is known to fail is not run again."""
    bench = bench_with(broken=Peer(lambda full: pytest.fail("it ran")))
    path, case = tmp_path / "journal.json", Workload(bench.op, FORWARD, bench.small, FP32)
    Journal(path).began(case, "broken")
    second = Journal(path)
    assert second.failures(case) == {}
    second.began(case, "broken")
    peers = measured(bench, journal=Journal(path))["peers"]
    assert peers["broken"] == "error: the process died or was stopped in it twice"
