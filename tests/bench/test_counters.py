"""The card's counters: what ncu prints is read right, and stands beside what was counted."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from bench import counters
from bench.harness import records
from bench.harness.targets import TARGETS, Target
from bench.profile import tables
from bench.report.tables import NOT_YET
from cmpose import provenance
from tests.bench.samples import CARD, ORIGIN

HEAD = '"ID","Kernel Name","' + '","'.join(counters.METRICS.values()) + '"'
UNITS = '"","","us","inst","sector","Ksector","byte","Mbyte","","","%","%","register/thread"'
MARK = '"0","at::cuda::<unnamed>::spin_kernel(long)",' + ",".join(['"1"'] * 11)
OURS = "void cmpose::<unnamed>::sum_kernel<cmpose::bf16, true, 1>(const T1 *, int)"
CSV = f"""==PROF== Connected to process 1 (/usr/bin/python3)
{HEAD}
{UNITS}
{MARK}
"1","{OURS}","3","1,000","10","1.5","64","2","no data","4","40","50","72"
"2","void at::fill<4, at::FillFunctor<bool>>(int)","2","864","","","","","","","1","1","16"
"3","{OURS}","1","3,000","30","0.5","64","1","no data","4","80","50","74"
{MARK}
"4","spatial_attention_forward","2.5","7","0","0","0","0","0","0","10","20","255"
==PROF== Disconnected from process 1
"""
CALLS = [
    vars(TARGETS[9].workload) | {"backend": "cuda"},
    vars(TARGETS[0].workload) | {"backend": "triton"},
]


def test_what_ncu_prints_is_read_in_its_units_and_summed_by_kernel():
    first, second = counters.read(CSV, CALLS)
    ours, torchs = first["kernels"]
    assert (first["op"], first["backend"]) == ("merge_clusters", "cuda")
    assert ours == {
        "kernel": "sum_kernel<bf16, 1, 1>", "launches": 2, "us": 4.0, "instructions": 4000.0,
        "sectors_read": 40.0, "sectors_written": 2000.0, "dram_bytes_read": 128.0,
        "dram_bytes_written": 3e6, "shared_wavefronts": None, "shared_conflicts": 8.0,
        "issue_percent": 50.0, "warps_percent": 50.0, "registers": 74,
    }  # fmt: skip
    assert torchs["kernel"] == "at::fill<4, at::FillFunctor<bool>>"
    assert (torchs["sectors_read"], torchs["warps_percent"]) == (None, 1)
    [attention] = second["kernels"]
    assert (attention["kernel"], attention["us"]) == ("spatial_attention_forward", 2.5)
    nanoseconds = counters.read(CSV.replace('"us"', '"ns"'), CALLS)[1]["kernels"]
    assert nanoseconds[0]["us"] == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CSV.replace("spin", "other"), r"of 2 calls ncu saw 0, with \[\]"),
        (CSV + MARK + "\n", r"of 2 calls ncu saw 3, with \[3, 1, 0\]"),
        (CSV.replace('"us"', '"weeks"'), "'weeks', a unit that is not known"),
        ("==ERROR== ERR_NVGPUCTRPERM\n", "of 2 calls ncu saw 0"),
    ],
)
def test_what_is_not_understood_is_no_record(text, message):
    with pytest.raises(ValueError, match=message):
        counters.read(text, CALLS)


def test_a_call_is_read_after_two_that_are_not(tmp_path, monkeypatch):
    small = Target("tokens", "select_tokens", "forward", 1, 1, {}, {"B": 1, "N": 32, "n": 2})
    happened = []

    def noted(name):
        return lambda *_: happened.append(name)

    original = counters.bench_of("select_tokens")
    bench = SimpleNamespace(
        arguments=original.arguments,
        call=lambda **given: happened.append("call") or original.call(**given),
    )
    profiler = SimpleNamespace(start=noted("start"), stop=noted("stop"))
    monkeypatch.setattr(counters, "TARGETS", (small, small))
    monkeypatch.setattr(counters, "bench_of", lambda op: bench)
    for name, stand_in in (("profiler", profiler), ("_sleep", noted("mark")),
                           ("synchronize", lambda: None)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert counters.main(["--launch", str(tmp_path / "calls.json")]) == 0
    assert happened == 2 * ["call", "call", "start", "mark", "call", "stop"]
    one = vars(small.workload) | {"backend": "auto"}
    assert json.loads((tmp_path / "calls.json").read_text()) == [one, one]


NCU = """#!{python}
import json, sys
from pathlib import Path
given = sys.argv[1:]
if given == ["--query-metrics"]:
    print("Device X", *{metrics!r}, sep="\\n")
    sys.exit()
