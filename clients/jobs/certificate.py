"""The certificate of a job: report.json for programs, report.html for people, from what the job counted and wrote.

    facts, blocks' statistics, seams ──▶ report ──────────┬──▶ report.json
                                            │             │
    image, labels, confidence by slice ──▶ illustrate ──▶ page ──▶ report.html

Slices are numbered twice: by their index in the output, and by their position in the input, which people are told.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.jobs.blocks import JobAxes
from phaseline.clients.jobs.page import NAMES, STRIPS, Illustrations, SlicePicture, page, percent, unit_symbol
from phaseline.clients.jobs.pictures import (
    Phase,
    Series,
    confidence_colours,
    plot_histogram,
    plot_phases,
    plot_series,
    slice_panels,
)
from phaseline.clients.jobs.seams import SeamDisagreement
from phaseline.clients.jobs.statistics import (
    BlockStatistics,
    Labels,
    evenly_spaced,
    fill_boundaries,
    lowest,
    merge_blocks,
    outliers,
)
from phaseline.clients.labels import UNLABELLED, ClassTable
from phaseline.clients.volumes.volume import AXES, Axis, VolumeInfo
from phaseline.clients.volumes.writing import part_path
from phaseline.runtime.contract import U8
from phaseline.runtime.errors import OutputError

REPORT_FORMAT = 1
REPORT_JSON, REPORT_HTML = "report.json", "report.html"

LOWEST, SUGGESTIONS, PICTURED, SPREAD = 10, 8, 3, 4
"""Slices of lowest confidence listed; regions suggested; slices of lowest confidence, and others, shown."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class FailedSlices:
    """Slices that could not be segmented, for one reason.

    Attributes
    ----------
    axis
        Along which they are counted.
    start, stop
        Indices in the output, the last one excluded.
    error
        Why.
    attempts
        How often it was tried.
    """

    axis: Axis
    start: int
    stop: int
    error: str
    attempts: int = 1


@dataclass(frozen=True)
class JobFacts:
    """What the job knows and the blocks' statistics do not.

    Attributes
    ----------
    input
        The whole input, not the region of it.
    start, step, shape
        The region: its first voxel and its step in the input; voxels of the output, along plane, row and column.
    axes
        Which slices were segmented; those of ``3`` are reported by plane.
    classes
        Of the recipe.
    window
        Grey levels of the recipe's intensity window, for the pictures; None: chosen for each.
    recipe, recipe_hash, bundle_hash, bundle_trained
        The recipe's folder and hash; its bundle's hash, None without one; False for random weights.
    engine, workers
        What computed, and on how many workers, for people.
    outputs
        Files and folders written.
    command
        As typed.
    started, finished
        Dates and times, ISO 8601, of the first start and of the end.
    seconds
        ``wall``, over all runs of the job, is needed; ``read``, ``compute`` and ``write``, summed over the blocks.
    versions
        Of phaseline and the packages that decide numbers.
    failed
        What could not be segmented: its voxels have label 0.
    peak_memory_bytes, memory_budget_bytes
        Of the process tree; None: not measured, not given.
    resumed
        How often the job was gone on with.
    """

    input: VolumeInfo
    start: Shape
    step: Shape
    shape: Shape
    axes: JobAxes
    classes: ClassTable
    window: tuple[float, float] | None
    recipe: str
    recipe_hash: str
    bundle_hash: str | None
    bundle_trained: bool
    engine: str
    workers: str
    outputs: tuple[str, ...]
    command: str
    started: str
    finished: str
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    failed: tuple[FailedSlices, ...] = ()
    peak_memory_bytes: int | None = None
    memory_budget_bytes: int | None = None
    resumed: int = 0

    @property
    def axis(self) -> Axis:
        """Along which slices are reported."""
        return "plane" if self.axes == "3" else self.axes

    @property
    def inner(self) -> tuple[int, int]:
        """Numbers of the two axes of a slice."""
        row, col = (i for i in range(3) if i != AXES.index(self.axis))
        return row, col

    @property
    def voxel(self) -> tuple[float, ...] | None:
        """Size of an output voxel in the input's unit: the input's size times the step."""
        return None if self.input.voxel is None else tuple(a * b for a, b in zip(self.input.voxel.size, self.step, strict=True))

    def position(self, index: int, axis: Axis) -> int:
        """Where the input has what the output has at this index."""
        number = AXES.index(axis)
        return self.start[number] + index * self.step[number]

    def title(self, index: int) -> str:
        """A slice for people: ``plane 17``."""
        return f"{self.axis} {self.position(index, self.axis)}"


