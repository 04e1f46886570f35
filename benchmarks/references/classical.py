"""The plain scikit-image form of `phaseline.clients.classical`: obviously right, and what its speed is measured by."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy import ndimage
from skimage.feature import hessian_matrix, hessian_matrix_eigvals
from skimage.filters import gaussian, sobel
from skimage.transform import rotate

from phaseline.clients.classical import ClassicalFeatures


def reference_classical(
    image: NDArray[Any], features: ClassicalFeatures, precision: DTypeLike = np.float64
) -> NDArray[np.float32]:
    """Compute what ``features.compute(image)`` should give.

    Parameters
    ----------
    image
        uint8 or float32 array of shape (rows, cols), at least 2×2: scikit-image's Hessian needs that.
    precision
        dtype of the arithmetic. float32 is faster, and some 10⁻⁴ to 10⁻³ of the maximum off in the Hessian at σ = 16.

    Returns
    -------
    float32 array of shape (channels, rows, cols), in the order of ``features.names``.

    References
    ----------
    arXiv 2508.21529, S1; https://imagej.net/plugins/tws
    """
    image = image.astype(precision)
    blurred = [gaussian(image, sigma, mode="nearest", preserve_range=True, truncate=4) for sigma in features.sigmas_px]
    channels: list[NDArray[Any]] = []
    if features.gaussian:
        channels += blurred
    if features.sobel:
        channels += [sobel(smooth) for smooth in blurred]
    if features.hessian:
        for sigma in features.sigmas_px:
            channels += _hessian(image, sigma)
    if features.difference_of_gaussians:
        smooths = [smooth for smooth, sigma in zip(blurred, features.sigmas_px, strict=True) if sigma > 0]
        channels += [fine - coarse for fine, coarse in combinations(smooths, 2)]
    if features.membrane:
        channels += _membrane(image)
    return np.stack(channels, dtype=np.float32, casting="same_kind")


def _hessian(image: NDArray[Any], sigma: float) -> list[NDArray[Any]]:
    elements = hessian_matrix(image, sigma, mode="nearest", order="rc", use_gaussian_derivatives=False)
    a, b, d = elements
    largest, smallest = hessian_matrix_eigvals(elements)
    return [largest, smallest, np.sqrt(a**2 + b**2 + d**2), a + d, a * d - b**2]


def _membrane(image: NDArray[Any]) -> list[NDArray[Any]]:
    line = np.zeros((19, 19))
    line[:, 9] = 1
    responses = np.stack([ndimage.correlate(image, rotate(line, angle), mode="nearest") for angle in range(0, 180, 30)])
    return [responses.sum(0), responses.mean(0), responses.std(0), np.median(responses, 0), responses.max(0),
            responses.min(0)]
