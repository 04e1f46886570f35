"""Whether a finished output still holds what the job wrote: every block read again, against the ledger's checksums."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from phaseline.clients.jobs.blocks import JobAxes, stages
from phaseline.clients.jobs.ledger import Line, read_ledger
from phaseline.clients.jobs.request import job_folder
from phaseline.clients.volumes.finished import check_out, output_files
from phaseline.clients.volumes.opening import open_volume
from phaseline.clients.volumes.volume import Box, Voxels
from phaseline.clients.volumes.writing import ARRAYS, ArrayName
from phaseline.clients.volumes.zarr_sink import ZarrSink, checksum
from phaseline.runtime.errors import JobError, MissingInputError, VolumeError


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
    last: dict[int, Line] = {line["block"]: line for line in lines if line.get("stage") == stage.name}
    faults, unlabelled = list[str](), dict[str, None]()
    for line in lines:
        if line.get("state") == "failed" and last.get(line["block"], line).get("state") == "failed":
            unlabelled.update(dict.fromkeys([*line.get("errors", {}).values(), *([line["error"]] if "error" in line else [])]))
    with contextlib.ExitStack() as stack:
        read = _reader(out, stack)
        for number, box in enumerate(stage.blocks):
            expected = last.get(number, {}).get("outputs")
            if expected is None:
                if number not in last:
                    faults.append(f"block {number}: the ledger does not say that it was done")
                continue
            for name, wanted in expected.items():
                try:
                    found = checksum(read(name, box))
                    if found != wanted:
                        faults.append(f"block {number}, {name} from {box.start} to {box.stop}: it holds {found}, but the job "
                                      f"wrote {wanted}")
                except (VolumeError, MissingInputError) as error:
                    faults.append(f"block {number}, {name}: {error}")
            progress((number + 1) / len(stage.blocks))
    return Verification(len(stage.blocks), tuple(faults), tuple(unlabelled))


def _reader(out: Path, stack: contextlib.ExitStack) -> Callable[[ArrayName, Box], Voxels]:
    """How to read a block of an array of the output."""
    if check_out(out) == "ome-zarr":
        return ZarrSink(out).read
    files = output_files(out, ARRAYS)
    opened = {}

    def read(name: ArrayName, box: Box) -> Voxels:
        if name not in opened:
            dataset = name if check_out(out) == "hdf5" else None
            opened[name] = stack.enter_context(open_volume(files[name], dataset=dataset))
        return opened[name].read(box)

    return read
