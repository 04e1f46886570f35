"""The intensity window: any dtype → uint8, the same for all images of a recipe, never chosen per image or tile.

    grey level   low ────────────── high          below low: 0, above high: 255,
    uint8         0 ──────────────── 255          between: rint(255 · (x - low) / (high - low)), half to even
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import ImageError, UsageError

U8 = npt.NDArray[np.uint8]
Pixels = npt.NDArray[Any]

# Pixels a step: the temporary float64 or index arrays stay at 2 MiB, in cache, whatever the image's size.
_BLOCK_PX = 1 << 18
# Values that a joint percentile of wide types is taken from; a regular sample of more gives the same to four digits.
_SAMPLE = 1 << 24
_AUTO_PERCENTILES = (0.5, 99.5)
_MODES = "auto, full, LOW:HIGH (grey levels), or percentile:LOW,HIGH (0 to 100)"
_REMEDY = "give the window as LOW:HIGH"


@dataclass(frozen=True)
class IntensityWindow:
    """Grey levels that become 0 and 255.

    Attributes
    ----------
    low, high
        In the image's own units; finite, low < high.
    kind
        The type whose grey levels these are: an integer type's name, or ``float`` for all real types. None, for a window
        given in numbers: any type.

    Raises
    ------
    UsageError
        Bounds that are no window.
    """

    low: float
    high: float
    kind: str | None = None

    def __post_init__(self) -> None:
        span = (float(self.high) - float(self.low)) * 255.0
        if not (math.isfinite(self.low) and math.isfinite(self.high) and math.isfinite(span) and span > 0):
            raise UsageError(f"the intensity window is {self.low}:{self.high}, expected two finite numbers LOW < HIGH; "
                             "give others")

    def apply(self, image: Pixels) -> U8:
        """Map grey levels to uint8, each channel alike.

        Parameters
        ----------
        image
            Array of any shape, of integers or real numbers.

        Returns
        -------
        uint8 array of the same shape, 0–255; the image itself if it is uint8 and the window is 0:255.

        Raises
        ------
        ImageError
            A pixel is NaN or infinite, or the image is of another type than the window's: its grey levels mean something else.
        """
        if self.kind is not None and kind_of(image) != self.kind:
            raise ImageError(f"the image is {kind_of(image)}, but the intensity window {self.low:g}:{self.high:g} was chosen on "
                             f"{self.kind} images; convert the image, or fit with such images or with --window LOW:HIGH")
        if image.dtype == np.uint8 and (self.low, self.high) == (0, 255):
            return image
        out = np.empty(image.shape, np.uint8)
        source, target = np.ascontiguousarray(image).reshape(-1), out.reshape(-1)
        by_table = image.dtype in (np.uint8, np.int8, np.uint16, np.int16)
        if by_table:
            unsigned = np.dtype(f"u{image.dtype.itemsize}")
            table = self._levels(np.arange(2 ** (8 * image.dtype.itemsize)).astype(unsigned).view(image.dtype))
            source = source.view(unsigned)
        for start in range(0, source.size, _BLOCK_PX):
            block = source[start:start + _BLOCK_PX]
            target[start:start + _BLOCK_PX] = table[block] if by_table else self._levels(block)
        return out

    def _levels(self, values: Pixels) -> U8:
        # Multiplied before it is divided: exact for integers, so that halves are seen as halves.
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ImageError("the image has NaN or infinite pixels, expected real numbers; replace them by real values")
        levels = (np.clip(values.astype(np.float64), self.low, self.high) - self.low) * 255.0 / (self.high - self.low)
        rounded: U8 = np.rint(levels).astype(np.uint8)
        return rounded

    @classmethod
    def fit(cls, images: Sequence[Pixels], mode: str = "auto") -> Self:
        """Choose one window for all of `images`.

        Parameters
        ----------
        images
            Arrays as `phaseline.clients.images.read_image` gives them.
        mode
            ``auto``: 0:255 for uint8, else percentiles 0.5 and 99.5 of all pixels together.
            ``full``: the range of an integer type; the least and greatest value of floats.
            ``LOW:HIGH``: these grey levels. ``percentile:LOW,HIGH``: these percentiles of all pixels together.

        Raises
        ------
        UsageError
            Another mode, or bounds that are no window.
        ImageError
            No window exists: constant images; images of different types, whose grey levels don't compare.
        """
        if explicit := re.fullmatch(r"\s*([^:\s]+)\s*:\s*([^:\s]+)\s*", mode):
            numbers = _numbers(explicit.groups())
            if numbers is not None:
                return cls(*numbers)
        percentiles = _percentiles(mode)
        if percentiles is None and mode != "full":
            raise UsageError(f"the intensity window is {mode!r}, expected {_MODES}; give one of these")
        if not images:
            raise UsageError("no image came to choose the intensity window from; give at least one")
        kinds = {kind_of(image) for image in images}
        if len(kinds) > 1:
            raise ImageError(f"images have the types {', '.join(sorted(kinds))}, expected one type for one window; "
                             f"convert them, or {_REMEDY}")
        dtype = images[0].dtype
        if mode == "auto" and dtype == np.uint8:
            low, high = 0.0, 255.0
        elif mode == "full" and dtype.kind in "iu":
            low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
        elif percentiles is None:
            low, high = float(min(i.min() for i in images)), float(max(i.max() for i in images))
        else:
            low, high = _joint_percentiles(images, percentiles)
        if math.isnan(low) or math.isnan(high):
            raise ImageError("the images have NaN pixels, expected real numbers; replace them by real values")
        if not low < high:
            raise ImageError(f"the intensity window {mode!r} of these images is {low:g} to {high:g}: they are "
                             f"constant, or nearly so; expected contrast; give other images, or {_REMEDY}")
        return cls(low, high, kinds.pop())


def kind_of(image: Pixels) -> str:
    """Name of an image's integer type, or ``float`` for all real types."""
    return "float" if image.dtype.kind == "f" else image.dtype.name


