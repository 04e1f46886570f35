"""A finished store as one file, for programs that read no OME-Zarr.

    store ──▶ part by part ──▶ .OUT.part ──▶ OUT       HDF5: /labels /confidence /probabilities, chunked, gzip
                                                       BigTIFF: a page a plane, deflate; the others in files of their own

Equal stores become equal bytes with equal libraries. The labels appear last: where they are, all is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, assert_never

import numpy as np
import tifffile

from phaseline.clients.volumes.volume import Box, Voxels, VoxelSize
from phaseline.clients.volumes.writing import ARRAYS, ArrayName, OutputLayout, part_path
from phaseline.clients.volumes.zarr_sink import ZarrSink
from phaseline.runtime.errors import MissingExtraError, OutputError, PhaselineError, UsageError

if TYPE_CHECKING:
    import h5py

VolumeFormat = Literal["ome-zarr", "hdf5", "tiff"]
Progress = Callable[[float], None]

SUFFIXES: dict[str, VolumeFormat] = {
    ".ome.zarr": "ome-zarr", ".zarr": "ome-zarr", ".h5": "hdf5", ".hdf5": "hdf5", ".nxs": "hdf5", ".tif": "tiff", ".tiff": "tiff"}

# Read at once, unless a single plane is larger.
_PART_BYTES = 64 * 2**20
_MICROMETRES = {
    "picometer": 1e-6, "angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4,
    "decimeter": 1e5, "inch": 25400.0, "meter": 1e6}


def check_out(out: Path) -> VolumeFormat:
    """The format that a name asks for.

    Raises
    ------
    UsageError
        None that can be written.
    """
    name = out.name.lower()
    for suffix, kind in SUFFIXES.items():
        if name.endswith(suffix) and name not in SUFFIXES:
            return kind
    raise UsageError(f"{out} ends in {out.suffix!r}, expected one of {', '.join(SUFFIXES)} for a volume; rename the output")


def output_files(out: Path, arrays: tuple[ArrayName, ...]) -> dict[ArrayName, Path]:
    """What `finish` writes: one file (or folder) for all; of TIFF one each, such as ``<stem>_confidence.tif``."""
    if check_out(out) != "tiff":
        return dict.fromkeys(arrays, out)
    return {name: out if name == "labels" else out.with_name(f"{out.stem}_{name}{out.suffix}") for name in arrays}


def finish(store: Path, out: Path, progress: Progress | None = None) -> list[Path]:
    """Write a store, all of whose blocks are written, as HDF5 or BigTIFF, in 300 MiB of memory (more where a plane is larger).

    Parameters
    ----------
    store
        What the job wrote.
    out
        File to write, of one of `SUFFIXES`; what has its name is replaced. A name of OME-Zarr must be the store's own: it is
        finished as it is.
    progress
        Called with the fraction that is done; what it raises stops the writing.

    Returns
    -------
    The files written: each whole or not there, whatever happens.

    Raises
    ------
    VolumeError
        A block is missing or damaged.
    OutputError
        A file cannot be written; what was there before is unharmed.
    UsageError
        A name of none of the formats, or of another OME-Zarr.
    MissingExtraError
        zarr or h5py is not installed.
    """
    kind = check_out(out)
    sink = ZarrSink(store)
    files = output_files(out, sink.layout.arrays)
    total = sum(_size(sink.layout, name) for name in files)
    done = 0

    def report(voxels: int) -> None:
        nonlocal done
        done += voxels
        if progress is not None:
            progress(done / total)

    match kind:
        case "ome-zarr":
            if out.resolve() != store.resolve():
                raise UsageError(f"{store} was to be finished as {out}, but an OME-Zarr is finished where it is; move it")
        case "hdf5":
            _replace(out, lambda part: _write_hdf5(sink, part, report))
        case "tiff":
            # The labels last.
            for name in sorted(files, key=ARRAYS.index, reverse=True):
                _write_one_tiff(sink, name, files[name], report)
        case _:
            assert_never(kind)
    return list(dict.fromkeys(files.values()))


def micrometres(voxel: VoxelSize | None) -> tuple[float, float, float] | None:
    """A voxel size in µm along plane, row and column; None if it is unknown or its unit no length."""
    if voxel is None or voxel.unit not in _MICROMETRES:
        return None
    planes, rows, cols = (size * _MICROMETRES[voxel.unit] for size in voxel.size)
    return planes, rows, cols


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside `path`, then move there."""
    part = part_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(part)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        if isinstance(error, PhaselineError):
            raise
        raise OutputError(f"{path} cannot be written ({error.strerror or error}); what was computed is kept: check the folder "
                          "and the space left, and go on with --resume") from error


def _write_hdf5(sink: ZarrSink, path: Path, report: Callable[[int], None]) -> None:
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "volumes", "writing HDF5") from error
    # The oldest format: every program reads it, and it holds no times.
    with _Guarded(path) as guarded, h5py.File(guarded, "w", libver=("earliest", "v110")) as file:
        for name in sink.layout.arrays:
            lead, chunk = sink.layout.lead(name), sink.layout.chunk
            data = file.create_dataset(
                name,
                shape=(*lead, *sink.layout.shape),
                dtype=sink.layout.dtype(name),
                chunks=(*(1 for _ in lead), *chunk),
                compression="gzip",
                compression_opts=4,
                fletcher32=True,
                track_times=False,
            )
            data.attrs.update(_hdf5_attributes(sink.layout, name))
            for box in _slabs(sink.layout, name, chunk[0]):
                data[(..., *box.slices)] = sink.read(name, box)
                guarded.check()
                report(math.prod(lead) * box.size)
        _add_nexus(file, sink.layout)


