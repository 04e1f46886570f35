"""Fitting: sparse brush labels on some images → a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.classify import create_classifier
from phaseline.clients.features import DeepFeatures, FeatureSettings, PixelFeatures, image_channels, is_trained
from phaseline.clients.labels import ClassTable
from phaseline.clients.recipe import BundleReference, Recipe, installed_versions
from phaseline.clients.window import IntensityWindow, to_channels, without_equal_channels
from phaseline.runtime.contract import F32, FeatureSource
from phaseline.runtime.errors import LabelError, UsageError


def fit(
    images: Sequence[npt.NDArray[np.generic]],
    labels: Sequence[npt.NDArray[np.integer[Any]]],
    *,
    source: FeatureSource | None = None,
    classical: ClassicalFeatures | None = ClassicalFeatures(),  # noqa: B008 - frozen
    deep: DeepFeatures | None = None,
    window: str = "auto",
    classifier: str = "xgboost",
    class_names: Sequence[str] | None = None,
    image_names: Sequence[str] | None = None,
    bundle_path: str = "default",
    seed: int = 0,
    threads: int | None = None,
    device: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> Recipe:
    """Train a classifier on the labelled pixels.

    Parameters
    ----------
    images
        Arrays of any real dtype, shape (rows, cols) or (rows, cols, 3).
    labels
        Integer arrays of shape (rows, cols), one an image: 0 is unlabelled, every other value is a class.
    source
        An open source of deep features; None for classical features only.
    classical
        The classical filter bank; None for deep features only.
    deep
        How deep features are used; None: as `DeepFeatures.for_bundle` chooses.
    window
        Intensities that become 0 and 255, see `IntensityWindow.fit`.
    classifier
        One of `phaseline.clients.classify.CLASSIFIERS`.
    class_names
        A name for each class, by ascending label value.
    image_names
        Recorded in the recipe.
    bundle_path
        Where the source's bundle lies; recorded in the recipe.
    seed
        Of the classifier.
    threads, device
        For the classical features and the classifier.
    progress
        Called with one line before each step.

    Returns
    -------
    The fitted recipe.

    Raises
    ------
    ImageError, LabelError, UsageError
        Images or labels that cannot be trained on, or choices that contradict each other.
    """
    say = progress or (lambda _: None)
    if len(images) != len(labels) or not images:
        raise LabelError(f"{len(images)} images and {len(labels)} label images came; expected one label image an image")
    images = [without_equal_channels(image) for image in images]
    for image, label in zip(images, labels, strict=True):
        if label.dtype.kind not in "ui":
            raise LabelError(f"labels are {label.dtype}, expected integers; 0 is unlabelled")
        if image.shape[:2] != label.shape:
            raise LabelError(f"labels have shape {label.shape}, but their image is {image.shape[:2]}; expected equal shapes")
    if deep is not None and source is None:
        raise UsageError("settings for deep features came without a source; open a bundle, or leave them out")
    if source is not None and deep is None:
        deep = DeepFeatures.for_bundle(source.spec)
    # Before any feature is computed: an unknown or missing classifier is known now.
    trained = create_classifier(classifier, seed=seed, threads=threads, device=device)
    settings = FeatureSettings(image_channels(images), classical, deep)
    pixels = PixelFeatures(settings, source, threads)
    classes = ClassTable.from_labels(labels, names=class_names)
    intensities = IntensityWindow.fit(images, window)

    gathered: list[F32] = []
    indices: list[npt.NDArray[np.int64]] = []
    names = image_names or [f"image {i}" for i in range(1, len(images) + 1)]
    for name, image, label in zip(names, images, labels, strict=True):
        say(f"features of {name}")
        index = classes.to_index(label)
        seen = to_channels(intensities.apply(image), settings.image_channels)
        for rows, features in pixels.bands(seen, wanted=index >= 0):
            labelled = index[rows] >= 0
            gathered.append(np.ascontiguousarray(features[:, labelled].T))
            indices.append(index[rows][labelled].astype(np.int64))
    target = np.concatenate(indices)
    say(f"{classifier} on {len(target)} pixels × {len(pixels.names)} features")
    trained.fit(np.concatenate(gathered), target, len(classes.values))
    counts = np.bincount(target, minlength=len(classes.values))
    return Recipe(
        classes=classes,
        window=intensities,
        features=settings,
        classifier_kind=classifier,
        classifier=trained,
        bundle=None if source is None else BundleReference(source.bundle_hash, bundle_path, is_trained(source.spec)),
        training={
            "images": list(names),
            "pixels": {str(value): int(n) for value, n in zip(classes.values, counts, strict=True)},
            "seed": seed,
        },
        versions=installed_versions(),
    )
