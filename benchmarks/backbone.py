"""Speed of exported backbones on CPUs against torch, in one process, engine after engine in every repeat."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.classical import micrograph
from benchmarks.report import emit, markdown
from phaseline.export.bundle_writer import ExportOptions, write_bundle
from phaseline.export.strided import StridedViT
from phaseline.export.weights import load_backbone
from phaseline.runtime.contract import F16, Precision
from phaseline.runtime.source import LocalSource

BACKBONE, WEIGHTS = "vit_small_patch14_dinov2", "random:0"
STRIDE_PX = 14
REFERENCE = "torch eager fp32"
TARGETS = {"ONNX Runtime fp32": 1.0, "ONNX Runtime int8": 1.7}
_PRECISIONS: dict[str, Precision] = {"ONNX Runtime fp32": "fp32", "ONNX Runtime int8": "int8"}


def run(repeats: int = 15, tile_px: int = 518, threads: int | None = None, backbone: str = BACKBONE,
        stride_px: int = STRIDE_PX) -> list[dict[str, Any]]:
    """Measure one forward pass of one tile, all outputs included.

    Parameters
    ----------
    repeats
        Each runs every engine once, one after the other.
    tile_px
        Side of the tile.
    threads
        For torch and ONNX Runtime alike; None for every core.
    backbone, stride_px
        What is measured, with random weights and without projection.

    Returns
    -------
    Rows with the keys ``engine``, ``seconds`` (median), ``ratio`` (median over the repeats of torch's time / its time),
    ``target`` and ``cosine`` (of the patch features to torch's).
    """
    count = threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            return _measure(_engines(Path(folder), tile_px, count, backbone, stride_px, stack), repeats)
    finally:
        torch.set_num_threads(before)


def _engines(
    folder: Path, tile_px: int, threads: int, backbone: str, stride_px: int, stack: contextlib.ExitStack
) -> dict[str, Callable[[], F16]]:
    model, _, _ = load_backbone(backbone, WEIGHTS)
    module = StridedViT(model, stride_px=stride_px, tile_px=tile_px, in_channels=1).eval()
    tiles = micrograph(tile_px)[None, None]

    def eager() -> F16:
        with torch.inference_mode():
            features: F16 = module(torch.from_numpy(tiles))[0].numpy()
        return features

    engines = {REFERENCE: eager}
    for name, precision in _PRECISIONS.items():
        options = ExportOptions(backbone=backbone, weights=WEIGHTS, stride_px=stride_px, tile_px=tile_px,
                                channels=model.embed_dim, precision=precision, max_batch=1)
        source = stack.enter_context(LocalSource(write_bundle(options, folder / precision), "cpu", threads))
        engines[name] = functools.partial(source.patch_features, tiles)
    return engines


def _measure(engines: dict[str, Callable[[], F16]], repeats: int
             ) -> list[dict[str, Any]]:
    first = {name: engine().astype(np.float64).ravel() for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine()
            times[name].append(time.perf_counter() - start)
    reference = first[REFERENCE]
    rows = []
    for name, seconds in times.items():
        ratios = [slow / fast for slow, fast in zip(times[REFERENCE], seconds, strict=True)]
        cosine = float(first[name] @ reference / (np.linalg.norm(first[name]) * np.linalg.norm(reference)))
        rows.append({"engine": name, "seconds": statistics.median(seconds), "ratio": statistics.median(ratios),
                     "target": f"≥ {TARGETS[name]}" if name in TARGETS else "", "cosine": cosine})
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tile", type=int, default=518)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = [{"engine": row["engine"], "s a tile": f"{row['seconds']:.3f}", "× as fast as torch": f"{row['ratio']:.2f}",
             "target": row["target"], "cosine to torch": f"{row['cosine']:.6f}"}
            for row in run(asked.repeats, asked.tile, asked.threads)]
    title = f"{BACKBONE} on a CPU: one tile of {asked.tile} px, stride {STRIDE_PX}, {asked.threads} threads"
    emit(markdown(title, rows, ["torch", "onnxruntime", "timm"], ["Random weights; medians of interleaved repeats."]), asked.out)


if __name__ == "__main__":
    main()
