"""Where tokens lie on pixels, and how token features become pixel features.

A tile's side of T pixels, patches of P, stride s; pixel r covers [r, r+1), its centre is r + ½:

    pixels   0 │ 1 │ 2 │ 3 │ 4 │ 5 │ …                                T
    token 0  [──────── P ────────]          centre P/2
    token 1      s→ [──────── P ────────]   centre s + P/2
    token h-1                                     centre T - P/2 (T = P + (h-1)·s)

`centred` respects those centres. `paper` stretches the h tokens over the whole side, as the published code of
arXiv 2410.19836 does: with s < P that is up to (P - s)/2 pixels off at the border.
"""

from __future__ import annotations

from typing import Literal, assert_never, get_args

import numpy as np
import numpy.typing as npt

Alignment = Literal["paper", "centred"]
Interpolation = Literal["nearest", "bilinear"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
INTERPOLATIONS: tuple[Interpolation, ...] = get_args(Interpolation)


def token_positions(
    length_px: int, tokens: int, patch_px: int, stride_px: int, alignment: Alignment
) -> npt.NDArray[np.float64]:
    """Positions of pixel centres on the axis of tokens, where token i is at i.

    Parameters
    ----------
    length_px, tokens
        Pixels and tokens along the axis.
    patch_px, stride_px
        Side of a patch, and distance between neighbouring patches.
    alignment
        ``centred`` or ``paper``, see above.

    Returns
    -------
    float64 array of shape (length_px,); pixels outside the first and last token's centres lie outside 0…tokens - 1.
    """
    centres = np.arange(length_px) + 0.5
    match alignment:
        case "paper":
            return centres * tokens / length_px - 0.5
        case "centred":
            return (centres - patch_px / 2) / stride_px
    assert_never(alignment)


def sampling_matrix(
    positions: npt.NDArray[np.float64], tokens: int, interpolation: Interpolation
) -> npt.NDArray[np.float32]:
    """Linear operator from tokens to pixels along one axis.

    Parameters
    ----------
    positions
        float64 array of shape (length_px,), from `token_positions`; positions outside the grid take the nearest token.
    tokens
        Tokens along the axis.
    interpolation
        ``nearest`` (the papers') or ``bilinear``; halfway, nearest takes the later token.

    Returns
    -------
    float32 array of shape (length_px, tokens); rows sum to 1.
    """
    matrix = np.zeros((len(positions), tokens), np.float32)
    pixels = np.arange(len(positions))
    match interpolation:
        case "nearest":
            matrix[pixels, np.clip(np.floor(positions + 0.5).astype(int), 0, tokens - 1)] = 1
        case "bilinear":
            inside = np.clip(positions, 0, tokens - 1)
            lower = np.minimum(inside.astype(int), max(tokens - 2, 0))
            upper = np.minimum(lower + 1, tokens - 1)
            fraction = (inside - lower).astype(np.float32)
            np.add.at(matrix, (pixels, lower), 1 - fraction)
            np.add.at(matrix, (pixels, upper), fraction)
        case _:
            assert_never(interpolation)
    return matrix
