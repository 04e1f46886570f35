"""What serving costs against running embedded: throughput, bytes on the wire, and the client's share, in one run."""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.classical import micrograph
from benchmarks.report import emit, markdown, table
from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.fit import fit
from phaseline.clients.kserve import infer_request, open_channel, open_stub, output_arrays
from phaseline.clients.load import batch_counts
from phaseline.clients.remote import TritonSource
from phaseline.export.bundle_writer import ExportOptions, write_bundle
from phaseline.runtime.average import PixelSampling, ViewAverage
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import FeatureSource
from phaseline.runtime.source import LocalSource
from phaseline.runtime.transforms import TransformSet
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer

EMBEDDED, BY_TILE = "embedded, batch 8", "embedded, tile by tile (the default on CPUs)"
FRAME_PX = 1024
TARGET_RATIO = 0.9
LIMIT_MB = 2.1


def run(options: ExportOptions, tiles: int = 16, repeats: int = 5, threads: int | None = None, frame_px: int = FRAME_PX
        ) -> dict[str, list[dict[str, Any]]]:
    """Measure embedded and served, one after the other in every repeat.

    Parameters
    ----------
    options
        What to export and serve.
    tiles
        Tiles in a measurement.
    repeats
        The ratios are medians over them.
    threads
        Of the embedded engine and of the server's alike; None: every core.
    frame_px
        Side of the frame whose bytes are counted.

    Returns
    -------
    Rows of three tables: ``throughput``, ``bytes``, ``client``.
    """
    count = threads or os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = write_bundle(options, folder / "bundle")
        frame = micrograph(frame_px).astype(np.uint16) * 257
        labels = np.where(frame < np.percentile(frame, 10), 1, np.where(frame > np.percentile(frame, 90), 2, 0)).astype(np.uint8)
        fit([frame], [labels], classical=ClassicalFeatures(sigmas=(0, 1))).save(folder / "recipe")
        listening = Listening(grpc_port=0, http_port=0, metrics_port=0, shared_memory=True)
        with TritonServer(Deployment(bundle, threads=count), listening, recipes={"frames": folder / "recipe"},
                          log_file=folder / "log") as server:
            return {
                "throughput": _throughput(bundle, server.address, tiles, repeats, count),
                "bytes": _bytes(server.address, frame),
                "client": _client_share(server.address),
            }


def _throughput(bundle: Bundle, address: str, tiles: int, repeats: int, threads: int) -> list[dict[str, Any]]:
    spec = bundle.spec
    random = np.random.default_rng(0)
    batch = random.integers(0, 256, (tiles, spec.in_channels, spec.tile_px, spec.tile_px), np.uint8)
    with (
        LocalSource(bundle, "cpu", threads, batch=spec.max_batch) as embedded,
        LocalSource(bundle, "cpu", threads) as by_tile,
        TritonSource(address, transport="grpc") as by_grpc,
        TritonSource(address, transport="shared-memory") as by_memory,
    ):
        roads: dict[str, FeatureSource] = {EMBEDDED: embedded, BY_TILE: by_tile, "gRPC": by_grpc, "shared memory": by_memory}
        reference = embedded.patch_features(batch[: spec.max_batch])
        equal = {name: bool(np.array_equal(source.patch_features(batch[: spec.max_batch]), reference))
                 for name, source in roads.items()}
        seconds: dict[str, list[float]] = {name: [] for name in roads}
        before = batch_counts(address)
        for turn in range(repeats):
            # Turns begin with another road each, so that a machine that gets slower is no road's fault.
            for name in [*roads][turn % len(roads) :] + [*roads][: turn % len(roads)]:
                seconds[name].append(_seconds(functools.partial(roads[name].patch_features, batch)))
        batches = batch_counts(address).since(before)
    ratios = {name: [slow / fast for slow, fast in zip(seconds[EMBEDDED], taken, strict=True)] for name, taken in seconds.items()}
    return [
        {"road": name, "images/s": f"{tiles / statistics.median(taken):.3f}",
         "× batch 8": f"{statistics.median(ratios[name]):.3f}",
         "range": f"{min(ratios[name]):.3f}–{max(ratios[name]):.3f}",
         "asked": "" if name.startswith("embedded") else f"≥ {TARGET_RATIO}",
         "mean batch": "" if name.startswith("embedded") else f"{batches.mean:.2f}", "same bits": "yes" if equal[name] else "no"}
        for name, taken in seconds.items()
    ]


