"""`phaseline segment`: images and a recipe → labels.

    --recipe                 all of it here
    --recipe, --server       deep features at the servers, the rest here
    --published, --server    images go out, labels come back

A volume is a job of its own, see `commands.volume`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phaseline.clients import options
from phaseline.clients.batch import SERVERS_LOST, Job, pending, plan, report_path, segment_files
from phaseline.clients.commands.volume import (
    Dataset,
    Level,
    MissingChunks,
    Raw,
    input_order,
    refuse_options,
    run_job,
    typed_command,
    wants_volume,
)
from phaseline.clients.crf import CRFParameters, import_densecrf
from phaseline.clients.images import list_images
from phaseline.clients.jobs.blocks import check_axes
from phaseline.clients.jobs.cluster import parse_cluster
from phaseline.clients.jobs.memory import parse_bytes
from phaseline.clients.jobs.order import EngineOrder
from phaseline.clients.jobs.request import JobRequest
from phaseline.clients.kserve import parse_servers
from phaseline.clients.recipe import recipe_hash
from phaseline.clients.remote import Transport
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.errors import ImageError, MissingInputError, PhaselineError, StoppedError, UsageError


def segment_command(
    images: Annotated[Path, typer.Argument(
        metavar="INPUT", help="An image, a folder of images, or a volume (HDF5, Zarr, TIFF stack, raw; a folder of TIFF planes "
                              "if OUT is a volume).")],
    out: Annotated[Path, typer.Option(
        "--out", help="The label image; for a folder of images, a folder; for a volume, .ome.zarr, .h5 or .tif.")],
    recipe: Annotated[Path | None, typer.Option("--recipe", help="The folder that `phaseline fit` wrote.")] = None,
    published: Annotated[str | None, typer.Option(
        "--published", metavar="NAME", help="Instead of --recipe: one that the servers have; they then do all.")] = None,
    server: options.Server = None,
    bundle: Annotated[str | None, typer.Option("--bundle", help="Where the recipe's bundle is, if it was moved.")] = None,
    confidence: Annotated[bool, typer.Option("--confidence", help="Write the confidence too.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write the classes' probabilities too (NPY).")] = False,
    crf: Annotated[bool, typer.Option("--crf", help="Refine the labels with a dense conditional random field.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    axes: Annotated[str, typer.Option(
        "--axes", help="Volumes: label slices across plane, row or col; 3: the mean over all three directions.")] = "plane",
    region: Annotated[str | None, typer.Option(
        "--region", metavar="P,R,C", help="Volumes: part of it, as START:STOP:STEP for planes, rows, columns.")] = None,
    dataset: Dataset = None,
    level: Level = None,
    raw: Raw = None,
    missing_chunks: MissingChunks = "refuse",
    memory: Annotated[str | None, typer.Option(
        "--memory", help="Volumes: what all processes here may take, e.g. 4GiB; by default half of what is free.")] = None,
    cluster: Annotated[str | None, typer.Option(
        "--cluster", help="Volumes: who does the blocks: local:N processes, tcp://HOST:PORT of a Dask scheduler, or a "
                          "dask-jobqueue FILE.yaml.")] = None,
    slices: Annotated[int | None, typer.Option(
        "--block", min=1, help="Volumes: slices in a block; by default by memory.")] = None,
    allow_failed: Annotated[bool, typer.Option(
        "--allow-failed", help="Volumes: complete the output although slices could not be labelled; they are 0.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Volumes: print the plan, and do nothing.")] = False,
    transport: options.TransportChoice = "auto",
    timeout: options.Timeout = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Segment images or a volume with a recipe: here, with servers that compute its deep features, or by servers altogether."""
    del debug
    screen = options.Screen(quiet)
    if resume and overwrite:
        raise UsageError("--resume and --overwrite came together; --resume keeps what is done, --overwrite does it again")
    if not images.exists():
        raise MissingInputError(f"{images} does not exist; give an image, a folder of images, or a volume")
    of_volumes: dict[str, object] = {
        "--axes": axes if axes != "plane" else None, "--region": region, "--dataset": dataset, "--level": level, "--raw": raw,
        "--memory": memory, "--cluster": cluster, "--block": slices, "--allow-failed": allow_failed or None,
        "--dry-run": dry_run or None}
    if wants_volume(images, out, raw):
        if published is not None or crf or recipe is None:
            raise UsageError("a volume is segmented with a recipe's folder: give --recipe (and --server, if servers are to "
                             "compute its deep features), and leave out --published and --crf")
        tls = options.client_tls(tls_ca, tls_cert, tls_key)
        options.remote_source(server, transport, timeout, tls, bundle_given=bundle is not None, device=device)  # refuses
        run_job(JobRequest(
            input=input_order(images, dataset, level, raw, missing_chunks, region),
            engine=EngineOrder(recipe, bundle, () if server is None else tuple(parse_servers(server)), cast(Transport, transport),
                               60.0 if timeout is None else timeout, tls, device, threads),
            out=out, axes=check_axes(axes), confidence=confidence, probabilities=probabilities,
            memory_bytes=None if memory is None else parse_bytes(memory), cluster=parse_cluster(cluster), slices=slices,
            allow_failed=allow_failed, command=typed_command(),
        ), screen, resume=resume, overwrite=overwrite, dry_run=dry_run)
        return
    refuse_options(images, out, of_volumes)
    tls = options.client_tls(tls_ca, tls_cert, tls_key)
    source = options.remote_source(server, transport, timeout, tls, bundle_given=bundle is not None, device=device)
    remote = None
    if published is not None:
        if server is None or recipe is not None or transport != "auto" or crf or probabilities:
            raise UsageError("--published needs --server, and goes without --recipe, --transport, --crf and --probabilities; "
                             "with a recipe's folder instead, servers can compute its features, and the others work")
        remote = RemoteSegmenter(parse_servers(server), published, timeout_s=120.0 if timeout is None else timeout, tls=tls)
    if crf:
        import_densecrf()
    folder = images.is_dir()
    jobs = plan(list_images(images), out, folder=folder, confidence=confidence, probabilities=probabilities)
    report = report_path(out, folder=folder)
    with contextlib.ExitStack() as stack:
        # Before anything is loaded, a run that would replace outputs is refused.
        decisive = _folder_hash(recipe) if remote is None else stack.enter_context(remote).recipe.hash
        header = {"recipe": decisive, "confidence": confidence, "probabilities": probabilities, "crf": crf}
        todo = pending(jobs, report, header, overwrite=overwrite, resume=resume)
        if len(todo) < len(jobs):
            screen.say(f"{len(jobs) - len(todo)} of {len(jobs)} images are done already")
        segmenter: Segmenter | RemoteSegmenter
        if recipe is None or remote is not None:
            assert remote is not None
            segmenter = remote
        else:
            segmenter = stack.enter_context(
                Segmenter.open(recipe, bundle=bundle, device=device, threads=threads, source=source))
            if segmenter.source is not None:
                screen.warn_untrained(segmenter.source.spec)
        screen.say(f"engine: {segmenter.engine_choice}")
        _run(segmenter, todo, report, header, screen, resume=resume, folder=folder, out=out)


