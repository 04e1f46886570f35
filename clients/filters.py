"""The arithmetic of the classical features, on one band of an image's rows.

Derivatives come from *blurred differences*, not from differences of the blurred image. The two are equal, but float32
rounds a blurred image at the size of its mean, and second derivatives at σ = 16 are some 10⁴ times smaller than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

TRUNCATE = 4.0
"""Gaussian kernels end at this many σ."""

MEMBRANE_PATCH_PX = 19
MEMBRANE_STEP_DEG = 30
MEMBRANE_HALO_PX = MEMBRANE_PATCH_PX // 2

_STRIP_PX = 1 << 16  # elementwise work happens on this many pixels at a time, to stay in the L2 cache
_COLUMN_BLOCK_PX = 256  # vertical passes likewise
_LANE_PX = 64  # widths given to OpenCV are multiples of this: its scalar remainder loop may round differently
_UNIT = np.ones(1)
# Sorts six values in twelve compare-and-swap steps.
_SORT_SIX = ((0, 5), (1, 3), (2, 4), (1, 2), (3, 4), (0, 3), (2, 5), (0, 1), (2, 3), (4, 5), (1, 2), (3, 4))


def gaussian_radius_px(sigma_px: float) -> int:
    """Half width of the Gaussian kernel without its centre, as in ``scipy.ndimage.gaussian_filter``."""
    return int(TRUNCATE * sigma_px + 0.5)


@dataclass(frozen=True)
class Scale:
    """One σ of a band of n image rows: what all its features are made of.

    F are forward differences, F[r] = G[r + 1] − G[r], extended at the image's border so that the interior formulas of
    the Hessian give one-sided differences there.
    """

    image: Floats  # G, (n, cols)
    down: Floats  # differences of rows −2 … n, columns −1 … cols
    right: Floats  # differences of columns −2 … cols, rows −1 … n
    at_top: bool
    at_bottom: bool


@dataclass(frozen=True)
class Band:
    """Image rows start … stop − 1 as float32 with ``margin`` px around, continued beyond the image's border."""

    padded: Floats
    start: int
    stop: int
    image_rows: int
    cols: int
    margin: int

    @classmethod
    def cut(cls, image: NDArray[Any], start: int, stop: int, margin: int) -> Band:
        rows, cols = image.shape
        first, last = max(0, start - margin), min(rows, stop + margin)
        inner = np.ascontiguousarray(image[first:last], dtype=np.float32)
        padded = cv2.copyMakeBorder(inner, first - (start - margin), stop + margin - last,
                                    margin, margin + 2 * _LANE_PX, cv2.BORDER_REPLICATE)
        return cls(np.asarray(padded, np.float32), start, stop, rows, cols, margin)

    def blur(self, sigma_px: float, *, image: bool, differences: bool) -> Scale:
        """Blur the band, its row differences and its column differences with one Gaussian."""
        kernel = _gaussian_kernel(sigma_px)
        radius, rows, cols = len(kernel) // 2, self.stop - self.start, self.cols
        edge = self.margin - radius
        source = self.padded[edge - 2 : self.margin + rows + radius + 2, edge : edge + _lanes(cols + 2 * radius)]
        core = slice(radius, radius + cols)
        columns_done = _vertical(source, kernel)  # rows −2 … n + 1
        blurred = down = right = np.empty((0, 0), np.float32)
        if image:
            blurred = _horizontal(columns_done[2:-2], kernel)[:, core]
        if differences:
            steps = np.zeros((rows + 2, source.shape[1]), np.float32)
            np.subtract(columns_done[1:-1, 1:], columns_done[1:-1, :-1], out=steps[:, :-1])
            right = np.empty((rows + 2, cols + 3), np.float32)
            right[:, 2:-1] = _horizontal(steps, kernel)[:, core]
            _extend_differences(right.T, -2, cols)
            _replicate(right, self.start - 1, self.image_rows)

            steps = _vertical(source[1:] - source[:-1], kernel)
            down = np.empty((rows + 3, cols + 2), np.float32)
            down[:, 1:-1] = _horizontal(steps, kernel)[:, core]
            _replicate(down.T, -1, cols)
            _extend_differences(down, self.start - 2, self.image_rows)
        return Scale(blurred, down, right, self.start == 0, self.stop == self.image_rows)


