"""Which dataset of an HDF5 file is the volume, and its voxel size, by the conventions of NeXus and of common writers.

    given path ─────────────────────────────────────────▶ that dataset
    none        default ─▶ … ─▶ NXdata ─▶ its signal  ──▶ the first of these that is one 3-D dataset of numbers;
                all NXdata's signals                      several candidates: refused, and listed
                NXtomo's detector data
                every dataset in the file

Links are followed, in the file and to others; a dataset reached by several is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import h5py
import numpy as np

from phaseline.clients.volumes.reader import voxel_of
from phaseline.clients.volumes.volume import VoxelSize
from phaseline.runtime.errors import UsageError, VolumeError


def find_dataset(file: h5py.File, path: str | None) -> h5py.Dataset:
    """The dataset that is the volume.

    Parameters
    ----------
    file
        Open for reading.
    path
        Its path in the file; None or ``auto`` to find it.

    Raises
    ------
    UsageError
        There is none of that path, or the choice is not clear; the message lists what there is.
    VolumeError
        A link on the way leads to a file or dataset that is missing, or there is no volume.
    """
    if path is not None and path != "auto":
        return _follow(file, path)
    dangling: list[str] = []
    everything = list(_walk(file, dangling))
    for found in (_default_signal(file), _signals(everything), _tomo(everything), everything):
        candidates = _distinct(item for item in found if is_volume_like(item))
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise UsageError(f"{file.filename} holds {len(candidates)} volumes, expected one; choose with --dataset: "
                             f"{_listed(candidates)}")
    links = f" (the links {', '.join(dangling)} lead to nothing)" if dangling else ""
    raise VolumeError(f"{file.filename} holds no 3-D dataset of numbers{links}; give another file, or name one with --dataset")


def is_volume_like(item: Any) -> bool:
    """Whether this is a dataset of numbers with three axes; more may come before them if they have length one."""
    return (isinstance(item, h5py.Dataset) and item.shape is not None and item.dtype.kind in "biuf" and len(item.shape) >= 3
            and 0 not in item.shape and all(n == 1 for n in item.shape[:-3]))


def voxel_size(dataset: h5py.Dataset) -> VoxelSize | None:
    """Voxel size from ``element_size_um``, from ``voxel_size`` with its unit, or from the axes of the NXdata it is in.

    All of them in the order planes, rows, columns; None where the file does not say, or says no unit.
    """
    attributes = dataset.attrs
    if "element_size_um" in attributes:
        return _sizes(attributes["element_size_um"], "um")
    for owner in (dataset, dataset.parent):
        for key in ("voxel_size", "pixel_size"):
            if key in owner.attrs:
                unit = next((_text(owner.attrs[name]) for name in (f"{key}_unit", f"{key}_units", "unit", "units")
                             if name in owner.attrs), "")
                return _sizes(owner.attrs[key], unit)
    return _from_axes(dataset)


def _sizes(value: Any, unit: str) -> VoxelSize | None:
    sizes = np.atleast_1d(np.asarray(value))
    if sizes.dtype.kind not in "iuf" or sizes.size not in (1, 3):
        return None
    return voxel_of([float(size) for size in np.broadcast_to(sizes, 3)], [unit] * 3)


def _from_axes(dataset: h5py.Dataset) -> VoxelSize | None:
    group = dataset.parent
    names = group.attrs.get("axes")
    if names is None or np.ndim(names) != 1 or len(names) != len(dataset.shape):
        return None
    steps: list[float | None] = []
    units = []
    for name in [_text(name) for name in names][-3:]:
        axis = group.get(name)
        if not isinstance(axis, h5py.Dataset) or axis.ndim != 1 or axis.size < 2 or axis.dtype.kind not in "iuf":
            return None
        at = np.asarray(axis[()], np.float64)
        gaps = np.diff(at)
        if not np.allclose(gaps, gaps.mean(), rtol=1e-3):
            return None
        steps.append(float((at[-1] - at[0]) / (len(at) - 1)))
        units.append(_text(axis.attrs.get("units", "")))
    return voxel_of(steps, units)


def _follow(file: h5py.File, path: str) -> h5py.Dataset:
    try:
        item = file[path]
    except (KeyError, OSError) as error:
        link = _link(file, path)
        if link is not None:
            raise VolumeError(f"{file.filename} has a link at {path} to {link}, which cannot be opened, so none of its planes "
                              "can be read; copy that file too, to the same place beside this one") from error
        listed = _listed(_distinct(filter(is_volume_like, _walk(file, [])))) or "none, it holds no volume"
        raise UsageError(f"{file.filename} has no dataset {path}; choose one of: {listed}") from error
    if not isinstance(item, h5py.Dataset) or item.shape is None:
        raise UsageError(f"{file.filename} has no dataset at {path} but a {type(item).__name__.lower()}; name a dataset in it")
    return item


def _link(group: h5py.Group, path: str) -> str | None:
    """Where the first link on a path leads that is external, or that dangles."""
    name, _, rest = path.strip("/").partition("/")
    link = group.get(name, getlink=True) if name else None
    if isinstance(link, h5py.ExternalLink):
        return f"{link.path} in {link.filename}"
    child = group.get(name) if name else None
    if isinstance(link, h5py.SoftLink) and child is None:
        return str(link.path)
    return _link(child, rest) if isinstance(child, h5py.Group) and rest else None


def _walk(group: h5py.Group, dangling: list[str], seen: set[Any] | None = None) -> Iterator[Any]:
    """Every group and dataset below a group, each once; adds the names of links that lead to nothing."""
    seen = {group.id} if seen is None else seen
    for name in group:
        try:
            item = group[name]
        except (KeyError, OSError):
            dangling.append(f"{group.name.rstrip('/')}/{name}")
            continue
        if item.id in seen:
            continue
        seen.add(item.id)
        yield item
        if isinstance(item, h5py.Group):
            yield from _walk(item, dangling, seen)


def _default_signal(file: h5py.File) -> list[Any]:
    group: Any = file
    for _ in range(16):
        if _class(group) == "NXdata":
            return _signal(group)
        name = _text(group.attrs.get("default", ""))
        if not name:
            return []
        group = _follow_group(group, name)
    return []


def _follow_group(group: h5py.Group, name: str) -> h5py.Group:
    try:
        item = group[name]
    except (KeyError, OSError) as error:
        raise VolumeError(f"{group.file.filename} says that {name} in {group.name} is its default, but that cannot be opened; "
                          "copy the files it links to as well, or name the volume with --dataset") from error
    return item if isinstance(item, h5py.Group) else group


def _signals(items: list[Any]) -> list[Any]:
    return [signal for item in items if _class(item) == "NXdata" for signal in _signal(item)]


def _signal(group: h5py.Group) -> list[Any]:
    name = _text(group.attrs.get("signal", ""))
    if not name:
        # As it was before 2014: an attribute of the dataset.
        return [item for item in group.values() if isinstance(item, h5py.Dataset) and _text(item.attrs.get("signal", "")) == "1"]
    try:
        return [group[name]]
    except (KeyError, OSError) as error:
        raise VolumeError(f"{group.file.filename} says that {name} in {group.name} is its signal, but that cannot be opened; "
                          "copy the files it links to as well, or name the volume with --dataset") from error


def _tomo(items: list[Any]) -> list[Any]:
    entries = [item for item in items if isinstance(item, h5py.Group) and isinstance(item.get("definition"), h5py.Dataset)
               and _text(item["definition"][()]) == "NXtomo"]
    found = (entry.get("instrument/detector/data") for entry in entries)
    return [item for item in found if item is not None]


def _distinct(items: Any) -> list[h5py.Dataset]:
    return list({item.id: item for item in reversed(list(items))}.values())[::-1]


def _listed(items: list[h5py.Dataset]) -> str:
    return "; ".join(f"{item.name}: {item.shape} of {item.dtype}" for item in items)


def _class(item: Any) -> str:
    return _text(item.attrs.get("NX_class", "")) if isinstance(item, h5py.Group) else ""


def _text(value: Any) -> str:
    value = value.item() if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.size == 1) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