@dataclass(frozen=True)
class Slices:
    """Where pictures come from: slices along the job's axis by their index in the output, arrays of shape (rows, cols).

    Attributes
    ----------
    image
        Of the input, any real dtype.
    labels
        Unsigned integers.
    confidence
        uint8; None if it was not kept.
    """

    image: Callable[[int], npt.NDArray[Any]]
    labels: Callable[[int], Labels]
    confidence: Callable[[int], U8] | None = None


def make_certificate(
    folder: Path, facts: JobFacts, blocks: Iterable[BlockStatistics], seams: SeamDisagreement, slices: Slices
) -> dict[str, Any]:
    """Write report.json and report.html, each whole or not at all.

    Parameters
    ----------
    folder
        Where they go.
    facts
        Of the job.
    blocks
        Statistics of the blocks that were done, in any order.
    seams
        From `seam_disagreement`.
    slices
        The input and the output.

    Returns
    -------
    The content of report.json.

    Raises
    ------
    OutputError
        A report cannot be written.
    MissingExtraError
        matplotlib is not installed.
    PhaselineError
        A slice cannot be read.
    """
    statistics = fill_boundaries(merge_blocks(blocks), slices.labels)
    content = report(facts, statistics, seams, slices.labels)
    drawn = page(content, illustrate(facts, content, statistics, slices))
    _write(folder / REPORT_JSON, format_json(content))
    _write(folder / REPORT_HTML, drawn)
    return content


def report(
    facts: JobFacts, statistics: BlockStatistics, seams: SeamDisagreement, read_labels: Callable[[int], Labels]
) -> dict[str, Any]:
    """The content of report.json: numbers, strings, lists and dictionaries in a fixed order.

    Parameters
    ----------
    facts
        Of the job.
    statistics
        Of all blocks, from `fill_boundaries`.
    seams
        From `seam_disagreement`.
    read_labels
        A slice of the output, for what is labelled in the suggested regions.
    """
    by_slice = _by_slice(facts, statistics)
    wall = facts.seconds["wall"]
    voxels = math.prod(facts.shape)
    size, stop = facts.voxel, tuple(a + (n - 1) * s + 1 for a, n, s in zip(facts.start, facts.shape, facts.step, strict=True))
    unit = None if facts.input.voxel is None else facts.input.voxel.unit
    content: dict[str, Any] = {
        "format": REPORT_FORMAT,
        "verdict": [],
        "complete": not facts.failed and all(by_slice["labelled"]),
        "command": facts.command,
        "started": facts.started,
        "finished": facts.finished,
        "input": {
            "name": facts.input.name, "format": facts.input.format, "shape": list(facts.input.shape),
            "dtype": str(facts.input.dtype), "fingerprint": facts.input.fingerprint,
            "voxel": None if facts.input.voxel is None else {"size": list(facts.input.voxel.size), "unit": unit},
        },
        "region": {"start": list(facts.start), "stop": list(stop), "step": list(facts.step)},
        "axes": facts.axes,
        "output": {
            "files": list(facts.outputs), "shape": list(facts.shape),
            "voxel": None if size is None else {"size": [_round(s) for s in size], "unit": unit},
        },
        "recipe": {"path": facts.recipe, "hash": facts.recipe_hash, "bundle_hash": facts.bundle_hash,
                   "bundle_trained": facts.bundle_trained},
        "engine": facts.engine,
        "failed": [
            {"axis": one.axis, "first": facts.position(one.start, one.axis), "last": facts.position(one.stop - 1, one.axis),
             "error": one.error, "attempts": one.attempts}
            for one in sorted(facts.failed, key=lambda one: (AXES.index(one.axis), one.start))
        ],
        "phases": _phases(facts, statistics, by_slice),
        "unlabelled_voxels": voxels - sum(one.labelled for one in statistics.slices),
        "confidence": _confidence(facts, statistics),
        "flicker": _flicker(facts, statistics),
        "seams": seams.to_dict(),
        "suggestions": _suggestions(facts, statistics, read_labels),
        "performance": {
            "voxels": voxels, "voxels_per_s": _round(voxels / wall) if wall > 0 else None,
            "seconds": {name: _round(value) for name, value in facts.seconds.items()},
            "peak_memory_bytes": facts.peak_memory_bytes, "memory_budget_bytes": facts.memory_budget_bytes,
            "workers": facts.workers, "resumed": facts.resumed,
        },
        "versions": dict(facts.versions),
        "slices": by_slice,
    }
    content["verdict"] = verdict(content)
    return content


