"""From the features of a tile's views to the mean of their pixel features.

Undoing a view and resizing tokens to pixels are both linear, and both separate into rows and columns. So each view is
two small matrices, and nothing of full size is shifted or flipped:

    mean(k, r, c) = 1/n Σ_views  Rows_v(r, h) · features_v(k, h, w) · Cols_v(c, w)

Learned pixel features have every pixel already: undoing a view adds blocks of it, read forwards or backwards, to the sum.
The sum is accumulated in place: memory does not grow with the number of views.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Self, cast, get_args

import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import F16, F32, BundleSpec
from phaseline.runtime.errors import UsageError
from phaseline.runtime.geometry import (
    ALIGNMENTS,
    Alignment,
    Interpolation,
    sampling_matrix,
    token_positions,
)
from phaseline.runtime.transforms import BOUNDARIES, Boundary, Transform

PixelInterpolation = Literal["learned"] | Interpolation
PIXEL_INTERPOLATIONS: tuple[PixelInterpolation, ...] = ("learned", *get_args(Interpolation))


@dataclass(frozen=True)
class PixelSampling:
    """How a bundle's features become pixel features.

    Attributes
    ----------
    alignment
        ``centred``: tokens lie where their patches are; ``paper``: stretched over the whole tile. Of no meaning for ``learned``.
    interpolation
        ``learned``: by the bundle's upsampler; ``bilinear`` or ``nearest`` (the papers'): of its patch features.
    boundary
        What a shift does at the tile's edge: ``reflect`` or ``wrap`` (the paper's). With ``reflect``, a pixel that a shift
        pushes out of a view is averaged over the other views.
    """

    alignment: Alignment = "centred"
    interpolation: PixelInterpolation = "bilinear"
    boundary: Boundary = "reflect"

    def __post_init__(self) -> None:
        for name, choices in (("alignment", ALIGNMENTS), ("interpolation", PIXEL_INTERPOLATIONS), ("boundary", BOUNDARIES)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        if self.is_learned and self.alignment != "centred":
            raise UsageError(f"alignment is {self.alignment!r}, but learned pixel features have no tokens to align; leave it "
                             "out, or choose --interpolation bilinear or nearest")

    @classmethod
    def for_bundle(
        cls, spec: BundleSpec, alignment: str = "centred", interpolation: str = "auto", boundary: str = "reflect"
    ) -> Self:
        """Settings for a bundle; ``auto`` interpolation is ``learned`` if the bundle has an upsampler, else ``bilinear``.

        Raises
        ------
        UsageError
            An unknown choice, or one that contradicts another or the bundle.
        """
        if interpolation == "auto":
            interpolation = "learned" if spec.has_upsampler else "bilinear"
        chosen = cls(cast(Alignment, alignment), cast(PixelInterpolation, interpolation), cast(Boundary, boundary))
        chosen.check_bundle(spec)
        return chosen

    @property
    def is_learned(self) -> bool:
        """Whether the bundle's upsampler makes the pixel features."""
        return self.interpolation == "learned"

    def check_bundle(self, spec: BundleSpec) -> None:
        """Refuse a bundle that cannot give such features.

        Raises
        ------
        UsageError
            Learned pixel features of a bundle without upsampler.
        """
        if self.is_learned and not spec.has_upsampler:
            raise UsageError("interpolation is 'learned', but the bundle has no upsampler; export one with phaseline export "
                             "--upsampler, or choose bilinear or nearest")

    def channels(self, spec: BundleSpec) -> int:
        """How many features a pixel gets from a bundle."""
        return spec.pixel_channels if self.is_learned else spec.channels


class ViewAverage:
    """Running mean of the pixel features of a tile's views.

    Parameters
    ----------
    shape_px
        Rows and columns of the tile.
    channels
        k, or k' for learned pixel features.
    patch_px, stride_px
        P and s.
    sampling
        Alignment, interpolation and boundary.
    """

    def __init__(
        self, shape_px: tuple[int, int], channels: int, patch_px: int, stride_px: int, sampling: PixelSampling
    ) -> None:
        self._sampling = sampling
        self._axes = tuple((length, patch_px, stride_px, sampling) for length in shape_px)
        self._total = np.zeros((channels, *shape_px), np.float32)
        self._covered = np.zeros(shape_px, np.float32)

    def add(self, transform: Transform, features: F16 | F32) -> None:
        """Add one view.

        Parameters
        ----------
        transform
            What made the view.
        features
            The view's features: patch features (k, h, w), or learned pixel features (k', rows, cols).
        """
        if self._sampling.is_learned:
            self._add_pixels(transform, features)
            return
        rows, row_cover = _operator(*self._axes[0], transform, "rows")
        cols, col_cover = _operator(*self._axes[1], transform, "cols")
        along_cols = features.astype(np.float32) @ cols.T
        for total, channel in zip(self._total, along_cols, strict=True):
            total += rows @ channel
        self._covered += np.outer(row_cover, col_cover)

    def _add_pixels(self, transform: Transform, features: F16 | F32) -> None:
        height, width = self._covered.shape
        boundary = self._sampling.boundary
        for rows, view_rows in _runs(transform.pixel_index(height, "rows", boundary)):
            for cols, view_cols in _runs(transform.pixel_index(width, "cols", boundary)):
                # Added as it is read, channel by channel: no copy of full size in float32.
                for total, channel in zip(self._total, features, strict=True):
                    total[rows, cols] += channel[view_rows, view_cols]
                self._covered[rows, cols] += 1

    def mean(self) -> F32:
        """The mean of the views: float32 array of shape (k, rows, cols). Ends the average: add no view after it.

        A pixel that no view covers is NaN, which cannot happen when the identity is among the views.
        """
        self._total /= self._covered
        return self._total


def _runs(index: npt.NDArray[np.intp]) -> Iterator[tuple[slice, slice]]:
    """The stretches of an axis that a view holds in one piece: pixels of the tile, and where they lie in the view."""
    seen = np.flatnonzero(index >= 0)
    if not len(seen):
        return
    # A flip turns both steps into -1: index by index, the pixels of a piece are neighbours in the view too.
    breaks = np.flatnonzero((np.diff(seen) != 1) | (np.abs(np.diff(index[seen])) != 1)) + 1
    for piece in np.split(seen, breaks):
        first, last = int(index[piece[0]]), int(index[piece[-1]])
        backwards = slice(first, last - 1 if last else None, -1)
        yield slice(int(piece[0]), int(piece[-1]) + 1), slice(first, last + 1) if first <= last else backwards


def _operator(
    length_px: int,
    patch_px: int,
    stride_px: int,
    sampling: PixelSampling,
    transform: Transform,
    axis: Literal["rows", "cols"],
) -> tuple[F32, F32]:
    """Matrix from a view's tokens to the tile's pixels along one axis, and which pixels the view covers (0 or 1)."""
    matrix = _tokens_to_view(length_px, patch_px, stride_px, sampling.alignment, cast(Interpolation, sampling.interpolation))
    index = transform.pixel_index(length_px, axis, sampling.boundary)
    cover = (index >= 0).astype(np.float32)
    return matrix[index] * cover[:, None], cover


@functools.lru_cache(maxsize=16)
def _tokens_to_view(
    length_px: int, patch_px: int, stride_px: int, alignment: Alignment, interpolation: Interpolation
) -> F32:
    tokens = 1 + (length_px - patch_px) // stride_px
    return sampling_matrix(token_positions(length_px, tokens, patch_px, stride_px, alignment), tokens, interpolation)
