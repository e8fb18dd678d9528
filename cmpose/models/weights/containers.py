"""Sets of weights in a file: found in whatever holds them, told apart, and one of them chosen.

Training programs wrap weights: in dictionaries (``state_dict``, ``model_ema``), and in prefixes of
keys (``module.``, ``model.``). A file may hold two sets, of the trained weights and of their moving
average.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

PLAIN = ("state_dict", "model_state_dict", "model", "module", "net", "network")
"""Dictionaries and prefixes of keys that say nothing of the weights in them."""

_PREFIXES = {*PLAIN, "_orig_mod", "student", "base_encoder"}
_AVERAGES = {
    *("ema", "ema_model", "model_ema", "ema_net", "net_ema", "ema_state_dict", "state_dict_ema"),
    *("teacher", "momentum_encoder", "target_encoder"),
}
_AVERAGED = re.compile(r"(.*[._])?(ema|teacher|momentum|target|swa|averaged?)([._].*)?")
_DEPTH = 6
"""Dictionaries deeper inside one another are no weights."""


@dataclass
class WeightSet:
    """Tensors that belong together.

    Attributes:
        label: the dictionaries, and the prefix of an average, that they lie in, joined by dots.
        averaged: whether they are a moving average of the trained weights.
        tensors: by key, without what says nothing of them: ``module.`` and the like.
        keys: the same keys → what the file calls them.
        clash: two of the file's keys that are one key without prefixes; empty if there are none.
    """

    label: str
    averaged: bool
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    clash: tuple[str, ...] = ()

    @property
    def usual(self) -> bool:
        """Whether only dictionaries with the usual names hold it."""
        return all(part in PLAIN for part in self.label.split(".") if self.label)


def find_sets(content: Any) -> list[WeightSet]:
    """The sets of weights in a file's content, in its order.

    Args:
        content: what the file holds: tensors by name, in dictionaries within dictionaries.
    """
    sets: dict[str, WeightSet] = {}
    # mmengine stores the average under state_dict and what was trained under ema_state_dict, to
    # load the average without knowing of it. The counter is of its class of averages.
    swapped = (
        isinstance(content, dict)
        and isinstance(content.get("state_dict"), dict)
        and isinstance(content.get("ema_state_dict"), dict)
        and "steps" in content["ema_state_dict"]
    )
    for path, key, tensor in _tensors(content):
        parts = key.split(".")
        wrappers: list[str] = []
        while len(parts) > 1 and parts[0] in _PREFIXES | _AVERAGES:
            wrappers.append(parts.pop(0))
        label = ".".join([*path, *(name for name in wrappers if name in _AVERAGES)])
        averaged = _AVERAGED.fullmatch(label) is not None
        each = sets.setdefault(label, WeightSet(label, averaged != swapped))
        name, full = ".".join(parts), ".".join([*path, key])
        if name in each.tensors:
            each.clash = each.clash or (each.keys[name], full)
        each.tensors[name], each.keys[name] = tensor, full
    return list(sets.values())


def _tensors(
    content: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, Tensor]]:
    """(dictionaries, key, tensor) of all tensors by name."""
    if not isinstance(content, dict) or len(path) > _DEPTH:
        return
    for key, value in content.items():
        if isinstance(key, str):
            if isinstance(value, Tensor):
                yield path, key, value
            else:
                yield from _tensors(value, (*path, key))


def choose(sets: list[WeightSet], count: Callable[[WeightSet], int]) -> tuple[WeightSet, str]:
    """The set to take: the one with most tensors that the model knows; of equal ones the average.

    An average is what its authors evaluate. One that lacks a part, such as batch norms' statistics,
    would leave that part at random.

    Args:
        sets: at least one.
        count: how many of a set's tensors the model knows.

    Returns:
        The set; and a line of text on the choice if there was one, else nothing.

    Raises:
        ValueError: two sets are alike in all of this, or two keys of the set are one.
    """
    usable = {each.label: count(each) for each in sets}
    if not any(usable.values()):
        return max(sets, key=lambda each: len(each.tensors)), ""

    def rank(each: WeightSet) -> tuple[int, bool, bool]:
        return usable[each.label], each.averaged, each.usual

    best = max(sets, key=rank)
    others = [each for each in sets if each is not best and usable[each.label]]
    alike = [each.label or "the top" for each in (best, *others) if rank(each) == rank(best)]
    if len(alike) > 1:
        raise ValueError(
            f"holds several sets of weights ({', '.join(alike)}): save the one to start from in a "
            "file of its own"
        )
    if best.clash:
        one, two = best.clash
        raise ValueError(
            f"holds {one!r} and {two!r}, of which either may be meant: save the weights to start "
            "from in a file of their own"
        )
    if not others:
        return best, ""
    left = ", ".join(each.label or "the top" for each in others)
    kind = " (an average)" if best.averaged else ""
    return best, (
        f"it holds several sets of weights: {best.label or 'the top'}{kind} is taken, not {left}"
    )
