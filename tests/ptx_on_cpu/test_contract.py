"""The op contract through compiled kernels, in bfloat16 and float16, and faults in them.

These are the contract's own tests (tests/ops/test_contract.py), with PTX for sm_89 in place of
Triton's interpreter and of the sources that g++ compiled; spatial attention's for sm_90 too, whose
products are wgmma. ``make fuzz`` has every size in both dtypes, and other cards
(tests/fuzz/test_compiled.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from cmpose import native, ops
from tests.csrc import compile_check
from tests.csrc import test_spatial_attention as attention_forward
from tests.csrc import test_spatial_attention_backward as attention
from tests.kernels import gate
from tests.ops import test_contract as contract
from tests.ops.support import assertions
from tests.ops.support.cases import CASES, OPTIONS
from tests.ptx_on_cpu import cuda_kernels, launches, machine, parse, triton_kernels
from tests.ptx_on_cpu.launches import Fault

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
]

MANY_KEYS = {"T": 1, "S": 260, "H": 1, "d": 16}
"""More keys than a program holds: dQ has a kernel of its own, and loops go round."""

SIZES = {
    "spatial_attention": (CASES["spatial_attention"].other_sizes[1], MANY_KEYS),
    "temporal_attention": CASES["temporal_attention"].other_sizes[2:],
    "corrupt_tokens": CASES["corrupt_tokens"].other_sizes[1:2],
    "reconstruction_loss": CASES["reconstruction_loss"].other_sizes[1:2],
    "heatmap_loss": CASES["heatmap_loss"].other_sizes[1:2],
    "warp_clips": CASES["warp_clips"].other_sizes[1:],
}
"""Sizes beside each case's first, of the Triton ops in bfloat16."""

WITH_OPTIONS = {f"{case.name}_options": case for case in OPTIONS}
OPS = tuple(SIZES)
CUDA_OPS = ("select_tokens", "merge_clusters", "unmerge_tokens", "dpc_knn")
CUDA_ATTENTION = ("spatial_attention_backward",)
HALVES = (torch.bfloat16, torch.float16)

every_op = pytest.mark.parametrize("name", [*OPS, *CUDA_OPS])


def backend_of(name: str) -> str:
    return "triton" if name in OPS else "cuda"


@pytest.fixture(autouse=True)
def compiled_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Those of nvcc only where they are asked for: the others need no nvcc."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("name") not in (
        *CUDA_OPS,
        *CUDA_ATTENTION,
        "spatial_attention_forward",
    ):
        with triton_kernels.running():
            yield
        return
    if not native.on_cpu():
        pytest.skip("needs the sources compiled for the CPU")
    compile_check.require_nvcc()
    with cuda_kernels.running():
        yield


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_op
def test_value_and_gradients(name: str, dtype: torch.dtype) -> None:
    """At the contract's first size, in bfloat16 at others too, so that every kernel runs."""
    if name == "dpc_knn":
        pytest.skip("test_clusters has its values")
    backend, case = backend_of(name), CASES[name]
    if backend == "triton":
        case = replace(case, other_sizes=SIZES[name] if dtype == torch.bfloat16 else ())
    before = launches.launched.total()
    contract.test_value_and_gradients_are_as_close_as_eager(case, backend, dtype)
    assert launches.launched.total() > before


@pytest.mark.parametrize(
    ("name", "sizes", "arch"),
    [
        ("temporal_attention_options", {"T": 4, "S": 5, "H": 3, "d": 48}, 89),
        ("temporal_attention_options", {"T": 18, "S": 1, "H": 1, "d": 112}, 89),
        ("spatial_attention_options", {"T": 2, "S": 55, "H": 2, "d": 80}, 89),
        ("spatial_attention_options", MANY_KEYS, 89),
        ("spatial_attention_options", MANY_KEYS, 90),
    ],
    ids=str,
)
def test_options(name: str, sizes: dict[str, int], arch: int) -> None:
    """The attentions' kernels of separate q, k and v and of other lengths, temporal attention's
    causal, spatial attention's with a gradient of the log-sum-exp; whichever warp is first, the
    bits are the same."""
    case = replace(WITH_OPTIONS[name], kernel_sizes=sizes, other_sizes=())
    with triton_kernels.running(arch):
        contract.test_value_and_gradients_are_as_close_as_eager(case, "triton", torch.bfloat16)
        made = contract.arguments(case, dtype=torch.bfloat16)
        expected = contract.everything(case, "triton", made)
    with triton_kernels.running(arch, backwards=True), assertions.poisoned_memory():
        assertions.assert_same_bits(contract.everything(case, "triton", made), expected)


