"""One case: errors, failing peers, the record; what is done when a card is lost."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as program
from bench.harness import measure, records, timing
from bench.harness.accuracy import relative_error
from bench.harness.bound import Rates
from bench.harness.journal import Journal
from bench.harness.measure import Run, Setting
from bench.harness.shapes import BACKWARD, BF16, BOTH, FORWARD, FP32
from bench.harness.targets import TARGETS, bench_of
from bench.harness.workload import OpBench, Peer, Workload
from cmpose import provenance
from cmpose.ops.backends import OPS
from tests.bench.fake_cuda import FakeCuda
from tests.bench.samples import ORIGIN, PASSED, RATES

LEAST = Setting(turns=2, seconds=0.0)
CPU = ORIGIN | {"gpu": None}


class Steady(timing.Clock):
    """Every call takes a tenth of a millisecond, and so does a look at the clock."""

    def __init__(self) -> None:
        ticks = itertools.count(1)
        super().__init__(lambda: 1e-4 * next(ticks))

    def prepare(self, setup: Any) -> timing.Pass:
        return super().prepare(setup)._replace(run=lambda: None, timer="graph")

    def seconds(self, ready: timing.Pass) -> float:
        return 1e-4 * ready.calls


def plain_bench(**peers: Peer) -> Any:
    bench = bench_of("reconstruction_loss")
    return replace(bench, peers={"eager": bench.peers["eager"], **peers})


def case_of(bench: Any, direction: str, dtype: str = FP32) -> Workload:
    return Workload(bench.op, direction, bench.small, dtype)


def tried(
    bench: Any, case: Workload, **options: Any
) -> tuple[list[records.Record], dict[str, str]]:
    values: dict[str, Any] = {"clock": Steady(), "origin": dict(CPU), "setting": LEAST} | options
    return measure.measure(case, bench, ["auto"], Run(Rates(**RATES), **values))


def measured(bench: Any, case: Workload, **options: Any) -> list[records.Record]:
    result, faults = tried(bench, case, **options)
    assert faults == {}
    return result


def test_a_record_is_whole_and_says_where_it_is_from() -> None:
    bench = plain_bench()
    [result] = measured(bench, case_of(bench, BOTH))
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


@pytest.mark.parametrize(
    ("op_tests", "gpu", "speedup"),
    [
        ({"auto": PASSED}, "Card", 1.0),
        ({"auto": PASSED}, None, None),
        ({"auto": PASSED | {"status": "failed", "failed": 1}}, "Card", None),
        ({"cuda": PASSED}, "Card", None),  # another backend's
        ({}, "Card", None),
    ],
)
def test_a_speed_up_needs_passed_tests_and_a_card(op_tests: Any, gpu: Any, speedup: Any) -> None:
    bench = plain_bench()
    given = {"reconstruction_loss": op_tests}
    origin = ORIGIN | {"gpu": gpu}
    [result] = measured(bench, case_of(bench, FORWARD), op_tests=given, origin=origin)
    assert result["speedup_vs_best_peer"] == speedup


def broken(**arguments: Any) -> Any:
    raise RuntimeError("an illegal\n memory access was encountered")


def test_a_peer_that_fails_is_recorded_with_its_message() -> None:
    bench = plain_bench(
        broken=Peer(lambda full: broken),
        liar=Peer(bench_of("reconstruction_loss").peers["eager"].build,
                  ran={"cpu": "flash"}),
    )  # fmt: skip
    [result] = measured(bench, case_of(bench, FORWARD))
    assert (
        result["peers"]["broken"] == "error: RuntimeError: an illegal memory access was encountered"
    )
    assert result["peers"]["liar"].startswith("error: NotWhatRan: no kernel matches 'flash'")
    assert result["peers"]["eager"] == 100.0
    assert set(result["peers_timer"]) == {"eager"}


def test_a_peer_that_computes_something_else_is_a_failure() -> None:
    def other(**arguments: Any) -> Any:
        return 1.2 * bench_of("reconstruction_loss").peers["eager"].build(False)(**arguments)

    def nothing(**arguments: Any) -> Any:
        return float("nan") * other(**arguments)

    bench = plain_bench(other=Peer(lambda full: other), nothing=Peer(lambda full: nothing))
    [result] = measured(bench, case_of(bench, FORWARD))
    said = "error: WrongResult: its result is off by"
    assert result["peers"]["other"].startswith(f"{said} 0.2 of the exact one")
    assert result["peers"]["nothing"].startswith(f"{said} nan")


def test_a_peer_known_to_fail_is_not_run_again() -> None:
    bench = plain_bench(broken=Peer(lambda full: pytest.fail("it ran")))
    case = case_of(bench, FORWARD)
    journal = Journal(None)
    journal.fail(str(case), "broken", "error: the process died")
    [result] = measured(bench, case, journal=journal)
    assert result["peers"]["broken"] == "error: the process died"


def test_on_a_cpu_quick_compiles_once_an_op() -> None:
    setting = measure.quick("cpu")
    kept = [
        (case, name)
        for op in OPS
        for case in bench_of(op).workloads(small=True)
        for name, peer in bench_of(op).peers.items()
        if peer.compiled and setting.left_out(case, name, peer) is None
    ]
    assert [case.op for case, _ in kept] == list(OPS)
    assert {name for _, name in kept} == {"compile"}
    bench = plain_bench(compile=bench_of("reconstruction_loss").peers["compile"])
    result, _ = tried(bench, case_of(bench, BOTH), setting=setting)
    assert result[0]["peers"]["compile"].startswith("error: left out: on a CPU")


def test_ours_failing_is_an_error() -> None:
    bench = plain_bench()

    def call(backend: str, **arguments: Any) -> Any:
        return broken() if backend == "auto" else bench.call(**arguments, backend=backend)

    broken_bench = replace(bench, call=call)
    result, faults = tried(broken_bench, case_of(bench, FORWARD))
    assert result == []
    assert faults == {"auto": "error: RuntimeError: an illegal memory access was encountered"}


@pytest.fixture
def pretended_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases go the way of a card, with tensors on the CPU."""
    original = OpBench.arguments

    def arguments(self: Any, case: Workload, device: str, seed: int = 0) -> Any:
        return original(self, case, "cpu", seed)

    monkeypatch.setattr(OpBench, "arguments", arguments)
    monkeypatch.setattr(provenance, "device", lambda: "cuda")
    monkeypatch.setattr(timing, "l2_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(timing, "peak_bytes", lambda call, device: 1)
    monkeypatch.setattr(timing, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(measure, "kernel_names", lambda call, device: ["Memset", "some_kernel"])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_a_card_that_is_lost_is_told_at_once(
    pretended_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card a failure is followed by a synchronisation; if that fails too, it is lost."""
    bench = plain_bench(broken=Peer(lambda full: broken))
    case = case_of(bench, FORWARD)

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(measure.Lost) as caught:
        measured(bench, case)
    assert (caught.value.workload, caught.value.entrant) == (case, "broken")
    assert caught.value.message.startswith("error: RuntimeError: an illegal memory access")


@pytest.mark.parametrize("direction", [FORWARD, BOTH])
def test_on_a_card_cases_are_graphs_over_many_input_sets(
    pretended_card: None, direction: str
) -> None:
    """By CUDA's calls as far as a CPU can be asked: a peer that cannot be captured included."""
    cuda = FakeCuda(capturable=True)
    bench = plain_bench()
    own = bench.peers["eager"].build(False)

    def synchronising(**arguments: Any) -> Any:
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        cuda.work()
        return own(**arguments)

    bench = replace(
        bench, peers={"eager": Peer(lambda full: own), "slow": Peer(lambda full: synchronising)}
    )
    [result] = measured(
        bench,
        case_of(bench, direction),
        clock=timing.CudaClock(cuda),
        op_tests={"reconstruction_loss": {"auto": PASSED}},
        origin=ORIGIN,
    )
    assert result["timer"] == "graph"
    assert result["input_sets"] == timing.MOST_SETS  # small inputs
    # A replay takes 3 ms here, whatever is in it; a call behind the delay 1 ms.
    assert result["us"]["p50"] == pytest.approx(3000 / timing.MOST_SETS, rel=1e-3)
    assert result["peers_timer"] == {"eager": "graph", "slow": "events"}
    assert result["peers"]["slow"] == pytest.approx(1000.0)
    assert (result["best_peer"], result["speedup_vs_best_peer"]) == ("eager", 1.0)
    assert result["kernels"]["ours"] == ["some_kernel"]
    assert {"sleep", "replay"} <= set(cuda.log)
    assert not any(entry.endswith("on default") for entry in cuda.log)


def test_backward_is_timed_on_a_graph_that_is_kept() -> None:
    bench = bench_of("unmerge_tokens")
    made = bench.arguments(Workload("unmerge_tokens", FORWARD, bench.small, FP32), "cpu")
    calls: list[int] = []

    def function(**arguments: Any) -> Any:
        calls.append(1)
        return bench.call(**arguments, backend="auto")

    [backward] = [measure.call_of(function, made, bench, BACKWARD)]
    forwards = len(calls)
    first, second = backward(), backward()
    assert len(calls) == forwards
    assert [g.shape for g in first] == [made[n].shape for n in bench.gradients]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    [both] = [measure.call_of(function, made, bench, BOTH)]
    forwards = len(calls)
    both()
    assert len(calls) == forwards + 1


def test_relative_error_is_of_all_tensors() -> None:
    exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
    result = [torch.tensor([3.0, 0.5]), torch.tensor([4.0])]
    assert relative_error(result, exact) == pytest.approx(0.1)


def test_low_precision_shows_in_the_error() -> None:
    bench = bench_of("spatial_attention")
    [result] = measured(replace(bench, peers={}), case_of(bench, BACKWARD, BF16))
    assert 1e-4 < result["error_vs_fp64"] < 3e-2


# -- the program ----------------------------------------------------------------------------------


def test_targets_come_first_and_every_op_early() -> None:
    cases = program.wanted_workloads(list(OPS), small=False, only="all")
    assert cases[: len(TARGETS)] == [t.workload for t in TARGETS]
    assert {c.op for c in cases[: len(TARGETS) + 8]} == set(OPS)
    assert len(set(map(str, cases))) == len(cases)
    targets = program.wanted_workloads(list(OPS), small=False, only="targets")
    assert [*targets, *program.wanted_workloads(list(OPS), small=False, only="grid")] == cases
    assert {c.op for c in program.wanted_workloads(["dpc_knn"], small=False, only="all")} == {
        "dpc_knn"
    }


def test_the_command_writes_records_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results, journal = tmp_path / "r.json", tmp_path / "journal.json"
    command = ["unmerge_tokens", "--quick", "--no-compile"]
    command += ["--json", str(results), "--journal", str(journal)]
    assert program.main(command) == 0
    printed = capsys.readouterr().out
    assert records.NOT_A_RESULT in printed
    held = records.load(results)["records"]
    assert len(held) == 4
    assert all(r["note"] == records.NOT_A_RESULT for r in held)
    assert program.main(command) == 0
    assert "µs" not in capsys.readouterr().out  # nothing is measured twice
    state = json.loads(journal.read_text())
    assert state["running"] is None
    assert len(state["done"]) == 4


def test_time_that_is_up_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["unmerge_tokens", "--quick", "--no-peers", "--seconds", "1e-9"]
    assert program.main(command) == 3
    assert "time is up" in capsys.readouterr().out


def test_a_process_that_loses_the_card_is_followed_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(case: Workload, *arguments: Any, **options: Any) -> Any:
        raise measure.Lost(case, "sdpa_flash", "error: RuntimeError: illegal memory access")

    class Executed(Exception):
        pass

    def execute(path: str, arguments: list[str]) -> None:
        raise Executed(arguments)

    monkeypatch.setattr(measure, "measure", lose)
    monkeypatch.setattr(program.os, "execv", execute)
    journal = tmp_path / "journal.json"
    command = ["unmerge_tokens", "--quick", "--journal", str(journal)]
    with pytest.raises(Executed) as caught:
        program.main(command)
    assert caught.value.args[0][1:] == ["-m", "bench", *command]
    case = program.wanted_workloads(["unmerge_tokens"], small=True, only="targets")[0]
    known = Journal(journal).failures(case)
    assert known == {"sdpa_flash": "error: RuntimeError: illegal memory access"}


def test_a_lost_card_without_a_journal_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    journal, case = Journal(None), Workload("dpc_knn", FORWARD, {"B": 1}, BF16)
    journal.keep_op_tests({"dpc_knn": {"cuda": PASSED}})
    journal.fail(str(case), "compile", "error: lost")
    line = journal.command(["dpc_knn"])
    assert line[1:4] == ["-m", "bench", "dpc_knn"]
    path = Path(line[line.index("--journal") + 1])
    try:
        following = Journal(path)
        assert following.failures(case) == {"compile": "error: lost"}
        assert following.op_tests() == {"dpc_knn": {"cuda": PASSED}}  # the same process goes on
        assert following.command(["dpc_knn"]) == line[:4]
        monkeypatch.setattr(program.os, "getpid", lambda: -1)
        assert Journal(path).op_tests() == {}  # another run has its own gate
    finally:
        path.unlink()


def test_a_backend_whose_limits_a_case_exceeds_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for fault, status in (("error: BackendUnavailable: 17 frames", 0), ("error: RuntimeError", 1)):
        monkeypatch.setattr(measure, "measure", lambda *a, fault=fault, **k: ([], {"cuda": fault}))
        assert program.main(["unmerge_tokens", "--quick"]) == status
        assert fault in capsys.readouterr().out


def test_a_process_that_died_twice_in_a_peer_blames_it(tmp_path: Path) -> None:
    """Once, it may have been stopped for lack of time."""
    path, case = tmp_path / "journal.json", Workload("dpc_knn", FORWARD, {"B": 1}, BF16)
    Journal(path).began(case, "compile")
    second = Journal(path)
    assert second.failures(case) == {}
    second.began(case, "compile")
    assert Journal(path).failures(case) == {
        "compile": "error: the process died or was stopped twice while it ran"
    }


def test_one_call_for_a_profiler() -> None:
    assert program.main(["merge_clusters", "--once", "backward"]) == 0
