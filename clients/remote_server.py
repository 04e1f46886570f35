"""One of several servers, as a synchronous client talks to it: calls that can be cancelled, connections that are replaced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from phaseline.clients.kserve import Tls, import_grpc, model_parameters, open_channel, open_stub, server_error
from phaseline.runtime.errors import ArtefactError, ServerUnavailableError


class Cancellation:
    """Ends requests that belong together; made by whoever asks, ended by `Servers.cancel`."""

    def __init__(self) -> None:
        self.is_cancelled = False
        self._calls: set[Any] = set()
        self._lock = threading.Lock()

    def result(self, call: Any) -> Any:
        """Wait for a call that may be cancelled meanwhile."""
        with self._lock:
            self._calls.add(call)
            if self.is_cancelled:
                call.cancel()
        try:
            return call.result()
        finally:
            # Nobody waits for it any longer, e.g. after Ctrl-C; of a finished call, this does nothing.
            call.cancel()
            with self._lock:
                self._calls.discard(call)

    def cancel(self) -> None:
        """Cancel what is under way, and what would begin."""
        with self._lock:
            self.is_cancelled = True
            calls = tuple(self._calls)
        for call in calls:
            call.cancel()


@dataclass(eq=False)
class Server:
    """One of several servers, as this client sees it.

    Attributes
    ----------
    address
        HOST:PORT.
    tls
        Certificates.
    transport
        How it is talked to, for people.
    is_usable
        Whether it was checked, and did not fail since.
    problem
        Why it is not usable; empty if it only has to be checked again. A text: an error's traceback would keep a request's
        pixels for as long as the server is left out.
    foreign
        The error to raise if all servers serve another thing; None: this one does not.
    is_tried
        Whether somebody is checking it.
    in_flight
        Requests that it works on.
    asked_at, heard_at, retry_at
        When it was asked last, when it last did what it was asked, and when it may be tried again: seconds of the monotonic
        clock.
    outages
        How often it was left out.
    pause_s
        How long it was left out last; 0 after an answer.
    """

    address: str
    tls: Tls | None
    transport: str = "gRPC"
    is_usable: bool = False
    problem: str = ""
    foreign: type[ArtefactError] | None = None
    is_tried: bool = False
    in_flight: int = 0
    asked_at: float = 0.0
    heard_at: float = 0.0
    retry_at: float = 0.0
    outages: int = 0
    pause_s: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = _Connection(self.address, self.tls)

    def reconnect(self) -> None:
        """Use a new connection from now on: one that a firewall forgot hangs for ever. Calls on the old one may end there."""
        new = _Connection(self.address, self.tls)
        with self._lock:
            old, self._connection = self._connection, new
        old.retire()

    def close(self) -> None:
        """End the connection, and what is under way on it."""
        self._connection.channel.close()

    def call(self, procedure: str, message: Any, timeout_s: float, model: str, cancellation: Cancellation | None = None) -> Any:
        """Call a remote procedure.

        Parameters
        ----------
        procedure, message
            Its name in KServe's definitions, and its request.
        timeout_s
            Seconds for the answer.
        model
            Named in errors.
        cancellation
            What may end the call.

        Raises
        ------
        ServerError
            As `kserve.server_error`.
        CancelledError
            It was cancelled.
        """
        grpc = import_grpc()
        cancellation = cancellation or Cancellation()
        try:
            with contextlib.ExitStack() as stack:
                # Not between the look-up and the use may the connection be retired.
                with self._lock:
                    stub = stack.enter_context(self._connection.used())
                return cancellation.result(getattr(stub, procedure).future(message, timeout=timeout_s))
        except grpc.FutureCancelledError as error:
            if cancellation.is_cancelled:
                raise CancelledError from None
            raise ServerUnavailableError(f"{self.address}, {model}: the server cancelled the request") from error
        except grpc.RpcError as error:
            raise server_error(error, self.address, model) from error

    def infer(self, request: Any, timeout_s: float, cancellation: Cancellation) -> Any:
        """Send an inference, see `call`; errors name the request too, as the server's log does."""
        return self.call("ModelInfer", request, timeout_s, f"{request.model_name}, request {request.id}", cancellation)

    def parameters(self, model: str, timeout_s: float, version: str = "") -> dict[str, str]:
        """The parameters in a model's configuration; raises as `call`."""
        from tritonclient.grpc import service_pb2 as pb

        return model_parameters(self.call("ModelConfig", pb.ModelConfigRequest(name=model, version=version), timeout_s, model))


class _Connection:
    """A channel that closes with its last call once it is retired."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.channel = open_channel(address, tls)
        self._stub = open_stub(self.channel)
        self._calls = 0
        self._is_retired = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def used(self) -> Iterator[Any]:
        """The remote procedures, for one call."""
        with self._lock:
            self._calls += 1
        try:
            yield self._stub
        finally:
            with self._lock:
                self._calls -= 1
            self._close_if_over()

    def retire(self) -> None:
        """Take no more calls."""
        self._is_retired = True
        self._close_if_over()

    def _close_if_over(self) -> None:
        with self._lock:
            is_over = self._is_retired and not self._calls
        if is_over:
            self.channel.close()
