"""From the patch features of a tile's views to the mean of their pixel features.

Undoing a view and resizing tokens to pixels are both linear, and both separate into rows and columns. So each view is
two small matrices, and nothing of full size is shifted or flipped:

    mean(k, r, c) = 1/n Σ_views  Rows_v(r, h) · features_v(k, h, w) · Cols_v(c, w)

The sum is accumulated in place: memory does not grow with the number of views.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from phaseline.runtime.contract import F16, F32
from phaseline.runtime.errors import UsageError
from phaseline.runtime.geometry import (
    ALIGNMENTS,
    INTERPOLATIONS,
    Alignment,
    Interpolation,
    sampling_matrix,
    token_positions,
)
from phaseline.runtime.transforms import BOUNDARIES, Boundary, Transform


@dataclass(frozen=True)
class PixelSampling:
    """How patch features become pixel features.

    Attributes
    ----------
    alignment
        ``centred``: tokens lie where their patches are; ``paper``: stretched over the whole tile.
    interpolation
        ``bilinear`` or ``nearest`` (the papers').
    boundary
        What a shift does at the tile's edge: ``reflect`` or ``wrap`` (the paper's). With ``reflect``, a pixel that a shift
        pushes out of a view is averaged over the other views.
    """

    alignment: Alignment = "centred"
    interpolation: Interpolation = "bilinear"
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        for name, choices in (("alignment", ALIGNMENTS), ("interpolation", INTERPOLATIONS), ("boundary", BOUNDARIES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")


class ViewAverage:
    """Running mean of the pixel features of a tile's views.

    Parameters
    ----------
    shape_px
        Rows and columns of the tile.
    channels
        k.
    patch_px, stride_px
        P and s.
    sampling
        Alignment, interpolation and boundary.
    """

    def __init__(
        self, shape_px: tuple[int, int], channels: int, patch_px: int, stride_px: int, sampling: PixelSampling
    ) -> None:
        self._axes = tuple((length, patch_px, stride_px, sampling) for length in shape_px)
        self._total = np.zeros((channels, *shape_px), np.float32)
        self._covered = np.zeros(shape_px, np.float32)

    def add(self, transform: Transform, patch_features: F16 | F32) -> None:
        """Add one view.

        Parameters
        ----------
        transform
            What made the view.
        patch_features
            Real array of shape (k, h, w): the view's features.
        """
        rows, row_cover = _operator(*self._axes[0], transform, "rows")
        cols, col_cover = _operator(*self._axes[1], transform, "cols")
        along_cols = patch_features.astype(np.float32) @ cols.T
        for total, features in zip(self._total, along_cols, strict=True):
            total += rows @ features
        self._covered += np.outer(row_cover, col_cover)

    def mean(self) -> F32:
        """The mean of the views: float32 array of shape (k, rows, cols). Ends the average: add no view after it.

        A pixel that no view covers is NaN, which cannot happen when the identity is among the views.
        """
        self._total /= self._covered
        return self._total


def _operator(
    length_px: int,
    patch_px: int,
    stride_px: int,
    sampling: PixelSampling,
    transform: Transform,
    axis: Literal["rows", "cols"],
) -> tuple[F32, F32]:
    """Matrix from a view's tokens to the tile's pixels along one axis, and which pixels the view covers (0 or 1)."""
    matrix = _tokens_to_view(length_px, patch_px, stride_px, sampling.alignment, sampling.interpolation)
    index = transform.pixel_index(length_px, axis, sampling.boundary)
    cover = (index >= 0).astype(np.float32)
    return matrix[index] * cover[:, None], cover


@functools.lru_cache(maxsize=16)
def _tokens_to_view(
    length_px: int, patch_px: int, stride_px: int, alignment: Alignment, interpolation: Interpolation
) -> F32:
    tokens = 1 + (length_px - patch_px) // stride_px
    return sampling_matrix(token_positions(length_px, tokens, patch_px, stride_px, alignment), tokens, interpolation)
