"""The main job on two real micrographs that scikit-image brings, with brush labels that phaseline ships."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import skimage.data

from phaseline.clients.labels import read_labels

DEMO_DATA = Path(__file__).parent / "demo_data"


@dataclass(frozen=True)
class Example:
    """A micrograph with brush labels.

    Attributes
    ----------
    name
        scikit-image's name for it.
    image
        uint8 array of shape (rows, cols) or (rows, cols, 3).
    labels
        Integer array of shape (rows, cols), 0 unlabelled.
    class_names
        By ascending label value.
    """

    name: str
    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.integer[Any]]
    class_names: tuple[str, ...]


def examples() -> list[Example]:
    """The demo's micrographs: a cell in phase contrast, and an immunohistochemical section of colon."""
    classes = {"cell": ("cell", "halo", "background"), "immunohistochemistry": ("epithelium", "stroma", "lumen")}
    return [
        Example(name, getattr(skimage.data, name)(), read_labels(DEMO_DATA / f"{name}.png"), names)
        for name, names in classes.items()
    ]
