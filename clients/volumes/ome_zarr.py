"""Volumes in Zarr: OME-Zarr 0.4 and 0.5 at one of their levels, and plain arrays (Zarr v2, v3, sharded).

    folder ──▶ array ────────────────────────────▶ planes, rows, columns of it ──▶ read(box)
           └─▶ group ──▶ multiscales ──▶ level ──┘                                   └── is every chunk's file there,
                     └─▶ its only array                                                  and whole?

Zarr itself gives the fill value where a chunk is missing, without a word.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from phaseline.clients.volumes.reader import (
    Missing,
    PlanesOf,
    Reader,
    choose_planes,
    fingerprint_of,
    native,
    plain_dtype,
    refuse_missing,
    split_dataset,
    voxel_of,
)
from phaseline.clients.volumes.volume import Box, VolumeInfo, Voxels, VoxelSize
from phaseline.runtime.errors import UsageError, VolumeError

# Bytes of Blosc's header; at 12 stands the length of the whole, little-endian.
_BLOSC_HEADER = 16


class ZarrVolume(Reader):
    """An array of a Zarr hierarchy in a folder.

    Parameters
    ----------
    path
        Folder of an array or a group.
    dataset
        Path below it, and choices along axes before z: ``images/0,c=1,t=0``; ``z=t`` takes times for planes.
    level
        Resolution level of an OME-Zarr image, 0 the finest; None for 0.
    missing
        What to do about chunks whose files are missing.
    """

    def __init__(self, path: Path, dataset: str | None = None, level: int | None = None, missing: Missing = "refuse") -> None:
        super().__init__(path)
        inner, self._choices = split_dataset(dataset)
        self._inner = None if inner == "auto" else inner
        self._level = level
        self._missing: Missing = missing
        self._array: Any = None
        self._planes = PlanesOf(None, ())

    def _open(self) -> VolumeInfo:
        node = _open_node(self.path, self._inner)
        if isinstance(node, zarr.Group) and not _multiscales(node):
            node = _only_volume(self.path, node)
        image = _multiscales(node) if isinstance(node, zarr.Group) else {}
        if isinstance(node, zarr.Group):
            array, level = _choose_level(self.path, node, image, self._level)
        else:
            array, level = node, -1
            if self._level is not None:
                raise UsageError(f"{self.path} was asked for level {self._level}, but {array.name} is one array without levels; "
                                 "leave the level out, or name an OME-Zarr image")
        axes, units = _axes(image, array)
        chosen = "".join(f",{axis}={index}" for axis, index in self._choices.items())
        inner = f"{array.path}{chosen}".strip(",")
        name = (f"{self.path}:{inner}" if inner else str(self.path)) + (f" (level {level})" if level >= 0 else "")
        self._planes = choose_planes(axes, array.shape, self._choices, name)
        self._array = array
        return VolumeInfo(name, "ome-zarr" if image else "zarr", self._planes.of(array.shape),
                          plain_dtype(np.dtype(array.dtype), name), self._planes.of(array.chunks),
                          _voxel_size(image, level, self._planes, units),
                          fingerprint_of(_files(self.path / array.path), array.path, self._planes, array.shape))

    def _close(self) -> None:
        self._array = None

    def _voxels(self, box: Box) -> Voxels:
        where = self._planes.select(box)
        self._check_chunks(where, box)
        voxels = np.empty(tuple(s.stop - s.start for s in where), self.info.dtype)
        # Chunk by chunk: of several at once, zarr leaves the others running when one fails, and they complain at exit.
        for index in _chunks_of(where, self._array.chunks):
            part = tuple(slice(max(s.start, i * c), min(s.stop, (i + 1) * c))
                         for s, i, c in zip(where, index, self._array.chunks, strict=True))
            to = tuple(slice(p.start - s.start, p.stop - s.start) for s, p in zip(where, part, strict=True))
            voxels[to] = native(np.asarray(self._array[part]))
        return voxels.reshape(box.shape)

    def _check_chunks(self, where: tuple[slice, ...], box: Box) -> None:
        array, axis = self._array, self._planes.axis
        size = array.shards or array.chunks
        inner = None if array.shards is None else math.prod(s // c for s, c in zip(array.shards, array.chunks, strict=True))
        checks_length = inner is not None or _ends_with_blosc(array)
        for index in _chunks_of(where, size):
            key = array.metadata.encode_chunk_key(index)
            file = self.path / array.path / key
            plane = box.start[0] if axis is None else max(box.start[0], index[axis] * size[axis])
            if not file.is_file():
                if self._missing == "refuse":
                    kind = "shard" if array.shards else "chunk"
                    refuse_missing(self.info.name, f"its {kind} {key} of {size} voxels is missing", plane)
            elif checks_length:
                expected = _blosc_length(file) if inner is None else _shard_length(file, inner, array)
                size_bytes = file.stat().st_size
                if size_bytes < expected:
                    raise VolumeError(f"{self.info.name}: plane {plane} cannot be read, {key} has {size_bytes} bytes, expected "
                                      f"{expected}: it is truncated; copy it again")


def _chunks_of(where: tuple[slice, ...], size: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks that a block touches."""
    return product(*(range(s.start // c, -(-s.stop // c)) for s, c in zip(where, size, strict=True)))


def _open_node(path: Path, inner: str | None) -> Any:
    # Consolidated metadata is a copy, which may be older than the arrays.
    root = zarr.open_array(path, mode="r") if _is_array(path) else zarr.open_group(path, mode="r", use_consolidated=False)
    if inner is None:
        return root
    if not isinstance(root, zarr.Group):
        raise UsageError(f"{path} is one array, in which there is no dataset {inner}; leave it out")
    try:
        return root[inner.strip("/")]
    except KeyError as error:
        listed = "; ".join(_describe(node) for node in _volumes(root)) or "none, it holds no volume"
        raise UsageError(f"{path} has no dataset {inner}; choose one of: {listed}") from error


def _is_array(path: Path) -> bool:
    if (path / ".zarray").is_file():
        return True
    metadata = path / "zarr.json"
    return metadata.is_file() and json.loads(metadata.read_text(encoding="utf-8")).get("node_type") == "array"


def _multiscales(group: Any) -> dict[str, Any]:
    """The first image of a group by OME-Zarr's metadata: 0.5's lie under ``ome``; empty if it has none."""
    attributes = dict(group.attrs)
    found = attributes.get("ome", attributes).get("multiscales") or [{}]
    return dict(found[0])


def _volumes(group: Any) -> Iterator[Any]:
    """Images, as groups, and arrays of three axes or more below a group; not the levels of images."""
    for _, node in sorted(group.members(max_depth=0)):
        if isinstance(node, zarr.Group) and not _multiscales(node):
            yield from _volumes(node)
        elif isinstance(node, zarr.Group) or (node.dtype.kind in "biuf" and node.ndim >= 3):
            yield node


def _only_volume(path: Path, group: Any) -> Any:
    found = list(_volumes(group))
    if not found:
        raise VolumeError(f"{path} holds no array of numbers with three axes; give another folder, or name one with --dataset")
    if len(found) > 1:
        raise UsageError(f"{path} holds {len(found)} volumes, expected one; choose with --dataset: "
                         f"{'; '.join(_describe(node) for node in found)}")
    return found[0]


def _describe(node: Any) -> str:
    return f"{node.path}: an OME-Zarr image" if isinstance(node, zarr.Group) else f"{node.path}: {node.shape} of {node.dtype}"


def _choose_level(path: Path, group: Any, image: dict[str, Any], level: int | None) -> tuple[Any, int]:
    paths = [str(dataset["path"]) for dataset in image["datasets"]]
    if level is not None and not 0 <= level < len(paths):
        listed = "; ".join(f"{i}: {group[name].shape}" for i, name in enumerate(paths))
        raise UsageError(f"{path} has no level {level}; choose one of {listed}")
    name = paths[level or 0]
    if name not in group:
        raise VolumeError(f"{path} names {name} as its level {level or 0}, but has no such array, so none of its planes can be "
                          "read; copy the whole folder")
    return group[name], level or 0


def _axes(image: dict[str, Any], array: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names and units of an array's axes; by its dimension names, or as d0, d1, …, z, y, x where nothing says."""
    axes = [axis if isinstance(axis, dict) else {"name": axis} for axis in image.get("axes", ())]
    if axes:
        return tuple(str(axis["name"]).lower() for axis in axes), tuple(str(axis.get("unit", "")) for axis in axes)
    names: Sequence[str | None] = getattr(array.metadata, "dimension_names", None) or ()
    known = tuple(str(name).lower() for name in names)
    if known[-2:] != ("y", "x"):
        if array.ndim < 3:
            raise VolumeError(f"{array.path or array.name} has the shape {array.shape}, expected planes, rows and columns; "
                              "choose another dataset")
        known = (*(f"d{i}" for i in range(array.ndim - 3)), "z", "y", "x")
    return known, ("",) * array.ndim


def _voxel_size(image: dict[str, Any], level: int, planes: PlanesOf, units: tuple[str, ...]) -> VoxelSize | None:
    if not image or planes.axis is None:
        return None
    scale = np.ones(len(units))
    steps = [*image["datasets"][level].get("coordinateTransformations", ()), *image.get("coordinateTransformations", ())]
    for step in steps:
        if step.get("type") == "scale" and "scale" in step:
            scale *= np.asarray(step["scale"], np.float64)
    return voxel_of([float(scale[i]) for i in (planes.axis, -2, -1)], [units[i] for i in (planes.axis, -2, -1)])


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _ends_with_blosc(array: Any) -> bool:
    return bool(array.compressors) and "blosc" in type(array.compressors[-1]).__name__.lower()


def _blosc_length(file: Path) -> int:
    """Bytes of a chunk by its header: Blosc reads on behind the end of one that was cut."""
    with file.open("rb") as stream:
        header = stream.read(_BLOSC_HEADER)
    return int(struct.unpack("<12xI", header)[0]) if len(header) == _BLOSC_HEADER else _BLOSC_HEADER


def _shard_length(file: Path, inner: int, array: Any) -> int:
    """Bytes of a shard whose list of chunks is at its start; 0 for others, whose list is cut off first, as its checksum says."""
    sharding = array.metadata.to_dict()["codecs"][0]["configuration"]
    if sharding["index_location"] != "start":
        return 0
    index = np.fromfile(file, "<u8", 2 * inner)
    offsets, lengths = index[:len(index) // 2 * 2].reshape(-1, 2).T
    written = offsets != np.iinfo(np.uint64).max
    return int((offsets + lengths)[written].max(initial=16 * inner))
