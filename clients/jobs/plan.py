"""What a job will take, before it begins: from one slice that was labelled to blocks, memory, disk and time.

    memory    this process with one slice labelled (with servers two), and blocks: one is read, one labelled, one written

              ┌ measured ┐   ┌───────── per slice of a block ─────────┐
              peak        +   slices · area · (3 in + 3 out + 2 out)      ≤ budget     (2 out: a shard and its compressed copy)
"""

from __future__ import annotations

import math
import shutil
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phaseline.clients.jobs.blocks import JobAxes, axis_index, slice_boxes, stages
from phaseline.clients.jobs.memory import MemoryWatch, format_bytes, resident_bytes
from phaseline.clients.jobs.order import BESIDES
from phaseline.clients.jobs.worker import BlockWorker
from phaseline.clients.volumes.volume import Axis, Box, VolumeInfo, Voxels
from phaseline.runtime.errors import JobError, VolumeError

MAX_SLICES = 64
MULTIPLE = 16
"""Slices of a block are a multiple of this where they can be: inner chunks are so long."""
BLOCKS_A_PROCESS = 8
_MARGIN = 1.15
_PYRAMID = 1 + 1 / 7
_DASK_BYTES = 120 << 20


@dataclass(frozen=True)
class Measured:
    """One slice, labelled here.

    Attributes
    ----------
    seconds
        To label it.
    peak_bytes
        Resident memory of this process meanwhile, all that was loaded included.
    slice_bytes
        What labelling a slice takes of that, on top of what is loaded.
    compressed
        Size of its labels (and confidence, if wanted), compressed, over their size as they are.
    """

    seconds: float
    peak_bytes: int
    slice_bytes: int
    compressed: float