@pytest.mark.parametrize("name", ["dpc_knn"])
@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(13, torch.float16), (132, torch.bfloat16), (200, torch.float16), (520, torch.bfloat16)],
    ids=str,
)
def test_clusters(name: str, tokens: int, dtype: torch.dtype) -> None:
    """Those of the reference; above 192 tokens each pair's product is formed twice, above 512
    there is no matrix of distances."""
    generator = torch.Generator().manual_seed(tokens)
    given = torch.randn(1, tokens, 24, generator=generator).to(dtype)
    found = ops.dpc_knn(given, 5, 8, backend="cuda")
    truth = ops.dpc_knn(given.float(), 5, 8, backend="reference")
    torch.testing.assert_close(found.log_density, truth.log_density, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.delta, truth.delta, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.centers, truth.centers)
    assert torch.equal(found.assignment, truth.assignment)


@pytest.mark.parametrize("name", CUDA_ATTENTION)
@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (80, torch.float16)], ids=str)
def test_attention(name: str, d: int, dtype: torch.dtype) -> None:
    """With all its options; whichever warp is first, and with q, k, v and the gradient each of its
    own strides, the bits are the same."""
    arguments = attention.arguments_of((1, 1, 39, 4, d), dtype, options=True)
    assert isinstance(arguments[5], torch.Tensor)
    assert arguments[5] < 39  # there is padding
    (found,) = attention.check(arguments)
    with cuda_kernels.running(backwards=True), assertions.poisoned_memory():
        separate = attention.run("cuda", attention.apart(arguments))
    assertions.assert_same_bits(separate, [x.contiguous() for x in found.unbind(3)])


@pytest.mark.parametrize("name", ["spatial_attention_forward"])
@pytest.mark.parametrize(
    ("d", "S", "dtype"), [(64, 39, torch.bfloat16), (80, 131, torch.float16)], ids=str
)
def test_attention_forward(name: str, d: int, S: int, dtype: torch.dtype) -> None:
    """One round and two, with all options; whichever warp is first, the bits are the same."""
    qkv = attention_forward.projection(1, 1, S, 3, d, dtype=dtype)
    options = {"lengths": torch.tensor([[S - 5]]), "scale": -0.2}
    found = attention_forward.check(qkv, **options)
    with cuda_kernels.running(backwards=True), assertions.poisoned_memory():
        again = ops.spatial_attention(qkv, return_lse=True, backend="cuda", **options)
    assertions.assert_same_bits(list(again), list(found))


@every_op
def test_bitwise_repeat(name: str) -> None:
    """Whichever warp of a block is first, and with poisoned memory."""
    case, backend = CASES[name], backend_of(name)

    def everything() -> list[torch.Tensor]:
        return contract.everything(case, backend, contract.arguments(case, dtype=torch.bfloat16))

    expected = everything()
    kernels = triton_kernels if backend == "triton" else cuda_kernels
    with kernels.running(backwards=True), assertions.poisoned_memory():
        assertions.assert_same_bits(everything(), expected)


@every_op
def test_odd_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: torch.bfloat16)
    contract.test_strided_inputs(CASES[name], backend_of(name))


