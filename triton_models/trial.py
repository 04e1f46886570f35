"""Trying a recipe before a server loads it, in a process of its own: a classifier file may crash the library that reads it.

Triton 2.51 itself may crash when a model that it was asked to load from inside a model fails to load. So what would fail is
found out before.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import numpy as np

from phaseline.clients.recipe import load_recipe
from phaseline.clients.segmenter import Segmenter
from phaseline.runtime.contract import F16, U8, BundleSpec
from phaseline.runtime.errors import PhaselineError, RecipeError
from phaseline.runtime.source import in_batches

TRIAL_TIMEOUT_S = 90.0
_SIDE_PX = 64


class ZeroSource:
    """A `FeatureSource` whose features are all zero: the shapes of a bundle without its engine."""

    def __init__(self, spec: BundleSpec) -> None:
        self.spec = spec
        self.bundle_hash = spec.digest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def patch_features(self, tiles: U8) -> F16:
        """float16 zeros of shape (n, k, h, w)."""
        return np.zeros((len(tiles), self.spec.channels, self.spec.grid, self.spec.grid), np.float16)

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """float16 zeros of shape (k, h, w) for each tile."""
        return in_batches(self.patch_features, tiles, 1)

    def pixel_features(self, tiles: U8) -> F16:
        """float16 zeros of shape (n, k', T, T)."""
        return np.zeros((len(tiles), self.spec.pixel_channels, self.spec.tile_px, self.spec.tile_px), np.float16)

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """float16 zeros of shape (k', T, T) for each tile."""
        return in_batches(self.pixel_features, tiles, 1)

    def attention(self, tiles: U8) -> F16:
        """float16 zeros of shape (n, heads, h, w)."""
        return np.zeros((len(tiles), self.spec.heads, self.spec.grid, self.spec.grid), np.float16)


def segment_noise(folder: Path, spec: BundleSpec) -> None:
    """Load a recipe, and segment a small frame of noise with it.

    Raises
    ------
    PhaselineError
        It cannot be done.
    """
    recipe = load_recipe(folder, threads=1, device="cpu")
    kind = recipe.window.kind or "uint16"
    shape = (_SIDE_PX, _SIDE_PX) if recipe.features.image_channels == 1 else (_SIDE_PX, _SIDE_PX, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape).astype("float32" if kind == "float" else kind)
    Segmenter(recipe, None if recipe.bundle is None else ZeroSource(spec), 1).segment(noise)


def try_recipe(folder: Path, spec: BundleSpec, python: str) -> None:
    """Do `segment_noise` in a new process.

    Parameters
    ----------
    folder
        The recipe.
    spec
        Of the bundle that the server serves.
    python
        The interpreter.

    Raises
    ------
    RecipeError
        It failed, crashed, or did not end.
    """
    try:
        done = subprocess.run([python, "-m", "phaseline.triton_models.trial", str(folder)], input=spec.to_json(), text=True,
                              capture_output=True, timeout=TRIAL_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RecipeError(f"trying it on a frame of noise did not end within {TRIAL_TIMEOUT_S:.0f} s") from error
    if done.returncode < 0:
        raise RecipeError(f"reading it crashed the process that tried it (signal {-done.returncode}); fit again")
    if done.returncode:
        raise RecipeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])


def main() -> int:
    """The new process: one argument, the folder; the specification on standard input."""
    try:
        segment_noise(Path(sys.argv[1]), BundleSpec.from_json(sys.stdin.read()))
    except PhaselineError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
