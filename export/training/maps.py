"""What is known of every pixel of a generated material: what its features should tell.

    phases ─┬─▶ is the phase as thick as 2, 4, 8, 16 px here (its opening by a disc of that radius)     4 maps
            ├─▶ how near is its border: exp(−distance / 2 px), exp(−distance / 6 px)                    2 maps
            └─▶ is it a particle rather than matrix                                                     1 map
    recording without noise ─▶ grey level, and the mean of its phase, relative to the field             2 maps
"""

from __future__ import annotations

import cv2
import numpy as np

from phaseline.runtime.contract import F32, U8

THICKNESSES_PX = (2, 4, 8, 16)
DECAYS_PX = (2, 6)
LAYOUT_MAPS = len(THICKNESSES_PX) + len(DECAYS_PX) + 1
MAPS = LAYOUT_MAPS + 2
WEIGHTS = (*(1.0,) * LAYOUT_MAPS, 0.5, 0.5)
_BEYOND_PX = 24
_LEAST_DEVIATION = 0.02


def layout_maps(phases: U8) -> U8:
    """Maps that follow from where the phases are.

    Parameters
    ----------
    phases
        uint8 array of shape (rows, cols).

    Returns
    -------
    uint8 array of shape (LAYOUT_MAPS, rows, cols): 0–1 as 0–255. Phases are taken to go on beyond the field as they end.
    """
    found = np.zeros((LAYOUT_MAPS, *phases.shape), np.float32)
    distance = np.zeros(phases.shape, np.float32)
    inside = np.s_[_BEYOND_PX:-_BEYOND_PX, _BEYOND_PX:-_BEYOND_PX]
    for value in np.unique(phases):
        where = phases == value
        around = np.pad(where.astype(np.uint8), _BEYOND_PX, mode="edge")
        depth = cv2.distanceTransform(around, cv2.DIST_L2, 5)
        distance[where] = depth[inside][where]
        for number, radius in enumerate(THICKNESSES_PX):
            outside_core = (depth < radius).astype(np.uint8)
            if not outside_core.all():
                opened = cv2.distanceTransform(outside_core, cv2.DIST_L2, 5) < radius
                found[number][where] = opened[inside][where]
    for number, decay in enumerate(DECAYS_PX):
        found[len(THICKNESSES_PX) + number] = np.exp(-distance / decay)
    found[-1] = phases > 0
    maps: U8 = np.rint(found * 255).astype(np.uint8)
    return maps


def grey_maps(clean: F32, phases: U8) -> F32:
    """Maps that follow from the grey levels.

    Parameters
    ----------
    clean
        float32 array of shape (rows, cols): a recording without noise.
    phases
        uint8 array of the same shape.

    Returns
    -------
    float32 array of shape (2, rows, cols): grey level, and the mean level of the pixel's phase, each of mean 0 and deviation 1.
    """
    counts = np.maximum(np.bincount(phases.ravel()), 1)
    means = np.bincount(phases.ravel(), clean.ravel()) / counts
    maps: F32 = np.stack([_relative(clean), _relative(means[phases])]).astype(np.float32)
    return maps


def _relative(values: F32) -> F32:
    relative: F32 = (values - values.mean()) / max(float(values.std()), _LEAST_DEVIATION)
    return relative
