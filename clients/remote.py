"""`TritonSource`: a bundle's features, computed by Triton servers.

    tiles ─▶ window ─┬─ one request a tile ─▶ server A      `backbone` or `features`, whose batcher merges what comes together
                     └─ … ──────────────────▶ server B
             results, in order ◀─ the window's oldest
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Self, get_args

import numpy as np

from phaseline.clients.kserve import RequestIds, Tls, infer_request, output_arrays
from phaseline.clients.remote_memory import Region, Regions, is_forgotten, why_not_here
from phaseline.clients.remote_server import Cancellation, Server
from phaseline.clients.remote_servers import Servers
from phaseline.runtime.contract import ATTENTION, F16, PATCH_FEATURES, PIXEL_FEATURES, TILES, U8, BundleSpec
from phaseline.runtime.errors import (
    BundleError,
    EngineError,
    OutputError,
    ServerFailedError,
    ServerRefusedError,
    ServerUnavailableError,
    UsageError,
)
from phaseline.runtime.protocol import BACKBONE, BUNDLE_PARAMETER, PRIORITIES, Priority, model_of
from phaseline.runtime.source import check_tiles, pixel_batch

Transport = Literal["auto", "grpc", "shared-memory"]
TRANSPORTS: tuple[Transport, ...] = get_args(Transport)
MIN_IN_FLIGHT = 4
log = logging.getLogger(__name__)


class TritonSource:
    """Asks servers for features; opens on ``with``.

    A server that cannot be reached is left out and tried again, and its tiles go to the others. Results are those of the
    bundle, whichever server computed them: all must serve the same one.

    Parameters
    ----------
    servers
        HOST:PORT, one or several.
    transport
        ``grpc``, ``shared-memory`` (servers on this host that allow it), or ``auto``: shared memory where it is possible,
        and `engine_choice` says why it is not.
    in_flight
        The most tiles that are asked for at once. None: enough for two full batches at each server, which for pixel features hold
        `pixel_batch` tiles.
    timeout_s
        Seconds for each tile, waiting and other attempts included; with several usable servers, one attempt gets half of them.
    priority
        Which requests the server does first: ``interactive`` before ``batch``.
    tls
        Certificates; None: no encryption.

    Raises
    ------
    UsageError
        A parameter is wrong.
    ServerUnavailableError
        On opening: no server answers.
    ServerRefusedError
        On opening: a server is not one of phaseline's, or does not take shared memory that was asked for.
    BundleError
        On opening: the servers' bundles differ.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        *,
        transport: Transport = "auto",
        in_flight: int | None = None,
        timeout_s: float = 60.0,
        priority: Priority = "batch",
        tls: Tls | None = None,
    ) -> None:
        if transport not in TRANSPORTS:
            raise UsageError(f"transport is {transport!r}, expected one of {', '.join(TRANSPORTS)}")
        if priority not in PRIORITIES:
            raise UsageError(f"priority is {priority!r}, expected one of {', '.join(PRIORITIES)}")
        if in_flight is not None and in_flight < 1:
            raise UsageError(f"{in_flight} tiles in flight were asked for, expected at least 1")
        self._servers = Servers(servers, self._check, timeout_s, tls)
        self._transport: Transport = transport
        self._in_flight = in_flight
        self._priority: Priority = priority
        self._request_ids = RequestIds()
        self._spec: BundleSpec | None = None
        self._reference = ""
        self._regions: dict[str, Regions] = {}
        self._no_room: dict[str, str] = {}
        self._lock = threading.Lock()
        self._cancellations: set[Cancellation] = set()
        self._stack = contextlib.ExitStack()
        self._workers: ThreadPoolExecutor | None = None

    @property
    def spec(self) -> BundleSpec:
        """What the servers compute."""
        if self._spec is None:
            raise EngineError("the source is not open; use it inside `with`")
        return self._spec

    @property
    def bundle_hash(self) -> str:
        """Digest of the servers' bundle."""
        return self.spec.digest()

    @property
    def engine_choice(self) -> str:
        """The servers, and how each is talked to or why it is left out, in one line."""
        return self._servers.description

    def in_flight(self, output: str = PATCH_FEATURES) -> int:
        """The most tiles of which an output is asked for at once."""
        batch = pixel_batch(self.spec) if output == PIXEL_FEATURES else self.spec.max_batch
        return self._in_flight or max(MIN_IN_FLIGHT, 2 * batch * len(self._servers.all))

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._servers)
            stack.callback(self._close_regions)
            self._servers.open()
            self._workers = stack.enter_context(ThreadPoolExecutor(self.in_flight(), "phaseline tile"))
            stack.callback(self._cancel)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._workers = None
        self._stack.close()

    def patch_features(self, tiles: U8) -> F16:
        """Projected patch features: float16 array of shape (n, k, h, w) of uint8 tiles (n, in_channels, T, T)."""
        check_tiles(tiles, self.spec)
        return np.stack(list(self._each(tiles, PATCH_FEATURES)))

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_patch_features`; takes `in_flight` tiles ahead. Closing it ends what is under way."""
        return self._each(tiles, PATCH_FEATURES)

    def pixel_features(self, tiles: U8) -> F16:
        """Features of every pixel: float16 array of shape (n, k', T, T); `UsageError` if the servers' bundle has no upsampler."""
        check_tiles(tiles, self.spec)
        return np.stack(list(self._each(tiles, PIXEL_FEATURES)))

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_pixel_features`; takes `in_flight` tiles ahead. Closing it ends what is under way."""
        return self._each(tiles, PIXEL_FEATURES)

    def attention(self, tiles: U8) -> F16:
        """[CLS] attention of the last block: float16 array of shape (n, heads, h, w)."""
        check_tiles(tiles, self.spec)
        return np.stack(list(self._each(tiles, ATTENTION)))

    def _each(self, tiles: Iterable[U8], name: str) -> Iterator[F16]:
        """One output of each tile, float16 of shape (…, rows, cols), in order."""
        spec, workers, rest = self.spec, self._workers, iter(tiles)
        if workers is None:
            raise EngineError("the source is not open; use it inside `with`")
        if name not in _shapes(spec):
            raise UsageError(f"the bundle that {self._reference} serves has no upsampler, so it gives no pixel features; use "
                             "bilinear interpolation, or serve a bundle that was exported with --upsampler")
        most = self.in_flight(name)
        cancellation = Cancellation()
        window: collections.deque[Future[F16]] = collections.deque()
        self._cancellations.add(cancellation)

        def fill() -> None:
            while len(window) < most and (tile := next(rest, None)) is not None:
                check_tiles(tile[None], spec)
                # A copy: the caller may use the tile's memory for the next one.
                window.append(workers.submit(self._ask, np.array(tile[None], order="C"), name, cancellation))

        try:
            fill()
            while window:
                features = window.popleft().result()
                # Filled before the consumer works on these features, so that the servers work meanwhile.
                fill()
                yield features
        finally:
            self._servers.cancel(cancellation)
            self._cancellations.discard(cancellation)
            concurrent.futures.wait(window)

    def _ask(self, tile: U8, name: str, cancellation: Cancellation) -> F16:
        """One output, of shape (…, rows, cols), of a tile of shape (1, in_channels, T, T), from any server."""
        shape = (1, *_shapes(self.spec)[name])

        def work(server: Server, timeout_s: float) -> F16:
            if (regions := self._regions.get(server.address)) is not None:
                try:
                    with regions.lend(2 * math.prod(shape)) as region:
                        return self._through(region, server, tile, name, shape, timeout_s, cancellation)
                except OutputError as error:
                    self._do_without(server, error)
            request = self._request({TILES: tile}, name, [name], timeout_s)
            found = output_arrays(server.infer(request, timeout_s, cancellation)).get(name)
            if found is None or found.dtype != np.float16 or found.shape != shape:
                came = "none" if found is None else f"{found.dtype} of shape {found.shape}"
                raise _garbled(server, name, came, shape)
            return np.asarray(found[0], np.float16)

        return self._servers.ask(work, cancellation)

    def _through(
        self, region: Region, server: Server, tile: U8, name: str, shape: tuple[int, ...], timeout_s: float,
        cancellation: Cancellation,
    ) -> F16:
        """As `_ask`, by one server, through shared memory."""
        request = self._request({TILES: region.write(tile)}, name, {name: region.output()}, timeout_s)
        try:
            answer = server.infer(request, timeout_s, cancellation)
        except ServerRefusedError as error:
            if not is_forgotten(error):
                raise
            # It was restarted without having been missed: checked again, it gets new regions.
            raise ServerUnavailableError(f"{server.address} was restarted: {error}") from error
        written = [(tensor.name, tensor.datatype, tuple(tensor.shape)) for tensor in answer.outputs]
        if written != [(name, "FP16", shape)] or any(answer.raw_output_contents):
            raise _garbled(server, name, str(written), shape)
        return np.asarray(region.read(np.float16, shape)[0], np.float16)

    def _request(self, inputs: Any, name: str, outputs: Any, timeout_s: float) -> Any:
        return infer_request(model_of(name), inputs, outputs, request_id=self._request_ids.next(), priority=self._priority,
                             queue_timeout_s=timeout_s)

    def _do_without(self, server: Server, error: OutputError) -> None:
        """Ask a server by gRPC from now on, since a region found no room; raises the error if shared memory was asked for."""
        if self._transport == "shared-memory":
            raise error
        with self._lock:
            self._no_room[server.address] = str(error)
            regions = self._regions.pop(server.address, None)
        if regions is not None:
            log.warning("%s is asked by gRPC from now on: %s", server.address, error)
            server.transport = f"gRPC: {error}"
            regions.close()

    def _check(self, server: Server, timeout_s: float) -> None:
        """Refuse a server of another bundle, and choose how to talk to it."""
        parameters = server.parameters(BACKBONE, timeout_s)
        if BUNDLE_PARAMETER not in parameters:
            raise ServerRefusedError(f"{server.address}: model {BACKBONE} names no bundle; is this a phaseline server?")
        spec = BundleSpec.from_json(parameters[BUNDLE_PARAMETER])
        with self._lock:
            if self._spec is None:
                self._spec, self._reference = spec, server.address
            elif spec.digest() != self._spec.digest():
                raise BundleError(f"{server.address} serves bundle {spec.digest()[:12]}, but {self._reference} serves "
                                  f"{self._spec.digest()[:12]}; use servers of the same bundle together")
            if not server.problem and server.address in self._regions:
                return
            if regions := self._regions.pop(server.address, None):
                regions.close()
        reason = None
        if self._transport != "shared-memory":
            reason = self._no_room.get(server.address) or why_not_here(server.address)
        if self._transport == "grpc" or reason is not None:
            server.transport = "gRPC" if self._transport == "grpc" else f"gRPC: {reason}"
            return
        try:
            regions = Regions(
                lambda procedure, message, seconds: server.call(procedure, message, seconds, BACKBONE),
                spec.in_channels * spec.tile_px**2, 2 * math.prod(_shapes(spec)[PATCH_FEATURES]),
            )
        except (ServerRefusedError, ServerFailedError, OutputError) as error:
            if self._transport == "shared-memory":
                raise ServerRefusedError(f"shared memory with {server.address} is impossible ({error}); use --transport grpc, or "
                                         "run the server here with --shared-memory") from error
            log.info("%s is asked by gRPC, without shared memory: %s", server.address, error)
            server.transport = f"gRPC: no shared memory, {error}"
            return
        with self._lock:
            self._regions[server.address] = regions
        server.transport = "shared memory"

    def _cancel(self) -> None:
        for cancellation in list(self._cancellations):
            self._servers.cancel(cancellation)

    def _close_regions(self) -> None:
        for regions in self._regions.values():
            regions.close()
        self._regions.clear()


def _shapes(spec: BundleSpec) -> dict[str, tuple[int, int, int]]:
    """Shapes of a tile's outputs."""
    shapes = {PATCH_FEATURES: (spec.channels, spec.grid, spec.grid), ATTENTION: (spec.heads, spec.grid, spec.grid)}
    return shapes | ({PIXEL_FEATURES: (spec.pixel_channels, spec.tile_px, spec.tile_px)} if spec.has_upsampler else {})


def _garbled(server: Server, name: str, came: str, shape: tuple[int, ...]) -> ServerFailedError:
    return ServerFailedError(f"{server.address}, {model_of(name)}: {came} came, expected {name}, float16 of shape {shape}; do "
                             "server and client have the same version of phaseline?")
