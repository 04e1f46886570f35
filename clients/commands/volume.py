"""`phaseline segment` of a volume, a job; and `phaseline verify`, `phaseline planes`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from phaseline.clients import options
from phaseline.clients.images import check_output, write_array, write_labels
from phaseline.clients.jobs.job import Step, VolumeJob
from phaseline.clients.jobs.order import InputOrder
from phaseline.clients.jobs.request import JobRequest
from phaseline.clients.jobs.verify import verify
from phaseline.clients.volumes.finished import SUFFIXES
from phaseline.clients.volumes.opening import is_volume, open_volume
from phaseline.clients.volumes.raw import RawLayout
from phaseline.clients.volumes.reader import Missing
from phaseline.clients.volumes.region import Region, check_finite
from phaseline.clients.volumes.volume import Box
from phaseline.runtime.errors import JobError, PhaselineError, StoppedError, UsageError

Dataset = Annotated[str | None, typer.Option(
    "--dataset", metavar="PATH[,c=0…]", help="Volumes: dataset in an HDF5 or Zarr file, and what to take along further axes; by "
    "default the only one, or the NeXus signal.")]
Level = Annotated[int | None, typer.Option("--level", min=0, help="Volumes: resolution level of OME-Zarr, 0 the finest.")]
Raw = Annotated[str | None, typer.Option("--raw", metavar="PxRxC:TYPE[:offset=N]", help="Volumes: shape and type of raw voxels, "
                                         "e.g. 2048x2048x2048:>u2.")]
MissingChunks = Annotated[str, typer.Option("--missing-chunks", help="Volumes: chunks that were never written: refuse, or fill.")]


def wants_volume(path: Path, out: Path, raw: str | None) -> bool:
    """Whether `phaseline segment` is asked for a volume: the input is one, or it is a folder and the output is one."""
    return raw is not None or is_volume(path) or (path.is_dir() and out.name.lower().endswith(tuple(SUFFIXES)))


def check_missing(text: str) -> Missing:
    """Refuse another word than ``refuse`` or ``fill``."""
    match text:
        case "refuse" | "fill":
            return text
        case _:
            raise UsageError(f"missing-chunks is {text!r}, expected refuse or fill")


def input_order(path: Path, dataset: str | None, level: int | None, raw: str | None, missing_chunks: str, region: str | None
                ) -> InputOrder:
    """The voxels that the options name."""
    return InputOrder(path, dataset, level, None if raw is None else RawLayout.parse(raw), check_missing(missing_chunks),
                      None if region is None else Region.parse(region))


def refuse_options(path: Path, out: Path, given: dict[str, object]) -> None:
    """Refuse options of volumes where there is none.

    Raises
    ------
    UsageError
        One was given.
    """
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{', '.join(wrong)} came, for volumes only, but {path} is none, or it is a folder and {out} none; "
                         "expected HDF5, Zarr, a TIFF stack or raw voxels; for a folder of planes an output such as "
                         "labels.ome.zarr")


def run_job(request: JobRequest, screen: options.Screen, *, resume: bool, overwrite: bool, dry_run: bool) -> None:
    """Plan a job, print the plan, and do it unless `dry_run`."""
    screen.say("opening the input, and measuring a slice")
    with VolumeJob.open(request, resume=resume, overwrite=overwrite) as job:
        table = Table.grid(padding=(0, 2))
        for name, value in job.plan.rows():
            table.add_row(name, value)
        screen.console.print(table)
        if dry_run:
            return
        if job.worker.segmenter.source is not None:
            screen.warn_untrained(job.worker.segmenter.source.spec)
        bars = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f} %"),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), console=screen.console, transient=True,
            disable=screen.console.quiet or not screen.console.is_terminal)
        begun = time.perf_counter()
        with bars:
            bar = bars.add_task("segmenting", total=None, speed="")

            def advance(step: Step) -> None:
                speed = step.fresh / (time.perf_counter() - begun)
                bars.update(bar, description=step.stage, completed=step.done, total=step.total,
                            speed=f"{speed / 1e6:.2f} Mvoxel/s")

            try:
                outcome = job.run(say=screen.say, progress=advance, overwrite=overwrite)
            except KeyboardInterrupt:
                raise StoppedError(f"interrupted; what is done is safe in {request.folder}: go on with --resume") from None
        for line in outcome.failed:
            options.fail(line)
        if outcome.failed and not request.allow_failed:
            page = request.folder / "report.html"
            raise JobError(f"{len(outcome.failed)} of its parts could not be labelled, see {page}; the others are done. Put the "
                           "input right and go on with --resume, or take it as it is: --resume --allow-failed")
        screen.say(f"{', '.join(map(str, outcome.outputs))}: {outcome.blocks} blocks in {outcome.seconds:.1f} s; report: "
                   f"{request.folder / 'report.html'}")


def typed_command() -> str:
    """The command line, for the report."""
    return shlex.join(["phaseline", *sys.argv[1:]])


def verify_command(
    out: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A volume that `phaseline segment` wrote.")],
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Read a segmented volume again, and compare it with what the job wrote."""
    del debug
    screen = options.Screen(quiet)
    with Progress(TextColumn("verifying"), BarColumn(), TimeRemainingColumn(), console=screen.console, transient=True,
                  disable=quiet or not screen.console.is_terminal) as bars:
        bar = bars.add_task("", total=1.0)
        found = verify(out, lambda part: bars.update(bar, completed=part))
    for line in found.unlabelled:
        screen.say(f"note: unlabelled: {line}")
    for line in found.faults:
        options.fail(line)
    if found.faults:
        raise PhaselineError(f"{out} is not what the job wrote: {len(found.faults)} faults in {found.blocks} blocks; copy it "
                             "again, or begin anew with phaseline segment … --overwrite")
    screen.say(f"{out}: all of {found.blocks} blocks are as the job wrote them")


