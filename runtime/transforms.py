"""Transform sets: the shifted and flipped views of a tile whose features are averaged (arXiv 2410.19836 §3.1, S9).

A view is made by shifting and then flipping; it is undone in the reverse order. A set holds each view once, the
identity first.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal, Self, assert_never, get_args

import numpy as np
import numpy.typing as npt

from phaseline.runtime.contract import U8
from phaseline.runtime.errors import UsageError

Boundary = Literal["wrap", "reflect"]
BOUNDARIES: tuple[Boundary, ...] = get_args(Boundary)

VON_NEUMANN = ((-1, 0), (0, -1), (0, 1), (1, 0))
MOORE = tuple(step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0))
NEIGHBOURHOODS = {"moore": MOORE, "von-neumann": VON_NEUMANN}


@dataclass(frozen=True, order=True)
class Transform:
    """One view of a tile.

    Attributes
    ----------
    shift_rows, shift_cols
        Pixels that the content moves down and right.
    flip_rows, flip_cols
        Whether the shifted tile is then turned upside down, and left to right.
    """

    shift_rows: int = 0
    shift_cols: int = 0
    flip_rows: bool = False
    flip_cols: bool = False

    def apply(self, tile: U8, boundary: Boundary) -> U8:
        """Make the view.

        Parameters
        ----------
        tile
            uint8 array of shape (channels, rows, cols).
        boundary
            What fills the pixels that the shift vacates: ``wrap``, the opposite edge (the paper's); ``reflect``, the tile
            mirrored at its edge.

        Returns
        -------
        C-contiguous uint8 array of the tile's shape.
        """
        for axis, (shift, flip) in enumerate(
            ((self.shift_rows, self.flip_rows), (self.shift_cols, self.flip_cols)), start=1
        ):
            index = np.arange(tile.shape[axis]) - shift
            tile = tile.take(_fold(index, tile.shape[axis], boundary)[:: -1 if flip else 1], axis=axis)
        return tile

    def pixel_index(self, length_px: int, axis: Literal["rows", "cols"], boundary: Boundary) -> npt.NDArray[np.intp]:
        """Where each of the tile's pixels lies in the view, along one axis.

        Returns
        -------
        int array of shape (length_px,); -1 where the shift pushed the pixel out of the view (never with ``wrap``).
        """
        shift, flip = (self.shift_rows, self.flip_rows) if axis == "rows" else (self.shift_cols, self.flip_cols)
        index = np.arange(length_px) + shift
        match boundary:
            case "wrap":
                index %= length_px
                outside = np.zeros(length_px, bool)
            case "reflect":
                outside = (index < 0) | (index >= length_px)
            case _:
                assert_never(boundary)
        if flip:
            index = length_px - 1 - index
        index[outside] = -1
        return index


def _fold(index: npt.NDArray[np.intp], length: int, boundary: Boundary) -> npt.NDArray[np.intp]:
    """Bring indices outside an axis back into it."""
    if boundary == "wrap":
        return index % length
    period = max(2 * (length - 1), 1)
    folded = np.abs(index) % period
    return np.minimum(folded, period - folded) if length > 1 else np.zeros_like(index)


@dataclass(frozen=True)
class TransformSet:
    """A set of views.

    Attributes
    ----------
    name
        The words it is asked for by, which go into the recipe: see `parse`.
    transforms
        The views, each once, the identity first.
    """

    name: str
    transforms: tuple[Transform, ...]

    def __post_init__(self) -> None:
        if not self.transforms or self.transforms[0] != Transform() or len(set(self.transforms)) < len(self.transforms):
            raise UsageError(f"transform set {self.name!r} must hold each view once, and the identity first")

    def __len__(self) -> int:
        return len(self.transforms)

    @classmethod
    def parse(cls, name: str, stride_px: int) -> Self:
        """Make a set from its name.

        Parameters
        ----------
        name
            ``none``: the identity alone. ``flips``: the tile and its three mirror images. ``moore`` and ``von-neumann``:
            shifts in the 8 and 4 directions, by each of 1…s/2 pixels, or by each of 1…d with ``moore:d``. A product,
            ``moore*flips`` or ``von-neumann:1*flips``: every shift with every flip.
        stride_px
            s, the backbone's stride.

        Raises
        ------
        UsageError
            A name that is none of these.
        """
        match = re.fullmatch(r"(none|flips)|(moore|von-neumann)(?::([1-9]\d{0,2}))?(\*flips)?", name)
        if match is None:
            raise UsageError(f"transform set {name!r} is unknown; expected none, flips, moore, von-neumann, moore:PIXELS, "
                             "von-neumann:PIXELS, or a product such as moore*flips")
        simple, neighbourhood, distance, product = match.groups()
        shifts = [(0, 0)]
        if neighbourhood:
            reach = int(distance) if distance else max(stride_px // 2, 1)
            shifts += [(d * r, d * c) for d in range(1, reach + 1) for r, c in NEIGHBOURHOODS[neighbourhood]]
        with_flips = bool(product) or simple == "flips"
        flips = list(itertools.product((False, True), repeat=2)) if with_flips else [(False, False)]
        return cls(name, tuple(Transform(*shift, *flip) for flip in flips for shift in shifts))

    def check_fits(self, tile_px: int) -> None:
        """Refuse shifts that are not smaller than the tile.

        Raises
        ------
        UsageError
            A shift of `tile_px` pixels or more.
        """
        reach = max(max(abs(t.shift_rows), abs(t.shift_cols)) for t in self.transforms)
        if reach >= tile_px:
            raise UsageError(f"transform set {self.name!r} shifts by up to {reach} px, expected less than the tile's "
                             f"{tile_px} px; use smaller shifts")
