"""The state of a training between two steps: weights, optimiser, step. Safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from phaseline.runtime.errors import TrainingError

CHECKPOINT = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes
    ----------
    step
        Steps done.
    settings
        What it was started with; a resumed training must have the same.
    """

    step: int
    settings: dict[str, Any]


def save_checkpoint(folder: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the checkpoint in place of the one before."""
    tensors: dict[str, torch.Tensor] = {}
    for part, module in modules.items():
        for name, tensor in module.state_dict().items():
            tensors[f"{part}/{name}"] = tensor.detach().cpu().contiguous()
    for name, parameter in _parameters(modules).items():
        for moment, value in optimiser.state.get(parameter, {}).items():
            tensors[f"optimiser/{moment}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    scratch = folder / f".{CHECKPOINT}"
    save_file(tensors, scratch, metadata={"progress": json.dumps({"step": progress.step, "settings": progress.settings})})
    with scratch.open("rb+") as stream:
        os.fsync(stream.fileno())
    scratch.replace(folder / CHECKPOINT)


def read_progress(folder: Path) -> Progress:
    """Where the training in a folder stands.

    Raises
    ------
    TrainingError
        The checkpoint is missing or damaged.
    """
    return _open(folder)[0]


def load_checkpoint(folder: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer) -> Progress:
    """Put modules and optimiser back to where they were.

    Raises
    ------
    TrainingError
        The checkpoint is missing, damaged, or of other modules.
    """
    progress, tensors = _open(folder)
    try:
        for part, module in modules.items():
            prefix = f"{part}/"
            module.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        for name, parameter in _parameters(modules).items():
            found = {moment: tensors[f"optimiser/{moment}/{name}"] for moment in _MOMENTS
                     if f"optimiser/{moment}/{name}" in tensors}
            if found:
                optimiser.state[parameter] = {
                    moment: value if moment == "step" else value.to(parameter.device) for moment, value in found.items()}
    except RuntimeError as error:
        raise TrainingError(f"{folder / CHECKPOINT} is of another network ({str(error).splitlines()[0]}); train into another "
                            "folder") from error
    return progress


def _open(folder: Path) -> tuple[Progress, dict[str, torch.Tensor]]:
    file = folder / CHECKPOINT
    try:
        with safe_open(file, "pt") as stored:
            content = json.loads(stored.metadata()["progress"])
            return Progress(int(content["step"]), content["settings"]), {n: stored.get_tensor(n) for n in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{file} cannot be read ({error}); is this the folder of a training? Start anew with "
                            "--overwrite") from error


def _parameters(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {f"{part}/{name}": p for part, module in modules.items() for name, p in module.named_parameters() if p.requires_grad}
