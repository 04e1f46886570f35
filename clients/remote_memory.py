"""System shared memory between a client and a server of the same host: tensors lie there instead of in messages.

    region   0 ──────────── input ── 64 ─ output ──        one for each request in flight
             this process writes      the server writes

A region is used again only after an answer: one whose request was given up may still be written to by the server.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from phaseline.clients.kserve import SharedTensor
from phaseline.runtime.errors import OutputError, ServerError, ServerRefusedError
from phaseline.runtime.ownership import SHARED_MEMORY, is_abandoned, owned_name, sweep

KIND = "client"
_ALIGNMENT = 64
_CALL_TIMEOUT_S = 10.0
_FAILURES_AT_ONCE = 2
"""After how many names that cannot be unregistered the others wait for the next time."""
log = logging.getLogger(__name__)

Call = Callable[[str, Any, float], Any]
"""One remote procedure of a server: its name, message and seconds → its answer; raises `ServerError`."""


def why_not_here(server: str) -> str | None:
    """Why a server cannot share this host's memory; None if it may.

    Parameters
    ----------
    server
        HOST:PORT.
    """
    if not SHARED_MEMORY.is_dir():
        return f"this system has no {SHARED_MEMORY}"
    host = server.rpartition(":")[0].strip("[]")
    if host in ("localhost", socket.gethostname()):
        return None
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    return None if is_loopback else "not on this host"


def is_forgotten(error: ServerRefusedError) -> bool:
    """Whether a server refused a request since it does not know the region: it was restarted."""
    return "nable to find" in str(error) and "shared memory region" in str(error)


class Region:
    """Memory for one request's input and output. Made by this process, readable by this user only.

    Parameters
    ----------
    input_bytes, output_bytes
        Their lengths.

    Raises
    ------
    OutputError
        There is no room for it.
    """

    def __init__(self, input_bytes: int, output_bytes: int) -> None:
        self.name = owned_name(KIND)
        self.output_bytes = output_bytes
        self.output_offset = -(-input_bytes // _ALIGNMENT) * _ALIGNMENT
        self.size_bytes = self.output_offset + output_bytes
        self._path = SHARED_MEMORY / self.name
        try:
            self._memory = self._allocate()
        except OSError as error:
            self._path.unlink(missing_ok=True)
            raise OutputError(f"no shared memory of {self.size_bytes} bytes in {SHARED_MEMORY} ({error.strerror}); free some, or "
                              "use --transport grpc") from error

    def _allocate(self) -> mmap.mmap:
        descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            # Taken now: memory that turns out to be missing at the first write would end this process.
            os.posix_fallocate(descriptor, 0, self.size_bytes)
            return mmap.mmap(descriptor, self.size_bytes)
        finally:
            os.close(descriptor)

    def write(self, array: npt.NDArray[Any]) -> SharedTensor:
        """Put an input into the region."""
        np.frombuffer(self._memory, array.dtype, array.size).reshape(array.shape)[...] = array
        return SharedTensor(self.name, 0, array.nbytes, array.dtype.name, array.shape)

    def output(self) -> SharedTensor:
        """Where the server is to write an output."""
        return SharedTensor(self.name, self.output_offset, self.output_bytes)

    def read(self, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A copy of the output."""
        values = np.frombuffer(self._memory, dtype, math.prod(shape), self.output_offset)
        return values.reshape(shape).copy()

    def close(self) -> None:
        """Remove the region here; what the server still writes goes into memory that nobody reads."""
        self._memory.close()
        self._path.unlink(missing_ok=True)


class Regions:
    """The regions that one server knows, of as many sizes as there are outputs; the first is registered at once, so that a server
    that cannot says so here.

    Parameters
    ----------
    call
        Calls the server.
    input_bytes, output_bytes
        Of a first request.

    Raises
    ------
    ServerError
        The server does not take shared memory, or cannot be reached.
    OutputError
        There is no room for a region.
    """

    def __init__(self, call: Call, input_bytes: int, output_bytes: int) -> None:
        self._call = call
        self._input_bytes = input_bytes
        self._lock = threading.Lock()
        self._free: list[Region] = []
        # A dictionary for its order: names that fail go to the end, so that each has its turn.
        self._given_up: dict[str, None] = {}
        self._closed = False
        for name in sweep(SHARED_MEMORY, KIND):
            log.info("removed %s, left behind by a killed client", SHARED_MEMORY / name)
        self._forget_abandoned()
        self._free.append(self._new(output_bytes))

    @contextlib.contextmanager
    def lend(self, output_bytes: int) -> Iterator[Region]:
        """A region for one request; it is not used again if the request fails, however that happens.

        Parameters
        ----------
        output_bytes
            Of the answer. A few large regions would do for all, but what is in /dev/shm is memory taken from everybody.

        Raises
        ------
        ServerError
            A new one cannot be registered.
        OutputError
            There is no room for it.
        """
        with self._lock:
            region = next((free for free in self._free if free.output_bytes == output_bytes), None)
            if region is not None:
                self._free.remove(region)
        if region is None:
            region = self._new(output_bytes)
        try:
            yield region
        except BaseException:
            self._given_up[region.name] = None
            region.close()
            raise
        with self._lock:
            if not self._closed:
                self._free.append(region)
                return
        region.close()
        self._unregister([region.name, *self._given_up])

    def close(self) -> None:
        """Remove all regions, here and at the server; those that are lent out, when they come back."""
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        for region in free:
            region.close()
        self._unregister([*(region.name for region in free), *self._given_up])

    def _new(self, output_bytes: int) -> Region:
        from tritonclient.grpc import service_pb2 as pb

        self._unregister(tuple(self._given_up))
        region = Region(self._input_bytes, output_bytes)
        message = pb.SystemSharedMemoryRegisterRequest(name=region.name, key=f"/{region.name}", byte_size=region.size_bytes)
        try:
            self._call("SystemSharedMemoryRegister", message, _CALL_TIMEOUT_S)
        except BaseException:
            # An answer that was lost on the way may have been a yes.
            self._given_up[region.name] = None
            region.close()
            raise
        return region

    def _forget_abandoned(self) -> None:
        """Have the server let go of memory that nobody uses: it stays in use as long as it is registered."""
        from tritonclient.grpc import service_pb2 as pb

        status = self._call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(), _CALL_TIMEOUT_S)
        self._unregister([name for name in status.regions if _is_unused(name)])

    def _unregister(self, names: Iterable[str]) -> None:
        """Unregister as many as can be; the others are tried again when the next region is made or closed."""
        from tritonclient.grpc import service_pb2 as pb

        failures = 0
        for name in names:
            self._given_up.pop(name, None)
            self._given_up[name] = None
            if failures >= _FAILURES_AT_ONCE:
                continue
            try:
                self._call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=name), _CALL_TIMEOUT_S)
            except ServerError as error:
                # Still written to for a request that was given up, or gone with its server. What stays when these regions are
                # closed, this process's next ones take, or a later client's.
                log.info("region %s was not unregistered: %s", name, error)
                failures += 1
            else:
                self._given_up.pop(name, None)


def _is_unused(name: str) -> bool:
    """Whether a registered region is one that nobody uses: a killed client's, or one that this process closed.

    Other users' regions are not judged: their processes may be hidden from this one.
    """
    try:
        owner = (SHARED_MEMORY / name).stat().st_uid
    except OSError:
        # Its owner, or a sweep in its stead, let go of it; what this process closed, the server did not let go of in time.
        return is_abandoned(name, KIND) or name.startswith(owned_name(KIND).rpartition("-")[0] + "-")
    return owner == os.getuid() and is_abandoned(name, KIND)
