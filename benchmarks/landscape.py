"""Time and memory of features over image sizes (arXiv 2508.21529 Fig. 3): classical, deep by interpolation, deep by upsampler.

Each figure comes from a fresh process. Bands of rows are computed and dropped, as segmenting does it, so memory is that of
the work, not of an image's features.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from benchmarks.evaluation import about
from benchmarks.memory import peak_bytes
from benchmarks.pixel_table import CLASSICAL, Part
from benchmarks.plots import Line, draw_lines, new_figure, save
from benchmarks.references.papers import LANDSCAPE
from benchmarks.report import emit, markdown
from benchmarks.upsampling import interpolated
from phaseline.clients.features import PixelFeatures
from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.source import LocalSource

SIZES = (256, 512, 1024, 2048)
WAYS = ("classical", "bilinear", "learned")
Figures = dict[tuple[str, int], dict[str, float]]


def run(bundle: str, sizes: Sequence[int] = SIZES, repeats: int = 3, threads: int | None = None) -> Figures:
    """Measure each way on each size.

    Parameters
    ----------
    bundle
        'default' or a folder; ``learned`` is left out if it has no upsampler.
    sizes
        Sides of the square image, px.
    repeats
        Of a size, in one process; the time is their median.
    threads
        None: one for each core.

    Returns
    -------
    (way, size) → ``seconds`` for an image, and ``peak_mb``: what the process needed beyond its imports.
    """
    ways = [way for way in WAYS if way != "learned" or open_bundle(bundle).spec.has_upsampler]
    found: Figures = {}
    for way, size in tqdm([(way, size) for size in sizes for way in ways], "sizes"):
        command = [sys.executable, "-m", "benchmarks.landscape", "--bundle", bundle, "--one", way, "--sizes", str(size),
                   "--repeats", str(repeats), *(["--threads", str(threads)] if threads else [])]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
        found[way, size] = json.loads(done.stdout)
    return found


def _one(bundle: str, way: str, size: int, repeats: int, threads: int | None) -> dict[str, float]:
    """One size, in this process."""
    part: Part = CLASSICAL if way == "classical" else interpolated(way, open_bundle(bundle), way)
    # Drawn directly as bytes: temporary arrays would raise the peak before the run, and so hide some of its growth.
    image = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    before = peak_bytes()
    with ExitStack() as stack:
        source = None if part.bundle is None else stack.enter_context(LocalSource(part.bundle, "cpu", threads))
        features = PixelFeatures(part.settings(1), source, threads)
        seconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            for _band in features.bands(image):
                pass
            seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "peak_mb": (peak_bytes() - before) / 1e6}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--bundle", default="default", help="'default' or a bundle's folder")
    made.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--threads", type=int)
    made.add_argument("--out", type=Path, help="Markdown file; the picture lies beside it")
    made.add_argument("--one", choices=WAYS, help="measure one way and size in this process, and print JSON")
    options = made.parse_args(arguments)
    if options.one:
        print(json.dumps(_one(options.bundle, options.one, options.sizes[0], options.repeats, options.threads)))
        return
    # A relative path must mean the same in the processes that measure.
    bundle = options.bundle if options.bundle == "default" else str(Path(options.bundle).resolve())
    found = run(bundle, options.sizes, options.repeats, options.threads)
    rows = [_row(found, way, size) for way, size in found]
    spec = open_bundle(bundle).spec
    notes = [
        f"Each line is a fresh process: the median of {options.repeats} runs, and the process's peak beyond imports and image. "
        f"Tiles of {spec.tile_px} px. {about(open_bundle(bundle))}",
        "The authors print for DINOv2 ViT-S/14 and their 128-channel upsampler on a GPU, untiled "
        "(github.com/tldr-group/vulture, paper_figures): "
        + "; ".join(f"{side} px {seconds:.2f} s, {mib} MiB" for side, seconds, mib in LANDSCAPE)
        + ". Another machine and network: the growth compares, the level does not."]
    if options.out is not None:
        notes.insert(0, _draw(found, options.out))
    emit(markdown("Features: time and memory by image size", rows, ["phaseline", "onnxruntime", "opencv-python-headless"], notes),
         options.out)


def _row(found: Figures, way: str, size: int) -> dict[str, object]:
    here, classical = found[way, size], found["classical", size]
    return {"px": size, "features": way, "s": f"{here['seconds']:.2f}", "s a megapixel": f"{here['seconds'] / size**2 * 1e6:.2f}",
            "× classical": f"{here['seconds'] / classical['seconds']:.1f}", "peak MB": f"{here['peak_mb']:.0f}",
            "peak × classical": f"{here['peak_mb'] / classical['peak_mb']:.1f}"}


def _draw(found: Figures, out: Path) -> str:
    figure, panels = new_figure(2, width_in=4.8)
    ways = list(dict.fromkeys(way for way, _ in found))
    sizes = sorted({size for _, size in found})
    for panel, key, label in zip(panels, ("seconds", "peak_mb"), ("s an image", "peak MB"), strict=True):
        lines = {way: Line(sizes, [found[way, size][key] for size in sizes]) for way in ways}
        side, seconds, mib = (cast(Sequence[float], values) for values in zip(*LANDSCAPE, strict=True))
        published = seconds if key == "seconds" else [value * 1.048576 for value in mib]
        draw_lines({**lines, "paper, GPU": Line(side, published, published=True)}, "image side, px", label, panel, log=True)
    return save(figure, out)


if __name__ == "__main__":
    main()
