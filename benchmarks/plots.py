"""The tables' pictures: lines over a number, or bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from phaseline.clients.labels import default_colours

# The yellow of the labels' colours cannot be read on white.
COLOURS = tuple(colour for colour in default_colours(7) if colour != "#f0e442")


@dataclass(frozen=True)
class Line:
    """One line: its points, how far they spread, and whether it is a paper's and not measured here."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    published: bool = False


def draw_lines(lines: Mapping[str, Line], x_label: str, y_label: str, axes: Axes, *, log: bool = False) -> None:
    """Draw lines by name. With `log`, both axes are logarithmic; ticks are the points' own x."""
    for (name, line), colour in zip(lines.items(), COLOURS, strict=False):
        style = {"linestyle": "--", "marker": "x", "color": "0.4"} if line.published else {"marker": "o", "color": colour}
        axes.plot(line.x, line.y, label=name, markersize=4, linewidth=1.5, **style)  # type: ignore[arg-type]
        if line.spread is not None:
            y, spread = np.asarray(line.y), np.asarray(line.spread)
            axes.fill_between(line.x, y - spread, y + spread, color=colour, alpha=0.15, linewidth=0)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_major_locator(FixedLocator(sorted({x for line in lines.values() if not line.published for x in line.x})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    axes.legend(fontsize=8, frameon=False)


def draw_bars(groups: Mapping[str, Mapping[str, float]], y_label: str, axes: Axes) -> None:
    """Groups of bars: group → bar → height. All groups have the first one's bars."""
    bars = list(next(iter(groups.values())))
    width = 0.8 / len(bars)
    for i, bar in enumerate(bars):
        heights = [group[bar] for group in groups.values()]
        at = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * width
        axes.bar_label(axes.bar(at, heights, width * 0.92, label=bar, color=COLOURS[i % len(COLOURS)]), fmt="%.2f", fontsize=6)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel(y_label)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False, ncols=len(bars), loc="upper center", bbox_to_anchor=(0.5, 1.12))


def new_figure(panels: int = 1, width_in: float = 6.0) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side, `width_in` inches each."""
    figure = Figure(figsize=(width_in * panels, 3.6), layout="constrained")
    return figure, [figure.add_subplot(1, panels, i + 1) for i in range(panels)]


def save(figure: Figure, table: Path) -> str:
    """Write a figure beside the Markdown file `table`, under its stem; returns the Markdown that shows it."""
    table.parent.mkdir(parents=True, exist_ok=True)
    picture = table.with_suffix(".png")
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    return f"![{table.stem}]({picture.name})"
