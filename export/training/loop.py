"""The loop that every training goes through: schedule, optimiser, progress, checkpoints, resuming.

Step n draws its data from (seed, n) alone, so that a training that was stopped and resumed is the training that was not.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from phaseline.export.training.checkpoint import CHECKPOINT, Progress, load_checkpoint, read_progress, save_checkpoint
from phaseline.runtime.errors import OutputExistsError, TrainingError, UsageError

LOG = "log.jsonl"


class Task(Protocol):
    """What is trained, and for what."""

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All that is trained, by name."""
        ...

    def loss(self, random: np.random.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of one batch, drawn from `random`, and what to log of it."""
        ...


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes
    ----------
    steps
        Steps in all.
    learning_rate
        Its peak; rises over `warmup` steps, then falls as a cosine to a fiftieth.
    warmup
        Steps.
    weight_decay
        AdamW's, on matrices and kernels only.
    checkpoint_every
        Steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.05
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, expected a positive integer")
        if not self.learning_rate > 0:
            raise UsageError(f"learning rate is {self.learning_rate}, expected a positive number")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup)) * (0.02 + 0.98 * fall)


def prepare_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of a training.

    Raises
    ------
    OutputExistsError
        It holds something, and neither resuming nor overwriting was asked for.
    TrainingError
        There is nothing to resume.
    """
    if resume:
        read_progress(folder)
        return
    if folder.exists() and any(folder.iterdir()):
        if not overwrite:
            raise OutputExistsError(f"{folder} is not empty; go on with --resume, start anew with --overwrite, or choose another "
                                    "folder")
        if not (folder / CHECKPOINT).is_file():
            raise OutputExistsError(f"{folder} holds no training, so it is not overwritten; choose another folder")
        (folder / CHECKPOINT).unlink()
        (folder / LOG).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def train(task: Task, schedule: Schedule, folder: Path, *, seed: int, settings: dict[str, Any], resume: bool = False,
          progress: Callable[[int, dict[str, float]], None] = lambda step, values: None) -> None:
    """Train, from the beginning or from the checkpoint in `folder`.

    Parameters
    ----------
    task, schedule
        What, and how long.
    folder
        From `prepare_folder`; gets the checkpoint and ``log.jsonl``, a line of means each `checkpoint_every` steps.
    seed
        Decides all data.
    settings
        Written into the checkpoint; must be the same when resuming.
    resume
        Go on.
    progress
        Called after each step.

    Raises
    ------
    TrainingError
        Nothing to resume, other settings, or a loss that is not finite.
    """
    _keep_memory()
    parameters = [p for module in task.modules.values() for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=schedule.learning_rate, betas=(0.9, 0.95))
    settings = json.loads(json.dumps(settings))
    start = 0
    if resume:
        state = load_checkpoint(folder, task.modules, optimiser)
        if state.settings != settings:
            raise TrainingError(f"{folder} was started with other settings: {_differences(state.settings, settings)}; give the "
                                "same, or train into another folder")
        start = state.step
        _cut_log(folder / LOG, start)
    sums: dict[str, float] = {}
    count, begin = 0, time.perf_counter()
    for step in range(start, schedule.steps):
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate(step)
        loss, values = task.loss(np.random.default_rng([seed, step]))
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {float(loss.detach())} at step {step}; lower --learning-rate, and --resume")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value
        count += 1
        progress(step + 1, values)
        if (step + 1) % schedule.checkpoint_every == 0 or step + 1 == schedule.steps:
            save_checkpoint(folder, task.modules, optimiser, Progress(step + 1, settings))
            line = {"step": step + 1, **{name: round(value / count, 5) for name, value in sums.items()},
                    "seconds_a_step": round((time.perf_counter() - begin) / count, 3)}
            with (folder / LOG).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            sums, count, begin = {}, 0, time.perf_counter()


def _keep_memory() -> None:
    """Let glibc keep what a step frees: given back and asked for again each step, pages took half of the time."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)  # M_MMAP_MAX
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _cut_log(log: Path, step: int) -> None:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    log.write_text("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step), encoding="utf-8")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
                     for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name))
