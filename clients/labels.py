"""Brush labels from any tool, and the table between the user's label values and class numbers.

    label file ──▶ read_labels ──▶ values (0 = unlabelled) ──▶ ClassTable.to_index ──▶ 0 … n-1 (-1 = unlabelled)
                                   values ◀── ClassTable.to_values ◀── 0 … n-1
"""

from __future__ import annotations

import colorsys
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.image_formats import read_stored
from phaseline.clients.images import list_images
from phaseline.clients.window import without_equal_channels
from phaseline.runtime.errors import LabelError, UsageError

I16 = npt.NDArray[np.int16]
U16 = npt.NDArray[np.uint16]

UNLABELLED = 0
MAX_CLASSES = 255
MAX_VALUE = 65535

# Okabe and Ito's colours, told apart with every common form of colour blindness; black is left for 'unlabelled'.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
_GOLDEN_RATIO = 0.618033988749895


@dataclass(frozen=True)
class ClassTable:
    """The classes of a recipe; class i has the user's label value `values[i]`.

    Attributes
    ----------
    values
        Label values, ascending, 1–65535; they need not be contiguous.
    names
        A distinct name for each.
    colours
        A colour for each, ``#rrggbb``.

    Raises
    ------
    LabelError
        Fewer than 2 classes, more than 255, or entries unlike these.
    """

    values: tuple[int, ...]
    names: tuple[str, ...]
    colours: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("values", "names", "colours"):
            # JSON has lists only.
            object.__setattr__(self, name, tuple(getattr(self, name)))
        n = len(self.values)
        if not 2 <= n <= MAX_CLASSES:
            raise LabelError(f"there are {n} classes, expected 2 to {MAX_CLASSES}; label others, or merge some")
        valid = all(type(v) is int and 0 < v <= MAX_VALUE for v in self.values)
        if not valid or list(self.values) != sorted(set(self.values)):
            raise LabelError(f"label values are {self.values}, expected different integers from 1 to {MAX_VALUE}, "
                             "ascending")
        valid = all(isinstance(name, str) and name for name in self.names)
        if not valid or len(self.names) != n or len(set(self.names)) != n:
            raise LabelError(f"class names are {', '.join(map(repr, self.names))}, expected {n} different ones, one "
                             f"for each of the label values {self.values}")
        if len(self.colours) != n or not all(re.fullmatch(r"#[0-9a-f]{6}", str(c)) for c in self.colours):
            raise LabelError(f"class colours are {self.colours}, expected {n} of the form #rrggbb")

    @classmethod
    def from_labels(cls, labels: Sequence[npt.NDArray[Any]], names: Sequence[str] | None = None) -> Self:
        """The classes that occur in `labels`.

        Parameters
        ----------
        labels
            Integer arrays of label values, 0 = unlabelled.
        names
            One for each value that occurs, ascending; ``class VALUE`` if None.

        Raises
        ------
        LabelError
            No labelled pixel, one class only, or more than 255 classes.
        UsageError
            Another number of names than of classes, or names that are not different.
        """
        found = sorted({int(v) for label in labels for v in np.unique(label)} - {UNLABELLED})
        if not found:
            raise LabelError("no pixel is labelled, all label values are 0; expected brush strokes of at least two "
                             "values above 0")
        if len(found) == 1:
            raise LabelError(f"only one class is labelled, value {found[0]}, expected at least two; add strokes of "
                             "another value")
        if len(found) > MAX_CLASSES:
            raise LabelError(f"{len(found)} label values occur, expected at most {MAX_CLASSES} classes; is this a "
                             "label image or the micrograph itself?")
        if names is not None and (len(names) != len(found) or len(set(names)) != len(names) or not all(names)):
            raise UsageError(f"class names are {', '.join(map(repr, names))}, expected {len(found)} different ones "
                             f"for the label values {', '.join(map(str, found))}; give one for each")
        return cls(tuple(found), tuple(names or (f"class {v}" for v in found)), default_colours(len(found)))

    def to_index(self, labels: npt.NDArray[Any]) -> I16:
        """Label values → int16 array of the same shape: the class, -1 where unlabelled.

        Raises
        ------
        LabelError
            A value that the table does not hold.
        """
        unknown = -2
        table = np.full(MAX_VALUE + 1, unknown, np.int16)
        table[UNLABELLED] = -1
        table[list(self.values)] = np.arange(len(self.values))
        fits = labels.dtype == np.uint8 or labels.size == 0 or (labels.min() >= 0 and labels.max() <= MAX_VALUE)
        index: I16 | None = table[labels] if fits else None
        if index is None or (index == unknown).any():
            strangers = sorted({int(v) for v in np.unique(labels)} - {UNLABELLED, *self.values})
            raise LabelError(f"labels hold the value {strangers[0]}, expected 0 or one of "
                             f"{', '.join(map(str, self.values))}; relabel, or fit again with it")
        return index

    def to_values(self, index: npt.NDArray[Any]) -> npt.NDArray[np.uint8] | U16:
        """Classes 0 … n-1, -1 = unlabelled → label values: uint8 array of that shape, uint16 if a value exceeds 255.

        Raises
        ------
        LabelError
            A class that the table does not hold.
        """
        if index.size and not (index.min() >= -1 and index.max() < len(self.values)):
            raise LabelError(f"classes run from {index.min()} to {index.max()}, expected -1 to "
                             f"{len(self.values) - 1}; is this the table of another recipe?")
        # The last entry is what -1 finds.
        dtype = np.uint8 if self.values[-1] <= 255 else np.uint16
        values: npt.NDArray[np.uint8] | U16 = np.array([*self.values, UNLABELLED], dtype)[index]
        return values


