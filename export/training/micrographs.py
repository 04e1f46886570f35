"""The unlabelled images that are trained on, and where each came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phaseline.export.calibration import SUFFIXES, load_image
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import MissingInputError

BUNDLED = ("brick", "cell", "coins", "grass", "gravel", "immunohistochemistry", "microaneurysms")
"""Images of scikit-image's package that look like what microscopes see."""
MIN_SIDE_PX = 64


@dataclass(frozen=True)
class Micrograph:
    """One image.

    Attributes
    ----------
    name
        ``folder/file`` as found below the folder given, or ``scikit-image/NAME``.
    pixels
        uint8 array of shape (rows, cols).
    """

    name: str
    pixels: U8


def load_micrographs(folders: Sequence[Path], *, bundled: bool) -> list[Micrograph]:
    """Read all images below some folders, in the order of their names, as grey.

    Parameters
    ----------
    folders
        Searched through, subfolders too.
    bundled
        Add scikit-image's own.

    Raises
    ------
    MissingInputError
        A folder does not exist or holds no image, or there is none at all.
    ImageError
        An image cannot be read.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise MissingInputError(f"no folder of micrographs at {folder}")
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise MissingInputError(f"{folder} holds no image; expected some of {', '.join(sorted(SUFFIXES))}")
        found += [Micrograph(file.relative_to(folder).as_posix(), load_image(file, 1)[0]) for file in files]
    if bundled:
        found += [Micrograph(f"scikit-image/{name}", pixels) for name, pixels in _bundled()]
    large = [micrograph for micrograph in found if min(micrograph.pixels.shape) >= MIN_SIDE_PX]
    if not large:
        raise MissingInputError(f"no micrograph of at least {MIN_SIDE_PX} px a side to train on; give --images FOLDER")
    return large


def digest(micrographs: Sequence[Micrograph]) -> str:
    """SHA-256 of all names and pixels: says whether two trainings saw the same."""
    total = hashlib.sha256()
    for micrograph in micrographs:
        total.update(f"{micrograph.name} {micrograph.pixels.shape} ".encode())
        total.update(np.ascontiguousarray(micrograph.pixels).tobytes())
    return total.hexdigest()


def _bundled() -> list[tuple[str, U8]]:
    from skimage import data

    images = []
    for name in BUNDLED:
        image = np.asarray(getattr(data, name)())
        grey = image if image.ndim == 2 else (image[..., :3] @ np.array([0.2125, 0.7154, 0.0721])).round().astype(np.uint8)
        images.append((name, np.ascontiguousarray(grey)))
    return images
