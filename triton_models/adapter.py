"""What the models in this folder share. Importable only inside Triton's Python back end, which brings `pb_utils`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from phaseline.runtime.errors import PhaselineError, ServerBusyError, ServerTimeoutError, ServerUnavailableError


def parameters(args: dict[str, str]) -> dict[str, str]:
    """The parameters of a model's configuration."""
    config: dict[str, Any] = json.loads(args["model_config"])
    return {name: entry["string_value"] for name, entry in config.get("parameters", {}).items()}


def output_names(args: dict[str, str]) -> list[str]:
    """The outputs that a model's configuration names."""
    return [output["name"] for output in json.loads(args["model_config"])["output"]]


class CancelledError(Exception):
    """The client is gone: its deadline is over, or it was killed."""


class RequestLog:
    """Lines in the server's log that name model, version and request id.

    Parameters
    ----------
    args
        What Triton gives to `initialize`.
    """

    def __init__(self, args: dict[str, str]) -> None:
        self._model = f"{args['model_name']} version {args['model_version']}"

    def done(self, request: Any, what: str, seconds: float) -> None:
        """Note an answered request."""
        pb_utils.Logger.log_info(f"{self._prefix(request)}: {what}, {seconds:.3f} s")

    def failure(self, request: Any, error: BaseException) -> Any:
        """Note a failed request, and make the response that says so.

        An error that phaseline did not raise on purpose is reported by its type: its text may be long, or tell of the server.
        """
        if isinstance(error, CancelledError):
            pb_utils.Logger.log_info(f"{self._prefix(request)}: cancelled by its client")
            text, code = "cancelled", pb_utils.TritonError.CANCELLED
        elif isinstance(error, PhaselineError):
            text = " ".join(str(error).split())
            code = _code(error)
            pb_utils.Logger.log_warn(f"{self._prefix(request)}: {text}")
        else:
            text, code = f"unexpected {type(error).__name__}; see the server's log", pb_utils.TritonError.INTERNAL
            pb_utils.Logger.log_error(f"{self._prefix(request)}: unexpected {error!r}")
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(text, code))

    def _prefix(self, request: Any) -> str:
        return f"{self._model} id {request.request_id() or '-'}"


def _code(error: PhaselineError) -> Any:
    # Triton puts TritonError into its module after it has imported the model's.
    if isinstance(error, ServerBusyError | ServerTimeoutError | ServerUnavailableError):
        return pb_utils.TritonError.UNAVAILABLE
    if isinstance(error, ValueError):
        return pb_utils.TritonError.INVALID_ARG
    return pb_utils.TritonError.INTERNAL


def input_names(request: Any) -> list[str]:
    """Names of the tensors that came."""
    return [tensor.name() for tensor in request.inputs()]


def text_input(request: Any, name: str) -> list[bytes]:
    """The entries of a BYTES input; empty if it did not come."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [bytes(entry) for entry in tensor.as_numpy().ravel()]


def wanted_outputs(request: Any, all_outputs: Sequence[str]) -> list[str]:
    """Outputs that a request asks for, in the model's order."""
    asked = request.requested_output_names()
    return [name for name in all_outputs if name in asked]
