"""What tests of jobs share: a small tomogram, recipes for it, commands, and the arrays that an output holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import zarr
from scipy.ndimage import gaussian_filter

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.fit import fit
from phaseline.clients.jobs.blocks import check_axes
from phaseline.clients.jobs.job import Step, VolumeJob
from phaseline.clients.jobs.ledger import LEDGER
from phaseline.clients.jobs.order import EngineOrder, InputOrder
from phaseline.clients.jobs.request import JobRequest, job_folder
from phaseline.clients.recipe import Recipe
from phaseline.clients.segmenter import Segmenter
from phaseline.clients.volumes.region import Region
from phaseline.clients.volumes.volume import AXES, Axis

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
Arrays = dict[str, npt.NDArray[Any]]

SHAPE = (11, 40, 52)
VALUES = (2, 5, 9)
NAMES = ("labels", "confidence", "probabilities")
ALL = ("--confidence", "--probabilities")


class LeftError(Exception):
    """What tests leave a job with between two blocks: no error of its own."""


def tomogram(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> U16:
    """A seeded 16-bit volume of three phases with noise; so much of it that a slice's direction changes labels."""
    random = np.random.default_rng(seed)
    return np.clip(12_000 + 14_000 * _phases(shape, seed) + 6_000 * random.standard_normal(shape), 0, 65_535).astype(np.uint16)


def make_recipe(volume: U16, values: tuple[int, int, int] = VALUES, seed: int = 0) -> Recipe:
    """A recipe for what `tomogram` makes, of few classical features: fitted in a fraction of a second."""
    plane = gaussian_filter(volume[3].astype(np.float64), 2)
    cuts = np.percentile(plane, (20, 45, 55, 80))
    strokes = np.array([values[0], 0, values[1], 0, values[2]], np.uint16)[np.digitize(plane, cuts)]
    return fit([volume[3]], [strokes], classical=ClassicalFeatures(sigmas=(0, 1, 2), membrane=False), seed=seed, threads=1)


def _phases(shape: tuple[int, int, int], seed: int) -> npt.NDArray[np.intp]:
    smooth = gaussian_filter(np.random.default_rng([seed, 1]).standard_normal(shape), 3)
    return np.digitize(smooth, np.quantile(smooth, (1 / 3, 2 / 3)))


def save(path: Path, volume: npt.NDArray[Any]) -> Path:
    """Write an NPY volume."""
    np.save(path, volume)
    return path


def save_planes(folder: Path, volume: npt.NDArray[Any]) -> Path:
    """Write a folder of TIFF planes, each compressed in one piece: a part of the file is none of the plane."""
    folder.mkdir()
    for number, plane in enumerate(volume):
        tifffile.imwrite(folder / f"s{number:02d}.tif", plane, compression="zlib")
    return folder


def cut_file(file: Path) -> None:
    """Leave half of a file."""
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def command(volume: Path, recipe: Path, out: Path, *options: str) -> list[str]:
    """Words of `phaseline segment`, for small blocks."""
    return ["segment", str(volume), "--recipe", str(recipe), "--out", str(out), "--block", "3", "--threads", "1", "--quiet",
            *options]


def request(volume: Path, recipe: Path, out: Path, **changes: Any) -> JobRequest:
    """What `command` asks for; changes are those of `JobRequest`, and region and axes as on the command line."""
    region = changes.pop("region", None)
    return JobRequest(InputOrder(volume, region=None if region is None else Region.parse(region)), EngineOrder(recipe, threads=1),
                      out, check_axes(changes.pop("axes", "plane")), **{"slices": 3, **changes})


def stop_after(asked: JobRequest, blocks: int, *, resume: bool = False) -> None:
    """Begin a job, or go on with one, and leave it after so many blocks."""
    done = 0

    def progress(step: Step) -> None:
        nonlocal done
        done += 1
        if done == blocks:
            raise LeftError

    try:
        with VolumeJob.open(asked, resume=resume) as job:
            job.run(progress=progress)
    except LeftError:
        return
    raise AssertionError(f"the job ended before block {blocks}")


def one_by_one(recipe: Path, volume: npt.NDArray[Any], axis: Axis = "plane") -> Arrays:
    """Labels, confidence and probabilities (255 × p rounded) of slices that are segmented as single images are."""
    along = AXES.index(axis)
    with Segmenter.open(recipe, threads=1) as segmenter:
        found = [segmenter.segment(np.ascontiguousarray(volume.take(i, along)), probabilities=True)
                 for i in range(volume.shape[along])]
    return {
        "labels": np.stack([one.labels for one in found], along),
        "confidence": np.stack([one.confidence for one in found], along),
        "probabilities": np.stack([_byte(one.probabilities) for one in found], along + 1),
    }


def three_directions(recipe: Path, volume: npt.NDArray[Any], values: tuple[int, ...] = VALUES) -> Arrays:
    """The mean of `one_by_one` over all three axes, by plain arithmetic."""
    total = sum(one_by_one(recipe, volume, axis)["probabilities"].astype(np.int64) for axis in AXES)
    assert isinstance(total, np.ndarray)
    ordered = np.sort(total, axis=0)
    return {
        "labels": np.array(values, np.uint8)[total.argmax(axis=0)],
        "confidence": np.floor((ordered[-1] - ordered[-2]) / 3 + 0.5).astype(np.uint8),
        "probabilities": np.floor(total / 3 + 0.5).astype(np.uint8),
    }


def _byte(probabilities: Any) -> U8:
    return np.rint(np.asarray(probabilities, np.float32) * 255).astype(np.uint8)


def read_output(out: Path, names: tuple[str, ...] = NAMES) -> Arrays:
    """The arrays of an output, read by other programs than ours."""
    if out.suffix == ".zarr":
        paths = {"labels": "0", "confidence": "confidence/0", "probabilities": "probabilities/0"}
        return {name: np.asarray(zarr.open_array(out, path=paths[name], mode="r")[:]) for name in names}
    if out.suffix == ".h5":
        with h5py.File(out, "r") as file:
            return {name: file[name][:] for name in names}
    return {name: tifffile.imread(tiff_file(out, name)) for name in names}


def tiff_file(out: Path, name: str) -> Path:
    """Where an array of a TIFF output lies."""
    return out if name == "labels" else out.with_name(f"{out.stem}_{name}{out.suffix}")


def check_arrays(out: Path, expected: Arrays, names: tuple[str, ...] = NAMES) -> None:
    """That an output holds these arrays, dtypes included."""
    for name, found in read_output(out, names).items():
        assert found.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found, expected[name], name)


def files(path: Path) -> dict[str, bytes]:
    """All files of an output, or the one that it is, by name."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    """All lines of a job's ledger; each must be JSON."""
    return [json.loads(line) for line in (job_folder(out) / LEDGER).read_text(encoding="utf-8").splitlines()]


def blocks_of(out: Path, state: str = "done") -> list[tuple[str, int]]:
    """Stage and number of each line of a ledger that says so of a block."""
    return [(line["stage"], line["block"]) for line in ledger_lines(out) if line.get("state") == state]


def report_of(out: Path) -> dict[str, Any]:
    """The content of report.json."""
    content: dict[str, Any] = json.loads((job_folder(out) / "report.json").read_text(encoding="utf-8"))
    return content


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command printed to standard error: its mistake."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("phaseline: "), lines
    return lines[0]
