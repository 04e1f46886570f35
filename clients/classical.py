"""Classical multiscale features of one image channel: the default set of ImageJ's Trainable Weka Segmentation.

Source: arXiv 2508.21529, S1, and the Weka plugin (https://imagej.net/plugins/tws). scikit-image is the reference that
the tests and ``benchmarks/classical.py`` compare with; this module computes the same numbers faster, in bands of rows:

    image ─▶ band with a margin ─┬▶ per σ: blurred image       ─▶ Gaussian, difference of Gaussians
                                 │         blurred differences ─▶ Sobel, Hessian
                                 └▶ six line sums ─▶ membrane projections

The arithmetic is in `filters`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phaseline.clients.filters import (
    MEMBRANE_HALO_PX,
    Band,
    differentiate,
    gaussian_radius_px,
    membrane_pieces,
    project_membranes,
    strips_of,
)
from phaseline.runtime.errors import ImageError, UsageError

Floats = NDArray[np.float32]

HESSIAN_PARTS = ("largest eigenvalue", "smallest eigenvalue", "modulus", "trace", "determinant")
MEMBRANE_PARTS = ("sum", "mean", "standard deviation", "median", "maximum", "minimum")

_MAX_SIGMA_PX = 256.0
_MAX_ABS_VALUE = 1e9  # squares of second derivatives must stay within float32
_BAND_ROWS = 512  # tall enough to make the halo's share small, low enough to keep memory small
_MIN_BAND_ROWS = 64


@dataclass(frozen=True)
class ClassicalFeatures:
    """Which classical features to compute, and how.

    Parameters
    ----------
    sigmas
        Standard deviations of the Gaussians, px, ascending and unique; 0 is the image itself.
    sigma_factor
        Every σ is multiplied by this real number, which is never rounded. ImageJ's Weka uses 0.4.
    gaussian
        Smoothed images, one per σ.
    sobel
        Gradient magnitude of the smoothed image (scikit-image's normalisation), one per σ.
    hessian
        Of the smoothed image, with H = [[a, b], [b, d]] from repeated central differences, five per σ: both
        eigenvalues, modulus √(a² + b² + d²), trace a + d, determinant ad − b².
    difference_of_gaussians
        Finer minus coarser, for every pair of non-zero σ.
    membrane
        Line integrals over a column of 19 px rotated in 30° steps, projected by sum, mean, (population) standard
        deviation, median, maximum and minimum.

    Raises
    ------
    UsageError
        If the values contradict the above, or no channel is left.

    Notes
    -----
    Beyond its border an image continues with its border pixels, and smoothed images continue likewise; the Hessian's
    differences are one-sided there, as in ``numpy.gradient``. Along an axis of one pixel, derivatives are 0.
    """

    sigmas: tuple[float, ...] = (0, 1, 2, 4, 8, 16)
    sigma_factor: float = 1.0
    gaussian: bool = True
    sobel: bool = True
    hessian: bool = True
    difference_of_gaussians: bool = True
    membrane: bool = True

    def __post_init__(self) -> None:
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if not isinstance(value, bool):
                raise UsageError(f"{field.name} is {value!r}; expected true or false")
        if not _is_number(self.sigma_factor) or not 0 < self.sigma_factor < math.inf:
            raise UsageError(f"sigma_factor is {self.sigma_factor!r}; expected a number above 0, e.g. 1 or Weka's 0.4")
        sigmas: object = self.sigmas  # JSON brings lists
        if not isinstance(sigmas, (tuple, list)):
            raise UsageError(f"sigmas is {sigmas!r}; expected a list of numbers, in px")
        for sigma in self.sigmas:
            if not _is_number(sigma) or not 0 <= sigma * self.sigma_factor <= _MAX_SIGMA_PX:
                raise UsageError(f"sigmas has {sigma!r}; expected numbers from 0 to {_MAX_SIGMA_PX:g} px "
                                 f"(times sigma_factor); for coarser features shrink the image first")
        if any(after <= before for before, after in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise UsageError(f"sigmas is {tuple(self.sigmas)}; expected ascending, unique numbers: sort them")
        object.__setattr__(self, "sigmas", tuple(float(sigma) for sigma in self.sigmas))
        object.__setattr__(self, "sigma_factor", float(self.sigma_factor))
        if not self.names:
            raise UsageError("classical features without a single channel were asked for; switch on a feature, or give "
                             "it the sigmas it needs (difference_of_gaussians: two above 0)")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassicalFeatures:
        """Undo ``dataclasses.asdict``, also after a trip through JSON, which turns tuples into lists.

        Raises
        ------
        UsageError
            If a field is missing, unknown or wrong: stored settings are complete, so nothing is guessed.
        """
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise UsageError(f"classical features have the fields {sorted(map(str, values))}; "
                             f"expected {sorted(known)}: write them with dataclasses.asdict")
        return cls(**values)

    @property
    def sigmas_px(self) -> tuple[float, ...]:
        """The standard deviations that are used: ``sigmas`` times ``sigma_factor``."""
        return tuple(sigma * self.sigma_factor for sigma in self.sigmas)

    @property
    def names(self) -> tuple[str, ...]:
        """A name per channel, such as ``hessian σ=2 largest eigenvalue``, in the order that `compute` returns them."""
        labels = [f"σ={sigma:g}" for sigma in self.sigmas_px]
        names: list[str] = []
        if self.gaussian:
            names += [f"gaussian {label}" for label in labels]
        if self.sobel:
            names += [f"sobel {label}" for label in labels]
        if self.hessian:
            names += [f"hessian {label} {part}" for label in labels for part in HESSIAN_PARTS]
        if self.difference_of_gaussians:
            blurred = [f"{sigma:g}" for sigma in self.sigmas_px if sigma > 0]
            names += [f"difference of gaussians σ={fine}−{coarse}" for fine, coarse in combinations(blurred, 2)]
        if self.membrane:
            names += [f"membrane {part}" for part in MEMBRANE_PARTS]
        return tuple(names)

    @property
    def channels(self) -> int:
        """Number of channels; 58 for the default set."""
        return len(self.names)

    @property
    def halo_px(self) -> int:
        """Pixels farther away than this, along rows or columns, have no influence: exact, the kernels are finite."""
        reach = MEMBRANE_HALO_PX if self.membrane else 0
        if self.sigmas and (self.gaussian or self.sobel or self.hessian or self.difference_of_gaussians):
            reach = max(reach, self._radius_px() + (2 if self.hessian else 1 if self.sobel else 0))
        return reach

    def compute(self, image: NDArray[Any], *, out: Floats | None = None, threads: int | None = None) -> Floats:
        """Compute all channels of one image.

        Parameters
        ----------
        image
            uint8 or float32 array of shape (rows, cols), usually 0–255; used as it is, without rescaling.
        out
            C-contiguous float32 array of shape (channels, rows, cols) to write to, in place of a new one.
        threads
            Bands computed at a time; by default as many as this process may use cores.

        Returns
        -------
        C-contiguous float32 array of shape (channels, rows, cols); ``out`` if it was given.

        Raises
        ------
        ImageError
            If the image is empty, of another shape or dtype, or holds values that are not finite.
        UsageError
            If ``out`` or ``threads`` is unfit.

        Notes
        -----
        The result doesn't depend, bit for bit, on the number of threads, nor on what lies farther than `halo_px`
        away: a crop with that much of its surroundings gives the same values as the whole image.
        """
        _check_image(image)
        rows, cols = image.shape
        result = _checked_out(out, (self.channels, rows, cols), image)
        workers = _thread_count(threads)
        band_rows = min(_BAND_ROWS, max(_MIN_BAND_ROWS, -(-rows // workers)))
        if self.membrane:
            membrane_pieces()  # made before threads could make it twice
        starts = range(0, rows, band_rows)
        if workers == 1 or len(starts) == 1:
            for start in starts:
                self._compute_band(image, result, start, min(start + band_rows, rows))
        else:
            with ThreadPoolExecutor(workers) as pool:
                tasks = [pool.submit(self._compute_band, image, result, start, min(start + band_rows, rows))
                         for start in starts]
                for task in tasks:
                    task.result()
        return result

    def _compute_band(self, image: NDArray[Any], result: Floats, start: int, stop: int) -> None:
        """Fill ``result[:, start:stop]``."""
        band = Band.cut(image, start, stop, margin=max(MEMBRANE_HALO_PX, self._radius_px() + 2))
        rest = iter(result[:, start:stop])  # consumed in the order of `names`
        count = len(self.sigmas)
        gaussians = [next(rest) for _ in range(count)] if self.gaussian else []
        sobels = [next(rest) for _ in range(count)] if self.sobel else []
        hessians = [[next(rest) for _ in HESSIAN_PARTS] for _ in range(count)] if self.hessian else []
        if self.difference_of_gaussians and not gaussians:
            gaussians = [np.empty((stop - start, image.shape[1]), np.float32) for _ in range(count)]

        strips = strips_of(stop - start, image.shape[1])
        for index, sigma in enumerate(self.sigmas_px):
            scale = band.blur(sigma, image=bool(gaussians), differences=self.sobel or self.hessian)
            if gaussians:
                gaussians[index][...] = scale.image
            if self.sobel or self.hessian:
                for strip in strips:
                    differentiate(scale, strip, sobels[index] if sobels else None,
                                   hessians[index] if hessians else None)
        if self.difference_of_gaussians:
            blurred = [plane for plane, sigma in zip(gaussians, self.sigmas_px, strict=True) if sigma > 0]
            for fine, coarse in combinations(blurred, 2):
                np.subtract(fine, coarse, out=next(rest))
        if self.membrane:
            projections = [next(rest) for _ in MEMBRANE_PARTS]
            for strip in strips:
                project_membranes(band, strip, projections)

    def _radius_px(self) -> int:
        return max((gaussian_radius_px(sigma) for sigma in self.sigmas_px), default=0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_image(image: NDArray[Any]) -> None:
    if not isinstance(image, np.ndarray) or image.ndim != 2 or image.size == 0:
        received = f"shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"classical features received {received}; expected an array of shape (rows, cols), at least "
                         f"1×1: pass a colour image's channels one by one")
    if image.dtype not in (np.uint8, np.float32):
        raise ImageError(f"classical features received {image.dtype}; expected uint8 or float32: "
                         f"apply an intensity window first")
    if image.dtype == np.float32:
        low, high = float(image.min()), float(image.max())
        if not -_MAX_ABS_VALUE <= low <= high <= _MAX_ABS_VALUE:
            raise ImageError(f"classical features received values from {low:g} to {high:g}; expected finite ones of at "
                             f"most ±{_MAX_ABS_VALUE:g}, usually 0–255: replace those that are not, and scale")


def _checked_out(out: Floats | None, shape: tuple[int, int, int], image: NDArray[Any]) -> Floats:
    if out is None:
        return np.empty(shape, np.float32)
    if not (isinstance(out, np.ndarray) and out.shape == shape and out.dtype == np.float32
            and out.flags.c_contiguous and out.flags.writeable):
        received = f"{out.dtype} of shape {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
        raise UsageError(f"out is {received}; expected a writeable, C-contiguous float32 array of shape {shape}")
    if np.may_share_memory(out, image):
        raise UsageError("out shares memory with the image; expected separate memory: copy the image")
    return out


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise UsageError(f"threads is {threads!r}; expected an integer of at least 1, or nothing for all cores")
    return threads
