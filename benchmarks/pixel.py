"""Pixel features on CPUs: the fused graph against the same networks in torch, and one pass an image against the published 51."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.classical import micrograph
from benchmarks.report import emit, markdown, table
from phaseline.export import calibration
from phaseline.export.forms import Parts, trace_graph
from phaseline.export.onnx_file import write_graphs
from phaseline.export.projection import Projection, fit_projection
from phaseline.export.upsampler_weights import random_upsampler
from phaseline.export.weights import load_backbone
from phaseline.runtime.compare import deviation
from phaseline.runtime.contract import F16, PIXEL_FEATURES, U8, Precision
from phaseline.runtime.ort import OrtEngine

BACKBONE, WEIGHTS = "vit_small_patch14_dinov2", "random:0"
CHANNELS, STRIDE_PX = 32, 14
REFERENCE = "torch eager fp32"
TARGETS = {"ONNX Runtime int8": 2.0}
_PRECISIONS: dict[str, Precision] = {"ONNX Runtime fp32": "fp32", "ONNX Runtime int8": "int8"}
# The published code fits its PCA to 50 views of the image before it projects the image itself.
PUBLISHED_PASSES = 51
Engines = dict[str, Callable[[], F16]]
# In a process of its own, without torch: what one tile needs, engine and weights included.
_PEAK = """
import sys
from pathlib import Path
import numpy as np
from benchmarks.memory import peak_bytes
from phaseline.runtime.ort import OrtEngine, import_onnxruntime
graph, side, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
import_onnxruntime()
before = peak_bytes()
with OrtEngine(graph, "cpu", threads) as engine:
    engine.run(np.zeros((1, 1, side, side), np.uint8), [sys.argv[4]])
print(peak_bytes() - before)
"""


def run(repeats: int = 15, tile_px: int = 518, threads: int | None = None, backbone: str = BACKBONE, passes: int = 3
        ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure 32 pixel features of one tile, and what the two ways to project cost.

    Parameters
    ----------
    repeats
        Each runs every engine once, one after the other.
    tile_px
        Side of the tile.
    threads
        For torch and ONNX Runtime alike; None for every core.
    backbone
        With random weights, stride 14 and a frozen projection; its upsampler has the published 32-channel one's sizes.
    passes
        Of the published way's 51, how many are timed; the rest is extrapolated.

    Returns
    -------
    Rows with the keys ``engine``, ``seconds`` (median), ``ratio`` (median over the repeats of torch's time / its time),
    ``target``, ``cosine`` (to torch's) and ``peak_mb`` (of the engine; None for torch); and rows with the keys ``way``,
    ``passes``, ``timed`` and ``seconds``, for the backbone in torch.
    """
    count = threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            parts, images = _parts(backbone, tile_px), calibration.load_images(None, 1)
            parts = replace(parts, projection=_projection(parts, images))
            tiles: U8 = micrograph(tile_px)[None, None]
            engines: Engines = {REFERENCE: functools.partial(_eager, parts.pixel_reference(), tiles)}
            graphs: dict[str, Path] = {}
            for name, precision in _PRECISIONS.items():
                graphs[name] = _write(parts, precision, images, Path(folder) / precision)
                engine = stack.enter_context(OrtEngine(graphs[name], "cpu", count))
                engines[name] = functools.partial(_exported, engine, tiles)
            rows = _measure(engines, repeats)
            for row in rows:
                graph = graphs.get(row["engine"])
                row["peak_mb"] = None if graph is None else _peak_mb(graph, tile_px, count)
            return rows, _projecting(functools.partial(_eager, parts.patch_module(), tiles), passes)
    finally:
        torch.set_num_threads(before)


def _parts(backbone: str, tile_px: int) -> Parts:
    upsampler = random_upsampler(0, channels=CHANNELS, patch_px=STRIDE_PX)
    return Parts(load_backbone(backbone, WEIGHTS)[0], None, upsampler, STRIDE_PX, tile_px, in_channels=1)


