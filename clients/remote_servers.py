"""Several servers that do the same, as a synchronous client uses them: threads ask, and each request finds a server.

    ask ──▶ the server with least to do ──▶ answer
                ▲            │
                └─ checked ◀─┴── left out: 1 s, doubled at each failure, at most 30 s
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Self, TypeVar

from phaseline.clients.kserve import Tls, parse_servers
from phaseline.clients.remote_server import Cancellation, Server
from phaseline.runtime.errors import (
    ArtefactError,
    PhaselineError,
    ServerBusyError,
    ServerError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)

CHECK_TIMEOUT_S = 5.0
"""What a server is given to say what it serves, before it counts as unreachable."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
"""After how long a server that was left out is tried again; doubled each time that it fails on."""
FRESH_S = 2.0
"""A server that was not heard from for longer is checked before it is asked: another one may have been started in its place."""
LEAST_ATTEMPT_S = 2.0
"""While another server is not left out, one gets half of the time left, at least this: a silent one must not use it up."""
T = TypeVar("T")
log = logging.getLogger(__name__)


class Servers:
    """Servers that do the same: each request goes to the one with the least to do, and to another if that one fails.

    Parameters
    ----------
    addresses
        HOST:PORT, one or several.
    check
        Called with a server and seconds before the server is used, and again after each time that it was left out; raises
        `ServerError` if it cannot be used (now), `ArtefactError` if it serves another thing.
    timeout_s
        Seconds for each request, with waiting and further attempts. With several usable servers, one attempt gets half of what
        is left of them.
    tls
        Certificates.
    """

    def __init__(
        self, addresses: str | Sequence[str], check: Callable[[Server, float], None], timeout_s: float, tls: Tls | None
    ) -> None:
        if not timeout_s > 0:
            raise UsageError(f"a timeout of {timeout_s} s was asked for, expected more than 0")
        self._addresses = parse_servers(addresses if isinstance(addresses, str) else ",".join(addresses))
        self._check = check
        self._timeout_s = timeout_s
        self._tls = tls
        self._changed = threading.Condition()
        self.all: tuple[Server, ...] = ()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.all = tuple(stack.enter_context(contextlib.closing(Server(address, self._tls))) for address in self._addresses)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def open(self) -> None:
        """Check all servers; those that don't answer are left out.

        Raises
        ------
        ServerUnavailableError
            None answers.
        ServerError, ArtefactError
            Whatever else `check` raises: a server of the wrong kind is not left out silently.
        """
        for server in self.all:
            try:
                self._check(server, CHECK_TIMEOUT_S)
            except (ServerUnavailableError, ServerTimeoutError) as error:
                self._leave_out(server, error, server.outages)
            else:
                server.is_usable, server.heard_at = True, time.monotonic()
        if not any(server.is_usable for server in self.all):
            raise ServerUnavailableError(f"no server answers: {self._problems()}; is the address right, and does phaseline serve "
                                         "run there?")

    @property
    def description(self) -> str:
        """The servers, and how each is used, in one line."""
        states = (f"left out: {server.problem}" if server.problem else server.transport for server in self.all)
        return "Triton " + ", ".join(f"{server.address} ({state})" for server, state in zip(self.all, states, strict=True))

    def ask(self, work: Callable[[Server, float], T], cancellation: Cancellation) -> T:
        """Have one of the servers do something.

        Parameters
        ----------
        work
            Called with a server and the seconds that it gets; again with another one after `ServerUnavailableError`, after
            `ServerTimeoutError` if time is left, and after `UnknownModelError`: a server that was restarted has its models a
            while later.
        cancellation
            What may end it.

        Raises
        ------
        ServerUnavailableError
            No server could within the time; says each one's reason.
        ServerTimeoutError
            The last one that was asked did not answer.
        ServerBusyError
            Their queues were full all the time.
        ArtefactError
            All serve another thing now.
        ServerError
            Whatever else `work` raises.
        CancelledError
            It was cancelled.
        """
        deadline = time.monotonic() + self._timeout_s
        while True:
            server = self._take(deadline, cancellation)
            outages, begun = server.outages, time.monotonic()
            attempt_s, is_last = self._attempt(server, max(0.001, deadline - begun))
            try:
                if not server.is_usable:
                    self._try(server, min(CHECK_TIMEOUT_S, attempt_s))
                    continue
                answer = work(server, attempt_s)
                server.pause_s, server.heard_at = 0.0, time.monotonic()
                return answer
            except ServerTimeoutError as error:
                # One that did other work meanwhile is slow, not gone.
                if server.heard_at < begun:
                    self._leave_out(server, error, outages)
                if is_last:
                    raise
                continue
            except ServerBusyError as error:
                if time.monotonic() + error.retry_after_s > deadline:
                    raise
                pause_s = error.retry_after_s
            except (ServerUnavailableError, UnknownModelError) as error:
                self._leave_out(server, error, outages)
                continue
            finally:
                self._give_back(server)
            self._pause(pause_s, cancellation)

    def cancel(self, cancellation: Cancellation) -> None:
        """End the requests of a cancellation, those that wait for a server included."""
        cancellation.cancel()
        with self._changed:
            self._changed.notify_all()

    def _take(self, deadline: float, cancellation: Cancellation) -> Server:
        """A server to ask, or one that is due to be tried again."""
        with self._changed:
            while True:
                now = time.monotonic()
                if cancellation.is_cancelled:
                    raise CancelledError
                if all(server.foreign for server in self.all):
                    first = self.all[0]
                    assert first.foreign is not None
                    raise first.foreign(first.problem)
                if now >= deadline:
                    raise ServerUnavailableError(f"no server could do it within {self._timeout_s:g} s: {self._problems()}")
                for server in self.all:
                    if not server.in_flight and now - server.heard_at > FRESH_S:
                        server.is_usable = False
                idle = [server for server in self.all if not server.is_usable and not server.is_tried]
                due = [server for server in idle if server.retry_at <= now]
                usable = [server for server in self.all if server.is_usable]
                if due or usable:
                    break
                self._changed.wait(min([deadline, *(server.retry_at for server in idle)]) - now)
            server = due[0] if due else min(usable, key=lambda server: (server.in_flight, server.asked_at))
            server.is_tried = not server.is_usable
            server.in_flight += 1
            server.asked_at = now
            return server

    def _give_back(self, server: Server) -> None:
        with self._changed:
            server.in_flight -= 1

    def _attempt(self, server: Server, left_s: float) -> tuple[float, bool]:
        """Seconds that a server gets, and whether they are all that is left."""
        # Others that only have to be checked again count too.
        if all(other.problem for other in self.all if other is not server) or left_s <= LEAST_ATTEMPT_S:
            return left_s, True
        return max(left_s / 2, LEAST_ATTEMPT_S), False

    def _try(self, server: Server, timeout_s: float) -> None:
        """Check a server, and use it or go on leaving it out."""
        outages = server.outages
        try:
            self._check(server, max(0.001, timeout_s))
        except (ServerError, ArtefactError) as error:
            self._leave_out(server, error, outages)
        else:
            with self._changed:
                returns = bool(server.problem)
                server.is_usable, server.problem, server.foreign, server.heard_at = True, "", None, time.monotonic()
            if returns:
                log.info("%s is used again (%s)", server.address, server.transport)
        finally:
            with self._changed:
                server.is_tried = False
                self._changed.notify_all()

    def _leave_out(self, server: Server, error: PhaselineError, outages: int) -> None:
        with self._changed:
            # Requests that were in flight together fail together: that is one outage, not many.
            if outages != server.outages:
                return
            server.outages += 1
            server.pause_s = min(2 * server.pause_s, LONGEST_PAUSE_S) or FIRST_PAUSE_S
            server.retry_at = time.monotonic() + server.pause_s
            server.is_usable, server.problem = False, str(error)
            server.foreign = type(error) if isinstance(error, ArtefactError) else None
            if isinstance(error, ServerTimeoutError):
                server.reconnect()
            self._changed.notify_all()
        log.warning("%s is left out for %g s: %s", server.address, server.pause_s, error)

    def _pause(self, seconds: float, cancellation: Cancellation) -> None:
        with self._changed:
            self._changed.wait_for(lambda: cancellation.is_cancelled, seconds)

    def _problems(self) -> str:
        return "; ".join(server.problem or f"{server.address}: busy" for server in self.all)
