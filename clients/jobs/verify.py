"""Whether a finished output still holds what the job wrote: every block read again, against the ledger's checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from phaseline.clients.jobs.blocks import JobAxes, stages
from phaseline.clients.jobs.ledger import bad_planes, failed_blocks, last_lines, read_ledger
from phaseline.clients.jobs.request import job_folder
from phaseline.clients.volumes.finished import check_out, output_files
from phaseline.clients.volumes.opening import open_volume
from phaseline.clients.volumes.volume import Box, Volume, Voxels
from phaseline.clients.volumes.writing import ARRAYS, ArrayName
from phaseline.clients.volumes.zarr_sink import ZarrSink, checksum
from phaseline.runtime.errors import JobError, MissingInputError, UsageError, VolumeError


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes
    ----------
    blocks
        That were compared.
    faults
        What differs, could not be read, or was never done, for people.
    unlabelled
        Slices that the job could not label, for people; the output says 0 there, as the ledger does.
    """

    blocks: int
    faults: tuple[str, ...]
    unlabelled: tuple[str, ...]


def verify(out: Path, progress: Callable[[float], None] = lambda part: None) -> Verification:
    """Read an output again.

    Parameters
    ----------
    out
        Of `phaseline segment`; its job's folder lies beside it.
    progress
        Called with the fraction done.

    Raises
    ------
    MissingInputError
        There is no such output.
    JobError
        There is no ledger of it, or the job was not finished.
    """
    out = Path(out)
    if not out.exists():
        raise MissingInputError(f"{out} does not exist; give the output of a job")
    header, lines = read_ledger(job_folder(out))
    if not any("finished" in line for line in lines):
        raise JobError(f"the job of {out} is not finished; go on with phaseline segment … --resume")
    shape = cast(tuple[int, int, int], tuple(header["shape"]))
    stage = stages(shape, cast(JobAxes, header["axes"]), int(header["slices"]))[-1]
    last, faults = last_lines(lines), list[str]()
    with contextlib.ExitStack() as stack:
        read = _reader(out, shape, int(header["classes"]), stack)
        for number, box in enumerate(stage.blocks):
            if (stage.name, number) not in last:
                faults.append(f"block {number}: the ledger does not say that it was done")
                continue
            # None: it could not be done, and 0 stands there.
            for name, wanted in last[stage.name, number].get("outputs", {}).items():
                try:
                    found = checksum(read(name, box))
                    if found != wanted:
                        faults.append(f"block {number}, {name} from {box.start} to {box.stop}: it holds {found}, but the job "
                                      f"wrote {wanted}")
                except (VolumeError, UsageError) as error:
                    faults.append(f"block {number}, {name}: {error}")
            progress((number + 1) / len(stage.blocks))
    return Verification(len(stage.blocks), tuple(faults), (*bad_planes(last).values(), *failed_blocks(last)))


def _reader(out: Path, shape: tuple[int, int, int], classes: int, stack: contextlib.ExitStack
            ) -> Callable[[ArrayName, Box], Voxels]:
    """How to read a block of an array of the output."""
    kind = check_out(out)
    if kind == "ome-zarr":
        return ZarrSink(out).read
    files, opened = output_files(out, ARRAYS), dict[tuple[ArrayName, str], Volume]()

    def part(name: ArrayName, choice: str = "") -> Volume:
        if (name, choice) not in opened:
            dataset = ",".join(filter(None, (name if kind == "hdf5" else "", choice))) or None
            volume = stack.enter_context(open_volume(files[name], dataset=dataset))
            if volume.info.shape != shape:
                raise VolumeError(f"{volume.info.name} has the shape {volume.info.shape}, expected {shape}: another's output")
            opened[name, choice] = volume
        return opened[name, choice]

    def read(name: ArrayName, box: Box) -> Voxels:
        if name != "probabilities":
            return part(name).read(box)
        axis = "d0" if kind == "hdf5" else "c"
        return np.stack([part(name, f"{axis}={i}").read(box) for i in range(classes)])

    return read
