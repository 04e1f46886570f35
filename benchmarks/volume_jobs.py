"""Running jobs over synthetic volumes in fresh processes, and watching them from outside.

    SyntheticVolume ─┬▶ strokes on four planes ─▶ fit ─▶ recipe ─┐
                     └▶ a volume on disk ────────────────────────┴▶ phaseline segment ─▶ labels, Run (seconds, peak memory, steps)

Files are dropped from the page cache before a run, so that they are read from the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil

from benchmarks.synthetic_volume import CLASSES, Shape, SyntheticVolume
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.jobs.ledger import read_ledger
from phaseline.clients.jobs.order import EngineOrder, InputOrder, Order
from phaseline.clients.jobs.plan import measure
from phaseline.clients.jobs.request import job_folder
from phaseline.clients.jobs.statistics import block_statistics, evenly_spaced
from phaseline.clients.jobs.worker import BlockWorker
from phaseline.clients.volumes.writing import OutputLayout
from phaseline.clients.volumes.zarr_sink import checksum, create_store
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.contract import U8
from phaseline.runtime.source import LocalSource

STEPS = ("read", "compute", "write")
INTERVAL_S = 0.1
LABELLED_PLANES = 4


@dataclass(frozen=True)
class Made:
    """A synthetic volume on disk.

    Attributes
    ----------
    content
        What it holds.
    path, truth
        The volume, and its label values (NPY).
    """

    content: SyntheticVolume
    path: Path
    truth: Path


@dataclass(frozen=True)
class Run:
    """A job that ended.

    Attributes
    ----------
    seconds
        Of the process, from its start to its end.
    blocks_s
        From the job's beginning to the ledger's line of the last block: without imports, plan, pyramid and report.
    peak_bytes
        Most resident memory of the process and all that it started, shared pages counted in each.
    steps
        Seconds of `STEPS`, summed over blocks.
    blocks, slices
        Number of blocks, and slices in each.
    """

    seconds: float
    blocks_s: float
    peak_bytes: int
    steps: dict[str, float]
    blocks: int
    slices: int


class Bench:
    """Volumes and recipes, made once, and jobs over them.

    Parameters
    ----------
    folder
        Where all of it lies.
    bundles
        For each way with deep features, 'default' or a bundle's folder.
    threads
        None: one for each core.
    file_format, grain, seed
        Of the volumes, see `SyntheticVolume`.
    """

    def __init__(self, folder: Path, bundles: dict[str, str], threads: int | None, file_format: str, grain: float, seed: int
                 ) -> None:
        self.folder, self.bundles, self.threads = folder, bundles, threads
        self._format, self._grain, self._seed = file_format, grain, seed
        folder.mkdir(parents=True, exist_ok=True)

    def volume(self, shape: Shape) -> Made:
        """A volume of this shape."""
        name = f"{'x'.join(map(str, shape))}_{self._grain:g}_{self._seed}"
        suffix = {"folder": "", "hdf5": ".h5", "bigtiff": ".tif"}[self._format]
        made = Made(SyntheticVolume(shape, self._seed, self._grain), self.folder / f"{name}{suffix}",
                    self.folder / f"{name}_truth.npy")
        if not made.path.exists():
            made.content.write(made.path, self._format, made.truth)
        return made

    def recipe(self, way: str, volume: Made) -> Path:
        """A recipe fitted on strokes on four planes of a volume."""
        bundle = open_bundle(self.bundles[way]) if way in self.bundles else None
        out = self.folder / f"{volume.path.stem}_{way}_{'none' if bundle is None else bundle.hash[:12]}"
        if out.exists():
            return out
        planes = evenly_spaced(range(volume.content.shape[0]), LABELLED_PLANES)
        images = [volume.content.plane(plane) for plane in planes]
        labels = [strokes(volume.content.truth(plane), plane) for plane in planes]
        with contextlib.ExitStack() as stack:
            source, deep = None, None
            if bundle is not None:
                source = stack.enter_context(LocalSource(bundle, "cpu", self.threads))
                deep = DeepFeatures.for_bundle(bundle.spec, "none", PixelSampling.for_bundle(bundle.spec, interpolation=way))
            fit(images, labels, source=source, deep=deep, class_names=CLASSES, bundle_path=self.bundles.get(way, "default"),
                threads=self.threads).save(out)
        return out

    def job(self, volume: Made, recipe: Path, memory: str, *more: str) -> tuple[Path, Run]:
        """Segment a volume in a fresh process; returns the output and how it went."""
        out = self.folder / f"{volume.path.stem}_labels.ome.zarr"
        command = [sys.executable, "-m", "phaseline.clients", "segment", str(volume.path), "--recipe", str(recipe), "--out",
                   str(out), "--memory", memory, "--device", "cpu", "--overwrite", *self._threads(), *more]
        forget(volume.path)
        seconds, peak, _ = watch(command)
        header, lines = read_ledger(job_folder(out))
        spent = json.loads((job_folder(out) / "report.json").read_text(encoding="utf-8"))["performance"]["seconds"]
        elapsed = [float(line["elapsed"]) for line in lines if "elapsed" in line]
        return out, Run(seconds, max(elapsed), peak, {step: spent[step] for step in STEPS}, len(elapsed), header["slices"])

    def alone(self, volume: Made, recipe: Path, slices: int) -> dict[str, float]:
        """Seconds of each step over all blocks, one step after the other, in a fresh process: nothing overlaps."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            command = [sys.executable, "-m", "benchmarks.volumes", "--alone", str(volume.path), str(recipe),
                       str(Path(folder) / "alone.ome.zarr"), str(slices), *self._threads()]
            forget(volume.path)
            found: dict[str, float] = json.loads(watch(command)[2].splitlines()[-1])
        return found

    def _threads(self) -> list[str]:
        return [] if self.threads is None else ["--threads", str(self.threads)]


