"""What was asked for is what ran, or it fails with a message; only what passed its tests counts."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.harness import op_tests, peers
from bench.harness.targets import bench_of

BENCH = bench_of("temporal_attention")


def names_of(entrant):
    """The operators that a peer runs on a CPU."""
    arguments = BENCH.arguments(next(BENCH.workloads(small=True)), "cpu")
    function = BENCH.peers[entrant].build(False)
    return peers.kernel_names(lambda: function(**arguments), "cpu")


def test_a_forced_backend_of_sdpa_is_seen():
    """One that is not what was asked for is a failure, as is one that cannot run."""
    for entrant in ("sdpa_flash", "sdpa_math"):
        peers.check_ran(BENCH.peers[entrant], names_of(entrant), "cpu")
    with pytest.raises(peers.NotWhatRan, match=r"no kernel matches .*flash.*; what ran: aten::"):
        peers.check_ran(BENCH.peers["sdpa_flash"], names_of("sdpa_math"), "cpu")
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
def test_kernel_names_on_a_card(entrant, kernel):
    """Each peer's pattern takes its own kernels and none of SDPA's other backends."""
    peers.check_ran(BENCH.peers[entrant], ["elementwise_kernel", kernel], "cuda")
    for other in {"sdpa_flash", "sdpa_efficient", "sdpa_cudnn"} - {entrant}:
        if entrant.startswith("sdpa"):
            with pytest.raises(peers.NotWhatRan):
                peers.check_ran(BENCH.peers[other], [kernel], "cuda")


def test_a_compiled_peer_is_seen_to_be_compiled():
    function = peers.compile_for(lambda x: (x * 2 + 1).sin().sum(), full=False)
    x = torch.randn(64, 64)
    function(x)
    peer = peers.compiled(lambda x: x)
    peers.check_ran(peer, peers.kernel_names(lambda: function(x), "cpu"), "cpu")
    with pytest.raises(peers.NotWhatRan):
        peers.check_ran(peer, peers.kernel_names(lambda: x.sin(), "cpu"), "cpu")


TESTS = {
    "test_bitwise_repeat[dpc_knn-reference]": "passed",
    "test_bitwise_repeat[dpc_knn-cuda]": "passed",
    "test_empty_batch[dpc_knn-cuda]": "passed",
    "test_gradcheck[dpc_knn]": "passed",
    "test_bitwise_repeat[merge_clusters-cuda]": "failed",
}
SKIPPED = {name: "skipped" for name in TESTS if "cuda" in name}


@pytest.mark.parametrize(
    ("backend", "changed", "status", "passed"),
    [
        ("cuda", {}, "passed", 3),  # its own tests and those of no backend count
        ("reference", {}, "passed", 2),
        ("auto", {}, "passed", 2),  # answers for the reference
        ("cuda", {"test_empty_batch[dpc_knn-cuda]": "failed"}, "failed", 2),
        ("reference", {"test_empty_batch[dpc_knn-cuda]": "failed"}, "passed", 2),
        ("cuda", {"test_gradcheck[dpc_knn]": "failed"}, "failed", 2),
        ("auto", {"test_bitwise_repeat[dpc_knn-auto]": "failed"}, "failed", 2),
        ("auto", {"test_bitwise_repeat[dpc_knn-reference]": "failed"}, "failed", 1),
        ("triton", {}, "not run", 1),  # has no tests of its own
        ("cuda", SKIPPED, "not run", 1),
        ("cuda", dict.fromkeys(TESTS, "skipped"), "not run", 0),
    ],
)
def test_what_passed_and_only_that_counts(backend, changed, status, passed):
    tests = [op_tests.Outcome(name, outcome, "") for name, outcome in (TESTS | changed).items()]
    verdict = op_tests.verdict(tests, "dpc_knn", backend, "python -m pytest")
    counts = {"tests": passed, "failed": int(status == "failed"), "command": "python -m pytest"}
    assert verdict == {"status": status} | counts


def test_tests_do_not_run_for_ever(monkeypatch):
    """The rehearsal of ``make gpu`` runs those of an op to their end."""
    endless = [sys.executable, "-c", "import time; time.sleep(600)"]
    monkeypatch.setattr(op_tests, "command", lambda op: endless)
    assert op_tests.run({"knn": ["cuda"]}, timeout=0.1)["knn"]["cuda"]["status"] == "not run"
