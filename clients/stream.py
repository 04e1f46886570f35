"""Frames as they are taken → labels as they are made, for beamlines and microscopes: asyncio, no threads, bounded memory.

    offer, send ──▶ waiting: at most in_flight, each with a deadline ──▶ results      done, late or failed: each frame once
         └── Busy ◀── no room; nothing is dropped silently

    async with FrameStream("127.0.0.1:8001", "cells") as stream:
        await stream.send(Frame("scan12-00042", image))
        stream.end_input()
        async for result in stream.results():
            ...
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy.typing as npt

from phaseline.clients.kserve import RETRY_AFTER_S, Tls, infer_request, output_arrays, parse_servers
from phaseline.clients.served_recipe import ServedRecipe
from phaseline.clients.stream_frames import Busy, Counts, Frame, FrameResult, Results, Status
from phaseline.clients.stream_servers import OPEN_TIMEOUT_S, Servers
from phaseline.runtime.errors import ServerError, ServerFailedError, ServerTimeoutError, UsageError
from phaseline.runtime.protocol import CONFIDENCE, IMAGE_INPUTS, LABELS, PRIORITIES, Priority, segment_model

if TYPE_CHECKING:
    from tritonclient.grpc import service_pb2 as pb

__all__ = ["Busy", "Counts", "Frame", "FrameResult", "FrameStream"]

LEAST_RETRY_AFTER_S = 0.005
"""The least that `Busy` asks for: shorter pauses are not worth a timer."""
_ANSWERS_REMEMBERED = 32
log = logging.getLogger(__name__)


class FrameStream:
    """Segments frames on one or several servers; runs inside ``async with``, in one event loop.

    Leaving the block cancels what still waits. Memory is bounded by `in_flight` frames or their results: a result counts
    until it is read.

    Parameters
    ----------
    servers
        HOST:PORT, several separated by commas. Frames go to the one with fewest in flight; one that fails is left out for a
        while.
    recipe
        Name under which the recipe is served.
    in_flight
        The most frames that wait: accepted, and their results not read. Twice the servers' instances keep these at work.
    deadline_s
        Seconds from a frame's acceptance after which it is late. Until then it is sent again when a server is down, starting
        or busy.
    ordered
        Whether results come in the order of acceptance, or as they are made.
    confidence
        Whether the confidence comes too.
    priority
        ``interactive`` goes before ``batch`` on the server.
    tls
        Certificates; None: no encryption.

    Raises
    ------
    UsageError
        An argument that is none of these.
    MissingExtraError
        The extra ``client`` is not installed.
    """

    def __init__(
        self,
        servers: str,
        recipe: str,
        *,
        in_flight: int = 8,
        deadline_s: float = 5.0,
        ordered: bool = True,
        confidence: bool = False,
        priority: Priority = "interactive",
        tls: Tls | None = None,
    ) -> None:
        if in_flight < 1:
            raise UsageError(f"in_flight is {in_flight}, expected at least 1")
        if not 0 < deadline_s < float("inf"):
            raise UsageError(f"deadline_s is {deadline_s}, expected seconds above 0")
        if priority not in PRIORITIES:
            raise UsageError(f"priority is {priority!r}, expected one of {', '.join(PRIORITIES)}")
        self._addresses = parse_servers(servers)
        self._model = segment_model(recipe)
        self._in_flight = in_flight
        self._deadline_s = deadline_s
        self._ordered = ordered
        self._outputs = [LABELS, CONFIDENCE] if confidence else [LABELS]
        self._priority = priority
        self._tls = tls
        self._servers: Servers | None = None
        self._recipe: ServedRecipe | None = None
        self._waiting: dict[str, asyncio.Task[FrameResult]] = {}
        self._counts = Counts()
        self._seconds: collections.deque[float] = collections.deque(maxlen=_ANSWERS_REMEMBERED)
        self._changed = asyncio.Event()
        self._input_ended = False
        self._closed = False

    async def __aenter__(self) -> Self:
        """Connect; while no server serves the recipe, try for as long as the deadline, at most `OPEN_TIMEOUT_S`.

        Raises
        ------
        ServerError
            No server answers, or none has the recipe; or their recipes differ.
        """
        if self._servers is not None:
            raise UsageError("a stream is opened once; make another")
        async with contextlib.AsyncExitStack() as stack:
            self._servers = Servers(self._addresses, self._model, self._tls)
            stack.push_async_callback(self._servers.close)
            self._recipe = await self._servers.open(min(self._deadline_s, OPEN_TIMEOUT_S))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closed = self._input_ended = True
        self._changed.set()
        async with self._stack:
            for task in self._waiting.values():
                task.cancel()
            await asyncio.gather(*self._waiting.values(), return_exceptions=True)

    @property
    def recipe(self) -> ServedRecipe:
        """The recipe that makes all labels; once another is published, frames fail with `ServerRefusedError`: open anew."""
        if self._recipe is None:
            raise UsageError("the stream is not open; use it inside `async with`")
        return self._recipe

    @property
    def counts(self) -> Counts:
        """Where all frames are, now."""
        return dataclasses.replace(self._counts, waiting=len(self._waiting))

    def offer(self, frame: Frame) -> Busy | None:
        """Give a frame, if there is room.

        Parameters
        ----------
        frame
            Its pixels are copied: the array may be used again at once.

        Returns
        -------
        None: accepted. Busy: not accepted, counted as such, and no result will come.

        Raises
        ------
        ImageError
            The recipe cannot segment this image.
        UsageError
            A frame of this id waits already, or no more frames are taken.
        """
        planes = self._check(frame)
        if self._is_full():
            self._count("busy", sent=1)
            return Busy(frame.id, self._retry_after_s())
        self._accept(frame, planes)
        return None

    async def send(self, frame: Frame) -> None:
        """Give a frame, and wait until there is room: until another task reads a result, if need be. Raises as `offer`."""
        self._check(frame)
        await self._until(lambda: self._input_ended or not self._is_full())
        self._accept(frame, self._check(frame))

    def end_input(self) -> None:
        """Take no more frames: `results` ends when it has given all that wait."""
        self._input_ended = True
        self._changed.set()

    def results(self) -> Results:
        """Results, each once, until `end_input` was called and all are given.

        ``anext`` may be given up and repeated: ``asyncio.wait_for(anext(results), 1.0)``.
        """
        return Results(self._take)

    async def _take(self) -> FrameResult | None:
        await self._until(lambda: self._closed or self._ready() is not None or (self._input_ended and not self._waiting))
        frame_id = None if self._closed else self._ready()
        if frame_id is None:
            return None
        result = self._waiting.pop(frame_id).result()
        self._count(result.status)
        self._changed.set()
        return result

    def _check(self, frame: Frame) -> npt.NDArray[Any]:
        """The frame's image as it is sent."""
        if self._input_ended:
            raise UsageError(f"frame {frame.id!r} came after the end of the input; open another stream")
        if frame.id in self._waiting:
            raise UsageError(f"frame {frame.id!r} came while another of this id waits; give each an id of its own")
        return self.recipe.planes(frame.image)

    def _accept(self, frame: Frame, planes: npt.NDArray[Any]) -> None:
        accepted = time.monotonic()
        message = infer_request(self._model, {IMAGE_INPUTS[planes.dtype.name]: planes}, self._outputs, request_id=frame.id,
                                priority=self._priority)
        # Only the message keeps the pixels from here on.
        result = functools.partial(FrameResult, frame.id, frame.timestamp, frame.metadata)
        shape = planes.shape[:3] if planes.ndim == frame.image.ndim else planes.shape[1:3]
        task = asyncio.create_task(self._segment(message, shape, result, accepted))
        task.add_done_callback(lambda _: self._changed.set())
        self._waiting[frame.id] = task
        self._count(None, sent=1)

    async def _segment(
        self, message: pb.ModelInferRequest, shape: tuple[int, ...], result: Callable[..., FrameResult], accepted: float
    ) -> FrameResult:
        assert self._servers is not None
        try:
            answer = await self._servers.infer(message, accepted + self._deadline_s)
            arrays = self._arrays(answer, message.id, shape)
        except ServerError as error:
            status: Status = "late" if isinstance(error, ServerTimeoutError) else "failed"
            # Its traceback would keep the message, and the pixels in it, for as long as the result is kept.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            return result(status, time.monotonic() - accepted, error=error)
        except Exception as error:  # Each frame has a result, whatever happens.
            log.exception("frame %r failed unexpectedly", message.id)
            failure = ServerFailedError(f"frame {message.id!r} failed unexpectedly ({error!r}); see the log, and report it")
            return result("failed", time.monotonic() - accepted, error=failure)
        seconds = time.monotonic() - accepted
        self._seconds.append(seconds)
        return result("done", seconds, **arrays, version=int(answer.model_version), recipe_hash=self.recipe.hash)

    def _arrays(self, answer: pb.ModelInferResponse, frame_id: str, shape: tuple[int, ...]) -> dict[str, npt.NDArray[Any]]:
        """Labels and confidence, by name; an answer to anything else is a failure."""
        found = output_arrays(answer)
        planes = (1, *shape)[-3:]
        fits = [name in found and found[name].shape == planes and found[name].dtype.kind == "u" for name in self._outputs]
        if answer.id != frame_id or not answer.model_version.isdecimal() or not all(fits):
            came = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in found.items()) or "nothing"
            raise ServerFailedError(f"the answer to frame {frame_id!r} has id {answer.id!r}, version "
                                    f"{answer.model_version!r} and {came}, expected {' and '.join(self._outputs)} of shape "
                                    f"{planes}; do server and client have the same version of phaseline?")
        return {name: found[name].reshape(shape) for name in self._outputs}

    def _is_full(self) -> bool:
        return len(self._waiting) >= self._in_flight

    def _ready(self) -> str | None:
        """The frame whose result comes next; None: not yet."""
        candidates = itertools.islice(self._waiting.items(), 1 if self._ordered else None)
        return next((frame_id for frame_id, task in candidates if task.done()), None)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def _count(self, what: str | None, sent: int = 0) -> None:
        changes = {"sent": self._counts.sent + sent}
        if what is not None:
            changes[what] = getattr(self._counts, what) + 1
        self._counts = dataclasses.replace(self._counts, **changes)

    def _retry_after_s(self) -> float:
        if not self._seconds:
            return RETRY_AFTER_S
        return max(LEAST_RETRY_AFTER_S, sum(self._seconds) / len(self._seconds) / self._in_flight)