def without_equal_channels(image: Pixels) -> Pixels:
    """Grey that was saved as RGB as grey: an array (rows, cols, 3) of three equal channels as (rows, cols)."""
    if image.ndim == 3 and image.shape[2] == 3 and all(np.array_equal(image[..., 0], image[..., i]) for i in (1, 2)):
        return np.ascontiguousarray(image[..., 0])
    return image


def to_grey(image: U8) -> U8:
    """Rec. 601 luma, 0.299 R + 0.587 G + 0.114 B in fixed point: uint8 (rows, cols) from that or (rows, cols, 3)."""
    _check_view(image)
    if image.ndim == 2:
        return image
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), np.uint8)


def to_channels(image: U8, channels: int) -> U8:
    """Bring an image to the number of channels that a recipe works on.

    Parameters
    ----------
    image
        uint8 array of shape (rows, cols) or (rows, cols, 3).
    channels
        1: grey, the luma of RGB. 3: RGB, grey repeated.

    Returns
    -------
    uint8 array of shape (rows, cols) or (rows, cols, 3).
    """
    if channels == 1:
        return to_grey(image)
    if channels == 3:
        _check_view(image)
        return image if image.ndim == 3 else np.ascontiguousarray(np.broadcast_to(image[..., None], (*image.shape, 3)))
    raise UsageError(f"{channels} channels were asked for, expected 1 (grey) or 3 (RGB); choose one of these")


def _check_view(image: Pixels) -> None:
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        raise ImageError(f"an image of {image.dtype} and shape {image.shape} came, expected uint8 of shape (rows, "
                         "cols) or (rows, cols, 3); apply an intensity window first")


def _numbers(texts: Sequence[str]) -> tuple[float, float] | None:
    try:
        low, high = (float(text) for text in texts)
    except ValueError:
        return None
    return low, high


def _percentiles(mode: str) -> tuple[float, float] | None:
    if mode == "auto":
        return _AUTO_PERCENTILES
    name, _, rest = mode.partition(":")
    numbers = _numbers(parts) if name == "percentile" and len(parts := rest.split(",")) == 2 else None
    if numbers is not None and not 0 <= numbers[0] < numbers[1] <= 100:
        raise UsageError(f"the intensity window is {mode!r}, expected percentiles 0 ≤ LOW < HIGH ≤ 100; give others")
    return numbers


def _joint_percentiles(images: Sequence[Pixels], percentiles: tuple[float, float]) -> tuple[float, float]:
    step = -(-sum(image.size for image in images) // _SAMPLE)
    sample = np.concatenate([image.reshape(-1)[::step] for image in images])
    low, high = np.percentile(sample, percentiles)
    return float(low), float(high)
