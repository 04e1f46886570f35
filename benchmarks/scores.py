"""Class-averaged mean intersection over union (mIoU) as arXiv 2508.21529 defines it, also from a sample of the pixels.

An image's mIoU is the mean of the IoU of the classes that its mask contains; the figure is the mean over images. With
counts of true class × predicted class, IoU(c) = n(c, c) / (Σ n(c, ·) + Σ n(·, c) - n(c, c)). The counts of a sample that
is drawn class by class are weighted by what each pixel stands for, so that the sum over a true class is exact.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Labels = npt.NDArray[np.integer[npt.NBitBase]] | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Scores:
    """How well some images were labelled.

    Attributes
    ----------
    ious
        For each image, the IoU of each class that its mask contains, by label value.
    accuracies
        For each image, the share of its labelled pixels with the right label.
    """

    ious: tuple[dict[int, float], ...]
    accuracies: tuple[float, ...]

    @property
    def miou(self) -> float:
        """Mean over images of the mean over the classes that occur in an image."""
        return statistics.fmean(statistics.fmean(image.values()) for image in self.ious)

    @property
    def accuracy(self) -> float:
        """Mean over images."""
        return statistics.fmean(self.accuracies)

    def class_iou(self, value: int) -> float:
        """Mean IoU of a class over the images that contain it; NaN if none does."""
        found = [image[value] for image in self.ious if value in image]
        return statistics.fmean(found) if found else float("nan")

    @property
    def classes(self) -> tuple[int, ...]:
        """Label values that occur in some mask."""
        return tuple(sorted({value for image in self.ious for value in image}))


def score(images: Sequence[tuple[Labels, Labels, F64 | None]]) -> Scores:
    """Compare predicted labels with true ones.

    Parameters
    ----------
    images
        For each image predictions, truth (0: unlabelled) and weights (None: 1), of equal shape. Predictions at unlabelled
        pixels count against the class that was predicted, as in the papers.
    """
    tables = [_counts(*image) for image in images]
    return Scores(tuple(_ious(table) for table in tables),
                  tuple(float(np.trace(table[1:, 1:]) / table[1:].sum()) for table in tables))


def sample_pixels(truth: Labels, pixels: int, seed: Sequence[int]) -> tuple[I64, F64]:
    """A random sample drawn class by class, so that a rare one is in it.

    Parameters
    ----------
    truth
        Labels of shape (rows, cols).
    pixels
        About how many; a class has its share, and at least a tenth of the sample if it has so many pixels.
    seed
        Of the draw.

    Returns
    -------
    Ascending flat indices, and of each the number of pixels that it stands for.
    """
    rng = np.random.default_rng(seed)
    flat = truth.reshape(-1)
    chosen, weights = [], []
    for value in np.unique(flat):
        members = np.flatnonzero(flat == value)
        n = min(max(round(pixels * len(members) / flat.size), pixels // 10), len(members))
        chosen.append(rng.choice(members, n, replace=False))
        weights.append(np.full(n, len(members) / n))
    order = np.argsort(np.concatenate(chosen))
    return np.concatenate(chosen)[order].astype(np.int64), np.concatenate(weights)[order]


def _counts(predicted: Labels, truth: Labels, weights: F64 | None) -> F64:
    """float64 array of shape (values, values): weight of the pixels by true and predicted label value."""
    size = int(max(predicted.max(), truth.max())) + 1
    pairs = truth.reshape(-1).astype(np.int64) * size + predicted.reshape(-1)
    flat = None if weights is None else weights.reshape(-1)
    return np.bincount(pairs, flat, size * size).reshape(size, size).astype(np.float64)


def _ious(table: F64) -> dict[int, float]:
    either = table.sum(axis=0) + table.sum(axis=1) - np.diag(table)
    return {value: float(table[value, value] / either[value]) for value in range(1, len(table)) if table[value].any()}
