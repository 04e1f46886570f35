"""What all classifiers share: checks of their input."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import LabelError, UsageError

F32 = npt.NDArray[np.float32]
Ints = npt.NDArray[np.integer[Any]]


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_training(features: F32, classes: Ints, n_classes: int) -> npt.NDArray[np.int64]:
    """Refuse training data that do not fit together; returns the number of pixels of each class."""
    if features.ndim != 2 or classes.shape != features.shape[:1] or not len(classes):
        raise LabelError(f"features of shape {features.shape} and classes of shape {classes.shape} came, expected (n, "
                         "channels) and (n,); gather both at the labelled pixels")
    if n_classes < 2 or classes.min() < 0 or classes.max() >= n_classes:
        raise LabelError(f"classes run from {classes.min()} to {classes.max()}, expected 0 to {n_classes - 1} and at "
                         "least two")
    counts = np.bincount(classes, minlength=n_classes)
    if not counts.all():
        raise LabelError(f"class number {int(np.argmin(counts))} has no labelled pixel, expected some of each of "
                         f"{n_classes}; label some")
    return counts


def check_features(features: F32, n_features: int) -> None:
    """Refuse features of another number than the classifier was fitted on."""
    if features.ndim != 2 or features.shape[1] != n_features:
        raise UsageError(f"features of shape {features.shape} came, expected (n, {n_features}) as the classifier was "
                         "fitted on; use the recipe's own feature settings")
