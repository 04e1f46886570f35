"""Pictures of a job's report, as data URIs: plots over the slices (SVG), and slices as a person sees them (JPEG).

    numbers by slice ──▶ plot_phases, plot_series, plot_histogram ──▶ data:image/svg+xml;base64,…
    image, labels, confidence of a slice ──▶ slice_panels ──▶ grey │ labels over it │ confidence ──▶ data:image/jpeg;base64,…

Matplotlib's figures are made as objects, without pyplot: no window, no global state, any thread.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from phaseline.clients.labels import ClassTable
from phaseline.clients.pictures import overlay
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

MAX_PX = 512
"""Longest side of a slice's picture."""

MAX_POINTS = 600
"""Points of a line; of more slices, each point stands for a run of them, with its mean, least and greatest value."""

FEW = 40
"""Up to so many slices, each is a point on its line."""

INK, MUTED, ACCENT, WARNING, ABSENT = "#222222", "#666666", "#0072b2", "#d55e00", "#d9d9d9"

_STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.labelsize": 9, "axes.titlesize": 9,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.8, "svg.fonttype": "path", "svg.hashsalt": "phaseline", "text.parse_math": False,
}
_WIDTH_IN = 7.4


@dataclass(frozen=True)
class Series:
    """Numbers by slice.

    Attributes
    ----------
    positions
        float64 array: the slices' numbers along the input's axis, ascending.
    values
        float64 array of that length; NaN where there is none.
    absent
        bool array of that length: slices without any label, shown in grey.
    """

    positions: Floats
    values: Floats
    absent: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Phase:
    """A class in a plot: its name, colour (``#rrggbb``), and fraction by slice, 0–1."""

    name: str
    colour: str
    fractions: Series


def check_matplotlib() -> None:
    """Refuse to begin a job whose report could not be drawn.

    Raises
    ------
    MissingExtraError
        matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "volumes", "the report of a job") from error


def plot_phases(phases: Sequence[Phase], axis: str) -> str:
    """Phase fractions by slice: a strip for each class with a range of its own, so that small phases show their drift too.

    A class's colour is that of its strip's axis: as a line or as an area, some colours could not be seen well.

    Parameters
    ----------
    phases
        The classes.
    axis
        What the slices are numbered along: ``plane``, ``row`` or ``col``.

    Returns
    -------
    Data URI of an SVG picture.
    """

    def draw(figure: Figure) -> None:
        strips = figure.subplots(len(phases), 1, sharex=True, squeeze=False)[:, 0]
        for phase, axes in zip(phases, strips, strict=True):
            mean, low, high = _condense(phase.fractions)
            least, most = _range(low, high)
            margin = max(0.08 * (most - least), 0.005)
            axes.set_ylim(max(100 * (least - margin), 0), min(100 * (most + margin), 100))
            axes.spines["left"].set(color=phase.colour, linewidth=4, capstyle="butt", position=("outward", 4))
            _line(axes, mean, low, high, INK, 100)
            _finish(axes, phase.fractions)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(_printable(phase.name), loc="left", pad=3)
        strips[-1].set_xlabel(axis)
        figure.supylabel("labelled voxels / %", fontsize=9)

    from matplotlib.ticker import MaxNLocator

    return _svg(0.45 + 0.95 * len(phases), draw)


def plot_series(series: Series, axis: str, label: str, *, marked: Sequence[float] = (), scale: float = 1.0) -> str:
    """A number by slice, over an axis that begins at 0.

    Parameters
    ----------
    series
        Numbers, at least 0.
    axis, label
        Of the two axes; `label` with its unit.
    marked
        Positions to mark with a ring.
    scale
        Factor of the values, 100 for percent.

    Returns
    -------
    Data URI of an SVG picture.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        mean, low, high = _condense(series)
        axes.set_ylim(0, max(scale * _range(low, high)[1] * 1.1, 1e-3 * scale))
        _line(axes, mean, low, high, ACCENT, scale)
        where = np.isin(series.positions, list(marked)) & np.isfinite(series.values)
        axes.plot(series.positions[where], scale * series.values[where], "o", markersize=6, markerfacecolor="none",
                  markeredgecolor=WARNING, markeredgewidth=1.3)
        _finish(axes, series)
        axes.set(xlabel=axis, ylabel=label)

    return _svg(2.1, draw)


