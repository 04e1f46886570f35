"""Smaller copies of what a job wrote, so that viewers show a volume at once.

    level 0 ──▶ half along each axis ──▶ level 1 ──▶ … ──▶ no axis above 256 voxels

    labels      the most frequent of the (up to) 8 voxels; of equally frequent ones the smallest value, 0 (unlabelled) last
    confidence  their mean, halves rounded up

An axis less than half as long as the longest is not halved. A level is in the metadata once it is whole: what a kill leaves of
one is made anew. Probabilities have no pyramid.
"""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.volumes.volume import Box, Voxels
from phaseline.clients.volumes.writing import ArrayName, even_part
from phaseline.clients.volumes.zarr_sink import ZarrSink, create_level, metadata, read_shards, write_shards
from phaseline.runtime.errors import OutputError, PhaselineError

Shape = tuple[int, int, int]

_SMALL = 256
# Computed at once: eight times as many voxels are read for it.
_SHARD = (16, 512, 512)
_CHUNK = (16, 256, 256)


def build_pyramid(store: Path, progress: Callable[[float], None] | None = None) -> int:
    """Write the levels that are missing. Needs up to 250 MiB of memory for labels of uint8, twice that for uint16.

    Parameters
    ----------
    store
        What `create_store` made, all of whose blocks are written.
    progress
        Called with the fraction that is done.

    Returns
    -------
    The number of levels, level 0 included.

    Raises
    ------
    VolumeError
        A block is missing or damaged.
    OutputError
        A level cannot be written.
    """
    sink = ZarrSink(store)
    names: list[ArrayName] = [name for name in sink.layout.arrays if name != "probabilities"]
    factors = level_factors(sink.layout.shape)
    # Each level is an eighth of the one before, at most: the first is most of the work.
    total, done = sum(math.prod(_shape(sink, factor)) for factor in factors[1:]) * len(names), 0
    try:
        for name, level in itertools.product(names, range(1, len(factors))):
            shape = _shape(sink, factors[level])
            if level >= _complete(sink, name):
                for voxels in _build_level(sink, name, level, factors):
                    if progress is not None:
                        progress((done + voxels) / total)
            done += math.prod(shape)
    except OSError as error:
        if isinstance(error, PhaselineError):
            raise
        raise OutputError(f"the pyramid of {store} cannot be written ({error.strerror or error}); free space there, and go on "
                          "with --resume") from error
    return len(factors)


def remove_pyramid(store: Path) -> None:
    """Remove all levels but the first: before blocks are written again, of which they would show the old ones.

    Raises
    ------
    OutputError
        They cannot be removed.
    """
    sink = ZarrSink(store)
    try:
        for name in sink.layout.arrays:
            group = sink.group(name)
            group.update_attributes(metadata(sink.layout, name, [(1, 1, 1)]))
            for level in itertools.count(1):
                folder = store / group.path / str(level)
                if not folder.exists():
                    break
                shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"the pyramid of {store} cannot be removed ({error.strerror or error}); check its "
                          "permissions") from error


def level_factors(shape: Shape) -> list[Shape]:
    """How many voxels of level 0 lie along a voxel of each level, from level 0 on."""
    factors = [(1, 1, 1)]
    now = shape
    while max(now) > _SMALL:
        halved = [2 * n >= max(now) for n in now]
        z, y, x = (f * 2 if h else f for f, h in zip(factors[-1], halved, strict=True))
        factors.append((z, y, x))
        now = _over(shape, (z, y, x))
    return factors


