"""`phaseline train`: a compact backbone, and upsamplers. Found by `phaseline` as an entry point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phaseline.runtime.errors import EngineUnavailableError, MissingExtraError

if TYPE_CHECKING:
    import torch

train_app = typer.Typer(help="Train what bundles hold. Stopped at any moment, a training goes on with --resume.",
                        no_args_is_help=True, rich_markup_mode=None)

Images = Annotated[list[Path] | None, typer.Option(
    "--images", help="Folder of unlabelled micrographs, subfolders too; may be given several times.")]
Bundled = Annotated[bool, typer.Option("--bundled/--no-bundled", help="Use scikit-image's own images too.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for the checkpoint, the log, the weights and the model card.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a training.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads; by default one for each core.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback.")]
Provenance = Annotated[Path | None, typer.Option(
    "--provenance", help="Markdown that tells where the images come from and under which licence; goes into the model card.")]


@train_app.command("backbone")
def backbone_command(
    *,
    out: Out,
    images: Images = None,
    bundled: Bundled = True,
    architecture: Annotated[str, typer.Option(help="A compact ViT: vit-DIM-DEPTH-HEADS-pPATCH.")] = "vit-192-6-6-p14",
    channels: Annotated[int, typer.Option(help="Channels of the projection that is trained along.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 3000,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    materials: Annotated[int, typer.Option(help="Generated materials.")] = 1200,
    invariance: Annotated[float, typer.Option(help="Weight of the loss on pairs of recordings; 0: none.")] = 0.02,
    provenance: Provenance = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a compact ViT without labels: on generated materials, whose phases are known, and on unlabelled micrographs."""
    del debug
    _require_torch()
    from phaseline.export.training import runs
    from phaseline.export.training.backbone import BackboneTraining

    training = BackboneTraining(architecture=architecture, channels=channels, materials=materials, invariance=invariance,
                                seed=seed)
    run = runs.Run(out, images or [], bundled, provenance, steps, learning_rate, choose_device(device), threads, resume,
                   overwrite)
    with _progress(steps, quiet) as progress:
        _say(runs.train_backbone(training, run, progress), quiet)


@train_app.command("upsampler")
def upsampler_command(
    *,
    backbone: Annotated[Path, typer.Option("--backbone", help="Weights of `phaseline train backbone`.")],
    out: Out,
    start: Annotated[Path | None, typer.Option("--start", help="An upsampler's weights to go on from.")] = None,
    tune_backbone: Annotated[bool, typer.Option(
        "--tune-backbone", help="Train the backbone along, and write it too; with --target none.")] = False,
    images: Images = None,
    bundled: Bundled = True,
    target: Annotated[str, typer.Option(
        help="What pixel features are to equal: averaged (shifted, flipped and turned views at a finer stride) or implicit "
             "(FeatUp: a small network fitted to many views of each image; made beforehand, slow); none: learn from generated "
             "materials only.")] = "averaged",
    episodes: Annotated[float, typer.Option(
        help="Weight of labelling generated materials from few pixels, next to the target; 0: not at all.")] = 1.0,
    maps: Annotated[float, typer.Option(
        help="Weight of telling, linearly, what is known of generated materials (thickness, borders, particles, grey levels); 0: "
             "not at all.")] = 1.0,
    hidden: Annotated[int, typer.Option(help="Channels inside; of --start, where given.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps in all.")] = 2000,
    learning_rate: Annotated[float, typer.Option(help="Its peak; the paper has 1e-4.")] = 1e-3,
    materials: Annotated[int, typer.Option(help="Generated materials.")] = 1200,
    provenance: Provenance = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the convolutional upsampler of arXiv 2508.21529 for a compact backbone."""
    del debug
    _require_torch()
    from phaseline.export.training import runs
    from phaseline.export.training.upsampler import UpsamplerTraining, check_target

    training = UpsamplerTraining(backbone=str(backbone), start="" if start is None else str(start), tune_backbone=tune_backbone,
                                 target=check_target(target), episode_weight=episodes, map_weight=maps, hidden=hidden,
                                 materials=materials, seed=seed)
    run = runs.Run(out, images or [], bundled, provenance, steps, learning_rate, choose_device(device), threads, resume,
                   overwrite)
    with _progress(steps, quiet) as progress:
        _say(runs.train_upsampler(training, run, progress), quiet)


def choose_device(device: str) -> torch.device:
    """The device asked for; ``auto`` takes CUDA where torch has one.

    Raises
    ------
    EngineUnavailableError
        CUDA was asked for and torch finds none.
    UsageError
        An unknown name.
    """
    import torch

    from phaseline.runtime.errors import UsageError

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise EngineUnavailableError(f"CUDA was asked for, but torch {torch.__version__} finds no GPU; use --device cpu")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def _require_torch() -> None:
    try:
        import timm  # noqa: F401
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "export", "training") from error


def _say(lines: list[str], quiet: bool) -> None:
    if not quiet:
        for line in lines:
            typer.echo(line, err=True)


class _progress:  # noqa: N801  Used as a function.
    """A bar with the latest means and the time left; nothing if quiet."""

    def __init__(self, steps: int, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                             console=Console(stderr=True), disable=quiet)
        self._steps = steps
        self._means: dict[str, float] = {}

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        self._bar.start()
        task = self._bar.add_task("preparing", total=self._steps)

        def advance(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                self._means[name] = 0.98 * self._means.get(name, value) + 0.02 * value
            text = ", ".join(f"{name} {value:.3f}" for name, value in self._means.items())
            self._bar.update(task, completed=step, description=text or "preparing")

        return advance

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
