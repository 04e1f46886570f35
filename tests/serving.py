"""What tests of the server share: bundles, recipes, a seeded frame, and what a server may leave behind."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.features import DeepFeatures
from phaseline.clients.fit import fit
from phaseline.clients.recipe import Recipe
from phaseline.runtime.average import PixelSampling
from phaseline.runtime.bundle import MANIFEST, Bundle, open_bundle
from phaseline.runtime.ownership import SHARED_MEMORY, is_abandoned
from phaseline.runtime.source import LocalSource

U16 = npt.NDArray[np.uint16]


def frame(seed: int, rows: int = 96, cols: int = 120) -> U16:
    """A seeded 16-bit frame of dark and bright blobs with noise."""
    random = np.random.default_rng(seed)
    blobs = gaussian_filter(random.standard_normal((rows, cols)), 6) > 0
    grey = 20_000 + 15_000 * blobs + 2_000 * random.standard_normal((rows, cols))
    return np.clip(grey, 0, 65_535).astype(np.uint16)


def strokes(image: U16, values: tuple[int, int] = (1, 2)) -> npt.NDArray[np.uint16]:
    """Labels of a frame's darkest and brightest pixels; 0 elsewhere."""
    smooth = gaussian_filter(image.astype(np.float64), 2)
    low, high = np.percentile(smooth, (15, 85))
    return (values[0] * (smooth < low) + values[1] * (smooth > high)).astype(np.uint16)


def without_upsampler(bundle: Bundle, folder: Path) -> Bundle:
    """A copy of a bundle that gives no pixel features."""
    shutil.copytree(bundle.path, folder)
    files = {name: file for name, file in bundle.spec.files.items() if name not in bundle.spec.pixel_graphs.values()}
    spec = dataclasses.replace(bundle.spec, pixel_graphs={}, pixel_channels=0, upsampler={}, files=files)
    (folder / MANIFEST).write_text(spec.to_json(), encoding="utf-8")
    return open_bundle(folder)


def fit_recipe(
    bundle: Bundle | None, transforms: str = "none", values: tuple[int, int] = (1, 2), seed: int = 0,
    interpolation: str = "bilinear",
) -> Recipe:
    """A recipe for frames as `frame` makes them: deep and a few classical features, or the latter only."""
    image = frame(1000 + seed)
    classical = ClassicalFeatures(sigmas=(0, 1, 2))
    if bundle is None:
        return fit([image], [strokes(image, values)], classical=classical, seed=seed, threads=2)
    sampling = PixelSampling.for_bundle(bundle.spec, interpolation=interpolation)
    with LocalSource(bundle, "cpu", 2) as source:
        return fit([image], [strokes(image, values)], source=source, classical=classical, seed=seed, threads=2,
                   deep=DeepFeatures.for_bundle(bundle.spec, transforms, sampling), bundle_path=str(bundle.path))


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in SHARED_MEMORY.iterdir()} if SHARED_MEMORY.is_dir() else set()


def left_behind() -> set[str]:
    """Names in /dev/shm and in the temporary folder that processes of this machine made and that outlived them."""
    names = shared_memory() | {path.name for path in Path(tempfile.gettempdir()).iterdir()}
    return {name for name in names if any(is_abandoned(name, kind) for kind in ("serve", "client"))}
