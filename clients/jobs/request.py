"""What a user asks of a job, and where its files are.

    OUT                     the output
    OUT.job/ledger.jsonl    what is done
    OUT.job/report.*        the certificate
    OUT.job/work.ome.zarr   the working store, where OUT is not OME-Zarr itself: a kill can't damage OUT
    OUT.job/scratch/        probabilities between stages; removed at the end
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from phaseline.clients.jobs.blocks import JobAxes
from phaseline.clients.jobs.cluster import ClusterSpec
from phaseline.clients.jobs.ledger import LEDGER, Line, check_free, has_begun, read_ledger
from phaseline.clients.jobs.order import EngineOrder, InputOrder
from phaseline.clients.volumes.finished import check_out, output_files
from phaseline.clients.volumes.writing import ARRAYS, ArrayName
from phaseline.clients.volumes.zarr_sink import ZarrSink
from phaseline.runtime.errors import JobError, OutputError, OutputExistsError, PhaselineError, UsageError

ATTEMPTS = 3


@dataclass(frozen=True)
class JobRequest:
    """A job.

    Attributes
    ----------
    input, engine
        Voxels, and what labels them.
    out
        The output; its suffix says the format.
    axes
        Across which axis slices are labelled; ``3``: all, averaged.
    confidence, probabilities
        Whether to write them too.
    memory_bytes
        That all processes on this machine may take; None: half of what is available.
    cluster
        Who does the blocks.
    slices
        In a block; None: chosen by memory.
    attempts
        How often a block is tried.
    allow_failed
        Whether to complete an output of which slices could not be labelled.
    command
        As typed, for the report.
    """

    input: InputOrder
    engine: EngineOrder
    out: Path
    axes: JobAxes = "plane"
    confidence: bool = False
    probabilities: bool = False
    memory_bytes: int | None = None
    cluster: ClusterSpec = field(default_factory=lambda: ClusterSpec("threads"))
    slices: int | None = None
    attempts: int = ATTEMPTS
    allow_failed: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if self.slices is not None and self.slices < 1:
            raise UsageError(f"a block of {self.slices} slices was asked for, expected at least 1")
        inside = self.input.path.resolve()
        # Whatever is written now: an earlier job's confidence is replaced too.
        for path in (*output_files(self.out, ARRAYS).values(), self.folder):
            there = path.resolve()
            if inside == there or inside in there.parents or there in inside.parents:
                raise UsageError(f"the output {path} would lie in or over the input {self.input.path}; choose another")

    @property
    def arrays(self) -> tuple[ArrayName, ...]:
        """What is written."""
        wanted: list[ArrayName] = ["labels"]
        if self.confidence:
            wanted.append("confidence")
        if self.probabilities:
            wanted.append("probabilities")
        return tuple(wanted)

    @property
    def folder(self) -> Path:
        """Of the ledger and the reports."""
        return job_folder(self.out)

    @property
    def store(self) -> Path:
        """The working store."""
        return self.out if self.is_store else self.folder / "work.ome.zarr"

    @property
    def is_store(self) -> bool:
        """Whether the working store is the output."""
        return check_out(self.out) == "ome-zarr"

    @property
    def scratch(self) -> Path:
        """Of probabilities between stages."""
        return self.folder / "scratch"

    def check_new(self) -> None:
        """Refuse to begin where something is.

        Raises
        ------
        OutputExistsError
            An output, or a job of it, exists.
        """
        if has_begun(self.folder):
            raise OutputExistsError(f"{self.folder} holds a job that was begun; go on with --resume, begin anew with "
                                    "--overwrite, or choose another output")
        for path in (*output_files(self.out, self.arrays).values(), self.folder):
            # What a kill at the very start leaves is nothing.
            nothing = {LEDGER} if path == self.folder else set[str]()
            if path.exists() and not (path.is_dir() and {entry.name for entry in path.iterdir()} <= nothing):
                raise OutputExistsError(f"{path} exists; replace it with --overwrite, or choose another output")

    def remove(self) -> None:
        """Remove output and job, if they are ours.

        Raises
        ------
        OutputExistsError
            A folder is not one that a job made.
        OutputError
            They cannot be removed.
        JobError
            Another process works on it.
        """
        check_free(self.folder)
        # Another run's confidence would not belong to these labels; what its ledger doesn't name may be somebody's own file.
        written: Line = {}
        with contextlib.suppress(JobError):
            written = read_ledger(self.folder)[0]
        outputs = [*output_files(self.out, tuple(name for name in ARRAYS if name in self.arrays or written.get(name))).values()]
        for path in outputs:
            if path.is_dir() and any(path.iterdir()) and not _is_store(path):
                raise OutputExistsError(f"{path} is a folder that no job wrote, so it is not replaced; choose another output")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LEDGER).is_file():
            raise OutputExistsError(f"{self.folder} holds no {LEDGER}, so it is not removed; choose another output")
        try:
            for path in (*outputs, self.folder):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"{error.filename} cannot be removed ({error.strerror}); choose another output") from error


def job_folder(out: Path) -> Path:
    """Of the ledger and the reports of an output."""
    return out.with_name(f"{out.name}.job")


def _is_store(path: Path) -> bool:
    try:
        ZarrSink(path)
    except PhaselineError:
        return False
    return True
