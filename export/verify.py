"""torch against the written graphs, each in a fresh ONNX Runtime session, on real-looking input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from phaseline.runtime.compare import Deviation, deviation
from phaseline.runtime.contract import ATTENTION, PATCH_FEATURES, PIXEL_FEATURES, TILES, U8, Precision
from phaseline.runtime.errors import MissingExtraError, ParityError

# Largest deviation of the patch features relative to their scale, and least cosine. float16 outputs alone cost 5e-4.
TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-3, "fp16": 2e-2, "int8": 0.5}
MIN_COSINE: Mapping[Precision, float] = {"fp32": 0.99999, "fp16": 0.9999, "int8": 0.98}
BATCHES = (1, 3)
NOISE = 4.0
Reference = Callable[[torch.Tensor], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Comparison:
    """One output of one graph at one batch size.

    Attributes
    ----------
    form, batch, output
        What was compared.
    deviation
        From torch in float32.
    """

    form: str
    batch: int
    output: str
    deviation: Deviation

    def __str__(self) -> str:
        return f"{self.form:8}  batch {self.batch}  {self.output:14}  {self.deviation}"


def noisy(images: Sequence[U8], count: int, seed: int = 0) -> U8:
    """The first `count` tiles with Gaussian noise of 4 grey levels, repeated where there are fewer.

    Parameters
    ----------
    images
        uint8 arrays of shape (1, channels, T, T).

    Returns
    -------
    uint8 array of shape (count, channels, T, T).
    """
    tiles = np.concatenate([images[index % len(images)] for index in range(count)]).astype(np.float64)
    tiles += np.random.default_rng(seed).normal(0, NOISE, tiles.shape)
    return tiles.round().clip(0, 255).astype(np.uint8)


def compare_graphs(reference: Reference, names: Sequence[str], graphs: Mapping[str, Path], tiles: Sequence[U8], *,
                   max_batch: int) -> list[Comparison]:
    """Run every graph on one tile and on three, and torch.

    Parameters
    ----------
    reference
        What torch computes, in float32: uint8 tiles (n, channels, T, T) → one tensor an output.
    names
        Of the outputs.
    graphs
        Form to file.
    tiles
        uint8 arrays of shape (1, channels, T, T).
    max_batch
        Larger batches go in several calls.

    Raises
    ------
    MissingExtraError
        ONNX Runtime is not installed.
    ParityError
        A graph gives NaN or infinity.
    """
    found = []
    batches = {batch: noisy(tiles, batch) for batch in BATCHES}
    expected: dict[int, list[npt.NDArray[np.float32]]] = {}
    for batch, array in batches.items():
        with torch.inference_mode():
            expected[batch] = [t.numpy() for t in reference(torch.from_numpy(array))]
    for form, path in graphs.items():
        session = _session(path)
        for batch, array in batches.items():
            calls = [session.run(names, {TILES: array[i:i + max_batch]}) for i in range(0, batch, max_batch)]
            outputs = [np.concatenate(parts) for parts in zip(*calls, strict=True)]
            for name, output, wanted in zip(names, outputs, expected[batch], strict=True):
                try:
                    found.append(Comparison(form, batch, name, deviation(output, wanted)))
                except ValueError as error:
                    raise ParityError(f"{form} graph, {name}: {error}; export with --precision fp32") from error
    return found


def judge(comparisons: Sequence[Comparison], precision: Precision, tolerance: float | None) -> None:
    """Accept or refuse.

    Parameters
    ----------
    comparisons
        What was measured.
    precision
        Sets the default tolerance and the least cosine.
    tolerance
        Largest deviation relative to the output's scale; None for the precision's own.

    Raises
    ------
    ParityError
        An output deviates by more.
    """
    limit, floor = TOLERANCE[precision] if tolerance is None else tolerance, MIN_COSINE[precision]
    worst = max(comparisons, key=lambda c: c.deviation.max_rel)
    if worst.deviation.max_rel > limit:
        raise ParityError(f"{worst.form} graph, batch {worst.batch}, {worst.output}: {worst.deviation} against torch, "
                          f"expected max rel of at most {limit:g}; nothing was written (allow more with --tolerance)")
    least = min(comparisons, key=lambda c: c.deviation.cosine)
    if least.deviation.cosine < floor:
        raise ParityError(f"{least.form} graph, batch {least.batch}, {least.output}: {least.deviation} against torch, "
                          f"expected a cosine of at least {floor}; nothing was written (choose a higher --precision)")


def parity_numbers(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The worst of each number, as a bundle records them."""
    features, attention, pixels = ([c.deviation for c in comparisons if c.output == name]
                                   for name in (PATCH_FEATURES, ATTENTION, PIXEL_FEATURES))
    numbers = {"max_abs": max(d.max_abs for d in features), "max_rel": max(d.max_rel for d in features),
               "cosine": min(d.cosine for d in features), "attention_max_abs": max(d.max_abs for d in attention)}
    if pixels:
        numbers |= {"pixel_max_abs": max(d.max_abs for d in pixels), "pixel_cosine": min(d.cosine for d in pixels)}
    return numbers


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "verifying an export") from error
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
