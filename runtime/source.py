"""`LocalSource`: a bundle's features, computed in this process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import ATTENTION, F16, PATCH_FEATURES, U8, BundleSpec, FeatureSource
from phaseline.runtime.engine import Device, open_engine
from phaseline.runtime.errors import EngineError, UsageError
from phaseline.runtime.ort import OrtEngine


class LocalSource:
    """Runs a bundle here; opens on ``with``.

    Parameters
    ----------
    bundle
        From `open_bundle`.
    device
        ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
    threads
        Threads on the CPU; None: one for each core.
    batch
        Tiles in one run of the graph. None: 1 on the CPU, which one tile keeps busy already; the bundle's `max_batch` on a
        GPU.
    """

    def __init__(
        self, bundle: Bundle, device: Device = "auto", threads: int | None = None, batch: int | None = None
    ) -> None:
        if batch is not None and not 1 <= batch <= bundle.spec.max_batch:
            raise UsageError(f"a batch of {batch} tiles was asked for; this bundle takes 1…{bundle.spec.max_batch}")
        self.bundle = bundle
        self.device: Device = device
        self.threads = threads
        self.engine_choice = ""
        self._batch = batch
        self._engine: OrtEngine | None = None
        self._stack = contextlib.ExitStack()

    @property
    def spec(self) -> BundleSpec:
        """What the source computes."""
        return self.bundle.spec

    @property
    def bundle_hash(self) -> str:
        """Digest of the bundle behind it."""
        return self.bundle.hash

    def __enter__(self) -> Self:
        self._engine, self.engine_choice = open_engine(self.bundle, self.device, self.threads, self._stack)
        return self

    def __exit__(self, *exc: object) -> None:
        self._engine = None
        self._stack.close()

    def patch_features(self, tiles: U8) -> F16:
        """Projected patch features: float16 array of shape (n, k, h, w) of uint8 tiles (n, in_channels, T, T)."""
        return self.outputs(tiles, [PATCH_FEATURES])[0]

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_patch_features`; takes `max_batch` tiles ahead."""
        return in_batches(self, tiles)

    def attention(self, tiles: U8) -> F16:
        """[CLS] attention of the last block: float16 array of shape (n, heads, h, w)."""
        return self.outputs(tiles, [ATTENTION])[0]

    def outputs(self, tiles: U8, names: Sequence[str]) -> list[F16]:
        """Some of the graph's outputs, facets included, from one run.

        Parameters
        ----------
        tiles
            uint8 array of shape (n, in_channels, T, T).
        names
            Some of ``patch_features``, ``attention``, and the bundle's facets.

        Returns
        -------
        One float16 array of shape (n, …) for each name.

        Raises
        ------
        UsageError
            Tiles of another dtype or shape, or a name that the bundle has not.
        EngineError
            The source is not open, or the engine failed.
        """
        spec = self.spec
        check_tiles(tiles, spec)
        known = (PATCH_FEATURES, ATTENTION, *spec.facets)
        for name in names:
            if name not in known:
                raise UsageError(f"output {name!r} is not in this bundle, which has {', '.join(known)}; "
                                 "export it with --facets")
        if self._engine is None:
            raise EngineError("the source is not open; use it inside `with`")
        batch = self._batch or (1 if self._engine.provider == "cpu" else spec.max_batch)
        runs = [self._engine.run(tiles[i : i + batch], names) for i in range(0, len(tiles), batch)]
        return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def check_tiles(tiles: U8, spec: BundleSpec) -> None:
    """Refuse a batch of tiles that a bundle does not take.

    Raises
    ------
    UsageError
        Another dtype or shape, or no tile.
    """
    expected = (spec.in_channels, spec.tile_px, spec.tile_px)
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1:] != expected or not len(tiles):
        raise UsageError(f"tiles are {tiles.dtype} of shape {tiles.shape}, expected uint8 of shape (n, "
                         f"{', '.join(map(str, expected))})")


def in_batches(source: FeatureSource, tiles: Iterable[U8]) -> Iterator[F16]:
    """`FeatureSource.iter_patch_features` for a source that works on one batch of `max_batch` tiles at a time."""
    rest = iter(tiles)
    while batch := list(itertools.islice(rest, source.spec.max_batch)):
        yield from source.patch_features(np.stack(batch))
