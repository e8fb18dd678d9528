"""``cmpose cache``: makes and verifies the cache that a recipe's ``data.cache`` names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tqdm import tqdm

from cmpose.config import Config
from cmpose.data.cache.build import BuildSummary, build, other_pictures, source_of
from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.store import CacheError, store_folder
from cmpose.data.clips import ClipDataset, open_clips

_SHOWN = 10
"""Damaged tiles that an error message lists."""


def _clips(config: Config, split: str) -> ClipDataset:
    if not config.data.cache:
        raise ValueError("data.cache: name the folder of the cache, --data.cache PATH")
    # They are made from the frames: with the cache they would be read from it.
    data = replace(config.data, cache="")
    return open_clips(replace(config, data=data), train=split == "train")


def cache(
    config: Config, splits: Iterable[str], *, overwrite: bool = False, progress: bool = True
) -> dict[str, BuildSummary]:
    """Makes the stores of ``data.cache``, or goes on with interrupted ones; prints their size.

    Args:
        config: the recipe; ``data.num_workers`` processes decode frames.
        splits: ``train``, ``val``.
        overwrite: throws away what is there.
        progress: shows progress bars.

    Returns:
        What was done, by split.

    Raises:
        ValueError: ``data.cache`` is empty, or the recipe cannot work.
        CacheError, FrameError, OutputError: as ``cmpose.data.cache.build.build``.
    """
    done = {}
    for split in splits:
        clips = _clips(config, split)
        folder = store_folder(config.data.cache, train=split == "train")
        done[split] = build(
            clips,
            folder,
            overwrite=overwrite,
            workers=config.data.num_workers,
            progress=progress,
        )
        print(f"{folder}: {done[split]}")
    return done


def verify(config: Config, splits: Iterable[str], *, progress: bool = True) -> None:
    """Compares the stores of ``data.cache`` with their checksums, and with the frames as they are.

    Frames are decoded for it, by ``data.num_workers`` processes.

    Raises:
        CacheError: unfinished, stale, or damaged, with the first tiles or frames that are.
    """
    for split in splits:
        clips = _clips(config, split)
        folder = store_folder(config.data.cache, train=split == "train")
        store = TileCache(folder, source_of(clips))
        checked = tqdm(
            store.verify(),
            total=len(store.rows),
            unit="tile",
            desc="verify",
            disable=None if progress else True,
        )
        wrong = [text for text in checked if text]
        if wrong:
            listed = "; ".join(wrong[:_SHOWN]) + ("; ..." if len(wrong) > _SHOWN else "")
            raise CacheError(
                f"{folder}: {len(wrong)} of {len(store.rows)} tiles are damaged: {listed}. Run "
                "cmpose cache --overwrite to make the cache anew"
            )
        compared = tqdm(
            other_pictures(store, config.data.num_workers),
            total=len(store.plan.files),
            unit="frame",
            desc="compare",
            disable=None if progress else True,
        )
        other = [name for name in compared if name]
        if other:
            raise CacheError(
                f"{folder}: the cache is stale: {len(other)} frames are other pictures than when "
                f"it was made, though their sizes and times are the same; the first is "
                f"{store.root / other[0]}. Run cmpose cache --overwrite to make it anew"
            )
        print(f"{folder}: {len(store.rows)} tiles match their checksums, and the frames")
