"""The prediction before a run: operations, memory, what it advises."""

from __future__ import annotations

import functools
import gc
import re
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cmpose import ops
from cmpose.cli import main
from cmpose.config import Config, ModelConfig, TrainConfig, load
from cmpose.models.cmpose import CMPose
from cmpose.train import prediction
from cmpose.train.cards import RTX_4090, cards_for
from cmpose.train.cost import COPY_SHARE, LAUNCH
from cmpose.train.dry_run import (
    SMALL_CARD,
    candidates,
    clips_at_once,
    report,
    savings,
    to_switch_on,
)
from cmpose.train.flops import counter
from cmpose.train.prediction import predict_step
from cmpose.train.step import LossModule
from tests.models.builders import seed_tensor, small_config
from tests.shared_data import PROJECT

PLAIN = {"corruption": "bernoulli", "drop_path_selection": "bernoulli"}
"""Fields with which everything is computed, whoever reads it."""

VARIANTS = {
    "small": small_config(),
    "token head": small_config(head="token"),
    "token head, no fine": small_config(head="token", fine="off"),
    "causal only": small_config(fine="causal_only"),
    "one task, deeper": small_config(mask_task=False, criss_cross_depth=2, depth=3),
    "recomputed": small_config(depth=3, checkpoint_activations=True),
    "plain": small_config(depth=3, drop_path=0.3, **PLAIN),
    "some samples": small_config(depth=3, drop_path=0.3),
    "patches": small_config(stem="patch", num_frames=5, head_channels=24),
}


def counted(config: ModelConfig) -> float:
    """Operations of one of two clips by the ops' references, where torch counts every product."""
    with torch.device("meta"):
        losses = LossModule(CMPose(config))
        images = torch.empty(2, config.num_frames, 3, *config.image_size)
        centers, weight = torch.empty(2, config.num_keypoints, 2), torch.empty(2, 2)
        seed, joints = torch.zeros(1, dtype=torch.int64), torch.empty(())
    with ops.backend("reference"), counter() as operations:
        losses(images, seed, 0, centers, weight, joints)[0].total.backward()
    return operations.get_total_flops() / 2


@pytest.mark.parametrize("name", VARIANTS)
def test_operations_are_those_of_the_references(name):
    config = VARIANTS[name]
    predicted = predict_step(Config(model=config, train=TrainConfig(batch_size=2)))
    assert predicted.flops == pytest.approx(counted(config), rel=1e-3)


def test_operations_of_a_plain_step():
    """By the layers' formulas, with nothing left out: three times the forward pass's, less the
    gradient to the pixels."""
    D, N, S, T, R = 192, 12, 14, 3, 3
    config = small_config(stem="patch", depth=3, fine="off", head="token", **PLAIN)

    def block(rows: int, keys: int) -> int:
        return 24 * rows * D * D + 4 * rows * keys * D

    stem = 2 * T * N * 768 * D
    coarse = 2 * (block(R * T * S, S) + block(R * T * S, T)) + 4 * R * T * S * D * D
    queries = 4 * 2 * D * D + 4 * N * D * D + 4 * 2 * N * D + 16 * 2 * D * D + 2 * 2 * D * 16 * N
    forward = stem + 3 * block(T * N, N) + coarse + 2 * S * T * D * D + queries
    predicted = predict_step(Config(model=config, train=TrainConfig(batch_size=2)))
    assert predicted.flops == pytest.approx(3 * forward - stem, rel=2e-3)


def measured_activations(config: ModelConfig, batch: int, dtype: torch.dtype) -> int:
    """Bytes that torch's CPU allocator has handed out in a forward pass and not got back."""
    losses = LossModule(CMPose(config))
    images = torch.randn(batch, config.num_frames, 3, *config.image_size, dtype=dtype)
    centers, weight = torch.full((batch, 2, 2), 4.0), torch.ones(batch, 2)
    arguments = images, seed_tensor(), 0, centers, weight, torch.tensor(4.0)
    losses(*arguments)[0].total.backward()  # what is made once is not an activation
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = losses(*arguments)
        gc.collect()
    del outputs
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(
    ("fields", "precision"),
    [
        ({"depth": 4}, "fp32"),
        ({"depth": 4, "checkpoint_activations": True}, "fp32"),
        ({"depth": 2, "stem": "patch", "head": "token"}, "bf16"),
    ],
)
def test_activations_are_predicted_within_a_tenth(fields, precision):
    config, batch = small_config(**fields), 4
    recipe = Config(model=config, train=TrainConfig(batch_size=batch, precision=precision))
    predicted = sum(predict_step(recipe).activations.values())
    measured = measured_activations(config, batch, prediction.compute_dtype(precision))
    assert predicted == pytest.approx(measured, rel=0.1)


