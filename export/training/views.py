"""Views of a scene, and the mean of their features at every pixel (HR-Dv2, arXiv 2410.19836 §3.1).

A scene is larger than the crop by a margin; views are cut from it at other places instead of wrapping its edges round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from phaseline.runtime.geometry import sampling_matrix, token_positions


@dataclass(frozen=True)
class View:
    """One view.

    Attributes
    ----------
    row, col
        Where it is cut from the scene, 0…margin px.
    turn
        Which symmetry of the square, 0–7: rotated by `turn` % 4 quarters, then mirrored if `turn` ≥ 4.
    """

    row: int
    col: int
    turn: int


def draw_views(count: int, margin_px: int, random: np.random.Generator) -> list[View]:
    """Random views."""
    return [View(int(random.integers(margin_px + 1)), int(random.integers(margin_px + 1)), int(random.integers(8)))
            for _ in range(count)]


def turn_map(maps: torch.Tensor, turn: int) -> torch.Tensor:
    """Apply a symmetry to maps of shape (…, rows, cols)."""
    rotated = torch.rot90(maps, turn % 4, (-2, -1))
    return rotated.flip(-1) if turn >= 4 else rotated


def turned_back(maps: torch.Tensor, turn: int) -> torch.Tensor:
    """Undo `turn_map`."""
    mirrored = maps.flip(-1) if turn >= 4 else maps
    return torch.rot90(mirrored, -(turn % 4), (-2, -1))


def averaged_pixels(scenes: torch.Tensor, views: Sequence[View], crop_px: int, features: Callable[[torch.Tensor], torch.Tensor],
                    *, patch_px: int, stride_px: int) -> torch.Tensor:
    """Mean of the views' features at the pixels of the scenes' middle.

    Parameters
    ----------
    scenes
        float tensor of shape (n, 1, side, side), range 0–1.
    views
        Which.
    crop_px
        Side of the middle, and of the views.
    features
        From crops (n, 1, crop, crop) to token features (n, k, h, w).
    patch_px, stride_px
        P, s of these features.

    Returns
    -------
    float tensor of shape (n, k, crop, crop); NaN where no view was.
    """
    half = (scenes.shape[2] - crop_px) // 2
    total: torch.Tensor | None = None
    covered = torch.zeros(crop_px, crop_px, device=scenes.device)
    for view in views:
        crops = turn_map(scenes[:, :, view.row : view.row + crop_px, view.col : view.col + crop_px], view.turn)
        tokens = features(crops)
        count = tokens.shape[2]
        matrix = torch.from_numpy(sampling_matrix(token_positions(crop_px, count, patch_px, stride_px, "centred"), count,
                                                  "bilinear")).to(scenes.device)
        pixels = turned_back(matrix @ tokens @ matrix.T, view.turn)
        # Pixel (r, c) of the view is (r + row − half, c + col − half) of the middle.
        (to_row, from_row), (to_col, from_col) = (_overlap(start - half, crop_px) for start in (view.row, view.col))
        if total is None:
            total = torch.zeros_like(pixels)
        total[:, :, to_row, to_col] += pixels[:, :, from_row, from_col]
        covered[to_row, to_col] += 1
    assert total is not None  # a training has at least one view
    return total / torch.where(covered > 0, covered, torch.nan)


def _overlap(shift_px: int, length_px: int) -> tuple[slice, slice]:
    """Where a view moved by `shift_px` covers the middle, in the middle's pixels and in its own."""
    return (slice(max(shift_px, 0), length_px + min(shift_px, 0)), slice(max(-shift_px, 0), length_px + min(-shift_px, 0)))