def verdict(content: Mapping[str, Any]) -> list[str]:
    """What to look at, in sentences: failures first, and at last what these numbers cannot say."""
    slices, failed, seams = content["slices"], content["failed"], content["seams"]
    axis, many = slices["axis"], NAMES[slices["axis"]]
    step = content["region"]["step"][AXES.index(axis)]
    n = len(slices["positions"])
    missing = [position for position, labelled in zip(slices["positions"], slices["labelled"], strict=True) if not labelled]
    said: list[str] = []
    if missing:
        said.append(f"{len(missing)} of {n} {many} have no labels: {_runs(missing, step)}. Look at these first.")
    if failed:
        first = failed[0]
        where = f"{first['axis']} {first['first']}"
        said.append(f"{len(failed)} {'failures were' if len(failed) > 1 else 'failure was'} recorded, "
                    f"{'the first' if len(failed) > 1 else 'it'} at {where}: {first['error'].rstrip('.')}.")
    if content["complete"]:
        said.append(f"All {n} {many} were segmented." if n > 1 else f"The {axis} was segmented.")
    if (confidence := content["confidence"]) is not None and confidence["lowest"]:
        least = confidence["lowest"][0]
        odd = (f"it is unusually low in {many} {_runs(sorted(confidence['unusual']), step)}" if confidence["unusual"]
               else f"no {axis} stands out")
        said.append(f"Mean confidence is {confidence['mean']:.2f}" + (
            "." if n == 1 else f", the lowest of a {axis} {least['mean']:.2f} ({axis} {least['position']}); {odd}."))
    if (flicker := content["flicker"]) is not None:
        odd = (f"unusually many in {many} {_runs(sorted(flicker['unusual']), step)}: look there" if flicker["unusual"]
               else "nowhere unusually many")
        said.append(f"From {axis} to {axis} {percent(flicker['median'])} of the labels change (median), at most "
                    f"{percent(flicker['highest'])} ({axis} {flicker['highest_at']}); {odd}.")
    there, elsewhere = seams["seam"]["share"], seams["control"]["share"]
    if there is not None:
        seen = elsewhere is not None and there > 2 * elsewhere and there - elsewhere > 0.005
        compared = "" if elsewhere is None else f", inside tiles {percent(elsewhere)}"
        said.append(f"Where tiles meet, {percent(there)} of the labels differ from those computed at a tile's centre{compared}"
                    + (": seams may be seen, a larger overlap would help." if seen else "."))
    if content["recipe"]["bundle_hash"] is not None and not content["recipe"]["bundle_trained"]:
        said.append("The bundle's weights are random, not trained.")
    said.append("None of this says how often labels are wrong: that takes voxels labelled by hand that the recipe was not fitted "
                "on.")
    return said


def illustrate(facts: JobFacts, content: Mapping[str, Any], statistics: BlockStatistics, slices: Slices) -> Illustrations:
    """Draw the pictures of a report."""
    labelled = [one.index for one in statistics.slices if one.labelled]
    weak = {one.index: one.mean_confidence for one in statistics.slices if one.mean_confidence is not None}
    least = lowest(weak, PICTURED, _distance(facts))
    rest = [index for index in evenly_spaced(labelled, SPREAD) if index not in least]
    frames = {one["slice"]: (one["window"],) for one in content["suggestions"]}
    regions = []
    for i, one in enumerate(content["suggestions"], 1):
        row, col, rows, cols = one["window"]
        height, width = (facts.shape[axis] for axis in facts.inner)
        part = (_around(row, rows, height), _around(col, cols, width))
        frame = (row - part[0].start, col - part[1].start, rows, cols)
        regions.append(_picture(facts, slices, one["slice"], f"{i}: {facts.title(one['slice'])}", (frame,), part, max_px=256))
    return Illustrations(
        plots=_plots(facts, content, [facts.position(index, facts.axis) for index in least]),
        lowest=tuple(_picture(facts, slices, index, f"{facts.title(index)}, mean confidence {weak[index]:.3f}",
                              frames.get(index, ())) for index in least),
        spread=tuple(_picture(facts, slices, index, facts.title(index), frames.get(index, ())) for index in rest),
        regions=tuple(regions),
        ramp=tuple(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in confidence_colours()[::51].tolist()),
    )


