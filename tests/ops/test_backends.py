"""Which backend runs, and every reason why one does not: point 12 of the op contract."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import native, ops
from cmpose.ops import backends
from tests.ops.support.cases import CASES, DEVICE, OpCase

every_op = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
TRITON_OPS, CUDA_OPS = backends.OPS[:6], backends.OPS[6:10]


INTERPRETER_FAILS = backends._interpreter_fails


@pytest.fixture(autouse=True)
def an_interpreter_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen does not depend on this environment's Triton and numpy."""
    monkeypatch.setattr(backends, "_interpreter_fails", lambda: None)


def tensors_of(case: OpCase, **sizes: int) -> dict[str, Any]:
    values = case.make(2, torch.float32, **(sizes or case.kernel_sizes))
    return {name: value.to(DEVICE) for name, value in values.items()}


def arguments_of(case: OpCase) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As the public function takes them."""
    extra: dict[str, dict[str, Any]] = {
        "warp_clips": {"size": (8, 6)},
        "select_tokens": {"n": 2},
        "knn": {"k": 3},
        "dpc_knn": {"k": 3, "num_clusters": 4},
        "merge_clusters": {"num_clusters": 4},
    }
    values = tensors_of(case) | extra.get(case.name, {})
    if case.name == "unmerge_tokens":
        selection = ops.SelectedTokens(
            *[torch.empty(0)] * 2, values.pop("causal_index"), values.pop("noncausal_index")
        )
        values["selection"] = selection
    return (), values


def chosen(op: str, backend: str = "auto", device: str = "cpu", *arguments: Any) -> str:
    return backends.choose(op, backend, torch.device(device), *arguments)


@pytest.fixture
def qkv() -> Tensor:
    return torch.zeros(1, 3, 2, 3, 1, 64)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@every_op
def test_ops_without_a_kernel_say_so(case: OpCase) -> None:
    for backend in ("triton", "cuda"):
        if case.name in (TRITON_OPS if backend == "triton" else (*CUDA_OPS, "spatial_attention")):
            continue
        message = rf"{case.name} .*'{backend}'.*from the argument.*no {backend} kernel in this"
        with pytest.raises(ops.BackendUnavailable, match=message):
            case.call(**tensors_of(case), backend=backend)
        reason = ops.available(case.name)[backend]
        assert reason == f"it has no {backend} kernel in this version"
    assert ops.available(case.name)["reference"] is None


@every_op
def test_unknown_backend(case: OpCase) -> None:
    with pytest.raises(ValueError, match=r"backend must be one of auto, reference.*'opencl'"):
        case.call(**tensors_of(case), backend="opencl")


@pytest.mark.parametrize("name", TRITON_OPS)
def test_cpu_tensors_need_the_interpreter(name: str, no_interpreter: None) -> None:
    message = rf"{name} .*'triton'.*on the CPU.*TRITON_INTERPRET=1"
    case = CASES[name]
    values = {n: v.cpu() for n, v in tensors_of(case).items()}
    with pytest.raises(ops.BackendUnavailable, match=message):
        case.call(**values, backend="triton")


def test_other_devices(qkv: Tensor) -> None:
    with pytest.raises(ops.BackendUnavailable, match="on meta; Triton kernels need CUDA tensors"):
        ops.temporal_attention(qkv.to("meta"), backend="triton")
    with pytest.raises(ops.BackendUnavailable, match="on meta; the CPU path needs CPU tensors"):
        ops.spatial_attention(qkv.to("meta"), backend="cpu")


def test_without_triton(qkv: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    with pytest.raises(ops.BackendUnavailable, match=r"triton is not installed \(pip install"):
        ops.temporal_attention(qkv, backend="triton")


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (11, 0)])
def test_cards_that_nothing_checks(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of compute capability 10.x and 11.x have no Triton kernels; 12.0 has."""
    monkeypatch.setattr(backends, "_card_of", lambda device: ("B200", *capability))
    reason = backends._without_triton(torch.device("cuda"))
    number = ".".join(map(str, capability))
    assert reason is not None
    assert reason.startswith(f"B200 has compute capability {number}, for which the Triton kernels")
    monkeypatch.setattr(backends, "_card_of", lambda device: ("RTX 5090", 12, 0))
    assert backends._without_triton(torch.device("cuda")) is None


