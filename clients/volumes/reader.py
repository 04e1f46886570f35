"""What all readers have in common: telling files apart, what numbers they give, and which axis is which.

    path ──▶ Reader.__enter__ ──▶ VolumeInfo (name, shape, dtype, chunks, voxel size, fingerprint)
                   │
                 read(box) ──▶ a reader's _voxels ──▶ native byte order, C-contiguous
                   └── what a decoder says of a damaged file becomes one VolumeError that names file and plane
"""

from __future__ import annotations

import hashlib
import lzma
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.volumes.volume import Box, VolumeInfo, Voxels, VoxelSize
from phaseline.runtime.errors import PhaselineError, UsageError, VolumeError

Missing = Literal["refuse", "fill"]
"""What to do with a part that was never written: refuse the planes that need it, or take the file's fill value for it."""

# Decoders raise these for damaged files: few of them have an exception class of their own.
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, EOFError,
          struct.error, zlib.error, lzma.LZMAError)

_METRES = {"picometer": 1e-12, "angstrom": 1e-10, "nanometer": 1e-9, "micrometer": 1e-6, "millimeter": 1e-3, "centimeter": 1e-2,
           "inch": 0.0254, "meter": 1.0}
_SHORT = {"pm": "picometer", "å": "angstrom", "a": "angstrom", "ångström": "angstrom", "nm": "nanometer", "um": "micrometer",
          "µm": "micrometer", "μm": "micrometer", "\\u00b5m": "micrometer", "micron": "micrometer", "mm": "millimeter",
          "cm": "centimeter", "in": "inch", "m": "meter", "metre": "meter"}


class Reader(ABC):
    """A volume in a file: opens on ``with``, never writes, may be asked by several threads at once.

    Parameters
    ----------
    path
        The file, or the folder, that holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._info: VolumeInfo | None = None

    @property
    def info(self) -> VolumeInfo:
        """What is known without reading voxels."""
        if self._info is None:
            raise UsageError(f"{self.path} is not open; use it inside `with`")
        return self._info

    def __enter__(self) -> Self:
        try:
            self._info = self._open()
        except DAMAGE as error:
            self._close()
            if isinstance(error, PhaselineError):
                raise
            raise VolumeError(f"{self.path} cannot be opened, it is damaged or truncated ({reason_of(error)}), so none of its "
                              "planes can be read; copy or export it again") from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._info = None
        self._close()

    def read(self, box: Box) -> Voxels:
        """The voxels of a block, in a new array; raises as `Volume.read` says."""
        info = self.info
        box.check_within(info.shape, info.name)
        try:
            return self._voxels(box)
        except PhaselineError:
            raise
        except DAMAGE as error:
            raise VolumeError(f"{info.name}: {self._unreadable(box)} cannot be read, the file is damaged, truncated or gone "
                              f"({reason_of(error)}); copy or export it again") from error

    def _unreadable(self, box: Box) -> str:
        for plane in range(box.start[0], box.stop[0]):
            try:
                self._voxels(Box((plane, *box.start[1:]), (plane + 1, *box.stop[1:])))
            except DAMAGE:
                return f"plane {plane}"
        return f"one of the planes {box.start[0]} to {box.stop[0] - 1}"

    @abstractmethod
    def _open(self) -> VolumeInfo:
        """Open the file and say what it holds."""

    @abstractmethod
    def _voxels(self, box: Box) -> Voxels:
        """Read a block that lies inside; may raise what the decoder raises."""

    def _close(self) -> None:  # noqa: B027 — most hold nothing
        """Let go of what `_open` holds, also when it failed half-way."""


@dataclass(frozen=True)
class PlanesOf:
    """Which axis before rows and columns is the planes', and where the others stand.

    Attributes
    ----------
    axis
        The planes' axis; None where the array has rows and columns only, or all axes before them have length one.
    fixed
        Index along each axis before rows and columns; that of the planes' axis means nothing.
    """

    axis: int | None
    fixed: tuple[int, ...]

    def index(self, plane: int) -> tuple[int, ...]:
        """Index of a plane along the axes before rows and columns."""
        return tuple(plane if axis == self.axis else fixed for axis, fixed in enumerate(self.fixed))

    def select(self, box: Box) -> tuple[slice, ...]:
        """Slices of the whole array that hold a block; reshape what they give to the block's shape."""
        planes, rows, cols = box.slices
        lead = (planes if axis == self.axis else slice(fixed, fixed + 1) for axis, fixed in enumerate(self.fixed))
        return *lead, rows, cols

    def of(self, lengths: Sequence[int]) -> tuple[int, int, int]:
        """Planes', rows' and columns' entries of something that has one for each axis."""
        return 1 if self.axis is None else int(lengths[self.axis]), int(lengths[-2]), int(lengths[-1])


