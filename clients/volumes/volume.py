"""What a volume is to the rest of phaseline: three axes, a voxel size, and blocks read on demand.

    axes are plane, row, column          a Box is where a block lies:

        ┌────────────┐ rows                planes [z0, z1)  rows [y0, y1)  cols [x0, x1)
       ╱            ╱│
      ┌────────────┐ │ planes            read(box) touches what the box needs of the file, nothing else
      └────────────┘ ╱
           cols

Readers open on ``with``, never write, and may be asked by several threads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import UsageError

Axis = Literal["plane", "row", "col"]
AXES: tuple[Axis, ...] = get_args(Axis)

Voxels = npt.NDArray[Any]
"""Array of shape (planes, rows, cols) of any real dtype in native byte order, C-contiguous."""


@dataclass(frozen=True)
class Box:
    """A block: half-open intervals along the three axes.

    Attributes
    ----------
    start, stop
        First voxel, and the one behind the last, along plane, row and column.
    """

    start: tuple[int, int, int]
    stop: tuple[int, int, int]

    def __post_init__(self) -> None:
        if any(not 0 <= a < b for a, b in zip(self.start, self.stop, strict=True)):
            raise UsageError(f"a block from {self.start} to {self.stop} was asked for; expected 0 ≤ start < stop along each axis")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis."""
        planes, rows, cols = (b - a for a, b in zip(self.start, self.stop, strict=True))
        return planes, rows, cols

    @property
    def size(self) -> int:
        """Number of voxels."""
        planes, rows, cols = self.shape
        return planes * rows * cols

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """For indexing an array of the whole volume."""
        planes, rows, cols = (slice(a, b) for a, b in zip(self.start, self.stop, strict=True))
        return planes, rows, cols

    def check_within(self, shape: tuple[int, int, int], name: str) -> None:
        """Refuse a block that sticks out of a volume of this shape."""
        if any(b > length for b, length in zip(self.stop, shape, strict=True)):
            raise UsageError(f"{name} has shape {shape}, but a block up to {self.stop} was asked for; stay inside")


@dataclass(frozen=True)
class VoxelSize:
    """Distance between neighbouring voxels.

    Attributes
    ----------
    size
        Along plane, row and column; each positive.
    unit
        Of all three, by UDUNITS' name in full (``micrometer``, ``nanometer``, ``millimeter``, …), as OME-Zarr has it.
    """

    size: tuple[float, float, float]
    unit: str

    def __post_init__(self) -> None:
        if not all(np.isfinite(s) and s > 0 for s in self.size) or not self.unit:
            raise UsageError(f"the voxel size is {self.size} {self.unit!r}, expected three positive numbers and a unit")


@dataclass(frozen=True)
class VolumeInfo:
    """What is known of a volume without reading voxels.

    Attributes
    ----------
    name
        For people: the path, and the dataset, level or series inside it.
    format
        ``tiff folder``, ``tiff``, ``hdf5``, ``ome-zarr``, ``zarr``, ``npy`` or ``raw``.
    shape
        Planes, rows, columns.
    dtype
        Of what `Volume.read` gives, in native byte order.
    chunks
        Box of voxels that the file stores or compresses together: reading less costs as much.
    voxel
        Voxel size; None where the file does not say.
    fingerprint
        Changes when the file's content may have: names, lengths, times of the last change and shape, hashed.
    """

    name: str
    format: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    chunks: tuple[int, int, int]
    voxel: VoxelSize | None
    fingerprint: str


class Volume(Protocol):
    """A volume that can be read block by block; opens on ``with``."""

    @property
    def info(self) -> VolumeInfo:
        """What is known without reading voxels; there once it is open."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def read(self, box: Box) -> Voxels:
        """The voxels of a block, in a new array.

        Raises
        ------
        VolumeError
            They cannot be read: a truncated file, a missing chunk, a damaged one. The message names file and plane.
        UsageError
            The block sticks out of the volume.
        """
        ...
