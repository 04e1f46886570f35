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
# x ─▶ Identity ─▶ y: an ONNX file in protobuf's wire format, which a provider is tried on before a real graph is read.
_SMALLEST_GRAPH = bytes.fromhex(
    "08083a2b0a100a017812017922084964656e746974791201675a090a017812040a02080162090a017912040a02080142021011")
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


def check_provider(provider: Provider) -> None:
    """Find out whether a provider works here, without a bundle's graph.

    Raises
    ------
    EngineUnavailableError
        ONNX Runtime has it not, or could not start it.
    """
    _open_session(_SMALLEST_GRAPH, [PROVIDER_NAMES[provider]], threads=1)


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
        name = PROVIDER_NAMES[self.provider]
        providers: list[Any] = [name]
        if self.provider == "tensorrt":
            if self.cache is not None:
                self.cache.mkdir(parents=True, exist_ok=True)
            providers = [(name, {"trt_engine_cache_enable": True, "trt_engine_cache_path": str(self.cache),
                                 "trt_fp16_enable": True}), PROVIDER_NAMES["cuda"]]
        self._session = _open_session(self.graph, providers, self.threads)
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


def _open_session(graph: Path | bytes, providers: list[Any], threads: int | None) -> onnxruntime.InferenceSession:
    """A session whose first provider is the first of `providers`."""
    ort = import_onnxruntime()
    name = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if name not in ort.get_available_providers():
        raise EngineUnavailableError(f"{name} was asked for, and ONNX Runtime {ort.__version__} here has "
                                     f"{', '.join(ort.get_available_providers())}; pip install '.[gpu]', or use --device cpu")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(graph if isinstance(graph, bytes) else str(graph), options, providers=providers)
    except Exception as error:
        if isinstance(graph, bytes):
            raise EngineUnavailableError(f"ONNX Runtime cannot start {name}: {_one_line(error)}; use --device cpu") from error
        raise EngineError(f"ONNX Runtime cannot open {graph}: {_one_line(error)}") from error
    # A provider whose libraries are missing is dropped by ONNX Runtime with no more than a log line.
    if session.get_providers()[0] != name:
        raise EngineUnavailableError(f"{name} was asked for, but ONNX Runtime could not start it and offers "
                                     f"{', '.join(session.get_providers())}; check the driver and the CUDA libraries, "
                                     "or use --device cpu")
    return session


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
