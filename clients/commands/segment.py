"""`phaseline segment`: images and a recipe → labels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from phaseline.clients import options
from phaseline.clients.batch import pending, plan, report_path, segment_files
from phaseline.clients.crf import CRFParameters, import_densecrf
from phaseline.clients.images import list_images
from phaseline.clients.recipe import recipe_hash
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.errors import ImageError, PhaselineError, StoppedError, UsageError


def segment_command(
    images: Annotated[Path, typer.Argument(metavar="INPUT", help="An image, or a folder of images.")],
    recipe: Annotated[Path, typer.Option("--recipe", help="The folder that `phaseline fit` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="The label image; for a folder of images, a folder.")],
    bundle: Annotated[str | None, typer.Option("--bundle", help="Where the recipe's bundle is, if it was moved.")] = None,
    confidence: Annotated[bool, typer.Option("--confidence", help="Write the confidence too.")] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write the classes' probabilities too (NPY).")] = False,
    crf: Annotated[bool, typer.Option("--crf", help="Refine the labels with a dense conditional random field.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Segment images with a recipe."""
    del debug
    screen = options.Screen(quiet)
    if resume and overwrite:
        raise UsageError("--resume and --overwrite came together; --resume keeps what is done, --overwrite does it again")
    if crf:
        import_densecrf()
    folder = images.is_dir()
    jobs = plan(list_images(images), out, folder=folder, confidence=confidence, probabilities=probabilities)
    report = report_path(out, folder=folder)
    header: dict[str, Any] = {"recipe": recipe_hash(recipe), "confidence": confidence, "probabilities": probabilities,
                              "crf": crf}
    todo = pending(jobs, report, header, overwrite=overwrite, resume=resume)
    if len(todo) < len(jobs):
        screen.say(f"{len(jobs) - len(todo)} of {len(jobs)} images are done already")
    failed, ended = 0, 0
    started = time.perf_counter()
    with (
        Segmenter.open(recipe, bundle=bundle, device=device, threads=threads) as segmenter,
        Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f}/{task.total:.0f}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=screen.console, transient=True,
            disable=quiet or not screen.console.is_terminal,
        ) as bars,
    ):
        if segmenter.source is not None:
            screen.warn_untrained(segmenter.source.spec)
        screen.say(f"engine: {segmenter.engine_choice}")
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
            results = segment_files(segmenter, todo, report, header, append=resume, crf=CRFParameters() if crf else None,
                          on_image=on_image, progress=lambda part: bars.update(bar, completed=ended + part))
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