def test_an_old_card(monkeypatch: pytest.MonkeyPatch, qkv: Tensor) -> None:
    arguments = (qkv, None, False, None)
    monkeypatch.setattr(backends, "_card", lambda index: ("GTX 1080", 6, 1))
    message = r"GTX 1080 has compute capability 6\.1; the kernels need 8\.0 or more"
    with pytest.raises(ops.BackendUnavailable, match=message):
        chosen("temporal_attention", "triton", "cuda:0", *arguments)
    assert chosen("temporal_attention", "auto", "cuda:0", *arguments) == "reference"
    monkeypatch.setattr(backends, "_card", lambda index: ("RTX 4090", 8, 9))
    assert chosen("temporal_attention", "auto", "cuda:0", *arguments) == "triton"
    assert chosen("temporal_attention", "auto", "cpu", *arguments) == backends.preferred(
        "temporal_attention", "cpu"
    )


# -- what auto falls back on ----------------------------------------------------------------------


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card on which kernels run, and nothing said yet."""
    monkeypatch.setattr(backends, "_card", lambda index: ("RTX 4090", 8, 9))
    monkeypatch.setattr(backends, "_told", set())


def falls_back(d: int) -> None:
    qkv = torch.zeros(1, 3, 2, 3, 1, d)
    assert chosen("temporal_attention", "auto", "cuda:0", qkv, None, False, None) == "reference"


def test_auto_says_once_per_reason_that_it_falls_back(
    untold: None, qkv: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = (
        "temporal_attention runs its reference, which is slow: triton: the head dimension is 56; "
        "the kernels take multiples of 16 up to 128. Silence this with CMPOSE_FALLBACK_WARNINGS=0"
    )
    with pytest.warns(ops.FallbackWarning, match=re.escape(message)):
        falls_back(56)
    with pytest.warns(ops.FallbackWarning, match="the head dimension is 40"):
        falls_back(40)
    monkeypatch.setenv("CMPOSE_FALLBACK_WARNINGS", "0")
    with warnings.catch_warnings(action="error"):
        falls_back(56)  # was said
        falls_back(72)  # is switched off
        arguments = (qkv, None, False, None)
        assert chosen("temporal_attention", "auto", "cuda:0", *arguments) == "triton"
        assert chosen("temporal_attention", "reference", "cuda:0", *arguments) == backends.PLAIN
        ops.temporal_attention(torch.zeros(1, 3, 2, 3, 1, 56))  # on a CPU nothing falls back


def test_a_graph_that_falls_back_says_so_when_it_is_compiled(untold: None) -> None:
    torch._dynamo.reset()

    def call(x: Tensor) -> Tensor:
        return x if chosen("temporal_attention", "auto", "cuda:0", x, None, False, None) else -x

    with pytest.warns(ops.FallbackWarning, match="the head dimension is 56"):
        torch.compile(call, fullgraph=True, backend="eager")(torch.zeros(1, 3, 2, 3, 1, 56))


# -- the CUDA C++ core ----------------------------------------------------------------------------

Core = Callable[..., None]


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    """Pretends that there is a core that was built so, or none for the given reason.

    The op ``dpc_knn`` has a CUDA kernel then that takes every call, and the card 0 is an RTX 4090.
    """
    takes_all = backends._ENTRIES["dpc_knn"]._replace(limits={"cuda": lambda *_: None})
    monkeypatch.setitem(backends._ENTRIES, "dpc_knn", takes_all)
    monkeypatch.setattr(backends, "_card", lambda index: ("RTX 4090", 8, 9))

    def put(reason: str | None = None, archs: str = "8.9", ptx: str = "", on_cpu: bool = False):
        facts = {"archs": archs, "ptx": ptx, "nvcc": "13.0", "on_cpu": on_cpu}
        loaded = SimpleNamespace(build_info=lambda: facts)
        native.forget()
        monkeypatch.setattr(native, "_module_or_reason", lambda: reason or loaded)

    yield put
    monkeypatch.undo()
    native.forget()


def refusal(device: str) -> str:
    """Why dpc_knn does not run on backend cuda there; auto must not take it either."""
    assert chosen("dpc_knn", "auto", device) == "reference"
    with pytest.raises(ops.BackendUnavailable) as error:
        chosen("dpc_knn", "cuda", device)
    reason = ops.available("dpc_knn", device)["cuda"]
    assert reason is not None
    assert str(error.value) == (
        f"dpc_knn cannot run on backend 'cuda' (from the argument): {reason}; "
        "use backend='auto' or 'reference'"
    )
    return reason


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_the_core(core: Core, device: str) -> None:
    """The reason is native.py's message about a core that is not built or does not load."""
    core("cmpose._C is not built: …")
    assert refusal(device) == "cmpose._C is not built: …"
    assert ops.available("heatmap_loss", device)["cuda"] == "it has no cuda kernel in this version"


