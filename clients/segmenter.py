"""Segmenting: an image and a recipe → labels, confidence, probabilities."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from phaseline.clients.crf import CRFParameters, refine
from phaseline.clients.features import PixelFeatures, image_channels
from phaseline.clients.recipe import Recipe, load_recipe
from phaseline.clients.window import to_channels, without_equal_channels
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.contract import F32, U8, FeatureSource
from phaseline.runtime.engine import check_device
from phaseline.runtime.errors import ImageError, MissingInputError, RecipeError
from phaseline.runtime.source import LocalSource

BLOCK_PIXELS = 1 << 16
"""Pixels classified at once; bounds memory, decides nothing."""


@dataclass(frozen=True)
class Segmentation:
    """What segmenting one image gives.

    Attributes
    ----------
    labels
        uint8 array of shape (rows, cols), in the user's own label values (uint16 if one is above 255).
    confidence
        uint8 array of shape (rows, cols): round(255 × (p₁ - p₂)), the margin between the two likeliest classes.
    probabilities
        float32 array of shape (classes, rows, cols), classes in the recipe's order; None unless asked for.
    """

    labels: npt.NDArray[np.unsignedinteger[Any]]
    confidence: U8
    probabilities: F32 | None


class Segmenter:
    """Segments images with a recipe.

    Parameters
    ----------
    recipe
        From `fit` or `load_recipe`.
    source
        An open source of the recipe's bundle; None for a recipe of classical features only.
    threads
        For the classical features; None: one for each core.

    Raises
    ------
    RecipeError
        The source is of another bundle, is missing, or is not used by the recipe.
    """

    def __init__(self, recipe: Recipe, source: FeatureSource | None = None, threads: int | None = None) -> None:
        if recipe.bundle is None and source is not None:
            raise RecipeError("the recipe uses classical features only, but a bundle was given; leave it out")
        if recipe.bundle is not None and source is None:
            raise RecipeError(f"the recipe was fitted with bundle {recipe.bundle.hash[:12]}; open it and give its source")
        if recipe.bundle is not None and source is not None and source.bundle_hash != recipe.bundle.hash:
            raise RecipeError(f"the recipe was fitted with bundle {recipe.bundle.hash[:12]} ({recipe.bundle.path}), but "
                              f"{source.bundle_hash[:12]} was given; give the right one with --bundle, or fit again")
        self.recipe = recipe
        self.source = source
        self.engine_choice = getattr(source, "engine_choice", "none (classical features only)")
        self._features = PixelFeatures(recipe.features, source, threads)
        self._stack = contextlib.ExitStack()
        expected, names = recipe.classifier.n_features, self._features.names
        if expected != len(names):
            raise RecipeError(f"the recipe's classifier takes {expected} features, but its settings give {len(names)}; "
                              "fit again")

    @classmethod
    def open(
        cls,
        recipe: Path | str,
        *,
        bundle: Path | str | None = None,
        device: str = "auto",
        threads: int | None = None,
        source: FeatureSource | None = None,
    ) -> Self:
        """Load a recipe and open its bundle here, or another source of it; use the result inside ``with``.

        Parameters
        ----------
        recipe
            Folder that `phaseline fit` wrote.
        bundle
            Folder of its bundle, or ``default``; None: where it was when fitting.
        device
            ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
        threads
            Threads on the CPU; None: one for each core.
        source
            Where the features come from instead, e.g. a `TritonSource`; not yet open, and closed with the segmenter. `bundle`
            is then of no use, and `device` the classifier's.

        Raises
        ------
        RecipeError
            As the constructor, and as `find_bundle`.
        """
        known = check_device(device)
        loaded = load_recipe(recipe, threads=threads, device="cuda" if known == "tensorrt" else known)
        with contextlib.ExitStack() as stack:
            if source is not None and loaded.bundle is None:
                raise RecipeError("the recipe uses classical features only, which are computed here; leave the server out")
            if source is None and (found := find_bundle(loaded, bundle)) is not None:
                source = LocalSource(found, known, threads)
            segmenter = cls(loaded, None if source is None else stack.enter_context(source), threads)
            segmenter._stack = stack.pop_all()
        return segmenter

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def segment(
        self,
        image: npt.NDArray[np.generic],
        *,
        probabilities: bool = False,
        crf: CRFParameters | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Segmentation:
        """Segment one image.

        Parameters
        ----------
        image
            Array of any real dtype, shape (rows, cols) or (rows, cols, 3); RGB only if the recipe was fitted on RGB, and grey
            then counts as RGB of equal channels.
        probabilities
            Whether to keep the classes' probabilities, 4 bytes a pixel and class.
        crf
            Refine the labels with a dense conditional random field (needs the extra ``crf``); the confidence stays the
            classifier's.
        progress
            Called with the fraction done, 0–1.

        Raises
        ------
        ImageError
            Another number of channels than the recipe's, no pixels, or pixels that are not finite.
        """
        channels = self.recipe.features.image_channels
        image = without_equal_channels(image)
        if image_channels([image]) > channels:
            raise ImageError(f"the image has shape {image.shape}, but the recipe was fitted on grey images (rows, cols); convert "
                             "it to grey, or fit a recipe on such images")
        seen = to_channels(self.recipe.window.apply(image), channels)
        shape, n_classes = image.shape[:2], len(self.recipe.classes.values)
        index, confidence = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        kept = np.empty((n_classes, *shape), np.float32) if probabilities else None
        for rows, features in self._features.bands(seen):
            flat = features.reshape(len(features), -1)
            out_index, out_confidence = index[rows].reshape(-1), confidence[rows].reshape(-1)
            out_kept = None if kept is None else np.empty((n_classes, flat.shape[1]), np.float32)
            for start in range(0, flat.shape[1], BLOCK_PIXELS):
                block = slice(start, start + BLOCK_PIXELS)
                p = self.recipe.classifier.probabilities(np.ascontiguousarray(flat[:, block].T))
                out_index[block] = p.argmax(axis=1)
                out_confidence[block] = margin(p)
                if out_kept is not None:
                    out_kept[:, block] = p.T
            if kept is not None and out_kept is not None:
                kept[:, rows] = out_kept.reshape(n_classes, -1, shape[1])
            if progress is not None:
                progress(rows.stop / shape[0])
        if crf is not None:
            index = refine(index.astype(np.int16), seen, crf, n_classes=n_classes).astype(np.uint8)
        return Segmentation(self.recipe.classes.to_values(index), confidence, kept)


def margin(probabilities: F32) -> U8:
    """Confidence: round(255 × (p₁ - p₂)), the margin between the two likeliest classes.

    Parameters
    ----------
    probabilities
        float32 array of shape (n, classes), at least two classes.

    Returns
    -------
    uint8 array of shape (n,).
    """
    top = np.partition(probabilities, -2, axis=1)[:, -2:]
    confidence: U8 = np.rint(255 * (top[:, 1] - top[:, 0])).clip(0, 255).astype(np.uint8)
    return confidence


def find_bundle(recipe: Recipe, path: Path | str | None) -> Bundle | None:
    """The bundle at `path`, or where it was when the recipe was fitted; None if it uses classical features only.

    Raises
    ------
    RecipeError
        It is no longer there.
    MissingInputError, BundleError
        As `open_bundle`.
    """
    if path is not None:
        return open_bundle(path)
    if recipe.bundle is None:
        return None
    try:
        return open_bundle(recipe.bundle.path)
    except MissingInputError as error:
        raise RecipeError(f"the recipe's bundle {recipe.bundle.hash[:12]} is no longer at {recipe.bundle.path}; say where it "
                          "is with --bundle") from error