def choose_planes(axes: Sequence[str], shape: Sequence[int], choices: dict[str, str], name: str) -> PlanesOf:
    """Make three axes of more: those of length one go, the others need a choice such as ``c=0``; ``z=t`` takes t for planes.

    Raises
    ------
    VolumeError
        The last two axes are not y and x.
    UsageError
        An axis is left without a choice, or a choice does not fit.
    """
    if len(axes) != len(shape) or tuple(axes[-2:]) != ("y", "x"):
        raise VolumeError(f"{name} has the axes {', '.join(axes)} for the shape {tuple(shape)}, expected … z, y, x; export it in "
                          "that order")
    lead = list(axes[:-2])
    said = f"{name} has the axes {', '.join(f'{axis} ({n})' for axis, n in zip(axes, shape, strict=True))}"
    chosen = {key: int(value) for key, value in choices.items() if value.isdecimal()}
    for key, value in choices.items():
        fits_index = key in lead and key in chosen and chosen[key] < shape[lead.index(key)]
        if not fits_index and not (key == "z" and value in lead):
            raise UsageError(f"{said}, which {key}={value} does not fit; name one of them and an index in it")
    planes = "z" if "z" in chosen else choices.get("z", "z")
    long = [i for i, axis in enumerate(lead) if shape[i] > 1 and axis not in chosen]
    if planes not in lead and len(long) == 1 and lead[long[0]] not in ("t", "c"):
        # Writers that know of no axes name the planes' as they like.
        planes = lead[long[0]]
    axis = lead.index(planes) if planes in lead and planes not in chosen else None
    if left := [lead[i] for i in long if i != axis]:
        other = f", or --dataset z={left[0]} to take {left[0]} for planes" if axis is None or shape[axis] == 1 else ""
        raise UsageError(f"{said}, expected planes, rows and columns only; choose with --dataset "
                         f"{','.join(f'{name}=0' for name in left)}{other}")
    return PlanesOf(axis, tuple(chosen.get(name, 0) for name in lead))


def split_dataset(dataset: str | None) -> tuple[str | None, dict[str, str]]:
    """Take ``PATH,c=0,t=1`` apart into a path inside the file and choices by axis; either may be missing."""
    parts = [part.strip() for part in (dataset or "").split(",") if part.strip()]
    paths = [part for part in parts if "=" not in part]
    pairs = (part.lower().partition("=") for part in parts if "=" in part)
    choices = {key.strip(): value.strip() for key, _, value in pairs}
    if len(paths) > 1:
        raise UsageError(f"the dataset {dataset!r} names {len(paths)} paths, expected at most one, and choices such as c=0; "
                         "give one path")
    return (paths[0] if paths else None), choices


def plain_dtype(dtype: np.dtype[Any], name: str) -> np.dtype[Any]:
    """The dtype that a reader gives for one stored so: native byte order, Booleans as uint8; complex and text are refused."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise VolumeError(f"{name} has voxels of type {dtype}, expected integers or real numbers of up to 64 bits; convert it")
    return np.dtype(np.uint8) if dtype.kind == "b" else np.dtype(f"{dtype.kind}{dtype.itemsize}")


def native(voxels: npt.NDArray[Any]) -> Voxels:
    """An array as `Volume.read` gives it. Booleans become 0 and 255, as in `read_image`; byte order is swapped in place."""
    if voxels.dtype.kind == "b":
        return np.ascontiguousarray(voxels).view(np.uint8) * np.uint8(255)
    if not voxels.dtype.isnative:
        voxels = voxels.byteswap(inplace=voxels.flags.writeable).view(voxels.dtype.newbyteorder("="))
    return np.ascontiguousarray(voxels)


def refuse_missing(name: str, what: str, plane: int) -> NoReturn:
    """Raise the error for a part of a file that was never written."""
    raise VolumeError(f"{name}: plane {plane} cannot be read, {what}; copy the file again, or take its fill value there with "
                      "--missing-chunks fill")


def unit_name(unit: str) -> str | None:
    """UDUNITS' name of a unit of length, for the ways in which files spell it; None for pixels and what is not a length."""
    text = unit.strip().lower()
    for spelt in (text, text.removesuffix("s"), text.replace("metre", "meter")):
        if (found := _SHORT.get(spelt, spelt)) in _METRES:
            return found
    return None


def voxel_of(sizes: Sequence[float | None], units: Sequence[str]) -> VoxelSize | None:
    """Voxel size from one number and unit an axis, in the unit of the columns; None if one is missing, zero, or no length."""
    names = [unit_name(unit) for unit in units]
    if None in names or any(size is None or not np.isfinite(size) or size == 0 for size in sizes):
        return None
    factors = [_METRES[name or ""] / _METRES[names[2] or ""] for name in names]
    planes, rows, cols = (abs(float(size or 0)) * factor for size, factor in zip(sizes, factors, strict=True))
    return VoxelSize((planes, rows, cols), names[2] or "")


def fingerprint_of(files: Iterable[Path], *facts: object) -> str:
    """Hash of names, lengths and times of the last change of files, and of what else decides what is read from them."""
    digest = hashlib.sha256(repr(facts).encode())
    for file in files:
        status = file.stat()
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]


def reason_of(error: BaseException) -> str:
    """A decoder's words in one line."""
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
