"""Segmenting files: one or a folder of them, each written whole, with a report that lets a stopped run go on.

    OUT/<stem>.png  OUT/<stem>_confidence.png  OUT/<stem>_probabilities.npy  OUT/report.jsonl

The report's first line says what decides the labels (recipe and options); then comes one line an image (engine, fractions),
appended when its files are in place. A line cut short by a kill is ignored, and its image is done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.crf import CRFParameters
from phaseline.clients.images import check_output, read_image, write_array, write_labels
from phaseline.clients.labels import ClassTable
from phaseline.clients.remote_segmenter import RemoteSegmenter
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.errors import (
    ArtefactError,
    OutputError,
    OutputExistsError,
    PhaselineError,
    ServerBusyError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)

REPORT = "report.jsonl"
SERVERS_LOST = (ServerUnavailableError, ServerTimeoutError, ServerBusyError, UnknownModelError, ArtefactError)
"""What servers say when the next image would fail alike; of `ArtefactError`, that they serve another recipe or bundle now."""


@dataclass(frozen=True)
class Job:
    """One image to segment.

    Attributes
    ----------
    image
        File to read.
    labels, confidence, probabilities
        Files to write; None for what was not asked for.
    """

    image: Path
    labels: Path
    confidence: Path | None
    probabilities: Path | None

    @property
    def outputs(self) -> list[Path]:
        """Files to write, labels last: they are the sign that an image is done."""
        return [path for path in (self.confidence, self.probabilities, self.labels) if path is not None]


def plan(images: Sequence[Path], out: Path, *, folder: bool, confidence: bool, probabilities: bool) -> list[Job]:
    """Name the outputs.

    Parameters
    ----------
    images
        Files to segment.
    out
        A folder for all outputs (`folder`), or the label file of the only image.
    confidence, probabilities
        Whether to write them.

    Raises
    ------
    UsageError
        An output would replace an input, or another output.
    """
    jobs: list[Job] = []
    for image in images:
        labels = out / f"{image.stem}.png" if folder else out
        jobs.append(Job(
            image,
            labels,
            _confidence_path(labels) if confidence else None,
            _probabilities_path(labels) if probabilities else None,
        ))
    outputs = [path.resolve() for job in jobs for path in job.outputs]
    if folder and any(out.resolve() == image.parent.resolve() for image in images):
        raise UsageError(f"the output folder {out} is the images' own, where labels would be taken for images; choose another")
    if overwritten := {image.resolve() for image in images} & set(outputs):
        raise UsageError(f"the output would replace the input {min(overwritten)}; choose another output")
    if len(set(outputs)) < len(outputs):
        raise UsageError("two images would be written to one file, as a.png's confidence and a_confidence.png's labels "
                         "would; rename one")
    return jobs


def report_path(out: Path, *, folder: bool) -> Path:
    """Where the report of an output lies."""
    return out / REPORT if folder else out.with_name(f"{out.name}.{REPORT}")


def pending(jobs: Sequence[Job], report: Path, header: dict[str, Any], *, overwrite: bool, resume: bool) -> list[Job]:
    """Jobs still to do; refuses outputs that exist before any work is done.

    Parameters
    ----------
    jobs, report
        From `plan` and `report_path`.
    header
        What decides the labels, as it will stand in the report's first line.
    overwrite
        Do all, and replace what is there.
    resume
        Do those that the report does not hold, or whose image or outputs have changed since. Without a report there is nothing
        to resume: outputs that exist are then foreign, and refused.

    Raises
    ------
    OutputExistsError
        An output exists and neither was asked for; or `resume`, and the report is of another recipe or options.
    OutputError
        An output cannot be written.
    """
    lines = list(_lines(report)) if resume else []
    if not lines:
        if report.exists() and not overwrite and not resume:
            raise OutputExistsError(f"{report} exists, of an earlier run; go on with --resume, begin anew with --overwrite, or "
                                    "choose another output")
        for path in (path for job in jobs for path in job.outputs):
            check_output(path, overwrite)
        return list(jobs)
    if lines[0] != header:
        changed = sorted(key for key in {*header, *lines[0]} if header.get(key) != lines[0].get(key))
        raise OutputExistsError(f"{report} was begun with another {', '.join(changed)}; --resume needs the same, use "
                                "--overwrite or another output")
    finished = {line.get("image"): line for line in lines[1:] if "error" not in line}
    left = [job for job in jobs if not _is_done(job, finished.get(job.image.name))]
    for path in (path for job in left for path in job.outputs):
        check_output(path, overwrite=True)
    return left


def segment_files(
    segmenter: Segmenter | RemoteSegmenter,
    jobs: Sequence[Job],
    report: Path,
    header: dict[str, Any],
    *,
    append: bool = False,
    crf: CRFParameters | None = None,
    on_image: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[float], None] | None = None,
) -> list[dict[str, Any]]:
    """Segment files one after another; an image that fails does not stop the others.

    Parameters
    ----------
    segmenter
        An open segmenter.
    jobs
        From `pending`.
    report, header
        The report's file and its first line.
    append
        Go on with the report that is there.
    crf
        Refinement of the labels, or None.
    on_image
        Called with each image's line of the report.
    progress
        Called with the fraction of the running image.

    Returns
    -------
    The lines of the report: ``image``, ``input``, ``outputs``, ``seconds``, and either ``fractions`` (by label value) and
    ``mean_confidence`` (0–1), or ``error``.

    Raises
    ------
    OutputError
        An output or the report cannot be written: that stops the run.
    ServerError, ArtefactError
        One of `SERVERS_LOST`: that stops the run too, and what is written stays.
    """
    results = []
    if not append:
        _remove_stale(jobs, report)
    begun = append and bool(list(_lines(report)))
    try:
        with report.open("a" if begun else "w", encoding="utf-8") as stream:
            if not begun:
                stream.write(json.dumps(header) + "\n")
            elif not report.read_bytes().endswith(b"\n"):
                # A run that was killed left half a line: the next one must not be glued to it.
                stream.write("\n")
            for job in jobs:
                line = _segment_one(segmenter, job, crf, progress)
                stream.write(json.dumps(line) + "\n")
                stream.flush()
                results.append(line)
                if on_image is not None:
                    on_image(line)
    except OSError as error:
        if isinstance(error, PhaselineError):
            raise
        raise OutputError(f"{report} cannot be written ({error.strerror}); free space, or choose another output") from error
    return results


def fractions(labels: npt.NDArray[np.unsignedinteger[Any]], classes: ClassTable) -> dict[str, float]:
    """Phase fractions: the share of the pixels that each label value has, by value."""
    counts = np.bincount(labels.ravel(), minlength=max(classes.values) + 1)
    return {str(value): float(counts[value] / labels.size) for value in classes.values}


def _segment_one(
    segmenter: Segmenter | RemoteSegmenter, job: Job, crf: CRFParameters | None, progress: Callable[[float], None] | None
) -> dict[str, Any]:
    started = time.perf_counter()
    line: dict[str, Any] = {"image": job.image.name, "engine": segmenter.engine_choice}
    try:
        line["input"] = _fingerprint(job.image)
        result = segmenter.segment(
            read_image(job.image), probabilities=job.probabilities is not None, crf=crf, progress=progress
        )
        if job.confidence is not None:
            write_labels(job.confidence, result.confidence)
        if job.probabilities is not None and result.probabilities is not None:
            write_array(job.probabilities, result.probabilities)
        write_labels(job.labels, result.labels)
    except (OutputError, *SERVERS_LOST):
        raise
    except PhaselineError as error:
        # What an earlier run left there would pass for this one's.
        for path in job.outputs:
            path.unlink(missing_ok=True)
        return {**line, "error": str(error)}
    return {
        **line,
        "outputs": {path.name: _fingerprint(path) for path in job.outputs},
        "seconds": round(time.perf_counter() - started, 3),
        "fractions": fractions(result.labels, segmenter.recipe.classes),
        "mean_confidence": round(float(result.confidence.mean()) / 255, 4),
    }


def _remove_stale(jobs: Sequence[Job], report: Path) -> None:
    """Remove what an earlier run wrote beside the labels and this one will not replace: it would not belong to them."""
    if not report.is_file():
        return
    for job in jobs:
        for path in {_confidence_path(job.labels), _probabilities_path(job.labels)} - {job.confidence, job.probabilities}:
            path.unlink(missing_ok=True)


def _confidence_path(labels: Path) -> Path:
    return labels.with_name(f"{labels.stem}_confidence.png")


def _probabilities_path(labels: Path) -> Path:
    return labels.with_name(f"{labels.stem}_probabilities.npy")


def _is_done(job: Job, line: dict[str, Any] | None) -> bool:
    if line is None:
        return False
    return (line.get("input") == _fingerprint(job.image)
            and line.get("outputs") == {path.name: _fingerprint(path) for path in job.outputs})


def _fingerprint(path: Path) -> str:
    """Length and time of the last change: what tells, without reading it, that a file is another one."""
    try:
        status = path.stat()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"


def _lines(report: Path) -> Iterator[dict[str, Any]]:
    if not report.is_file():
        return
    for text in report.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
