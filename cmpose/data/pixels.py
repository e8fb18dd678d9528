"""The pixels of a clip: crops of frames, or of tiles from a cache."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from cmpose.config import DataConfig
from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.tiles import shrink_factor
from cmpose.data.cutouts import (
    Tile,
    Window,
    moved_matrix,
    reduced_factor,
    sampled_window,
    shrunk_matrix,
)
from cmpose.data.frames import PictureCache, read_frame
from cmpose.data.pictures import shrunk_size
from cmpose.data.records import ClipRecord
from cmpose.data.transforms import warp


class ClipPixels:
    """Reads what a crop shows, and warps it or leaves that to the device.

    Args:
        image_size: (H, W) of the crops.
        num_frames: T.
        data: ``warp`` says which of the two; ``frame_cache_mb`` how much each process keeps of the
            decoded pictures; ``reduced_decode`` whether frames are shrunk when they are decoded.
        tiles: the cache to read from; None reads frames.

    Attributes:
        pictures: the decoded frames that this process keeps.
        tiles: as given.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        num_frames: int,
        data: DataConfig,
        tiles: TileCache | None,
    ) -> None:
        self.image_size, self.num_frames, self.data, self.tiles = (
            image_size,
            num_frames,
            data,
            tiles,
        )
        self.pictures = PictureCache(data.frame_cache_mb << 20)

    def of(
        self, record: ClipRecord, matrix: np.ndarray, *, black: bool = False
    ) -> dict[str, torch.Tensor]:
        """``clip``, or ``frames`` and ``frames_matrix``, as ``ClipDataset`` describes them.

        Args:
            record: the clip.
            matrix: [2, 3], image → crop.
            black: black pixels of the same shape, without reading a picture.

        Raises:
            FrameError: a frame cannot be read, or has another size than the annotation says.
            CacheError: the cache lacks or has damaged what the crop is sampled from.
        """
        factor = 1
        if self.tiles is not None:
            factor = shrink_factor(record, self.image_size, self.data)
        elif self.data.reduced_decode:
            factor = reduced_factor(matrix)
        matrix = shrunk_matrix(matrix, factor)
        picture_size = shrunk_size(record.picture_size, factor)
        window = sampled_window(matrix, self.image_size, picture_size)
        on_device = self.data.warp == "device"
        shape = window.shape if on_device else self.image_size
        pixels = np.zeros((self.num_frames, *shape, 3), np.uint8)
        for t, file in enumerate(() if black else record.files):
            if file in record.files[:t]:
                pixels[t] = pixels[record.files.index(file)]
                continue
            tile = self._tile(file, record, factor, window)
            if on_device:
                pixels[t] = window.take(tile)
                continue
            crop = warp(tile.pixels, moved_matrix(matrix, tile.left, tile.top), self.image_size)
            pixels[t] = crop if tile.rgb else cv2.cvtColor(crop, cv2.COLOR_BGR2RGB)
        if not on_device:
            return {"clip": torch.from_numpy(pixels)}
        return {
            "frames": torch.from_numpy(pixels),
            "frames_matrix": torch.from_numpy(window.matrix(matrix)),
        }

    def _tile(self, file: str, record: ClipRecord, factor: int, window: Window) -> Tile:
        """Pixels that hold the window: of a frame, or of the cache's; shrunk by the factor."""
        if self.tiles is not None:
            width, _ = shrunk_size(record.picture_size, factor)
            return self.tiles.tile(file, factor, window, width)
        # The size is a part of the key: one that was kept may be of another record.
        key = file, record.picture_size, record.sequence.source, factor
        return Tile(self.pictures.read(key, lambda key: read_frame(*key)))
