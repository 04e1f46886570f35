"""Images that exporting looks at: the user's, or those that come with scikit-image. Each in several views."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from phaseline.runtime.contract import U8
from phaseline.runtime.errors import ImageError, MissingInputError

# Textured images that scikit-image's wheel holds, so that reading them downloads nothing.
BUNDLED = ("brick", "camera", "cell", "coins", "grass", "gravel", "immunohistochemistry", "microaneurysms", "moon",
           "page", "text")
SUFFIXES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
# Rec. 709, scikit-image's.
_LUMA = np.array([0.2125, 0.7154, 0.0721])


@dataclass(frozen=True)
class View:
    """One way to look at an image: flip, shift, change of contrast.

    Attributes
    ----------
    flips
        Axes of (rows, cols) to reverse.
    shift_px
        Rows and columns that the tile is displaced by.
    contrast
        Factor on the distance from mid-grey, 128; the result is clipped to 0–255.
    """

    flips: tuple[int, ...] = ()
    shift_px: tuple[int, int] = (0, 0)
    contrast: float = 1.0


VIEWS = (View(), View(flips=(0,), shift_px=(3, 1)), View(flips=(1,), contrast=0.7),
         View(flips=(0, 1), shift_px=(1, 3), contrast=1.3))


def load_images(folder: Path | None, in_channels: int) -> list[U8]:
    """Load the calibration images.

    Parameters
    ----------
    folder
        Folder of images, 8- or 16-bit or float, grey or RGB; None for scikit-image's.
    in_channels
        1: they are made grey; 3: made RGB.

    Returns
    -------
    uint8 arrays of shape (in_channels, rows, cols); other types are stretched to 0–255 between their extremes.

    Raises
    ------
    MissingInputError
        The folder does not exist, or holds no image.
    ImageError
        An image cannot be read.
    """
    if folder is None:
        from skimage import data

        return [_planes(getattr(data, name)(), in_channels, name) for name in BUNDLED]
    if not folder.is_dir():
        raise MissingInputError(f"no folder of calibration images at {folder}")
    files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
    if not files:
        raise MissingInputError(f"{folder} holds no image; expected some of {', '.join(sorted(SUFFIXES))}")
    return [load_image(file, in_channels) for file in files]


def load_image(file: Path, in_channels: int) -> U8:
    """One image file as `load_images` reads it: uint8 array of shape (channels, rows, cols).

    Raises
    ------
    ImageError
        It cannot be read.
    """
    return _planes(_read(file), in_channels, str(file))


def views_of(image: U8, tile_px: int) -> Iterator[U8]:
    """Every view of an image's middle, as a tile.

    Parameters
    ----------
    image
        uint8 array of shape (channels, rows, cols); continued by reflection where it is smaller than the tile.
    tile_px
        T.

    Yields
    ------
    uint8 array of shape (1, channels, T, T).
    """
    for view in VIEWS:
        tile = np.flip(image, axis=[1 + axis for axis in view.flips])
        for axis in (1, 2):
            room = image.shape[axis] - tile_px
            positions = np.arange(tile_px) + room // 2 + view.shift_px[axis - 1]
            tile = np.take(tile, _reflected(positions, image.shape[axis]), axis=axis)
        stretched = 128 + view.contrast * (tile.astype(np.float64) - 128)
        yield np.ascontiguousarray(stretched.round().clip(0, 255).astype(np.uint8)[None])


def _reflected(positions: npt.NDArray[np.int_], length: int) -> npt.NDArray[np.int_]:
    """Positions outside an axis, mirrored into it about its first and last element."""
    if length == 1:
        return np.zeros_like(positions)
    folded = positions % (2 * length - 2)
    return np.where(folded < length, folded, 2 * length - 2 - folded)


def _read(file: Path) -> npt.NDArray[Any]:
    try:
        if file.suffix.lower() in {".tif", ".tiff"}:
            stored: npt.NDArray[Any] = tifffile.imread(file)
            return stored
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB") if image.mode in {"P", "CMYK", "LA"} else image)
    except (OSError, ValueError, SyntaxError, tifffile.TiffFileError) as error:
        raise ImageError(f"{file} cannot be read as an image ({error}); remove it from the folder") from error


def _planes(image: npt.NDArray[Any], in_channels: int, name: str) -> U8:
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)) or 0 in image.shape:
        raise ImageError(f"{name} has shape {image.shape}, expected (rows, cols) or (rows, cols, 3)")
    values = image[..., :3].astype(np.float64) if image.ndim == 3 else image.astype(np.float64)
    if not np.isfinite(values).all():
        raise ImageError(f"{name} holds NaN or infinity; remove it from the calibration folder")
    if image.dtype != np.uint8:
        low, high = float(values.min()), float(values.max())
        values = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    if in_channels == 1:
        planes = (values @ _LUMA if values.ndim == 3 else values)[None]
    else:
        planes = np.moveaxis(values, 2, 0) if values.ndim == 3 else np.repeat(values[None], 3, axis=0)
    return planes.round().clip(0, 255).astype(np.uint8)