def _projection(parts: Parts, images: list[U8]) -> Projection:
    module = parts.patch_module()

    def tokens() -> Iterator[npt.NDArray[np.float32]]:
        for image in images:
            with torch.inference_mode():
                tile = next(calibration.views_of(image, parts.tile_px))
                yield module.float_maps(torch.from_numpy(tile))[0][0].flatten(1).T.numpy()

    return fit_projection(tokens(), parts.backbone.embed_dim, CHANNELS)


def _write(parts: Parts, precision: Precision, images: list[U8], folder: Path) -> Path:
    views = [next(calibration.views_of(image, parts.tile_px)) for image in images]
    model = trace_graph(parts, "cpu", precision, 1, views, pixels=True)
    folder.mkdir()
    return folder / write_graphs({"pixels": model}, folder)["pixels"]


def _eager(module: torch.nn.Module, tiles: U8) -> F16:
    with torch.inference_mode():
        made = module(torch.from_numpy(tiles))
        features: F16 = (made[0] if isinstance(made, tuple) else made).half().numpy()
    return features


def _exported(engine: OrtEngine, tiles: U8) -> F16:
    return engine.run(tiles, [PIXEL_FEATURES])[0]


def _measure(engines: Engines, repeats: int) -> list[dict[str, Any]]:
    first = {name: engine() for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine()
            times[name].append(time.perf_counter() - start)
    return [{"engine": name, "seconds": statistics.median(seconds),
             "ratio": statistics.median(slow / fast for slow, fast in zip(times[REFERENCE], seconds, strict=True)),
             "target": f"≥ {TARGETS[name]}" if name in TARGETS else "",
             "cosine": deviation(first[name], first[REFERENCE]).cosine} for name, seconds in times.items()]


def _peak_mb(graph: Path, tile_px: int, threads: int) -> float:
    command = [sys.executable, "-c", _PEAK, str(graph), str(tile_px), str(threads), PIXEL_FEATURES]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    return int(output) / 1e6


def _projecting(one_pass: Callable[[], object], timed: int) -> list[dict[str, Any]]:
    seconds = []
    for _ in range(timed):
        start = time.perf_counter()
        one_pass()
        seconds.append(time.perf_counter() - start)
    typical = statistics.median(seconds)
    return [{"way": "frozen projection", "passes": 1, "timed": timed, "seconds": typical},
            {"way": "PCA of the image's own views, as published", "passes": PUBLISHED_PASSES, "timed": timed,
             "seconds": PUBLISHED_PASSES * typical}]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tile", type=int, default=518)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--passes", type=int, default=3, help=f"of the published {PUBLISHED_PASSES}, how many to time")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    measured, projecting = run(asked.repeats, asked.tile, asked.threads, passes=asked.passes)
    rows = [{"engine": row["engine"], "s a tile": f"{row['seconds']:.3f}", "× as fast as torch": f"{row['ratio']:.2f}",
             "target": row["target"], "cosine to torch": f"{row['cosine']:.6f}",
             "peak memory, MB": "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"} for row in measured]
    passes = [{"projection": row["way"], "forward passes an image": row["passes"], "s an image": f"{row['seconds']:.2f}"}
              for row in projecting]
    title = f"{CHANNELS} pixel features on a CPU: one tile of {asked.tile} px, {BACKBONE} at stride {STRIDE_PX} and its upsampler"
    notes = [f"{asked.threads} threads; random weights, the published 32-channel upsampler's sizes; medians of interleaved "
             "repeats. Peak memory: what a fresh process adds to its imports by opening the graph and running one tile.",
             "\n".join(table(passes)),
             f"Backbone in torch; {asked.passes} passes timed, the {PUBLISHED_PASSES} extrapolated from their median, without "
             "the PCA itself."]
    emit(markdown(title, rows, ["torch", "onnxruntime", "timm"], notes), asked.out)


if __name__ == "__main__":
    main()
