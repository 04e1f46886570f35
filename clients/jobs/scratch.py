"""Probabilities between the stages of a job over three axes: a file a block, whole or not there.

    SCRATCH/row/000003.npy     uint8 (classes, planes, rows, cols) of one block of the stage `row`
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from phaseline.clients.jobs.blocks import Stage, axis_index
from phaseline.clients.volumes.volume import Box
from phaseline.clients.volumes.zarr_sink import checksum
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import JobError, OutputError


def write_scratch(folder: Path, stage: Stage, block: int, probabilities: U8) -> str:
    """Keep a block's probabilities.

    Returns
    -------
    Their checksum.

    Raises
    ------
    OutputError
        They cannot be written.
    """
    file = _file(folder, stage, block)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.save(stream, probabilities, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{file} cannot be written ({error.strerror}); free space, and go on with --resume") from error
    return checksum(probabilities)


def has_scratch(folder: Path, stage: Stage, block: int) -> bool:
    """Whether a block's probabilities were kept, and still are."""
    return _file(folder, stage, block).is_file()


def read_scratch(folder: Path, stage: Stage, box: Box) -> U8:
    """The probabilities of a block of the volume, from whichever files hold them.

    Returns
    -------
    uint8 array of shape (classes, planes, rows, cols).

    Raises
    ------
    JobError
        A file is missing or damaged.
    """
    found: U8 | None = None
    axis = axis_index(stage.axis)
    for number, block in enumerate(stage.blocks):
        first, last = max(block.start[axis], box.start[axis]), min(block.stop[axis], box.stop[axis])
        if first >= last:
            continue
        there = [slice(a, b) for a, b in zip(box.start, box.stop, strict=True)]
        here = [slice(0, n) for n in box.shape]
        there[axis] = slice(first - block.start[axis], last - block.start[axis])
        here[axis] = slice(first - box.start[axis], last - box.start[axis])
        file = _file(folder, stage, number)
        try:
            stored = np.load(file, mmap_mode="r", allow_pickle=False)
            if stored.dtype != np.uint8 or stored.shape[1:] != block.shape:
                raise ValueError(f"it holds {stored.dtype} {stored.shape}")
            if found is None:
                found = np.empty((len(stored), *box.shape), np.uint8)
            found[(slice(None), *here)] = stored[(slice(None), *there)]
        except (OSError, ValueError) as error:
            raise JobError(f"{file} cannot be read ({error}), but the ledger says that it is done; begin anew with --overwrite"
                           ) from error
    assert found is not None  # blocks of a stage cover the volume
    return found


def _file(folder: Path, stage: Stage, block: int) -> Path:
    return folder / stage.name / f"{block:06d}.npy"