def format_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry, but lists of numbers and strings in one."""
    if isinstance(value, Mapping) and value:
        lines = [f"{indent} {json.dumps(key)}: {format_json(entry, indent + ' ').lstrip()}" for key, entry in value.items()]
        return f"{indent}{{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value):
        return f"{indent}[\n" + ",\n".join(indent + " " + json.dumps(entry, allow_nan=False) for entry in value) + f"\n{indent}]"
    return indent + json.dumps(value, allow_nan=False)


def _by_slice(facts: JobFacts, statistics: BlockStatistics) -> dict[str, Any]:
    """Numbers of all slices, None where there are none."""
    number, found = AXES.index(facts.axis), {one.index: one for one in statistics.slices}
    all_slices = [found.get(index) for index in range(facts.shape[number])]
    return {
        "axis": facts.axis,
        "positions": [facts.position(index, facts.axis) for index in range(len(all_slices))],
        "labelled": [None if one is None else one.labelled for one in all_slices],
        "fractions": {
            str(value): [_round(one.voxels.get(value, 0) / one.labelled) if one is not None and one.labelled else None
                         for one in all_slices]
            for value in facts.classes.values
        },
        "mean_confidence": [None if one is None else _round(one.mean_confidence) for one in all_slices],
        "flicker": [None if one is None else _round(one.flicker) for one in all_slices],
    }


def _phases(facts: JobFacts, statistics: BlockStatistics, by_slice: Mapping[str, Any]) -> list[dict[str, Any]]:
    labelled = sum(one.labelled for one in statistics.slices)
    of_voxel = None if facts.voxel is None else math.prod(facts.voxel)
    phases = []
    for value, name, colour in zip(facts.classes.values, facts.classes.names, facts.classes.colours, strict=True):
        count = sum(one.voxels.get(value, 0) for one in statistics.slices)
        shares = [share for share in by_slice["fractions"][str(value)] if share is not None]
        phases.append({
            "value": value, "name": name, "colour": colour, "voxels": count,
            "fraction": _round(count / labelled) if labelled else None,
            "lowest": min(shares, default=None), "highest": max(shares, default=None),
            "volume": None if of_voxel is None else _round(count * of_voxel),
        })
    return phases


def _confidence(facts: JobFacts, statistics: BlockStatistics) -> dict[str, Any] | None:
    known = [one for one in statistics.slices if one.confidence_sum is not None]
    if statistics.histogram is None or not known:
        return None
    means = {one.index: one.mean_confidence for one in known if one.mean_confidence is not None}
    total = sum(one.labelled for one in known)
    return {
        "mean": _round(sum(one.confidence_sum or 0 for one in known) / total / 255) if total else None,
        "lowest": [{"slice": index, "position": facts.position(index, facts.axis), "mean": _round(means[index])}
                   for index in lowest(means, LOWEST)],
        "unusual": [facts.position(index, facts.axis) for index in outliers(means, high=False)],
        "histogram": list(statistics.histogram),
    }


def _flicker(facts: JobFacts, statistics: BlockStatistics) -> dict[str, Any] | None:
    shares = {one.index: one.flicker for one in statistics.slices if one.flicker is not None}
    if not shares:
        return None
    highest = max(shares, key=lambda index: (shares[index], -index))
    return {
        "median": _round(float(np.median(list(shares.values())))), "highest": _round(shares[highest]),
        "highest_at": facts.position(highest, facts.axis),
        "unusual": [facts.position(index, facts.axis) for index in outliers(shares, high=True)],
    }


def _suggestions(facts: JobFacts, statistics: BlockStatistics, read_labels: Callable[[int], Labels]) -> list[dict[str, Any]]:
    """The least confident windows of slices that are not neighbours; coordinates are the input's."""
    windows = {one.index: one.weakest for one in statistics.slices if one.weakest is not None}
    suggestions = []
    for index in lowest({index: window.mean for index, window in windows.items()}, SUGGESTIONS, _distance(facts)):
        window = windows[index]
        first, count = [index, window.row, window.col], [1, window.rows, window.cols]
        order = (AXES.index(facts.axis), *facts.inner)
        start, stop = [0, 0, 0], [0, 0, 0]
        for axis, a, n in zip(order, first, count, strict=True):
            start[axis] = facts.position(a, AXES[axis])
            stop[axis] = facts.position(a + n - 1, AXES[axis]) + 1
        there = read_labels(index)[window.row : window.row + window.rows, window.col : window.col + window.cols]
        values, counts = np.unique(there[there != UNLABELLED], return_counts=True)
        mix = sorted(zip(counts.tolist(), values.tolist(), strict=True), key=lambda one: (-one[0], one[1]))
        suggestions.append({
            "slice": index, "position": facts.position(index, facts.axis), "start": start, "stop": stop,
            "mean_confidence": _round(window.mean / 255),
            "fractions": {str(value): _round(n / counts.sum()) for n, value in mix},
            "window": [window.row, window.col, window.rows, window.cols],
        })
    return suggestions


