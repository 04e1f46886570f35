"""Features of chosen pixels of some images: computed once a setting, kept on disk, shared by all tables.

    images ─▶ PixelFeatures (the product's) ─▶ rows of the chosen pixels ─▶ NAME-KEY.npz ─▶ classifiers of any table

The key holds all that decides the numbers: bundle, settings, intensity window, the image's and the pixels' content.
Stored as float32: determinants of coarse Hessians are below float16's range, and labels stay the product's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from phaseline.clients.classical import ClassicalFeatures
from phaseline.clients.features import FEATURES_VERSION, DeepFeatures, FeatureSettings, PixelFeatures
from phaseline.clients.window import IntensityWindow, to_channels
from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import F32
from phaseline.runtime.source import LocalSource

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """Some columns of a table.

    Attributes
    ----------
    name
        As progress and file names call it.
    bundle, deep
        A bundle and how it is used; both None for the classical filter bank.
    """

    name: str
    bundle: Bundle | None = None
    deep: DeepFeatures | None = None

    def settings(self, channels: int) -> FeatureSettings:
        """The product's settings that give these columns, for images of 1 or 3 channels."""
        return FeatureSettings(channels, ClassicalFeatures() if self.bundle is None else None, self.deep)


CLASSICAL = Part("classical")


class PixelTable:
    """Features of chosen pixels.

    Parameters
    ----------
    names, images
        Of each image, its stem and its pixels, as `read_image` gives them.
    pixels
        For each image the chosen pixels: ascending flat indices.
    cache
        Folder that keeps what was computed; a run that was stopped goes on from it.
    threads
        Of engine and filters; None: one for each core.
    """

    def __init__(self, names: Sequence[str], images: Sequence[npt.NDArray[np.generic]], pixels: Sequence[I64], cache: Path,
                 threads: int | None = None) -> None:
        self._names, self._images, self._pixels = names, images, pixels
        self._cache, self._threads = cache, threads
        self._content = [hashlib.sha256(image.tobytes() + chosen.tobytes()).hexdigest()
                         for image, chosen in zip(images, pixels, strict=True)]
        self._loaded: dict[tuple[str, str], list[F32]] = {}

    def columns(self, part: Part, window: IntensityWindow, channels: int) -> list[F32]:
        """Of each image, a float32 array of shape (chosen pixels, features of the part).

        Parameters
        ----------
        part
            Which features.
        window
            Intensities that become 0 and 255.
        channels
            1 or 3, of the recipe.
        """
        key = json.dumps({
            "version": FEATURES_VERSION,
            "bundle": None if part.bundle is None else part.bundle.hash,
            "settings": dataclasses.asdict(part.settings(channels)),
            "window": dataclasses.asdict(window),
        }, sort_keys=True)
        known = (part.name, key)
        if known not in self._loaded:
            files = [self._cache / f"{name}-{hashlib.sha256((key + content).encode()).hexdigest()[:20]}.npz"
                     for name, content in zip(self._names, self._content, strict=True)]
            self._fill(part, window, channels, files)
            # One part of each kind is in use at a time, beside the classical ones.
            self._loaded = {k: v for k, v in self._loaded.items() if k[0] in (CLASSICAL.name, part.name)}
            self._loaded[known] = [_load(file) for file in files]
        return self._loaded[known]

    def _fill(self, part: Part, window: IntensityWindow, channels: int, files: Sequence[Path]) -> None:
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        if not missing:
            return
        self._cache.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            source = None if part.bundle is None else stack.enter_context(LocalSource(part.bundle, "cpu", self._threads))
            features = PixelFeatures(part.settings(channels), source, self._threads)
            for i in tqdm(missing, f"features: {part.name}", leave=False):
                seen = to_channels(window.apply(self._images[i]), channels)
                _save(files[i], _gather(features, seen, self._pixels[i]))


def _gather(features: PixelFeatures, image: npt.NDArray[np.uint8], pixels: I64) -> F32:
    wanted = np.zeros(image.shape[:2], bool)
    wanted.reshape(-1)[pixels] = True
    # Row by row, as fitting gathers them: the same training rows in the same order give the same classifier.
    return np.concatenate([np.ascontiguousarray(band[:, wanted[rows]].T) for rows, band in features.bands(image, wanted)])


def _save(file: Path, features: F32) -> None:
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.savez(stream, features=features)
    partial.replace(file)


def _load(file: Path) -> F32:
    with np.load(file, allow_pickle=False) as content:
        loaded: Any = content["features"]
    return np.asarray(loaded, np.float32)
