"""train.products: what it switches on, what is refused, and that runs with it are runs like any."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmpose.config import TrainConfig
from cmpose.distributed import World
from cmpose.models.cmpose import CMPose
from cmpose.models.layers import Linear
from cmpose.train import products
from cmpose.train.dry_run import report
from cmpose.train.prediction import predict_step
from cmpose.train.products import check_products, sums_of_products, use_products
from cmpose.train.train import Interrupted, train
from tests.models.builders import small_config
from tests.recipes import interrupt_after, recipe
from tests.train.test_speed import captures, trained  # noqa: F401
from tests.train.test_train import weights

FP8 = {"train.products": "fp8_emulated"}


def test_the_first_and_the_last_layers_stay_as_they_are() -> None:
    model = CMPose(small_config())
    use_products(model, "plain")
    assert not any(part.fp8 != "off" for part in model.modules() if isinstance(part, Linear))
    use_products(model, "fp8")
    in_fp8 = {name for name, part in model.named_modules() if getattr(part, "fp8", "off") == "card"}
    blocks = ("backbone.blocks.0", "coarse.criss_cross.first.spatial.0")
    for block in (*blocks, "coarse.criss_cross.first.temporal.0"):
        names = {f"{block}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        assert names <= in_fp8
        in_fp8 -= names
    assert in_fp8 == {"coarse.criss_cross.fuse_first", "coarse.criss_cross.fuse_second"}


def test_a_run_in_fp8_is_resumed_and_captured_bit_for_bit(
    rendered,
    tmp_path,
    captures,  # noqa: F811
    monkeypatch,
):
    """By torch's own fp8 product, which this CPU has too; scales are found anew at each step."""
    monkeypatch.setattr(products, "check_products", lambda *_: None)
    monkeypatch.setattr("cmpose.train.train.check_products", lambda *_: None)
    fields = {"train.products": "fp8", "train.precision": "bf16", "model.drop_path": 0.2}
    fields |= {"train.epochs": 1, "train.accumulate": 2}
    expected, logs = trained(rendered, tmp_path / "straight", **fields)
    plain, others = trained(rendered, tmp_path / "plain", **fields | {"train.products": "plain"})
    assert not all(torch.equal(plain[key], value) for key, value in expected.items())
    for line, other in zip(logs, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.02)
    graph, _ = trained(rendered, tmp_path / "graph", **fields, **{"train.speed": "graph"})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(Interrupted):
            trained(rendered, tmp_path / "run", **fields)
    train(recipe(rendered, **fields), tmp_path / "run", resume=True, progress=False)
    resumed = weights(tmp_path / "run")
    for key, value in expected.items():
        assert torch.equal(graph[key], value)
        assert torch.equal(resumed[key], value)


def test_products_stay_when_a_run_is_resumed(rendered, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(Interrupted):
            trained(rendered, tmp_path / "run", **FP8)
    with pytest.raises(ValueError, match=r"train\.products was 'fp8_emulated', is 'plain'"):
        train(recipe(rendered), tmp_path / "run", resume=True, progress=False)


def test_a_dry_run_names_them(tmp_path):
    """And counts them as products: as many operations as the plain ones."""
    config = recipe(tmp_path, **{"train.products": "fp8", "train.precision": "bf16"})
    plain = recipe(tmp_path, **{"train.precision": "bf16"})
    assert ", T = 3, bf16, products fp8, 4 clips a step" in report(config)
    assert predict_step(config).flops == pytest.approx(predict_step(plain).flops, rel=0.02)


def on_card(monkeypatch, name: str, capability: tuple[int, int]) -> World:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    return World(0, 1, torch.device("cuda"))


@pytest.mark.parametrize(
    ("name", "capability", "fits"),
    [
        ("NVIDIA A100-SXM4-80GB", (8, 0), False),
        ("NVIDIA GeForce RTX 3090", (8, 6), False),
        ("NVIDIA GeForce RTX 4090", (8, 9), True),
        ("NVIDIA H200", (9, 0), True),
        ("NVIDIA GeForce RTX 5090", (12, 0), True),
    ],
)
def test_fp8_is_refused_where_no_such_products_are(monkeypatch, name, capability, fits):
    world = on_card(monkeypatch, name, capability)
    recipe = TrainConfig(products="fp8")
    if fits:
        check_products(recipe, world)
        with pytest.raises(ValueError, match=r"train\.precision is 'fp32': use train\.precision"):
            check_products(TrainConfig(products="fp8", precision="fp32"), world)
        return
    has = r"\.".join(map(str, capability))
    with pytest.raises(ValueError, match=rf"8\.9 or higher .*{name} has {has}: use .*plain"):
        check_products(recipe, world)
    check_products(TrainConfig(products="fp8_emulated"), world)


@pytest.mark.parametrize(
    ("name", "capability", "fits"),
    [
        ("NVIDIA GeForce RTX 3090", (8, 6), True),
        ("NVIDIA GeForce RTX 4090", (8, 9), True),
        ("NVIDIA GeForce RTX 5090", (12, 0), True),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9), False),
        ("NVIDIA RTX A6000", (8, 6), False),
        ("NVIDIA H200", (9, 0), False),
    ],
)
def test_sums_in_float16_are_refused_where_they_gain_nothing(monkeypatch, name, capability, fits):
    world = on_card(monkeypatch, name, capability)
    settings = TrainConfig(products="fp16_accumulate", precision="fp16")
    if fits:
        check_products(settings, world)
    else:
        with pytest.raises(ValueError, match=f"{name} .* gains nothing from it"):
            check_products(settings, world)
    for kind in ("fp16_accumulate", "fp16_accumulate_emulated"):
        with pytest.raises(ValueError, match=rf"'{kind}' .* is 'bf16': use train\.precision=fp16"):
            check_products(TrainConfig(products=kind), world)
    emulated = TrainConfig(products="fp16_accumulate_emulated", precision="fp16")
    check_products(emulated, world)
    with pytest.raises(ValueError, match=r"train\.speed='compile' compiles: use .*speed=eager"):
        check_products(replace(emulated, speed="compile"), world)


def test_what_a_cpu_does_not_have_is_refused_before_anything_runs(rendered, tmp_path):
    for kind, more in (("fp8", {}), ("fp16_accumulate", {"train.precision": "fp16"})):
        with pytest.raises(ValueError, match=rf"^train\.products='{kind}'.*device is cpu: use"):
            train(recipe(rendered, **more, **{"train.products": kind}), tmp_path / "run")
    fields = FP8 | {"model.mlp_ratio": 1.3}
    with pytest.raises(ValueError, match=r"model\.mlp_ratio=1\.3 makes MLPs of 249 channels"):
        train(recipe(rendered, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sums_in_float16_are_switched_on_for_the_run_alone():
    setting = torch.backends.cuda.matmul
    assert not setting.allow_fp16_accumulation
    settings = []

    def fails() -> None:
        with sums_of_products("fp16_accumulate"):
            settings.append(setting.allow_fp16_accumulation)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert settings == [True]
    assert not setting.allow_fp16_accumulation
    with sums_of_products("plain"):
        assert not setting.allow_fp16_accumulation
