"""Pictures for people: labels over an image, brush strokes on it, and features as colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.labels import ClassTable
from phaseline.clients.window import to_channels
from phaseline.runtime.contract import U8

PCA_PIXELS = 20_000
"""Pixels that the three components of a picture are fitted on; it only has to look right."""


def overlay(image: U8, labels: npt.NDArray[np.unsignedinteger[Any]], classes: ClassTable, opacity: float = 0.45) -> U8:
    """Labels in their classes' colours over the image.

    Parameters
    ----------
    image
        uint8 array of shape (rows, cols) or (rows, cols, 3).
    labels
        Integer array of shape (rows, cols) in the user's values; 0 stays uncoloured.
    classes
        Values and colours.
    opacity
        Of the colours, 0–1.

    Returns
    -------
    uint8 array of shape (rows, cols, 3).
    """
    picture = to_channels(image, 3).astype(np.float32)
    for value, colour in zip(classes.values, classes.colours, strict=True):
        where = labels == value
        picture[where] += opacity * (np.array(rgb(colour), np.float32) - picture[where])
    return np.rint(picture).astype(np.uint8)


def pca_picture(features: npt.NDArray[np.floating[Any]]) -> U8:
    """Features as colours: their first three principal components become red, green and blue.

    Parameters
    ----------
    features
        Real array of shape (k, rows, cols), k ≥ 1.

    Returns
    -------
    uint8 array of shape (rows, cols, 3); each component is stretched between its 1st and 99th percentiles.
    """
    flat = features.reshape(len(features), -1).T
    step = max(len(flat) // PCA_PIXELS, 1)
    sample = flat[::step].astype(np.float32)
    mean = sample.mean(axis=0)
    basis = np.linalg.svd(sample - mean, full_matrices=False)[2][:3]
    # A component's sign is arbitrary; fixing it makes two pictures of like features look alike.
    basis *= np.where(basis[np.arange(len(basis)), np.abs(basis).argmax(axis=1)] < 0, -1, 1)[:, None]
    low, high = np.percentile((sample - mean) @ basis.T, [1, 99], axis=0)
    span = np.maximum(high - low, np.finfo(np.float32).tiny)
    picture = np.full((len(flat), 3), 127, np.uint8)
    for start in range(0, len(flat), 1 << 16):
        scores = (flat[start : start + (1 << 16)].astype(np.float32) - mean) @ basis.T
        picture[start : start + (1 << 16), : len(basis)] = np.rint(255 * np.clip((scores - low) / span, 0, 1))
    return picture.reshape(*features.shape[1:], 3)


def side_by_side(pictures: list[U8], gap_px: int = 8) -> U8:
    """Pictures of one height in a row, with white gaps: uint8 array of shape (rows, cols, 3)."""
    gap = np.full((pictures[0].shape[0], gap_px, 3), 255, np.uint8)
    row: list[U8] = []
    for picture in pictures:
        row += [picture, gap]
    return np.concatenate(row[:-1], axis=1)


def rgb(colour: str) -> tuple[int, int, int]:
    """Red, green and blue, 0–255, of ``#rrggbb``."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
