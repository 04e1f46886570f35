"""Seam disagreement: labels where two tiles meet, against those computed with that place at a tile's centre.

    the volume's tiles          ├──── tile i ────┤
                                           ├──── tile i+1 ────┤
    a seam sample                   ├──── crop ────┤                 its centre is the seam's centre
    a control sample             ├──── crop ────┤                    its centre lies well inside a tile, where nothing is blended
                                        ▓▓                           compared: the middle of the crop

Along the seam, a crop lies as the volume's tile does. A crop shows the network other surroundings than the volume's tiles did,
so some labels change anywhere: the control says how many, and what seam samples have beyond it is due to the seam.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from phaseline.clients.labels import UNLABELLED
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.tiles import TileAxis

PLACES = 12
"""Seam samples, and as many controls; each costs one tile."""

_NARROW_PX = 16
"""Width compared where tiles do not overlap."""

Kind = Literal["seam", "control"]
Across = Literal["row", "col"]
_KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SeamSample:
    """One place that was computed again.

    Attributes
    ----------
    kind
        ``seam`` or ``control``.
    slice
        Index of the slice in the job's output.
    across
        ``row``: the tiles lie one above the other; ``col``: side by side.
    row, col, rows, cols
        Pixels of the slice that were compared: the first, and how many.
    compared, differing
        How many of them are labelled, and how many of these have another label.
    """

    kind: Kind
    slice: int
    across: Across
    row: int
    col: int
    rows: int
    cols: int
    compared: int
    differing: int


@dataclass(frozen=True)
class SeamDisagreement:
    """What comparing gave.

    Attributes
    ----------
    reason
        Why nothing was compared; empty if something was.
    tile_px, overlap_px
        Of the tiles; None without any.
    samples
        The places.
    """

    reason: str = ""
    tile_px: int | None = None
    overlap_px: int | None = None
    samples: tuple[SeamSample, ...] = field(default=())

    def share(self, kind: Kind) -> float | None:
        """Share of the pixels compared that differ, 0–1; None if none was compared."""
        compared = sum(sample.compared for sample in self.samples if sample.kind == kind)
        return sum(sample.differing for sample in self.samples if sample.kind == kind) / compared if compared else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: shares, numbers and places."""
        return {
            "reason": self.reason,
            "tile_px": self.tile_px,
            "overlap_px": self.overlap_px,
            "seam": self._summary("seam"),
            "control": self._summary("control"),
            "samples": [dataclasses.asdict(sample) for sample in self.samples],
        }

    def _summary(self, kind: Kind) -> dict[str, Any]:
        samples, share = [sample for sample in self.samples if sample.kind == kind], self.share(kind)
        return {
            "share": None if share is None else float(f"{share:.6g}"),
            "places": len(samples),
            "pixels": sum(sample.compared for sample in samples),
        }


@dataclass(frozen=True)
class _Span:
    """A crop along one axis: its first pixel, and the first and last + 1 of what is compared."""

    crop: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Place:
    kind: Kind
    slice: int
    across: Across
    row: _Span
    col: _Span