def planes_command(
    volume: Annotated[Path, typer.Argument(metavar="VOLUME", help="A volume, as `phaseline segment` takes it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the planes.")],
    planes: Annotated[str | None, typer.Option(
        "--planes", metavar="N,N,…", help="Which; by default four, evenly spaced.")] = None,
    dataset: Dataset = None,
    level: Level = None,
    raw: Raw = None,
    missing_chunks: MissingChunks = "refuse",
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Take planes out of a volume as images with its own grey levels, to paint labels on and to fit."""
    del debug
    screen = options.Screen(quiet)
    layout = None if raw is None else RawLayout.parse(raw)
    with open_volume(volume, dataset=dataset, level=level, raw=layout, missing=check_missing(missing_chunks),
                     as_volume=True) as opened:
        count, rows, cols = opened.info.shape
        chosen = _plane_numbers(planes, count)
        # TIFF where it holds these grey levels as they are; .npy for all others.
        suffix, write = (".tif", write_labels) if opened.info.dtype in (np.uint8, np.uint16) else (".npy", write_array)
        files = {plane: out / f"{volume.name.split('.')[0]}_plane{plane:05d}{suffix}" for plane in chosen}
        for file in files.values():
            check_output(file, overwrite)
        for plane, file in files.items():
            box = Box((plane, 0, 0), (plane + 1, rows, cols))
            voxels = opened.read(box)
            check_finite(voxels, box, opened.info.name)
            write(file, voxels[0])
    screen.say(f"{out}: planes {', '.join(map(str, chosen))} of {volume.name}, which has {count}")


def _plane_numbers(text: str | None, count: int) -> list[int]:
    if text is None:
        return sorted({round((i + 0.5) * count / 4 - 0.5) for i in range(4)})
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < count for part in parts):
        raise UsageError(f"planes is {text!r}, expected numbers from 0 to {count - 1}, such as 0,{count // 2}")
    return sorted({int(part) for part in parts})
