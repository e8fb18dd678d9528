"""The train step's variants, its parts, and operations against torch's counter."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import records, train_step
from bench.model_flops import forward_flops, step_flops
from bench.train_parts import Recorder
from bench.train_step import PARTS, Step
from cmpose.config import ModelConfig
from cmpose.models.losses import cmpose_loss
from cmpose.models.vit import Attention


def tiny(**fields: object) -> ModelConfig:
    values = {"backbone": "tiny", "depth": 1, "image_size": (64, 48), "num_keypoints": 2,
              "tokens_per_keypoint": 2, "num_clusters": 3, "neighbors": 2, "head_channels": 8,
              "backend": "reference"}  # fmt: skip
    return ModelConfig(**(values | fields))  # type: ignore[arg-type]


def product_added(_: list[int], a: list[int], b: list[int], **__: object) -> int:
    """A product that is added to a tensor in place."""
    return 2 * a[0] * a[1] * b[1]


UNCOUNTED = {torch.ops.aten.addmm_: product_added}
"""What torch's counter does not know."""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stem": "patch"},
        {"num_frames": 1, "criss_cross_depth": 2},
        {"mask_task": False, "fine": "off"},
    ],
    ids=str,
)
def test_operations_are_those_that_torch_counts(fields: dict[str, object]) -> None:
    """Forward, and forward with backward, of one clip, to the last operation."""
    config = tiny(**fields)
    step = Step(config, 1, "cpu", "fp32")
    images = step.images()
    # The selection's loss enlarges scores and has no products.
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        output = step.model(images, step.seed)
        assert counter.get_total_flops() == sum(forward_flops(config).values())
        cmpose_loss(output, step.centers, step.weight, config).total.backward()
    assert counter.get_total_flops() == step_flops(config)


def test_operations_of_the_published_sizes() -> None:
    """34, 120 and 248 GFLOP a frame of the backbone, and about 630 a clip of ViT-B."""
    per_frame = {"base": 34.0, "large": 119.6, "huge": 247.6}
    for backbone, expected in per_frame.items():
        found = forward_flops(ModelConfig(backbone=backbone))["backbone"] / 3e9  # type: ignore[arg-type]
        assert found == pytest.approx(expected, rel=0.01)
    assert step_flops(ModelConfig()) / 1e9 == pytest.approx(630, rel=0.05)


def test_the_references_attention_is_torchs() -> None:
    config = tiny()
    plain, sdpa = (Step(config, 2, "cpu", "fp32", reference=r) for r in (False, True))
    attends = {m.attend for m in sdpa.model.modules() if isinstance(m, Attention)}
    assert attends == {train_step.sdpa_spatial, train_step.sdpa_temporal}
    assert not attends & {m.attend for m in plain.model.modules() if isinstance(m, Attention)}
    for step in (plain, sdpa):
        step()
        step()
    assert float(plain.loss) == pytest.approx(float(sdpa.loss), rel=1e-4)
    for a, b in zip(plain.model.parameters(), sdpa.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_a_step_trains() -> None:
    step = Step(tiny(), 2, "cpu", "fp32")
    before = [p.detach().clone() for p in step.model.parameters()]
    step()
    changed = [bool((a != b).any()) for a, b in zip(before, step.model.parameters(), strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert int(step.seed) == 1


def test_parts_are_all_of_the_step_and_leave_its_numbers() -> None:
    plain, split = (Step(tiny(backend="auto"), 2, "cpu", "fp32") for _ in range(2))
    plain()
    begin = time.perf_counter()
    found = train_step.parts(split, Recorder(time.perf_counter, lambda a, b: b - a))
    whole = time.perf_counter() - begin
    assert tuple(found) == PARTS
    assert all(seconds > 0 for seconds in found.values())
    assert 0.7 * whole < sum(found.values()) < 1.05 * whole
    assert float(split.loss) == float(plain.loss)


def test_a_part_lasts_from_border_to_border_in_both_passes() -> None:
    ticks = iter(range(100))
    recorder = Recorder(lambda: next(ticks), lambda a, b: b - a)
    double = recorder.wrap("double", lambda x: x * 2)
    square = recorder.wrap("square", lambda x: x * x)
    x = torch.ones(3, requires_grad=True)
    square(double(x)).sum().backward()
    recorder.close()
    order = [part for part, _ in recorder.spans]
    assert order == ["double", "square", "square", "double"]
    assert [span for _, span in recorder.spans] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert recorder.seconds() == {"double": 2, "square": 2}
    assert x.grad is not None
    assert x.grad.tolist() == [8.0, 8.0, 8.0]


def test_a_part_whose_inputs_take_no_gradient_lasts_to_the_end_of_the_pass() -> None:
    ticks = iter(range(100))
    recorder = Recorder(lambda: next(ticks), lambda a, b: b - a)
    weight = torch.ones(3, requires_grad=True)
    first = recorder.wrap("first", lambda x: x * weight)
    first(torch.ones(3)).sum().backward()
    next(ticks)
    recorder.close()
    assert recorder.spans[-1] == ("first", [2, 4])


def test_a_failing_reference_is_a_finding_and_ours_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(variant: str, *arguments: object, **options: object) -> object:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(train_step, "measure", measure)
    path = tmp_path / "r.json"
    command = ["--backbone", "tiny", "--json", str(path)]
    assert train_step.main([*command, "--variant", "eager reference"]) == 0
    assert train_step.main([*command, "--variant", "ours"]) == 1
    [found] = records.load(path)["train_step"]
    text = "error: RuntimeError: an illegal memory access"
    assert found["variants"] == {"eager reference": text, "ours": text}
    assert text in capsys.readouterr().out


def test_what_dies_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object, **options: object) -> object:
        raise KeyboardInterrupt  # as little as a killed process gets to say

    monkeypatch.setattr(train_step, "measure", die)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        train_step.main(["--backbone", "tiny", "--variant", "ours", "--json", str(path)])
    [found] = records.load(path)["train_step"]
    assert found["variants"] == {"ours": "error: the process died while it ran"}


def test_unknown_variants_are_named() -> None:
    with pytest.raises(ValueError, match=r"--variant must be one of eager reference, .*'fast'"):
        train_step.prepare("fast", tiny(), 1, "cpu", "fp32")


def test_utilisation_is_of_the_datasheet() -> None:
    assert train_step.peak_rate("NVIDIA H200") == 989e12
    assert train_step.peak_rate("NVIDIA GeForce RTX 4090") == 165.2e12
    assert train_step.peak_rate("another card") is None