def test_the_parts_of_a_prediction():
    model = small_config(depth=4)
    whole = predict_step(Config(model=model, train=TrainConfig(batch_size=8)))
    twice = predict_step(Config(model=model, train=TrainConfig(batch_size=16)))
    halves = predict_step(Config(model=model, train=TrainConfig(batch_size=16, accumulate=2)))
    count = sum(p.numel() for p in CMPose(model).parameters())
    assert whole.parameters == count
    assert whole.gradients == 4 * count
    assert whole.optimizer == 8 * count
    assert set(whole.activations) == {"backbone", "coarse", "fine", "head", "losses"}
    for part in ("backbone", "coarse"):
        grown = twice.activations[part] / whole.activations[part]
        assert 1.5 < grown <= 2.01, part  # the weights' casts do not grow
    assert halves.activations == whole.activations
    assert whole.peak < halves.peak < twice.peak
    names = ("weights", "gradients", "optimizer", "batch", "difference")
    total = sum(getattr(whole, name) for name in names) + sum(whole.activations.values())
    assert total + int(prediction.LIBRARIES) == whole.peak


def test_live_bytes_falls_when_tensors_go():
    with prediction.LiveBytes() as live:
        a = torch.empty(100, device="meta")
        b = a + 1
        view = b[:50]
        assert live.live == 800
        del a, b
        gc.collect()
        assert live.live == 400
        del view
        gc.collect()
    assert (live.live, live.peak) == (0, 800)


@functools.cache
def predicted_for(size: str) -> prediction.StepPrediction:
    """Of the recipe of a ViT: ``base`` or ``huge``."""
    return predict_step(load(PROJECT / "configs" / f"posetrack18_vit_{size}.yaml"))


@pytest.mark.parametrize(("size", "plain"), [("base", 655.5), ("huge", 4136.9)])
def test_the_recipes_fit_a_card_of_24_gb(size, plain):
    """And take 15 % fewer operations than with ``PLAIN``, GFLOP a clip as counted with that."""
    predicted = predicted_for(size)
    assert predicted.flops < 0.85e9 * plain
    assert predicted.peak <= SMALL_CARD


def test_what_the_report_says_of_a_card_of_24_gb():
    text = report(load(PROJECT / "configs" / "posetrack18_vit_base.yaml"))
    assert f"({predicted_for('base').flops / 1e9:.0f} GFLOP a clip" in text
    assert "predicted" in text
    assert "a 24 GB card (25.8): fits" in text
    assert "RTX 4090" in text
    assert "H200" in text


def test_what_does_not_fit_is_told_what_does(capsys, tmp_path):
    path = str(PROJECT / "configs" / "posetrack18_vit_base.yaml")
    main(["train", "--config", path, "--dry-run", "--train.batch_size", "96"])
    text = capsys.readouterr().out
    remedy = "does not fit; set model.checkpoint_activations=true"
    assert remedy in text
    config = load(path, **{"train.batch_size": 96, "model.checkpoint_activations": True})
    assert predict_step(config).peak <= SMALL_CARD
    assert not list(tmp_path.iterdir())


def test_shards_divide_what_is_kept():
    """Weights, gradients and moments by the cards; activations are those of a card's clips."""
    config = load(PROJECT / "configs" / "posetrack18_vit_huge.yaml")
    alone, whole = predicted_for("huge"), predict_step(config, 2)
    config.train.distributed = "fsdp"
    shards = predict_step(config, 2)
    assert (whole.weights, whole.gradients) == (alone.weights, alone.gradients)
    assert whole.batch * 2 == alone.batch
    assert whole.activations == shards.activations
    assert sum(whole.activations.values()) < 0.6 * sum(alone.activations.values())
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(shards, name) == pytest.approx(getattr(whole, name) / 2, rel=1e-3)
    # One block of 32 is 20 M weights; the largest gradient and the rest are as large at most.
    assert 0 < shards.gathered < 0.25 * whole.weights
    saved = whole.peak - shards.peak
    assert 1.2 * whole.weights < saved < 2 * whole.weights  # of 4 × half, less what is gathered


