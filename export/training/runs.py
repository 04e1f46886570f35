"""A training from its images to weights and model card in a folder.

    OUT/checkpoint.safetensors   state between steps; resumed from
    OUT/log.jsonl                means every hundred steps
    OUT/backbone.safetensors     or upsampler.safetensors, or both: the result
    OUT/MODEL_CARD.md            what it is, what it was trained on, and how
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from phaseline.export.training.backbone import BackboneTask, BackboneTraining
from phaseline.export.training.card import write_card
from phaseline.export.training.loop import Schedule, Task, prepare_folder, train
from phaseline.export.training.micrographs import Micrograph, digest, load_micrographs
from phaseline.export.training.samples import Pool, make_pool
from phaseline.export.training.trained import save_backbone
from phaseline.export.training.upsampler import UpsamplerTask, UpsamplerTraining
from phaseline.export.upsampler_weights import save_upsampler
from phaseline.runtime.errors import MissingInputError

BACKBONE_FILE = "backbone.safetensors"
UPSAMPLER_FILE = "upsampler.safetensors"
Advance = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class Run:
    """Where and how a training runs.

    Attributes
    ----------
    folder
        Output.
    images, bundled
        Folders of micrographs, and whether scikit-image's are added.
    provenance
        Markdown for the model card, or None.
    steps, learning_rate
        The schedule.
    device, threads
        Where to compute.
    resume, overwrite
        Go on; start anew.
    """

    folder: Path
    images: Sequence[Path]
    bundled: bool
    provenance: Path | None
    steps: int
    learning_rate: float
    device: torch.device
    threads: int | None
    resume: bool
    overwrite: bool


def train_backbone(training: BackboneTraining, run: Run, advance: Advance) -> list[str]:
    """Train, and write weights and card.

    Returns
    -------
    Lines that say what was written.
    """
    micrographs = _begin(run)
    task = BackboneTask(training, _pool(training, micrographs, run), [m.pixels for m in micrographs], run.device)
    settings = _train(task, dataclasses.asdict(training), training.seed, micrographs, run, advance)
    file = run.folder / BACKBONE_FILE
    save_backbone(task.state(), training.architecture, file)
    write_card(run.folder, f"Backbone {training.architecture}", file, settings, micrographs, _text(run.provenance))
    return [f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB",
            f"next: phaseline export {training.architecture} --weights {file} --channels {training.channels} --out BUNDLE"]


def train_upsampler(training: UpsamplerTraining, run: Run, advance: Advance) -> list[str]:
    """Train, and write weights and card.

    Returns
    -------
    Lines that say what was written.
    """
    micrographs = _begin(run)
    task = UpsamplerTask(training, _pool(training, micrographs, run), [m.pixels for m in micrographs], run.device)
    settings = _train(task, task.settings, training.seed, micrographs, run, advance)
    task.finish()
    file = run.folder / UPSAMPLER_FILE
    save_upsampler(task.network, task.network.config, file)
    backbone, tuned = Path(training.backbone), list[str]()
    if training.tune_backbone:
        backbone = run.folder / BACKBONE_FILE
        save_backbone(task.backbone_state(), task.architecture, backbone)
        tuned = [f"wrote {backbone}, {backbone.stat().st_size / 1e6:.1f} MB: the upsampler belongs to this one"]
    write_card(run.folder, f"Upsampler {task.network.config.name}", file, settings, micrographs, _text(run.provenance))
    return [f"wrote {file}, {file.stat().st_size / 1e6:.1f} MB", *tuned,
            f"next: phaseline export … --weights {backbone} --upsampler {file} --out BUNDLE"]


def _begin(run: Run) -> list[Micrograph]:
    if run.provenance is not None and not run.provenance.is_file():
        raise MissingInputError(f"no provenance at {run.provenance}; expected a Markdown file")
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    micrographs = load_micrographs(run.images, bundled=run.bundled)
    prepare_folder(run.folder, resume=run.resume, overwrite=run.overwrite)
    return micrographs


def _pool(training: BackboneTraining | UpsamplerTraining, micrographs: Sequence[Micrograph], run: Run) -> Callable[[], Pool]:
    return lambda: make_pool(training.materials, training.crop_px, training.seed, [m.pixels for m in micrographs],
                             workers=run.threads or torch.get_num_threads(),
                             maps=isinstance(training, UpsamplerTraining) and training.map_weight > 0)


def _train(task: Task, settings: dict[str, Any], seed: int, micrographs: Sequence[Micrograph], run: Run, advance: Advance
           ) -> dict[str, Any]:
    schedule = Schedule(steps=run.steps, learning_rate=run.learning_rate)
    known = {**settings, "steps": run.steps, "learning_rate": run.learning_rate, "images": digest(micrographs)}
    train(task, schedule, run.folder, seed=seed, settings=known, resume=run.resume, progress=advance)
    return {**known, "torch": torch.__version__, "device": run.device.type}


def _text(file: Path | None) -> str:
    return "" if file is None else file.read_text(encoding="utf-8")
