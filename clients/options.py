"""Options that mean the same in every command, and what commands print."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from phaseline.runtime.contract import BundleSpec

Bundle = Annotated[str, typer.Option("--bundle", help="'default', 'none' (classical features only), or a bundle's folder.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or tensorrt.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; by default one for each core.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]

Transforms = Annotated[str, typer.Option(
    "--transforms",
    help="Views to average deep features over: none, flips, moore, von-neumann, moore:PIXELS, or a product such as "
         "moore*flips.",
)]
Alignment = Annotated[str, typer.Option("--alignment", help="Where tokens lie: centred, or paper (stretched).")]
Interpolation = Annotated[str, typer.Option("--interpolation", help="From tokens to pixels: bilinear or nearest.")]
Boundary = Annotated[str, typer.Option("--boundary", help="What a shift does at a tile's edge: reflect or wrap.")]


class Screen:
    """Standard error for people: steps, progress, notes; silent with ``--quiet``."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, markup=False)

    def warn_untrained(self, spec: BundleSpec) -> None:
        """Say that a bundle holds random weights, wherever one is used."""
        if not spec.trained:
            self.say(untrained_note(spec))


def untrained_note(spec: BundleSpec) -> str:
    """What is said at every use of untrained weights."""
    return (f"note: the bundle's weights are untrained ({spec.weights}): its features add local texture, not learned "
            "structure")


def fail(line: str) -> None:
    """Print an error's one line to standard error."""
    print(f"phaseline: {' '.join(line.split())}", file=sys.stderr)
