"""A load generator, for sizing: concurrent requests for some seconds → throughput, latency, and the server's batches."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.kserve import (
    Tls,
    import_grpc,
    infer_request,
    json_parameter,
    model_parameters,
    open_channel,
    open_stub,
    server_error,
)
from phaseline.runtime.contract import PATCH_FEATURES, PIXEL_FEATURES, TILES, BundleSpec
from phaseline.runtime.errors import ServerError, UsageError
from phaseline.runtime.protocol import (
    BACKBONE,
    BUNDLE_PARAMETER,
    CONFIDENCE,
    FEATURES,
    IMAGE_INPUTS,
    LABELS,
    MAX_PIXELS_PARAMETER,
    RECIPE_PARAMETER,
    Priority,
    network_models,
    segment_model,
)

OUTPUTS = {BACKBONE: PATCH_FEATURES, FEATURES: PIXEL_FEATURES}
"""What is asked for of tiles, by model."""
STATISTICS_TIMEOUT_S = 10.0
_DISTINCT = 8
"""Different frames that take turns: enough that nothing is computed once for all."""
_DISTINCT_PIXELS = 1 << 26
"""Fewer of large ones."""


@dataclass(frozen=True)
class Load:
    """What is asked of a server.

    Attributes
    ----------
    server
        HOST:PORT.
    published
        Name of a recipe, whose ``segment_NAME`` gets frames; None: `model` gets tiles.
    concurrency
        Requests in flight.
    seconds
        For how long, after `warm_up_s` that are not counted.
    warm_up_s
        Seconds before.
    rows, cols
        Of a frame.
    dtype
        Of a frame's pixels; None: what the recipe was fitted on.
    timeout_s
        For each request.
    priority
        Of each request.
    tls
        Certificates.
    model
        ``backbone``, or ``features`` of a bundle with an upsampler.
    """

    server: str
    published: str | None = None
    concurrency: int = 8
    seconds: float = 10.0
    warm_up_s: float = 2.0
    rows: int = 1024
    cols: int = 1024
    dtype: str | None = None
    timeout_s: float = 60.0
    priority: Priority = "interactive"
    tls: Tls | None = None
    model: str = BACKBONE

    def __post_init__(self) -> None:
        if self.model not in OUTPUTS:
            raise UsageError(f"model is {self.model!r}, expected one of {' or '.join(OUTPUTS)}; recipes take --published")
        for name in ("concurrency", "rows", "cols", "seconds", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)}, expected more than 0")
        if self.dtype is not None and self.dtype not in IMAGE_INPUTS:
            raise UsageError(f"pixels of type {self.dtype!r} were asked for, expected one of {', '.join(IMAGE_INPUTS)}")


@dataclass(frozen=True)
class BatchCounts:
    """What a model's dynamic batcher did.

    Attributes
    ----------
    executions
        Batches that were run.
    inferences
        Tiles, or planes, that they held.
    """

    executions: int
    inferences: int

    @property
    def mean(self) -> float:
        """Inferences in a batch; NaN without any."""
        return self.inferences / self.executions if self.executions else float("nan")

    def since(self, before: BatchCounts) -> BatchCounts:
        """What was done after `before` was read."""
        return BatchCounts(self.executions - before.executions, self.inferences - before.inferences)


@dataclass
class LoadReport:
    """What came of it.

    Attributes
    ----------
    model
        The model that was asked.
    latencies_s
        float64 array: one for each request that ended well within the counted seconds.
    errors
        How often each kind of error came.
    seconds
        Counted seconds.
    request_bytes, answer_bytes
        Of one message.
    batches
        By the server's statistics for `backbone` and `features`, together, in these seconds.
    """

    model: str
    latencies_s: npt.NDArray[np.float64]
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    request_bytes: int = 0
    answer_bytes: int = 0
    batches: BatchCounts = BatchCounts(0, 0)

    @property
    def throughput(self) -> float:
        """Answered requests a second."""
        return len(self.latencies_s) / self.seconds

    def latency_s(self, percent: float) -> float:
        """Percentile of the latencies; NaN if no request ended well."""
        return float(np.percentile(self.latencies_s, percent)) if len(self.latencies_s) else float("nan")


def run_load(load: Load, progress: Callable[[float], None] | None = None) -> LoadReport:
    """Ask, and measure.

    Parameters
    ----------
    load
        What to ask.
    progress
        Called with the fraction of the time that is over, 0–1.

    Raises
    ------
    ServerError
        The server cannot be reached, has not the model, or does not tell its statistics. Requests that fail later are counted.
    """
    try:
        return asyncio.run(_run(load, progress))
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


async def _run(load: Load, progress: Callable[[float], None] | None) -> LoadReport:
    grpc = import_grpc()
    model = load.model if load.published is None else segment_model(load.published)
    async with open_channel(load.server, load.tls, asynchronous=True) as channel:
        stub = open_stub(channel)
        try:
            parameters = model_parameters(await stub.ModelConfig(_ask_config(model), timeout=load.timeout_s))
            spec = BundleSpec.from_json(parameters.get(BUNDLE_PARAMETER, ""))
            requests = _requests(parameters, spec, load, model)
            answer = await stub.ModelInfer(requests[0], timeout=load.timeout_s)
        except grpc.RpcError as error:
            raise server_error(error, load.server, model) from error
        report = LoadReport(model, np.empty(0), request_bytes=requests[0].ByteSize(), answer_bytes=answer.ByteSize())
        latencies: list[float] = []
        begin = time.perf_counter() + load.warm_up_s
        end = begin + load.seconds

        async def worker(number: int) -> None:
            turn = number
            while (start := time.perf_counter()) < end:
                try:
                    await stub.ModelInfer(requests[turn % len(requests)], timeout=load.timeout_s)
                except grpc.RpcError as error:
                    problem: ServerError = server_error(error, load.server, model)
                    if start >= begin:
                        report.errors[type(problem).__name__] += 1
                    # A server that refuses at once must not be asked in a tight loop.
                    await asyncio.sleep(0.05)
                else:
                    if start >= begin:
                        latencies.append(time.perf_counter() - start)
                turn += 1

        async with asyncio.TaskGroup() as group:
            for number in range(load.concurrency):
                group.create_task(worker(number))
            await asyncio.sleep(load.warm_up_s)
            before = await _statistics(stub, load.server, spec)
            while (now := time.perf_counter()) < end:
                if progress is not None:
                    progress(min(1.0, (now - begin) / load.seconds))
                await asyncio.sleep(min(0.2, max(0.0, end - now)))
        report.seconds = time.perf_counter() - begin
        after = await _statistics(stub, load.server, spec)
        report.latencies_s = np.array(latencies)
        report.batches = after.since(before)
        return report


async def _statistics(stub: Any, server: str, spec: BundleSpec) -> BatchCounts:
    grpc = import_grpc()
    executions = inferences = 0
    for model in network_models(spec):
        try:
            counts = _counts(await stub.ModelStatistics(_ask_statistics(model), timeout=STATISTICS_TIMEOUT_S))
        except grpc.RpcError as error:
            raise server_error(error, server, model) from error
        executions, inferences = executions + counts.executions, inferences + counts.inferences
    return BatchCounts(executions, inferences)


def _requests(parameters: Mapping[str, str], spec: BundleSpec, load: Load, model: str) -> list[Any]:
    """A few different messages of the right type and size."""
    random = np.random.default_rng(0)
    inputs: list[Mapping[str, npt.NDArray[Any]]]
    if load.published is None:
        shape: tuple[int, ...] = (1, spec.in_channels, spec.tile_px, spec.tile_px)
        inputs = [{TILES: _noise(random, shape, "uint8")} for _ in range(_DISTINCT)]
        outputs = [OUTPUTS[model]]
    else:
        recipe = json_parameter(parameters, RECIPE_PARAMETER, model)
        kind = {"float": "float32", None: "uint16"}.get(recipe["window_kind"], recipe["window_kind"])
        dtype = load.dtype or str(kind)
        shape = (1, load.rows, load.cols, *([3] if recipe["image_channels"] == 3 else []))
        pixels, most = load.rows * load.cols, int(parameters[MAX_PIXELS_PARAMETER])
        if pixels > most:
            raise UsageError(f"frames of {load.rows}×{load.cols} were asked for, and {load.server} takes at most {most} pixels; "
                             "ask for smaller ones, or start the server with a larger --max-pixels")
        distinct = max(1, min(_DISTINCT, _DISTINCT_PIXELS // pixels))
        inputs = [{IMAGE_INPUTS[dtype]: _noise(random, shape, dtype)} for _ in range(distinct)]
        outputs = [LABELS, CONFIDENCE]
    return [infer_request(model, given, outputs, request_id=f"load-{i}", priority=load.priority)
            for i, given in enumerate(inputs)]


def _noise(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    top = 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)
    return (random.random(shape) * top).astype(dtype)


def batch_counts(server: str, model: str = BACKBONE, tls: Tls | None = None) -> BatchCounts:
    """A model's statistics since the server loaded it.

    Raises
    ------
    ServerError
        As `kserve.server_error`.
    """
    grpc = import_grpc()
    with open_channel(server, tls) as channel:
        try:
            return _counts(open_stub(channel).ModelStatistics(_ask_statistics(model), timeout=STATISTICS_TIMEOUT_S))
        except grpc.RpcError as error:
            raise server_error(error, server, model) from error


def _ask_config(model: str) -> Any:
    from tritonclient.grpc import service_pb2 as pb

    return pb.ModelConfigRequest(name=model)


def _ask_statistics(model: str) -> Any:
    from tritonclient.grpc import service_pb2 as pb

    return pb.ModelStatisticsRequest(name=model)


def _counts(answer: Any) -> BatchCounts:
    return BatchCounts(*(sum(getattr(found, name) for found in answer.model_stats)
                         for name in ("execution_count", "inference_count")))
