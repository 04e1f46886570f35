"""A region of interest, and every n-th voxel of it, as a volume of its own.

    0:100,:,200:1200:2        planes 0–99, all rows, every second column from 200 on

      source volume  ┌───────────────┐
                     │   ┌·┬·┬·┬·┐   │      RegionVolume.read(box)
                     │   ├·┼·┼·┼·┤ ──┼──▶   reads the source's block, keeps every n-th voxel
                     │   └·┴·┴·┴·┘   │
                     └───────────────┘
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from phaseline.clients.volumes.reader import fingerprint_of
from phaseline.clients.volumes.volume import Box, Volume, VolumeInfo, Voxels, VoxelSize
from phaseline.runtime.errors import UsageError, VolumeError

_PART = re.compile(r"(\d*):(\d*)(?::(\d*))?")
_EXPECTED = "expected START:STOP or START:STOP:STEP for planes, rows and columns, such as 0:100,:,200:1200:2"


@dataclass(frozen=True)
class Region:
    """What to take of a volume.

    Attributes
    ----------
    start
        First voxel along plane, row and column.
    stop
        The one behind the last; None for the volume's end.
    step
        Every how manieth voxel; 1 is all.
    """

    start: tuple[int, int, int] = (0, 0, 0)
    stop: tuple[int | None, int | None, int | None] = (None, None, None)
    step: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        for start, stop, step in zip(self.start, self.stop, self.step, strict=True):
            if start < 0 or step < 1 or (stop is not None and stop <= start):
                raise UsageError(f"the region {self} is negative or empty, expected 0 ≤ start < stop and a step of 1 or more; "
                                 "count from the volume's first voxel")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a region as it is given on the command line; raises UsageError."""
        parts = [_PART.fullmatch(part.strip()) for part in text.split(",")]
        if len(parts) != 3:
            raise UsageError(f"the region {text!r} has {len(parts)} parts; {_EXPECTED}")
        numbers = [[int(n) if n else None for n in part.groups()] for part in parts if part is not None]
        if len(numbers) != 3:
            raise UsageError(f"the region {text!r} is not understood; {_EXPECTED}")
        (z0, z1, dz), (y0, y1, dy), (x0, x1, dx) = numbers
        return cls((z0 or 0, y0 or 0, x0 or 0), (z1, y1, x1), tuple(1 if n is None else n for n in (dz, dy, dx)))  # type: ignore[arg-type]

    def __str__(self) -> str:
        parts = zip(self.start, self.stop, self.step, strict=True)
        return ",".join(f"{a or ''}:{'' if b is None else b}{'' if n == 1 else f':{n}'}" for a, b, n in parts)

    def within(self, shape: tuple[int, int, int], name: str) -> Region:
        """The same region with stops in place of None; raises UsageError if it sticks out of a volume of this shape."""
        stops = tuple(length if b is None else b for b, length in zip(self.stop, shape, strict=True))
        if any(b > length or a >= b for a, b, length in zip(self.start, stops, shape, strict=True)):
            raise UsageError(f"{name} has shape {shape}, which does not hold the region {self}; stay inside")
        return replace(self, stop=stops)  # type: ignore[arg-type]

    def shape(self) -> tuple[int, int, int]:
        """Voxels along each axis, of a region from `within`."""
        planes, rows, cols = (len(range(a, b or 0, n)) for a, b, n in zip(self.start, self.stop, self.step, strict=True))
        return planes, rows, cols

    def source(self, box: Box) -> Box:
        """The smallest block of the volume that holds a block of the region."""
        z, y, x = ((a + n * i, a + n * (j - 1) + 1)
                   for a, n, i, j in zip(self.start, self.step, box.start, box.stop, strict=True))
        return Box((z[0], y[0], x[0]), (z[1], y[1], x[1]))


class RegionVolume:
    """A region of a volume as a volume; opens and closes the one it is of.

    Parameters
    ----------
    volume
        Not yet open.
    region
        What to take of it.
    """

    def __init__(self, volume: Volume, region: Region) -> None:
        self.volume = volume
        self.region = region
        self._info: VolumeInfo | None = None

    @property
    def info(self) -> VolumeInfo:
        """What is known of the region; the voxel size grows with the step."""
        if self._info is None:
            raise UsageError("a region of a volume is not open; use it inside `with`")
        return self._info

    def __enter__(self) -> Self:
        with_volume = self.volume.__enter__()
        try:
            self._info = self._describe(with_volume.info)
        except BaseException:
            self.volume.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._info = None
        self.volume.__exit__(*exc)

    def _describe(self, info: VolumeInfo) -> VolumeInfo:
        self.region = self.region.within(info.shape, info.name)
        step = self.region.step
        z, y, x = (max(1, chunk // n) for chunk, n in zip(info.chunks, step, strict=True))
        voxel = info.voxel
        if voxel is not None:
            planes, rows, cols = (size * n for size, n in zip(voxel.size, step, strict=True))
            voxel = VoxelSize((planes, rows, cols), voxel.unit)
        return replace(info, name=f"{info.name}[{self.region}]", shape=self.region.shape(), chunks=(z, y, x), voxel=voxel,
                       fingerprint=fingerprint_of((), info.fingerprint, str(self.region)))

    def read(self, box: Box) -> Voxels:
        """The voxels of a block of the region, in a new array; errors name planes of the volume it is of."""
        info = self.info
        box.check_within(info.shape, info.name)
        if self.region.step == (1, 1, 1):
            return self.volume.read(self.region.source(box))
        voxels = np.empty(box.shape, info.dtype)
        step = self.region.step
        for part in self._parts(box):
            block = self.volume.read(self.region.source(part))
            first = part.start[0] - box.start[0]
            voxels[first:first + part.shape[0]] = block[::step[0], ::step[1], ::step[2]]
        return voxels

    def _parts(self, box: Box) -> Iterator[Box]:
        """Runs of planes of one chunk: reading across chunks would hold planes that no one wants."""
        chunk = self.volume.info.chunks[0]
        first = box.start[0]
        for plane in range(box.start[0] + 1, box.stop[0] + 1):
            if plane == box.stop[0] or self._source_plane(plane) // chunk != self._source_plane(first) // chunk:
                yield Box((first, *box.start[1:]), (plane, *box.stop[1:]))
                first = plane

    def _source_plane(self, plane: int) -> int:
        return self.region.start[0] + self.region.step[0] * plane


def check_finite(voxels: Voxels, box: Box, name: str) -> None:
    """Refuse NaN and infinite voxels.

    Raises
    ------
    VolumeError
        The block has some; the message names the first plane with them.
    """
    if voxels.dtype.kind != "f":
        return
    for plane, values in enumerate(voxels, box.start[0]):
        if not (finite := np.isfinite(values)).all():
            row, col = (int(i[0]) + first for i, first in zip(np.nonzero(~finite), box.start[1:], strict=True))
            raise VolumeError(f"{name}: plane {plane} has NaN or infinite voxels ({np.count_nonzero(~finite)} of {finite.size}, "
                              f"the first at row {row}, column {col}), expected real numbers; replace them by real values")