class _Guarded:
    """A file for HDF5, which crashes the process when writing fails as it closes. Here it never fails: the first error is kept,
    what follows is thrown away, and `check` or the end of the ``with`` raises it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._error: OSError | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        if exc[0] is None:
            self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def write(self, content: memoryview) -> int:
        done = 0
        try:
            while self._error is None and done < len(content):
                done += self._file.write(content[done:])
        except OSError as error:
            self._error = error
        return len(content)

    def truncate(self, size: int) -> int:
        try:
            return size if self._error else self._file.truncate(size)
        except OSError as error:
            self._error = error
            return size

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is kept back."""


def _hdf5_attributes(layout: OutputLayout, name: ArrayName) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if layout.voxel is not None:
        attributes |= {"voxel_size": np.array(layout.voxel.size), "voxel_unit": _text(layout.voxel.unit)}
    size = micrometres(layout.voxel)
    if size is not None:
        # As ilastik's and Fiji's HDF5 have it.
        attributes["element_size_um"] = np.array(size)
    if name != "confidence":
        attributes |= {
            "class_values": np.array(layout.classes.values, np.uint16),
            "class_names": _texts(layout.classes.names),
            "class_colours": _texts(layout.classes.colours),
        }
    return attributes


def _text(text: str) -> Any:
    return _texts([text])[0]


def _texts(texts: Sequence[str]) -> Any:
    """Of fixed length, in UTF-8: HDF5 keeps others apart, at places that depend on the order of writing."""
    import h5py

    encoded = [text.encode() for text in texts]
    return np.array(encoded, h5py.string_dtype("utf-8", max(map(len, encoded))))


def _add_nexus(file: h5py.File, layout: OutputLayout) -> None:
    """What makes viewers of NeXus files show the labels: /entry/segmentation, an NXdata whose arrays are links."""
    entry = file.create_group("entry")
    data = entry.create_group("segmentation")
    shown: list[ArrayName] = [name for name in layout.arrays if name != "probabilities"] or list(layout.arrays)
    for group, kind, default in ((file, "NXroot", "entry"), (entry, "NXentry", "segmentation"), (data, "NXdata", None)):
        group.attrs["NX_class"] = _text(kind)
        if default is not None:
            group.attrs["default"] = _text(default)
    for name in layout.arrays:
        data[name] = file[name]
    data.attrs["signal"] = _text(shown[0])
    if shown[1:]:
        data.attrs["auxiliary_signals"] = _texts(shown[1:])
    voxel = layout.voxel.size if layout.voxel else (1.0, 1.0, 1.0)
    data.attrs["axes"] = _texts([*(["."] if layout.lead(shown[0]) else []), "z", "y", "x"])
    for axis, length, size, origin in zip("zyx", layout.shape, voxel, layout.origin, strict=True):
        positions = data.create_dataset(axis, data=origin + size * np.arange(length), track_times=False)
        positions.attrs["units"] = _text(layout.voxel.unit if layout.voxel else "pixel")


def _write_one_tiff(sink: ZarrSink, name: ArrayName, path: Path, report: Callable[[int], None]) -> None:
    _replace(path, lambda part: _write_tiff(sink, name, part, report))


def _write_tiff(sink: ZarrSink, name: ArrayName, path: Path, report: Callable[[int], None]) -> None:
    """One array: a page a plane, of probabilities all planes of the first class, then of the next."""
    layout = sink.layout
    size = micrometres(layout.voxel)
    resolution: dict[str, Any] = {}
    # Pixels per centimetre, along columns and rows; TIFF's 32 bits hold no more. The description has it all.
    if size is not None and max(1e4 / size[1], 1e4 / size[2]) < 2**32:
        resolution = {"resolution": (1e4 / size[2], 1e4 / size[1]), "resolutionunit": "CENTIMETER"}
    described: dict[str, Any] = {"axes": "CZYX" if layout.lead(name) else "ZYX"}
    if layout.voxel is not None:
        described |= {"spacing": layout.voxel.size[0], "voxel_size": layout.voxel.size, "unit": layout.voxel.unit}
    if name != "confidence":
        described |= {
            "class_values": layout.classes.values, "class_names": layout.classes.names, "class_colours": layout.classes.colours}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            _pages(sink, name, report),
            shape=(*layout.lead(name), *layout.shape),
            dtype=layout.dtype(name),
            photometric="minisblack",
            compression="zlib",
            compressionargs={"level": 6},
            maxworkers=1,
            metadata=described,
            **resolution,
        )


def _pages(sink: ZarrSink, name: ArrayName, report: Callable[[int], None]) -> Iterator[Voxels]:
    lead = sink.layout.lead(name)
    for index in range(math.prod(lead)):
        for box in _slabs(sink.layout, name, sink.layout.chunk[0]):
            slab = sink.read(name, box)
            # Before the pages are taken: behind the last one, nothing is asked for any more.
            report(box.size)
            yield from (slab[index] if lead else slab)


def _slabs(layout: OutputLayout, name: ArrayName, planes: int) -> Iterator[Box]:
    """Runs of whole planes: as many as are compressed together, or fewer where that would be large."""
    plane_bytes = _size(layout, name) // layout.shape[0] * layout.dtype(name).itemsize
    n = max(1, min(planes, _PART_BYTES // plane_bytes))
    for start in range(0, layout.shape[0], n):
        yield Box((start, 0, 0), (min(start + n, layout.shape[0]), *layout.shape[1:]))


def _size(layout: OutputLayout, name: ArrayName) -> int:
    return math.prod(layout.lead(name)) * math.prod(layout.shape)
