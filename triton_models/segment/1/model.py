"""`segment_NAME`: raw frames → labels and confidence, by the very `Segmenter` that runs embedded."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from phaseline.clients.recipe import load_recipe
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.contract import BundleSpec
from phaseline.runtime.errors import UsageError
from phaseline.runtime.protocol import BUNDLE_PARAMETER, CONFIDENCE, IMAGE_INPUTS, LABELS, MAX_PIXELS_PARAMETER
from phaseline.triton_models.adapter import CancelledError, RequestLog, input_names, parameters, wanted_outputs
from phaseline.triton_models.backbone_source import BackboneSource

PLANES_AT_ONCE = 4
"""Planes worked on side by side: while one waits for `backbone`, others compute, and their tiles share its batches."""


class TritonPythonModel:
    """One recipe."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the recipe of this version."""
        settings = parameters(args)
        self._log = RequestLog(args)
        self._max_pixels = int(settings[MAX_PIXELS_PARAMETER])
        threads = int(settings["threads"])
        recipe = load_recipe(Path(settings["path"]) / args["model_version"], threads=threads, device=settings["device"])
        source = None if recipe.bundle is None else BackboneSource(BundleSpec.from_json(settings[BUNDLE_PARAMETER]))
        self._segmenter = Segmenter(recipe, source, threads)
        self._dtypes = {LABELS: recipe.classes.to_values(np.zeros(1, np.uint8)).dtype, CONFIDENCE: np.dtype(np.uint8)}
        self._workers = ThreadPoolExecutor(PLANES_AT_ONCE, "plane")

    def execute(self, requests: list[Any]) -> list[Any]:
        """All planes of all requests, side by side."""
        jobs = [_Job(request, self._segmenter, self._dtypes, self._max_pixels) for request in requests]
        for job in jobs:
            job.start(self._workers)
        return [job.response(self._log) for job in jobs]

    def finalize(self) -> None:
        """End the workers."""
        self._workers.shutdown()


class _Job:
    """One request."""

    def __init__(self, request: Any, segmenter: Segmenter, dtypes: dict[str, np.dtype[Any]], max_pixels: int) -> None:
        self._request = request
        self._segmenter = segmenter
        self._dtypes = dtypes
        self._max_pixels = max_pixels
        self._started = time.perf_counter()
        self._what = ""
        self._arrays: dict[str, Any] = {}
        self._planes: list[Future[None]] = []
        self._refusal: Exception | None = None

    def start(self, workers: ThreadPoolExecutor) -> None:
        try:
            frames = self._frames()
        except Exception as error:  # noqa: BLE001  Kept for the response.
            self._refusal = error
            return
        self._what = f"{frames.dtype} {'×'.join(map(str, frames.shape))}"
        wanted = wanted_outputs(self._request, (LABELS, CONFIDENCE))
        self._arrays = {name: np.empty(frames.shape[:3], self._dtypes[name]) for name in wanted}
        self._planes = [workers.submit(self._segment, frame, i) for i, frame in enumerate(frames)]

    def response(self, log: RequestLog) -> Any:
        problems = [problem for plane in self._planes if (problem := plane.exception()) is not None]
        error = self._refusal or next(iter(problems), None)
        if error is not None:
            return log.failure(self._request, error)
        log.done(self._request, self._what, time.perf_counter() - self._started)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in self._arrays.items()])

    def _segment(self, frame: Any, i: int) -> None:
        self._stop_if_cancelled()
        result = self._segmenter.segment(frame, progress=lambda _: self._stop_if_cancelled())
        for name, array in self._arrays.items():
            array[i] = result.labels if name == LABELS else result.confidence

    def _stop_if_cancelled(self) -> None:
        if self._request.is_cancelled():
            raise CancelledError

    def _frames(self) -> Any:
        came = input_names(self._request)
        if len(came) != 1:
            raise UsageError(f"{len(came)} images came ({', '.join(came) or 'none'}), expected exactly one of "
                             f"{', '.join(IMAGE_INPUTS.values())}")
        frames = pb_utils.get_input_tensor_by_name(self._request, came[0]).as_numpy()
        pixels = int(np.prod(frames.shape[:3]))
        if not 1 <= pixels <= self._max_pixels:
            raise UsageError(f"frames of shape {frames.shape} hold {pixels} pixels, expected 1 to {self._max_pixels}; send fewer "
                             "planes in a request, or start the server with a larger --max-pixels")
        return frames
