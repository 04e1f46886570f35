"""`backbone` and `features`: the tiles of a batch of requests → the outputs that the model's configuration names."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from phaseline.runtime.bundle import open_bundle
from phaseline.runtime.contract import TILES
from phaseline.runtime.engine import check_device
from phaseline.runtime.source import LocalSource
from phaseline.triton_models.adapter import CancelledError, RequestLog, output_names, parameters, wanted_outputs


class TritonPythonModel:
    """ONNX Runtime behind Triton's dynamic batcher."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle's engine."""
        settings = parameters(args)
        self._log = RequestLog(args)
        self._stack = contextlib.ExitStack()
        bundle = open_bundle(Path(settings["path"]))
        source = LocalSource(bundle, check_device(settings["device"]), int(settings["threads"]))
        self._source = self._stack.enter_context(source)
        self._outputs = output_names(args)
        source.prepare(self._outputs)
        pb_utils.Logger.log_info(f"{args['model_name']}: bundle {bundle.hash[:12]}, {source.engine_choice}, "
                                 f"{settings['threads']} threads")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run for all requests; the outputs that any of them asks for."""
        alive = [request for request in requests if not request.is_cancelled()]
        batches = [pb_utils.get_input_tensor_by_name(request, TILES).as_numpy() for request in alive]
        wanted = [wanted_outputs(request, self._outputs) for request in alive]
        names = [name for name in self._outputs if any(name in asked for asked in wanted)]
        answers: dict[int, Any] = {}
        try:
            arrays = dict(zip(names, self._source.outputs(np.concatenate(batches), names), strict=True)) if alive else {}
        except Exception as error:  # noqa: BLE001  Whatever fails here must answer all of these requests.
            answers = {id(request): self._log.failure(request, error) for request in alive}
        else:
            end = 0
            for request, tiles, asked in zip(alive, batches, wanted, strict=True):
                start, end = end, end + len(tiles)
                answers[id(request)] = pb_utils.InferenceResponse(
                    [pb_utils.Tensor(name, np.ascontiguousarray(arrays[name][start:end])) for name in asked])
        return [answers.get(id(request)) or self._log.failure(request, CancelledError()) for request in requests]

    def finalize(self) -> None:
        """Close the engine."""
        self._stack.close()
