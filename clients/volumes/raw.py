"""Volumes that are one array in one file: NPY, and raw numbers whose shape and type the user gives.

    2048x2048x2048:>u2:offset=512        planes x rows x columns : type : bytes before the first voxel

      file   │ offset │ plane 0: row, row, row … │ plane 1 … │     read row by row with plain reads: pages that a
                                                                 memory map touches would count as memory of the process
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from phaseline.clients.volumes.reader import Reader, fingerprint_of, native, plain_dtype
from phaseline.clients.volumes.volume import Box, VolumeInfo, Voxels
from phaseline.runtime.errors import UsageError, VolumeError

_LAYOUT = re.compile(r"(\d+)x(\d+)x(\d+):([<>=|]?[a-z]+\d*)(?::offset=(\d+))?", re.IGNORECASE)


@dataclass(frozen=True)
class RawLayout:
    """Where the voxels of a file lie.

    Attributes
    ----------
    shape
        Planes, rows, columns.
    dtype
        As stored, with its byte order.
    offset
        Bytes before the first voxel.
    reverse
        Whether planes, not columns, are neighbours in the file (Fortran order).
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int = 0
    reverse: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.offset < 0 or self.dtype.kind not in "biuf":
            raise UsageError(f"the layout of raw voxels is {self.shape}, {self.dtype}, offset {self.offset}; expected a shape "
                             "without zeros, integers or real numbers, and no negative offset")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a layout as it is given on the command line: ``2048x2048x2048:>u2:offset=0``; raises UsageError."""
        expected = "expected PLANESxROWSxCOLUMNS:TYPE[:offset=BYTES], such as 2048x2048x2048:>u2"
        if (found := _LAYOUT.fullmatch(text.strip())) is None:
            raise UsageError(f"the layout of raw voxels is {text!r}; {expected}")
        planes, rows, cols, dtype, offset = found.groups()
        try:
            stored = np.dtype(dtype)
        except TypeError as error:
            raise UsageError(f"the layout of raw voxels names the type {dtype!r}; {expected}") from error
        return cls((int(planes), int(rows), int(cols)), stored, int(offset or 0))

    @property
    def size(self) -> int:
        """Bytes of a file that has it."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


class _ArrayReader(Reader):
    """Reads an array that lies in one piece."""

    _layout: RawLayout

    def _describe(self, file_format: str) -> VolumeInfo:
        layout = self._layout
        planes, _, cols = layout.shape
        return VolumeInfo(str(self.path), file_format, layout.shape, plain_dtype(layout.dtype, str(self.path)),
                          (planes, 1, 1) if layout.reverse else (1, 1, cols), None, fingerprint_of([self.path], layout))

    def _check_size(self, exact: bool) -> None:
        layout, size_bytes = self._layout, self.path.stat().st_size
        if size_bytes < layout.size:
            whole = max(0, size_bytes - layout.offset) // (math.prod(layout.shape[1:]) * layout.dtype.itemsize)
            plane = 0 if layout.reverse else whole
            raise VolumeError(f"{self.path} is truncated: it has {size_bytes} bytes, expected {layout.size} for {layout.shape} "
                              f"of {layout.dtype}, so plane {plane} is the first that cannot be read; copy it again, or correct "
                              "the layout")
        if exact and size_bytes > layout.size:
            raise VolumeError(f"{self.path} has {size_bytes} bytes, expected {layout.size} for {layout.shape} of {layout.dtype} "
                              f"from byte {layout.offset} on; correct shape, type or offset")

    def _voxels(self, box: Box) -> Voxels:
        with self.path.open("rb", buffering=0) as file:
            if self._layout.reverse:
                mirrored = _read(file, self._layout, self._layout.shape[::-1], Box(box.start[::-1], box.stop[::-1]))
                return native(mirrored.transpose())
            return native(_read(file, self._layout, self._layout.shape, box))


class RawVolume(_ArrayReader):
    """Raw voxels; the file's length must be exactly what the layout says."""

    def __init__(self, path: Path, layout: RawLayout) -> None:
        super().__init__(path)
        self._layout = layout

    def _open(self) -> VolumeInfo:
        self._check_size(exact=True)
        return self._describe("raw")


class NpyVolume(_ArrayReader):
    """A 3-D array saved by numpy, in either order of axes."""

    def _open(self) -> VolumeInfo:
        shape, reverse, dtype, offset = npy_header(self.path)
        plain_dtype(dtype, str(self.path))
        if len(shape) != 3 or 0 in shape:
            raise VolumeError(f"{self.path} has the shape {shape}, expected planes, rows and columns; save it as a 3-D array")
        self._layout = RawLayout((shape[0], shape[1], shape[2]), dtype, offset, reverse)
        self._check_size(exact=False)
        return self._describe("npy")


def npy_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether it is in Fortran order, dtype, and bytes before the numbers; raises ValueError for another file."""
    with path.open("rb") as file:
        npy: Any = np.lib.format
        read_header = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
        shape, reverse, dtype = read_header(file)
        return tuple(shape), bool(reverse), dtype, file.tell()


def _read(file: BinaryIO, layout: RawLayout, shape: tuple[int, int, int], box: Box) -> Voxels:
    """A block of a C-ordered array: the rows it needs of each plane, then their part."""
    _, rows, cols = shape
    (z0, y0, x0), (z1, y1, x1) = box.start, box.stop
    voxels = np.empty(box.shape, layout.dtype)
    buffer = np.empty((y1 - y0, cols), layout.dtype)
    for plane in range(z0, z1):
        file.seek(layout.offset + (plane * rows + y0) * cols * layout.dtype.itemsize)
        read_into(file, buffer)
        voxels[plane - z0] = buffer[:, x0:x1]
    return voxels


def read_into(file: BinaryIO, array: Voxels) -> None:
    """Fill a C-contiguous array from where the file stands; raises EOFError if the file ends before."""
    view = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError(f"the file ends {len(view) - done} bytes too early")
        done += count