def default_colours(n: int) -> tuple[str, ...]:
    """n different colours, ``#rrggbb``: Okabe and Ito's seven (jfly.uni-koeln.de/color), then turns of the hue
    circle."""
    colours = list(_COLOURS[:n])
    turn = 0
    while len(colours) < n:
        lightness, saturation = (0.35, 0.65, 0.5)[turn % 3], (0.9, 0.6)[turn % 2]
        red, green, blue = colorsys.hls_to_rgb(turn * _GOLDEN_RATIO % 1, lightness, saturation)
        colour = f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
        if colour not in colours:
            colours.append(colour)
        turn += 1
    return tuple(colours)


def read_labels(path: Path, shape: tuple[int, int] | None = None) -> U16:
    """Read label values as a brush tool saved them.

    Parameters
    ----------
    path
        PNG, TIFF, BMP or NPY file: grey, a palette (its indices are the values), or RGB with equal channels.
        Pixels of an alpha channel of 0 are unlabelled.
    shape
        (rows, cols) of the image that the labels belong to; None: not checked.

    Returns
    -------
    uint16 array of shape (rows, cols), 0 = unlabelled.

    Raises
    ------
    MissingInputError, ImageError
        The file is missing, or unreadable.
    LabelError
        Coloured, lossily compressed, fractional, negative or too large values; another shape than the image's.
    """
    stored = read_stored(Path(path))
    values = stored.pixels
    if stored.format == "JPEG":
        raise LabelError(f"{path} is a JPEG file, whose compression alters label values, expected PNG, TIFF or NPY; "
                         "export it again")
    if shape is not None and values.shape[:2] != tuple(shape):
        raise LabelError(f"{path} has the shape {values.shape[:2]}, expected its image's {tuple(shape)}; export the "
                         "labels at the image's full size")
    if stored.transparent is not None:
        values = np.where(stored.transparent if values.ndim == 2 else stored.transparent[..., None], 0, values)
    values = without_equal_channels(values)
    if values.ndim == 3:
        raise LabelError(f"{path} has coloured labels, expected one grey value a class (0 = unlabelled); export it as grey or "
                         "with a palette")
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and np.array_equal(values, np.rint(values))):
        raise LabelError(f"{path} has fractional or NaN label values, expected integers; export it without "
                         "interpolation")
    low, high = values.min(), values.max()
    if low < 0 or high > MAX_VALUE:
        raise LabelError(f"{path} has label values from {low:g} to {high:g}, expected 0 (unlabelled) to {MAX_VALUE}; "
                         "renumber them")
    return np.ascontiguousarray(values.astype(np.uint16))


def pair_labels(image_paths: Sequence[Path], labels_path: Path) -> list[tuple[Path, Path]]:
    """Which label file belongs to which image.

    Parameters
    ----------
    image_paths
        Images, as `list_images` gives them.
    labels_path
        A label file, for a single image; or a folder whose files have the images' stems.

    Returns
    -------
    (image, labels) pairs in the images' order; images without labels are left out.

    Raises
    ------
    MissingInputError
        `labels_path` does not exist, or holds no label files.
    LabelError
        A label file for several images; label files without an image.
    """
    labels_path = Path(labels_path)
    label_files = list_images(labels_path)
    if labels_path.is_file():
        if len(image_paths) != 1:
            raise LabelError(f"{labels_path} is one label file for {len(image_paths)} images, expected a folder of "
                             "label files with the images' names")
        return [(image_paths[0], labels_path)]
    by_stem = {file.stem: file for file in label_files}
    if len(image_paths) == 1 and image_paths[0].stem not in by_stem:
        raise LabelError(f"{labels_path} has no labels for {image_paths[0].name}; expected a file {image_paths[0].stem}.png, "
                         ".tif or .npy there")
    # With one image of many, labels of the others are no mistake.
    strangers = by_stem.keys() - {image.stem for image in image_paths} if len(image_paths) > 1 else set()
    if strangers:
        names = [file.name for file in label_files if file.stem in strangers]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise LabelError(f"{labels_path} has labels without an image: {shown}; name each label file as its image, or "
                         "remove it")
    return [(image, by_stem[image.stem]) for image in image_paths if image.stem in by_stem]
