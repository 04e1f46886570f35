"""Many clients for a while: every answer right, no deadlock, and memory that does not grow."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.classical import micrograph
from benchmarks.report import emit, markdown
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.kserve import infer_request, open_channel, open_stub, output_arrays
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.bundle import Bundle, open_bundle
from phaseline.runtime.contract import PATCH_FEATURES, TILES
from phaseline.runtime.source import LocalSource
from phaseline.triton_models.listening import Listening
from phaseline.triton_models.repository import Deployment
from phaseline.triton_models.server import TritonServer

CLIENTS = 64
MAX_GROWTH_MB = 100
REQUEST_TIMEOUT_S = 120.0
_DISTINCT = 8


def run(bundle: Bundle, clients: int = CLIENTS, seconds: float = 120.0, warm_up_s: float = 30.0, frame_px: int = 128
        ) -> list[dict[str, Any]]:
    """Three clients in four send frames to a recipe, every fourth tiles to `backbone`, with the priority that `TritonSource`
    and `FrameStream` use; each has a connection of its own.

    Parameters
    ----------
    bundle
        What is served.
    clients
        How many ask at once.
    seconds, warm_up_s
        How long memory is watched, and for how long everybody asks before.
    frame_px
        Side of a frame.

    Returns
    -------
    Rows of a table.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frames = [micrograph(frame_px + 8 * i)[:frame_px, -frame_px:].astype(np.uint16) * 257 for i in range(_DISTINCT)]
        labels = [np.where(frame < np.median(frame), 1, 2).astype(np.uint8) for frame in frames]
        tiles = np.stack([micrograph(bundle.spec.tile_px + i)[i:, i:][None] for i in range(_DISTINCT)])
        with LocalSource(bundle, "cpu") as source:
            recipe = fit(frames[:1], labels[:1], source=source, deep=DeepFeatures.for_bundle(bundle.spec))
            recipe.save(folder / "recipe")
            segmenter = Segmenter(recipe, source)
            expected_labels = [segmenter.segment(frame).labels for frame in frames]
            expected_features = source.patch_features(tiles)
        listening = Listening(grpc_port=0, http_port=0, metrics_port=0)
        with TritonServer(Deployment(bundle, threads=os.cpu_count() or 1), listening, recipes={"frames": folder / "recipe"},
                          log_file=folder / "log") as server:
            jobs = [
                (infer_request("segment_frames", {"image_uint16": frame[None]}, ["labels"]), "labels", labels[None])
                for frame, labels in zip(frames, expected_labels, strict=True)
            ], [
                (infer_request("backbone", {TILES: tile[None]}, [PATCH_FEATURES], priority="batch"), PATCH_FEATURES,
                 features[None])
                for tile, features in zip(tiles, expected_features, strict=True)
            ]
            return asyncio.run(_soak(server, jobs, clients, seconds, warm_up_s))


async def _soak(server: TritonServer, jobs: tuple[list[Any], list[Any]], clients: int, seconds: float, warm_up_s: float
                ) -> list[dict[str, Any]]:
    counts: Counter[str] = Counter()
    end = time.monotonic() + warm_up_s + seconds

    async def client(number: int) -> None:
        mine = jobs[1] if number % 4 == 3 else jobs[0]
        async with open_channel(server.address, asynchronous=True) as channel:
            stub = open_stub(channel)
            turn = number
            while time.monotonic() < end:
                request, name, expected = mine[turn % _DISTINCT]
                # No answer in time is what a deadlock would look like: it fails the run.
                answer = output_arrays(await stub.ModelInfer(request, timeout=REQUEST_TIMEOUT_S))[name]
                counts["right" if np.array_equal(answer, expected) else "wrong"] += 1
                turn += 1

    memory: list[float] = []

    async def watch() -> None:
        await asyncio.sleep(warm_up_s)
        while time.monotonic() < end:
            memory.append(resident_mb(server.pid))
            await asyncio.sleep(min(2.0, seconds / 8))

    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        group.create_task(watch())
        for number in range(clients):
            group.create_task(client(number))
    took = time.monotonic() - started
    return [
        {"what": "clients", "value": clients, "asked": ""},
        {"what": "answers", "value": f"{counts.total()} in {took:.0f} s", "asked": ""},
        {"what": "wrong answers", "value": counts["wrong"], "asked": 0},
        {"what": "errors, time-outs", "value": 0, "asked": "0 (the first one ends the run)"},
        {"what": "resident memory after warm-up, all processes", "value": f"{memory[0]:.0f} MB", "asked": ""},
        {"what": "highest afterwards", "value": f"{max(memory):.0f} MB", "asked": ""},
        {"what": "**growth**", "value": f"**{max(memory) - memory[0]:.0f} MB**", "asked": f"≤ {MAX_GROWTH_MB} MB"},
        {"what": "restarts of the server", "value": len(server.restarts), "asked": 0},
    ]


def resident_mb(pid: int) -> float:
    """Resident memory of a server and its back-end processes, MB; what they share counts once for each."""
    server = psutil.Process(pid)
    return float(sum(process.memory_info().rss for process in [server, *server.children(recursive=True)]) / 1e6)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default="default")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warm-up", type=float, default=30.0)
    parser.add_argument("--frame", type=int, default=128)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    rows = run(open_bundle(asked.bundle), asked.clients, asked.seconds, asked.warm_up, asked.frame)
    title = f"{asked.clients} clients for {asked.seconds:.0f} s: bundle {asked.bundle}, frames of {asked.frame} px"
    emit(markdown(title, rows, ["nvidia-pytriton", "onnxruntime", "xgboost", "grpcio"]), asked.out)


if __name__ == "__main__":
    main()