def test_the_core_on_a_card_that_it_serves(core: Core) -> None:
    core()
    assert chosen("dpc_knn", "auto", "cuda:0") == "cuda"
    assert chosen("dpc_knn", "cuda", "cuda:0") == "cuda"
    assert chosen("dpc_knn", "auto", "cpu") == "reference"
    assert backends.preferred("dpc_knn", "cuda:0") == "cuda"


def test_the_core_needs_cuda_tensors(core: Core) -> None:
    core()
    assert refusal("cpu") == "on the CPU; CUDA kernels need CUDA tensors"
    assert refusal("meta") == "on meta; CUDA kernels need CUDA tensors"


def test_the_core_on_an_old_card(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core(archs="6.1")
    monkeypatch.setattr(backends, "_card", lambda index: ("GTX 1080", 6, 1))
    assert refusal("cuda:0") == (
        "GTX 1080 has compute capability 6.1; the kernels need 8.0 or more"
    )


def test_the_core_on_a_card_that_it_was_not_built_for(core: Core) -> None:
    core(archs="9.0;12.0", ptx="12.0")
    assert refusal("cuda:0") == (
        "RTX 4090 has compute capability 8.9; cmpose._C was built for 9.0;12.0 and PTX of 12.0; "
        "build it with CMPOSE_CUDA_ARCHS=8.9"
    )


def test_the_core_on_the_cpu(core: Core) -> None:
    """The core for tests takes CPU tensors only, and only if its backend is asked for."""
    core(on_cpu=True)
    assert chosen("dpc_knn", "cuda", "cpu") == "cuda"
    assert chosen("dpc_knn", "auto", "cpu") == "reference"
    expected = "on cuda; CMPOSE_CUDA_ON_CPU is set, whose kernels need CPU tensors"
    assert refusal("cuda:0") == expected


# -- limits of the kernels ------------------------------------------------------------------------


LIMITS = [
    ("temporal_attention", {"d": 40}, r"the head dimension is 40; .* multiples of 16 up to 128"),
    ("temporal_attention", {"d": 144}, r"the head dimension is 144; .* multiples of 16 up to 128"),
    ("temporal_attention", {"T": 33, "d": 64}, r"there are 33 frames; the kernels take up to 32"),
    ("spatial_attention", {"d": 40}, r"the head dimension is 40; .* multiples of 16 up to 128"),
    ("spatial_attention", {"d": 144}, r"the head dimension is 144; .* multiples of 16 up to 128"),
]


@pytest.mark.parametrize(("name", "sizes", "reason"), LIMITS)
def test_limits_of_the_kernels(name: str, sizes: dict[str, int], reason: str) -> None:
    case = CASES[name]
    with pytest.raises(ops.BackendUnavailable, match=reason):
        case.call(**tensors_of(case, **sizes), backend="triton")
    case.call(**tensors_of(case, **sizes))  # auto falls back


@pytest.mark.skipif(
    DEVICE == "cpu" and INTERPRETER_FAILS() is not None, reason=f"{INTERPRETER_FAILS()}"
)
def test_the_kernels_give_the_log_sum_exp() -> None:
    qkv = tensors_of(CASES["spatial_attention"], d=32)["qkv"]
    out, lse = ops.spatial_attention(qkv, return_lse=True, backend="triton")
    exact = ops.spatial_attention(qkv.double(), return_lse=True, backend="reference")
    torch.testing.assert_close(out.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU computes bfloat16")
@pytest.mark.parametrize(
    ("name", "argument"),
    [(c.name, a) for c in CASES.values() if c.name in TRITON_OPS for a in c.floating or ("dtype",)],
)
def test_the_interpreter_has_no_bfloat16(name: str, argument: str) -> None:
    """It computes it wrongly, without an error."""
    values = tensors_of(CASES[name])
    values[argument] = values[argument].bfloat16() if argument in values else torch.bfloat16
    message = rf"{argument} is bfloat16, which Triton's interpreter computes wrongly"
    with pytest.raises(ops.BackendUnavailable, match=message):
        CASES[name].call(**values, backend="triton")


@pytest.mark.parametrize(
    ("name", "argument"),
    [(c.name, a) for c in CASES.values() if c.name in TRITON_OPS for a in c.gradients],
)
def test_kernels_have_no_float64(name: str, argument: str) -> None:
    case = CASES[name]
    values = tensors_of(case)
    values[argument] = values[argument].double()
    with pytest.raises(ops.BackendUnavailable, match=rf"{argument} is float64; the kernels take"):
        case.call(**values, backend="triton")


CUDA_LIMITS: list[tuple[str, Callable[[], Any], str]] = [
    (
        "select_tokens",
        lambda: {"logits": torch.zeros(1, 17, 800, device=DEVICE), "n": 1},
        r"17 keypoints by 800 tokens take 121\d{3} bytes of shared memory; the kernels have 101376",
    ),
    (
        "dpc_knn",
        lambda: {"tokens": torch.zeros(1, 20, 3, device=DEVICE), "k": 17, "num_clusters": 2},
        r"k is 17; the kernels take up to 16",
    ),
    (
        "dpc_knn",
        lambda: {"tokens": torch.zeros(0, 65_537, 1, device=DEVICE), "k": 2, "num_clusters": 2},
        r"there are 65537 tokens; the kernels take up to 65536",
    ),
]


@pytest.mark.parametrize(("name", "arguments", "reason"), CUDA_LIMITS)
def test_limits_of_the_cuda_kernels(
    name: str, arguments: Callable[[], dict[str, Any]], reason: str
) -> None:
    function = getattr(ops, name)
    with pytest.raises(ops.BackendUnavailable, match=reason):
        function(**arguments(), backend="cuda")
    assert re.search(reason, str(ops.explain(name, **arguments())))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(c.name, a) for c in CASES.values() if c.name in CUDA_OPS for a in c.floating],
)
def test_cuda_kernels_have_no_float64(name: str, argument: str) -> None:
    case = CASES[name]
    values = tensors_of(case)
    for other in ("causal", "merged") if case.name == "unmerge_tokens" else (argument,):
        values[other] = values[other].double()  # unmerge_tokens wants both alike, and names one
    named = "causal" if argument == "merged" else argument
    with pytest.raises(ops.BackendUnavailable, match=rf"{named} is float64; the kernels take"):
        case.call(**values, backend="cuda")