def plot_histogram(counts: Sequence[int]) -> str:
    """Confidence histogram: share of the labelled voxels by confidence.

    Parameters
    ----------
    counts
        Voxels in bins of equal width from 0 to 1.

    Returns
    -------
    Data URI of an SVG picture.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shares = 100 * np.asarray(counts, np.float64) / max(sum(counts), 1)
        axes.stairs(shares, np.linspace(0, 1, len(counts) + 1), fill=True, color=ACCENT, alpha=0.85)
        axes.set(xlim=(0, 1), ylim=(0, max(float(shares.max()) * 1.1, 0.1)), ylabel="labelled voxels / %",
                 xlabel="confidence (0: two classes equally likely, 1: certain)")

    return _svg(2.1, draw)


def slice_panels(
    image: npt.NDArray[Any],
    labels: npt.NDArray[np.unsignedinteger[Any]],
    confidence: U8 | None,
    classes: ClassTable,
    *,
    window: tuple[float, float] | None = None,
    aspect: float = 1.0,
    frames: Sequence[tuple[int, int, int, int]] = (),
    max_px: int = MAX_PX,
) -> list[str]:
    """A slice for people: in grey, with its labels in their colours, and its confidence.

    Parameters
    ----------
    image
        Real array of shape (rows, cols); what is not finite is drawn black.
    labels
        Unsigned array of that shape, 0 = unlabelled.
    confidence
        uint8 array of that shape, or None.
    classes
        Values and colours.
    window
        Grey levels drawn black and white; None: percentiles 0.5 and 99.5.
    aspect
        Height of a pixel over its width.
    frames
        Regions to outline: first row, first column, rows, columns.
    max_px
        Longest side of a picture.

    Returns
    -------
    Data URIs of two JPEG pictures of one size, or three with confidence.
    """
    rows, cols = image.shape
    height, width = rows * aspect, float(cols)
    factor = max_px / max(height, width) if max(height, width) > max_px else 1.0
    size = (max(round(height * factor), 1), max(round(width * factor), 1))
    grey = _resize(_grey(image, window), size)
    small = _pick(labels, size)
    panels = [np.repeat(grey[..., None], 3, axis=2), overlay(grey, small, classes)]
    if confidence is not None:
        panels.append(confidence_colours()[_resize(confidence, size)])
    for top, left, tall, wide in frames:
        scale_y, scale_x = size[0] / rows, size[1] / cols
        box = (round(top * scale_y), round(left * scale_x), round((top + tall) * scale_y), round((left + wide) * scale_x))
        for panel in panels:
            _outline(panel, *box)
    return [_jpeg(panel) for panel in panels]


def confidence_colours() -> U8:
    """The colour of each confidence 0–255, from dark blue (unsure) to yellow: uint8 array of shape (256, 3)."""
    import matplotlib

    colours: U8 = np.rint(255 * matplotlib.colormaps["cividis"](np.arange(256))[:, :3]).astype(np.uint8)
    return colours


def _svg(height_in: float, draw: Callable[[Figure], None]) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", file.getvalue())


def _jpeg(picture: U8) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="JPEG", quality=88, subsampling=0)
    return _uri("image/jpeg", file.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _condense(series: Series) -> tuple[Series, Series, Series]:
    """Mean, least and greatest value of each run of slices; of few slices, the values themselves."""
    n = len(series.values)
    if n <= MAX_POINTS:
        return series, series, series
    first = np.arange(MAX_POINTS) * n // MAX_POINTS
    finite = np.isfinite(series.values)
    counts = np.add.reduceat(finite.astype(np.int64), first)
    positions = np.add.reduceat(series.positions, first) / np.diff([*first, n])
    totals = np.add.reduceat(np.where(finite, series.values, 0), first)
    parts = (
        totals / np.maximum(counts, 1),
        np.minimum.reduceat(np.where(finite, series.values, np.inf), first),
        np.maximum.reduceat(np.where(finite, series.values, -np.inf), first),
    )
    mean, low, high = (Series(positions, np.where(counts > 0, part, np.nan), counts == 0) for part in parts)
    return mean, low, high


def _range(low: Series, high: Series) -> tuple[float, float]:
    finite = np.isfinite(low.values)
    return (float(low.values[finite].min()), float(high.values[finite].max())) if finite.any() else (0.0, 0.0)


def _line(axes: Axes, mean: Series, low: Series, high: Series, colour: str, scale: float) -> None:
    if low is not high:
        axes.fill_between(mean.positions, scale * low.values, scale * high.values, color=colour, alpha=0.3, linewidth=0)
    axes.plot(mean.positions, scale * mean.values, color=colour, linewidth=1.1)
    finite = np.concatenate([[False], np.isfinite(mean.values), [False]])
    # A line needs two points: values between gaps would not be seen.
    alone = finite[1:-1] & ((~finite[:-2] & ~finite[2:]) | (len(mean.values) <= FEW))
    axes.plot(mean.positions[alone], scale * mean.values[alone], ".", color=colour, markersize=5)


def _finish(axes: Axes, series: Series) -> None:
    """Limits along the slices, and slices without labels in grey."""
    from matplotlib.ticker import MaxNLocator

    step = float(series.positions[1] - series.positions[0]) if len(series.positions) > 1 else 1.0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], series.absent.astype(np.int8), [0]])))
    runs = [(float(series.positions[a]) - step / 2, (b - a) * step) for a, b in edges.reshape(-1, 2)]
    if runs:
        # The outline keeps a single slice of thousands visible.
        axes.broken_barh(runs, (0, 1), transform=axes.get_xaxis_transform(), facecolor=ABSENT, edgecolor=ABSENT, linewidth=1,
                         zorder=0)
    axes.set_xlim(float(series.positions[0]) - step / 2, float(series.positions[-1]) + step / 2)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))


def _printable(text: str, length: int = 60) -> str:
    """Text as the plots' font can show it."""
    from matplotlib.font_manager import findfont, get_font

    known = get_font(findfont("DejaVu Sans")).get_charmap()
    shown = "".join(character if ord(character) in known else "□" for character in text)
    return shown if len(shown) <= length else f"{shown[: length - 1]}…"


