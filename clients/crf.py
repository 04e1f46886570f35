"""Dense-CRF refinement of a segmentation (extra ``crf``): snaps borders to edges of the image.

A fully connected CRF (Krähenbühl and Koltun, NeurIPS 2011) with mean-field inference, as arXiv 2410.19836 applies it:

    energy = - log p(class)  +  Potts · [ w_g · exp(-d²/2σ_g²)  +  w_b · exp(-d²/2σ_b² - c²/2σ_c²) ]

d: distance in the image (px), c: distance of colours in RGB, hence for grey images √3 times that of the grey levels.
Both kernels are computed on a permutohedral lattice, an approximation, and normalised symmetrically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.window import to_channels
from phaseline.runtime.errors import ImageError, LabelError, MissingExtraError, UsageError

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# A probability of 0 would be an infinite energy.
_LEAST_PROBABILITY = 1e-5


@dataclass(frozen=True)
class CRFParameters:
    """Defaults are those of the code of arXiv 2410.19836.

    Attributes
    ----------
    label_confidence
        Probability that a given label is right; the others share the rest. For labels only, not for probabilities.
    gaussian_px, gaussian_weight
        σ_g in pixels and w_g: nearby pixels want the same class.
    bilateral_px, bilateral_grey, bilateral_weight
        σ_b in pixels, σ_c in grey levels (0–255) of RGB, and w_b: pixels of like colour want the same class.
    iterations
        Of mean-field inference.
    """

    label_confidence: float = 0.6
    gaussian_px: float = 3.0
    gaussian_weight: float = 10.0
    bilateral_px: float = 80.0
    bilateral_grey: float = 13.0
    bilateral_weight: float = 10.0
    iterations: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.label_confidence < 1:
            raise UsageError(f"the CRF's label_confidence is {self.label_confidence}, expected between 0 and 1, both "
                             "excluded")
        for field in fields(self):
            value = getattr(self, field.name)
            least_allowed = field.name.endswith("_weight")
            if not (math.isfinite(value) and (value >= 0 if least_allowed else value > 0)):
                raise UsageError(f"the CRF's {field.name} is {value}, expected a "
                                 f"{'non-negative' if least_allowed else 'positive'} number; give another")
        if not isinstance(self.iterations, int):
            raise UsageError(f"the CRF's iterations are {self.iterations}, expected a whole number")


def import_densecrf() -> Any:
    """The module `pydensecrf.densecrf`.

    Raises
    ------
    MissingExtraError
        The extra ``crf`` is not installed.
    """
    try:
        from pydensecrf import densecrf
    except ImportError as error:
        raise MissingExtraError("pydensecrf2", "crf", "dense-CRF refinement") from error
    return densecrf


def refine(evidence: npt.NDArray[Any], image: U8, parameters: CRFParameters | None = None, *,
           n_classes: int | None = None) -> npt.NDArray[np.int16]:
    """Refine class probabilities or labels.

    Parameters
    ----------
    evidence
        Probabilities: float array of shape (rows, cols, n_classes), 0–1. Or classes: integer array of shape
        (rows, cols), 0 … n_classes - 1, -1 where nothing is known; a form that the paper uses.
    image
        uint8 array of shape (rows, cols) or (rows, cols, 3), after the intensity window.
    parameters
        The paper's if None.
    n_classes
        For classes: how many there are; None: as many as the largest says.

    Returns
    -------
    int16 array of shape (rows, cols), 0 … n_classes - 1.

    Raises
    ------
    LabelError
        Evidence of another shape, type or range.
    ImageError
        An image of another type, or another size than the evidence.
    MissingExtraError
        The extra ``crf`` is not installed.
    """
    parameters = parameters or CRFParameters()
    unary = unary_energy(evidence, parameters.label_confidence, n_classes)
    rows, cols = evidence.shape[:2]
    if image.dtype != np.uint8 or image.shape not in ((rows, cols), (rows, cols, 3)):
        raise ImageError(f"the CRF got an image of {image.dtype} and shape {image.shape}, expected uint8 of shape "
                         f"{(rows, cols)} or {(rows, cols, 3)}; apply the intensity window first")
    densecrf = import_densecrf()
    crf = densecrf.DenseCRF2D(cols, rows, len(unary))
    crf.setUnaryEnergy(unary)
    if parameters.gaussian_weight:
        crf.addPairwiseGaussian(sxy=parameters.gaussian_px, compat=parameters.gaussian_weight)
    if parameters.bilateral_weight:
        crf.addPairwiseBilateral(sxy=parameters.bilateral_px, srgb=parameters.bilateral_grey,
                                 rgbim=np.ascontiguousarray(to_channels(image, 3)), compat=parameters.bilateral_weight)
    refined: F32 = np.asarray(crf.inference(parameters.iterations), np.float32).reshape(-1, rows, cols)
    best: npt.NDArray[np.int16] = refined.argmax(0).astype(np.int16)
    return best


def unary_energy(evidence: npt.NDArray[Any], label_confidence: float, n_classes: int | None = None) -> F32:
    """-log p of each class: C-contiguous float32 array of shape (n_classes, rows · cols). See `refine`."""
    if evidence.dtype.kind == "f":
        if evidence.ndim != 3 or evidence.shape[2] < 2 or not evidence.size:
            raise LabelError(f"the CRF got probabilities of shape {evidence.shape}, expected (rows, cols, classes), 2 "
                             "or more")
        if not (evidence.min() >= 0 and evidence.max() <= 1 + 1e-4):
            raise LabelError(f"the CRF got probabilities from {evidence.min()} to {evidence.max()}, expected 0 to 1")
        flat = evidence.reshape(-1, evidence.shape[2]).T.astype(np.float32)
        return np.ascontiguousarray(-np.log(np.clip(flat, _LEAST_PROBABILITY, 1)))
    if evidence.dtype.kind not in "iu" or evidence.ndim != 2 or not evidence.size:
        raise LabelError(f"the CRF got {evidence.dtype} of shape {evidence.shape}, expected probabilities (rows, "
                         "cols, classes) or integer classes (rows, cols)")
    n = max(int(evidence.max()) + 1, 2) if n_classes is None else n_classes
    if n < 2 or evidence.min() < -1 or evidence.max() >= n:
        raise LabelError(f"the CRF got classes from {evidence.min()} to {evidence.max()}, expected -1 to {n - 1}, two "
                         "or more")
    # One row more, which -1 finds: every class alike.
    chances = np.full((n + 1, n), (1 - label_confidence) / (n - 1), np.float32)
    np.fill_diagonal(chances[:n], label_confidence)
    chances[n] = 1 / n
    return np.ascontiguousarray(-np.log(chances)[evidence.ravel()].T)