def strokes(truth: U8, seed: int, count: int = 12) -> U8:
    """Brush strokes on a plane: for each class some short lines, only where the truth is that class."""
    rng = np.random.default_rng([1, seed])
    painted = np.zeros_like(truth)
    for value in np.unique(truth):
        drawn = np.zeros_like(truth)
        there = np.argwhere(truth == value)
        for row, col in there[rng.choice(len(there), count)].tolist():
            down, across = rng.integers(-16, 17, 2).tolist()
            cv2.line(drawn, (col, row), (col + across, row + down), (1,), 3)
        painted[(drawn == 1) & (truth == value)] = value
    return painted


def watch(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a command.

    Returns
    -------
    Its seconds; the most resident memory of its process tree, looked at every 0.1 s from here; what it printed.

    Raises
    ------
    RuntimeError
        It failed.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        started, peak = time.perf_counter(), 0
        process = psutil.Popen(command, cwd=Path(__file__).parents[1], stdout=printed, stderr=subprocess.STDOUT)
        try:
            while True:
                peak = max(peak, _resident(process))
                with contextlib.suppress(psutil.TimeoutExpired):
                    status = process.wait(timeout=INTERVAL_S)
                    break
        except BaseException:
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        printed.seek(0)
        text = printed.read()
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {status}: {text[-2000:]}")
    return seconds, peak, text


def _resident(process: psutil.Process) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += int(one.memory_info().rss)
    return total


def forget(path: Path) -> None:
    """Drop a file, or the files of a folder, from the page cache, where the system can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet cannot be dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def steps_alone(path: Path, recipe: Path, store: Path, slices: int, threads: int | None) -> dict[str, float]:
    """Do a job's blocks in this process, one step after the other; returns the seconds of each step."""
    order = Order(InputOrder(path), EngineOrder(recipe, device="cpu", threads=threads), store, store.parent, "plane", slices,
                  confidence=False, probabilities=False)
    spent = dict.fromkeys(STEPS, 0.0)
    with BlockWorker(order) as worker:
        measure(worker)  # as the job does it: what is loaded once, is loaded now
        info, classes = worker.volume.info, worker.segmenter.recipe.classes
        create_store(store, OutputLayout(info.shape, "plane", slices, classes, voxel=info.voxel))
        for box in worker.stages[0].blocks:
            times = [time.perf_counter()]
            voxels = worker.volume.read(box)
            times.append(time.perf_counter())
            found = [worker.segmenter.segment(plane) for plane in voxels]
            labels, confidence = np.stack([one.labels for one in found]), np.stack([one.confidence for one in found])
            times.append(time.perf_counter())
            worker.sink.write("labels", box, labels)
            block_statistics(labels, confidence, box)
            checksum(labels)
            times.append(time.perf_counter())
            for step, seconds in zip(STEPS, np.diff(times), strict=True):
                spent[step] += float(seconds)
    return spent
