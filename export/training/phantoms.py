"""Generated microstructures whose phases are known: what few strokes have to tell apart, with no label to draw.

    material ─▶ layout (matrix, particles of several sizes and shapes, lamellae, grains, pores) ─▶ phase of every pixel
                   │
                   ├─▶ look of each phase (grey level, texture drawn or cut from a micrograph, rims) ─┐
                   └─▶ relief: how an etched surface looks (bright edges, shaded flanks, halos) ──────┴─▶ grey image

Images of one material differ as the fields of view of one specimen do: same phases, other places. Phases often share their grey
level, so that size, shape, texture or what surrounds them has to tell them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import F32, U8

Shape = Literal["disc", "ellipse", "cuboid", "needle", "blob", "lamella"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
MAX_PHASES = 5
"""Phases of a material at most, matrix included."""
_MAX_PARTICLES = 500
_CORNERS = 36
_SHRINK = 4  # cv2 draws with sub-pixel corners of 1/16 px
SHARE_SIZE_TWIN = 0.4
SHARE_SAME_GREY = 0.35
SHARE_CUT_TEXTURE = 0.4
SHARE_RELIEF = 0.5
SHARE_GREY_OF_MATRIX = 0.5


@dataclass(frozen=True)
class Phase:
    """One population of particles, or a pattern.

    Attributes
    ----------
    shape
        Of its particles; ``blob`` and ``lamella`` are patterns.
    size_px
        Typical radius, or half the period of a pattern.
    coverage
        Share of the area that it is meant to take, 0–1.
    angle, spread
        Common orientation in radians, and the particles' deviation from it.
    elongation
        Length over width.
    grey, grey_spread
        Level 0–1, and its deviation from particle to particle.
    rim
        Brightness added along its border, may be negative.
    texture_px, texture_strength
        Correlation length and amplitude of its drawn texture.
    cut
        Which micrograph its texture is cut from, or -1.
    irregularity
        Deviation of a particle's radius along its outline, as a share of it.
    """

    shape: Shape
    size_px: float
    coverage: float
    angle: float
    spread: float
    elongation: float
    grey: float
    grey_spread: float
    rim: float
    texture_px: float
    texture_strength: float
    cut: int
    irregularity: float


@dataclass(frozen=True)
class Relief:
    """How secondary electrons, or oblique light, show a surface whose phases stand at different heights.

    Attributes
    ----------
    heights
        Of each phase, −1…1.
    flank_px
        Deviation of the Gaussian that rounds the steps between them.
    edge, side
        Brightness of the steps; on the upper side of them only (1), the lower (−1), or both (0).
    shade, angle
        Brightness of flanks that face the detector, and where it is, in radians.
    halo, halo_px
        Brightness added to what is higher than its surroundings, and how far these reach.
    """

    heights: tuple[float, ...]
    flank_px: float
    edge: float
    side: float
    shade: float
    angle: float
    halo: float
    halo_px: float


@dataclass(frozen=True)
class Material:
    """A matrix and what is in it.

    Attributes
    ----------
    phases
        The matrix first; its shape and size are those of its grains.
    grains
        Whether the matrix is made of grains of different grey.
    relief
        Of the surface, or None: flat.
    """

    phases: tuple[Phase, ...]
    grains: bool
    relief: Relief | None = None


def draw_material(random: np.random.Generator, micrographs: int = 0) -> Material:
    """Draw a material of 2 to 5 phases.

    Parameters
    ----------
    random
        Decides everything.
    micrographs
        How many there are to cut textures from.
    """
    count = int(random.choice([2, 3, 4, MAX_PHASES], p=[0.3, 0.4, 0.2, 0.1]))
    phases = [_draw_phase(random, micrographs) for _ in range(count)]
    for index in range(2, count):
        twin = phases[index - 1]
        if random.random() < SHARE_SIZE_TWIN:
            # The same look at another size: only context tells.
            ratio = float(random.uniform(2.0, 6.0))
            size = twin.size_px / ratio if twin.size_px > 5 else twin.size_px * ratio
            phases[index] = dataclasses.replace(twin, size_px=float(np.clip(size, 1.5, 45)),
                                                coverage=float(random.uniform(0.04, 0.25)))
        elif random.random() < SHARE_SAME_GREY:
            phases[index] = dataclasses.replace(phases[index], grey=twin.grey)
    relief = _draw_relief(random, count) if random.random() < SHARE_RELIEF else None
    if relief is not None and random.random() < SHARE_GREY_OF_MATRIX:
        # Only their outlines tell particles from matrix: what lies inside one has to be found from its edge.
        grey = phases[0].grey
        phases[1:] = [dataclasses.replace(phase, grey=float(grey + random.normal(0, 0.04))) for phase in phases[1:]]
    return Material(tuple(phases), bool(random.random() < 0.25), relief)


def render(material: Material, side_px: int, random: np.random.Generator, micrographs: Sequence[U8] = ()) -> tuple[F32, U8]:
    """One field of view.

    Parameters
    ----------
    material
        From `draw_material`.
    side_px
        Side of the square image.
    random
        Decides places.
    micrographs
        uint8 arrays of shape (rows, cols) to cut textures from, as many as the material was drawn with.

    Returns
    -------
    Grey image, float32 of shape (side, side), about 0–1, noise-free; and uint8 phase of each pixel, 0 the matrix.
    """
    labels = np.zeros((side_px, side_px), np.uint8)
    grey = np.full((side_px, side_px), material.phases[0].grey, np.float32)
    if material.grains:
        grey += _grains(side_px, material.phases[0], random)
    order = sorted(range(1, len(material.phases)), key=lambda i: -material.phases[i].size_px)
    for index in order:
        phase = material.phases[index]
        if phase.shape in ("blob", "lamella"):
            where = _pattern(phase, side_px, random) & (labels == 0)
            labels[where] = index
            grey[where] = phase.grey
        else:
            _particles(phase, index, labels, grey, random)
    for index, phase in enumerate(material.phases):
        where = labels == index
        if not where.any():
            continue
        if phase.rim:
            inside = cv2.GaussianBlur(where.astype(np.float32), (0, 0), 1.2)
            grey += np.where(where, phase.rim * 4 * inside * (1 - inside), 0)
        texture = _texture(phase, side_px, random, micrographs)
        grey[where] += texture[where]
    if material.relief is not None:
        grey += _shading(material.relief, labels)
    return grey, labels


def _draw_relief(random: np.random.Generator, phases: int) -> Relief:
    return Relief(
        heights=tuple(float(h) for h in random.uniform(-1, 1, phases)),
        flank_px=float(np.exp(random.uniform(np.log(0.8), np.log(3.5)))),
        edge=float(random.choice([0.0, random.uniform(0.1, 0.6)], p=[0.2, 0.8])),
        side=float(random.uniform(-1, 1)),
        shade=float(random.choice([0.0, random.uniform(0.05, 0.4)])),
        angle=float(random.uniform(0, 2 * np.pi)),
        halo=float(random.choice([0.0, random.uniform(-0.1, 0.2)])),
        halo_px=float(random.uniform(4, 14)),
    )


def _shading(relief: Relief, labels: U8) -> F32:
    """What the relief adds to the grey levels."""
    height = np.asarray(relief.heights, np.float32)[labels]
    smooth = cv2.GaussianBlur(height, (0, 0), relief.flank_px)
    slope_row, slope_col = np.gradient(smooth)
    # A step of 1 then has a slope of about 1 on its flank, however wide that is.
    scale = np.float32(2.5 * relief.flank_px)
    upper = 0.5 * (1 + relief.side * np.sign(height - smooth))
    added = relief.edge * upper * np.hypot(slope_row, slope_col) * scale
    added += relief.shade * scale * (np.cos(relief.angle) * slope_row + np.sin(relief.angle) * slope_col)
    if relief.halo:
        added += relief.halo * (height - cv2.GaussianBlur(height, (0, 0), relief.halo_px))
    shading: F32 = added.astype(np.float32)
    return shading


def _draw_phase(random: np.random.Generator, micrographs: int) -> Phase:
    cut = bool(micrographs) and random.random() < SHARE_CUT_TEXTURE
    return Phase(
        shape=SHAPES[int(random.choice(len(SHAPES), p=[0.2, 0.2, 0.25, 0.1, 0.15, 0.1]))],
        size_px=float(np.exp(random.uniform(np.log(1.5), np.log(45)))),
        coverage=float(random.uniform(0.05, 0.6)),
        angle=float(random.uniform(0, np.pi)),
        spread=float(random.choice([0.05, 0.3, np.pi])),
        elongation=float(random.uniform(1.0, 2.5)),
        grey=float(random.uniform(0.15, 0.85)),
        grey_spread=float(random.choice([0.0, random.uniform(0, 0.08)])),
        rim=float(random.choice([0.0, random.uniform(-0.2, 0.4)])),
        texture_px=float(np.exp(random.uniform(np.log(0.6), np.log(5)))),
        texture_strength=float(random.choice([0.0, random.uniform(0.01, 0.1)])),
        cut=int(random.integers(micrographs)) if cut else -1,
        irregularity=float(random.choice([0.0, random.uniform(0.02, 0.2)])),
    )


def _field(side_px: int, sigma: float, random: np.random.Generator) -> F32:
    """Gaussian random field of mean 0 and deviation 1."""
    margin = int(3 * sigma) + 1
    noise = random.standard_normal((side_px + 2 * margin,) * 2, dtype=np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), max(sigma, 0.3))[margin:-margin, margin:-margin]
    field: F32 = (smooth - smooth.mean()) / max(float(smooth.std()), 1e-6)
    return field


def _pattern(phase: Phase, side_px: int, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    field = _field(side_px, phase.size_px, random)
    if phase.shape == "lamella":
        rows, cols = np.mgrid[:side_px, :side_px].astype(np.float32)
        along = rows * np.sin(phase.angle) + cols * np.cos(phase.angle)
        bent = along / max(phase.size_px, 2) * np.pi + phase.spread * field + random.uniform(0, 2 * np.pi)
        field = np.sin(bent)
    found: npt.NDArray[np.bool_] = field > np.quantile(field, 1 - phase.coverage)
    return found


def _particles(phase: Phase, index: int, labels: U8, grey: F32, random: np.random.Generator) -> None:
    """Draw particles that overlap no others."""
    side = len(labels)
    long = phase.elongation * (3 if phase.shape == "needle" else 1)
    area = np.pi * phase.size_px**2 * (long if phase.shape != "needle" else long / 3)
    wanted = min(_MAX_PARTICLES, max(1, round(phase.coverage * side * side / area)))
    outline = _outline(phase)
    placed = tries = 0
    while placed < wanted and tries < 3 * wanted:
        tries += 1
        scale = phase.size_px * float(np.exp(random.normal(0, 0.25)))
        angle = phase.angle + phase.spread * random.normal()
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        stretch = np.array([long, 1.0]) if phase.shape != "needle" else np.array([long, 0.35])
        centre = random.uniform(-scale, side + scale, 2)
        corners = (outline * _lobes(phase, random) * stretch * scale) @ turn.T + centre
        low = np.floor(corners.min(axis=0)).astype(int) - 2
        high = np.ceil(corners.max(axis=0)).astype(int) + 3
        left, top = np.clip(low, 0, side)
        right, bottom = np.clip(high, 0, side)
        if right <= left or bottom <= top:
            continue
        mask = np.zeros((bottom - top, right - left), np.uint8)
        fixed = np.round((corners - (left, top)) * (1 << _SHRINK)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], (1,), shift=_SHRINK)
        there = labels[top:bottom, left:right]
        grown = cv2.dilate(mask, np.ones((3, 3), np.uint8))
        if (there[grown > 0] != 0).any():
            continue
        there[mask > 0] = index
        grey[top:bottom, left:right][mask > 0] = phase.grey + phase.grey_spread * random.normal()
        placed += 1


def _outline(phase: Phase) -> npt.NDArray[np.float64]:
    """Corners around the origin, of radius about 1."""
    turn = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    circle: npt.NDArray[np.float64] = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    if phase.shape == "cuboid":
        # A superellipse: a square with rounded corners.
        power: npt.NDArray[np.float64] = np.sign(circle) * np.abs(circle) ** 0.4
        return power
    return circle


def _lobes(phase: Phase, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """Factors for the corners of an outline, (corners, 1): lobes and dents, other ones for each particle."""
    if not phase.irregularity:
        return np.ones((_CORNERS, 1))
    turn = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    waves = sum(random.normal(0, 1 / np.sqrt(k)) * np.cos(k * turn + random.uniform(0, 2 * np.pi)) for k in range(2, 6))
    factors: npt.NDArray[np.float64] = np.clip(1 + phase.irregularity * np.asarray(waves), 0.4, 1.8)[:, None]
    return factors


def _grains(side_px: int, matrix: Phase, random: np.random.Generator) -> F32:
    size = max(12.0, 3 * matrix.size_px)
    count = max(2, int((side_px / size) ** 2))
    seeds = random.uniform(0, side_px, (count, 2)).astype(np.float32)
    rows, cols = np.mgrid[:side_px, :side_px].astype(np.float32)
    nearest = np.zeros((side_px, side_px), np.int32)
    best = np.full((side_px, side_px), np.inf, np.float32)
    for index, (row, col) in enumerate(seeds[:64]):
        distance = (rows - row) ** 2 + (cols - col) ** 2
        closer = distance < best
        best[closer], nearest[closer] = distance[closer], index
    levels = random.normal(0, 0.06, count).astype(np.float32)
    found: F32 = levels[nearest].astype(np.float32)
    return found


def _texture(phase: Phase, side_px: int, random: np.random.Generator, micrographs: Sequence[U8]) -> F32:
    if phase.cut >= 0:
        source = micrographs[phase.cut]
        row, col = (int(random.integers(max(1, length - side_px + 1))) for length in source.shape)
        patch = source[row : row + side_px, col : col + side_px].astype(np.float32) / 255
        missing = [(0, side_px - length) for length in patch.shape]
        patch = np.pad(patch, missing, mode="symmetric")
        # Relative to its surroundings: the phase's own grey level stays what it is.
        found: F32 = patch - cv2.GaussianBlur(patch, (0, 0), 12)
        return found
    if not phase.texture_strength:
        return np.zeros((side_px, side_px), np.float32)
    return phase.texture_strength * _field(side_px, phase.texture_px, random)