metrics = given[given.index("--metrics") + 1].split(",")
assert len(metrics) == 9 and "launch__registers_per_thread" in metrics, metrics
assert given[given.index("bench.counters") + 1] == "--launch"
Path(given[given.index("--log-file") + 1]).write_text({csv!r})
{launched}
"""


def test_the_command_on_a_card_that_is_not_there(tmp_path, monkeypatch, capsys):
    """Two metrics that the card does not have are not asked for."""
    assert counters.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().out
    monkeypatch.setattr(provenance, "device", lambda: "cuda")
    monkeypatch.setattr(provenance, "machine", lambda: CARD)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "find_ncu", lambda: None)
    assert counters.main([]) == 1
    assert "ncu, which comes with Nsight Compute, is not on PATH" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(provenance, "device", lambda: "cuda")
    monkeypatch.setattr(provenance, "machine", lambda: CARD)
    ncu, file = tmp_path / "ncu", tmp_path / "counters.json"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    listed = [name.split(".")[0] + "   Counter   sector" for name in counters.METRICS.values()
              if not name.startswith(("launch", "l1tex"))]  # fmt: skip
    launched = f"Path(given[-1]).write_text({json.dumps(CALLS)!r})"
    fields = {"python": sys.executable, "metrics": listed, "csv": CSV}
    ncu.write_text(NCU.format(**fields, launched=launched))
    ncu.chmod(0o755)
    assert counters.main(["--json", str(file)]) == 0
    assert "2 calls in" in capsys.readouterr().out
    result = records.load(file, records.Counters)
    assert (result["card"], len(result["workloads"])) == (CARD, 2)
    denied = "==ERROR== ERR_NVGPUCTRPERM - no permission\n"
    ncu.write_text(NCU.format(**(fields | {"csv": denied}), launched="sys.exit(1)"))
    assert counters.main(["--json", str(file)]) == 1
    assert "ERR_NVGPUCTRPERM - no permission\nbench.counters: ncu ended with status 1" in (
        capsys.readouterr().out
    )


def profile(workload, kernel, card=CARD, triton="3.7.1"):
    counts = {"kernel": kernel, "registers": 72, "instructions": {"fma": 3000.0, "alu": 960.0},
              "sectors_read": 60, "sectors_written": 2000}  # fmt: skip
    return vars(workload) | {
        "card": card,
        "launches": [{"counts": counts}],
        "provenance": ORIGIN | {"triton": triton},
    }


def test_counts_stand_beside_the_counters():
    """Of the code that ran there: of Triton's only if its version is the same."""
    assert NOT_YET in tables.counters([], [])
    read = {"card": CARD, "workloads": counters.read(CSV, CALLS), "provenance": ORIGIN}
    records.check(read, records.Counters)
    merge, attention = (TARGETS[9].workload, TARGETS[0].workload)
    triton = "spatial_attention_forward"
    held = [
        profile(merge, "sum_kernel<bf16, true, true>", card="other"),
        profile(merge, "other_kernel<bf16, true, true>"),
        profile(merge, "sum_kernel<bf16, true, true>", triton="3.6.0"),
        profile(attention, f"{triton}<bf16, 64>"),
        profile(attention, triton, triton="3.6.0"),
    ]
    shown = tables.counters(held, [read])
    figures = ("3,960 | 4,000 | 0.990", "60 | 40 | 1.500", "2,000 | 2,000 | 1.000", "72 / 74 | 50")
    assert f"L=48 | cuda | {' | '.join(figures)} |" in shown
    assert "d=64 | triton | – | 7 | – | – | 0 | – | – | 0 | – | – / 255 | 10 |" in shown
    assert f"{CARD}, torch 2.13.0, triton 3.7.1" in shown
    assert shown.count("Counted with torch 2.13.0, triton 3.6.0, commit `012345678`") == 1
    counted = tables.counters([*held, profile(attention, triton)], [read])
    assert "d=64 | triton | 3,960 | 7 | 565.714 |" in counted
