"""Volumes in HDF5 and NeXus files: compressed by any filter that hdf5plugin has, virtual, linked from other files.

    read(box) ──▶ is every part of it there? ──▶ dataset[box] ──▶ native byte order
                    chunks      in the file's list of them?
                    virtual     a source for each voxel, whole, in a file that exists?
                    external    raw files long enough?

HDF5 itself gives the fill value for all that is missing, without a word.
"""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 — makes its filters known to HDF5
import numpy as np
import numpy.typing as npt

from phaseline.clients.volumes.nexus import find_dataset, voxel_size
from phaseline.clients.volumes.reader import (
    DAMAGE,
    Missing,
    PlanesOf,
    Reader,
    choose_planes,
    fingerprint_of,
    native,
    plain_dtype,
    reason_of,
    refuse_missing,
    split_dataset,
)
from phaseline.clients.volumes.volume import Box, VolumeInfo, Voxels
from phaseline.runtime.errors import VolumeError

_NESTING = 8


class Hdf5Volume(Reader):
    """A dataset of an HDF5 file.

    Parameters
    ----------
    path
        The file.
    dataset
        Path in it, and choices for axes before the last three, which are named d0, d1, …: ``/entry/data,d0=2``. None or ``auto``
        to find it as `find_dataset` says.
    missing
        What to do about chunks and sources that are missing.
    """

    def __init__(self, path: Path, dataset: str | None = None, missing: Missing = "refuse") -> None:
        super().__init__(path)
        self._inner, self._choices = split_dataset(dataset)
        self._missing: Missing = missing
        # h5py serialises calls, not the sequence of them that a read is.
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._dataset: Any = None
        self._planes = PlanesOf(None, ())
        self._stored: _Chunks | _Sources | None = None

    def _open(self) -> VolumeInfo:
        # Read-only file systems and those without locks refuse the lock that reading does not need.
        self._file = h5py.File(self.path, "r", locking=False)
        dataset = self._dataset = find_dataset(self._file, self._inner)
        name = f"{self.path}:{dataset.name}" + "".join(f",{axis}={index}" for axis, index in self._choices.items())
        dtype = plain_dtype(dataset.dtype, name)
        if dataset.ndim < 3 or 0 in dataset.shape:
            raise VolumeError(f"{name} has the shape {dataset.shape}, expected planes, rows and columns; choose another dataset")
        axes = (*(f"d{i}" for i in range(dataset.ndim - 3)), "z", "y", "x")
        self._planes = choose_planes(axes, dataset.shape, self._choices, name)
        self._stored = _Sources.of(dataset) if dataset.is_virtual else _Chunks.of(dataset)
        chunks = self._planes.of(dataset.chunks) if dataset.chunks else (1, 1, dataset.shape[-1])
        files = sorted({self.path, Path(dataset.file.filename), *(self._stored.files if self._stored else ())})
        return VolumeInfo(name, "hdf5", self._planes.of(dataset.shape), dtype, chunks, voxel_size(dataset),
                          fingerprint_of(files, dataset.name, self._planes, dataset.shape))

    def _close(self) -> None:
        self._dataset = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _voxels(self, box: Box) -> Voxels:
        where = self._planes.select(box)
        with self._lock:
            if self._missing == "refuse" and self._stored is not None:
                self._stored.check(where, self._planes.axis, self.info.name, box)
            return native(np.asarray(self._dataset[where])).reshape(box.shape)


