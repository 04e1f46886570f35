"""Batches: crops of generated materials with their phases, and pairs of recordings of one micrograph.

All random choices come from the generator that is given, so a batch is a function of seed and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from phaseline.export.training.acquisition import draw_acquisition, record, vary, without_noise
from phaseline.export.training.maps import grey_maps, layout_maps
from phaseline.export.training.phantoms import draw_material, render
from phaseline.runtime.contract import F32, U8

FIELDS = 2
"""Fields of view of each material: strokes are drawn on the first, the second is labelled by them."""
_MARGIN_PX = 42
_JITTER_PX = 6


@dataclass(frozen=True)
class Pool:
    """Generated scenes without noise.

    Attributes
    ----------
    scenes
        uint8 array of shape (materials, fields, rows, cols): grey levels before the recording.
    phases
        uint8 array of the same shape.
    maps
        uint8 array of shape (materials, fields, LAYOUT_MAPS, rows, cols), see `layout_maps`; None unless asked for.
    """

    scenes: U8
    phases: U8
    maps: U8 | None = None


@dataclass(frozen=True)
class Episode:
    """Recordings of two fields of view of one material.

    Attributes
    ----------
    images
        float32 array of shape (fields, rows, cols), 0–1.
    phases
        uint8 array of the same shape.
    maps
        float32 array of shape (fields, MAPS, rows, cols), about −1…1; None if the pool has none.
    """

    images: F32
    phases: U8
    maps: F32 | None


def make_pool(materials: int, crop_px: int, seed: int, micrographs: Sequence[U8], workers: int = 1, *, maps: bool = False
              ) -> Pool:
    """Generate materials.

    Parameters
    ----------
    materials
        How many.
    crop_px
        Side of the crops that are wanted; scenes are a little larger.
    seed
        Decides all.
    micrographs
        uint8 arrays of shape (rows, cols) to cut textures from.
    workers
        Processes.
    maps
        Whether to make them.
    """
    side = crop_px + _MARGIN_PX
    if workers == 1:
        _set_micrographs(list(micrographs))
        found = [_scenes(index, side, seed) for index in range(materials)]
        found_maps = np.stack([_maps(phases) for _, phases in found]) if maps else None
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_set_micrographs,
                                 initargs=(list(micrographs),)) as executor:
            found = list(executor.map(_scenes, range(materials), [side] * materials, [seed] * materials, chunksize=8))
            found_maps = None if not maps else np.stack(list(executor.map(_maps, [phases for _, phases in found], chunksize=8)))
    return Pool(np.stack([scenes for scenes, _ in found]), np.stack([phases for _, phases in found]), found_maps)


_micrographs: list[U8] = []


def _set_micrographs(micrographs: list[U8]) -> None:
    _micrographs[:] = micrographs
    cv2.setNumThreads(1)


def _scenes(index: int, side_px: int, seed: int) -> tuple[U8, U8]:
    random = np.random.default_rng([seed, 1, index])
    material = draw_material(random, len(_micrographs))
    fields = [render(material, side_px, random, _micrographs) for _ in range(FIELDS)]
    return (np.stack([(grey.clip(0, 1) * 255).round().astype(np.uint8) for grey, _ in fields]),
            np.stack([phases for _, phases in fields]))


def _maps(phases: U8) -> U8:
    return np.stack([layout_maps(field) for field in phases])


def draw_episode(pool: Pool, crop_px: int, random: np.random.Generator) -> Episode:
    """Record two fields of view of one material, of `crop_px` a side."""
    index, instrument = int(random.integers(len(pool.scenes))), draw_acquisition(random)
    images, phases, maps = [], [], []
    for field, (scene, truth) in enumerate(zip(pool.scenes[index], pool.phases[index], strict=True)):
        row, col = random.integers(0, scene.shape[0] - crop_px + 1, 2)
        where, turn = np.s_[row : row + crop_px, col : col + crop_px], int(random.integers(8))
        settings, grey = vary(instrument, random), turned(scene[where], turn).astype(np.float32) / 255
        images.append(record(grey, settings, random))
        phases.append(turned(truth[where], turn))
        if pool.maps is not None:
            layout = turned(pool.maps[index, field][(slice(None), *where)], turn).astype(np.float32) / 127.5 - 1
            maps.append(np.concatenate([layout, grey_maps(record(grey, without_noise(settings), random), phases[-1])]))
    return Episode(np.stack(images), np.stack(phases), np.stack(maps) if maps else None)


def draw_pixels(phases: U8, count: int, margin_px: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Pixels of one image as strokes would give them: half of them spread evenly over its phases, half anywhere.

    Returns
    -------
    int64 array of shape (count,): flat indices, in random order.
    """
    side = phases.shape[1]
    rows, cols = np.mgrid[margin_px : phases.shape[0] - margin_px, margin_px : side - margin_px]
    inside = (rows * side + cols).ravel()
    values = phases.ravel()[inside]
    present = np.unique(values)
    share = count // 2 // len(present)
    picked = [inside[random.choice(np.flatnonzero(values == value), share)] for value in present]
    picked.append(random.choice(inside, count - share * len(present)))
    found: npt.NDArray[np.int64] = random.permutation(np.concatenate(picked))
    return found


def draw_pair(micrographs: Sequence[U8], crop_px: int, random: np.random.Generator) -> tuple[F32, list[int]]:
    """Two recordings of one place of a micrograph, turned and shifted by a few pixels.

    Returns
    -------
    float32 array of shape (2, crop, crop), 0–1; how each was turned, for `views.turned_back`.
    """
    scene = _cut(micrographs, crop_px + _JITTER_PX, random)
    views, turns = [], []
    for _ in range(2):
        row, col = random.integers(0, _JITTER_PX + 1, 2)
        turn = int(random.integers(8))
        part = turned(scene[row : row + crop_px, col : col + crop_px], turn)
        views.append(record(part, draw_acquisition(random), random))
        turns.append(turn)
    return np.stack(views), turns


def draw_scene(micrographs: Sequence[U8], side_px: int, random: np.random.Generator) -> F32:
    """One recording of one place of a micrograph: float32 array of shape (side, side), 0–1."""
    return record(turned(_cut(micrographs, side_px, random), int(random.integers(8))), draw_acquisition(random), random)


def _cut(micrographs: Sequence[U8], side_px: int, random: np.random.Generator) -> F32:
    """A square of a micrograph, some of them at coarser scale: float32 array of shape (side, side), 0–1."""
    image = micrographs[int(random.integers(len(micrographs)))]
    side = min(round(side_px * float(random.choice([1.0, 1.0, 1.5, 2.0]))), *image.shape)
    row, col = (int(random.integers(0, length - side + 1)) for length in image.shape)
    scene: F32 = image[row : row + side, col : col + side].astype(np.float32) / 255
    if side == side_px:
        return scene
    resized = cv2.resize(scene, (side_px, side_px), interpolation=cv2.INTER_AREA if side > side_px else cv2.INTER_LINEAR)
    return resized.astype(np.float32)


def turned(image: npt.NDArray[Any], turn: int) -> npt.NDArray[Any]:
    """One of the eight symmetries of the square, on (…, rows, cols): `turn` % 4 quarters, then mirrored if `turn` ≥ 4."""
    rotated = np.rot90(image, turn % 4, (-2, -1))
    return np.ascontiguousarray(rotated[..., ::-1] if turn >= 4 else rotated)
