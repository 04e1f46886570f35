"""The working store of a job, and its result: an OME-Zarr 0.5 image whose blocks are files of their own (extra ``volumes``).

    OUT.ome.zarr/
      zarr.json            multiscales, image-label (colours, names), and the layout
      0  1  2  …           labels, and their pyramid once it is built
      confidence/0 1 …     if wanted; a multiscale group like the root
      probabilities/0      if wanted; axes class, plane, row, column

    block ──▶ one shard: 0/c/3/0/0    written beside, synced, renamed; missing = not written yet

Specification: ngff.openmicroscopy.org/0.5, zarr-specs.readthedocs.io (v3, sharding). Chunks are compressed with zstd and carry
its checksum: damage is an error, never a wrong label.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.volumes.volume import Box, Voxels
from phaseline.clients.volumes.writing import ArrayName, OutputLayout, part_path
from phaseline.runtime.errors import MissingExtraError, MissingInputError, OutputError, OutputExistsError, VolumeError

if TYPE_CHECKING:
    import zarr

STORE_FORMAT = 1
LAYOUT = "phaseline"
"""Attribute of the root group that holds the format and the layout."""

_GROUPS: dict[ArrayName, str] = {"labels": "", "confidence": "confidence", "probabilities": "probabilities"}
# What zarr's decoders raise for damaged files.
_DAMAGE = (OSError, ValueError, RuntimeError, LookupError, TypeError)


def create_store(path: Path, layout: OutputLayout) -> None:
    """Make an empty store: it appears whole, or not at all.

    Parameters
    ----------
    path
        The folder to make, ``.ome.zarr`` by custom; parent folders are made too.
    layout
        Without labels among its arrays the root is a plain group.

    Raises
    ------
    OutputExistsError
        Something has this name.
    OutputError
        It cannot be written.
    MissingExtraError
        zarr is not installed.
    """
    zarr = _zarr()
    if os.path.lexists(path):
        raise OutputExistsError(f"{path} exists; choose another name, or allow it with --overwrite")
    part = part_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if part.exists():
            shutil.rmtree(part)
        attributes: dict[str, Any] = {LAYOUT: {"format": STORE_FORMAT, "layout": layout.to_json()}}
        root = zarr.create_group(part, zarr_format=3)
        for name in layout.arrays:
            group = root.create_group(_GROUPS[name]) if _GROUPS[name] else root
            create_level(group, 0, layout, name, layout.shape, layout.chunk, layout.shard)
            ome = metadata(layout, name, [(1, 1, 1)])
            if group is root:
                attributes |= ome
            else:
                group.update_attributes(ome)
        # The layout is what makes it a store.
        root.update_attributes(attributes)
        part.rename(path)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(f"{path} cannot be made ({error.strerror or error}); check the folder, its permissions and the space "
                          "left") from error


def create_level(
    group: zarr.Group,
    level: int,
    layout: OutputLayout,
    name: ArrayName,
    shape: tuple[int, int, int],
    chunk: tuple[int, int, int],
    shard: tuple[int, int, int],
) -> zarr.Array[Any]:
    """An empty array of a multiscale group, whose shards are written even where all voxels are 0."""
    lead = layout.lead(name)
    return group.create_array(
        str(level),
        shape=(*lead, *shape),
        dtype=layout.dtype(name),
        chunks=(*(1 for _ in lead), *chunk),
        shards=(*lead, *shard),
        compressors=_zarr().codecs.ZstdCodec(level=3, checksum=True),
        fill_value=0,
        dimension_names=("c", "z", "y", "x") if lead else ("z", "y", "x"),
        config={"write_empty_chunks": True},
    )


def metadata(layout: OutputLayout, name: ArrayName, factors: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """The ``ome`` attributes of a multiscale group whose level i has voxels `factors[i]` times as large as those of level 0."""
    lead = bool(layout.lead(name))
    unit = {"unit": layout.voxel.unit} if layout.voxel else {}
    axes = [*([{"name": "c", "type": "channel"}] if lead else []), *({"name": n, "type": "space", **unit} for n in "zyx")]
    voxel = layout.voxel.size if layout.voxel else (1.0, 1.0, 1.0)
    datasets = []
    for level, factor in enumerate(factors):
        scale = [size * n for size, n in zip(voxel, factor, strict=True)]
        # A voxel that stands for several has its centre between theirs.
        centre = [at + size * (n - 1) / 2 for at, size, n in zip(layout.origin, voxel, factor, strict=True)]
        datasets.append({"path": str(level), "coordinateTransformations": [
            {"type": "scale", "scale": [*([1.0] if lead else []), *scale]},
            {"type": "translation", "translation": [*([0.0] if lead else []), *centre]},
        ]})
    how = {"type": "mode" if name == "labels" else "mean"} if len(factors) > 1 else {}
    ome: dict[str, Any] = {"version": "0.5", "multiscales": [{"name": name, **how, "axes": axes, "datasets": datasets}]}
    if name == "labels":
        table = layout.classes
        colours = ([int(colour[i:i + 2], 16) for i in (1, 3, 5)] for colour in table.colours)
        ome["image-label"] = {
            "version": "0.5",
            "colors": [{"label-value": v, "rgba": [*rgb, 255]} for v, rgb in zip(table.values, colours, strict=True)],
            "properties": [{"label-value": v, "name": n} for v, n in zip(table.values, table.names, strict=True)],
        }
    return {"ome": ome}


class ZarrSink:
    """An existing store, for writing blocks and reading them back; see `VolumeSink`.

    Parameters
    ----------
    path
        What `create_store` made.

    Attributes
    ----------
    path
        As given.
    layout
        What is written.

    Raises
    ------
    MissingInputError
        There is no such folder.
    VolumeError
        It is no store that a job of this version began.
    MissingExtraError
        zarr is not installed.
    """

    def __init__(self, path: Path) -> None:
        zarr = _zarr()
        self.path = Path(path)
        if not self.path.is_dir():
            raise MissingInputError(f"{path} does not exist; give the path of a job's output")
        try:
            self.root = zarr.open_group(self.path, mode="r+", zarr_format=3)
            stored: Any = self.root.attrs[LAYOUT]
            if stored["format"] != STORE_FORMAT:
                raise VolumeError(f"{path} has the format {stored['format']}, expected {STORE_FORMAT}; use the version of "
                                  "phaseline that wrote it")
            self.layout = OutputLayout.from_json(stored["layout"])
            self._arrays = {name: self.level(name, 0) for name in self.layout.arrays}
        except VolumeError:
            raise
        except _DAMAGE as error:
            raise VolumeError(f"{path} is not the output of a job ({type(error).__name__}: {error}), expected a zarr group that "
                              "phaseline began; choose another, or begin anew") from error

    def group(self, name: ArrayName) -> zarr.Group:
        """The multiscale group of an array."""
        group: zarr.Group = self.root[_GROUPS[name]] if _GROUPS[name] else self.root
        return group

    def level(self, name: ArrayName, level: int) -> zarr.Array[Any]:
        """An array of the pyramid."""
        array: zarr.Array[Any] = _zarr().open_array(self.path / _GROUPS[name] / str(level), mode="r+", zarr_format=3)
        return array

    def write(self, name: ArrayName, box: Box, voxels: Voxels) -> None:
        """As `VolumeSink.write`."""
        self.layout.check(name, box, voxels)
        write_shards(self._arrays[name], box, voxels)

    def written(self, name: ArrayName, box: Box) -> bool:
        """As `VolumeSink.written`."""
        self.layout.check(name, box)
        return all(_holds(file) for file in shard_files(self._arrays[name], box))

    def read(self, name: ArrayName, box: Box) -> Voxels:
        """As `VolumeSink.read`."""
        self.layout.check(name, box)
        return read_shards(self._arrays[name], box)

    def clean(self) -> None:
        """Remove what killed writers left: files that were not renamed. While nobody writes.

        Raises
        ------
        OutputError
            One cannot be removed.
        """
        try:
            for left in self.path.rglob("*.partial"):
                left.unlink()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be cleaned of what a killed run left ({error.strerror}); check its "
                              "permissions") from error


def checksum(voxels: npt.NDArray[Any]) -> str:
    """What tells voxels from others: CRC-32 of dtype, shape and values in C order, 8 hexadecimal digits."""
    little = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<"))
    crc = zlib.crc32(f"{little.dtype.str} {voxels.shape}".encode())
    return f"{zlib.crc32(little.reshape(-1).view(np.uint8).data, crc):08x}"


def shard_files(array: zarr.Array[Any], box: Box) -> list[Path]:
    """The files that hold a box."""
    assert array.shards is not None
    lead = array.ndim - 3
    ranges = [range(start // n, math.ceil(stop / n))
              for start, stop, n in zip(box.start, box.stop, array.shards[lead:], strict=True)]
    keys = [(*(0,) * lead, z, y, x) for z in ranges[0] for y in ranges[1] for x in ranges[2]]
    return [_folder(array) / array.metadata.encode_chunk_key(key) for key in keys]


def write_shards(array: zarr.Array[Any], box: Box, voxels: Voxels) -> None:
    """Write a box of whole shards: each is in its place whole, and on the disk, or missing. Raises OutputError."""
    files = shard_files(array, box)
    try:
        _blind(array)[(..., *box.slices)] = voxels
        for file in files:
            # Also the moment at which network file systems say that the disk is full.
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    except OSError as error:
        raise OutputError(f"{_folder(array)} cannot be written ({error.strerror or error}), its block from {box.start} to "
                          f"{box.stop} is missing, {voxels.nbytes / 2**20:.1f} MiB before compression; free space there, and go "
                          "on with --resume") from error


def read_shards(array: zarr.Array[Any], box: Box) -> Voxels:
    """Any box, once it is written. Raises VolumeError."""
    for file in shard_files(array, box):
        # An empty file too would be read as zeros.
        if not _holds(file):
            raise VolumeError(f"{file} is missing or empty: the output is unfinished; go on with --resume")
    try:
        return np.ascontiguousarray(array[(..., *box.slices)])
    except _DAMAGE as error:
        reason = " ".join(str(error).split())
        raise VolumeError(f"{_folder(array)} cannot be read from {box.start} to {box.stop}, a file of it is damaged ({reason}); "
                          "go on with --resume, which checks what was written") from error


def _blind(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """The same array, but its shards are written without a look at those in their places: zarr would read them to keep what lies
    outside the box. Nothing does, and what a crash left may be damaged."""
    from zarr import Array, AsyncArray
    from zarr.storage import LocalStore, StorePath

    class Blind(LocalStore):
        async def get(self, *args: Any, **kwargs: Any) -> None:
            return None

    store: Any = array.store
    metadata: Any = array.metadata
    # `zarr.open_array` takes this option too, and forgets it.
    return Array(AsyncArray(metadata, StorePath(Blind(store.root), array.path), config={"write_empty_chunks": True}))


def _holds(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _folder(array: zarr.Array[Any]) -> Path:
    store: Any = array.store
    return Path(store.root) / array.path


def _zarr() -> ModuleType:
    try:
        import zarr
        import zarr.codecs
    except ImportError as error:
        raise MissingExtraError("zarr", "volumes", "writing volumes") from error
    return zarr