def seam_disagreement(
    segmenter: Segmenter | RemoteSegmenter,
    read_image: Callable[[int], npt.NDArray[Any]],
    read_labels: Callable[[int], npt.NDArray[np.unsignedinteger[Any]]],
    slices: Sequence[int],
    seed: int = 0,
    places: int = PLACES,
) -> SeamDisagreement:
    """Compute places on seams again, with the seam at a tile's centre, and compare.

    Parameters
    ----------
    segmenter
        The open segmenter of the job.
    read_image
        A slice of the input as the segmenter got it, shape (rows, cols), by its index in the output.
    read_labels
        The labels that `segmenter` gives for all of this slice; of a job along one axis: the output's slice. Unlabelled pixels
        are not compared.
    slices
        Slices among which places are drawn; leave out those that failed. All have one shape.
    seed
        Of the draw.
    places
        How many on seams; as many controls.

    Returns
    -------
    With a reason and no samples, if there is no seam: a recipe of classical features only, a slice that fits into one tile.
    """
    if isinstance(segmenter, RemoteSegmenter):
        return SeamDisagreement("the servers that computed the labels do not say where their tiles lie")
    deep, source = segmenter.recipe.features.deep, segmenter.source
    if deep is None or source is None:
        return SeamDisagreement("the recipe has classical features only, which are computed without tiles: there are no seams")
    tile_px, overlap_px = source.spec.tile_px, deep.overlap_px
    nothing = SeamDisagreement("", tile_px, overlap_px)
    if not slices:
        return dataclasses.replace(nothing, reason="no slice was segmented")
    rows, cols = (TileAxis(length, tile_px, overlap_px) for length in read_image(slices[0]).shape)
    if len(rows.starts) == 1 and len(cols.starts) == 1:
        return dataclasses.replace(nothing, reason=f"a slice fits into one tile of {tile_px} px: there are no seams")
    classical = segmenter.recipe.features.classical
    halo_px = 0 if classical is None else classical.halo_px
    rng = np.random.default_rng(seed)
    drawn = [place for kind in _KINDS for place in _draw(kind, rows, cols, halo_px, slices, rng, places)]
    samples = []
    for index in sorted({place.slice for place in drawn}):
        image, labels = read_image(index), read_labels(index)
        for place in (place for place in drawn if place.slice == index):
            row, col = place.row, place.col
            crop = image[row.crop : row.crop + tile_px, col.crop : col.crop + tile_px]
            again = segmenter.segment(np.ascontiguousarray(crop)).labels
            again = again[row.start - row.crop : row.stop - row.crop, col.start - col.crop : col.stop - col.crop]
            there = labels[row.start : row.stop, col.start : col.stop]
            labelled = there != UNLABELLED
            samples.append(SeamSample(
                kind=place.kind, slice=index, across=place.across,
                row=row.start, col=col.start, rows=there.shape[0], cols=there.shape[1],
                compared=int(np.count_nonzero(labelled)), differing=int(np.count_nonzero((again != there) & labelled)),
            ))
    return dataclasses.replace(nothing, samples=tuple(samples))


def _draw(
    kind: Kind, rows: TileAxis, cols: TileAxis, halo_px: int, slices: Sequence[int], rng: np.random.Generator, places: int
) -> list[_Place]:
    """Places on all seams of all slices, or controls beside them, drawn evenly and without repetition."""
    find = _seams if kind == "seam" else _controls
    found: list[_Place] = []
    for index in slices:
        found += [_Place(kind, index, "row", row, col) for row in find(rows, rng) for col in _along(cols, halo_px)]
        found += [_Place(kind, index, "col", row, col) for col in find(cols, rng) for row in _along(rows, halo_px)]
    return [found[int(i)] for i in sorted(rng.choice(len(found), min(places, len(found)), replace=False))] if found else []


def _width_px(axis: TileAxis) -> int:
    """Pixels compared across a seam: the overlap, but no more than the middle of a crop."""
    return min(max(axis.overlap_px, _NARROW_PX), max(axis.tile_px // 4, 1))


def _seams(axis: TileAxis, rng: np.random.Generator) -> list[_Span]:
    spans = []
    for left, right in zip(axis.starts[:-1], axis.starts[1:], strict=True):
        centre = (left + axis.tile_px + right) // 2
        start = centre - _width_px(axis) // 2
        spans.append(_Span(centre - axis.tile_px // 2, start, start + _width_px(axis)))
    return spans


def _controls(axis: TileAxis, rng: np.random.Generator) -> list[_Span]:
    """A place in each tile that one tile alone decides, up to a quarter of a tile from its centre but not there.

    At the centre itself the crop would be the tile, and nothing could differ.
    """
    if len(axis.starts) == 1:
        return []
    spans, width = [], _width_px(axis)
    weights = axis.weights()
    for first, weight in zip(axis.starts, weights, strict=True):
        shifts = [
            shift for shift in range(-(axis.tile_px // 4), axis.tile_px // 4 + 1)
            if shift and 0 <= first + shift <= axis.length_px - axis.tile_px
            and (weight[_middle(axis.tile_px, width, shift)] == 1).all()
        ]
        if shifts:
            crop = first + int(rng.choice(shifts))
            start = crop + axis.tile_px // 2 - width // 2
            spans.append(_Span(crop, start, start + width))
    return spans


def _along(axis: TileAxis, halo_px: int) -> list[_Span]:
    """The middles of the tiles along a seam, where no other seam is near; of all tiles, if it is near everywhere."""
    size = axis.size_px
    length = max(min(size // 2, size - 2 * axis.overlap_px, size - 2 * halo_px), min(_width_px(axis), size))
    middle = _middle(size, length)
    spans = [_Span(first, first + middle.start, first + middle.stop) for first in axis.starts]
    calm = [span for span, weight in zip(spans, axis.weights(), strict=True) if (weight[middle] == 1).all()]
    return calm or spans


def _middle(size: int, length: int, shift: int = 0) -> slice:
    start = size // 2 - length // 2 + shift
    return slice(start, start + length)
