"""What averaging a transform set costs, as a share of the forward passes that it averages."""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.classical import micrograph
from benchmarks.report import emit, markdown
from phaseline.export.bundle_writer import ExportOptions, write_bundle
from phaseline.runtime.average import PixelSampling, ViewAverage
from phaseline.runtime.contract import F16
from phaseline.runtime.source import LocalSource
from phaseline.runtime.transforms import TransformSet


def run(options: ExportOptions, transforms: str = "moore:2", repeats: int = 3) -> list[dict[str, object]]:
    """Measure on one tile.

    Parameters
    ----------
    options
        What to export and run.
    transforms
        Name of the set.
    repeats
        Interleaved repeats; the shares are medians over them.

    Returns
    -------
    Rows of a table.
    """
    views = TransformSet.parse(transforms, options.stride_px)
    tile = micrograph(options.tile_px)[None].repeat(options.in_channels, axis=0)
    sampling = PixelSampling()
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(options, Path(folder) / "bundle")
        spec = bundle.spec
        with LocalSource(bundle, "cpu") as source:
            source.patch_features(tile[None])
            forward, making, averaging = [], [], []
            for _ in range(repeats):
                forward.append(_seconds(lambda: [source.patch_features(tile[None]) for _ in views.transforms]))
                making.append(_seconds(lambda: [view.apply(tile, sampling.boundary) for view in views.transforms]))
                features = source.patch_features(tile[None])[0]
                average = ViewAverage((spec.tile_px, spec.tile_px), spec.channels, spec.patch_px, spec.stride_px, sampling)
                averaging.append(_seconds(functools.partial(_add, average, views, features)))
    share = [100 * (m + a) / f for f, m, a in zip(forward, making, averaging, strict=True)]
    return [
        {"what": f"{len(views)} forward passes", "value": f"{statistics.median(forward):.2f} s"},
        {"what": "making the views", "value": f"{statistics.median(making):.3f} s"},
        {"what": "resizing, undoing and averaging them", "value": f"{statistics.median(averaging):.3f} s"},
        {"what": "**share of the forward passes**", "value": f"**{statistics.median(share):.1f} %**"},
        {"what": "peak memory of 17 views over that of 1", "value": f"{_peak(17) / _peak(1):.3f} ×"},
    ]


def _add(average: ViewAverage, views: TransformSet, features: F16) -> None:
    for view in views.transforms:
        average.add(view, features)


def _peak(n_views: int) -> int:
    """Most memory, in bytes, that averaging takes at 518×518 with 32 channels."""
    views = TransformSet.parse("moore:2", 14).transforms[:n_views]
    features = np.zeros((32, 37, 37), np.float16)
    tracemalloc.start()
    average = ViewAverage((518, 518), 32, 14, 14, PixelSampling())
    for view in views:
        average.add(view, features)
    average.mean()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2")
    parser.add_argument("--tile", type=int, default=518)
    parser.add_argument("--stride", type=int, default=14)
    parser.add_argument("--transforms", default="moore:2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    options = ExportOptions(arguments.backbone, weights="random:0", tile_px=arguments.tile, stride_px=arguments.stride)
    rows = run(options, arguments.transforms, arguments.repeats)
    title = f"Averaging {arguments.transforms} on {arguments.backbone}, {arguments.tile} px, stride {arguments.stride}"
    emit(markdown(title, rows, ["numpy", "onnxruntime"]), arguments.out)


if __name__ == "__main__":
    main()
