"""What was asked for is what ran, or it is a failure with a message."""

from __future__ import annotations

import pytest
import torch

from bench.harness import peers
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
    for entrant in ("sdpa_flash", "sdpa_math"):
        peers.check_ran(*names_of(entrant), "cpu")


def test_another_backend_than_was_asked_for_is_a_failure() -> None:
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
