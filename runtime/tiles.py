"""Fixed-size tiles over an image of any size, and the weights that blend them back.

    start:  0        step      2·step        L - T
            [────── T ──────]
                     [────── T ──────]
                             overlap  [────── T ──────]   the last tile ends at the edge
    weight  ────────╲╱───────────────╲╱─────────────────  ramps over each overlap; all weights on a pixel sum to 1

An image smaller than a tile is mirrored at its lower and right edges until it fills one.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from phaseline.runtime.contract import F32, U8
from phaseline.runtime.errors import UsageError


@dataclass(frozen=True)
class TileAxis:
    """Tiles along one axis.

    Attributes
    ----------
    length_px
        Pixels of the image.
    tile_px
        T.
    overlap_px
        Pixels that neighbouring tiles share at least.
    """

    length_px: int
    tile_px: int
    overlap_px: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap_px <= self.tile_px // 2:
            raise UsageError(f"an overlap of {self.overlap_px} px between tiles of {self.tile_px} px was asked for; "
                             f"expected 0…{self.tile_px // 2}")
        if self.length_px < 1:
            raise UsageError(f"an axis of {self.length_px} px cannot be tiled; expected at least 1 px")

    @property
    def starts(self) -> tuple[int, ...]:
        """First pixel of each tile, ascending."""
        last = max(self.length_px - self.tile_px, 0)
        step = self.tile_px - self.overlap_px
        return (*range(0, last, step), last)

    @property
    def size_px(self) -> int:
        """Pixels of the image in a tile: T, or all of a smaller image."""
        return min(self.tile_px, self.length_px)

    def weights(self) -> F32:
        """Blending weights.

        Returns
        -------
        float32 array of shape (tiles, size_px), range 0–1; over each pixel the tiles' weights sum to 1.
        """
        starts = self.starts
        weights = np.ones((len(starts), self.size_px))
        for i, (left, right) in enumerate(itertools.pairwise(starts)):
            shared = left + self.tile_px - right
            ramp = (np.arange(shared) + 0.5) / max(shared, 1)
            weights[i + 1, :shared] *= ramp
            weights[i, self.size_px - shared :] *= ramp[::-1]
        total = np.zeros(self.length_px)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + self.size_px] += weight
        for start, weight in zip(starts, weights, strict=True):
            weight /= total[start : start + self.size_px]
        return weights.astype(np.float32)


def cut_tile(image: U8, row: int, col: int, tile_px: int) -> U8:
    """Cut one tile.

    Parameters
    ----------
    image
        uint8 array of shape (channels, rows, cols).
    row, col
        The tile's first pixel.
    tile_px
        T.

    Returns
    -------
    C-contiguous uint8 array of shape (channels, T, T), mirrored where the image ends.
    """
    tile = image[:, row : row + tile_px, col : col + tile_px]
    missing = [(0, 0), *((0, tile_px - n) for n in tile.shape[1:])]
    return np.ascontiguousarray(np.pad(tile, missing, mode="reflect") if tile.shape[1:] != (tile_px, tile_px) else tile)