def _distance(facts: JobFacts) -> int:
    """Slices between which suggestions lie, so that they are not all of one place."""
    return max(facts.shape[AXES.index(facts.axis)] // 20, 1)


def _plots(facts: JobFacts, content: Mapping[str, Any], shown: Sequence[int]) -> dict[str, str]:
    by_slice, plots = content["slices"], dict[str, str]()
    positions = np.array(by_slice["positions"], np.float64)
    absent = np.array([not labelled for labelled in by_slice["labelled"]])

    def series(values: Sequence[float | None]) -> Series:
        return Series(positions, np.array([math.nan if value is None else value for value in values]), absent)

    if len(positions) > 1:
        largest = sorted(content["phases"], key=lambda phase: -phase["voxels"])[:STRIPS]
        plots["phases"] = plot_phases(
            [Phase(f"{phase['value']}: {phase['name']}", phase["colour"], series(by_slice["fractions"][str(phase["value"])]))
             for phase in content["phases"] if phase in largest], facts.axis)
        if content["confidence"] is not None:
            plots["confidence"] = plot_series(series(by_slice["mean_confidence"]), facts.axis, "mean confidence", marked=shown)
        if content["flicker"] is not None:
            plots["flicker"] = plot_series(series(by_slice["flicker"]), facts.axis, "labels changed / %",
                                           marked=content["flicker"]["unusual"], scale=100)
    if content["confidence"] is not None:
        plots["histogram"] = plot_histogram(content["confidence"]["histogram"])
    return plots


def _picture(
    facts: JobFacts, slices: Slices, index: int, caption: str, frames: Sequence[tuple[int, int, int, int]],
    part: tuple[slice, slice] = (slice(None), slice(None)), **options: int,
) -> SlicePicture:
    confidence = None if slices.confidence is None else slices.confidence(index)[part]
    image = slices.image(index)[part]
    sizes = facts.voxel or tuple(map(float, facts.step))
    height, width = (sizes[axis] for axis in facts.inner)
    uris = slice_panels(image, slices.labels(index)[part], confidence, facts.classes, window=facts.window, aspect=height / width,
                        frames=frames, **options)
    bar = None
    if facts.input.voxel is not None:
        across = image.shape[1] * width
        bar = (_nice(across / 4) / across, f"{_nice(across / 4):g} {unit_symbol(facts.input.voxel.unit)}")
    return SlicePicture(caption, tuple(zip(("image", "labels", "confidence"), uris, strict=False)), bar,
                        image.shape[1] * width > 3 * image.shape[0] * height)


def _around(first: int, count: int, length: int) -> slice:
    """Pixels of a window and as many on either side; at an edge, more on the other side."""
    start = max(min(first - count, length - 3 * count), 0)
    return slice(start, min(start + 3 * count, length))


def _nice(length: float) -> float:
    """The greatest of 1, 2, 5, 10, … that is not longer."""
    power = 10.0 ** math.floor(math.log10(length))
    return power * max(factor for factor in (1, 2, 5) if factor * power <= length * (1 + 1e-9))


def _runs(positions: Sequence[int], step: int, most: int = 6) -> str:
    """Ascending numbers for people: ``3, 17–19 and 2 more``."""
    runs = [[one for _, one in run] for _, run in itertools.groupby(enumerate(positions), lambda pair: pair[1] - pair[0] * step)]
    shown = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs[:most])
    rest = sum(len(run) for run in runs[most:])
    return f"{shown} and {rest} more" if rest else shown


def _round(number: float | None) -> float | None:
    """Six digits: more would only be noise in a report."""
    return None if number is None else float(f"{number:.6g}")


def _write(path: Path, text: str) -> None:
    """Write beside `path`, then move there."""
    part = part_path(path)
    try:
        with part.open("wb") as file:
            try:
                # File names may hold bytes that are no text.
                file.write(text.encode("utf-8", "replace"))
                file.flush()
                os.fsync(file.fileno())
                file.close()
                part.replace(path)
            except BaseException:
                part.unlink()
                raise
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror}); free space, or check the folder and its permissions"
                          ) from error
