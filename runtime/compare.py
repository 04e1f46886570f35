"""How far two arrays are apart, in the three numbers that phaseline reports everywhere."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Deviation:
    """Deviation of an array from its reference.

    Attributes
    ----------
    max_abs
        Largest absolute difference.
    max_rel
        Largest absolute difference over the reference's largest absolute value: relative to the array's scale, so that
        values near zero do not decide it.
    cosine
        Cosine between the two arrays as vectors, 1 for equal directions.
    worst
        Index of the largest difference.
    """

    max_abs: float
    max_rel: float
    cosine: float
    worst: tuple[int, ...]

    def __str__(self) -> str:
        return f"max abs {self.max_abs:.2e}, max rel {self.max_rel:.2e} at {self.worst}, cosine {self.cosine:.7f}"


def deviation(array: npt.ArrayLike, reference: npt.ArrayLike) -> Deviation:
    """Compare an array with its reference.

    Parameters
    ----------
    array, reference
        Real arrays of one shape; compared in float64.

    Raises
    ------
    ValueError
        The shapes differ, or a value is not finite.
    """
    a, b = np.asarray(array, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"arrays of shapes {a.shape} and {b.shape} cannot be compared; expected equal shapes")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("arrays hold NaN or infinity, which cannot be compared")
    difference = np.abs(a - b)
    worst = np.unravel_index(int(difference.argmax()), a.shape)
    scale = float(np.abs(b).max())
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    max_abs = float(difference[worst])
    return Deviation(
        max_abs=max_abs,
        max_rel=max_abs / scale if scale else float(max_abs > 0),
        cosine=float(a.ravel() @ b.ravel()) / norms if norms else float(not max_abs),
        worst=tuple(int(i) for i in worst),
    )
