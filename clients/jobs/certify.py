"""From a job's ledger, input and store to its certificate."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.jobs.blocks import Stage, axis_index, slice_boxes
from phaseline.clients.jobs.certificate import FailedSlices, JobFacts, Slices, make_certificate
from phaseline.clients.jobs.ledger import Ledger
from phaseline.clients.jobs.plan import Plan
from phaseline.clients.jobs.request import JobRequest
from phaseline.clients.jobs.seams import SeamDisagreement, seam_disagreement
from phaseline.clients.jobs.statistics import BlockStatistics, evenly_spaced
from phaseline.clients.jobs.worker import BlockWorker
from phaseline.clients.recipe import installed_versions, recipe_hash
from phaseline.clients.volumes.region import Region
from phaseline.clients.volumes.volume import Axis, Box
from phaseline.clients.volumes.writing import ArrayName
from phaseline.clients.volumes.zarr_sink import ZarrSink

SEAM_SLICES = 4


def certify(request: JobRequest, worker: BlockWorker, ledger: Ledger, plan: Plan, outputs: tuple[Path, ...], peak_bytes: int,
            seconds: float) -> dict[str, Any]:
    """Write report.json and report.html of a job all of whose blocks are done or failed.

    Parameters
    ----------
    request, worker, ledger, plan
        Of the job.
    outputs
        For people.
    peak_bytes, seconds
        Of this run.

    Returns
    -------
    The content of report.json.
    """
    lines = [line for (stage, _), line in sorted(ledger.lines.items()) if stage in ("segment", "combine")]
    blocks = [BlockStatistics.from_dict(line["statistics"]) for line in lines if line.get("statistics") is not None]
    facts = _facts(request, worker, ledger, plan, outputs, peak_bytes, seconds)
    slices = _slices(request, worker, facts.axis)
    bad = {i for failed in facts.failed if failed.axis == facts.axis for i in range(failed.start, failed.stop)}
    good = [i for i in range(facts.shape[axis_index(facts.axis)]) if i not in bad]
    return make_certificate(request.folder, facts, blocks, _seams(request, worker, slices, good), slices)


def _seams(request: JobRequest, worker: BlockWorker, slices: Slices, good: list[int]) -> SeamDisagreement:
    labels: Callable[[int], npt.NDArray[Any]] = slices.labels
    if request.axes == "3":
        # The output is a mean over three directions: seams are those of one.
        labels = lambda index: worker.segmenter.segment(slices.image(index)).labels  # noqa: E731
    return seam_disagreement(worker.segmenter, slices.image, labels, evenly_spaced(good, SEAM_SLICES))


def _slices(request: JobRequest, worker: BlockWorker, axis: Axis) -> Slices:
    sink, number = ZarrSink(request.store), axis_index(axis)
    pieces = slice_boxes(Box((0, 0, 0), worker.volume.info.shape), axis)

    def stored(name: ArrayName) -> Callable[[int], npt.NDArray[Any]]:
        return lambda index: np.ascontiguousarray(sink.read(name, pieces[index]).squeeze(number))

    def image(index: int) -> npt.NDArray[Any]:
        return np.ascontiguousarray(worker.read(pieces[index])[0].squeeze(number))

    return Slices(image, stored("labels"), stored("confidence") if request.confidence else None)


def _facts(request: JobRequest, worker: BlockWorker, ledger: Ledger, plan: Plan, outputs: tuple[Path, ...], peak_bytes: int,
           seconds: float) -> JobFacts:
    recipe, region = worker.segmenter.recipe, request.input.region or Region()
    runs = [line["run"] for line in ledger.history if "run" in line]
    sums = {name: math.fsum(line.get("seconds", {}).get(name, 0.0) for line in ledger.lines.values())
            for name in ("read", "compute", "write")}
    return JobFacts(
        input=worker.source_info, start=region.start, step=region.step, shape=worker.volume.info.shape, axes=request.axes,
        classes=recipe.classes, window=(recipe.window.low, recipe.window.high), recipe=str(request.engine.recipe),
        recipe_hash=recipe_hash(request.engine.recipe), bundle_hash=None if recipe.bundle is None else recipe.bundle.hash,
        bundle_trained=recipe.bundle is None or recipe.bundle.trained, engine=worker.segmenter.engine_choice,
        workers=", ".join(sorted({line["worker"] for line in ledger.lines.values() if "worker" in line})),
        outputs=tuple(os.fspath(path) for path in outputs), command=request.command, started=runs[0],
        finished=datetime.now(UTC).isoformat(timespec="seconds"), seconds={"wall": _wall(ledger, seconds), **sums},
        versions=installed_versions(), failed=tuple(_failed(ledger, worker)), peak_memory_bytes=peak_bytes,
        memory_budget_bytes=plan.budget_bytes, resumed=len(runs) - 1,
    )


def _wall(ledger: Ledger, seconds: float) -> float:
    """Seconds of all runs: of those before, until their last block."""
    before, last = 0.0, 0.0
    for line in ledger.history:
        if "run" in line:
            before, last = before + last, 0.0
        last = max(last, float(line.get("elapsed", 0.0)))
    return before + seconds


def _failed(ledger: Ledger, worker: BlockWorker) -> list[FailedSlices]:
    planes = dict[int, tuple[str, int]]()
    found = list[FailedSlices]()
    by_name: dict[str, Stage] = {stage.name: stage for stage in worker.stages}
    for (name, block), line in sorted(ledger.lines.items()):
        if line["state"] == "done":
            continue
        for plane, error in line.get("errors", {}).items():
            planes.setdefault(int(plane), (error, line["attempt"]))
        if "error" in line:
            stage = by_name[name]
            box, axis = stage.blocks[block], axis_index(stage.axis)
            found.append(FailedSlices(stage.axis, box.start[axis], box.stop[axis], line["error"], line["attempt"]))
    return [FailedSlices("plane", plane, plane + 1, *planes[plane]) for plane in sorted(planes)] + found

