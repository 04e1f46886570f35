"""The frozen D→k projection: principal components fitted once, at export, over several views of calibration images.

The published code refits it per image on random views, so its basis changes from slice to slice; a frozen one makes a
stack consistent and a service possible.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from phaseline.runtime.errors import ExportError

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Projection:
    """Affine map (x − mean) @ components.

    Attributes
    ----------
    mean
        float64 array of shape (D,).
    components
        float64 array of shape (D, k). Fitted: orthonormal columns by falling variance, each column's largest entry positive.
    tokens
        Tokens that it was fitted on; 0 if it was trained with the backbone.
    explained_variance
        Share of their variance that the k components hold, 0–1; NaN if it was trained.
    """

    mean: F64
    components: F64
    tokens: int
    explained_variance: float

    @classmethod
    def trained(cls, weight: torch.Tensor) -> Self:
        """The projection that was trained with the backbone: `weight` of shape (k, D)."""
        components: F64 = weight.double().numpy().T.copy()
        return cls(mean=np.zeros(len(components)), components=components, tokens=0, explained_variance=float("nan"))

    def as_linear(self) -> nn.Linear:
        """The same map as a float32 layer with bias −mean @ components."""
        size, channels = self.components.shape
        layer = nn.Linear(size, channels)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(self.components.T.copy()))
            layer.bias.copy_(torch.from_numpy(-self.mean @ self.components))
        return layer.requires_grad_(False)


class Covariance:
    """Mean and covariance of feature vectors, gathered batch by batch in float64."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean: F64 = np.zeros(size)
        self._scatter: F64 = np.zeros((size, size))

    def add(self, vectors: npt.NDArray[np.float32]) -> None:
        """Add vectors of shape (count, D)."""
        batch = vectors.astype(np.float64)
        count, mean = len(batch), batch.mean(axis=0)
        centred = batch - mean
        delta, total = mean - self.mean, self.count + count
        # Pooled scatter of two groups: no sum of squares of uncentred values, which would cancel.
        self._scatter += centred.T @ centred + np.outer(delta, delta) * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def principal(self, channels: int) -> Projection:
        """The projection onto the `channels` directions of largest variance.

        Raises
        ------
        ExportError
            Fewer vectors than channels, or they do not vary.
        """
        if self.count <= channels:
            raise ExportError(f"{self.count} calibration tokens cannot fix {channels} channels; give more images")
        variance, directions = np.linalg.eigh(self._scatter / self.count)
        total = float(variance.clip(min=0).sum())
        if not total > 0:
            raise ExportError("the calibration images give the same features everywhere; give images with structure")
        order = np.argsort(variance)[::-1][:channels]
        components = directions[:, order]
        # eigh leaves the sign open; without a convention two exports of one backbone would differ.
        peaks = np.abs(components).argmax(axis=0)
        components = components * np.sign(components[peaks, np.arange(channels)])
        return Projection(mean=self.mean.copy(), components=np.ascontiguousarray(components), tokens=self.count,
                          explained_variance=float(variance[order].clip(min=0).sum()) / total)


def fit_projection(batches: Iterable[npt.NDArray[np.float32]], size: int, channels: int) -> Projection:
    """Fit the projection.

    Parameters
    ----------
    batches
        Feature vectors, arrays of shape (count, D).
    size, channels
        D and k.

    Raises
    ------
    ExportError
        Too few vectors, or they do not vary.
    """
    covariance = Covariance(size)
    for batch in batches:
        covariance.add(batch)
    return covariance.principal(channels)