def most_frequent(labels: npt.NDArray[Any], factor: Shape) -> npt.NDArray[Any]:
    """Labels (planes, rows, cols), each length a multiple of `factor`'s 1 or 2 → of each group the most frequent value; among
    equals the smallest but 0, then 0."""
    groups = _groups(labels, factor)
    result: npt.NDArray[Any] = groups[0].copy()
    mixed = np.zeros(result.shape, np.bool_)
    for group in groups[1:]:
        mixed |= group != result
    # One less, so that 0 becomes the largest; most groups are of one value, and done.
    one = labels.dtype.type(1)
    values = groups[:, mixed] - one
    best = np.zeros(values.shape[1], np.uint32)
    for value in values:
        count = (values == value).sum(0, dtype=np.uint32)
        np.maximum(best, count << np.uint32(16) | (np.uint32(0xFFFF) - value), out=best)
    result[mixed] = (np.uint32(0xFFFF) - (best & np.uint32(0xFFFF))).astype(labels.dtype) + one
    return result


def mean(confidence: npt.NDArray[np.uint8], factor: Shape) -> npt.NDArray[np.uint8]:
    """uint8 array (planes, rows, cols), lengths multiples of `factor`'s 1 or 2 → the mean of each group, halves rounded up."""
    groups = _groups(confidence, factor)
    n = np.uint16(len(groups))
    result: npt.NDArray[np.uint8] = ((groups.sum(0, dtype=np.uint16) + n // np.uint16(2)) // n).astype(np.uint8)
    return result


def _build_level(sink: ZarrSink, name: ArrayName, level: int, factors: list[Shape]) -> Iterator[int]:
    """Write a level anew, and yield the number of voxels done."""
    group = sink.group(name)
    folder = sink.path / group.path / str(level)
    if folder.exists():
        shutil.rmtree(folder)
    shape = _shape(sink, factors[level])
    chunk = _each(even_part, shape, _CHUNK)
    # In whole chunks.
    shard = _each(lambda n, most, part: min(math.ceil(n / part), max(1, most // part)) * part, shape, _SHARD, chunk)
    array = create_level(group, level, sink.layout, name, shape, chunk, shard)
    source = sink.level(name, level - 1)
    below = _shape(sink, factors[level - 1])
    step = _each(lambda a, b: a // b, factors[level], factors[level - 1])
    smaller = most_frequent if name == "labels" else mean
    done = 0
    for box in _tiles(shape, shard):
        start = _each(lambda at, f: at * f, box.start, step)
        stop = _each(lambda at, f, n: min(at * f, n), box.stop, step, below)
        voxels = read_shards(source, Box(start, stop))
        # The last voxel along an odd length stands for two: that changes neither which is most frequent nor the mean.
        lacking = [(0, n * f - have) for n, f, have in zip(box.shape, step, voxels.shape, strict=True)]
        voxels = np.pad(voxels, lacking, "edge") if any(n for _, n in lacking) else voxels
        write_shards(array, box, smaller(voxels, step))
        done += box.size
        yield done
    group.update_attributes(metadata(sink.layout, name, factors[:level + 1]))


def _groups(voxels: Voxels, factor: Shape) -> Voxels:
    """Array of shape (group size, planes, rows, cols)."""
    offsets = itertools.product(*(range(f) for f in factor))
    return np.stack([voxels[z::factor[0], y::factor[1], x::factor[2]] for z, y, x in offsets])


def _complete(sink: ZarrSink, name: ArrayName) -> int:
    attributes: Any = sink.group(name).attrs["ome"]
    return len(attributes["multiscales"][0]["datasets"])


def _shape(sink: ZarrSink, factor: Shape) -> Shape:
    return _over(sink.layout.shape, factor)


def _over(shape: Shape, factor: Shape) -> Shape:
    return _each(lambda n, f: math.ceil(n / f), shape, factor)


def _each(function: Callable[..., int], *triples: Shape) -> Shape:
    planes, rows, cols = (function(*numbers) for numbers in zip(*triples, strict=True))
    return planes, rows, cols


def _tiles(shape: Shape, step: Shape) -> Iterator[Box]:
    """Boxes of at most `step` that make up a volume."""
    for start in itertools.product(*(range(0, n, s) for n, s in zip(shape, step, strict=True))):
        stop = tuple(min(a + s, n) for a, s, n in zip(start, step, shape, strict=True))
        yield Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
