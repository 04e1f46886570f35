"""Chooses the engine for a bundle, says why, and opens its graphs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal, assert_never, get_args

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.errors import BundleError, EngineUnavailableError, UsageError
from phaseline.runtime.ort import PROVIDER_NAMES, OrtEngine, Provider, check_provider, import_onnxruntime

Device = Literal["auto", "cpu", "cuda", "tensorrt"]
DEVICES: tuple[Device, ...] = get_args(Device)
log = logging.getLogger(__name__)


def choose_provider(bundle: Bundle, device: Device) -> tuple[Provider, str]:
    """Choose what runs a bundle's graphs, without opening any.

    Parameters
    ----------
    bundle
        The verified bundle.
    device
        ``auto`` takes CUDA where it works and the CPU otherwise; the others take what they say or fail.

    Returns
    -------
    The provider, and one line that says which was chosen, with the reason for each that was not.

    Raises
    ------
    EngineUnavailableError
        The device asked for is not there.
    BundleError
        The bundle has no graph for it.
    """
    match device:
        case "cpu" | "cuda" | "tensorrt":
            _check(bundle, device)
            return device, f"{PROVIDER_NAMES[device]} (asked for)"
        case "auto":
            reason = "no GPU runtime installed"
            if PROVIDER_NAMES["cuda"] in import_onnxruntime().get_available_providers():
                try:
                    _check(bundle, "cuda")
                except (EngineUnavailableError, BundleError) as error:
                    reason = str(error)
                else:
                    return "cuda", f"{PROVIDER_NAMES['cuda']} (auto)"
            choice = f"{PROVIDER_NAMES['cpu']} (auto; {PROVIDER_NAMES['cuda']}: {reason})"
            log.info("engine: %s", choice)
            return "cpu", choice
        case _:
            assert_never(device)


def graph_engine(bundle: Bundle, provider: Provider, threads: int | None, *, pixels: bool) -> OrtEngine:
    """The engine of one of a bundle's graphs, not yet open.

    Parameters
    ----------
    bundle
        The verified bundle.
    provider
        From `choose_provider`.
    threads
        Threads on the CPU; None: one for each core.
    pixels
        Of the fused graph, tiles → pixel features; else of the backbone's.

    Raises
    ------
    UsageError
        Pixel features of a bundle without upsampler.
    """
    form = _form(provider)
    graph = bundle.pixel_graph(form) if pixels else bundle.graph(form)
    if provider == "cpu":
        return OrtEngine(graph, provider, threads)
    # ONNX Runtime keys its TensorRT engines by GPU architecture, but neither by model nor by version.
    name = f"tensorrt-{bundle.hash[:16]}-{graph.stem}-{import_onnxruntime().__version__}"
    return OrtEngine(graph, provider, threads, Path.home() / ".cache" / "phaseline" / name)


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


def _check(bundle: Bundle, provider: Provider) -> None:
    bundle.graph(_form(provider))
    check_provider(provider)


def _form(provider: Provider) -> Literal["cpu", "portable"]:
    return "cpu" if provider == "cpu" else "portable"
