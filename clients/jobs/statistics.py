"""What a worker counts of each finished block, and what a job makes of it.

    labels, confidence of a block ──▶ block_statistics ──▶ BlockStatistics ──▶ a line of the ledger
                                                                 │
    blocks in any order ──▶ merge_blocks ──▶ fill_boundaries ──▶ certificate
                                                 ▲
                            first slices of blocks, read from the output

All sums are of integers, so the order in which blocks finish changes no digit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.labels import UNLABELLED
from phaseline.clients.volumes.volume import AXES, Axis, Box
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import UsageError

Labels = npt.NDArray[np.unsignedinteger[Any]]
"""Label values, 0 = unlabelled."""

HISTOGRAM_BINS = 64
"""Of the confidence 0–255; bin i counts 4 i … 4 i + 3."""

WINDOW_PX = 64
"""Least side of the windows among which the least confident one is sought."""


@dataclass(frozen=True)
class Window:
    """The window of a slice that has the lowest mean confidence.

    Attributes
    ----------
    row, col
        Its first pixel in the slice; a slice's rows and columns are the volume's other two axes, in their order.
    rows, cols
        Its size: 64 to 127 pixels a side, or all of a smaller slice.
    mean
        Mean confidence of its labelled pixels, 0–255.
    """

    row: int
    col: int
    rows: int
    cols: int
    mean: float


@dataclass(frozen=True)
class SliceStatistics:
    """Counts of one slice, or of a block's part of it.

    Attributes
    ----------
    index
        The slice in the job's output, along the job's axis.
    voxels
        Number of voxels by label value, without values that do not occur; 0 counts the unlabelled ones.
    confidence_sum
        Over the labelled voxels; None without confidence.
    changed, compared
        Pixels labelled here and in the slice before, and how many of them have another label here; None where the slice before
        is not in the block.
    weakest
        None without confidence, or without a labelled pixel.
    """

    index: int
    voxels: Mapping[int, int]
    confidence_sum: int | None = None
    changed: int | None = None
    compared: int | None = None
    weakest: Window | None = None

    @property
    def labelled(self) -> int:
        """Number of labelled voxels."""
        return sum(count for value, count in self.voxels.items() if value != UNLABELLED)

    @property
    def mean_confidence(self) -> float | None:
        """Of the labelled voxels, 0–1."""
        return None if self.confidence_sum is None or not self.labelled else self.confidence_sum / self.labelled / 255

    @property
    def flicker(self) -> float | None:
        """Share of the pixels whose label differs from that in the slice before, 0–1; None where no two can be compared."""
        return None if self.changed is None or not self.compared else self.changed / self.compared

    def __add__(self, other: Self) -> Self:
        """Counts of two parts of a slice together."""
        weakest = [part.weakest for part in (self, other) if part.weakest is not None]
        return dataclasses.replace(
            self,
            voxels={v: self.voxels.get(v, 0) + other.voxels.get(v, 0) for v in sorted({*self.voxels, *other.voxels})},
            confidence_sum=_sum(self.confidence_sum, other.confidence_sum),
            changed=_sum(self.changed, other.changed),
            compared=_sum(self.compared, other.compared),
            weakest=min(weakest, key=lambda window: (window.mean, window.row, window.col)) if weakest else None,
        )


@dataclass(frozen=True)
class BlockStatistics:
    """Counts of a block, or of several.

    Attributes
    ----------
    slices
        Ascending along the job's axis, each once.
    histogram
        Labelled voxels by confidence, `HISTOGRAM_BINS` numbers; None without confidence.
    """

    slices: tuple[SliceStatistics, ...]
    histogram: tuple[int, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "slices": [{**dataclasses.asdict(one), "voxels": {str(v): n for v, n in one.voxels.items()}} for one in self.slices],
            "histogram": None if self.histogram is None else list(self.histogram),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        slices = tuple(
            SliceStatistics(**{
                **one,
                "voxels": {int(value): count for value, count in one["voxels"].items()},
                "weakest": None if one["weakest"] is None else Window(**one["weakest"]),
            })
            for one in content["slices"]
        )
        return cls(slices, None if content["histogram"] is None else tuple(content["histogram"]))


def block_statistics(labels: Labels, confidence: U8 | None, box: Box, axis: Axis = "plane") -> BlockStatistics:
    """Count one finished block.

    Parameters
    ----------
    labels
        Unsigned array of shape (planes, rows, cols), 0 = unlabelled.
    confidence
        uint8 array of that shape, or None.
    box
        Where the block lies in the job's output; it may hold slices in part.
    axis
        The job's axis, along which its slices follow one another.

    Raises
    ------
    UsageError
        The arrays do not have the box's shape.
    """
    for name, array in (("labels", labels), ("confidence", confidence)):
        if array is not None and array.shape != box.shape:
            raise UsageError(f"{name} of shape {array.shape} came for a block of shape {box.shape}; expected the same")
    along = AXES.index(axis)
    first = box.start[along]
    row, col = (start for i, start in enumerate(box.start) if i != along)
    slices: list[SliceStatistics] = []
    histogram = None if confidence is None else np.zeros(256, np.int64)
    before: Labels | None = None
    for i in range(box.shape[along]):
        here = np.ascontiguousarray(labels.take(i, along))
        counts = np.bincount(here.reshape(-1))
        sure = None if confidence is None else np.ascontiguousarray(confidence.take(i, along))
        seen = None if counts[UNLABELLED] == 0 else here != UNLABELLED
        total = None
        if histogram is not None and sure is not None:
            here_histogram = np.bincount((sure if seen is None else sure[seen]).reshape(-1), minlength=256)
            histogram += here_histogram
            total = int(here_histogram @ np.arange(256))
        changed, compared = (None, None) if before is None else count_changes(before, here)
        slices.append(SliceStatistics(
            first + i, {int(v): int(counts[v]) for v in np.flatnonzero(counts)}, total, changed, compared,
            None if sure is None else _weakest(sure, seen, row, col),
        ))
        before = here
    if histogram is None:
        return BlockStatistics(tuple(slices))
    return BlockStatistics(tuple(slices), tuple(histogram.reshape(HISTOGRAM_BINS, -1).sum(axis=1).tolist()))


def count_changes(before: Labels, here: Labels) -> tuple[int, int]:
    """Pixels with another label than in the slice before, and pixels labelled in both: only those can be compared."""
    both = (before != UNLABELLED) & (here != UNLABELLED)
    return int(np.count_nonzero((before != here) & both)), int(np.count_nonzero(both))


def merge_blocks(blocks: Iterable[BlockStatistics]) -> BlockStatistics:
    """Counts of blocks together; a slice that several blocks hold parts of is added up."""
    slices: dict[int, SliceStatistics] = {}
    histogram: tuple[int, ...] | None = None
    for block in blocks:
        for one in block.slices:
            slices[one.index] = slices[one.index] + one if one.index in slices else one
        if block.histogram is not None:
            known = histogram or (0,) * HISTOGRAM_BINS
            histogram = tuple(a + b for a, b in zip(known, block.histogram, strict=True))
    return BlockStatistics(tuple(slices[index] for index in sorted(slices)), histogram)


def fill_boundaries(statistics: BlockStatistics, read_labels: Callable[[int], Labels]) -> BlockStatistics:
    """Compare each block's first slice with the slice before, which another block holds.

    Parameters
    ----------
    statistics
        Of the whole job, merged.
    read_labels
        A slice of the output, shape (rows, cols), by its index.
    """
    known = {one.index for one in statistics.slices}
    filled = []
    for one in statistics.slices:
        if one.compared is None and one.index - 1 in known:
            changed, compared = count_changes(read_labels(one.index - 1), read_labels(one.index))
            one = dataclasses.replace(one, changed=changed, compared=compared)
        filled.append(one)
    return dataclasses.replace(statistics, slices=tuple(filled))


def lowest(values: Mapping[int, float], count: int, distance: int = 1) -> list[int]:
    """Keys of the smallest values, smallest first, any two at least `distance` apart."""
    chosen: list[int] = []
    for key in sorted(values, key=lambda key: (values[key], key)):
        if len(chosen) == count:
            break
        if all(abs(key - other) >= distance for other in chosen):
            chosen.append(key)
    return chosen


def evenly_spaced(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, the middles of as many equal parts."""
    n = min(count, len(indices))
    return [indices[(2 * i + 1) * len(indices) // (2 * n)] for i in range(n)]


def outliers(values: Mapping[int, float], *, high: bool) -> list[int]:
    """Keys whose value is far above (`high`) or below the others, farthest first.

    Far is 5 robust standard deviations (1.4826 × the median absolute deviation) from the median, and at least 0.01: what is
    calm throughout has no outlier.
    """
    if not values:
        return []
    numbers = np.array(list(values.values()))
    centre = float(np.median(numbers))
    far = max(5 * 1.4826 * float(np.median(np.abs(numbers - centre))), 0.01)
    beyond = {key: (value - centre) * (1 if high else -1) for key, value in values.items()}
    return sorted((key for key in beyond if beyond[key] > far), key=lambda key: (-beyond[key], key))


def _sum(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _weakest(confidence: U8, seen: npt.NDArray[np.bool_] | None, row: int, col: int) -> Window | None:
    rows, cols = (_edges(length) for length in confidence.shape)
    sums = _block_sums(confidence if seen is None else confidence * seen, rows, cols)
    counts = np.outer(np.diff(rows), np.diff(cols)) if seen is None else _block_sums(seen.view(np.uint8), rows, cols)
    # A window hardly labelled says little.
    usable = 2 * counts >= np.outer(np.diff(rows), np.diff(cols))
    if not usable.any():
        return None
    means = np.where(usable, sums / np.maximum(counts, 1), math.inf)
    i, j = (int(k) for k in np.unravel_index(int(means.argmin()), means.shape))
    top, left, bottom, right = int(rows[i]), int(cols[j]), int(rows[i + 1]), int(cols[j + 1])
    return Window(row + top, col + left, bottom - top, right - left, float(means[i, j]))


def _edges(length: int) -> npt.NDArray[np.int64]:
    """Borders of windows of nearly equal sides."""
    n = max(length // WINDOW_PX, 1)
    return np.arange(n + 1) * length // n


def _block_sums(array: U8, rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    # Columns first: that way memory is read in its order, ten times faster.
    sums: npt.NDArray[np.int64] = np.add.reduceat(np.add.reduceat(array, cols[:-1], axis=1, dtype=np.int64), rows[:-1], axis=0)
    return sums
