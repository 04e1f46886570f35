"""Volumes in TIFF: a folder with one plane a file, or the pages of one file (BigTIFF, ImageJ, OME-TIFF too).

    folder   slice_0001.tif …   ─┐
    file     page, page, page … ─┼─▶ _Page: where its strips or tiles lie ──▶ only those that a block needs, decoded
    ImageJ   one run of planes  ─┘         └── uncompressed in one piece: only the rows

tifffile says where things lie and how to decode them; each read opens the file anew, so threads share nothing.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import tifffile

from phaseline.clients.volumes.raw import read_into
from phaseline.clients.volumes.reader import (
    DAMAGE,
    Missing,
    Reader,
    choose_planes,
    fingerprint_of,
    native,
    plain_dtype,
    reason_of,
    refuse_missing,
    split_dataset,
    voxel_of,
)
from phaseline.clients.volumes.volume import Box, VolumeInfo, Voxels, VoxelSize
from phaseline.runtime.errors import MissingInputError, PhaselineError, UsageError, VolumeError

SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
"""Of TIFF files, BigTIFF's own among them."""

_PARSING = threading.Lock()


@dataclass(frozen=True)
class _Page:
    """Where one plane's pixels lie, and how to decode them.

    ``offsets`` and ``counts`` are those of its strips or tiles; where all rows lie uncompressed in one piece, there is one, and
    ``decode`` is None.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, int]
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    decode: Callable[..., Any] | None
    tables: bytes | None
    white: int | None
    inverted: bool

    @classmethod
    def of(cls, page: Any, offset: int | None = None) -> _Page:
        """From a page of tifffile's; `offset` if the plane is another, uncompressed, that begins there."""
        key = page.keyframe
        offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
        if len(offsets) != len(counts) or len(offsets) < math.prod(key.chunked):
            raise ValueError("the list of its strips or tiles is damaged")
        if offset is None and key.is_final and (offsets[:-1] + counts[:-1] == offsets[1:]).all():
            offset = int(offsets[0])
        if offset is not None:
            offsets, counts = np.array([offset], np.int64), np.array([key.nbytes], np.int64)
        return cls(Path(page.parent.filehandle.path), np.dtype(key.dtype).newbyteorder(key.parent.byteorder),
                   (key.imagelength, key.imagewidth), offsets, counts, None if offset is not None else key.decode,
                   page.jpegtables, 2**key.bitspersample - 1 if 1 < key.bitspersample < 8 else None,
                   key.photometric == tifffile.PHOTOMETRIC.MINISWHITE)

    def read(self, file: BinaryIO, box: Box, missing: Missing, name: str) -> Voxels:
        """Its part of a block: array of shape (rows, cols) in native byte order; the values as `read_image` gives them."""
        (plane, y0, x0), (_, y1, x1) = box.start, box.stop
        if self.decode is None:
            rows = np.empty((y1 - y0, self.shape[1]), self.dtype)
            file.seek(int(self.offsets[0]) + y0 * self.shape[1] * self.dtype.itemsize)
            read_into(file, rows)
            return self._values(rows[:, x0:x1])
        part = np.zeros((y1 - y0, x1 - x0), self.dtype.newbyteorder("="))
        for index, (offset, count) in enumerate(zip(self.offsets, self.counts, strict=True)):
            _, (_, _, top, left, _), (_, height, width, _) = self.decode(None, index)
            rows_, cols_ = _overlap(top, height, y0, y1), _overlap(left, width, x0, x1)
            if not rows_ or not cols_:
                continue
            if count == 0:
                if missing == "refuse":
                    what = f"the strip or tile at row {top}, column {left} of {self.path.name} was never written"
                    refuse_missing(name, what, plane)
                continue
            data = np.empty(int(count), np.uint8)
            file.seek(int(offset))
            read_into(file, data)
            pixels = self.decode(data.tobytes(), index, jpegtables=self.tables)[0][0, :, :, 0]
            part[rows_.start - y0:rows_.stop - y0, cols_.start - x0:cols_.stop - x0] = pixels[
                rows_.start - top:rows_.stop - top, cols_.start - left:cols_.stop - left]
        return self._values(part)

    def _values(self, pixels: Voxels) -> Voxels:
        pixels = native(pixels)
        if self.white is not None:
            pixels = (pixels.astype(np.uint16) * 255 // self.white).astype(np.uint8)
        if self.inverted:
            pixels = ~pixels if pixels.dtype.kind in "iu" else -pixels
        return pixels


class TiffVolume(Reader):
    """The pages of one TIFF file.

    Parameters
    ----------
    path
        The file.
    dataset
        Choices where it has more than planes, rows and columns: ``c=0,t=1``, ``series=1``, or ``z=t`` to take times for planes.
    missing
        What to do about strips and tiles that were never written.
    """

    def __init__(self, path: Path, dataset: str | None = None, missing: Missing = "refuse") -> None:
        super().__init__(path)
        self._missing: Missing = missing
        inner, self._choices = split_dataset(dataset)
        if inner is not None:
            raise UsageError(f"{path} was asked for the dataset {inner!r}, but TIFF has none; choose with c=0, t=0 or series=0")
        self._pages: list[_Page | str] = []

    def _open(self) -> VolumeInfo:
        with parsed_tiff(self.path) as tiff:
            _check_chain(self.path, tiff)
            choices = dict(self._choices)
            series = _choose_series(self.path, tiff, choices.pop("series", None))
            key = series.keyframe
            _check_grey(str(self.path), key)
            planes = choose_planes(tuple(series.axes.lower()), series.shape, choices, str(self.path))
            shape = planes.of(series.shape)
            lead = series.shape[:-2]
            numbers = [int(np.ravel_multi_index(planes.index(z), lead)) if lead else 0 for z in range(shape[0])]
            start = series.dataoffset
            if start is not None:
                self._pages = [_Page.of(key, start + number * key.nbytes) for number in numbers]
            else:
                self._pages = [_page_or_reason(series[number]) for number in numbers]
            chosen = ",".join(f"{axis}={index}" for axis, index in self._choices.items())
            files = sorted({self.path, *(page.path for page in self._pages if isinstance(page, _Page))})
            return VolumeInfo(f"{self.path}:{chosen}" if chosen else str(self.path), "tiff", shape,
                              plain_dtype(np.dtype(key.dtype), str(self.path)), _chunks(key), _voxel_size(tiff, series),
                              fingerprint_of(files, chosen, shape))

    def _close(self) -> None:
        self._pages = []

    def _voxels(self, box: Box) -> Voxels:
        voxels = np.empty(box.shape, self.info.dtype)
        with ExitStack() as files:
            opened: dict[Path, BinaryIO] = {}
            for plane in range(box.start[0], box.stop[0]):
                page = self._pages[plane]
                if isinstance(page, str):
                    raise VolumeError(f"{self.info.name}: plane {plane} cannot be read, {page}; copy or export the file again")
                if page.path not in opened:
                    opened[page.path] = files.enter_context(page.path.open("rb", buffering=0))
                voxels[plane - box.start[0]] = page.read(opened[page.path], _one_plane(box, plane), self._missing, self.info.name)
        return voxels


class TiffFolder(Reader):
    """A folder with one plane a file, in the order of the numbers in their names; other files and hidden ones are ignored."""

    def __init__(self, path: Path, missing: Missing = "refuse") -> None:
        super().__init__(path)
        self._missing: Missing = missing
        self._files: list[Path] = []

    def _open(self) -> VolumeInfo:
        self._files = sorted((file for file in self.path.iterdir() if file.suffix.lower() in SUFFIXES
                              and not file.name.startswith(".") and file.is_file()), key=_natural)
        if not self._files:
            raise MissingInputError(f"{self.path} holds no TIFF files; give a folder with one plane a file")
        kinds: dict[Path, tuple[tuple[int, int], np.dtype[Any]]] = {}
        damaged: dict[Path, str] = {}
        chunks = (1, 1, 1)
        for file in self._files:
            # A plane that is damaged fails when it is read: the others are of use.
            try:
                with parsed_tiff(file) as tiff:
                    page = _only_page(file, tiff)
                    kinds[file] = (page.imagelength, page.imagewidth), np.dtype(page.dtype)
                    chunks = _chunks(page)
            except PhaselineError:
                raise
            except DAMAGE as error:
                damaged[file] = reason_of(error)
        if not kinds:
            raise VolumeError(f"{self.path}: plane 0 cannot be read, nor can any other, {self._files[0].name} is damaged or "
                              f"truncated ({damaged[self._files[0]]}); copy or export the folder again")
        usual = Counter(kinds.values()).most_common(1)[0][0]
        for file, kind in kinds.items():
            if kind != usual:
                raise VolumeError(f"{file} has the shape {kind[0]} and type {kind[1]}, expected {usual[0]} and {usual[1]} as "
                                  f"most planes in {self.path} have; take it out, or export it again")
        shape = (len(self._files), *usual[0])
        return VolumeInfo(str(self.path), "tiff folder", shape, plain_dtype(usual[1], str(self.path)), chunks, None,
                          fingerprint_of(self._files, shape))

    def _close(self) -> None:
        self._files = []

    def _voxels(self, box: Box) -> Voxels:
        info = self.info
        voxels = np.empty(box.shape, info.dtype)
        for plane in range(box.start[0], box.stop[0]):
            file = self._files[plane]
            try:
                with parsed_tiff(file) as tiff:
                    page = _Page.of(_only_page(file, tiff))
                if page.shape != info.shape[1:] or plain_dtype(page.dtype, str(file)) != info.dtype:
                    raise ValueError(f"it has become {page.dtype} of shape {page.shape}")
                with file.open("rb", buffering=0) as stream:
                    voxels[plane - box.start[0]] = page.read(stream, _one_plane(box, plane), self._missing, info.name)
            except PhaselineError:
                raise
            except DAMAGE as error:
                raise VolumeError(f"{info.name}: plane {plane} cannot be read, {file.name} is damaged, truncated or gone "
                                  f"({reason_of(error)}); copy or export it again") from error
        return voxels


@contextmanager
def parsed_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """A file as tifffile understands it, without what it logs of damaged ones: that is said in one error."""
    logger = logging.getLogger("tifffile")
    with _PARSING:
        before = logger.disabled
        logger.disabled = True
        try:
            with tifffile.TiffFile(path) as tiff:
                yield tiff
        finally:
            logger.disabled = before


def is_tiff_stack(path: Path) -> bool:
    """Whether a TIFF file has more than one page of full size; False for one that cannot be read."""
    try:
        with parsed_tiff(path) as tiff:
            if (tiff.imagej_metadata or {}).get("images", 1) > 1 or tiff.pages.first.imagedepth > 1:
                return True
            if len(_two_pages(tiff)) == 2:
                return True
            # One page may stand for all planes.
            return bool(tiff.is_shaped) and math.prod(tiff.series[0].shape) > math.prod(tiff.pages[0].shape)
    except DAMAGE:
        return False


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _one_plane(box: Box, plane: int) -> Box:
    return Box((plane, *box.start[1:]), (plane + 1, *box.stop[1:]))


def _overlap(first: int, length: int, start: int, stop: int) -> range:
    return range(max(first, start), min(first + length, stop))


def _chunks(page: Any) -> tuple[int, int, int]:
    if page.is_tiled:
        return 1, min(page.tilelength, page.imagelength), min(page.tilewidth, page.imagewidth)
    return 1, 1 if page.is_final else min(page.rowsperstrip, page.imagelength), page.imagewidth


def _check_grey(name: str, page: Any) -> None:
    if page.imagedepth > 1:
        raise VolumeError(f"{name} has pages of {page.imagedepth} planes, expected one plane a page; save it as a stack of pages")
    if page.dtype is None:
        raise VolumeError(f"{name} has voxels of {page.bitspersample} bits in an unknown format; export integers or real numbers")
    grey_table = page.colormap is None or (np.asarray(page.colormap) >> 8 == np.arange(page.colormap.shape[-1])).all()
    if page.samplesperpixel > 1 or (page.photometric == tifffile.PHOTOMETRIC.PALETTE and not grey_table):
        raise VolumeError(f"{name} has pages in colour ({page.samplesperpixel} values a voxel, {page.photometric.name}), "
                          "expected one grey value a voxel; convert it to grey")


def _two_pages(tiff: Any) -> list[Any]:
    """The first two pages of full size; fewer if there are not as many."""
    return list(islice((page for page in tiff.pages if not (page.is_reduced or page.is_mask)), 2))


def _only_page(path: Path, tiff: tifffile.TiffFile) -> Any:
    pages = _two_pages(tiff)
    if not pages:
        raise ValueError("it holds no page")
    if len(pages) > 1:
        raise VolumeError(f"{path} holds several pages, expected one plane a file; put only files of one plane into the folder")
    _check_grey(str(path), pages[0])
    return pages[0]


def _page_or_reason(page: Any) -> _Page | str:
    if page is None:
        return "the page or file that should hold it is missing"
    try:
        return _Page.of(page)
    except DAMAGE as error:
        return reason_of(error)


def _check_chain(path: Path, tiff: tifffile.TiffFile) -> None:
    """Each page says where the next one is; tifffile takes a chain that leads out of the file for its end."""
    count, kind, file = len(tiff.pages), tiff.tiff, tiff.filehandle
    file.seek(tiff.pages[count - 1].offset)
    (tags,) = struct.unpack(kind.tagnoformat, file.read(kind.tagnosize))
    file.seek(tags * kind.tagsize, 1)
    following = file.read(kind.offsetsize)
    if len(following) < kind.offsetsize or any(following):
        raise VolumeError(f"{path} is truncated: it ends after {file.size} bytes and {count} pages, the last of which names one "
                          f"more, so plane {count} is the first that cannot be read; copy or export it again")


def _choose_series(path: Path, tiff: tifffile.TiffFile, choice: str | None) -> Any:
    found = [series for series in tiff.series if not (series.keyframe.is_reduced or series.keyframe.is_mask)]
    if not found:
        raise VolumeError(f"{path} holds no readable page, so plane 0 cannot be read, it is damaged or truncated; copy it again")
    listed = "; ".join(f"series={i}: {s.shape} of {s.dtype}" for i, s in enumerate(found))
    if choice is not None and not (choice.isdecimal() and int(choice) < len(found)):
        raise UsageError(f"{path} has no series {choice}; choose one of {listed}")
    if choice is None and len(found) > 1:
        raise UsageError(f"{path} holds {len(found)} series of pages that differ, expected one; choose with --dataset: {listed}")
    series = found[int(choice or 0)]
    if series.kind in ("generic", "uniform") and (tiff.is_imagej or tiff.is_ome or tiff.is_shaped):
        raise VolumeError(f"{path} is truncated or damaged: it has {tiff.filehandle.size} bytes and {len(tiff.pages)} pages, "
                          "expected those that its ImageJ, OME or tifffile metadata promise; copy or export it again")
    return series


def _voxel_size(tiff: tifffile.TiffFile, series: Any) -> VoxelSize | None:
    if tiff.is_ome and tiff.ome_metadata:
        images = [e for e in ElementTree.fromstring(tiff.ome_metadata).iter() if e.tag.endswith("}Pixels")]
        number = tiff.series.index(series)
        pixels = images[number if number < len(images) else 0].attrib
        sizes = [float(pixels[f"PhysicalSize{axis}"]) if f"PhysicalSize{axis}" in pixels else None for axis in "ZYX"]
        return voxel_of(sizes, [pixels.get(f"PhysicalSize{axis}Unit", "µm") for axis in "ZYX"])
    if tiff.imagej_metadata is not None:
        cols, rows = tiff.pages[0].get_resolution()
        # ImageJ leaves out a spacing of one.
        sizes = [tiff.imagej_metadata.get("spacing", 1.0), 1 / rows if rows else None, 1 / cols if cols else None]
        return voxel_of(sizes, [str(tiff.imagej_metadata.get("unit", ""))] * 3)
    return None
