"""The command, its records and its tables, with counts made by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import SchemaError
from bench.harness.targets import TARGETS, workload_of
from bench.profile import __main__ as command
from bench.profile import counts, model, peers, results, sass
from bench.profile import tables as profiles
from bench.profile.published import ROWS
from bench.report.__main__ import gpu_cards
from bench.report.tables import NOT_YET
from csrc import build
from tests.bench.profile.test_model import a_copy
from tests.bench.samples import content, record
from tests.ptx_on_cpu import launches, machine, parse


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is counted is a copy of 100 MB."""
    monkeypatch.setattr(command, "counts_of_op", lambda op, arch, *_, **__: [a_copy(100, arch)])
    monkeypatch.setattr(command, "counts_of_call", lambda call, arch: [a_copy(100, arch)])


def test_an_op_on_two_cards(
    by_hand: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "profile.json"
    assert command.main(["temporal_attention", "--shape", "N=207", "K=0", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "temporal_attention forward B=32 T=3 N=207 K=0 H=12 d=64 bfloat16 on RTX 4090" in text
    assert "| 363.4 | 363.4 floor | 403.7 ± 121.1 | 385 |" in text
    assert "on H200 SXM (sm_90)" in text
    assert "measured" not in text
    first, second = results.load(file, "profiles")
    assert (first["card"], second["card"]) == ("RTX 4090", "H200 SXM")
    assert first["target_us"] == 385
    assert first["bound_us"] == first["floor_us"]  # the copy by hand moves less than the op must
    assert first["launches"][0]["us"]["DRAM"] == pytest.approx(2e8 / 1008e3)
    assert first["provenance"]["commit"]
    other = file.read_text().replace('"bound_by": "floor"', '"bound_by": ""')
    file.write_text(other)
    with pytest.raises(SchemaError, match=r"profile\.json: profiles\[0\]\.bound_by"):
        results.load(file, "profiles")


def test_an_op_by_the_backend_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """CUDA C++ refuses float32; Triton's kernels are counted where that is said."""
    arguments = ["spatial_attention", "--dtype", "float32", "--shape", "B=1", "N=17", "K=0"]
    assert command.main([*arguments, "--arch", "89"]) == 2
    assert "qkv is float32; the CUDA kernels take bfloat16" in capsys.readouterr().err
    asked: list[Any] = []

    def counted(*given: Any, **_: Any) -> list[counts.Counts]:
        asked.append(given)
        return [a_copy(100, given[1])]

    monkeypatch.setattr(command, "counts_of_op", counted)
    assert command.main([*arguments, "--backend", "triton"]) == 0
    assert [given[-3:] for given in asked] == 2 * [("triton", "float32", [])]


def test_an_op_with_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {(): 100, ("lengths", "lse"): 110}

    def counted(op: str, arch: int, *given: Any) -> list[counts.Counts]:
        return [a_copy(sizes[tuple(given[-1])], arch)]

    monkeypatch.setattr(command, "counts_of_op", counted)
    arguments = ["spatial_attention", "--arch", "89"]
    assert command.main(arguments) == 0
    assert "| sectors read | 3,125,000 |" in capsys.readouterr().out
    assert command.main([*arguments, "--options", "lengths", "lse"]) == 0
    printed = capsys.readouterr().out
    assert "With lengths, lse:" in printed
    assert "| sectors read | 3,437,500 |" in printed


def test_peers_stand_beside_ours(
    by_hand: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    peer = {"kernels": [("k", 400.0)], "calls": [], "bound_us": 300.0, "estimate_us": 400.0}
    monkeypatch.setattr(peers, "compiled", lambda w, names, card: [(peer, []), ("error: no", [])])
    file = tmp_path / "peers.json"
    arguments = ["dpc_knn", "--peers", "--arch", "89", "--json", str(file)]
    for _ in range(2):  # the second run's record stands in place of the first's
        assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    [held] = results.load(file, "peers")
    ratio = f"{400 / held['estimate_us']:.2f}×"
    assert f"| RTX 4090 | {held['estimate_us']:,.1f} | compile 400.0 | {ratio} |" in printed
    assert "Not profiled: compile_tcformer: no." in printed
    assert f"Not profiled: eager, tcformer: {peers.LIBRARY[7:]}." in printed
    assert command.main(["dpc_knn", "--targets", *arguments[1:]]) == 0
    assert len(results.load(file, "peers")) == 3
    file.write_text(file.read_text().replace('"RTX 4090"', '""'))
    with pytest.raises(SchemaError, match=r"peers\.json: peers\[0\]\.card: expected "):
        results.load(file, "peers")


def test_every_hot_spot_is_in_the_table(by_hand: None, tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    assert command.main(["--targets", "--json", str(file)]) == 0
    # A second run's records stand in place of the first's.
    assert command.main(["knn", "--targets", "--json", str(file)]) == 0
    assert command.main(["heatmap_loss", "--targets", "--json", str(file)]) == 0
    held = results.load(file, "profiles")
    assert len(held) == 2 * len(TARGETS)
    table = profiles.hot_spots(held, [])
    assert table.count(NOT_YET) == 2 * len(TARGETS)
    for target in TARGETS:
        assert f"| {target.label} | RTX 4090 |" in table
        assert f"| {target.label} | H200 SXM |" in table
    # Those that a backend has kernels of, on one card.
    only = tmp_path / "triton.json"
    some = ["--targets", "--backend", "triton", "--arch", "90", "--json", str(only)]
    assert command.main(some) == 0
    ops = {(one["op"], one["card"]) for one in results.load(only, "profiles")}
    assert {op for op, _ in ops} >= {"spatial_attention", "heatmap_loss"}
    assert {card for _, card in ops} == {"H200 SXM"}
    assert "dpc_knn" not in {op for op, _ in ops}
    # Another backend's stand beside them.
    assert command.main(["spatial_attention", *some[:1], *some[3:]]) == 0
    both = [one for one in results.load(only, "profiles") if one["op"] == "spatial_attention"]
    assert [one["backend"] for one in both] == 2 * ["triton"] + 2 * ["cuda"]
    assert "| DPC-kNN, M = 1024 | H200 SXM | 400 |" in table
    assert set(profiles.BEFORE) <= {target.label for target in TARGETS}
    assert "Counted with torch" in table
    # What a card has measured of the same kernels stands beside the estimate.
    faster = record(backend="cuda", us={"p20": 9.0, "p50": 10.0, "p80": 11.0})
    measured = content(record(us={"p20": 399.0, "p50": 400.0, "p80": 401.0}), faster)
    measured["card"] = "NVIDIA GeForce RTX 4090"
    rows = profiles.hot_spots(held, [measured]).splitlines()
    assert sum(row.endswith("| 385 | 400.0 | +1 % |") for row in rows) == 1  # 403.7: the floor
    assert profiles.hot_spots([], []).count("| – | – | not counted | – |") == 2 * len(TARGETS)


def test_the_model_stands_beside_published_times(
    by_hand: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "published.json"
    assert command.main(["--validate", "--json", str(file)]) == 0
    held = results.load(file, "published")
    assert len(held) == len(ROWS)
    copied = held[0]
    # 1,024 MB at the published 921 GB/s; the copy by hand moves 200 MB.
    assert copied["published_us"] == pytest.approx(1024e6 / 921e3)
    assert copied["error"] == pytest.approx(copied["estimate_us"] / copied["published_us"] - 1)
    assert profiles.published(held).count("\n| ") == len(ROWS)
    assert "| 1,111.8 |" in capsys.readouterr().out


def test_published_units_become_times() -> None:
    by_unit = {row.unit: row for row in ROWS}
    assert by_unit["cycles"].us == pytest.approx(797_247 / 2407)
    product = next(row for row in ROWS if "product" in row.kernel)
    assert product.us == pytest.approx(2 * 8192**3 / 163.5e6)


def test_the_committed_errors_are_within_the_band() -> None:
    """And are of the rows, figures and band that the code has."""
    held = results.load(results.PUBLISHED, "published")
    assert [(r["card"], r["kernel"], r["figure"]) for r in held] == [
        (row.card.name, row.kernel, row.figure) for row in ROWS
    ]
    for row in held:
        assert abs(row["error"]) <= row["band"] == model.BAND


def test_the_committed_measurements_are_within_the_band() -> None:
    """Of every hot spot that a card of that name has run, by the kernels that were counted."""
    cards = gpu_cards()
    outside = {
        f"{workload_of(row)} on {row['card']}": f"{row['estimate_us']:.1f} µs, measured {us:.1f}"
        for row in results.load(results.TARGETS, "profiles")
        if (us := profiles.measured_us(row, cards))
        and abs(row["estimate_us"] / us - 1) > row["band"]
    }
    assert not outside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give an op, --targets or --validate"),
        (["knn", "--validate"], "give an op, --targets or --validate"),
        (["knn", "--arch", "70"], "invalid choice: 70"),
        (["--validate", "--backend", "cuda"], "--backend, --peers, --options: give an op"),
        (["--validate", "--peers"], "--backend, --peers, --options: give an op or --targets"),
        (["nothing"], "op must be one of spatial_attention, "),
        (["knn", "--shape", "M=-1"], "--shape M=-1: expected M=SIZE with a whole number"),
        (["knn", "--shape", "Q=2"], "--shape Q=2: knn has the sizes B, M, D, k"),
        (["knn", "--direction", "up"], "--direction up: knn has forward"),
        (["--targets", "--options", "valid"], "--options: give an op, without --targets"),
        (["dpc_knn", "--options", "valid", "lse"], "--options lse: dpc_knn has valid"),
        (["warp_clips", "--options", "lse"], "--options lse: warp_clips has no options"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sys.exit(command.main(arguments))
    assert message in capsys.readouterr().err


def test_a_shape_that_the_op_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["temporal_attention", "--shape", "T=33", "--arch", "89"]) == 2
    error = capsys.readouterr().err
    assert "temporal_attention forward B=32 T=33" in error


def test_missing_programs_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sass, "tool", lambda name: f"/nowhere/{name}")
        assert command.main(["heatmap_loss", "--arch", "89"]) == 2
        assert "/nowhere/ptxas: no such program" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(machine, "compiler", lambda: None)
        patch.setattr(machine, "library", machine.library.__wrapped__)
        patch.setattr(machine, "handlers", machine.handlers.__wrapped__)
        patch.setattr(parse, "handlers", machine.handlers)
        patch.setattr(launches, "programs", {})
        assert command.main(["heatmap_loss", "--arch", "89"]) == 2
        assert "there is no g++ to compile the machine with" in capsys.readouterr().err

    def missing(*_: Any) -> None:
        raise build.BuildError("there is no nvcc on PATH")

    monkeypatch.setattr(counts.build, "find_nvcc", missing)
    assert command.main(["dpc_knn", "--arch", "89"]) == 2
    assert "there is no nvcc on PATH" in capsys.readouterr().err


def test_a_clip_that_would_run_for_hours_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["dpc_knn", "--shape", "M=65536", "L=1024"]) == 2
    said = capsys.readouterr().err
    assert "a clip of M=65536 runs for hours on a CPU; give at most M=16384" in said
