"""A tomogram that nobody has to download, with its truth: made and written plane by plane, never whole in memory.

    seed ─▶ two coarse grids of noise ─▶ B-splines of one plane ─▶ thresholds ─▶ truth: 1 pore, 2 matrix, 3 inclusion
                                                                                   │
    TIFF folder, HDF5 or BigTIFF ◀── uint16 ◀── noise, ring artefacts ◀── blur ◀── grey levels

A plane is a function of seed, shape, grain and its number: planes can be made in any order.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import tifffile

from phaseline.runtime.contract import F32, U8

U16 = npt.NDArray[np.uint16]
Shape = tuple[int, int, int]

CLASSES = ("pore", "matrix", "inclusion")
"""Names of the label values 1, 2, 3."""
GRAIN = 24.0
VOXEL_UM = 0.65
FORMATS = ("folder", "hdf5", "bigtiff")

_LEVELS = np.array([0, 21_000, 30_000, 38_000], np.float32)
_NOISE, _RING, _RINGS = 3500.0, 4500.0, 0.1
# Standard deviation of a field of independent coefficients: ∫ B(x)² dx of the cubic B-spline is 151/315, for each axis.
_FIELD_STD = math.sqrt((151 / 315) ** 3)
# Below the first lie 20 % of a standard normal distribution, above the second 18 %.
_PORE, _INCLUSION = -0.84, 0.92


class SyntheticVolume:
    """Blobs of three phases with noise and ring artefacts, 16 bits.

    Parameters
    ----------
    shape
        Planes, rows, columns.
    seed
        Of all that is random.
    grain
        Distance of the noise's coarse grid in voxels: blobs are about as large.
    """

    def __init__(self, shape: Shape, seed: int = 0, grain: float = GRAIN) -> None:
        self.shape, self._seed = shape, seed
        self._splines = [_splines(length, grain) for length in shape]
        rng = np.random.default_rng(seed)
        self._fields = rng.standard_normal((2, *(splines.shape[1] for splines in self._splines)), np.float32) / _FIELD_STD
        row, col = (np.arange(length, dtype=np.float32) - 0.48 * length for length in shape[1:])
        self._radius = np.rint(np.hypot(row[:, None], col)).astype(np.int32)
        count = int(self._radius.max()) + 1
        self._rings = rng.standard_normal(count) * (rng.random(count) < _RINGS)
        self._phases = rng.uniform(0, 2 * math.pi, count)

    def truth(self, plane: int) -> U8:
        """Label values of a plane: array of shape (rows, cols)."""
        along, down, across = self._splines
        pore, inclusion = (down @ np.tensordot(along[plane], field, 1) @ across.T for field in self._fields)
        return np.where(pore < _PORE, 1, np.where(inclusion > _INCLUSION, 3, 2)).astype(np.uint8)

    def plane(self, plane: int) -> U16:
        """Grey levels of a plane: array of shape (rows, cols)."""
        return self._grey(plane, self.truth(plane))

    def write(self, out: Path, file_format: str, truth: Path) -> None:
        """Write all planes.

        Parameters
        ----------
        out
            The volume: a folder of TIFF files, an HDF5 file with voxel size, or a BigTIFF file; whole or not there.
        file_format
            One of `FORMATS`.
        truth
            NPY file for the label values, uint8 of the volume's shape.
        """
        part, truth_part = (path.with_name(f".{path.name}.part") for path in (out, truth))
        with contextlib.ExitStack() as stack:
            add = _WRITERS[file_format](part, self.shape, stack)
            labels = stack.enter_context(truth_part.open("wb"))
            npy: Any = np.lib.format
            npy.write_array_header_1_0(labels, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
            for number in range(self.shape[0]):
                true = self.truth(number)
                labels.write(true.tobytes())
                add(number, self._grey(number, true))
        truth_part.replace(truth)
        part.replace(out)

    def _grey(self, plane: int, truth: U8) -> U16:
        rng = np.random.default_rng([self._seed, plane])
        grey = np.float32(_NOISE) * rng.standard_normal(truth.shape, np.float32)
        grey += cv2.GaussianBlur(_LEVELS[truth], (0, 0), 1.0)
        profile = _RING * self._rings * np.cos(self._phases + plane / 50)
        grey += profile.astype(np.float32)[self._radius]
        found: U16 = np.rint(grey).clip(0, 65_535).astype(np.uint16)
        return found


def _splines(length: int, grain: float) -> F32:
    """Cubic B-splines of a coarse grid at each voxel: float32 array of shape (length, nodes)."""
    at = np.arange(length) / grain
    first = np.floor(at).astype(np.intp)
    t = at - first
    weights = np.zeros((length, int(first[-1]) + 4), np.float32)
    for i, values in enumerate(((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)):
        weights[np.arange(length), first + i] = values / 6
    return weights


Add = Callable[[int, U16], None]


def _folder(part: Path, shape: Shape, stack: contextlib.ExitStack) -> Add:
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)

    def add(number: int, plane: U16) -> None:
        tifffile.imwrite(part / f"plane_{number:05d}.tif", plane, metadata=None)

    return add


def _hdf5(part: Path, shape: Shape, stack: contextlib.ExitStack) -> Add:
    import h5py

    file = stack.enter_context(h5py.File(part, "w"))
    data = file.create_dataset("entry/tomogram", shape, np.uint16, chunks=(1, min(shape[1], 256), min(shape[2], 256)))
    data.attrs["element_size_um"] = np.full(3, VOXEL_UM)

    def add(number: int, plane: U16) -> None:
        data[number] = plane

    return add


def _bigtiff(part: Path, shape: Shape, stack: contextlib.ExitStack) -> Add:
    tiff = stack.enter_context(tifffile.TiffWriter(part, bigtiff=True))

    def add(number: int, plane: U16) -> None:
        tiff.write(plane, photometric="minisblack", metadata=None)

    return add


_WRITERS: dict[str, Callable[[Path, Shape, contextlib.ExitStack], Add]] = {
    "folder": _folder, "hdf5": _hdf5, "bigtiff": _bigtiff}


def parse_shape(text: str) -> Shape:
    """``256x1024x1024``: planes, rows, columns; raises ValueError."""
    planes, rows, cols = (int(part) for part in text.split("x"))
    return planes, rows, cols


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, help="folder of TIFF files, .h5 or .tif")
    made.add_argument("--shape", type=parse_shape, default=(256, 1024, 1024), help="PLANESxROWSxCOLS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--grain", type=float, default=GRAIN, help="size of the blobs, voxels")
    made.add_argument("--truth", type=Path, help="NPY file; by default beside the volume")
    options = made.parse_args(arguments)
    out: Path = options.out
    truth: Path = options.truth or out.with_name(f"{out.stem}_truth.npy")
    for path in (out, truth):
        if path.exists():
            raise SystemExit(f"{path} exists; remove it, or choose another name")
    file_format = {".h5": "hdf5", ".hdf5": "hdf5", ".tif": "bigtiff", ".tiff": "bigtiff"}.get(out.suffix.lower(), "folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    SyntheticVolume(options.shape, options.seed, options.grain).write(out, file_format, truth)
    print(f"{out}: {' × '.join(map(str, options.shape))} uint16; truth: {truth}")


if __name__ == "__main__":
    main()
