"""KServe v2 over gRPC: arrays ⇄ messages, status codes → errors, channels. What the synchronous and asyncio clients share.

The protobuf definitions are those that NVIDIA's tritonclient brings; nothing else of it is used.
"""

from __future__ import annotations

import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from phaseline.runtime.errors import (
    MissingExtraError,
    MissingInputError,
    ServerBusyError,
    ServerError,
    ServerFailedError,
    ServerRefusedError,
    ServerTimeoutError,
    ServerUnavailableError,
    UnknownModelError,
    UsageError,
)
from phaseline.runtime.protocol import PRIORITY_LEVELS, Priority

if TYPE_CHECKING:
    import grpc
    from tritonclient.grpc import service_pb2 as pb

DATATYPES = {"uint8": "UINT8", "uint16": "UINT16", "float16": "FP16", "float32": "FP32", "object": "BYTES"}
_DTYPES = {datatype: np.dtype(name) for name, datatype in DATATYPES.items()}
_WORDS: tuple[tuple[str, type[ServerError], str], ...] = (
    ("Request timeout expired", ServerTimeoutError,
     ": it waited too long in the server's queue; allow more time, or send less at once"),
    ("has no available versions", ServerUnavailableError, ": the server is loading or unloading it; ask again in some seconds"),
    ("unknown model", UnknownModelError, "; phaseline info --server lists what is served"),
    ("is not healthy", ServerUnavailableError, ": its process died; the server starts it again, ask again in some seconds"),
    ("Socket closed", ServerUnavailableError, ": the server went away, or asks for TLS (--tls-ca, --tls-cert, --tls-key)"),
)
RETRY_AFTER_S = 0.5
"""What a full queue is given before it is asked again."""
MAX_MESSAGE_BYTES = 2**31 - 1


