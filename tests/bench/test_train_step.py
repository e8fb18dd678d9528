"""The train step's variants, its parts and its operations."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.autograd import DeviceType

from bench import train_step
from bench.harness import records, timing
from bench.train_step import PARTS, Step
from cmpose.config import Config, ModelConfig, TrainConfig
from cmpose.models.vit import Attention
from tests.bench.samples import tiny

RECIPE = Config(model=tiny(), train=TrainConfig(batch_size=2, precision="fp32"))


def test_operations_are_those_of_the_references():
    """Of ViT-B; what is computed a second time does not count."""
    flops = train_step.step_flops(ModelConfig(checkpoint_activations=True), 32)
    assert flops / 1e9 == pytest.approx(538, rel=0.01)


def test_the_references_attention_is_torchs():
    steps = [Step(variant, RECIPE, "cpu") for variant in ("ours", "eager reference")]
    plain, sdpa = ({m.attend for m in s.model.modules() if isinstance(m, Attention)} for s in steps)
    assert sdpa == {train_step.sdpa_spatial, train_step.sdpa_temporal}
    assert not sdpa & plain
    before = [p.detach().clone() for p in steps[0].model.parameters()]
    for step in steps:
        step()
        step()
    assert float(steps[0].loss) == pytest.approx(float(steps[1].loss), rel=1e-4)
    ours, reference = ([*step.model.parameters()] for step in steps)
    changed = [bool((a != b).any()) for a, b in zip(before, ours, strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-3)


def test_parts_are_all_of_the_step_and_leave_its_numbers():
    plain, split = (Step("ours", RECIPE, "cpu") for _ in range(2))
    plain()
    train_step.label_parts(split)
    events = timing.profile(split, "cpu").events()
    seconds = train_step.seconds_by_part(events, "cpu")
    assert tuple(seconds) == PARTS
    assert all(part > 0 for part in seconds.values())
    whole = 1e-6 * sum(event.self_cpu_time_total for event in events)
    assert sum(seconds.values()) == pytest.approx(whole)
    assert seconds["other"] < 0.2 * whole
    assert float(split.loss) == float(plain.loss)


def test_variants_are_those_that_the_card_can_run(monkeypatch):
    for capability, fp8 in (((8, 9), 1), ((8, 6), 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        names = train_step.variants_on("cuda")
        assert (len(names), sum("fp8" in name for name in names)) == (6 + fp8, fp8)
    assert train_step.variants_on("cpu") == list(train_step.VARIANTS[:4])


def event(name, start, end, parent=None, **changes):
    """As the profiler tells of one; its kernels take a tenth of its time."""
    fields = {"name": name, "time_range": SimpleNamespace(start=start, end=end), "sequence_nr": -1,
            "cpu_parent": parent, "device_type": DeviceType.CPU, "self_cpu_time_total": 1e6,
            "self_device_time_total": 1e5}  # fmt: skip
    return SimpleNamespace(**fields | changes)


@pytest.mark.parametrize(("device", "second", "label"), [("cpu", 1.0, 1.0), ("cuda", 0.1, 0.0)])
def test_a_part_has_its_operators_and_their_backward(device, second, label):
    outer = event("other criss-cross", 0, 10)
    inner = event("criss-cross attention", 2, 6, outer)
    before = event("aten::view", 1, 2, outer, sequence_nr=7)  # has the number of the next node
    mm = event("aten::mm", 3, 4, inner, sequence_nr=7)
    add = event("aten::add", 7, 8, outer, sequence_nr=8)
    back_add = event("autograd::engine::evaluate_function: AddBackward0", 20, 22, sequence_nr=8)
    back_mm = event("autograd::engine::evaluate_function: MmBackward0", 23, 29, sequence_nr=7)
    inside = event("aten::mm", 24, 25, back_mm)
    leaf = event("autograd::engine::evaluate_function: AccumulateGrad", 30, 31, sequence_nr=2**63)
    kernel = event("gemm", 3, 4, device_type=DeviceType.CUDA)
    events = [kernel, inside, leaf, back_mm, back_add, add, mm, before, inner, outer]
    seconds = train_step.seconds_by_part(events, device)
    assert seconds["criss-cross attention"] == pytest.approx(3 * second + label)
    assert seconds["other criss-cross"] == pytest.approx(3 * second + label)
    assert seconds["other"] == pytest.approx(second)
    assert seconds["backbone"] == 0.0


def test_a_failing_reference_is_a_finding_and_ours_a_fault(tmp_path, monkeypatch):
    """What dies is on record too: an interrupt says as little as a killed process gets to."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    illegal = RuntimeError("an illegal memory access")
    raised = Mock(side_effect=[illegal, illegal, full, KeyboardInterrupt()])
    monkeypatch.setattr(train_step, "measure", raised)
    path = tmp_path / "r.json"
    command = ["--backbone", "tiny", "--json", str(path), "--variant"]
    assert train_step.main([*command, "eager reference"]) == 0
    assert train_step.main([*command, "ours"]) == 1
    assert train_step.main([*command, "ours in a CUDA graph"]) == 0  # not its fault
    with pytest.raises(KeyboardInterrupt):
        train_step.main([*command, "ours compiled"])
    [result] = records.load(path)["train_step"]
    assert result["variants"] == {
        "eager reference": "error: RuntimeError: an illegal memory access",
        "ours": "error: RuntimeError: an illegal memory access",
        "ours in a CUDA graph": "does not fit: CUDA out of memory",
        "ours compiled": "error: the process died while it ran",
    }