def _bytes(address: str, frame: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Bytes of one frame's messages, and of everything that went over the loopback meanwhile."""
    with open_channel(address) as channel:
        stub = open_stub(channel)
        rows = []
        for outputs in (["labels"], ["labels", "confidence"]):
            request = infer_request("segment_frames", {"image_uint16": frame[None]}, outputs)
            stub.ModelInfer(request)
            before = psutil.net_io_counters(pernic=True)["lo"].bytes_sent
            answer = stub.ModelInfer(request)
            wire = psutil.net_io_counters(pernic=True)["lo"].bytes_sent - before
            assert output_arrays(answer)["labels"].shape == (1, *frame.shape)
            rows.append({"asked for": " + ".join(outputs), "request, MB": f"{request.ByteSize() / 1e6:.3f}",
                         "answer, MB": f"{answer.ByteSize() / 1e6:.3f}", "both on the wire, MB": f"{wire / 1e6:.3f}",
                         "limit each way, MB": LIMIT_MB})
    return rows


def _client_share(address: str, transforms: str = "moore:2") -> list[dict[str, Any]]:
    """How long the client is busy with a tile's views: making, un-transforming and averaging them, and with messages."""
    with TritonSource(address, transport="grpc") as source:
        spec = source.spec
        views = TransformSet.parse(transforms, spec.stride_px)
        sampling = PixelSampling()
        tile = micrograph(spec.tile_px)[None].repeat(spec.in_channels, axis=0)
        average = ViewAverage((spec.tile_px, spec.tile_px), spec.channels, spec.patch_px, spec.stride_px, sampling)
        averaging = 0.0
        process = psutil.Process()
        busy_before, start = sum(process.cpu_times()[:2]), time.perf_counter()
        made = (view.apply(tile, sampling.boundary) for view in views.transforms)
        for view, features in zip(views.transforms, source.iter_patch_features(made), strict=True):
            averaging += _seconds(functools.partial(average.add, view, features))
        averaging += _seconds(average.mean)
        total = time.perf_counter() - start
        busy = sum(process.cpu_times()[:2]) - busy_before
    return [
        {"what": f"{len(views)} views of one tile through gRPC", "value": f"{total:.2f} s"},
        {"what": "un-transforming and averaging", "value": f"{averaging:.3f} s"},
        {"what": "**its share of the time**", "value": f"**{100 * averaging / total:.1f} %**"},
        {"what": "all that the client computes (CPU seconds)", "value": f"{busy:.3f} s"},
    ]


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
    parser.add_argument("--tiles", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    options = ExportOptions(asked.backbone, weights="random:0", tile_px=asked.tile, stride_px=asked.stride)
    tables = run(options, asked.tiles, asked.repeats, asked.threads)
    title = f"Serving against running embedded: {asked.backbone}, {asked.tile} px, stride {asked.stride}, {asked.threads} threads"
    note = (f"{asked.tiles} tiles in a measurement, medians of {asked.repeats} interleaved repeats; server and client share the "
            "machine.")
    page = markdown(title, tables["throughput"], ["onnxruntime", "nvidia-pytriton", "grpcio", "numpy"], [note])
    for heading, name in ((f"One frame of {FRAME_PX}×{FRAME_PX}, 16 bits, through `segment_NAME`", "bytes"),
                          ("The client's part", "client")):
        page += "\n".join(["", f"## {heading}", "", *table(tables[name])]) + "\n"
    emit(page, asked.out)


if __name__ == "__main__":
    main()
