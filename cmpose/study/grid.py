"""The paper's ablations as data: Tables 4 and 5, Figure 3, and the runs that they need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cmpose.config import Config

Part = Literal["table4", "table5", "figure3"]
PARTS: tuple[Part, ...] = ("table4", "table5", "figure3")

Setting = dict[str, object]
"""Dotted field of the recipe → value."""

FULL: Setting = {"model.mask_task": True, "model.denoise_task": True, "model.fine": "full"}


class Row(NamedTuple):
    """A row of a table: its label, its setting, and the paper's mAP on PoseTrack17."""

    label: str
    setting: Setting
    paper: float


TABLES: dict[str, tuple[Row, ...]] = {
    "table4": (
        Row(
            "primary task only",
            FULL | {"model.mask_task": False, "model.denoise_task": False},
            85.6,
        ),
        Row("+ token masking reconstruction", FULL | {"model.denoise_task": False}, 86.9),
        Row("+ token denoising", FULL | {"model.mask_task": False}, 87.0),
        Row("both (full model)", FULL, 87.5),
    ),
    "table5": (
        Row("(a) causal tokens only", FULL | {"model.fine": "causal_only"}, 85.4),
        Row("(b) no Fine Token Enhancement", FULL | {"model.fine": "off"}, 86.0),
        Row("full model", FULL, 87.5),
    ),
}
TITLES: dict[str, str] = {
    "table4": "Table 4: the tasks of Multitask Coarse Learning",
    "table5": "Table 5: Fine Token Enhancement",
    "figure3": "Figure 3: the ratios of masked and noised tokens",
}
RATIO_FIELDS = {"model.mask_ratio": "mask ratio p_tm", "model.noise_ratio": "noise ratio p_tn"}


@dataclass(frozen=True)
class Study:
    """Settings to compare over seeds. Parts that need the same setting share its runs.

    Attributes:
        recipe: the full model's, which every run departs from.
        parts: of ``PARTS``.
        ratios: of Figure 3. Each is taken as mask ratio and as noise ratio, while the other one is
            the recipe's.
        seeds: their number; every setting runs with seeds 0 to ``seeds`` − 1.
        full: the full model's setting, ratios included.

    Raises:
        ValueError: no seed, no part or one twice, a ratio that is not between 0 and 1.
    """

    recipe: Config
    parts: tuple[Part, ...] = PARTS
    ratios: tuple[float, ...] = ()
    seeds: int = 3
    full: Setting = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: must be at least 1; intervals need 2 or more")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(
                f"parts={list(self.parts)}: give some of {', '.join(PARTS)}, each once"
            )
        for ratio in self.ratios:
            if not 0 < ratio < 1:
                raise ValueError(f"ratios: {ratio} is not between 0 and 1")
        ratios = {name: getattr(self.recipe.model, name.partition(".")[2]) for name in RATIO_FIELDS}
        object.__setattr__(self, "full", FULL | ratios)

    def points(self, name: str) -> list[tuple[float, Setting]]:
        """Figure 3's (ratio, setting) along a field, ascending, the recipe's own among them."""
        ratios = sorted({*self.ratios, float(self.full[name])})  # type: ignore[arg-type]
        return [(ratio, self.full | {name: ratio}) for ratio in ratios]

    def rows(self, table: str) -> list[Row]:
        """A table's rows, each with a value for every field that some setting changes."""
        return [row._replace(setting=self.full | row.setting) for row in TABLES[table]]

    def settings(self) -> dict[str, Setting]:
        """Every different setting by its name; the full model first."""
        settings: list[Setting] = [self.full]
        for part in self.parts:
            if part == "figure3":
                settings += [setting for field in RATIO_FIELDS for _, setting in self.points(field)]
            else:
                settings += [row.setting for row in self.rows(part)]
        return {self.name(setting): setting for setting in settings}

    def name(self, setting: Setting) -> str:
        """``full``, or what differs from it: ``mask_task=false``, ``mask_ratio=0.3``."""
        parts = [
            f"{field.partition('.')[2]}={str(value).lower()}"
            for field, value in setting.items()
            if value != self.full[field]
        ]
        return "+".join(parts) or "full"

    def runs(self) -> list[tuple[str, int]]:
        """(name, seed) in the order of running: all settings of a seed before the next seed."""
        return [(name, seed) for seed in range(self.seeds) for name in self.settings()]


def run_name(name: str, seed: int) -> str:
    """What a run is called in names of files."""
    return f"{name}-seed{seed}"


def chosen_parts(parts: Iterable[Part] | None) -> tuple[Part, ...]:
    """The parts asked for, in the paper's order; all of them if none was asked for."""
    chosen = list(parts or PARTS)
    return tuple(part for part in PARTS if part in chosen)