def test_the_command_says_for_how_many_cards(capsys):
    path = str(PROJECT / "configs" / "demo.yaml")
    flags = ["--dry-run", "--processes", "2", "--train.distributed", "fsdp"]
    main(["train", "--config", path, *flags])
    text = capsys.readouterr().out
    assert "2 cards by fsdp" in text
    assert "gathered for a while" in text
    with pytest.raises(SystemExit, match=r"--processes=0: must be at least 1"):
        main(["train", "--config", path, "--dry-run", "--processes", "0"])


def test_the_parts_of_a_steps_time():
    """On a card of endless memory rate the products alone; on one of endless products the bytes."""
    model = small_config(depth=2)
    recipes = [TrainConfig(batch_size=4, accumulate=n, precision="fp32") for n in (1, 2)]
    whole, halves = (predict_step(Config(model=model, train=train)) for train in recipes)
    rate = RTX_4090.flops_32 * RTX_4090.sustained
    products = replace(RTX_4090, bandwidth=1e30)
    for predicted, passes in ((whole, 1), (halves, 2)):
        parts = predicted.parts(products, compiled=False)
        assert list(parts) == [
            *("input", "backbone", "criss-cross", "clustering", "heads", "losses", "optimiser"),
        ]
        launches = passes * len(predicted.calls) * LAUNCH
        assert sum(parts.values()) == pytest.approx(4 * predicted.flops / rate + launches, rel=1e-6)
    copies = replace(RTX_4090, flops_32=1e30)
    eager, compiled = (whole.parts(copies, compiled=fuse) for fuse in (False, True))
    assert eager["optimiser"] == compiled["optimiser"]
    assert eager["optimiser"] == pytest.approx(40 * whole.parameters / 1008e9 / COPY_SHARE)
    assert eager["input"] == pytest.approx(2 * whole.batch / 1008e9 / COPY_SHARE)
    for part in ("backbone", "criss-cross", "clustering", "heads", "losses"):
        assert 0 < compiled[part] < eager[part], part
    least = sum(call.moved for call in whole.calls) / 1008e9
    assert sum(eager.values()) - eager["optimiser"] - eager["input"] > least


def test_products_are_counted_at_the_rate_of_their_format():
    """ "At most" is of each product's own rate; 8-bit ones take half of bf16's time."""
    recipes = {
        name: Config(
            model=small_config(stem="patch", depth=3),
            train=TrainConfig(batch_size=8, products=name, precision=precision),
        )
        for name, precision in (("plain", "bf16"), ("fp8", "bf16"), ("fp16_accumulate", "fp16"))
    }
    most = {name: predict_step(recipe).seconds(RTX_4090)[0] for name, recipe in recipes.items()}
    plain = predict_step(recipes["plain"])
    assert most["plain"] == pytest.approx(8 * plain.flops / RTX_4090.flops_16)
    for name in ("fp8", "fp16_accumulate"):
        assert 0.5 < most[name] / most["plain"] < 0.75, name  # convolutions and attention stay


def known(config: Config, card, **seconds: float) -> dict:
    """Predictions by hand of every candidate: 1 s, or what ``seconds`` has under a part of it."""

    class Known:
        def __init__(self, recipe: Config, taken: float) -> None:
            self.config, self.processes, self.taken = recipe, 1, taken

        def parts(self, _, *, compiled):
            return {"all": self.taken if compiled else 2 * self.taken}

    recipes = {"": Known(config, 1.0)}
    for name, recipe in candidates(config, card, 1).items():
        taken = next((value for part, value in seconds.items() if f"={part}" in name), 1.0)
        recipes[name] = Known(recipe, taken)
    return recipes


@pytest.mark.parametrize(
    ("cards", "fields", "seconds", "expected"),
    [
        ("rtx-4090", {}, {"fp8": 0.8, "fp16_accumulate": 0.5},
         ": train.products=fp16_accumulate with train.precision=fp16 (+100%), "
         "train.products=fp8 (+25%)"),
        ("rtx-4090", {}, {"fp8": 1.25, "fp16_accumulate": 0.5},
         ": train.products=fp16_accumulate with train.precision=fp16 (+100%); "
         "no gain from train.products=fp8 (-20%)"),
        ("rtx-3090", {}, {}, ": nothing; no gain from train.products=fp16_accumulate with "
         "train.precision=fp16 (+0%)"),
        ("h200-sxm", {}, {"fp8": 0.995}, ": nothing; no gain from train.products=fp8 (+1%)"),
        ("a100-sxm-80-gb", {}, {}, "A100 SXM 80 GB, by this estimate: nothing"),
        ("h100-pcie", {"products": "fp8"}, {"plain": 0.8}, ": train.products=plain (+25%)"),
        ("h200-nvl", {"speed": "eager"}, {"fp8": 2.0},
         ": train.speed=graph (+100%); no gain from train.products=fp8 (-50%)"),
    ],
)  # fmt: skip
def test_what_to_switch_on_is_what_the_estimate_has_faster(cards, fields, seconds, expected):
    (card,) = cards_for(cards)
    config = Config(train=TrainConfig(batch_size=2, **fields))
    others = known(config, card, **seconds)
    assert to_switch_on(others.pop(""), card, others).endswith(expected)


