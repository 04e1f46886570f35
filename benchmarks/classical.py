"""Speed, deviation and memory of the classical features against plain scikit-image, in one process."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.memory import peak_bytes
from benchmarks.references.classical import reference_classical
from benchmarks.report import emit, markdown
from phaseline.clients.classical import ClassicalFeatures

FAMILIES = ("gaussian", "sobel", "hessian", "difference", "membrane")
"""First words of the channels' names."""


def run(size: int = 2048, repeats: int = 3) -> list[dict[str, Any]]:
    """Measure the default set on a generated size × size micrograph.

    Returns
    -------
    Rows with the keys ``what``, ``value`` and ``note``; the one named ``ratio`` is the median over the repeats of
    (scikit-image's time / this project's time), the two timed one after the other in every repeat.
    """
    features = ClassicalFeatures()
    image = micrograph(size)
    memory = _memory_ratio(size)
    features.compute(image[:64, :64])
    reference_classical(image[:64, :64], features, np.float32)
    plain, ours, single, reused, processor = [], [], [], [], []
    out = np.zeros((features.channels, size, size), np.float32)
    for _ in range(repeats):
        start = time.process_time()
        plain.append(_seconds(lambda: reference_classical(image, features, np.float32)))
        middle = time.process_time()
        ours.append(_seconds(lambda: features.compute(image)))
        processor.append((middle - start) / (time.process_time() - middle))
        single.append(_seconds(lambda: features.compute(image, threads=1)))
        reused.append(_seconds(lambda: features.compute(image, out=out)))

    def against(times: list[float]) -> float:
        return statistics.median(slow / fast for slow, fast in zip(plain, times, strict=True))

    rows = [
        _row("scikit-image", statistics.median(plain), "s; its faster, float32 form"),
        _row("this", statistics.median(ours), "s; all cores, new output array"),
        _row("ratio", against(ours), "× as fast, all cores, new output array"),
        _row("ratio, processor time", statistics.median(processor), "× less, which other load on the machine hardly "
             "changes"),
        _row("ratio, one thread", against(single), "× as fast"),
        _row("ratio, out=", against(reused), "× as fast, all cores, writing to an array that exists"),
        _row("peak memory", memory, "× the returned array"),
    ]
    deviations = _deviations(out, reference_classical(image, features), features.names)
    return rows + [_row(f"deviation, {family}", worst, "of the channel's largest absolute value, from float64 "
                        "scikit-image, borders included") for family, worst in deviations.items()]


def micrograph(size: int) -> NDArray[np.uint8]:
    """A generated two-phase micrograph with grains, a brightness gradient and noise."""
    rng = np.random.default_rng(0)
    grains = ndimage.gaussian_filter(rng.standard_normal((size, size), np.float32), 6) > 0
    shade = np.linspace(0, 30, size, dtype=np.float32)
    grey = 70 + 80 * grains + shade + rng.normal(0, 12, (size, size))
    drawn: NDArray[np.uint8] = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classical", description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="rows and columns of the image, px (default: 2048)")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved repeats (default: 3)")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--peak-of-one-run", action="store_true", help="print the memory figures of this process only")
    options = parser.parse_args(arguments)
    if options.peak_of_one_run:
        print(json.dumps(_peak_of_one_run(options.size)))
        return
    rows = [{"what": row["what"], "value": f"{row['value']:.3g}", "": row["note"]} for row in run(options.size, options.repeats)]
    emit(markdown("Classical features: phaseline against plain scikit-image", rows,
                  ["numpy", "opencv-python-headless", "scikit-image"]), options.out)


def _row(what: str, value: float, note: str) -> dict[str, Any]:
    return {"what": what, "value": value, "note": note}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _deviations(ours: NDArray[np.float32], reference: NDArray[np.float32], names: tuple[str, ...]) -> dict[str, float]:
    worst = dict.fromkeys(FAMILIES, 0.0)
    for name, plane, expected in zip(names, ours, reference, strict=True):
        family = name.split()[0]
        worst[family] = max(worst[family], float(np.abs(plane - expected).max() / np.abs(expected).max()))
    return worst


def _memory_ratio(size: int) -> float:
    """Growth of a fresh process's peak memory during one run, over the size of the result."""
    command = [sys.executable, "-m", "benchmarks.classical", "--size", str(size), "--peak-of-one-run"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    return float(figures["growth_bytes"] / figures["result_bytes"])


def _peak_of_one_run(size: int) -> dict[str, int]:
    features = ClassicalFeatures()
    # Drawn directly as bytes: temporary arrays would raise the peak before the run, and so hide some of its growth.
    image = np.random.default_rng(0).integers(0, 256, (size, size), np.uint8)
    features.compute(image[:128, :128])
    before = peak_bytes()
    result = features.compute(image)
    return {"growth_bytes": peak_bytes() - before, "result_bytes": result.nbytes}


if __name__ == "__main__":
    main()
