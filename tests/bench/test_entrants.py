"""What was asked for is what ran, or it fails with a message; only what passed its tests counts."""

from __future__ import annotations

import pytest
import torch

from bench.harness import op_tests, peers
from bench.harness.targets import bench_of
from bench.harness.workload import Peer

OP = "temporal_attention"


def names_of(entrant: str, wanted: str | None = None) -> tuple[Peer, list[str]]:
    bench = bench_of(OP)
    result = bench.peers
    case = next(bench.workloads(small=True))
    made = bench.arguments(case, "cpu")
    function = result[entrant].build(False)
    return result[wanted or entrant], peers.kernel_names(lambda: function(**made), "cpu")


def test_a_forced_backend_of_sdpa_is_seen() -> None:
    """One that is not what was asked for is a failure."""
    for entrant in ("sdpa_flash", "sdpa_math"):
        peers.check_ran(*names_of(entrant), "cpu")
    peer, names = names_of("sdpa_math", wanted="sdpa_flash")
    with pytest.raises(peers.NotWhatRan, match=r"no kernel matches .*flash.*; what ran: aten::"):
        peers.check_ran(peer, names, "cpu")


def test_a_backend_that_cannot_run_says_so() -> None:
    with pytest.raises(RuntimeError, match="No viable backend"):
        names_of("sdpa_cudnn")


@pytest.mark.parametrize(
    ("entrant", "kernel"),
    [
        ("sdpa_flash", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>"),
        ("sdpa_flash", "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>"),
        ("sdpa_efficient", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(...)"),
        ("sdpa_efficient", "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(...)"),
        ("sdpa_cudnn", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        ("sdpa_math", "void (anonymous namespace)::softmax_warp_forward<...>"),
        ("flex", "triton_tem_fused_flex_attention_0"),
        ("compile", "triton_per_fused__softmax_0"),
    ],
)
def test_kernel_names_on_a_card(entrant: str, kernel: str) -> None:
    """Each peer's pattern takes its own kernels and none of SDPA's other backends."""
    result = bench_of(OP).peers
    peers.check_ran(result[entrant], ["elementwise_kernel", kernel], "cuda")
    for other in ("sdpa_flash", "sdpa_efficient", "sdpa_cudnn"):
        if entrant.startswith("sdpa") and other != entrant:
            with pytest.raises(peers.NotWhatRan):
                peers.check_ran(result[other], [kernel], "cuda")


def test_a_compiled_peer_is_seen_to_be_compiled() -> None:
    function = peers.compile_for(lambda x: (x * 2 + 1).sin().sum(), full=False)
    x = torch.randn(64, 64)
    function(x)
    peer = peers.compiled(lambda x: x)
    peers.check_ran(peer, peers.kernel_names(lambda: function(x), "cpu"), "cpu")
    with pytest.raises(peers.NotWhatRan):
        peers.check_ran(peer, peers.kernel_names(lambda: x.sin(), "cpu"), "cpu")


def report(*cases: tuple[str, str]) -> str:
    body = ""
    for name, kind in cases:
        inside = f"<{kind} message='m'/>" if kind else ""
        body += f"<testcase classname='tests.ops.test_contract' name='{name}'>{inside}</testcase>"
    return f"<testsuites><testsuite>{body}</testsuite></testsuites>"


ALL = (
    ("test_bitwise_repeat[dpc_knn-reference]", ""),
    ("test_bitwise_repeat[dpc_knn-cuda]", ""),
    ("test_empty_batch[dpc_knn-cuda]", ""),
    ("test_gradcheck[dpc_knn]", ""),
    ("test_bitwise_repeat[merge_clusters-cuda]", "failure"),
)


def verdict(backend: str, *changed: tuple[str, str], op: str = "dpc_knn") -> dict[str, object]:
    cases = dict(ALL) | dict(changed)
    tests = op_tests.read_report(report(*cases.items()))
    return op_tests.verdict(tests, op, backend, "python -m pytest")


def test_its_own_tests_and_those_of_no_backend_count() -> None:
    result = verdict("cuda")
    assert result == {"status": "passed", "tests": 3, "failed": 0, "command": "python -m pytest"}
    assert verdict("reference")["tests"] == 2


@pytest.mark.parametrize("kind", ["failure", "error"])
def test_one_failure_closes_it(kind: str) -> None:
    result = verdict("cuda", ("test_empty_batch[dpc_knn-cuda]", kind))
    assert (result["status"], result["failed"]) == ("failed", 1)
    assert verdict("reference", ("test_empty_batch[dpc_knn-cuda]", kind))["status"] == "passed"
    assert verdict("cuda", ("test_gradcheck[dpc_knn]", kind))["status"] == "failed"


def test_nothing_that_passed_is_no_pass() -> None:
    assert verdict("triton")["status"] == "not run"  # has no tests of its own
    skipped = [(name, "skipped") for name, _ in ALL if "cuda" in name]
    assert verdict("cuda", *skipped)["status"] == "not run"
    assert op_tests.verdict([], "dpc_knn", "cuda", "c")["status"] == "not run"
    assert verdict("cuda", op="merge_clusters")["status"] == "failed"


def test_auto_answers_for_the_reference() -> None:
    assert verdict("auto") == verdict("reference")
    for name in ("test_bitwise_repeat[dpc_knn-auto]", "test_bitwise_repeat[dpc_knn-reference]"):
        assert verdict("auto", (name, "failure"))["status"] == "failed"


def test_it_runs_the_contract_of_the_op_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = op_tests.command

    def some(op: str) -> list[str]:
        return [*whole(op)[:-1], f"{op} and (bitwise or empty)"]

    monkeypatch.setattr(op_tests, "command", some)
    result = op_tests.run({"unmerge_tokens": ["reference", "cuda"]})["unmerge_tokens"]
    assert result["reference"]["status"] == "passed"
    assert result["reference"]["tests"] == 2
    assert "tests/ops/test_contract.py" in result["reference"]["command"]
    result = op_tests.run({"unmerge_tokens": ["reference"]}, timeout=0.01)
    assert result["unmerge_tokens"]["reference"]["status"] == "not run"
