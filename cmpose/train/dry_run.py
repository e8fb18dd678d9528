"""``cmpose train --dry-run`` and the advice when memory does not suffice, in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from cmpose.config import Config
from cmpose.distributed import World
from cmpose.evaluation.inference import compute_dtype
from cmpose.memory import reason
from cmpose.train.cards import RTX_4090, Card, cards_for
from cmpose.train.prediction import LIBRARIES, StepPrediction, predict_step
from cmpose.train.step import settled_speed

GB = 1e9

SMALL_CARD = RTX_4090.memory

LEAST_GAIN = 0.01
"""A field is recommended if a step is faster by at least this share, by the estimate."""


def savings(config: Config) -> list[tuple[str, Config]]:
    """Recipes that need less memory and learn the same, in the order to try them.

    Returns:
        (field, recipe with this field and those before it).
    """
    cheaper_recipes = []
    model, train = config.model, config.train
    if train.precision == "fp32":
        train = replace(train, precision="bf16")
        cheaper_recipes.append(("train.precision=bf16", replace(config, train=train)))
    if not model.checkpoint_activations:
        model = replace(model, checkpoint_activations=True)
        names = "model.checkpoint_activations=true"
        cheaper_recipes.append((names, replace(config, model=model, train=train)))
    for accumulate in range(train.accumulate + 1, train.batch_size + 1):
        if train.batch_size % accumulate == 0:
            cut = replace(train, accumulate=accumulate)
            cheaper = replace(config, model=model, train=cut)
            cheaper_recipes.append((f"train.accumulate={accumulate}", cheaper))
    return cheaper_recipes


def _advice(config: Config) -> str:
    fields = [name for name, _ in savings(config)]
    ordered = [name for name in fields if not name.startswith("train.accumulate")]
    ordered += [name for name in fields if name.startswith("train.accumulate")][:1]
    return ", then ".join([*ordered, "a smaller train.batch_size"])


def out_of_memory(config: Config, error: BaseException) -> str:
    """The message for a step that did not fit: which fields need less, in the order to try."""
    return (
        f"the device's memory does not hold a step of train.batch_size={config.train.batch_size} "
        f"in train.accumulate={config.train.accumulate} part(s) ({reason(error)}): set "
        f"{_advice(config)}; `cmpose train --dry-run` predicts what each needs"
    )


def fitting(config: Config, memory: int, processes: int = 1) -> tuple[list[str], Config] | None:
    """The first recipe that a card's memory holds, by trying one after the other on meta tensors.

    Args:
        config: the recipe.
        memory: bytes of the card.
        processes: cards that share a step.

    Returns:
        The fields that are to be set, none if it fits as it is, and the recipe with them; None if
        no field makes it fit.
    """
    if predict_step(config, processes).peak <= memory:
        return [], config
    tried: list[str] = []
    for name, cheaper in savings(config):
        if name.startswith("train.accumulate"):
            tried = [field for field in tried if not field.startswith("train.accumulate")]
        if cheaper.train.batch_size % (cheaper.train.accumulate * processes):
            continue
        tried.append(name)
        if predict_step(cheaper, processes).peak <= memory:
            return tried, cheaper
    return None


def _remedy(config: Config, memory: int, processes: int) -> str:
    """Says which fields make a step fit."""
    if fit := fitting(config, memory, processes):
        return f"set {' and '.join(fit[0])}"
    if processes > 1 and config.train.distributed != "fsdp":
        return "no other field makes it fit: set train.distributed=fsdp"
    return "no field makes it fit: use a smaller model.backbone"


def _switches(config: Config) -> str:
    """Which fields that cost speed or save work are set how."""
    model, train = config.model, config.train
    return (
        f"with model.corruption={model.corruption}, model.drop_path_selection="
        f"{model.drop_path_selection}, train.products={train.products}, train.speed={train.speed}, "
        "fused AdamW"
    )


def _with_train(config: Config, **fields: object) -> Config:
    return replace(config, train=replace(config.train, **fields))  # type: ignore[arg-type]


def candidates(config: Config, card: Card, processes: int) -> dict[str, Config]:
    """Fields that may make a step faster on a card, each by itself → the recipe with them."""
    train, model = config.train, config.model
    recipes = {}
    for name in ("corruption", "drop_path_selection"):
        if getattr(model, name) != "exact":
            exact = replace(model, **{name: "exact"})  # type: ignore[arg-type]
            recipes[f"model.{name}=exact"] = replace(config, model=exact)
    if train.precision == "fp32":
        recipes["train.precision=bf16"] = _with_train(config, precision="bf16")
    names: tuple[Literal["plain", "fp8", "fp16_accumulate"], ...]
    names = ("plain", "fp8", "fp16_accumulate")
    for name in names:
        wide = "bf16" if train.precision == "fp32" and name != "plain" else train.precision
        precision = "fp16" if name == "fp16_accumulate" else wide
        if name != train.products and _has(card, name):
            needs = f" with train.precision={precision}" if precision != train.precision else ""
            cheaper = _with_train(config, products=name, precision=precision)
            recipes[f"train.products={name}{needs}"] = cheaper
    speed = settled_speed(replace(train, speed="auto"), _cards(processes))
    if settled_speed(train, _cards(processes)) == "eager" != speed:
        recipes[f"train.speed={speed}"] = _with_train(config, speed=speed)
    return recipes


def _cards(processes: int) -> World:
    return World(0, processes, torch.device("cuda"))


def _estimate(predicted: StepPrediction, card: Card) -> float:
    """Seconds of a step, compiled if the recipe says so."""
    speed = settled_speed(predicted.config.train, _cards(predicted.processes))
    return sum(predicted.parts(card, compiled=speed != "eager").values())


def to_switch_on(
    predicted: StepPrediction, card: Card, others: dict[str, StepPrediction] | None = None
) -> str:
    """Which fields make a step faster on a card by the estimate, each by itself, and which do not.

    Args:
        predicted: of the recipe as it is.
        card: for which.
        others: predictions of other recipes by what is set in them. Those that are made here are
            added, right in what concerns time and not memory.
    """
    config, processes = predicted.config, predicted.processes
    others = {} if others is None else others
    tried = candidates(config, card, processes)
    products = config.train.products
    if products in ("fp8", "fp16_accumulate") and not _has(card, products):
        return f"{card.name} gains nothing from train.products={products}, which training refuses"
    gains: dict[str, float] = {}
    for name, recipe in tried.items():
        if name not in others:
            numbers = compute_dtype(recipe.train.precision).itemsize
            batch = predicted.batch * numbers // compute_dtype(config.train.precision).itemsize
            others[name] = replace(predicted, config=recipe, batch=batch)
        gains[name] = _estimate(predicted, card) / _estimate(others[name], card) - 1
    order = sorted(gains, key=gains.__getitem__, reverse=True)
    texts = [f"{name} ({gains[name]:+.0%})" for name in order]
    faster = [text for name, text in zip(order, texts, strict=True) if gains[name] >= LEAST_GAIN]
    slower = [text for text in texts if text not in faster]
    no = f"; no gain from {', '.join(slower)}" if slower else ""
    return f"to switch on for {card.name}, by this estimate: {', '.join(faster) or 'nothing'}{no}"


def _has(card: Card, products: str) -> bool:
    """Whether training takes such products on a card, which gains from them."""
    halved = card.flops_16_accumulate > card.flops_16
    return {"fp8": card.flops_8 > 0, "fp16_accumulate": halved}.get(products, True)


def _times(predicted: StepPrediction, cards: tuple[Card, ...]) -> list[str]:
    """Lines of the time of a step by part, compiled and not, and what makes it shorter."""
    config, clips = predicted.config, predicted.config.train.batch_size
    lines: list[str] = []
    others: dict[str, StepPrediction] = {}
    for card in cards:
        for compiled in (True, False):
            parts = predicted.parts(card, compiled=compiled)
            whole = sum(parts.values())
            kinds = predicted.kinds(card, compiled=compiled)
            split, by_kind = (
                ", ".join(f"{name} {1e3 * value:.1f}" for name, value in times.items())
                for times in (parts, kinds)
            )
            lines += [
                f"  {card.name}, {'compiled' if compiled else 'operator by operator'}: "
                f"{clips / whole:.0f} clips/s, {1e3 * whole:.1f} = {split}",
                f"    by kind: {by_kind}",
            ]
        lines.append(f"  {to_switch_on(predicted, card, others)}")
    return [*lines, f"  {_switches(config)}"]


def clips_at_once(predicted: StepPrediction, memory: int) -> int:
    """The most clips that a card's memory holds at once with a recipe's other fields.

    The peak grows nearly in proportion, so that a few predictions find it.

    Args:
        predicted: of the recipe as it is.
        memory: bytes of the card.
    """
    config, processes = predicted.config, predicted.processes

    def peak(clips: int) -> int:
        whole = clips * config.train.accumulate * processes
        return predict_step(_with_train(config, batch_size=whole), processes).peak

    fits, low = predicted.micro_batch, predicted.peak
    if low > memory:
        over, high, fits = fits, low, 1
        if over == 1 or (low := peak(1)) > memory:
            return 0
    else:
        over = 2 * fits
        while (high := peak(over)) <= memory:
            a_clip = max(1, (high - low) // (over - fits))
            fits, low = over, high
            over = min(fits + (memory - low) // a_clip + 1, 16 * fits)
    while over - fits > 1:
        between = fits + (memory - low) * (over - fits) // (high - low)
        clips = min(max(between, fits + 1), over - 1)
        if (needed := peak(clips)) <= memory:
            fits, low = clips, needed
        else:
            over, high = clips, needed
    return fits


def report(config: Config, processes: int = 1, card_names: str = "") -> str:
    """What ``cmpose train --dry-run`` prints, for one of ``processes`` cards.

    ``card_names`` is what ``--card`` gives, see :func:`cards_for`.

    Raises:
        ValueError: as :func:`predict_step` and :func:`cards_for`.
    """
    if processes < 1:
        raise ValueError(f"--processes={processes}: must be at least 1, the number of cards")
    cards = cards_for(card_names)
    predicted = predict_step(config, processes)
    train, model = config.train, config.model
    together = ", of all cards, if nothing had to travel between them" if processes > 1 else ""
    lines = [
        f"ViT {model.backbone}, {predicted.parameters / 1e6:.1f} M weights, "
        f"{model.image_size[0]}×{model.image_size[1]}, T = {model.num_frames}, {train.precision}"
        + ("" if train.products == "plain" else f", products {train.products}")
        + f", {train.batch_size} clips a step in {train.accumulate} part(s)"
        + (", blocks recomputed" if model.checkpoint_activations else "")
        + (f", {processes} cards by {train.distributed}" if processes > 1 else ""),
        "",
        "memory of the eager step"
        + (" on each card" if processes > 1 else "")
        + ", predicted (GB = 10⁹ bytes)",
    ]
    rows = [
        ("weights, float32", predicted.weights),
        ("gradients, float32", predicted.gradients),
        ("optimiser state, float32", predicted.optimizer),
        ("images", predicted.batch),
        *((f"activations: {name}", value) for name, value in predicted.activations.items()),
        ("the worst moment, less the sum", predicted.difference),
        ("CUDA and its libraries (assumed)", int(LIBRARIES)),
        *([("gathered for a while", predicted.gathered)] if predicted.gathered else []),
        ("peak", predicted.peak),
    ]
    lines += [f"  {name:34}{value / GB:8.2f}" for name, value in rows]
    if predicted.peak <= SMALL_CARD:
        verdict = f"fits, {(SMALL_CARD - predicted.peak) / GB:.1f} are left"
    else:
        verdict = f"does not fit; {_remedy(config, SMALL_CARD, processes)}"
    most = clips_at_once(predicted, SMALL_CARD)
    lines.append(
        f"  a 24 GB card ({SMALL_CARD / GB:.1f}): {verdict}; it holds {most} clips at once"
    )
    lines += [
        "",
        f"speed, predicted from datasheets ({predicted.flops / 1e9:.0f} GFLOP a clip, recomputed "
        f"ones too){together}",
    ]
    for card in cards:
        bound, eager = (train.batch_size / seconds for seconds in predicted.seconds(card))
        lines.append(
            f"  {card.name:10} at most {bound:6.0f} clips/s; operators one by one, each at the "
            f"memory's full speed, {eager:6.0f}"
        )
    heading = f"time of a step by part, estimated from its operators (not measured), ms{together}"
    lines += ["", heading]
    return "\n".join(lines + _times(predicted, cards))