def differentiate(scale: Scale, strip: slice, sobel: Floats | None, hessian: Sequence[Floats] | None) -> None:
    """Write the Sobel magnitude and the five Hessian channels of the rows ``strip`` of a band.

    Central differences are half the sum of two forward ones; the halves are exact in binary, and applied at the end.
    """
    first, stop = strip.start, strip.stop
    down, right = scale.down[first : stop + 3], scale.right[first : stop + 2]
    along = down[2:-1] + down[1:-2]  # 2 ∂G/∂row, columns −1 … cols
    if hessian is not None:
        both = down[2:, 1:-1] - down[:-2, 1:-1]
        a = both[1:] + both[:-1]
        both = right[1:-1, 2:] - right[1:-1, :-2]
        d = both[:, 1:] + both[:, :-1]
        b = along[:, 2:] - along[:, :-2]
        # `along` is replicated beyond the border, which halves its one-sided difference there.
        b[:, 0] *= 2
        b[:, -1] *= 2
        quarter = np.float32(0.25)
        _describe_hessian(a * quarter, b * quarter, d * quarter, [plane[strip] for plane in hessian])
    if sobel is not None:
        across = right[:, 2:-1] + right[:, 1:-2]  # 2 ∂G/∂column, rows −1 … n
        # Sobel continues the smoothed image with its border pixels: half a one-sided difference.
        half = np.float32(0.5)
        across[:, 0] *= half
        across[:, -1] *= half
        if scale.at_top and first == 0:
            along[0] *= half
        if scale.at_bottom and stop == len(scale.down) - 3:
            along[-1] *= half
        across = _smooth_three(across)
        along = _smooth_three(along.T).T
        across *= across
        along *= along
        across += along
        np.sqrt(across, out=across)
        np.multiply(across, np.float32(0.25 / math.sqrt(2)), out=sobel[strip])


def _describe_hessian(a: Floats, b: Floats, d: Floats, out: Sequence[Floats]) -> None:
    """Write what `HESSIAN_PARTS` names, for H = [[a, b], [b, d]]; the arguments are used up."""
    largest, smallest, modulus, trace, determinant = out
    np.add(a, d, out=trace)
    np.multiply(a, d, out=determinant)
    spread = a - d
    for element in (a, b, d, spread):
        np.square(element, out=element)
    determinant -= b
    a += d
    a += b
    np.sqrt(a, out=modulus)
    b *= 4
    spread += b
    np.sqrt(spread, out=spread)
    np.add(trace, spread, out=largest)
    np.subtract(trace, spread, out=smallest)
    largest *= np.float32(0.5)
    smallest *= np.float32(0.5)


def _smooth_three(values: Floats) -> Floats:
    """Sum with weights 1, 2, 1 along the first axis, which loses its first and last entry."""
    result = values[:-2] + values[2:]
    result += values[1:-1]
    result += values[1:-1]
    return result


def project_membranes(band: Band, strip: slice, out: Sequence[Floats]) -> None:
    """Write what `MEMBRANE_PARTS` names for the rows ``strip`` of a band."""
    rows = strip.stop - strip.start
    top, left = band.margin - MEMBRANE_HALO_PX + strip.start, band.margin - MEMBRANE_HALO_PX
    responses: list[Floats] = []
    for pieces in membrane_pieces():
        response = np.zeros((rows, band.cols), np.float32)
        for row, col, piece in pieces:
            height, width = rows + piece.shape[0] - 1, _lanes(band.cols + piece.shape[1] - 1)
            view = band.padded[top + row : top + row + height, left + col : left + col + width]
            response += cv2.filter2D(view, -1, piece, anchor=(0, 0), borderType=cv2.BORDER_REPLICATE)[
                :rows, : band.cols]
        responses.append(response)
    total, mean, deviation, median, maximum, minimum = (plane[strip] for plane in out)
    np.add(responses[0], responses[1], out=total)
    for response in responses[2:]:
        total += response
    np.divide(total, len(responses), out=mean)
    deviation[...] = 0
    for response in responses:
        residual = response - mean
        residual *= residual
        deviation += residual
    deviation /= len(responses)
    np.sqrt(deviation, out=deviation)
    for low, high in _SORT_SIX:
        smaller = np.minimum(responses[low], responses[high])
        np.maximum(responses[low], responses[high], out=responses[high])
        responses[low] = smaller
    np.add(responses[2], responses[3], out=median)
    median *= np.float32(0.5)
    maximum[...] = responses[-1]
    minimum[...] = responses[0]


