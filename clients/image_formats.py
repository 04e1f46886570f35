"""What 2-D image files hold, as numbers: the decoders behind `phaseline.clients.images`.

A file is recognised by its content, not by its name. Pillow decodes PNG, JPEG and BMP, tifffile (with imagecodecs) TIFF,
OpenCV the PNGs whose depth Pillow would reduce.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import lzma
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from phaseline.runtime.errors import ImageError, MissingInputError

Pixels = npt.NDArray[Any]
FileFormat = Literal["PNG", "TIFF", "JPEG", "BMP", "NPY"]

# 2 gigapixels: above any micrograph, below what would exhaust a workstation's memory by mistake.
MAX_PIXELS = 2**31

_SIGNATURES: tuple[tuple[bytes, FileFormat], ...] = (
    (b"\x89PNG\r\n\x1a\n", "PNG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"),
    (b"\xff\xd8\xff", "JPEG"), (b"BM", "BMP"), (b"\x93NUMPY", "NPY"))
_PILLOW: dict[str, type[ImageFile]] = {"PNG": PngImageFile, "JPEG": JpegImageFile, "BMP": BmpImageFile}
# Types that are neither in the contract nor lossy to bring into it.
_WIDER = {"f2": np.float32, "i1": np.int16}
# Decoders raise these for damaged files: few of them have an exception class of their own.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError,
           MemoryError, EOFError, struct.error, zlib.error, lzma.LZMAError, cv2.error, tifffile.TiffFileError)


@dataclass(frozen=True)
class StoredImage:
    """An image as its file holds it.

    Attributes
    ----------
    pixels
        Array of shape (rows, cols) or (rows, cols, 3), native byte order: grey levels, RGB, or palette indices. Grey of
        fewer than 8 bits is not spread out: 1-bit pixels are 0 and 1. Alpha is dropped.
    format
        The kind of file.
    palette
        uint8 or uint16 array of shape (n, 3), RGB, where `pixels` are indices into it.
    white
        The largest value that grey of fewer than 8 bits can have; None for others.
    inverted
        True if 0 is white (TIFF's MINISWHITE).
    transparent
        Boolean array of shape (rows, cols), True where alpha is 0; None for files without alpha.
    """

    pixels: Pixels
    format: FileFormat
    palette: Pixels | None = None
    white: int | None = None
    inverted: bool = False
    transparent: npt.NDArray[np.bool_] | None = None


def read_stored(path: Path) -> StoredImage:
    """Read a 2-D image file without interpreting its numbers; NaN and infinite values pass. Raises as `read_image`."""
    path = Path(path)
    if not path.exists():
        raise MissingInputError(f"{path} does not exist; give the path of an image file")
    if path.is_dir():
        raise ImageError(f"{path} is a folder, expected an image file; give one of the files in it")
    try:
        with path.open("rb") as file:
            head = file.read(32)
            found = next((kind for signature, kind in _SIGNATURES if head.startswith(signature)), None)
            if found is None:
                reason = "is empty (0 bytes)" if not head else "is not a PNG, TIFF, JPEG, BMP or NPY file"
                raise ImageError(f"{path} {reason}; export the image again in one of these formats")
            file.seek(0)
            match found:
                case "TIFF":
                    stored = _read_tiff(path)
                case "NPY":
                    stored = StoredImage(_read_npy(path), "NPY")
                case _:
                    stored = _read_with_pillow(path, file, found, head)
    except ImageError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise ImageError(f"{path} cannot be read as an image, it is damaged or truncated ({reason}); export it "
                         "again") from error
    return _checked(path, stored)


def _read_with_pillow(path: Path, file: io.BufferedReader, found: FileFormat, head: bytes) -> StoredImage:
    # The plugin's class instead of Image.open, whose limit on size is a global of Pillow, too low for stitched
    # micrographs.
    plugin = _PILLOW[found]
    image = plugin(file)
    _check_size(path, image.size)
    bits, colour_type = (head[24], head[25]) if found == "PNG" else (8, -1)
    if found == "PNG":
        # Loading stops at the last row: a damaged or missing end would pass.
        image.verify()
        file.seek(0)
        image = plugin(file)
    if bits == 16 and colour_type != 0:
        return _split_alpha(_decode_with_opencv(path), "PNG")
    image.load()
    # Cameras store how they were held, and labels are painted on what a viewer shows.
    pixels = np.array(ImageOps.exif_transpose(image) if found == "JPEG" else image)
    match image.mode:
        case "P":
            return StoredImage(pixels, found, palette=_palette(image))
        case "1":
            return StoredImage(pixels.astype(np.uint8), found, white=1)
        case "L" if bits < 8:
            white = 2**bits - 1
            return StoredImage(pixels // np.uint8(255 // white), found, white=white)
        case "I":
            return StoredImage(pixels.astype(np.uint16), found)
        case "L" | "LA" | "RGB" | "RGBA" | "I;16" | "I;16B":
            return _split_alpha(pixels, found)
    raise ImageError(f"{path} has the colour mode {image.mode}, expected grey, RGB or a palette; convert it to RGB")


def _palette(image: Image.Image) -> Pixels:
    colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    # Damaged or sloppy files hold indices beyond their palette; viewers show them black.
    return np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)])


def _decode_with_opencv(path: Path) -> Pixels:
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise ValueError("the decoder gave up")
    return pixels[..., [2, 1, 0, 3][:pixels.shape[2]]] if pixels.ndim == 3 else pixels


def _split_alpha(pixels: Pixels, found: FileFormat) -> StoredImage:
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        colours = pixels[..., 0] if pixels.shape[2] == 2 else pixels[..., :3]
        return StoredImage(np.ascontiguousarray(colours), found, transparent=pixels[..., -1] == 0)
    return StoredImage(pixels, found)


def _read_tiff(path: Path) -> StoredImage:
    with _quiet_tifffile(), tifffile.TiffFile(path) as tiff:
        page = _only_page(path, tiff)
        _require_complete(path, page)
        pixels = np.asarray(page.asarray(maxworkers=1))
        colormap = page.colormap
    samples = page.samplesperpixel
    if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and samples > 1:
        pixels = np.moveaxis(pixels.reshape(samples, page.imagelength, page.imagewidth), 0, -1)
    else:
        pixels = pixels.reshape(page.imagelength, page.imagewidth, *((samples,) if samples > 1 else ()))
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and colormap is not None:
        return StoredImage(pixels, "TIFF", palette=(np.asarray(colormap) >> 8).astype(np.uint8).T)
    return dataclasses.replace(_split_alpha(pixels, "TIFF"),
                               white=2**page.bitspersample - 1 if 1 < page.bitspersample < 8 else None,
                               inverted=page.photometric == tifffile.PHOTOMETRIC.MINISWHITE)


@contextlib.contextmanager
def _quiet_tifffile() -> Iterator[None]:
    """Keep tifffile from logging what it finds wrong in a damaged file, which is said in one error."""
    logger = logging.getLogger("tifffile")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


def _only_page(path: Path, tiff: tifffile.TiffFile) -> Any:
    series = [s for s in tiff.series if not (s.keyframe.is_reduced or s.keyframe.is_mask)]
    if not series:
        raise ImageError(f"{path} holds no readable image, it is damaged or truncated; export it again")
    if len(series) != 1:
        raise ImageError(f"{path} holds {len(series)} images of different kinds, expected one 2-D image; save it alone")
    page = series[0].keyframe
    samples = page.samplesperpixel
    shape = tuple(n for n in series[0].shape if n != 1)
    planes = np.prod(shape, dtype=np.int64) // (page.imagewidth * page.imagelength * samples)
    if planes > 1 or page.imagedepth > 1:
        _refuse_volume(path, shape)
    has_alpha = any(extra in (1, 2) for extra in page.extrasamples)
    if page.photometric == tifffile.PHOTOMETRIC.SEPARATED or samples not in ((1, 2, 3, 4) if has_alpha else (1, 3)):
        raise ImageError(f"{path} has {samples} channels a pixel ({page.photometric!s}), expected grey or RGB; "
                         "convert it")
    _check_size(path, (page.imagewidth, page.imagelength))
    return page


def _require_complete(path: Path, page: Any) -> None:
    # Before decoding: the decoders' own words for it are obscure, and OpenCV prints them.
    size_bytes = path.stat().st_size
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)]
    if not ends or max(ends) > size_bytes:
        raise ImageError(f"{path} is truncated: it has {size_bytes} bytes, expected {max(ends, default='more')}; "
                         "export it again")


def _read_npy(path: Path) -> Pixels:
    # Mapped first: numpy then compares the header with the length of the file before it allocates anything.
    return np.array(np.load(path, mmap_mode="r", allow_pickle=False))


def _checked(path: Path, stored: StoredImage) -> StoredImage:
    pixels = stored.pixels
    white = stored.white
    if pixels.dtype.kind not in "biuf" or pixels.dtype.itemsize > 8:
        raise ImageError(f"{path} has pixels of type {pixels.dtype}, expected integers or real numbers; convert it")
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[2] == 3):
        if pixels.ndim >= 3:
            _refuse_volume(path, pixels.shape)
        raise ImageError(f"{path} has the shape {pixels.shape}, expected (rows, cols) or (rows, cols, 3)")
    if pixels.size == 0:
        raise ImageError(f"{path} has the shape {pixels.shape}, hence no pixels; export it again")
    if pixels.dtype.kind == "b":
        pixels, white = pixels.astype(np.uint8), 1
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    pixels = pixels.astype(_WIDER.get(pixels.dtype.str[1:], pixels.dtype), copy=False)
    return dataclasses.replace(stored, pixels=pixels, white=white)


def _check_size(path: Path, size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{path} says that it has {size[1]} × {size[0]} pixels, expected at most {MAX_PIXELS}; cut "
                         "it into parts")


def _refuse_volume(path: Path, shape: Sequence[int]) -> None:
    raise ImageError(f"{path} is a volume or a stack of shape {tuple(shape)}, expected (rows, cols) or (rows, cols, "
                     "3); volumes come with a later version: save its planes as single images")
