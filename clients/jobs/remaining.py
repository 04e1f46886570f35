"""What of a job is left to do: by its ledger, and by what is really there.

    the ledger says done ──▶ output:  is what was written still there?        no ─▶ done anew
                        └──▶ scratch: is its file there, where it is needed?  no ─▶ done anew
"""

from __future__ import annotations

from phaseline.clients.jobs.ledger import Ledger, Line
from phaseline.clients.jobs.scratch import has_scratch
from phaseline.clients.jobs.worker import BlockWorker
from phaseline.clients.volumes.volume import Box
from phaseline.clients.volumes.zarr_sink import ZarrSink, checksum
from phaseline.runtime.errors import VolumeError

Key = tuple[int, int]
"""Numbers of a stage, and of a block of it."""


def remaining(worker: BlockWorker, ledger: Ledger) -> list[Key]:
    """All blocks to be done, in the order of the stages; reads the output as far as it is done.

    Parameters
    ----------
    worker
        Open; its working store is there.
    ledger
        Of the job.
    """
    lines, last = _done(worker, ledger), len(worker.stages) - 1
    keys = [(number, block) for number, stage in enumerate(worker.stages) for block in range(len(stage.blocks))]
    before = {key for key in keys if key[0] != last and key not in lines}
    sink, boxes = ZarrSink(worker.order.store), worker.stages[last].blocks
    # A mean is taken anew when one of those that it is made of is.
    outputs = {key for key in keys if key[0] == last
               and (before or key not in lines or not _holds(sink, boxes[key[1]], lines[key]))}
    if outputs:
        before |= {key for key in keys if key[0] != last
                   and not has_scratch(worker.order.scratch, worker.stages[key[0]], key[1])}
    return [key for key in keys if key in before or key in outputs]


def has_same_voxels(worker: BlockWorker, ledger: Ledger) -> bool:
    """Whether a job with planes that could not be used can go on although its input is not the same file any more: what is
    done was made of the voxels that are there now. Reads as much of the input as is done."""
    done = {key: line for key, line in _done(worker, ledger).items() if line["input"]}
    return (any("errors" in line and line["errors"] for line in ledger.lines.values())
            and all(worker.input_checksum(*key) == line["input"] for key, line in done.items()))


def _done(worker: BlockWorker, ledger: Ledger) -> dict[Key, Line]:
    numbers: dict[str, int] = {stage.name: number for number, stage in enumerate(worker.stages)}
    return {(numbers[name], block): line for (name, block), line in ledger.lines.items() if line["state"] == "done"}


def _holds(sink: ZarrSink, box: Box, line: Line) -> bool:
    try:
        return all(checksum(sink.read(name, box)) == expected for name, expected in line["outputs"].items())
    except VolumeError:
        return False