def _grey(image: npt.NDArray[Any], window: tuple[float, float] | None) -> U8:
    values = image.astype(np.float64)
    finite = np.isfinite(values)
    if window is None:
        sample = values[finite][:: max(values.size // 100_000, 1)]
        window = (float(np.percentile(sample, 0.5)), float(np.percentile(sample, 99.5))) if sample.size else (0.0, 1.0)
    low, high = window[0], max(window[1], np.nextafter(window[0], np.inf))
    levels = np.where(finite, np.clip(values, low, high) - low, 0) * (255 / (high - low))
    rounded: U8 = np.rint(levels).astype(np.uint8)
    return rounded


def _resize(picture: U8, size: tuple[int, int]) -> U8:
    if picture.shape == size:
        return picture
    return np.asarray(cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)


def _pick(labels: npt.NDArray[np.unsignedinteger[Any]], size: tuple[int, int]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """Nearest labels: a mean of label values would be another class."""
    rows, cols = ((2 * np.arange(n) + 1) * length // (2 * n) for n, length in zip(size, labels.shape, strict=True))
    picked: npt.NDArray[np.unsignedinteger[Any]] = labels[np.ix_(rows, cols)]
    return picked


def _outline(picture: U8, top: int, left: int, bottom: int, right: int) -> None:
    """A white frame inside a black one, seen on any ground."""
    for grow, value in ((1, 0), (0, 255)):
        rows = slice(max(top - grow, 0), bottom + grow)
        cols = slice(max(left - grow, 0), right + grow)
        for edge in (top - grow, bottom + grow - 1):
            if 0 <= edge < picture.shape[0]:
                picture[edge, cols] = value
        for edge in (left - grow, right + grow - 1):
            if 0 <= edge < picture.shape[1]:
                picture[rows, edge] = value