@lru_cache(maxsize=1)
def membrane_pieces() -> tuple[tuple[tuple[int, int, Floats], ...], ...]:
    """The six line kernels, each cut into small blocks (row, column, weights).

    OpenCV skips a small kernel's zeros, but turns to Fourier transforms for large kernels, whose rounding depends on
    the position in the image.
    """
    from skimage import transform  # slow to import, and only needed here

    rotate: Callable[..., Any] = transform.rotate
    size = MEMBRANE_PATCH_PX
    line = np.zeros((size, size))
    line[:, size // 2] = 1
    kernels = []
    for angle in range(0, 180, MEMBRANE_STEP_DEG):
        weights = np.asarray(rotate(line, angle), np.float32)
        weights[weights < 1e-6] = 0  # what rounding leaves of rotated zeros
        upright = np.any(weights, axis=1).sum() >= np.any(weights, axis=0).sum()
        pieces = []
        for start in range(0, size, 5):
            part = np.zeros_like(weights)
            block = np.s_[start : start + 5, :] if upright else np.s_[:, start : start + 5]
            part[block] = weights[block]
            rows, cols = np.nonzero(part)
            if rows.size:
                piece = part[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1].copy()
                pieces.append((int(rows.min()), int(cols.min()), piece))
        kernels.append(tuple(pieces))
    return tuple(kernels)


@lru_cache(maxsize=64)
def _gaussian_kernel(sigma_px: float) -> NDArray[np.float64]:
    radius = gaussian_radius_px(sigma_px)
    if radius == 0:
        return np.ones(1)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_px) ** 2)
    return np.asarray(kernel / kernel.sum(), np.float64)


def _vertical(source: Floats, kernel: NDArray[np.float64]) -> Floats:
    """Filter along columns; only rows that see no border are returned."""
    result = np.empty(source.shape, np.float32)
    for first in range(0, source.shape[1], _COLUMN_BLOCK_PX):
        block = np.s_[:, first : first + _COLUMN_BLOCK_PX]
        cv2.sepFilter2D(source[block], -1, _UNIT, kernel, dst=result[block], borderType=cv2.BORDER_REPLICATE)
    radius = len(kernel) // 2
    return result[radius : len(result) - radius]


def _horizontal(source: Floats, kernel: NDArray[np.float64]) -> Floats:
    """Filter along rows; as many columns at either end as the kernel's radius are meaningless."""
    return np.asarray(cv2.sepFilter2D(source, -1, kernel, _UNIT, borderType=cv2.BORDER_REPLICATE), np.float32)


def _replicate(values: Floats, first: int, count: int) -> None:
    """Repeat the outermost image rows beyond the image; ``values[i]`` is row first + i of ``count``."""
    values[: max(0, -first)] = values[max(0, -first)]
    values[max(0, count - first) :] = values[min(len(values), count - first) - 1]


def _extend_differences(values: Floats, first: int, count: int) -> None:
    """Extend forward differences by two entries beyond the image; ``values[i]`` is G[first + i + 1] − G[first + i].

    Repeating the outermost difference makes central differences one-sided at the border, as in ``numpy.gradient``;
    going on linearly after that does the same for second ones.
    """
    if count == 1:
        values[...] = 0
        return
    low, high = -first, count - 2 - first  # where G's first and last differences are
    if low >= 1:
        values[low - 1] = values[low]
    if high + 1 < len(values):
        values[high + 1] = values[high]
    if low >= 2:
        values[low - 2] = 2 * values[low] - values[low + 1]
    if high + 2 < len(values):
        values[high + 2] = 2 * values[high] - values[high - 1]


def strips_of(rows: int, cols: int) -> list[slice]:
    step = max(4, _STRIP_PX // cols)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _lanes(width: int) -> int:
    return -(-width // _LANE_PX) * _LANE_PX