def test_every_kernel_ran(request: pytest.FixtureRequest) -> None:
    """Triton's that the compile check compiles, and all of csrc/, if not with every template
    argument; in this process."""
    from tests.kernels.test_compile_check import LIMITS

    names = [item.name.partition("[")[0] for item in request.session.items]
    asked = names.count("test_value_and_gradients") + names.count("test_clusters")
    asked += names.count("test_attention") + names.count("test_attention_forward")
    if asked < 2 * len((*OPS, *CUDA_OPS, *CUDA_ATTENTION)) + 6 or request.session.testsfailed:
        pytest.skip("not all kernels were asked for")
    # Other files' tests may have launched more in this process.
    assert {line.split()[0] for line in LIMITS} <= set(launches.launched)
    if families := cuda_kernels.families(launches.launched):  # not without nvcc
        assert cuda_kernels.families() <= families


# -- planted faults -------------------------------------------------------------------------------


def caught(
    what: str, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch, family: str = ""
) -> list[bool]:
    """Of each place that matches in the kernels that run, whether it is missed when it is left out.

    Args:
        family: in the name of those that are looked at.
    """
    found = []
    programs: dict[str, parse.Kernel] = {}
    monkeypatch.setattr(launches, "programs", programs)
    run()
    for ptx, kernel in [one for one in programs.items() if family in one[1].name]:
        for match in re.finditer(what, ptx):
            programs[ptx] = parse.Kernel(ptx[: match.start()] + ptx[match.end() :])
            try:
                run()
                found.append(False)
            except RuntimeError as error:  # by way of the CUDA C++ launcher its text is left
                assert isinstance(error, Fault) or "Fault: " in str(error)  # noqa: PT017
                found.append(True)
        programs[ptx] = kernel
    return found


BARRIERS_AND_WAITS = r"(bar|barrier)\.sync[^;]*;|cp\.async\.wait_group[^;]*;"


@pytest.mark.parametrize(
    ("what", "arch", "sizes", "share"),
    [
        (r"bar\.sync[^;]*;", 89, {"T": 1, "S": 67, "H": 1, "d": 80}, 0.9),
        (r"cp\.async\.wait_group[^;]*;", 89, MANY_KEYS, 0.5),
        (r"wgmma\.wait_group[^;]*;", 90, MANY_KEYS, 0.85),
        (r"fence\.proxy\.async[^;]*;", 90, MANY_KEYS, 0.5),
    ],
    ids=["barriers", "waits", "waits for wgmma", "fences"],
)
def test_what_is_left_out_is_missed(
    what: str, arch: int, sizes: dict[str, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each barrier, each wait and each fence is taken out of spatial attention.

    Not missed are the waits and barriers behind a loop: nothing is under way there any more. In
    another Triton's code these may be half of them. Of two fences, the writer's and the reader's,
    one will do.
    """
    share = share if gate.has_their_triton() else 0.5
    case = CASES["spatial_attention"]
    made = contract.arguments(case, 1, torch.bfloat16, sizes)
    with triton_kernels.running(arch):
        found = caught(what, lambda: contract.everything(case, "triton", made), monkeypatch)
    assert sum(found) >= share * len(found) > 0, found


@pytest.mark.parametrize("name", ["dpc_knn"])
@pytest.mark.parametrize(
    ("family", "tokens"),
    [
        ("gram_clip", 49),
        ("density_rows", 49),
        ("cluster_clip", 49),
        ("distance_pass", 193),
        ("neighbor_tiles", 513),
    ],
)
def test_what_is_left_out_of_dpc_knn_is_missed(
    name: str, family: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each barrier and the wait for asynchronous copies."""
    given = torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(0)).bfloat16() + 4
    weights = torch.ones(1, tokens)

    def run() -> object:
        return ops.dpc_knn_merge(given, weights, 5, 8, backend="cuda")

    found = caught(BARRIERS_AND_WAITS, run, monkeypatch, family)
    assert sum(found) >= 0.7 * len(found) > 0, found


@pytest.mark.parametrize("name", CUDA_ATTENTION)
def test_what_is_left_out_of_attention_is_missed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each barrier, and each wait for asynchronous copies but where all is there already."""
    arguments = attention.arguments_of((1, 1, 113, 1, 64))
    found = caught(BARRIERS_AND_WAITS, lambda: attention.run("cuda", arguments), monkeypatch)
    assert sum(found) >= 0.7 * len(found) > 0, found