def _folder_hash(recipe: Path | None) -> str:
    if recipe is None:
        raise UsageError("no recipe came; expected --recipe, a folder, or --published with --server")
    return recipe_hash(recipe)


def _run(
    segmenter: Segmenter | RemoteSegmenter,
    todo: Sequence[Job],
    report: Path,
    header: dict[str, Any],
    screen: options.Screen,
    *,
    resume: bool,
    folder: bool,
    out: Path,
) -> None:
    """Segment the files, and say how it goes; raises when one failed."""
    failed, ended = 0, 0
    started = time.perf_counter()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total:.0f}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=screen.console, transient=True,
        disable=screen.console.quiet or not screen.console.is_terminal,
    ) as bars:
        bar = bars.add_task("segmenting", total=len(todo))

        def on_image(line: dict[str, Any]) -> None:
            nonlocal failed, ended
            ended += 1
            bars.update(bar, completed=ended)
            if "error" in line:
                failed += 1
                if folder:
                    options.fail(f"{line['image']}: {line['error']}")
            elif len(todo) == 1:
                shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in
                                   zip(segmenter.recipe.classes.names, line["fractions"].values(), strict=True))
                screen.say(f"{line['image']}: {shares}; {line['seconds']:.1f} s")

        try:
            results = segment_files(segmenter, todo, report, header, append=resume,
                                    crf=CRFParameters() if header["crf"] else None, on_image=on_image,
                                    progress=lambda part: bars.update(bar, completed=ended + part))
        except SERVERS_LOST as error:
            if not folder:
                report.unlink()
                raise
            raise PhaselineError(f"{error}; {ended} of {len(todo)} images are done, each whole; go on with --resume when that is "
                                 "put right") from error
        except KeyboardInterrupt:
            raise StoppedError(f"interrupted: {ended} of {len(todo)} images done, each whole; go on with --resume") from None
    if failed and not folder:
        report.unlink()
        raise ImageError(results[0]["error"])
    if failed:
        rest = f", the others are written to {out}" if failed < len(todo) else ""
        raise PhaselineError(f"{failed} of {len(todo)} images failed{rest}; see {report}")
    if folder:
        screen.say(f"{out}: {len(todo)} images in {time.perf_counter() - started:.1f} s")