@dataclass(frozen=True)
class _Chunks:
    """Which chunks a dataset has; only made for those that lack some."""

    written: npt.NDArray[np.bool_]
    size: tuple[int, ...]
    files: tuple[Path, ...] = ()

    @classmethod
    def of(cls, dataset: Any) -> _Chunks | None:
        if dataset.external:
            _check_external(dataset)
            return None
        size = dataset.chunks or dataset.shape
        grid = tuple(-(-n // c) for n, c in zip(dataset.shape, size, strict=True))
        if dataset.chunks is None:
            # Contiguous voxels get their place with the first that is written.
            return None if dataset.id.get_storage_size() else cls(np.zeros(grid, np.bool_), size)
        if dataset.id.get_num_chunks() == math.prod(grid):
            return None
        written = np.zeros(grid, np.bool_)

        def note(chunk: Any) -> None:
            written[tuple(at // c for at, c in zip(chunk.chunk_offset, size, strict=True))] = True

        dataset.id.chunk_iter(note)
        return cls(written, size)

    def check(self, where: tuple[slice, ...], axis: int | None, name: str, box: Box) -> None:
        """Refuse a block that needs a chunk that is not there."""
        first = [s.start // c for s, c in zip(where, self.size, strict=True)]
        part = self.written[tuple(slice(a, -(-s.stop // c)) for a, s, c in zip(first, where, self.size, strict=True))]
        if part.all():
            return
        order = part if axis is None else np.moveaxis(part, axis, 0)
        at = [int(i[0]) for i in np.nonzero(~order)]
        if axis is not None:
            at.insert(axis, at.pop(0))
        chunk = tuple(a + i for a, i in zip(first, at, strict=True))
        plane = box.start[0] if axis is None else max(box.start[0], chunk[axis] * self.size[axis])
        refuse_missing(name, f"its chunk {chunk} of {self.size} voxels was never written", plane)


@dataclass(frozen=True)
class _Source:
    """A mapping of a virtual dataset: along each axis start, stride, count and block; `fault` if it cannot be relied on."""

    axes: tuple[tuple[int, int, int, int], ...]
    label: str
    fault: str | None

    def members(self, axis: int, part: slice) -> npt.NDArray[np.bool_]:
        """Which of the indices of a slice it has along an axis."""
        start, stride, count, block = self.axes[axis]
        at = np.arange(part.start, part.stop) - start
        return (at >= 0) & (at // stride < count) & (at % stride < block)


@dataclass(frozen=True)
class _Sources:
    """Where the voxels of a virtual dataset come from."""

    sources: tuple[_Source, ...]
    files: tuple[Path, ...]

    @classmethod
    def of(cls, dataset: Any, depth: int = 0) -> _Sources:
        found: dict[tuple[str, str], tuple[str | None, tuple[int, ...]]] = {}
        sources: list[_Source] = []
        files: list[Path] = []
        for mapping in dataset.virtual_sources():
            key = (mapping.file_name, mapping.dset_name)
            if key not in found:
                path = _locate(dataset, mapping.file_name)
                found[key] = _inspect(path, mapping.file_name, mapping.dset_name, depth)
                files.extend([path] if path is not None else [])
            fault, shape = found[key]
            fault = fault or _misfit(mapping, shape)
            label = f"{mapping.dset_name} in {mapping.file_name}"
            sources.extend(_Source(axes, label, fault) for axes in _selected(mapping.vspace, dataset.shape))
        return cls(tuple(sources), tuple(dict.fromkeys(files)))

    def check(self, where: tuple[slice, ...], axis: int | None, name: str, box: Box) -> None:
        """Refuse a block with voxels that no sound source has."""
        touching = [s for s in self.sources if all(s.members(i, part).any() for i, part in enumerate(where))]
        sound = [s for s in touching if s.fault is None]
        faulty = [s for s in touching if s.fault is not None]
        for plane in range(box.start[0], box.stop[0]):
            at = where if axis is None else (*where[:axis], slice(plane, plane + 1), *where[axis + 1:])
            if _cover(sound, at):
                continue
            reasons = [f"its source {s.label} {s.fault}" for s in faulty if all(s.members(i, p).any() for i, p in enumerate(at))]
            refuse_missing(name, reasons[0] if reasons else "parts of it have no source in this virtual dataset", plane)


def _cover(sources: list[_Source], where: tuple[slice, ...]) -> bool:
    """Whether every voxel is in a source: voxels that lie in the same ones along an axis are looked at once."""
    if not sources:
        return False
    covered = np.ones((len(sources), 1), np.bool_)
    for axis, part in enumerate(where):
        kinds = np.unique(np.array([s.members(axis, part) for s in sources]), axis=1)
        covered = (covered[:, :, None] & kinds[:, None, :]).reshape(len(sources), -1)
    return bool(covered.any(axis=0).all())


def _selected(space: Any, shape: tuple[int, ...]) -> list[tuple[tuple[int, int, int, int], ...]]:
    """The voxels that a selection has, as blocks on regular grids: start, stride, count and block for each axis."""
    if space.get_select_type() == h5py.h5s.SEL_ALL:
        return [tuple((0, n, 1, n) for n in shape)]
    if space.is_regular_hyperslab():
        # HDF5's mark for "as many as there are" is above int64; the stride of a single block means nothing.
        parts = zip(*(map(int, values) for values in space.get_regular_hyperslab()), strict=True)
        return [tuple((a, min(max(s, b), 2**62), min(n, 2**62), min(b, 2**62)) for a, s, n, b in parts)]
    return [tuple((int(a), int(b - a + 1), 1, int(b - a + 1)) for a, b in zip(first, last, strict=True))
            for first, last in space.get_select_hyper_blocklist()]


def _locate(dataset: Any, name: str) -> Path | None:
    own = Path(dataset.file.filename)
    if name == ".":
        return own
    return next((path for path in (own.parent / name, own.parent / Path(name).name, Path(name)) if path.is_file()), None)


def _inspect(path: Path | None, file_name: str, dataset: str, depth: int) -> tuple[str | None, tuple[int, ...]]:
    """Why a source cannot be relied on, if so, and its shape; one that lacks a part is not used at all."""
    if "%" in file_name or "%" in dataset:
        return "is a pattern of names, which is not supported", ()
    if path is None:
        return "is missing: there is no such file", ()
    try:
        with h5py.File(path, "r", locking=False) as file:
            source = file[dataset]
            if source.is_virtual:
                inner = _Sources.of(source, depth + 1).sources if depth < _NESTING else ()
                whole = _cover([s for s in inner if s.fault is None], tuple(slice(0, n) for n in source.shape))
                return None if whole else "is virtual and lacks sources itself", source.shape
            stored = _Chunks.of(source)
            lacks = f"lacks {np.count_nonzero(~stored.written)} of its {stored.written.size} chunks" if stored else None
            return lacks, source.shape
    except DAMAGE as error:
        return f"cannot be opened ({reason_of(error)})", ()


def _misfit(mapping: Any, shape: tuple[int, ...]) -> str | None:
    """Why a source of this shape cannot give its part: HDF5 fills what sticks out of it."""
    if mapping.src_space.get_select_type() == h5py.h5s.SEL_ALL:
        count = mapping.vspace.get_select_npoints()
        return None if math.prod(shape) == count else f"has the shape {shape}, expected {count} voxels"
    last = tuple(int(n) for n in mapping.src_space.get_select_bounds()[1])
    if len(last) == len(shape) and all(n < m for n, m in zip(last, shape, strict=True)):
        return None
    return f"has the shape {shape}, expected voxels up to {last}"


def _check_external(dataset: Any) -> None:
    """Refuse raw files that are missing or too short: HDF5 fills what they lack."""
    own = Path(dataset.file.filename)
    # HDF5 looks for them in the folder in which the process runs, if its variable does not say otherwise.
    folder = Path(os.environ.get("HDF5_EXTFILE_PREFIX", "").replace("${ORIGIN}", str(own.resolve().parent)))
    for name, offset, size in dataset.external:
        path = folder / name
        present = path.stat().st_size if path.is_file() else 0
        # HDF5's mark for "up to the end" is above any size.
        if not path.is_file() or (size < 2**62 and present < offset + size):
            raise VolumeError(f"{own}:{dataset.name} keeps its voxels in {path}, which has {present} bytes, expected "
                              f"{offset + size}, so not all of its planes can be read; copy that file too, and if it is beside "
                              "the first, say so with HDF5_EXTFILE_PREFIX='${ORIGIN}'")
