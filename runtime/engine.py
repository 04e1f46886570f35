"""Chooses the engine for a bundle, and says why."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Literal, assert_never, get_args

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import BundleError, EngineUnavailableError, UsageError
from phaseline.runtime.ort import PROVIDER_NAMES, OrtEngine, Provider, import_onnxruntime

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
DEVICES: tuple[Device, ...] = get_args(Device)
log = logging.getLogger(__name__)


def open_engine(
    bundle: Bundle, device: Device, threads: int | None, stack: contextlib.ExitStack
) -> tuple[OrtEngine, str]:
    """Open a bundle's graph on a device.

    Parameters
    ----------
    bundle
        The verified bundle.
    device
        ``auto`` takes CUDA where it works and the CPU otherwise; the others take what they say or fail.
    threads
        Threads on the CPU; None: one for each core.
    stack
        Closes the engine.

    Returns
    -------
    The open engine, and one line that says which was chosen, with the reason for each that was not.

    Raises
    ------
    EngineUnavailableError
        The device asked for is not there.
    BundleError
        The bundle has no graph for it.
    """
    match device:
        case "cpu" | "cuda" | "tensorrt":
            return stack.enter_context(_engine(bundle, device, threads)), f"{PROVIDER_NAMES[device]} (asked for)"
        case "auto":
            reason = "no GPU runtime installed"
            if PROVIDER_NAMES["cuda"] in import_onnxruntime().get_available_providers():
                try:
                    return stack.enter_context(_engine(bundle, "cuda", threads)), f"{PROVIDER_NAMES['cuda']} (auto)"
                except (EngineUnavailableError, BundleError) as error:
                    reason = str(error)
            choice = f"{PROVIDER_NAMES['cpu']} (auto; {PROVIDER_NAMES['cuda']}: {reason})"
            log.info("engine: %s", choice)
            return stack.enter_context(_engine(bundle, "cpu", threads)), choice
        case _:
            assert_never(device)


def check_device(device: str) -> Device:
    """Refuse a device that is none of `DEVICES`.

    Raises
    ------
    UsageError
        An unknown name.
    """
    for known in DEVICES:
        if device == known:
            return known
    raise UsageError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")


def _engine(bundle: Bundle, provider: Provider, threads: int | None) -> OrtEngine:
    if provider == "cpu":
        return OrtEngine(bundle.graph("cpu"), "cpu", threads)
    # ONNX Runtime keys its TensorRT engines by GPU architecture, but neither by model nor by version.
    cache = Path.home() / ".cache" / "phaseline" / f"tensorrt-{bundle.hash[:16]}-{import_onnxruntime().__version__}"
    return OrtEngine(bundle.graph("portable"), provider, threads, cache)
