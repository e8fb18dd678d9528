"""``cmpose train --dry-run`` and the advice when memory does not suffice, in words."""

from __future__ import annotations

from dataclasses import replace

import torch

from cmpose.config import Config
from cmpose.distributed import World
from cmpose.memory import reason
from cmpose.train.cards import RTX_4090, Card, cards_for
from cmpose.train.prediction import LIBRARIES, StepPrediction, predict_step
from cmpose.train.step import settled_speed

GB = 1e9

SMALL_CARD = RTX_4090.memory


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
    kept = [name for name in fields if not name.startswith("train.accumulate")]
    kept += [name for name in fields if name.startswith("train.accumulate")][:1]
    return ", then ".join([*kept, "a smaller train.batch_size"])


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
    if found := fitting(config, memory, processes):
        return f"set {' and '.join(found[0])}"
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


def to_switch_on(config: Config, card: Card, processes: int) -> str:
    """Which fields make a step faster on a card, less those that are on and what it lacks."""
    train, model = config.train, config.model
    has = ["fp8"] if card.flops_8 else []
    has += ["fp16_accumulate"] if card.flops_16_accumulate > card.flops_16 else []
    if train.products in ("fp8", "fp16_accumulate") and train.products not in has:
        refused = f"train.products={train.products}"
        return f"{card.name} gains nothing from {refused}, which training refuses"
    names = ("corruption", "drop_path_selection")
    fields = [f"model.{name}=exact" for name in names if getattr(model, name) != "exact"]
    if train.precision == "fp32":
        fields.append("train.precision=bf16")
    if train.products not in has and has:
        needs = {"fp16_accumulate": " with train.precision=fp16"}
        fields.append(" or ".join(f"train.products={name}{needs.get(name, '')}" for name in has))
    world = World(0, processes, torch.device("cuda"))
    speed = settled_speed(replace(train, speed="auto"), world)
    if settled_speed(train, world) != speed:
        fields.append(f"train.speed={speed}")
    return f"to switch on for {card.name}: {', '.join(fields) or 'nothing more'}"


def _times(predicted: StepPrediction, cards: tuple[Card, ...]) -> list[str]:
    """Lines of the time of a step by part, compiled and not, and what makes it shorter."""
    config, clips = predicted.config, predicted.config.train.batch_size
    lines: list[str] = []
    for card in cards:
        for compiled in (True, False):
            parts = predicted.parts(card, compiled=compiled)
            whole = sum(parts.values())
            split = ", ".join(f"{part} {1e3 * value:.1f}" for part, value in parts.items())
            lines.append(
                f"  {card.name}, {'compiled' if compiled else 'operator by operator'}: "
                f"{clips / whole:.0f} clips/s, {1e3 * whole:.1f} = {split}"
            )
        lines.append(f"  {to_switch_on(config, card, predicted.processes)}")
    return [*lines, f"  {_switches(config)}"]


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
        left = (SMALL_CARD - predicted.peak) / GB
        lines.append(f"  a 24 GB card ({SMALL_CARD / GB:.1f}): fits, {left:.1f} are left")
    else:
        over = _remedy(config, SMALL_CARD, processes)
        lines.append(f"  a 24 GB card ({SMALL_CARD / GB:.1f}): does not fit; {over}")
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
    told = f"time of a step by part, estimated from its operators (not measured), ms{together}"
    lines += ["", told]
    return "\n".join(lines + _times(predicted, cards))