def test_what_a_card_lacks_is_refused_in_words():
    config = Config(train=TrainConfig(products="fp8"))
    (card,) = cards_for("rtx-3090")
    refused = "RTX 3090 gains nothing from train.products=fp8, which training refuses"
    assert to_switch_on(known(config, card)[""], card) == refused


def test_what_is_off_is_tried():
    config = Config(model=ModelConfig(**PLAIN), train=TrainConfig(precision="fp32", speed="eager"))
    names = ["model.corruption=exact", "model.drop_path_selection=exact", "train.precision=bf16"]
    tried = candidates(config, cards_for("a100-sxm-80-gb")[0], 1)
    assert list(tried) == [*names, "train.speed=graph"]
    assert tried["model.corruption=exact"].model.corruption == "exact"
    assert "train.speed=compile" in candidates(config, RTX_4090, 2)  # a graph is for one process
    fp8 = "train.products=fp8 with train.precision=bf16"
    assert candidates(config, RTX_4090, 1)[fp8].train.precision == "bf16"


def test_the_most_clips_that_a_card_holds_at_once():
    """One clip more does not fit, also where the batch of the recipe itself does not."""
    config = Config(model=small_config(), train=TrainConfig(batch_size=4, accumulate=2))
    predicted = predict_step(config)

    def peak(clips: int) -> int:
        train = TrainConfig(batch_size=2 * clips, accumulate=2)
        return predict_step(Config(model=config.model, train=train)).peak

    for memory in (peak(9), peak(9) - 1, peak(1)):
        most = clips_at_once(predicted, memory)
        assert most == {peak(9): 9, peak(9) - 1: 8, peak(1): 1}[memory]
    assert clips_at_once(predicted, 1000) == 0


def test_a_steps_time_on_the_cards_asked_for(capsys):
    small = ["--dry-run", "--model.depth", "1", "--train.batch_size", "2"]
    command = ["train", "--config", str(PROJECT / "configs" / "demo.yaml"), *small]
    main([*command, "--card", "rtx-3090,h200-sxm"])
    text = capsys.readouterr().out
    assert "RTX 4090" not in text
    for card in ("RTX 3090", "H200 SXM"):
        for kind in ("compiled", "operator by operator"):
            line = re.search(rf"  {card}, {kind}: (\d+) clips/s, ([\d.]+) = input (.*)", text)
            assert line, (card, kind)
            parts = [float(part.rpartition(" ")[2]) for part in line[3].split(", ")]
            assert len(parts) == 7
            assert sum(parts) == pytest.approx(float(line[2]), abs=0.41)  # each is rounded
            kinds = re.search(rf"{re.escape(line[0])}\n    by kind: (.*)", text)[1]
            of_kinds = [float(kind.rpartition(" ")[2]) for kind in kinds.split(", ")]
            rest = parts[0] + parts[-1]  # the batch and AdamW
            assert sum(of_kinds) + rest == pytest.approx(float(line[2]), abs=0.41)
    message = r"--card=gtx: 'gtx' is none of rtx-4090, rtx-4090-d, [^\n]*$"
    with pytest.raises(SystemExit, match=message):
        main([*command, "--card", "gtx"])


def test_savings_come_in_order_and_learn_the_same():
    config = Config(train=TrainConfig(batch_size=12, precision="fp32"))
    names = [name for name, _ in savings(config)]
    assert names == [
        "train.precision=bf16",
        "model.checkpoint_activations=true",
        *(f"train.accumulate={n}" for n in (2, 3, 4, 6, 12)),
    ]
    last = savings(config)[-1][1]
    assert last.train.batch_size == 12
    assert last.train.accumulate == 12
    assert last.model.checkpoint_activations
    peaks = [predict_step(Config(model=small_config(depth=4), train=last.train)).peak]
    assert peaks[0] > prediction.LIBRARIES


def test_training_needs_an_output_folder():
    with pytest.raises(SystemExit, match=r"--output is not given"):
        main(["train"])
