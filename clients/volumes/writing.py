"""What a volume to be written looks like, and who may write which part of it.

    OutputLayout ──▶ blocks along one axis     labels         (planes, rows, cols)           uint8 or uint16
                                               confidence     (planes, rows, cols)           uint8
                                               probabilities  (classes, planes, rows, cols)  uint8, 255 × p rounded

    plane:  ┌──┬──┬──┐    a block is all of the other two axes; the last one may be shorter. Of each array it is one file,
            │ 0│ 1│2 │    which nobody else writes: blocks can be written in any order, by any process, at once.
            └──┴──┴──┘
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np

from phaseline.clients.labels import ClassTable
from phaseline.clients.volumes.volume import AXES, Axis, Box, Voxels, VoxelSize
from phaseline.runtime.errors import UsageError

ArrayName = Literal["labels", "confidence", "probabilities"]
ARRAYS: tuple[ArrayName, ...] = get_args(ArrayName)

# Read and compressed together: small enough to look at one plane of a part, large enough to compress well.
_CHUNK = (16, 256, 256)


@dataclass(frozen=True)
class OutputLayout:
    """The arrays that a job writes, and the blocks that it writes them in.

    Attributes
    ----------
    shape
        Planes, rows, columns.
    axis, block_length
        Blocks are runs of so many slices along this axis, the last one perhaps shorter. Multiples of 16 planes, or of 256 rows
        or columns, are read back fastest.
    classes
        Label values, names and colours.
    arrays
        What is written, in the order of `ARRAYS`.
    voxel
        Voxel size; None if unknown.
    origin
        Where the centre of the first voxel lies, in `voxel`'s unit (in voxels if that is None): not 0 for a region of another
        volume.

    Raises
    ------
    UsageError
        A length below 1, an unknown axis or array, or none.
    """

    shape: tuple[int, int, int]
    axis: Axis
    block_length: int
    classes: ClassTable
    arrays: tuple[ArrayName, ...] = ("labels",)
    voxel: VoxelSize | None = None
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UsageError(f"a volume of shape {self.shape} was to be written, expected three lengths of at least 1")
        if self.axis not in AXES:
            raise UsageError(f"blocks were to run along {self.axis!r}, expected one of {', '.join(AXES)}")
        if self.block_length < 1:
            raise UsageError(f"blocks of {self.block_length} slices were to be written, expected at least 1")
        if not self.arrays or self.arrays != tuple(name for name in ARRAYS if name in self.arrays):
            raise UsageError(f"the arrays {self.arrays} were to be written, expected some of {ARRAYS} in this order")
        # A block that is longer than the volume would make files that are mostly padding.
        object.__setattr__(self, "block_length", min(self.block_length, self.shape[self.along]))

    @property
    def along(self) -> int:
        """Number of the axis that blocks run along."""
        return AXES.index(self.axis)

    @property
    def blocks(self) -> list[Box]:
        """All blocks, in their order along the axis."""
        return [self.block(i) for i in range(math.ceil(self.shape[self.along] / self.block_length))]

    def block(self, index: int) -> Box:
        """The block of this number."""
        start, stop = [0, 0, 0], list(self.shape)
        start[self.along] = index * self.block_length
        stop[self.along] = min(start[self.along] + self.block_length, self.shape[self.along])
        return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))

    def dtype(self, name: ArrayName) -> np.dtype[Any]:
        """Of an array: uint8, but uint16 for labels of which a value exceeds 255."""
        wide = name == "labels" and self.classes.values[-1] > 255
        return np.dtype(np.uint16 if wide else np.uint8)

    def lead(self, name: ArrayName) -> tuple[int, ...]:
        """What comes before the three axes of an array: the number of classes, or nothing."""
        return (len(self.classes.values),) if name == "probabilities" else ()

    @property
    def chunk(self) -> tuple[int, int, int]:
        """Voxels that are compressed together, about 16 × 256 × 256: equal parts of a block, nowhere larger than it."""
        planes, rows, cols = (
            divisor_near(self.block_length, most) if i == self.along else even_part(self.shape[i], most)
            for i, most in enumerate(_CHUNK)
        )
        return planes, rows, cols

    @property
    def shard(self) -> tuple[int, int, int]:
        """Voxels of the file that one block becomes: its length, and the other two axes in whole chunks."""
        planes, rows, cols = (
            self.block_length if i == self.along else math.ceil(self.shape[i] / part) * part for i, part in enumerate(self.chunk)
        )
        return planes, rows, cols

    def check(self, name: ArrayName, box: Box, voxels: Voxels | None = None) -> None:
        """Refuse what is not exactly some blocks of an array that is written.

        Raises
        ------
        UsageError
            An array that is not written, a box that cuts a block, or voxels of another shape or dtype.
        """
        if name not in self.arrays:
            raise UsageError(f"{name} was asked for, but only {', '.join(self.arrays)} is written; begin a job with it")
        box.check_within(self.shape, "the output")
        if voxels is None:
            return
        first, last = box.start[self.along] // self.block_length, (box.stop[self.along] - 1) // self.block_length
        whole = Box(self.block(first).start, self.block(last).stop)
        if box != whole:
            raise UsageError(f"a block from {box.start} to {box.stop} was to be written, expected whole blocks of "
                             f"{self.block_length} slices along {self.axis}, such as {whole.start} to {whole.stop}")
        expected = (*self.lead(name), *box.shape)
        if voxels.shape != expected or voxels.dtype != self.dtype(name):
            raise UsageError(f"{name} of shape {voxels.shape} and dtype {voxels.dtype} were to be written, expected {expected} "
                             f"and {self.dtype(name)}")

    def to_json(self) -> dict[str, Any]:
        """For JSON, and back by `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Self:
        """What `to_json` made, after a turn through JSON."""
        voxel = stored["voxel"]
        lists = {name: tuple(stored[name]) for name in ("shape", "arrays", "origin")}
        return cls(**{
            **stored,
            **lists,
            "classes": ClassTable(**stored["classes"]),
            "voxel": voxel and VoxelSize(tuple(voxel["size"]), voxel["unit"]),
        })


class VolumeSink(Protocol):
    """Where blocks are written, and read back from; may be asked by several threads and processes at once."""

    @property
    def layout(self) -> OutputLayout:
        """What is written."""
        ...

    def write(self, name: ArrayName, box: Box, voxels: Voxels) -> None:
        """Write one or more whole blocks: a second time, with the same voxels, gives the same bytes.

        Raises
        ------
        UsageError
            As `OutputLayout.check`.
        OutputError
            It cannot be written, as on a full disk; what was there before is unharmed.
        """
        ...

    def written(self, name: ArrayName, box: Box) -> bool:
        """Whether all blocks that the box touches have been written."""
        ...

    def read(self, name: ArrayName, box: Box) -> Voxels:
        """Any part of what was written, in a new array: (planes, rows, cols), of probabilities (classes, planes, rows, cols).

        Raises
        ------
        VolumeError
            A block that the box touches was not written, or is damaged; the message names it.
        UsageError
            The box sticks out of the volume, or the array is not written.
        """
        ...


def part_path(path: Path) -> Path:
    """The hidden name beside `path` under which it is made. Always the same, so that what a kill leaves is replaced next time."""
    return path.with_name(f".{path.name}.part")


def even_part(length: int, most: int) -> int:
    """The smallest part that divides a length as evenly into no more parts than the largest allowed part does."""
    return math.ceil(length / math.ceil(length / most))


def divisor_near(length: int, wanted: int) -> int:
    """The divisor of a length that is nearest to the wanted one, by ratio."""
    return min((d for d in range(1, length + 1) if length % d == 0), key=lambda d: abs(math.log(d / wanted)))
