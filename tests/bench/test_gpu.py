"""``make gpu`` rehearsed on a card that is not there; and the parts of it by themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import items as of_stage
from bench.gpu import stages
from bench.gpu.stages import Item, State, run_stage
from bench.harness import records
from bench.report import __main__ as report
from cmpose import ops, provenance
from cmpose.ops.backends import OPS
from cmpose.provenance import PROJECT
from tests.bench import stand_in_card


def test_every_stage_passes_on_a_card_that_is_not_there(zygote, tmp_path):
    """Of 24 GB, see ``stand_in_card.py``. The first run is cut; the third finds nothing to do."""
    work, copied = tmp_path / "work", tmp_path / "copied"
    cut = zygote.call(stand_in_card.rehearse, work, "--stages", "tests", "--stage-seconds", "0.5")
    assert cut.status == 3, cut.output
    runs = records.load(work / "results.json")["runs"]
    assert {name: run["status"] for name, run in runs.items()} == {"build": "cut", "tests": "cut"}
    ended = zygote.call(stand_in_card.rehearse, work, "--copy-to", str(copied))
    assert ended.status == 0, ended.output
    assert {p.name for p in copied.iterdir()} == {"results.json", "state.json", "summary.txt"}
    result = records.load(work / "results.json")
    assert result["card"] == stand_in_card.CARD
    passed = {name: run["status"] == "passed" for name, run in result["runs"].items()}
    assert passed == dict.fromkeys(gpu.STAGES, True)
    assert result["runs"]["tests"]["counts"]["passed"] > 3
    assert result["runs"]["sanitize"]["counts"] == {"items": 2, "done": 2, "passed": 2}
    assert len(result["records"]) == 4
    for record in result["records"]:
        assert (record["op"], record["backend"]) == ("select_tokens", "cuda")
        assert (record["timer"], record["op_tests"]["status"]) == ("graph", "passed")
        assert record["speedup_vs_best_peer"] > 0
    base, huge = sorted(result["train_step"], key=lambda step: step["backbone"])
    assert base["variants"]["eager reference"]["parts_ms"]["backbone"] > 0
    assert huge["variants"]["ours compiled in a CUDA graph, fp8"]["mfu"] > 0
    # The summary comes last, and the page takes the results.
    page = (work / "summary.txt").read_text()
    assert ended.output.endswith(page)
    for name in gpu.STAGES:
        assert f"\n{name:9} passed" in page
    assert f"| {stand_in_card.CARD}, µs |" in report.render(report.PAGE, [result])
    again = zygote.call(stand_in_card.rehearse, work)
    assert (again.status, again.output.count("done before")) == (0, len(gpu.STAGES))
    assert records.load(work / "results.json") == result


def test_make_hands_its_options_on():
    command = ["make", "-n", "gpu", "PYTHON=python4", "STAGES=tests", "GPU_ARGS=--full"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "python4 -m bench.gpu --stages tests --full" in done.stdout


def stage(tmp_path, *items, seconds=100.0, workers=2):
    """What becomes of a stage, and of its items as a later process reads it."""
    status = run_stage("s", items, State(tmp_path, "mark"), seconds, workers)
    return status, State(tmp_path, "mark").outcomes("s")


def python(name, code, **options):
    return Item(name, (sys.executable, "-c", code), **options)


def test_failures_are_kept_with_what_was_printed(tmp_path):
    bad = python("bad", "print('the reason'); raise SystemExit(4)")
    denied = "print('ERR_NVGPUCTRPERM - The user does not have permission'); raise SystemExit(1)"
    status, result = stage(tmp_path, python("good", ""), bad, python("counted", denied))
    ends = {"good": "passed", "bad": "failed", "counted": "not run"}
    assert (status, {name: o["status"] for name, o in result.items()}) == ("failed", ends)
    assert result["bad"]["details"] == ["$ " + " ".join(bad.command), "the reason"]
    assert "NVreg_RestrictProfilingToAdminUsers=0" in result["counted"]["details"][0]


def test_a_process_over_its_time_is_ended_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    code = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); "
    code += f"open({str(pid)!r}, 'w').write(str(p.pid)); p.wait()"
    status, result = stage(tmp_path, python("slow", code), seconds=1.5)
    assert (status, result["slow"]["status"]) == ("cut", "cut")
    child = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process that it had started still runs")


def test_a_cut_stage_goes_on_with_what_is_missing(tmp_path):
    log = tmp_path / "log"
    items = [python(n, f"open({str(log)!r}, 'a').write('{n}')") for n in "ab"]
    code = f"import os; raise SystemExit(0 if os.path.exists({str(log)!r} + 'c') else 3)"
    waiting = python("c", code)
    assert stage(tmp_path / "open", replace(waiting, open_ended=True))[0] == "passed"
    assert stage(tmp_path, *items, waiting, workers=1)[0] == "cut"
    (tmp_path / "logc").touch()
    status, result = stage(tmp_path, *items, waiting, workers=1)
    assert (status, log.read_text()) == ("passed", "ab")
    assert set(result) == {"a", "b", "c"}


def test_a_crash_of_what_keeps_a_journal_is_followed(tmp_path):
    mark = str(tmp_path / "mark")
    code = f"import os; os.path.exists({mark!r}) or (open({mark!r}, 'w').close(), os.abort())"
    status, result = stage(tmp_path, python("x", code, goes_on=True))
    assert (status, result["x"]["status"]) == ("passed", "passed")
    assert stage(tmp_path / "other", python("x", "import os; os.abort()"))[0] == "failed"


def test_other_sources_begin_anew(tmp_path):
    State(tmp_path, "old").note("tests", "a", {"status": "passed"})
    (tmp_path / "journal-bench.json").write_text("{}")
    assert State(tmp_path, "new").outcomes("tests") == {}
    assert not (tmp_path / "journal-bench.json").exists()
    assert stages.fingerprint() == stages.fingerprint()


def test_a_file_that_needs_an_absent_package_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "DECLARED", ("surely_absent",))
    command = (*of_stage.PYTEST, "-c", "/dev/null", "--rootdir", str(tmp_path))
    quick = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    items = []
    for name, code in (
        ("declared", "import surely_absent\ndef test_a(): pass\n"),
        ("unknown", "import another_absent\ndef test_a(): pass\n"),
        (
            "partly",
            "import pytest\n@pytest.mark.skip\ndef test_a(): pass\n"
            "def test_b(): pass\ndef test_c(): import surely_absent\n",
        ),
        ("broken", "def test_a(): assert 0\ndef test_b(): import surely_absent\n"),
        ("counted", "def test_a(): assert 0, 'CUPTI_ERROR_INSUFFICIENT_PRIVILEGES'\n"),
        ("opencv_5", f"def test_a(): raise AttributeError({stages.NO_HOG!r})\n"),
        ("empty", ""),
    ):
        (tmp_path / f"test_{name}.py").write_text(code)
        items.append(Item(name, (*command, str(tmp_path / f"test_{name}.py")), quick))
    status, result = stage(tmp_path, *items)
    assert status == "failed"
    ends = {"declared": "not run", "unknown": "failed", "partly": "passed", "broken": "failed",
            "counted": "not run", "opencv_5": "not run", "empty": "passed"}  # fmt: skip
    assert {name: o["status"] for name, o in result.items()} == ends
    assert "not run: needs surely_absent" in result["declared"]["details"][0]
    assert result["empty"]["details"] == ["no test was selected"]
    assert result["partly"]["counts"] == {"passed": 1, "failed": 0, "skipped": 1, "not run": 1}


def test_every_test_file_is_run_once():
    items = of_stage.tests(Namespace())
    files = {str(p.relative_to(PROJECT)) for p in (PROJECT / "tests").rglob("test_*.py")}
    named = {part for item in items for part in item.command if part.startswith("tests/")}
    assert named | set(of_stage.LEFT_OUT) == files
    assert len({i.name for i in items}) == len(items)
    assert set(OPS) <= {item.command[-1] for item in items}


def test_cuda_ops_are_sanitized(tmp_path, monkeypatch):
    with_kernel = ["dpc_knn"]
    reason = {True: None, False: "no kernel"}
    monkeypatch.setattr(ops, "available", lambda op, device: {"cuda": reason[op in with_kernel]})
    monkeypatch.setattr(of_stage.shutil, "which", lambda name: f"/bin/{name}")
    memcheck, *others = of_stage.sanitize(Namespace())
    assert any("dpc_knn-cuda and (" in part for part in memcheck.command)
    names = [item.name for item in others]
    assert names == ["racecheck dpc_knn", "memcheck tests/csrc", "racecheck tests/csrc"]
    monkeypatch.setattr(of_stage.shutil, "which", lambda name: None)
    for lacking in ("compute-sanitizer is not on PATH", "cmpose._C has no kernel here"):
        status, result = stage(tmp_path / lacking[-4:], *of_stage.sanitize(Namespace()))
        assert (status, result["compute-sanitizer"]["status"]) == ("not run", "not run")
        assert result["compute-sanitizer"]["details"] == [f"not run: {lacking}"]
        with_kernel.clear()


def test_a_card_of_24_gb_gets_as_many_processes_as_it_holds(monkeypatch):
    """Targets are measured before the grid."""
    monkeypatch.setattr(provenance, "device", lambda: "cuda")
    monkeypatch.setattr(of_stage, "find_ncu", lambda: None)
    for gigabytes, tests, sanitize in ((24, 12, 4), (1, 1, 1), (141, 32, 4)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda g=gigabytes: (g * 10**9, 0))
        workers = [of_stage.workers(stage, 32) for stage in ("tests", "sanitize", "train")]
        assert workers == [tests, sanitize, 1]
        files = {"work": Path(), "results": Path("card.json")}
        options = Namespace(**files, full=gigabytes == 24, workers=32)
        targets, counters, grid = of_stage.bench(options)
        assert counters.command[-1] == "counters-card.json"
        assert counters.lacking == "ncu is not on PATH"
        assert (targets.open_ended, grid.open_ended, "grid" in grid.command) == (False, True, True)
        assert ("--full" in targets.command) == options.full
        assert targets.command[targets.command.index("--workers") + 1] == str(tests)


def test_a_stage_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "tests", "test"])
    assert "--stages: invalid choice: 'test' (choose from " in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 1
    assert "torch sees no GPU; cmpose doctor says" in capsys.readouterr().out