def test_warp_clips_has_no_float64() -> None:
    values = tensors_of(CASES["warp_clips"])
    with pytest.raises(ops.BackendUnavailable, match="dtype is float64; the kernel writes"):
        ops.warp_clips(**values, size=(4, 4), dtype=torch.float64, backend="triton")


# -- what is asked for ----------------------------------------------------------------------------


def test_the_environment_picks(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    monkeypatch.setenv("CMPOSE_BACKEND", "triton")
    with pytest.raises(ops.BackendUnavailable, match="from CMPOSE_BACKEND"):
        chosen("dpc_knn")
    monkeypatch.setenv("CMPOSE_DPC_KNN_BACKEND", "reference")
    assert chosen("dpc_knn") == backends.PLAIN
    with pytest.raises(ops.BackendUnavailable, match="from CMPOSE_BACKEND"):
        chosen("merge_clusters")
    assert chosen("merge_clusters", "reference") == backends.PLAIN
    monkeypatch.setenv("CMPOSE_DPC_KNN_BACKEND", "auto")
    with pytest.raises(ops.BackendUnavailable, match="from CMPOSE_BACKEND"):
        chosen("dpc_knn")
    monkeypatch.setenv("CMPOSE_DPC_KNN_BACKEND", "triton")
    with pytest.raises(ops.BackendUnavailable, match="from CMPOSE_DPC_KNN_BACKEND"):
        chosen("dpc_knn")
    monkeypatch.setenv("CMPOSE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"CMPOSE_BACKEND must be one of.*'fast'"):
        chosen("merge_clusters")


def test_the_context_picks(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = backends.preferred("dpc_knn", "cpu")
    assert chosen("dpc_knn") == usual
    with ops.backend("reference"):
        assert chosen("dpc_knn") == backends.PLAIN
        with ops.backend(dpc_knn="triton"):
            with pytest.raises(ops.BackendUnavailable, match=r"from ops\.backend"):
                chosen("dpc_knn")
            assert chosen("merge_clusters") == backends.PLAIN
            assert chosen("dpc_knn", "reference") == backends.PLAIN  # an argument wins
        assert chosen("dpc_knn") == backends.PLAIN
    assert chosen("dpc_knn") == usual
    monkeypatch.setenv("CMPOSE_BACKEND", "triton")
    with ops.backend("reference"):  # the context wins over the environment
        assert chosen("dpc_knn") == backends.PLAIN
    with pytest.raises(ops.BackendUnavailable, match="from CMPOSE_BACKEND"), ops.backend("auto"):
        chosen("dpc_knn")  # auto asks for nothing


def test_the_context_ends_with_an_error() -> None:
    with pytest.raises(KeyError), ops.backend("reference"):
        raise KeyError
    assert chosen("dpc_knn") == backends.preferred("dpc_knn", "cpu")


def test_a_context_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of .*'fast'"), ops.backend("fast"):
        pass
    with pytest.raises(ValueError, match=r"op must be one of .*'conv'"), ops.backend(conv="cuda"):
        pass
    with pytest.raises(ValueError, match=r"op must be one of .*'conv'"):
        ops.available("conv")


# -- why ------------------------------------------------------------------------------------------


@every_op
def test_explain(case: OpCase) -> None:
    positional, keywords = arguments_of(case)
    explanation = ops.explain(case.name, *positional, **keywords)
    assert explanation.op == case.name
    assert set(explanation.reasons) == {"reference", "cpu", "triton", "cuda"}
    assert explanation.reasons["reference"] is None
    if DEVICE == "cpu":
        assert explanation.backend == backends.preferred(case.name)
        assert explanation.reasons["cpu"] == ops.available(case.name)["cpu"]
    else:
        assert explanation.reasons["cpu"] == "on cuda; the CPU path needs CPU tensors"
    if case.name in TRITON_OPS:
        assert explanation.reasons["triton"] is None  # on a GPU, or in the interpreter
    else:
        assert explanation.reasons["triton"] == "it has no triton kernel in this version"
    if case.name in CUDA_OPS:
        assert explanation.reasons["cuda"] is None  # on a GPU, or compiled for the CPU
    elif case.name == "spatial_attention":
        assert "the CUDA kernels take bfloat16 and float16" in str(explanation.reasons["cuda"])
    else:
        assert explanation.reasons["cuda"] == "it has no cuda kernel in this version"
    with ops.backend("reference"):
        assert ops.explain(case.name, **keywords).asked == "reference, from ops.backend"


def test_explain_reads_as_text(qkv: Tensor, no_interpreter: None) -> None:
    text = str(ops.explain("spatial_attention", qkv[..., :48]))
    assert text.splitlines()[0] == "spatial_attention: cpu (auto)"
    assert text.splitlines()[1:3] == ["  reference: can run", "  cpu: can run"]
    assert text.splitlines()[3].startswith("  triton: on the CPU; ")
    refused = ops.explain("temporal_attention", qkv, backend="cuda")
    assert refused.backend == "cuda"
    assert refused.asked == "cuda, from the argument"


def test_explain_knows_the_limits(qkv: Tensor) -> None:
    explanation = ops.explain("temporal_attention", qkv[..., :40].to(DEVICE))
    reason = "the head dimension is 40; the kernels take multiples of 16 up to 128"
    assert explanation.reasons["triton"] == reason


def test_explain_of_something_else(qkv: Tensor) -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*'conv'"):
        ops.explain("conv", qkv)
    with pytest.raises(TypeError, match="qkv"):
        ops.explain("temporal_attention")
    with pytest.raises(TypeError, match=r"qkv must be a torch\.Tensor, got int"):
        ops.explain("temporal_attention", 3)


def test_choosing_imports_no_triton() -> None:
    """Only a call that runs Triton's kernels imports it."""
    code = (
        "import sys, torch\n"
        "from cmpose import ops\n"
        "qkv = torch.zeros(1, 3, 2, 3, 1, 64)\n"
        "ops.temporal_attention(qkv)\n"
        "ops.explain('temporal_attention', qkv)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_variables_of_no_op_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMPOSE_DPC_KNN_BACKEND", "reference")
    monkeypatch.setenv("CMPOSE_BACKEND", "auto")
    backends._warn_of_unknown_variables()  # both are known
    monkeypatch.setenv("CMPOSE_DPCKNN_BACKEND", "reference")
    with pytest.warns(UserWarning, match="^CMPOSE_DPCKNN_BACKEND is ignored: no such op"):
        backends._warn_of_unknown_variables()


@pytest.mark.parametrize(
    ("triton", "numpy", "fails"),
    [("3.6.0", "2.4.6", True), ("3.5.1", "2.5.0", True), ("3.6.0", "2.3.5", False)]
    + [("3.7.1", "2.4.6", False), ("3.10.0", "2.4.6", False), (None, "2.4.6", False)],
)
def test_an_interpreter_that_fails_with_this_numpy_is_a_reason(
    triton: str | None, numpy: str, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        installed = {"triton": triton, "numpy": numpy}[name]
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(backends, "_interpreter_fails", INTERPRETER_FAILS.__wrapped__)
    reason = backends._without_triton(torch.device("cpu"))
    assert (reason is not None) == fails
    if fails:
        assert reason == (
            f"the interpreter of triton {triton} fails with numpy {numpy}; "
            "pip install 'triton>=3.7' or 'numpy<2.4'"
        )
