"""Several servers of one recipe behind one call, which tries until the deadline.

    infer ──▶ the server with fewest requests in flight ──▶ answer
                 ▲                 │
                 └── left out ◀────┴── down, starting, busy or silent: 0.1 s, doubled at each failure, at most 2 s

A frame's labels do not depend on how often it was asked for: an attempt whose end is unknown may be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phaseline.clients.kserve import Tls, import_grpc, model_parameters, open_channel, open_stub, server_error, set_queue_timeout
from phaseline.clients.served_recipe import ServedRecipe
from phaseline.runtime.errors import (
    ServerBusyError,
    ServerError,
    ServerRefusedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
)

if TYPE_CHECKING:
    from tritonclient.grpc import service_pb2 as pb

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
FRESH_S = 2.0
"""A server that was not heard from for longer is described again before it is asked: another may be in its place."""
OPEN_TIMEOUT_S = 10.0
"""The longest that opening takes: a server that died, and does not know its recipes yet, is back by then."""
# A recipe that was served and is unknown is one whose server is starting.
_PASSING = (ServerUnavailableError, ServerBusyError, ServerTimeoutError, UnknownModelError)


class Servers:
    """Servers that serve the same recipe.

    Parameters
    ----------
    addresses
        HOST:PORT of each.
    model
        Name of the recipe's model.
    tls
        Certificates; None: no encryption.
    """

    def __init__(self, addresses: Sequence[str], model: str, tls: Tls | None) -> None:
        self._model = model
        self._servers = [_Server(address, tls) for address in addresses]
        self._recipe: ServedRecipe | None = None

    async def open(self, timeout_s: float) -> ServedRecipe:
        """Read the recipe; one server that answers is enough. Until then they are asked again.

        Raises
        ------
        ServerUnavailableError, ServerTimeoutError, UnknownModelError
            None had the recipe in the time allowed.
        ServerRefusedError
            They have different ones under this name, or it is none of phaseline's.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = max(deadline - time.monotonic(), FIRST_PAUSE_S)
            found = await asyncio.gather(*(self._describe(server, left_s) for server in self._servers), return_exceptions=True)
            problems = [problem for problem in found if isinstance(problem, BaseException)]
            for problem in problems:
                if not isinstance(problem, _PASSING):
                    raise problem
            if self._recipe is not None:
                return self._recipe
            if time.monotonic() >= deadline:
                raise problems[0]
            await asyncio.sleep(min(server.pause_s for server in self._servers))

    async def close(self) -> None:
        """Close all connections."""
        for server in self._servers:
            await server.connection.channel.close()

    async def infer(self, request: pb.ModelInferRequest, deadline: float) -> pb.ModelInferResponse:
        """Ask until there is an answer.

        Parameters
        ----------
        request
            The message; its queue timeout is set for each attempt.
        deadline
            On `time.monotonic`.

        Raises
        ------
        ServerTimeoutError
            The deadline is over; the text tells the last reason.
        ServerRefusedError
            Another attempt would end alike, or another recipe was published: the answer is always the opened one's.
        ServerFailedError
            Another attempt would end alike.
        """
        reason: ServerError | None = None
        while (left_s := deadline - time.monotonic()) > 0:
            server = min(self._servers, key=_Server.rank)
            if (pause_s := server.pause_s) > 0:
                await asyncio.sleep(min(pause_s, left_s))
                continue
            try:
                with server.counted():
                    recipe = server.recipe or await self._describe(server, left_s)
                    answer = await self._ask(server, request, deadline)
                version = answer.model_version
                # What is no version is the stream's to refuse.
                if version == str(recipe.version) or not version.isdecimal():
                    return answer
                # Described again before it is asked again: the same recipe under another number goes on.
                server.leave_out()
                reason = ServerUnavailableError(f"{server.address}: version {version} of {self._model} was published")
            except _PASSING as error:
                reason = error
        raise ServerTimeoutError(f"{self._model}: no labels within the deadline; the last reason: "
                                 f"{reason or 'no server was to be asked'}") from reason

    async def _ask(self, server: _Server, request: pb.ModelInferRequest, deadline: float) -> pb.ModelInferResponse:
        left_s = max(deadline - time.monotonic(), 1e-3)
        set_queue_timeout(request, left_s)
        return await self._call(server, "ModelInfer", request, left_s)

    async def _describe(self, server: _Server, timeout_s: float) -> ServedRecipe:
        """Make sure that a server has the same recipe as the others."""
        from tritonclient.grpc import service_pb2 as pb

        answer = await self._call(server, "ModelConfig", pb.ModelConfigRequest(name=self._model), timeout_s)
        recipe = ServedRecipe.from_parameters(model_parameters(answer), self._model)
        if self._recipe is None:
            self._recipe = recipe
        elif recipe.hash != self._recipe.hash:
            raise ServerRefusedError(f"{server.address} serves recipe {recipe.hash[:12]} as {self._model}, but the stream began "
                                     f"with {self._recipe.hash[:12]}: another was published; publish the same to all, then open "
                                     "the stream again")
        server.recipe = recipe
        return recipe

    async def _call(self, server: _Server, procedure: str, message: Any, timeout_s: float) -> Any:
        grpc = import_grpc()
        connection = server.connection
        connection.calls += 1
        begun = time.monotonic()
        try:
            answer = await getattr(connection.stub, procedure)(message, timeout=timeout_s)
        except grpc.RpcError as error:
            problem = server_error(error, server.address, self._model)
            # A server that answered others meanwhile is not gone: this frame is merely late.
            is_late = isinstance(problem, ServerTimeoutError) and server.heard_at > begun
            if isinstance(problem, _PASSING) and not is_late:
                server.leave_out()
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED and connection is server.connection:
                    # Perhaps the connection hangs, as one that a firewall forgot does: the next call takes a new one.
                    server.connection = _Connection(server.address, server.tls)
            raise problem from error
        else:
            server.welcome()
            return answer
        finally:
            connection.calls -= 1
            if connection is not server.connection and not connection.calls:
                await connection.channel.close()


class _Connection:
    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel = open_channel(address, tls, asynchronous=True)
        self.stub = open_stub(self.channel)
        self.calls = 0


class _Server:
    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        self.tls = tls
        self.connection = _Connection(address, tls)
        self.heard_at = 0.0
        self._recipe: ServedRecipe | None = None
        self._in_flight = 0
        self._failures = 0
        self._back_at = 0.0

    @property
    def recipe(self) -> ServedRecipe | None:
        """What it serves; None: it has to be described, for the first time or since it may have been replaced."""
        if self._in_flight <= 1 and time.monotonic() - self.heard_at > FRESH_S:
            return None
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: ServedRecipe) -> None:
        self._recipe = recipe

    @property
    def pause_s(self) -> float:
        """Seconds for which it is still left out."""
        return max(0.0, self._back_at - time.monotonic())

    def rank(self) -> tuple[float, int]:
        """Order in which servers are asked: those that are not left out first."""
        return self.pause_s, self._in_flight

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """A request in flight."""
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def leave_out(self) -> None:
        """Note a failure, after which it may serve another recipe. Requests that fail together are one failure."""
        self._recipe = None
        if self.pause_s == 0:
            self._failures += 1
            longest_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self._failures - 1, 10))
            # Clients that lost a server together do not come back together.
            self._back_at = time.monotonic() + longest_s * random.uniform(0.5, 1.0)

    def welcome(self) -> None:
        """Note a success."""
        self._failures, self._back_at, self.heard_at = 0, 0.0, time.monotonic()
