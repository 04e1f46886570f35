"""The only code that opens and writes 2-D image files: PNG, TIFF, JPEG, BMP, NPY.

    file ──▶ image_formats.read_stored ──▶ read_image           grey or RGB, as a viewer shows it
                                  └──────▶ labels.read_labels   the numbers in the file, palette indices too
"""

from __future__ import annotations

import os
import re
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from phaseline.clients.image_formats import Pixels, read_stored
from phaseline.clients.window import without_equal_channels
from phaseline.runtime.errors import ImageError, MissingInputError, OutputError, OutputExistsError, UsageError

SUFFIXES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".npy")
OUTPUT_SUFFIXES = (".png", ".tif", ".tiff", ".npy")


def read_image(path: Path) -> Pixels:
    """Read a 2-D image.

    Parameters
    ----------
    path
        PNG, TIFF, JPEG, BMP or NPY file.

    Returns
    -------
    Array of shape (rows, cols), or (rows, cols, 3) in the order RGB; C-contiguous, native byte order. The dtype is the
    file's: uint8, uint16, uint32, int16, int32, float32 or float64. Boolean and 1- to 4-bit grey is spread over 0–255
    as uint8, int8 and float16 are widened, 64-bit integers narrowed where their values fit into 32 bits. Palettes
    become RGB; RGB with three equal channels becomes grey; alpha is dropped (transparent pixels keep their colour).

    Raises
    ------
    MissingInputError
        There is no such file.
    ImageError
        A folder; an empty, truncated or foreign file; a volume; complex, NaN or infinite pixels.
    """
    stored = read_stored(path)
    pixels = stored.pixels
    if stored.palette is not None:
        pixels = stored.palette[pixels]
    elif stored.white is not None:
        pixels = (pixels.astype(np.uint16) * 255 // stored.white).astype(np.uint8)
    if stored.inverted:
        pixels = ~pixels if pixels.dtype.kind in "iu" else -pixels
    pixels = without_equal_channels(pixels)
    if pixels.dtype.kind == "f":
        _require_finite(path, pixels)
    if pixels.dtype.kind in "iu" and pixels.dtype.itemsize == 8:
        pixels = _narrow(path, pixels)
    return np.ascontiguousarray(pixels)


def list_images(path: Path) -> list[Path]:
    """The image files that `path` stands for: itself if it is a file, else the files in that folder, not below it.

    Files are recognised by suffix, hidden ones are ignored, and numbers in names sort by value: slice2 before slice10.

    Raises
    ------
    MissingInputError
        Neither file nor folder, or a folder without images.
    UsageError
        Two images with the same stem: their outputs would overwrite each other.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise MissingInputError(f"{path} does not exist; give an image file or a folder of images")
    files = sorted((p for p in path.iterdir()
                    if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()), key=_natural)
    if not files:
        raise MissingInputError(f"{path} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    by_stem: dict[str, Path] = {}
    for file in files:
        twin = by_stem.setdefault(file.stem, file)
        if twin is not file:
            raise UsageError(f"{path} holds both {twin.name} and {file.name}, expected one image a name; rename one "
                             "of them")
    return files


def check_output(path: Path, overwrite: bool) -> None:
    """Make sure, before the work, that the file `path` can be written; creates its parent folders.

    Raises
    ------
    UsageError
        The suffix is none of `OUTPUT_SUFFIXES`.
    OutputExistsError
        It exists and `overwrite` is False.
    OutputError
        It is a folder, or its parent cannot be made or written.
    """
    path = Path(path)
    _check_suffix(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder, expected the name of a file to write; add a name such as "
                          f"{path / 'labels.png'}")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; choose another name or allow it with --overwrite")
    probe = _sibling(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Asking the permission bits would be wrong for root and on network file systems.
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); choose a folder that can") from error


def write_labels(path: Path, array: Pixels) -> None:
    """Write a grey image, atomically: uint8 or uint16 array of shape (rows, cols).

    Raises
    ------
    UsageError
        Another dtype or shape, or a suffix other than those of `OUTPUT_SUFFIXES`.
    OutputError
        The file cannot be written; an earlier one of that name is then unharmed.
    """
    _write(Path(path), array, 2)


def write_rgb(path: Path, array: Pixels) -> None:
    """Write a colour image, atomically: uint8 or uint16 array of shape (rows, cols, 3). Raises as `write_labels`."""
    _write(Path(path), array, 3)


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array of any real dtype and shape as .npy, atomically. Raises as `write_labels`."""
    path = Path(path)
    if path.suffix != ".npy":
        raise UsageError(f"{path} ends in {path.suffix!r}, expected .npy; rename the output")
    _replace(path, array)


def _require_finite(path: Path, pixels: Pixels) -> None:
    bad = ~np.isfinite(pixels)
    count = int(np.count_nonzero(bad))
    if count:
        first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        raise ImageError(f"{path} has {count} NaN or infinite pixels, the first at (row, column) {first[:2]}; "
                         "replace them by real values")


def _narrow(path: Path, pixels: Pixels) -> Pixels:
    low, high = int(pixels.min()), int(pixels.max())
    for dtype in (np.int32, np.uint32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return pixels.astype(dtype)
    raise ImageError(f"{path} has 64-bit values from {low} to {high}, expected at most 32 bits; save it as 32-bit "
                     "float")


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in OUTPUT_SUFFIXES:
        raise UsageError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(OUTPUT_SUFFIXES)}; rename the "
                         "output")


def _sibling(path: Path) -> Path:
    # Hidden, so that `list_images` passes it over; made by open(), so that the umask applies as to any other file.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")


def _write(path: Path, array: Pixels, ndim: int) -> None:
    _check_suffix(path)
    if array.dtype not in (np.uint8, np.uint16) or array.ndim != ndim or array.shape[2:] not in ((), (3,)):
        raise UsageError(f"cannot write an array of {array.dtype} and shape {array.shape} to {path}, expected uint8 "
                         f"or uint16 of shape {'(rows, cols)' if ndim == 2 else '(rows, cols, 3)'}; convert it")
    _replace(path, array)


def _replace(path: Path, array: npt.NDArray[Any]) -> None:
    """Write beside `path`, then move there."""
    part = _sibling(path)
    try:
        with part.open("xb") as file:
            try:
                _encode(file, path.suffix.lower(), np.ascontiguousarray(array))
                # The name must not appear before the content is on the disk.
                file.flush()
                os.fsync(file.fileno())
                file.close()
                part.replace(path)
            except BaseException:
                part.unlink()
                raise
    except (OSError, cv2.error) as error:
        raise OutputError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); "
                          "check the folder, its permissions and the space left") from error


def _encode(file: BinaryIO, suffix: str, array: npt.NDArray[Any]) -> None:
    match suffix:
        case ".png":
            file.write(cv2.imencode(".png", array[..., ::-1] if array.ndim == 3 else array)[1].data)
        case ".npy":
            np.save(file, array, allow_pickle=False)
        case _:
            photometric = "rgb" if array.ndim == 3 else "minisblack"
            tifffile.imwrite(file, array, photometric=photometric, compression="zlib", metadata=None)
