"""The presets of ``cmpose ablate``: recipe, rendered data and size of a study."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

from cmpose import config as configuration
from cmpose.config import Config
from cmpose.render.settings import Difficulty


@dataclass(frozen=True)
class RenderedData:
    """The rendered people of a preset; the fields are ``render_dataset``'s."""

    train_videos: int
    val_videos: int
    frames: int
    fps: float
    max_people: int
    difficulty: Difficulty
    seed: int = 2026


@dataclass(frozen=True)
class Preset:
    """What a study is made of unless the call says otherwise.

    Attributes:
        recipe: file in ``configs/``, of the full model.
        data: what is rendered to train and to evaluate on.
        seeds: how many, from 0.
        ratios: of Figure 3.
        jobs: runs at a time.
        limit_minutes: how long a call may take; 0 is no limit.
    """

    recipe: str
    data: RenderedData
    seeds: int
    ratios: tuple[float, ...]
    jobs: int
    limit_minutes: float


PRESETS: dict[str, Preset] = {
    "cpu": Preset(
        recipe="ablate_cpu.yaml",
        data=RenderedData(
            train_videos=150,
            val_videos=72,
            frames=4,
            fps=6.25,
            max_people=2,
            difficulty=Difficulty(
                occluders=0.3,
                defocus=0.4,
                background_defocus=0.1,
                crossing=0.2,
                closeup=0.0,
                motion_blur=0.0,
            ),
        ),
        seeds=3,
        ratios=(0.15, 0.75),
        jobs=2,
        limit_minutes=0.0,
    ),
    "gpu": Preset(
        recipe="ablate_gpu.yaml",
        data=RenderedData(
            train_videos=400,
            val_videos=100,
            frames=30,
            fps=25.0,
            max_people=4,
            difficulty=Difficulty(),
        ),
        seeds=5,
        ratios=(0.15, 0.3, 0.6, 0.75),
        jobs=1,
        limit_minutes=8.5,
    ),
}


def preset_recipe(name: str) -> Config:
    """The full model's recipe in a preset; its ``data.root`` is not set yet."""
    return configuration.load(str(files("cmpose.configs") / PRESETS[name].recipe))