@dataclass(frozen=True)
class Tls:
    """Certificates of a client.

    Attributes
    ----------
    ca
        PEM file of the authority that signed the server's certificate; None: those that gRPC brings.
    certificate, key
        PEM files of the client's own, for mutual TLS.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a client's certificate and its key come together; only one came")
        for path in (self.ca, self.certificate, self.key):
            if path is not None and not path.is_file():
                raise MissingInputError(f"no file at {path}; expected a PEM file")


@dataclass(frozen=True)
class SharedTensor:
    """A tensor that lies in a registered shared-memory region instead of in the message.

    Attributes
    ----------
    region
        Its registered name.
    offset, size_bytes
        Where in it.
    dtype, shape
        Of the tensor; needed for inputs only.
    """

    region: str
    offset: int
    size_bytes: int
    dtype: str = "uint8"
    shape: tuple[int, ...] = ()


class RequestIds:
    """Ids of one client's requests, by which a server's log can be searched: ``3f9a1c-1``, ``3f9a1c-2``, …"""

    def __init__(self) -> None:
        self._client = secrets.token_hex(3)
        self._numbers = itertools.count(1)

    def next(self) -> str:
        """Another id; may be asked for by several threads."""
        return f"{self._client}-{next(self._numbers)}"


def import_grpc() -> Any:
    """gRPC's module.

    Raises
    ------
    MissingExtraError
        The extra ``client`` is not installed.
    """
    try:
        import grpc
        import tritonclient.grpc.service_pb2  # noqa: F401  Both are needed, and come with one extra.
    except ImportError as error:
        raise MissingExtraError("tritonclient[grpc]", "client", "talking to a server") from error
    return grpc


def parse_servers(text: str) -> tuple[str, ...]:
    """Servers from ``HOST:PORT,HOST:PORT,…``.

    Raises
    ------
    UsageError
        Not of that form, or the same one twice.
    """
    servers = tuple(part.strip() for part in text.split(","))
    for server in servers:
        host, _, port = server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"server {server!r} came, expected HOST:PORT, several separated by commas, e.g. 127.0.0.1:8001")
    if len(set(servers)) < len(servers):
        raise UsageError(f"a server came twice in {text!r}; give each once")
    return servers


def open_channel(server: str, tls: Tls | None = None, *, asynchronous: bool = False) -> Any:
    """A gRPC channel; connects, and connects again, by itself.

    Parameters
    ----------
    server
        HOST:PORT.
    tls
        Certificates; None: no encryption.
    asynchronous
        Whether for asyncio.
    """
    grpc = import_grpc()
    module = grpc.aio if asynchronous else grpc
    options = [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        # A server on this side of the firewall is not reached through a proxy for the web.
        ("grpc.enable_http_proxy", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 2000),
        # A connection of its own for each client: one that hangs does not hold up another's.
        ("grpc.use_local_subchannel_pool", 1),
        # No pings while a call is silent (grpc.keepalive_time_ms): Triton by its defaults takes one in five minutes, and cuts a
        # connection that sends more, and the calls on it, with "too many pings" (seen: every 30 s, after 180 s). Dead
        # connections are found by the calls' timeouts, and replaced.
    ]
    if tls is None:
        return module.insecure_channel(server, options=options)
    parts = [None if path is None else path.read_bytes() for path in (tls.ca, tls.key, tls.certificate)]
    return module.secure_channel(server, grpc.ssl_channel_credentials(*parts), options=options)


def open_stub(channel: Any) -> Any:
    """The remote procedures of a channel, synchronous or asyncio as the channel is."""
    from tritonclient.grpc import service_pb2_grpc

    return service_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer_request(
    model: str,
    inputs: Mapping[str, npt.NDArray[Any] | SharedTensor],
    outputs: Sequence[str] | Mapping[str, SharedTensor],
    *,
    version: str = "",
    request_id: str = "",
    priority: Priority = "interactive",
    queue_timeout_s: float | None = None,
) -> pb.ModelInferRequest:
    """The message of one inference.

    Parameters
    ----------
    model, version
        Which; an empty version is the one served.
    inputs
        Arrays (object arrays of bytes for BYTES), or where they lie.
    outputs
        Names, or where each is to be written.
    request_id
        Named in the server's log, and given back.
    priority
        Which requests go first.
    queue_timeout_s
        Seconds in the server's queue after which it refuses the request; None: the model's own limit.
    """
    from tritonclient.grpc import service_pb2 as pb

    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id)
    request.parameters["priority"].uint64_param = PRIORITY_LEVELS[priority]
    if queue_timeout_s is not None:
        set_queue_timeout(request, queue_timeout_s)
    for name, value in inputs.items():
        tensor = request.inputs.add(name=name)
        tensor.shape.extend(value.shape)
        if isinstance(value, SharedTensor):
            tensor.datatype = DATATYPES[value.dtype]
            _place(tensor, value)
        else:
            tensor.datatype = DATATYPES[value.dtype.name]
            request.raw_input_contents.append(_to_bytes(value))
    for name in outputs:
        output = request.outputs.add(name=name)
        if isinstance(outputs, Mapping):
            _place(output, outputs[name])
    return request


def set_queue_timeout(request: pb.ModelInferRequest, queue_timeout_s: float) -> None:
    """Limit, anew for each attempt, how long a request may wait in the server's queue: seconds."""
    request.parameters["timeout"].int64_param = max(1, int(queue_timeout_s * 1e6))


