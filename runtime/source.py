"""`LocalSource`: a bundle's features, computed in this process."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import numpy as np

from phaseline.runtime.bundle import Bundle
from phaseline.runtime.contract import ATTENTION, F16, PATCH_FEATURES, PIXEL_FEATURES, U8, BundleSpec
from phaseline.runtime.engine import Device, choose_provider, graph_engine
from phaseline.runtime.errors import EngineError, UsageError
from phaseline.runtime.ort import OrtEngine, Provider

PIXEL_BYTES = 1 << 26
"""What the pixel features of tiles that are worked on together may take, unless one alone takes more."""


class LocalSource:
    """Runs a bundle here; opens on ``with``.

    A bundle with an upsampler has two graphs: the backbone's, and the fused one of pixel features. Each is read when an output of
    it is first asked for, by whichever thread asks first, and stays until the end of ``with``: who uses one pays for one.

    Parameters
    ----------
    bundle
        From `open_bundle`.
    device
        ``auto``, ``cpu``, ``cuda`` or ``tensorrt``.
    threads
        Threads on the CPU; None: one for each core.
    batch
        Tiles in one run of a graph. None: 1 on the CPU, which one tile keeps busy already; on a GPU the bundle's `max_batch`, and
        `pixel_batch` for pixel features.
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
        self._provider: Provider | None = None
        self._engines: dict[bool, OrtEngine] = {}
        self._lock = threading.Lock()
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
        self._provider, self.engine_choice = choose_provider(self.bundle, self.device)
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._provider = None
            self._engines.clear()
            self._stack.close()

    def patch_features(self, tiles: U8) -> F16:
        """Projected patch features: float16 array of shape (n, k, h, w) of uint8 tiles (n, in_channels, T, T)."""
        return self.outputs(tiles, [PATCH_FEATURES])[0]

    def iter_patch_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_patch_features`; takes as many tiles ahead as one run takes."""
        return in_batches(self.patch_features, tiles, self._tiles_at_once(pixels=False))

    def pixel_features(self, tiles: U8) -> F16:
        """Features of every pixel: float16 array of shape (n, k', T, T); `UsageError` if the bundle has no upsampler."""
        return self.outputs(tiles, [PIXEL_FEATURES])[0]

    def iter_pixel_features(self, tiles: Iterable[U8]) -> Iterator[F16]:
        """See `FeatureSource.iter_pixel_features`; takes as many tiles ahead as one run takes."""
        return in_batches(self.pixel_features, tiles, self._tiles_at_once(pixels=True))

    def attention(self, tiles: U8) -> F16:
        """[CLS] attention of the last block: float16 array of shape (n, heads, h, w)."""
        return self.outputs(tiles, [ATTENTION])[0]

    def outputs(self, tiles: U8, names: Sequence[str]) -> list[F16]:
        """Some of the graphs' outputs, facets included, from one run of each graph that has some of them.

        Parameters
        ----------
        tiles
            uint8 array of shape (n, in_channels, T, T).
        names
            Some of ``patch_features``, ``attention``, the bundle's facets, and with an upsampler ``pixel_features``.

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
        check_tiles(tiles, self.spec)
        results: dict[str, F16] = {}
        for pixels in (False, True):
            if wanted := [name for name in names if (name == PIXEL_FEATURES) == pixels]:
                engine, batch = self._open(wanted), self._tiles_at_once(pixels=pixels)
                runs = [engine.run(tiles[i : i + batch], wanted) for i in range(0, len(tiles), batch)]
                parts = zip(*runs, strict=True)
                results |= {name: np.concatenate(part) if len(part) > 1 else part[0]
                            for name, part in zip(wanted, parts, strict=True)}
        return [results[name] for name in names]

    def prepare(self, names: Sequence[str]) -> None:
        """Read the graphs of some outputs now rather than at first use; raises as `outputs`."""
        for name in names:
            self._open([name])

    def _open(self, names: Sequence[str]) -> OrtEngine:
        """The open engine of outputs that one graph has."""
        pixels = names[0] == PIXEL_FEATURES
        known = (PATCH_FEATURES, ATTENTION, *self.spec.facets, *([PIXEL_FEATURES] if pixels else []))
        for name in names:
            if name not in known:
                raise UsageError(f"output {name!r} is not in this bundle, which has {', '.join(known)}; "
                                 "export it with --facets")
        with self._lock:
            if self._provider is None:
                raise EngineError("the source is not open; use it inside `with`")
            if pixels not in self._engines:
                engine = graph_engine(self.bundle, self._provider, self.threads, pixels=pixels)
                self._engines[pixels] = self._stack.enter_context(engine)
            return self._engines[pixels]

    def _tiles_at_once(self, *, pixels: bool) -> int:
        return self._batch or (1 if self._provider == "cpu" else pixel_batch(self.spec) if pixels else self.spec.max_batch)


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


def pixel_batch(spec: BundleSpec) -> int:
    """Tiles whose pixel features are computed or sent together: at most `max_batch`, and as many as `PIXEL_BYTES` hold."""
    return max(1, min(spec.max_batch, PIXEL_BYTES // (2 * max(1, spec.pixel_channels) * spec.tile_px**2)))


def in_batches(compute: Callable[[U8], F16], tiles: Iterable[U8], batch: int) -> Iterator[F16]:
    """The iterator of a source that works on one batch of tiles at a time.

    Parameters
    ----------
    compute
        Features of tiles, (n, …).
    tiles
        uint8 arrays of shape (in_channels, T, T).
    batch
        How many of them go into one call.
    """
    rest = iter(tiles)
    while taken := list(itertools.islice(rest, batch)):
        yield from compute(np.stack(taken))
