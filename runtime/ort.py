"""ONNX Runtime: one graph, one session, on an explicitly chosen provider."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from phaseline.runtime.contract import F16, TILES, U8
from phaseline.runtime.errors import EngineError, EngineUnavailableError, MissingExtraError

if TYPE_CHECKING:
    import onnxruntime

Provider = Literal["cpu", "cuda", "tensorrt"]
PROVIDER_NAMES: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
log = logging.getLogger(__name__)


def import_onnxruntime() -> Any:
    """ONNX Runtime's module.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("ONNX Runtime", "cpu", "running a bundle") from error
    return onnxruntime


class OrtEngine:
    """Runs one graph; opens on ``with``.

    Parameters
    ----------
    graph
        The ONNX file.
    provider
        ``cpu``, ``cuda``, or ``tensorrt`` (ONNX Runtime's TensorRT provider).
    threads
        Threads of the CPU's operators; None: one for each core.
    cache
        Folder for TensorRT's engines, which must be kept by graph: needed for ``tensorrt`` alone.
    """

    def __init__(
        self, graph: Path, provider: Provider = "cpu", threads: int | None = None, cache: Path | None = None
    ) -> None:
        self.graph = graph
        self.provider: Provider = provider
        self.threads = threads
        self.cache = cache
        self._session: onnxruntime.InferenceSession | None = None

    def __enter__(self) -> Self:
        ort = import_onnxruntime()
        name = PROVIDER_NAMES[self.provider]
        if name not in ort.get_available_providers():
            raise EngineUnavailableError(f"{name} was asked for, and ONNX Runtime {ort.__version__} here has "
                                         f"{', '.join(ort.get_available_providers())}; pip install '.[gpu]', "
                                         "or use --device cpu")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or 0
        providers: list[Any] = [name]
        if self.provider == "tensorrt":
            if self.cache is not None:
                self.cache.mkdir(parents=True, exist_ok=True)
            providers = [(name, {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(self.cache),
                                 "trt_fp16_enable": True}), PROVIDER_NAMES["cuda"]]
        try:
            session = ort.InferenceSession(str(self.graph), options, providers=providers)
        except Exception as error:
            raise EngineError(f"ONNX Runtime cannot open {self.graph}: {_one_line(error)}") from error
        # A provider whose libraries are missing is dropped by ONNX Runtime with no more than a log line.
        if session.get_providers()[0] != name:
            raise EngineUnavailableError(f"{name} was asked for, but ONNX Runtime could not start it and offers "
                                         f"{', '.join(session.get_providers())}; check the driver and the CUDA libraries, "
                                         "or use --device cpu")
        self._session = session
        log.debug("opened %s on %s", self.graph, name)
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def run(self, tiles: U8, outputs: Sequence[str]) -> list[F16]:
        """Run one batch; only the outputs asked for leave the device.

        Parameters
        ----------
        tiles
            uint8 array of shape (n, channels, T, T).
        outputs
            Names of graph outputs.

        Returns
        -------
        One float16 array an output, in their order.

        Raises
        ------
        EngineError
            Not open, or ONNX Runtime refused the batch or failed.
        """
        if self._session is None:
            raise EngineError(f"the engine for {self.graph} is not open; use it inside `with`")
        device = "cpu" if self.provider == "cpu" else "cuda"
        try:
            binding = self._session.io_binding()
            binding.bind_cpu_input(TILES, np.ascontiguousarray(tiles))
            for name in outputs:
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding)
            results: list[F16] = binding.copy_outputs_to_cpu()
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed on tiles of shape {tiles.shape}: {_one_line(error)}") from error
        return results


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