@dataclass(frozen=True)
class Plan:
    """What a job will take.

    Attributes
    ----------
    volume
        The input, or the region of it.
    axes, slices, blocks
        Across which axis slices lie; how many are in a block; blocks of all stages.
    processes
        That label at the same time.
    measured
        What it is estimated from.
    memory_bytes, budget_bytes
        Estimated peak of the whole process tree, and what was allowed; with a cluster elsewhere of one worker.
    output_bytes, scratch_bytes, free_bytes
        Estimated size of the output and of what is removed at the end; free space where they will lie.
    seconds
        Estimated duration.
    """

    volume: VolumeInfo
    axes: JobAxes
    slices: int
    blocks: int
    processes: int
    measured: Measured
    memory_bytes: int
    budget_bytes: int
    output_bytes: int
    scratch_bytes: int
    free_bytes: int
    seconds: float

    def check(self) -> None:
        """Refuse a job that cannot fit.

        Raises
        ------
        JobError
            Not enough memory or disk.
        """
        if self.memory_bytes > self.budget_bytes:
            raise JobError(f"the job needs {format_bytes(self.memory_bytes)} of memory with blocks of one slice, but may take "
                           f"{format_bytes(self.budget_bytes)}; allow more with --memory, take a region, or fewer processes")
        needed = self.output_bytes + self.scratch_bytes
        if needed > self.free_bytes:
            raise JobError(f"the job needs about {format_bytes(needed)} of disk, but {format_bytes(self.free_bytes)} are free; "
                           "free space, or choose another output")

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for people."""
        planes, rows, cols = self.volume.shape
        size = "" if self.volume.voxel is None else (", voxels of " + " × ".join(f"{s:g}" for s in self.volume.voxel.size)
                                                     + f" {self.volume.voxel.unit}")
        scratch = f", and {format_bytes(self.scratch_bytes)} of scratch meanwhile" if self.scratch_bytes else ""
        return [
            ("input", f"{self.volume.name}: {planes} × {rows} × {cols} {self.volume.dtype} ({self.volume.format}){size}"),
            ("blocks", f"{self.blocks} of {self.slices} slices, "
                       + (f"across axis {self.axes}" if self.axes != "3" else "along three axes, then their mean")),
            ("memory", f"about {format_bytes(self.memory_bytes)} of {format_bytes(self.budget_bytes)} allowed, "
                       f"{self.processes} process{'es' * (self.processes > 1)}"),
            ("disk", f"about {format_bytes(self.output_bytes)} of output{scratch}; {format_bytes(self.free_bytes)} free"),
            ("time", f"about {format_seconds(self.seconds)} ({self.measured.seconds:.2f} s for a measured slice)"),
        ]


def measure(worker: BlockWorker) -> Measured:
    """Label one slice from the middle, or the nearest that can be used; nothing is written.

    Raises
    ------
    PhaselineError
        None can be read or labelled: the job would fail alike.
    """
    order = worker.order
    axis: Axis = "plane" if order.axes == "3" else order.axes
    image = _usable_slice(worker, axis)
    loaded = resident_bytes()
    with MemoryWatch() as watch:
        wanted = order.probabilities or order.axes == "3"
        worker.segmenter.segment(image, probabilities=wanted)  # what is loaded once, is loaded now
        started = time.perf_counter()
        found = worker.segmenter.segment(image, probabilities=wanted)
        seconds = time.perf_counter() - started
    kept = found.labels.tobytes() + (found.confidence.tobytes() if order.confidence else b"")
    return Measured(seconds, watch.peak, watch.peak - loaded, len(zlib.compress(kept, 1)) / len(kept))


def _usable_slice(worker: BlockWorker, axis: Axis) -> Voxels:
    """A slice of which at least one row comes from a plane that can be used: array of shape (rows, cols)."""
    pieces = slice_boxes(Box((0, 0, 0), worker.volume.info.shape), axis)
    middle, reasons = len(pieces) // 2, list[str]()
    for number in sorted(range(len(pieces)), key=lambda i: abs(i - middle)):
        voxels, bad = worker.read(pieces[number])
        if len(bad) < len(voxels):
            return np.ascontiguousarray(voxels.squeeze(axis_index(axis)))
        reasons += bad.values()
    raise VolumeError(f"none of its {len(pieces)} slices can be used, as the middle one says: {reasons[0]}")


def make_plan(info: VolumeInfo, order_axes: JobAxes, measured: Measured, *, budget: int, classes: int, label_bytes: int,
              confidence: bool, probabilities: bool, processes: int, shared: bool, finished_copy: bool, where: Path,
              slices: int | None = None, at_once: int = 1) -> Plan:
    """Choose the blocks, and estimate.

    Parameters
    ----------
    info
        The input.
    order_axes
        Of the job.
    measured
        One slice.
    budget
        Bytes of memory that may be taken.
    classes, label_bytes, confidence, probabilities
        What is written of each voxel.
    processes
        That label at the same time; 0 for none beside this one.
    shared
        Whether they share `budget` with this process (they are on this machine).
    finished_copy
        Whether the working store becomes another file at the end.
    where
        Folder of the output, for its free space.
    slices
        Of a block, where that is decided already.
    at_once
        Slices that one process labels at the same time.
    """
    in_flight = at_once + BESIDES
    axes: tuple[Axis, ...] = ("plane", "row", "col") if order_axes == "3" else (order_axes,)
    area = max(math.prod(info.shape) // info.shape[axis_index(axis)] for axis in axes)
    length = max(info.shape[axis_index(axis)] for axis in axes)
    scratch_of_voxel = 3 * classes if order_axes == "3" else 0
    out = label_bytes + 1 + (classes if probabilities or order_axes == "3" else 0)
    per_slice = area * (in_flight * info.dtype.itemsize + (in_flight + 2) * out + scratch_of_voxel)
    fixed = measured.peak_bytes + (at_once - 1) * measured.slice_bytes
    if processes:
        fixed = (fixed + _DASK_BYTES) * (processes + 1 if shared else 1)
    many = max(1, processes if shared else 1)
    if slices is None:
        room = (budget - fixed) / _MARGIN / (per_slice * many)
        # Enough blocks that reading, labelling and writing overlap, that all processes have work, and that a kill costs little.
        slices = max(1, min(int(room), MAX_SLICES, math.ceil(length / (BLOCKS_A_PROCESS * max(1, processes)))))
        if slices > MULTIPLE:
            slices -= slices % MULTIPLE
    found = stages(info.shape, order_axes, slices)
    voxels = math.prod(info.shape)
    written = voxels * (label_bytes + confidence) * measured.compressed * _MARGIN * _PYRAMID + voxels * classes * probabilities
    parallel = max(1, processes)
    work = sum(info.shape[axis_index(axis)] * math.prod(info.shape) / info.shape[axis_index(axis)] for axis in axes)
    first = math.prod(info.shape) / info.shape[axis_index(axes[0])]
    return Plan(
        volume=info, axes=order_axes, slices=slices, blocks=sum(len(stage.blocks) for stage in found), processes=parallel,
        measured=measured, memory_bytes=int(fixed + slices * per_slice * many * _MARGIN), budget_bytes=budget,
        output_bytes=int(written * (2 if finished_copy else 1)), scratch_bytes=voxels * scratch_of_voxel,
        free_bytes=free_bytes(where), seconds=measured.seconds * work / first / parallel,
    )


def free_bytes(folder: Path) -> int:
    """Free space of the file system that a folder lies on, or will lie on."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def format_seconds(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
