"""From the probabilities along three axes to labels and confidence, in whole numbers: the same bits everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import U8


def quantised(probabilities: npt.NDArray[np.float32]) -> U8:
    """round(255 × p): uint8 array of the shape of `probabilities`, range 0–1."""
    found: U8 = np.rint(probabilities * np.float32(255)).clip(0, 255).astype(np.uint8)
    return found


def combined(parts: Sequence[U8]) -> tuple[U8, U8, U8]:
    """The mean over axes.

    Parameters
    ----------
    parts
        For each axis a uint8 array of shape (classes, planes, rows, cols): round(255 × p).

    Returns
    -------
    Class numbers, uint8 of shape (planes, rows, cols), the lower one of equals; confidence likewise, the margin between the two
    largest means; mean probabilities, uint8 of the shape of a part. Confidence and probabilities are rounded down at half.
    """
    count = np.uint16(len(parts))
    total = np.zeros(parts[0].shape, np.uint16)
    for part in parts:
        total += part
    index = total.argmax(axis=0).astype(np.uint8)
    top = np.partition(total, -2, axis=0)[-2:]
    half = count // 2
    confidence = ((top[1] - top[0] + half) // count).astype(np.uint8)
    return index, confidence, ((total + half) // count).astype(np.uint8)
