"""Doing one block: read ─▶ label ─▶ write ─▶ checksum, the same code in a thread here and in a Dask worker elsewhere.

    thread A   read 3 │ ············ label 3 ············ │ write 3
    thread B          │ read 4 │     (waits its turn)     │ ············ label 4 ············ │ write 4
    thread C            write 2 │ read 5 │

One block is labelled at a time, unless servers do it; the others of a process read or write meanwhile. What a block gives is a
function of the order and its number, so doing it twice does no harm.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.jobs.blocks import Stage, axis_index, slice_boxes, stages
from phaseline.clients.jobs.combine import combined, quantised
from phaseline.clients.jobs.order import Order
from phaseline.clients.jobs.scratch import read_scratch, write_scratch
from phaseline.clients.jobs.statistics import block_statistics
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.region import RegionVolume, check_finite
from phaseline.clients.volumes.volume import Axis, Box, VolumeInfo, Voxels
from phaseline.clients.volumes.writing import ArrayName
from phaseline.clients.volumes.zarr_sink import ZarrSink, checksum
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import StoppedError, VolumeError


@dataclass
class BlockResult:
    """What a block's line in the ledger is made of.

    Attributes
    ----------
    outputs
        Array name → checksum of the block.
    input
        Checksum of the voxels that were read.
    errors
        Slice number → why it could not be labelled; its labels are 0.
    statistics
        From `block_statistics`; None in stages that write to scratch.
    seconds
        ``read``, ``wait``, ``compute`` and ``write``.
    worker
        Who did it.
    """

    outputs: dict[str, str]
    input: str
    errors: dict[str, str]
    statistics: dict[str, Any] | None
    seconds: dict[str, float]
    worker: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")


class BlockWorker:
    """Does blocks of one order in this process; opens what it needs on ``with``. Threads may share it.

    Parameters
    ----------
    order
        Of the job.

    Attributes
    ----------
    stopped
        Set from outside: blocks in work end with a `StoppedError`, after the slice that is labelled now.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.stopped = threading.Event()
        self._turn = threading.BoundedSemaphore(order.at_once)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.volume = stack.enter_context(self.order.input.volume())
            self.segmenter: Segmenter = stack.enter_context(self.order.engine.segmenter())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def source_info(self) -> VolumeInfo:
        """Of the whole input, not of the region of it."""
        return self.volume.volume.info if isinstance(self.volume, RegionVolume) else self.volume.info

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Of the order, for the volume."""
        return stages(self.volume.info.shape, self.order.axes, self.order.slices)

    @functools.cached_property
    def sink(self) -> ZarrSink:
        """The working store."""
        return ZarrSink(self.order.store)

    def run(self, stage: int, block: int) -> BlockResult:
        """Do a block.

        Parameters
        ----------
        stage, block
            Numbers, as `stages` gives them.

        Raises
        ------
        PhaselineError
            It could not be done; nothing is recorded of it.
        """
        todo = self.stages[stage]
        box = todo.blocks[block]
        return self._combine(box) if todo.name == "combine" else self._label(todo, block, box)

    def _label(self, stage: Stage, block: int, box: Box) -> BlockResult:
        clock = _Clock()
        voxels, bad = self.read(box)
        clock.lap("read")
        with self._turn:
            clock.lap("wait")
            wanted = stage.name != "segment" or self.order.probabilities
            labels, confidence, probabilities = self._labelled(voxels, stage.axis, bad, probabilities=wanted)
            clock.lap("compute")
        if stage.name == "segment":
            outputs = self._write(box, labels, confidence, probabilities)
            statistics = block_statistics(labels, confidence, box, stage.axis).to_dict()
        else:
            assert probabilities is not None
            outputs, statistics = {stage.name: write_scratch(self.order.scratch, stage, block, probabilities)}, None
        clock.lap("write")
        errors = {str(box.start[0] + plane): error for plane, error in bad.items()}
        return BlockResult(outputs, checksum(voxels), errors, statistics, clock.seconds)

    def _combine(self, box: Box) -> BlockResult:
        clock = _Clock()
        parts = [read_scratch(self.order.scratch, stage, box) for stage in self.stages[:-1]]
        clock.lap("read")
        with self._turn:
            clock.lap("wait")
            index, confidence, probabilities = combined(parts)
            labels = self.segmenter.recipe.classes.to_values(index)
            # Planes that could not be read have no probabilities at all.
            labels[(parts[0].max(axis=(0, 2, 3)) == 0)] = 0
            clock.lap("compute")
        outputs = self._write(box, labels, confidence, probabilities)
        statistics = block_statistics(labels, confidence, box).to_dict()
        clock.lap("write")
        return BlockResult(outputs, "", {}, statistics, clock.seconds)

    def input_checksum(self, stage: int, block: int) -> str:
        """Of the voxels that a block is made of, as its result has it."""
        return checksum(self.read(self.stages[stage].blocks[block])[0])

    def read(self, box: Box) -> tuple[Voxels, dict[int, str]]:
        """The voxels, and why planes of the block cannot be used; these are at the lower end of the intensity window."""
        name, bad = self.volume.info.name, dict[int, str]()
        try:
            voxels = self.volume.read(box)
        except VolumeError:
            # One bad plane must not take the others with it.
            voxels = np.empty(box.shape, self.volume.info.dtype)
            for number, piece in enumerate(slice_boxes(box, "plane")):
                try:
                    voxels[number] = self.volume.read(piece)[0]
                except VolumeError as error:
                    bad[number] = str(error)
        for number, piece in enumerate(slice_boxes(box, "plane")):
            try:
                if number not in bad:
                    check_finite(voxels[number : number + 1], piece, name)
            except VolumeError as error:
                bad[number] = str(error)
            if number in bad:
                voxels[number] = self.segmenter.recipe.window.low
        return voxels, bad

    def _labelled(self, voxels: Voxels, axis: Axis, bad: dict[int, str], *, probabilities: bool
                  ) -> tuple[npt.NDArray[Any], U8, U8 | None]:
        """Labels, confidence and, if wanted, quantised probabilities of a block, slice by slice; 0 in bad planes."""
        number, classes = axis_index(axis), self.segmenter.recipe.classes
        labels = np.zeros(voxels.shape, classes.to_values(np.zeros(0, np.uint8)).dtype)
        confidence = np.zeros(voxels.shape, np.uint8)
        kept = np.zeros((len(classes.values), *voxels.shape), np.uint8) if probabilities else None
        for i in range(voxels.shape[number]):
            if self.stopped.is_set():
                raise StoppedError("the job was stopped; go on with --resume")
            if axis == "plane" and i in bad:
                continue
            where = tuple(i if j == number else slice(None) for j in range(3))
            found = self.segmenter.segment(np.ascontiguousarray(voxels[where]), probabilities=probabilities)
            labels[where], confidence[where] = found.labels, found.confidence
            if kept is not None and found.probabilities is not None:
                kept[(slice(None), *where)] = quantised(found.probabilities)
        rows = list(bad)
        labels[rows], confidence[rows] = 0, 0
        if kept is not None:
            kept[:, rows] = 0
        return labels, confidence, kept

    def _write(self, box: Box, labels: npt.NDArray[Any], confidence: U8, probabilities: U8 | None) -> dict[str, str]:
        arrays: dict[ArrayName, Voxels] = {"labels": labels}
        if self.order.confidence:
            arrays["confidence"] = confidence
        if self.order.probabilities and probabilities is not None:
            arrays["probabilities"] = probabilities
        for name, values in arrays.items():
            self.sink.write(name, box, values)
        return {name: checksum(values) for name, values in arrays.items()}


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = round(now - self._last, 4), now


_workers: dict[Order, BlockWorker] = {}
_lock = threading.Lock()


def perform(order: Order, stage: int, block: int) -> BlockResult:
    """Do a block in this process, whichever it is; what the order needs is opened once, and stays open for the next one."""
    with _lock:
        if order not in _workers:
            close_workers()
            worker = BlockWorker(order)
            worker.__enter__()
            _workers[order] = worker
        worker = _workers[order]
    return worker.run(stage, block)


@contextlib.contextmanager
def lent(worker: BlockWorker) -> Iterator[None]:
    """Have `perform` use a worker that is open already, for its order; it stays the caller's."""
    with _lock:
        close_workers()
        _workers[worker.order] = worker
    try:
        yield
    finally:
        with _lock:
            _workers.pop(worker.order, None)


def close_workers() -> None:
    """Close what `perform` opened in this process."""
    for order in list(_workers):
        _workers.pop(order).__exit__(None, None, None)
