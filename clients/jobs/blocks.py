"""Which blocks a job has, stage by stage.

    one axis       segment: runs of slices across it ─▶ labels, confidence, probabilities

    three axes     plane ─┐
                   row   ─┼─▶ probabilities of each, in scratch ─▶ combine: their mean ─▶ labels, confidence, probabilities
                   col   ─┘

Blocks of a stage don't depend on each other; a stage begins when the one before has ended. A block owns what it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never, get_args

from phaseline.clients.volumes.volume import AXES, Axis, Box
from phaseline.runtime.errors import UsageError

StageName = Literal["segment", "plane", "row", "col", "combine"]
JobAxes = Literal["plane", "row", "col", "3"]
JOB_AXES: tuple[JobAxes, ...] = get_args(JobAxes)


@dataclass(frozen=True)
class Stage:
    """Blocks that may be done in any order, or side by side.

    Attributes
    ----------
    name
        ``segment``; or the axis whose probabilities go to scratch; or ``combine``.
    axis
        Across which its slices lie.
    blocks
        Runs of whole slices, ascending; together the volume.
    """

    name: StageName
    axis: Axis
    blocks: tuple[Box, ...]


def check_axes(axes: str) -> JobAxes:
    """Refuse axes that are none of `JOB_AXES`.

    Raises
    ------
    UsageError
        An unknown choice.
    """
    for known in JOB_AXES:
        if axes == known:
            return known
    raise UsageError(f"axes is {axes!r}, expected plane, row or col (slices across that one), or 3 (the mean over all three)")


def axis_index(axis: Axis) -> int:
    """0, 1, 2 for plane, row, column."""
    return AXES.index(axis)


def runs(shape: tuple[int, int, int], axis: Axis, slices: int) -> tuple[Box, ...]:
    """A volume cut across an axis into runs of `slices` slices; the last may have fewer."""
    number = axis_index(axis)
    boxes = []
    for first in range(0, shape[number], slices):
        start, stop = [0, 0, 0], list(shape)
        start[number], stop[number] = first, min(first + slices, shape[number])
        boxes.append(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return tuple(boxes)


def stages(shape: tuple[int, int, int], axes: JobAxes, slices: int) -> tuple[Stage, ...]:
    """The stages of a job, in their order.

    Parameters
    ----------
    shape
        Of the volume.
    axes
        Across which axis slices lie; ``3``: all.
    slices
        In a block.
    """
    match axes:
        case "plane" | "row" | "col":
            return (Stage("segment", axes, runs(shape, axes, slices)),)
        case "3":
            return (*(Stage(axis, axis, runs(shape, axis, slices)) for axis in AXES),
                    Stage("combine", "plane", runs(shape, "plane", slices)))
        case _:
            assert_never(axes)


def slice_boxes(box: Box, axis: Axis) -> tuple[Box, ...]:
    """The slices of a block, each a box one voxel thick."""
    number = axis_index(axis)
    boxes = []
    for i in range(box.start[number], box.stop[number]):
        start, stop = list(box.start), list(box.stop)
        start[number], stop[number] = i, i + 1
        boxes.append(Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    return tuple(boxes)