def output_arrays(response: pb.ModelInferResponse) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an answer by name, without those that went to shared memory.

    Raises
    ------
    ServerFailedError
        The answer contradicts itself.
    """
    arrays: dict[str, npt.NDArray[Any]] = {}
    contents = iter(response.raw_output_contents)
    try:
        for tensor in response.outputs:
            if "shared_memory_region" in tensor.parameters:
                continue
            content, shape = next(contents), tuple(tensor.shape)
            if tensor.datatype == "BYTES":
                arrays[tensor.name] = np.array(_split_bytes(content), np.object_).reshape(shape)
            else:
                arrays[tensor.name] = np.frombuffer(content, _DTYPES[tensor.datatype]).reshape(shape).copy()
    except (StopIteration, KeyError, ValueError) as error:
        raise ServerFailedError(f"the answer of model {response.model_name} cannot be understood ({error!r}); do server and "
                                "client have the same version of phaseline?") from error
    return arrays


def model_parameters(answer: pb.ModelConfigResponse) -> dict[str, str]:
    """The parameters of a model's configuration."""
    return {name: value.string_value for name, value in answer.config.parameters.items()}


def json_parameter(parameters: Mapping[str, str], name: str, model: str) -> dict[str, Any]:
    """A parameter that holds JSON.

    Raises
    ------
    ServerRefusedError
        It is not there: the model is not one of phaseline's.
    """
    try:
        content: dict[str, Any] = json.loads(parameters[name])
    except (KeyError, ValueError) as error:
        raise ServerRefusedError(f"model {model} has no parameter {name!r}; is this a phaseline server?") from error
    return content


def server_error(error: grpc.RpcError, server: str, model: str) -> ServerError:
    """The error that a failed call means.

    Parameters
    ----------
    error
        From a synchronous or asyncio call.
    server, model
        Named in the message.
    """
    grpc = import_grpc()
    code, details = error.code(), " ".join((error.details() or "").split())
    text = f"{server}, {model}: {details or code.name}"
    return error_by_text(text, details) or _by_code(grpc.StatusCode, code, text)


def error_by_text(text: str, details: str) -> ServerError | None:
    """The error that Triton means by its words, where its code means several things; None: the code says it.

    Parameters
    ----------
    text
        The error's message.
    details
        What Triton said.
    """
    if "xceeds maximum queue size" in details:
        return ServerBusyError(f"{text}; ask again after {RETRY_AFTER_S} s, or send less at once", RETRY_AFTER_S)
    if "protocol is restricted" in details:
        return ServerRefusedError(f"{text.partition(',')[0]} does not allow this call")
    for words, kind, remedy in _WORDS:
        if words in details:
            return kind(f"{text}{remedy}")
    return None


def _by_code(codes: Any, code: Any, text: str) -> ServerError:
    if code == codes.DEADLINE_EXCEEDED:
        return ServerTimeoutError(f"{text}: no answer in the time allowed; allow more, or see whether the server is overloaded")
    if code in (codes.INVALID_ARGUMENT, codes.UNAUTHENTICATED, codes.PERMISSION_DENIED, codes.UNIMPLEMENTED,
                codes.RESOURCE_EXHAUSTED, codes.OUT_OF_RANGE, codes.FAILED_PRECONDITION):
        return ServerRefusedError(text)
    if code == codes.NOT_FOUND:
        return UnknownModelError(text)
    if code in (codes.UNAVAILABLE, codes.CANCELLED, codes.ABORTED):
        return ServerUnavailableError(text)
    return ServerFailedError(text)


def _place(tensor: Any, where: SharedTensor) -> None:
    tensor.parameters["shared_memory_region"].string_param = where.region
    tensor.parameters["shared_memory_byte_size"].int64_param = where.size_bytes
    if where.offset:
        tensor.parameters["shared_memory_offset"].int64_param = where.offset


def _to_bytes(array: npt.NDArray[Any]) -> bytes:
    if array.dtype != np.object_:
        # Little end first, whatever the file had: KServe says so.
        return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    # Each entry behind its length, four bytes, little end first.
    return b"".join(len(entry).to_bytes(4, "little") + entry for entry in array.ravel())


def _split_bytes(content: bytes) -> list[bytes]:
    entries, start = [], 0
    while start < len(content):
        end = start + 4 + int.from_bytes(content[start : start + 4], "little")
        entries.append(content[start + 4 : end])
        start = end
    return entries
